"""`mount.pmemfs`: what mount(8) calls for `mount -t pmemfs` and for a line of fstab."""

from __future__ import annotations

import sys

from pmemfs.cli.early import begin, leave_quietly


def main() -> None:
    """The program."""
    begin()
    from pmemfs.control.prepared import discard, prepare

    words = sys.argv[1:]
    if not any("remount" in word for word in words):
        prepare()
    from pmemfs.cli.mount_type import run_helper

    code = run_helper(words)
    leave_quietly()
    discard()
    sys.exit(code)
