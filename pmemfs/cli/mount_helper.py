"""`mount.pmemfs`: what mount(8) calls for `mount -t pmemfs` and for a line of fstab."""

from __future__ import annotations

import sys

from pmemfs.cli.early import leave_quietly


def main() -> None:
    """The program."""
    leave_quietly()
    from pmemfs.cli.mount_type import run_helper

    code = run_helper(sys.argv[1:])
    leave_quietly()
    sys.exit(code)
