"""Names of inodes: page structures know whose a page is by number, people know files by path.

A file does not know its names, only directories do. So a name is looked for: first where it was
found before, then in the directories in memory, then from the root down. Invariants:
- a search gives way to requests every few ms, and ends after half a second, whatever the tree is
  like. So a name may not be found, and the answer says that;
- a name that was found before is looked at again before it is told: it may lead elsewhere by now.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import trio

from pmemfs.errors import DamagedFileSystem, MemoryFault
from pmemfs.media.inode import ROOT
from pmemfs.media.pagereport import PageOwner
from pmemfs.volume.base import Volume
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.spans import frame_at
from pmemfs.volume.onefile import INODE, OneFileVolume

SEARCH_SECONDS = 0.5
_AGAIN_SECONDS = 30
"""How long a name that was not found is not looked for again."""
_ENTRIES_AT_ONCE = 10_000
_PATH_MAX = 4096
_MOST_KNOWN = 1 << 16


class Owners:
    """Says which file an inode is, by one of its names."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._fs = volume if isinstance(volume, FileSystem) else None
        self._places: dict[int, tuple[int, bytes]] = {}
        """Where names were found: the directory, and the name in it."""
        self._missed: dict[int, float] = {}
        self._lock = trio.Lock()

    async def of(self, numbers: Iterable[int]) -> dict[int, PageOwner]:
        """The owners of these numbers; 0 is none and is left out."""
        wanted = set(numbers) - {0}
        if self._fs is None:
            return {number: self._of_device(number) for number in wanted}
        found = {number: self._known(self._fs, number) for number in wanted}
        now = trio.current_time()
        missing = {
            number for number, owner in found.items()
            if owner is None and self._missed.get(number, 0) <= now
        }  # fmt: skip
        if missing:
            async with self._lock:
                with trio.move_on_after(SEARCH_SECONDS):
                    await _Search(self._fs, self._places, missing).run()
            for number in missing:
                found[number] = self._known(self._fs, number)
                if found[number] is None:
                    self._missed[number] = trio.current_time() + _AGAIN_SECONDS
        self._forget_some()
        return {
            number: owner or PageOwner(number, "", "not found") for number, owner in found.items()
        }

    def has_left(self, number: int, index: int, pfn: int) -> bool:
        """Whether a frame is not any more where it was in a file, as far as that is in memory."""
        inode = self._fs.store.cached(number) if self._fs else None
        return inode is not None and frame_at(inode, index) != pfn

    def _of_device(self, number: int) -> PageOwner:
        if isinstance(self._volume, OneFileVolume) and number == INODE:
            return PageOwner(number, self._volume.name, "")
        return PageOwner(number, "", "gone")

    def _known(self, fs: FileSystem, number: int) -> PageOwner | None:
        """An owner, if no search is needed for it."""
        inode = fs.store.cached(number)
        if inode is not None and inode.state.link_count == 0:
            return PageOwner(number, "", "unnamed")
        try:
            if inode is None and fs.store.table.head(number) is None:
                return PageOwner(number, "", "gone")
        except DamagedFileSystem:
            # No inode lies there.
            return PageOwner(number, "", "gone")
        except MemoryFault:
            return None
        path = self._path(fs, number)
        return None if path is None else PageOwner(number, path, "")

    def _path(self, fs: FileSystem, number: int) -> str | None:
        """The path where a number was found, if it is there still and all that is in memory."""
        names: list[bytes] = []
        seen = {number}
        while number != ROOT:
            parent, name = self._places.get(number, (0, b""))
            directory = fs.store.cached(parent) if parent else None
            entry = directory.entries.get(name) if directory else None
            if directory is None or entry is None or entry.inode != number or parent in seen:
                return None
            with suppress(OSError):
                name = fs.store.sealing.shown_name(directory, name)
            names.append(name)
            seen.add(parent)
            number = parent
        path = b"/".join(reversed(names))
        # No system call takes a longer one, and an answer has to have room for many.
        return os.fsdecode(path) if len(path) < _PATH_MAX else None

    def _forget_some(self) -> None:
        if len(self._places) > _MOST_KNOWN:
            self._places.clear()
        if len(self._missed) > _MOST_KNOWN:
            self._missed.clear()


class _Search:
    """One search for names. What it finds goes to `places`."""

    def __init__(
        self, fs: FileSystem, places: dict[int, tuple[int, bytes]], wanted: set[int]
    ) -> None:
        self._fs = fs
        self._places = places
        self._wanted = set(wanted)

    async def run(self) -> None:
        """Search until all is found, or cancelled."""
        await self._look_in_memory()
        if self._wanted:
            await self._walk()

    async def _look_in_memory(self) -> None:
        """Look into the directories that programs have used lately: mostly the name is there."""
        directories = [inode for inode in list(self._fs.store.cache.inodes) if inode.is_directory]
        for directory in directories:
            if not self._wanted:
                return
            for number in await self._look_into(directory):
                # A directory without a known way to it would give a name and no path.
                if not await self._climb(directory):
                    self._wanted.add(number)

    async def _climb(self, directory: Inode) -> bool:
        """Find the way to a directory from the root; whether there is one."""
        seen: set[int] = set()
        while directory.number != ROOT and directory.number not in seen:
            seen.add(directory.number)
            parent = await self._read(directory.parent)
            if parent is None:
                return False
            place, name = self._places.get(directory.number, (0, b""))
            entry = parent.entries.get(name) if place == parent.number else None
            if entry is None or entry.inode != directory.number:
                found = await self._look_into(parent, {directory.number})
                if not found:
                    return False
            directory = parent
        return directory.number == ROOT

    async def _walk(self) -> None:
        """Look into all directories, from the root down."""
        waiting = deque([ROOT])
        while waiting and self._wanted:
            number = waiting.popleft()
            directory = await self._read(number)
            if directory is None:
                continue
            await self._look_into(directory)
            for name, inode in await self._subdirectories(directory):
                # As `Names` follows an entry: each directory is met once, whatever a pool says.
                below = await self._read(inode) if inode != ROOT else None
                if below is not None and below.parent == number:
                    self._places[inode] = number, name
                    waiting.append(inode)

    async def _subdirectories(self, directory: Inode) -> list[tuple[bytes, int]]:
        found: list[tuple[bytes, int]] = []
        if directory.subdirectory_count:
            for at in range(0, len(directory.entries), _ENTRIES_AT_ONCE):
                found += directory.entries.directories(at, _ENTRIES_AT_ONCE)
                await trio.lowlevel.checkpoint()
        return found

    async def _look_into(self, directory: Inode, wanted: set[int] | None = None) -> list[int]:
        """Look for numbers among the entries of a directory; those that are there."""
        looked_for = self._wanted if wanted is None else wanted
        found: list[int] = []
        # Entries may come and go between two parts, so a name may be missed.
        for at in range(0, len(directory.entries), _ENTRIES_AT_ONCE):
            for name, number in directory.entries.leading_to(looked_for, at, _ENTRIES_AT_ONCE):
                self._places[number] = directory.number, name
                found.append(number)
            await trio.lowlevel.checkpoint()
        self._wanted -= set(found)
        return found

    async def _read(self, number: int) -> Inode | None:
        """A directory, read in steps if it is not in memory; None if there is no such directory."""
        with suppress(OSError):
            while self._fs.read_on(number):
                await trio.lowlevel.checkpoint()
            inode = self._fs.inode(number)
            return inode if inode.is_directory else None
        return None
