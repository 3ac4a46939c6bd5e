"""Pins as bytes, for the daemon that takes the place of one that has died.

The keeper holds the daemon's end of each pin that lives or rests, together with its description: a
line of JSON and the pieces of its files, three numbers each. What changes while a pin lives lies in
the words (`pins/words`), and references are taken anew. Invariants:
- the keeper has a pin before its client knows of it. Otherwise the client could go on using pages
  that the next daemon gives to others;
- the keeper has it until its last reference was dropped. A client that has ended in between is
  noticed by the next daemon at once, because the kernel has hung up on that socket;
- what the keeper has longer is of no pin: it is marked as over in the words. Most pins are short,
  and the next one of the same place replaces what the keeper has, so nothing need be dropped.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from pmemfs.pins.pin import Pin, PinnedFile
from pmemfs.volume.base import Piece

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
    since_ns: int
    is_writable: bool
    pid: int
    started: int
    command: str
    files: list[PinnedFile]


def name_of(place: int) -> str:
    """What the keeper calls the pin of a place."""
    return f"{_PIN}{place}"


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
    client, pieces = pin.client, list[Piece]()
    files = []
    for file in pin.files:
        files.append((*file[:-1], len(file.pieces)))
        pieces += file.pieces
    head = _ENCODE(
        (pin.number, pin.place, pin.since_ns, pin.is_writable, client.pid, client.started,
         client.command, files)
    )  # fmt: skip
    return head.encode() + b"\n" + array("q", chain.from_iterable(pieces)).tobytes()


def read_description(data: bytes) -> Description:
    """The opposite of `describe`. Raises ValueError, LookupError and TypeError."""
    head, _, raw = data.partition(b"\n")
    *said, of_files = json.loads(head)
    numbers = array("q", raw).tolist()
    pieces = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    files, at = list[PinnedFile](), 0
    for *of_file, count in of_files:
        files.append(PinnedFile._make([*of_file, pieces[at : at + count]]))
        at += count
    return Description._make([*said, files])
