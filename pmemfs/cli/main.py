"""`pmemfs`: the first moment of the program, before anything is loaded that takes long."""

from __future__ import annotations

import sys

from pmemfs.cli.early import leave_quietly


def main() -> None:
    """The program."""
    leave_quietly()
    from pmemfs.cli.commands import pmemfs, run

    code = run(pmemfs, sys.argv[1:])
    leave_quietly()
    sys.exit(code)
