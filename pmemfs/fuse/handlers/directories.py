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
from typing import NamedTuple

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import HandleKind
from pmemfs.errors import PmemfsError, system_error
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.volume.base import Attributes, StoredListing, Volume
from pmemfs.volume.fs.reading import NotRead

_DT_DIRECTORY = 4
_DOTS = 2
"""The dots have the first positions in each directory."""


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


class DirectoryHandlers:
    """Open directories."""

    def __init__(self, volume: Volume, opens: OpenPlaces) -> None:
        self._volume = volume
        self._places = opens
        self._open = {
            place.handle: _OpenDirectory(place.inode, not place.flags & os.O_NOATIME)
            for place in opens
            if place.kind == HandleKind.DIRECTORY
        }

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
        if start == 0 or directory.listing is None:
            directory.listing = self._volume.listing(directory.ino)
        if directory.is_noted:
            self._volume.note_read(directory.ino)
        ino, names, position = directory.ino, directory.listing, start
        end, has_taken = len(names) + _DOTS, False
        try:
            stored = self._volume.stored_listing(ino) if take_stored else None
            while position < end:
                if stored is not None and take_stored is not None and position >= _DOTS:
                    taken = take_stored(stored, ino, names, position)
                    position, has_taken = taken.position, has_taken or taken.has_taken
                    if taken.is_full or position == end:
                        return
                listed = self._entry(ino, names, position, with_attributes)
                position += 1
                if listed is None:
                    continue
                if not take(listed):
                    return
                has_taken = True
                if listed.attributes is not None:
                    self._volume.hold(listed.ino)
        except (OSError, PmemfsError, NotRead):
            if not has_taken:
                raise

    def _entry(
        self, ino: int, names: list[bytes], position: int, with_attributes: bool
    ) -> Listed | None:
        """The entry at a position; None if its name was removed meanwhile."""
        volume = self._volume
        if position < _DOTS:
            to = volume.parent(ino) if position else ino
            return Listed((b".", b"..")[position], to, _DT_DIRECTORY, position + 1)
        found = volume.listed(ino, names[position - _DOTS], follows=with_attributes)
        if found is None:
            return None
        attributes = volume.attributes(found[1]) if with_attributes else None
        return Listed(*found, position + 1, attributes)

    def _directory(self, handle: int) -> _OpenDirectory:
        directory = self._open.get(handle)
        if directory is None:
            raise system_error(errno.EBADF)
        return directory
