"""`mount.pmemfs`: what mount(8) calls for `mount -t pmemfs` and for a line of fstab."""

from __future__ import annotations

import sys

from pmemfs.cli.early import leave_quietly, open_standard_files, wait_for_children


def main() -> None:
    """The program."""
    leave_quietly()
    wait_for_children()
    open_standard_files()
    from pmemfs.control.prepared import discard, prepare

    prepare()
    from pmemfs.cli.mount_type import run_helper

    code = run_helper(sys.argv[1:])
    leave_quietly()
    discard()
    sys.exit(code)
