"""Listing directories, by names alone or with what each name leads to.

Invariant: every entry of a listing that was taken is answered. An entry that takes long to read, or
can't be read, ends the answer before it, and the next answer begins with it. So no inode is held
without the kernel learning of it: it would never be forgotten.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import HandleKind
from pmemfs.errors import PmemfsError, system_error
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.volume.base import Attributes, Volume
from pmemfs.volume.fs.reading import NotRead

_DT_DIRECTORY = 4


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
        self, handle: int, start: int, take: Callable[[Listed], bool], *, with_attributes: bool
    ) -> None:
        """List the entries from a position on, until `take` says that an entry has no room.

        With attributes, each entry except the dots counts as looked up.
        """
        directory = self._directory(handle)
        if start == 0 or directory.listing is None:
            directory.listing = self._volume.listing(directory.ino)
        if directory.is_noted:
            self._volume.note_read(directory.ino)
        has_taken = False
        try:
            for listed in self._entries(directory.ino, directory.listing, start, with_attributes):
                if not take(listed):
                    break
                has_taken = True
                if listed.attributes is not None:
                    self._volume.hold(listed.ino)
        except (OSError, PmemfsError, NotRead):
            if not has_taken:
                raise

    def _entries(
        self, ino: int, listing: list[bytes], start: int, with_attributes: bool
    ) -> Iterator[Listed]:
        volume = self._volume
        if start < 2:
            dots = ((b".", ino), (b"..", volume.parent(ino)))
            for position, (name, to) in enumerate(dots[start:], start + 1):
                yield Listed(name, to, _DT_DIRECTORY, position)
        # Names that were removed meanwhile are left out.
        for position in range(max(start, 2), len(listing) + 2):
            found = volume.listed(ino, listing[position - 2], follows=with_attributes)
            if found is None:
                continue
            attributes = volume.attributes(found[1]) if with_attributes else None
            yield Listed(*found, position + 1, attributes)

    def _directory(self, handle: int) -> _OpenDirectory:
        directory = self._open.get(handle)
        if directory is None:
            raise system_error(errno.EBADF)
        return directory
