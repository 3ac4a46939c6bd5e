"""What the kernel keeps of the inodes of a key, and what it is told when the key is locked or
unlocked: names, attributes and pages.

Invariants:
- no request waits for this, because the kernel waits here for requests that are under way: to
  forget a name it takes the directory's lock;
- names are collected while they still are as the kernel knows them: in the clear before a lock,
  encoded before an unlock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode

_AT_ONCE = 256


class Kept(NamedTuple):
    """What the kernel may keep of the inodes of a key."""

    inodes: list[int]
    names: list[tuple[int, bytes]]
    """A directory and a name in it."""


def kept_of(fs: FileSystem, key_id: bytes) -> Kept:
    """What the kernel may keep of the inodes of a key. One step, so that no name comes
    meanwhile."""
    inodes = {inode.number: inode for inode in _known(fs, key_id)}
    names: list[tuple[int, bytes]] = []
    for number, inode in inodes.items():
        # A directory that can't be read must not keep its key from being locked.
        with suppress(OSError):
            if inode.is_directory:
                names += _known_names(fs, number, inodes)
    return Kept(list(inodes), names)


async def forget(notifier: Notifier, kept: Kept) -> None:
    """Return once the kernel has forgotten."""
    await _all_told([partial(notifier.forget_name, *each) for each in kept.names])
    await _all_told([partial(notifier.forget_inode, number) for number in kept.inodes])
    # Last, for names that are not there: what the kernel remembers of them nobody here knows.
    await _all_told([notifier.doubt_names])


async def _all_told(notices: Sequence[Callable[[], Awaitable[None] | None]]) -> None:
    for at in range(0, len(notices), _AT_ONCE):
        under_way = [tell() for tell in notices[at : at + _AT_ONCE]]
        for told in under_way:
            if told is not None:
                await told


def _known(fs: FileSystem, key_id: bytes) -> Iterator[Inode]:
    for number in fs.store.held():
        with suppress(OSError):
            inode = fs.store.inode(number)
            if inode.transform is not None and inode.transform.key_id == key_id:
                yield inode


def _known_names(
    fs: FileSystem, directory: int, inodes: Mapping[int, Inode]
) -> Iterator[tuple[int, bytes]]:
    for stored in fs.listing(directory):
        listed = fs.listed(directory, stored)
        if listed is not None and listed[1] in inodes:
            yield directory, listed[0]
