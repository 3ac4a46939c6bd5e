"""Transfers between pages of the pool and another file or device, with no copy in between.

preadv(2) and pwritev(2) work straight from and to the mapping; with O_DIRECT on the other side, so
does its device's DMA, which is what page structures are for. Invariants:
- every page of a transfer is referenced from before the first byte moves until after the last;
- what came in is flushed, so that a fence makes it durable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pmemfs.bio.bio_vec import BioVec, skip_bytes
from pmemfs.bio.kmap import KmapRegistry
from pmemfs.medium.base import ByteRange, Medium
from pmemfs.memmap.base import Access, Memmap
from pmemfs.pfn import pfn_t_to_pfn

_IOV_MAX = os.sysconf("SC_IOV_MAX")


def open_direct(path: str, flags: int) -> int:
    """Open the other side of a transfer: with O_DIRECT where its file system can, else without."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o600)


@contextmanager
def held(memmap: Memmap, vecs: Sequence[BioVec], access: Access) -> Iterator[None]:
    """References on every page of a list, all or none.

    Raises NoPageStructures, NotInPool, PageReferences, and OSError (ENOSPC) as `get_pages` does.
    """
    taken: list[tuple[int, int]] = []
    try:
        for vec in vecs:
            pfn = int(pfn_t_to_pfn(vec.pfn_t, memmap.geometry))
            memmap.get_pages(pfn, vec.frame_count, access)
            taken.append((pfn, vec.frame_count))
        yield
    finally:
        for first_pfn, count in taken:
            memmap.put_pages(first_pfn, count)


def read_into_pages(
    kmap: KmapRegistry, memmap: Memmap, vecs: Sequence[BioVec], fd: int, file_offset: int
) -> int:
    """Fill pages from a file; the bytes that were read, short only at the file's end.

    Raises NoPageStructures, NotInPool and OSError.
    """
    with held(memmap, vecs, Access.WRITE):
        return _transfer(kmap, memmap, vecs, fd, file_offset, incoming=True)


def write_from_pages(
    kmap: KmapRegistry, memmap: Memmap, vecs: Sequence[BioVec], fd: int, file_offset: int
) -> int:
    """Write pages to a file; the bytes that were written.

    Raises NoPageStructures, NotInPool and OSError.
    """
    with held(memmap, vecs, Access.READ):
        return _transfer(kmap, memmap, vecs, fd, file_offset, incoming=False)


def _transfer(
    kmap: KmapRegistry,
    memmap: Memmap,
    vecs: Sequence[BioVec],
    fd: int,
    file_offset: int,
    *,
    incoming: bool,
) -> int:
    rest = list(vecs)
    total = 0
    while rest:
        medium, ranges = _first_stretch(kmap, memmap, rest)
        move = medium.store_from_file if incoming else medium.load_to_file
        moved = move(ranges, fd, file_offset + total)
        if moved == 0:
            break
        if incoming:
            _flush(medium, ranges, moved)
        total += moved
        rest = skip_bytes(rest, moved, memmap.geometry)
    return total


def _first_stretch(
    kmap: KmapRegistry, memmap: Memmap, vecs: Sequence[BioVec]
) -> tuple[Medium, list[ByteRange]]:
    """As many vecs as one system call takes, all of one medium."""
    medium, first = kmap.locate(vecs[0], memmap.geometry)
    ranges = [first]
    for vec in vecs[1:_IOV_MAX]:
        other, part = kmap.locate(vec, memmap.geometry)
        if other is not medium:
            break
        ranges.append(part)
    return medium, ranges


def _flush(medium: Medium, ranges: Sequence[ByteRange], moved: int) -> None:
    for part in ranges:
        length = min(part.length_bytes, moved)
        if length:
            medium.flush(part.offset_bytes, length)
        moved -= length
