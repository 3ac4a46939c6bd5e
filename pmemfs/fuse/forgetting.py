"""What the kernel keeps of the inodes of a key, and what it is told when the key is locked or
unlocked: names, attributes and pages.

Invariants:
- no request waits for this, because the kernel waits here for requests that are under way: to
  forget a name it takes the directory's lock. And none waits long for its turn, because a tree may
  have millions of names: all but `kept_of` is done in steps;
- what is forgotten is what was there when the key changed. `kept_of` and the change are one step,
  so no name comes in between. A name that is removed after that is forgotten all the same;
- names are those that the kernel knows: in the clear for a lock, encoded for an unlock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NamedTuple

import trio

from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode

_AT_ONCE = 256
"""To decrypt so many names takes a millisecond."""

Shown = Callable[[Inode, bytes], bytes]
"""How the kernel knows a name of a directory, which is given as it is stored."""


class Kept(NamedTuple):
    """What the kernel may keep of the inodes of a key."""

    inodes: frozenset[int]
    directories: list[tuple[Inode, Entries]]
    """Those among the inodes, and their entries at that time."""


async def read_kept(fs: FileSystem) -> None:
    """Have all inodes in memory that the kernel may keep, so that `kept_of` reads none."""
    for at, number in enumerate(fs.store.held()):
        with suppress(OSError):
            while fs.read_on(number):
                await trio.lowlevel.checkpoint()
            # Inodes that nobody has asked for in a while leave the memory.
            fs.inode(number)
        if at % _AT_ONCE == _AT_ONCE - 1:
            await trio.lowlevel.checkpoint()


def kept_of(fs: FileSystem, key_id: bytes) -> Kept:
    """What the kernel may keep of the inodes of a key. Takes half a second for a million inodes."""
    inodes = list(_known(fs, key_id))
    directories = [(inode, inode.entries.copy()) for inode in inodes if inode.is_directory]
    return Kept(frozenset(inode.number for inode in inodes), directories)


async def forget(notifier: Notifier, kept: Kept, shown: Shown) -> None:
    """Return once the kernel has forgotten."""
    for directory, entries in kept.directories:
        names = _names(directory, entries, kept.inodes, shown)
        await _all_told(name and partial(notifier.forget_name, *name) for name in names)
    await _all_told(partial(notifier.forget_inode, number) for number in kept.inodes)
    # Last, for names that are not there: what the kernel remembers of them nobody here knows.
    await _all_told([notifier.doubt_names])


async def _all_told(notices: Iterable[Callable[[], Awaitable[None] | None] | None]) -> None:
    left = iter(notices)
    while some := list(islice(left, _AT_ONCE)):
        under_way = [tell() for tell in some if tell]
        for told in under_way:
            if told is not None:
                await told
        await trio.lowlevel.checkpoint()


def _known(fs: FileSystem, key_id: bytes) -> Iterator[Inode]:
    for number in fs.store.held():
        # An inode that can't be read must not keep its key from being locked.
        with suppress(OSError):
            inode = fs.inode(number)
            if inode.transform is not None and inode.transform.key_id == key_id:
                yield inode


def _names(
    directory: Inode, entries: Entries, known: frozenset[int], shown: Shown
) -> Iterator[tuple[int, bytes] | None]:
    """For each entry the name that the kernel may know, and its directory; None for one that the
    kernel has never looked up."""
    for stored, entry in entries.items():
        yield (directory.number, shown(directory, stored)) if entry.inode in known else None
