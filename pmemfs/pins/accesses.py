"""What the page structures know of files: for programs that choose which file they need least."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import trio

from pmemfs.errors import NoPageStructures
from pmemfs.media.accesses import Accesses
from pmemfs.media.page import Page
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pins.registry import Pins
from pmemfs.volume.base import Volume

_PIECES = 8
"""A file is known by the first page of each of so many pieces."""
_FILES_AT_ONCE = 32


async def accesses_of(
    inodes: Sequence[int], pins: Pins, volume: Volume, mount_identity: int
) -> Accesses:
    """What is known of files, in the order of these numbers. Raises NoPageStructures."""
    if not pins.memmap.has_pages:
        raise NoPageStructures(what="to tell accesses")
    # A client that has just let go of a pin counts on that.
    while pins.notice_ends():
        await trio.lowlevel.checkpoint()
    answer = Accesses(mount_identity, [], [], [])
    for number, inode in enumerate(inodes, 1):
        pages: list[Page] = []
        # What is no file any more has no accesses.
        with contextlib.suppress(OSError):
            pages = await _pages_of(inode, pins, volume)
        answer.last_access_ns.append(max((page.last_access_ns for page in pages), default=0))
        answer.reads.append(max((page.reads for page in pages), default=0))
        answer.is_pinned.append(volume.pinned.has(inode))
        if number % _FILES_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
    return answer


async def _pages_of(inode: int, pins: Pins, volume: Volume) -> list[Page]:
    """The structures of some pages of a file, those that are initialised. Raises OSError."""
    while volume.read_on(inode):
        await trio.lowlevel.checkpoint()
    size_bytes = volume.attributes(inode).size_bytes
    found = (
        pins.memmap.page(pool_bytes >> PAGE_SHIFT)
        for _, pool_bytes, _ in volume.pieces(inode, 0, size_bytes, _PIECES)
        if pool_bytes >= 0
    )
    return [page for page in found if page is not None]
