"""Which files the data plane is let serve, and for how long anybody may still see their tables."""

from __future__ import annotations

import errno
import functools
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.data_plane import shared_files
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import Extent, ExtentFlags
from pmemfs.dataplane.native import store_word
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.fuse.handlers.privileges import CAPABILITIES
from pmemfs.fuse.published import PublishedTables, Publisher
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.media.transform import StoredPiece, Transformation
from pmemfs.observe.shared import read_shared
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

FILE = NewInode(mode=stat.S_IFREG | 0o644, uid=0, gid=0)


@dataclass
class Served:
    """A file system, and what publishes its files."""

    shared: SharedMemory
    tables: PublishedTables
    fs: FileSystem
    publisher: Publisher

    def file(self, name: bytes = b"file", size_bytes: int = 100 * KIB) -> int:
        """A file with something in it, that somebody has open."""
        ino = self.fs.make(ROOT, name, FILE)
        self.fs.hold(ino)
        self.fs.write(ino, 0, b"x" * size_bytes)
        self.publisher.opened(ino)
        return ino

    def begin_request(self) -> None:
        """A worker looks at tables, and does not come to an end."""
        self._set_section(1)

    def end_request(self) -> None:
        self._set_section(2)

    def _set_section(self, value: int) -> None:
        store_word(self.shared.memory, self.shared.areas.slots, value)


@pytest.fixture
def served(shm: Path) -> Iterator[Served]:
    with shared_files(shm) as made:
        assert layouts.SLOT_HEAD.offset_of("section") == 0
        publisher = Publisher(made.fs, made.tables)
        yield Served(made.shared, made.tables, made.fs, publisher)


def test_a_file_that_is_read_to_its_end_is_not_published(served: Served) -> None:
    ino = served.file()
    served.publisher.was_read(ino, 100 * KIB)
    assert not served.tables.is_published(ino)
    served.publisher.was_read(ino, 100 * KIB - 1)
    assert served.tables.is_published(ino)
    assert served.shared.is_published(ino)


def test_the_second_write_or_a_large_one_publishes(served: Served) -> None:
    small, large = served.file(b"small"), served.file(b"large")
    served.publisher.was_written(small, 64 * KIB - 1)
    assert not served.tables.is_published(small)
    served.publisher.was_written(small, 1)
    assert served.tables.is_published(small)
    served.publisher.was_written(large, 64 * KIB)
    assert served.tables.is_published(large)


def test_what_no_longer_holds_is_withdrawn_where_nothing_can_take_its_place(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = served.file(size_bytes=4 * KIB)
    served.fs.set_attributes(ino, size_bytes=1 * MIB)
    served.publisher.was_synced(ino)
    assert served.tables.is_published(ino)
    # As where the tables of other files fill the memory that is there for all of them.
    full = functools.partial(_raise, OSError(errno.ENOSPC, "no room for another table"))
    monkeypatch.setattr(served.shared, "publish", full)
    served.fs.write(ino, 40 * KIB, b"more")
    served.publisher.was_written(ino, 4)
    assert not served.tables.is_published(ino)
    assert not served.shared.is_published(ino)


def test_what_was_written_in_part_is_not_published_as_it_was_before(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.publisher.has_failed(ino)
    assert not served.tables.is_published(ino)
    served.publisher.was_changed(ino)
    assert served.tables.is_published(ino)


def _raise(error: Exception, *_: object, **__: object) -> None:
    raise error


def test_an_fsync_publishes(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    assert served.tables.is_published(ino)


def test_only_an_open_file_is_published_until_its_last_close(served: Served) -> None:
    ino = served.file()
    served.publisher.opened(ino)
    served.publisher.was_synced(ino)
    served.publisher.closed(ino)
    assert served.tables.is_published(ino)
    served.publisher.closed(ino)
    assert not served.tables.is_published(ino)
    for event in (served.publisher.was_synced, served.publisher.was_changed):
        event(ino)
    served.publisher.was_written(ino, MIB)
    served.publisher.was_read(ino, 0)
    assert not served.tables.is_published(ino)


def test_a_change_withdraws_and_the_next_request_publishes_again(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.fs.set_attributes(ino, size_bytes=10)
    assert not served.tables.is_published(ino)
    served.publisher.was_read(ino, 10)
    assert served.tables.is_published(ino)


def test_a_write_here_moves_the_limit(served: Served) -> None:
    ino = served.file(size_bytes=0)
    end = 0
    for _ in range(5):
        end += served.fs.write(ino, end, b"x" * (70 * KIB))
        served.publisher.was_written(ino, 70 * KIB)
        entry = served.shared._entries[ino]
        table = int.from_bytes(served.shared.memory[entry + 8 : entry + 16], "little")
        head = layouts.TABLE_HEAD.unpack(
            served.shared.memory[table : table + layouts.TABLE_HEAD.size_bytes]
        )
        assert head.limit_bytes == served.fs.append_limit(ino) >= end
        assert head.live_offset == served.fs.live_line(ino)
        assert head.extent_count == len(served.fs.extents(ino))


def test_compressed_pieces_are_published_as_data_that_is_forwarded(served: Served) -> None:
    ino = served.file(size_bytes=5 * 32 * FRAME_BYTES)
    inode = served.fs.inode(ino)
    pfn, _ = inode.extents.find(0)
    for index in (32, 64, 128):
        inode.set_piece(index, StoredPiece(pfn + index, 32, 3, 9000, 0, Transformation.ZSTD))
    served.publisher.was_synced(ino)
    (table,) = served.shared.published()
    start = table.offset + layouts.TABLE_HEAD.size_bytes
    end = start + layouts.EXTENT.size_bytes * table.head.extent_count
    raw = bytes(served.shared.memory[start:end])
    size = layouts.EXTENT.size_bytes
    found = [layouts.EXTENT.unpack(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert found[:3] == [
        Extent(0, pfn, 32, 0), Extent(32, 0, 64, ExtentFlags.FORWARDED),
        Extent(96, pfn + 96, 32, 0),
    ]  # fmt: skip
    assert found[3] == Extent(128, 0, 32, ExtentFlags.FORWARDED)
    assert all(extent.index >= 160 for extent in found[4:])
    assert read_shared(served.shared.fd).tables[0].forwarded_frames == 96


@pytest.mark.parametrize("size", [0, 1, 32 * FRAME_BYTES - 1, 32 * FRAME_BYTES])
def test_a_file_grows_into_no_piece(served: Served, size: int) -> None:
    ino = served.file(size_bytes=64 * FRAME_BYTES)
    inode = served.fs.inode(ino)
    pfn, _ = inode.extents.find(0)
    inode.set_piece(0, StoredPiece(pfn, 32, 3, 9000, 0, Transformation.ZSTD))
    served.fs.store.set_live_size(inode, size)
    assert served.fs.append_limit(ino) == (size if size < 32 * FRAME_BYTES else 64 * FRAME_BYTES)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6711])
def test_what_a_write_must_take_bits_from_is_not_published(served: Served, mode: int) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.fs.set_attributes(ino, mode=mode)
    served.publisher.was_changed(ino)
    assert not served.tables.is_published(ino)
    served.fs.set_attributes(ino, mode=0o755)
    served.publisher.was_changed(ino)
    assert served.tables.is_published(ino)
    served.fs.set_xattr(ino, CAPABILITIES, b"some")
    served.publisher.was_changed(ino)
    assert not served.tables.is_published(ino)


def test_a_token_lasts_as_long_as_somebody_may_see_the_table(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.begin_request()
    token = served.tables.changed(ino)
    assert token is not None
    assert not served.tables.is_over(token)
    assert served.tables.changed(ino) is not None, "withdrawn before, and still seen"
    assert served.tables.gone(ino) is not None
    served.end_request()
    assert served.tables.is_over(token)
    assert served.tables.changed(ino) is None


def test_what_was_never_published_needs_no_token(served: Served) -> None:
    ino = served.file()
    served.begin_request()
    assert served.tables.changed(ino) is None
    assert served.tables.gone(ino) is None


def test_closing_does_not_end_what_is_under_way(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.begin_request()
    served.publisher.closed(ino)
    assert served.tables.changed(ino) is not None
    served.end_request()
    assert served.tables.changed(ino) is None


def test_frames_of_a_truncated_file_wait_for_who_may_read_them(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.begin_request()
    served.fs.set_attributes(ino, size_bytes=0)
    assert served.fs.space().busy_frames >= 25
    served.fs.tidy()
    assert served.fs.space().busy_frames >= 25
    served.end_request()
    served.fs.tidy()
    assert served.fs.space().busy_frames == 0


@pytest.mark.slow
def test_when_the_tables_are_full_the_oldest_makes_room(served: Served) -> None:
    extents = [Extent(0, 1, 1, 0)]
    line = served.fs.live_line(served.file())
    count = 3 * layouts.INODE_ENTRIES
    for ino in range(1, count):
        assert served.tables.publish(ino, 10, extents, live_offset=line, limit_bytes=4096)
        assert served.tables.is_published(ino)
    published = [ino for ino in range(1, count) if served.tables.is_published(ino)]
    assert len(published) <= layouts.INODE_ENTRIES
    assert all(served.shared.is_published(ino) for ino in published)
    # Of the newest eighth none has gone, whichever buckets they fell into.
    assert published[-1000:] == list(range(count - 1000, count))


@pytest.mark.slow
def test_when_memory_for_tables_is_full_the_oldest_makes_room(served: Served) -> None:
    line = served.fs.live_line(served.file())
    extents = [Extent(index, 1 + index, 1, 0) for index in range(0, 60_000, 2)]
    for ino in range(1, 100):
        assert served.tables.publish(ino, 10, extents, live_offset=line, limit_bytes=4096)
    published = [ino for ino in range(1, 100) if served.tables.is_published(ino)]
    assert 1 < len(published) < 50
    assert published == list(range(100 - len(published), 100))


def test_one_file_of_very_many_extents_pushes_nobody_out(served: Served) -> None:
    line = served.fs.live_line(served.file())
    few = [Extent(0, 1, 1, 0)]
    many = [Extent(2 * index, 1, 1, 0) for index in range(100_000)]
    assert served.tables.publish(10, 10, few, live_offset=line, limit_bytes=4096)
    assert not served.tables.publish(11, 10, many, live_offset=line, limit_bytes=4096)
    assert served.tables.is_published(10)


def test_a_file_of_many_extents_is_published_seldom_while_it_changes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published all in all grows with the requests, not with their square."""
    ino = served.file(size_bytes=0)
    published = 0
    publish = served.tables.publish

    def counted(ino: int, size: int, extents: list[Extent], **places: int) -> bool:
        nonlocal published
        published += len(extents)
        return publish(ino, size, extents, **places)

    monkeypatch.setattr(served.tables, "publish", counted)
    served.fs.set_attributes(ino, size_bytes=4 * MIB)
    for at in range(0, 4 * MIB, 8 * KIB):
        served.fs.write(ino, at, b"x")
        served.publisher.was_written(ino, 1)
    assert len(served.fs.extents(ino)) == 512
    assert published < 512 * 80
    # Nothing changes any more: soon the data plane serves it.
    for _ in range(512 // 64 + 1):
        served.publisher.was_read(ino, 10)
    assert served.tables.is_published(ino)


@pytest.mark.parametrize("flag", [InodeFlags.IMMUTABLE, InodeFlags.APPEND_ONLY])
def test_what_is_immutable_or_append_only_is_not_published(
    served: Served, flag: InodeFlags
) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.begin_request()
    token = served.fs.set_flags(ino, flag)
    assert not served.tables.is_published(ino)
    for event in (served.publisher.was_changed, served.publisher.was_synced):
        event(ino)
    served.publisher.was_written(ino, MIB)
    served.publisher.was_read(ino, 0)
    assert not served.tables.is_published(ino)
    assert token is not None
    assert not served.tables.is_over(token), "a worker may still write by the old table"
    served.end_request()
    assert served.tables.is_over(token)
    served.fs.set_flags(ino, InodeFlags(0))
    served.publisher.was_synced(ino)
    assert served.tables.is_published(ino)


def test_other_flags_are_no_reason_not_to_publish(served: Served) -> None:
    ino = served.file()
    served.publisher.was_synced(ino)
    served.fs.set_flags(ino, InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME)
    served.publisher.was_changed(ino)
    assert served.tables.is_published(ino)
