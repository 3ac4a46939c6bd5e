"""What only the pool has, written to a file: for a cache whose origin is lost.

Nothing in the pool is changed, so it can be done again. Invariant: a new file has its name once it
is complete, and has its list of ranges then. Until then it is NAME.part, which the next export
begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pmemfs.errors import BadUsage
from pmemfs.media.cache import TagState
from pmemfs.media.cachereport import Exported
from pmemfs.pool import Pool
from pmemfs.volume.cache.blocks import runs_of
from pmemfs.volume.cache.groups import Found, Groups
from pmemfs.volume.cache.heads import StoredHead

RANGES_SUFFIX = ".ranges"
PART_SUFFIX = ".part"
_MOST_BLOCKS = 1 << 40


class Range(NamedTuple):
    """Bytes of the origin that only the pool has."""

    offset_bytes: int
    length_bytes: int
    is_zero: bool


class DirtyContent:
    """The dirty blocks of a pool that is not mounted."""

    def __init__(self, pool: Pool) -> None:
        """Raises DamagedCache."""
        self._medium = pool.medium
        stored = StoredHead.open(pool)
        self._ground = stored.ground
        self.origin_bytes = stored.head.origin_bytes
        self.block_bytes = 1 << stored.head.block_shift
        self._groups = Groups(pool.medium, stored.ground, is_settled=True)

    def __iter__(self) -> Iterator[Found]:
        """Their tags; of two of one block the newer."""
        for group in self._groups.suspects():
            yield from self._groups.dirty_in(group)

    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)

    def content(self, found: Found) -> bytes | memoryview:
        """The bytes of a block, up to the end of the origin. Raises MemoryFault."""
        length = min(self.block_bytes, self.origin_bytes - self.offset_bytes(found))
        if found.tag.state is TagState.ZERO:
            return bytes(max(length, 0))
        place = self._ground.place_offset(found.set_number, found.way)
        return self._medium.read(place, max(length, 0))

    def offset_bytes(self, found: Found) -> int:
        """Where a block begins in the origin."""
        return found.tag.block * self.block_bytes


def export_dirty(
    content: DirtyContent, path: str, *, is_new: bool, show: Callable[[int, int], None]
) -> Exported:
    """Write the dirty blocks to a file, each where it belongs in the origin.

    A new file is as large as the origin and sparse, and has a list of the ranges beside it. Any
    other is changed in place. Raises BadUsage for one that is smaller than the origin, OSError, and
    MemoryFault.
    """
    if is_new:
        return _export_new(content, path, show)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _check_size(fd, path, content.origin_bytes)
        blocks, zeroes = _write_blocks(fd, content, is_new=False, show=show)
    finally:
        os.close(fd)
    return _exported(content, path, None, blocks, zeroes)


def _export_new(content: DirtyContent, path: str, show: Callable[[int, int], None]) -> Exported:
    part = path + PART_SUFFIX
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd, part)
        try:
            # An export that was killed may have left something.
            os.ftruncate(fd, 0)
            os.ftruncate(fd, content.origin_bytes)
            blocks, zeroes = _write_blocks(fd, content, is_new=True, show=show)
            _write_list(part + RANGES_SUFFIX, _all_ranges(content, blocks, zeroes))
            os.rename(part + RANGES_SUFFIX, path + RANGES_SUFFIX)
            _give_name(part, path)
        finally:
            for name in (part, part + RANGES_SUFFIX):
                with suppress(FileNotFoundError):
                    os.unlink(name)
    finally:
        os.close(fd)
    return _exported(content, path, path + RANGES_SUFFIX, blocks, zeroes)


def _lock(fd: int, part: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another export is writing it", part) from None


def _give_name(part: str, path: str) -> None:
    """Let a file that is complete have its name."""
    try:
        # A rename would take the place of what has got this name meanwhile.
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links.
        os.rename(part, path)


def _write_blocks(
    fd: int, content: DirtyContent, *, is_new: bool, show: Callable[[int, int], None]
) -> tuple[list[int], list[int]]:
    """Write the blocks; those with data, and those of zeroes."""
    total, blocks, zeroes = content.count(), list[int](), list[int]()
    for done, found in enumerate(content):
        is_zero = found.tag.state is TagState.ZERO
        (zeroes if is_zero else blocks).append(found.tag.block)
        # In a new file they are there already.
        if not (is_new and is_zero):
            _write_all(fd, content.content(found), content.offset_bytes(found))
        show(done + 1, total)
    os.fsync(fd)
    return blocks, zeroes


def _exported(
    content: DirtyContent, path: str, list_path: str | None, blocks: list[int], zeroes: list[int]
) -> Exported:
    ranges = _all_ranges(content, blocks, zeroes)
    return Exported(path, list_path, len(blocks) + len(zeroes), len(zeroes), len(ranges),
                    content.origin_bytes)  # fmt: skip


def _all_ranges(content: DirtyContent, blocks: list[int], zeroes: list[int]) -> list[Range]:
    return sorted([*_ranges(content, blocks, False), *_ranges(content, zeroes, True)])


def _check_size(fd: int, path: str, origin_bytes: int) -> None:
    """Raise BadUsage for what is too small to be a backup of the origin: most likely it is another
    file, which would be destroyed."""
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    if size_bytes < origin_bytes:
        raise BadUsage(
            why=f"{path} has {size_bytes} bytes, and the origin had {origin_bytes}: a backup of it "
            f"has as many; if it is one, run 'truncate -s {origin_bytes} {path}' first"
        )


def _write_all(fd: int, data: bytes | memoryview, offset_bytes: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written


def _ranges(content: DirtyContent, blocks: list[int], is_zero: bool) -> Iterator[Range]:
    for first, count in runs_of(sorted(blocks), _MOST_BLOCKS):
        start = first * content.block_bytes
        length = min(count * content.block_bytes, content.origin_bytes - start)
        yield Range(start, length, is_zero)


def _write_list(path: str, ranges: list[Range]) -> None:
    """One range a line: offset, length, and whether it is data or zeroes."""
    with open(path, "w", encoding="ascii") as file:
        for each in ranges:
            file.write(f"{each.offset_bytes} {each.length_bytes} "
                       f"{'zero' if each.is_zero else 'data'}\n")  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
