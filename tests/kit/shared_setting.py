"""A setting of the machine that several runs of the tests need at once, and nobody else.

Each run holds a shared lock of one note while it needs the setting. The run that changes the
setting writes down what it was, and the last one to leave restores that: it can get the lock for
itself. The kernel releases the lock of a run that was killed; the next run restores what that one
has left.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def kept_at(setting: Path, value: str, note: Path) -> Iterator[None]:
    """Keep a setting at a value as long as any run that has the same note asks for that."""
    with open(note, "a+") as file:
        # Waits for nobody but a run that restores the setting just now.
        fcntl.flock(file, fcntl.LOCK_SH)
        found = setting.read_text().strip()
        if found != value:
            note.write_text(found)
            setting.write_text(value)
        try:
            yield
        finally:
            _leave(file.fileno(), setting, note)


def _leave(descriptor: int, setting: Path, note: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    before = note.read_text()
    if before:
        setting.write_text(before)
        os.truncate(note, 0)
