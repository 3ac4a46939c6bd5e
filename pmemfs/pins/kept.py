"""Pins as bytes, for the daemon that takes the place of one that has died.

The keeper holds the daemon's end of each living or resting pin, together with its description: a
line of JSON and the pieces of its files, three numbers each. What changes while a pin lives lies in
the words (`pins/words`), and references are taken anew. Invariants:
- the keeper has a pin before its client knows of it. Otherwise the client could go on using pages
  that the next daemon gives to others;
- the keeper has it until its last reference was dropped. A client that has ended in between is
  noticed by the next daemon at once, because the kernel has hung up on that socket.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from pmemfs.pins.pin import Pin, PinnedFile

WORDS = "pin-words"
"""What the keeper calls the memory of the words."""
_PIN = "pin-"
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class Keeper(Protocol):
    """Who keeps descriptors for the next daemon."""

    def store(self, name: str, fds: Sequence[int], data: bytes = b"") -> None:
        """Keep copies of descriptors, and bytes, under a name; they replace what was there."""

    def drop(self, name: str) -> None:
        """Keep nothing under a name any more."""


class Stored(Protocol):
    """What was kept under one name."""

    @property
    def data(self) -> bytes:
        """The bytes."""

    @property
    def fds(self) -> Sequence[int]:
        """The descriptors, which belong to whoever takes them over."""


class Description(NamedTuple):
    """What a description says of a pin."""

    number: int
    place: int
    pid: int
    started: int
    command: str
    since_ns: int
    is_writable: bool
    files: list[PinnedFile]


def name_of(pin: Pin) -> str:
    """What the keeper calls a pin."""
    return f"{_PIN}{pin.number}"


def kept_pins(stored: Mapping[str, Stored]) -> list[tuple[Description, int]]:
    """The pins among all that was kept, the oldest first, each with the daemon's end of it.

    Raises ValueError, LookupError and TypeError for what is no description.
    """
    found = []
    for name, kept in stored.items():
        if name.startswith(_PIN) and name != WORDS:
            found.append((read_description(kept.data), kept.fds[0]))
    return sorted(found)


def describe(pin: Pin) -> bytes:
    """A pin as bytes."""
    client = pin.client
    files = [
        (file.inode, file.generation, file.path, file.offset_bytes, file.length_bytes,
         file.size_bytes, len(file.pieces))
        for file in pin.files
    ]  # fmt: skip
    head = _ENCODE({
        "number": pin.number, "place": pin.place, "pid": client.pid, "started": client.started,
        "command": client.command, "since_ns": pin.since_ns, "is_writable": pin.is_writable,
        "files": files,
    })  # fmt: skip
    pieces = chain.from_iterable(chain.from_iterable(file.pieces for file in pin.files))
    return head.encode() + b"\n" + array("q", pieces).tobytes()


def read_description(data: bytes) -> Description:
    """The opposite of `describe`. Raises ValueError, LookupError and TypeError."""
    head, _, raw = data.partition(b"\n")
    said = json.loads(head)
    numbers = array("q", raw).tolist()
    pieces = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    files = []
    for *of_file, count in said.pop("files"):
        files.append(PinnedFile._make([*of_file, pieces[:count]]))
        del pieces[:count]
    return Description(**said, files=files)
