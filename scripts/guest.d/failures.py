"""What can go wrong with a guest, as an exit status and a sentence.

Holds: a user's mistake, a missing package or network never prints a traceback. All of it is raised
as GuestError and told once, in scripts/guest.
"""

from __future__ import annotations

import enum
import sys


class Status(enum.IntEnum):
    """Exit statuses that are not the command's own."""

    USAGE = 2
    UNAVAILABLE = 77
    TIMEOUT = 124
    GUEST_FAILED = 125
    INTERRUPTED = 130
    KILLED = 137
    OUTPUT_CLOSED = 141


class GuestError(Exception):
    """A failure to be told in one sentence, after the boot messages if they may explain it."""

    def __init__(self, status: Status, sentence: str, console: bytes = b"") -> None:
        super().__init__(sentence)
        self.status = status
        self.console = console


def unavailable(sentence: str) -> GuestError:
    """This machine can't run guests at all: a test that needs one is skipped."""
    return GuestError(Status.UNAVAILABLE, sentence)


def say(text: str) -> None:
    """Tell the person at the terminal; stdout is the command's."""
    print(f"guest: {text}", file=sys.stderr, flush=True)
