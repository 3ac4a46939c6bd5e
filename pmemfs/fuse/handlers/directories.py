"""Listing directories, by names alone or with what each name leads to.

Invariant: every entry of a listing that was taken is answered. An entry that takes long to read, or
can't be read, ends the answer before it, and the next answer begins with it. So no inode is held
without the kernel learning of it: it would never be forgotten.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import HandleKind
from pmemfs.errors import PmemfsError, system_error
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.volume.base import Attributes, StoredListing, Volume
from pmemfs.volume.fs.reading import NotRead

_DT_DIRECTORY = 4
_DOTS = 2
"""The dots have the first positions in each directory."""
_OF_WORKERS = 1 << 62
"""Positions from here on were given by workers; see listings.pxi. A listing goes on as it began."""
_AT_ONCE = 256
_ERRORS = (OSError, PmemfsError, NotRead)
"""What an entry can't be read for."""


@dataclass(slots=True)
class _OpenDirectory:
    """A directory that is being listed. `listing` has its entries when the listing began, or when
    this process first went on with it."""

    ino: int
    is_noted: bool
    listing: list[bytes] | None = None


class Listed(NamedTuple):
    """An entry. `position` is that of the next entry; `type` is a DT_* number."""

    name: bytes
    ino: int
    type: int
    position: int
    attributes: Attributes | None = None


class Taken(NamedTuple):
    """What became of many entries: the position of the next one, whether any was taken, and whether
    the next one has no room."""

    position: int
    has_taken: bool
    is_full: bool


TakeStored = Callable[[StoredListing, int, list[bytes], int], Taken]
"""Takes entries of a directory, given its inode and all names, from a position on, and holds what
they lead to. It stops before an entry of which what is stored doesn't say enough."""


NamesAfter = Callable[[list[bytes], int, int], list[tuple[int, bytes]]]
"""Of names, those that come next behind a position that a worker has given, at most so many, each
with its position."""


class DirectoryHandlers:
    """Open directories."""

    def __init__(self, volume: Volume, opens: OpenPlaces) -> None:
        self._volume = volume
        self._places = opens
        self._open = {
            place.handle: _OpenDirectory(place.inode, not place.flags & os.O_NOATIME)
            for place in opens
            if place.kind == HandleKind.DIRECTORY and not place.owner
        }
        self.names_after: NamesAfter = _no_names

    def open(self, caller: Caller, ino: int, flags: int = 0) -> int:
        """A new handle. Raises OSError (ENFILE)."""
        handle = self._places.take(HandleKind.DIRECTORY, ino, flags, *caller)
        self._open[handle] = _OpenDirectory(ino, not flags & os.O_NOATIME)
        return handle

    def close(self, handle: int) -> None:
        """Close a handle."""
        self._directory(handle)
        del self._open[handle]
        self._places.give_back(handle)

    def listing(
        self, handle: int, start: int, take: Callable[[Listed], bool], *, with_attributes: bool,
        take_stored: TakeStored | None = None,
    ) -> None:  # fmt: skip
        """List the entries from a position on, until `take` says that an entry has no room.

        With attributes, each entry except the dots counts as looked up. Then `take_stored` may take
        many entries at once, from what is stored.
        """
        directory = self._directory(handle)
        if directory.is_noted:
            self._volume.note_read(directory.ino)
        if start >= _OF_WORKERS:
            self._go_on(directory.ino, start, take, with_attributes=with_attributes)
            return
        if start == 0 or directory.listing is None:
            directory.listing = self._volume.listing(directory.ino)
        ino, names, position = directory.ino, directory.listing, start
        end = len(names) + _DOTS
        with _Taking(self._volume, take) as taking:
            stored = self._volume.stored_listing(ino) if take_stored else None
            while position < end:
                if stored is not None and take_stored is not None and position >= _DOTS:
                    taken = take_stored(stored, ino, names, position)
                    position = taken.position
                    taking.has_taken |= taken.has_taken
                    if taken.is_full or position == end:
                        return
                if not taking.give(self._entry(ino, names, position, with_attributes)):
                    return
                position += 1

    def _go_on(
        self, ino: int, start: int, take: Callable[[Listed], bool], *, with_attributes: bool
    ) -> None:
        """Go on with a listing that a worker has begun."""
        with _Taking(self._volume, take) as taking:
            for position, name in self.names_after(self._volume.listing(ino), start, _AT_ONCE):
                if not taking.give(self._named(ino, name, position, with_attributes)):
                    return

    def _entry(
        self, ino: int, names: list[bytes], position: int, with_attributes: bool
    ) -> Listed | None:
        """The entry at a position; None if its name was removed meanwhile."""
        if position < _DOTS:
            to = self._volume.parent(ino) if position else ino
            return Listed((b".", b"..")[position], to, _DT_DIRECTORY, position + 1)
        return self._named(ino, names[position - _DOTS], position + 1, with_attributes)

    def _named(self, ino: int, name: bytes, behind: int, with_attributes: bool) -> Listed | None:
        """The entry of a name, before this position; None if the name was removed meanwhile."""
        found = self._volume.listed(ino, name, follows=with_attributes)
        if found is None:
            return None
        attributes = self._volume.attributes(found[1]) if with_attributes else None
        return Listed(*found, behind, attributes)

    def _directory(self, handle: int) -> _OpenDirectory:
        directory = self._open.get(handle)
        if directory is None:
            # A worker may have opened it.
            place = self._places.adopt(handle, HandleKind.DIRECTORY)
            if place is None:
                raise system_error(errno.EBADF)
            directory = _OpenDirectory(place.inode, not place.flags & os.O_NOATIME)
            self._open[handle] = directory
        return directory


class _Taking:
    """Gives entries to `take`. An error behind the first one only ends the answer before it."""

    def __init__(self, volume: Volume, take: Callable[[Listed], bool]) -> None:
        self._volume, self._take = volume, take
        self.has_taken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return self.has_taken and kind is not None and issubclass(kind, _ERRORS)

    def give(self, listed: Listed | None) -> bool:
        """Give an entry, which counts as looked up if it has attributes; whether it had room. One
        that was removed meanwhile needs none."""
        if listed is None:
            return True
        if not self._take(listed):
            return False
        self.has_taken = True
        if listed.attributes is not None:
            self._volume.hold(listed.ino)
        return True


def _no_names(names: list[bytes], position: int, count: int) -> list[tuple[int, bytes]]:
    """Where no worker lists, none has given a position."""
    return []
