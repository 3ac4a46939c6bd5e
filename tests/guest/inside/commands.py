"""A process that has loaded the program, and forks one for each command that a script gives.

Under emulation, to start Python and to load the program takes seconds, and there are dozens of
commands. commands.py COMMANDS CODES: two fifos, for lines `PID DIRECTORY WORD...` of a shell whose
standard files the command gets, and for exit codes. See `pmemfs` in common.sh.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from kit import forking

LOADED = [
    "pmemfs.daemons.mountd",
    *(f"pmemfs.cli.{name}" for name in ("create", "mount", "umount")),
]
"""What most commands load; each loads the rest by itself."""


def become(shell: str, directory: str, *words: str) -> None:
    """Be a command of a shell."""
    ways = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
    forking.take(*(os.open(f"/proc/{shell}/fd/{fd}", way) for fd, way in enumerate(ways)))
    os.chdir(directory)
    sys.argv[:] = words
    forking.run_as_started()


def main() -> None:
    """Serve until the machine ends."""
    # It was for `kit` alone.
    del os.environ["PYTHONPATH"]
    for name in LOADED:
        importlib.import_module(name)
    commands, codes = sys.argv[1:]
    while True:
        with open(commands) as fifo:
            line = fifo.readline()
        if not (pid := os.fork()):
            become(*line.split())
            return
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        Path(codes).write_text(f"{code}\n")


if __name__ == "__main__":
    main()
