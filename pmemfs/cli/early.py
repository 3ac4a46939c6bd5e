"""What a program does first: about Ctrl-C, and what its caller has left it. Loads next to nothing.

Python turns an interrupt into KeyboardInterrupt wherever it is just then. While modules are loaded
that is deep inside the import system, which prints a traceback, or swallows it. So the process just
ends until a command is loaded, which has something to tidy up, and again when the command is done.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130


def begin() -> None:
    """What every program does before anything else."""
    leave_quietly()
    wait_for_children()
    open_standard_files()


def leave_quietly() -> None:
    """From now on an interrupt ends the process; unless whoever started it has it ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)


def raise_interrupts() -> None:
    """Undo `leave_quietly`: from now on an interrupt is an exception."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def wait_for_children() -> None:
    """Learn how children end, also where our caller wanted to know nothing of its own.

    A program inherits that SIGCHLD is ignored; then the kernel keeps no word of a child that ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def open_standard_files() -> None:
    """Open what our caller has closed of standard input, output and error, as cron jobs do.

    The next file or socket would get such a number, and a child would take it for its input, or
    lose it.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is given out: this one. Children may have it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))
