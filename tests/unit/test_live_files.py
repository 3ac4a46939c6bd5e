"""Files that grow under the data plane: sizes in live lines, appends, and what fsync must do."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import (
    FSYNC,
    IOCTL,
    LSEEK,
    READ,
    STATX,
    SYNCFS,
    TMPFILE,
    WRITE,
    Tables,
    extent,
    lseek_in,
    read_in,
    some_tables,
    write_in,
)
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import Extent, ExtentFlags
from pmemfs.dataplane.native import Responder, load_word, store_word
from pmemfs.media.inode import SIZE_LIMIT_BYTES
from pmemfs.media.live import LIVE_LINE, SIZE_SHIFT, key_of, line_key, raised, size_word
from pmemfs.medium.base import Durability
from pmemfs.pfn import FRAME_BYTES

INODE = 0x1234_5678
KEY = line_key(INODE, 3, 0xBEEF)
FORWARDED = ("forward", 0, b"")
RACES = 100_000


@dataclass
class File:
    """One file with a live line, in the second frame of the data, and its worker."""

    tables: Tables
    live_offset: int
    worker: Responder = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self.tables.worker()

    @property
    def first(self) -> int:
        """The first frame that a file may have."""
        return int(self.tables.pool.first_data_pfn) + 2

    def publish(self, size: int, extents: list[Extent], limit: int | None = None) -> None:
        self.set_size(size)
        self.tables.shared.publish(
            INODE, size, extents, live_offset=self.live_offset, limit_bytes=limit
        )

    def set_size(self, size: int) -> None:
        store_word(self._line(), 0, size_word(size, KEY))

    @property
    def size(self) -> int:
        word = load_word(self._line(), 0)
        assert key_of(word) == KEY
        return word >> SIZE_SHIFT

    @property
    def written_ns(self) -> int:
        return load_word(self._line(), LIVE_LINE.offset_of("written_ns"))

    def content(self, offset: int, length: int) -> bytes:
        return bytes(self.tables.pool.medium.read(self.first * FRAME_BYTES + offset, length))

    def ask(self, opcode: int, operation: bytes, payload: bytes = b"") -> tuple[str, int, bytes]:
        return self.worker.answer(operation, opcode=opcode, inode=INODE, payload=payload)

    def write(self, offset: int, data: bytes) -> tuple[str, int, bytes]:
        return self.ask(WRITE, write_in(offset, len(data)), data)

    def read(self, offset: int, length: int) -> tuple[str, int, bytes]:
        return self.ask(READ, read_in(offset, length))

    def seek(self, offset: int, whence: int) -> int | str:
        verdict, error, data = self.ask(LSEEK, lseek_in(offset, whence))
        if verdict != "answer":
            return verdict
        return -error if error else int(struct.unpack("<Q", data)[0])

    def fsync(self) -> tuple[str, int, bytes]:
        return self.ask(FSYNC, bytes(16))

    def set_durability(self, durability: Durability) -> None:
        number = list(Durability).index(durability)
        self.tables.shared.set_header_word("durability", number)

    def set_table_word(self, name: str, value: int) -> None:
        """What no control plane would publish."""
        entry = self.tables.shared._entries[INODE]
        memory = self.tables.shared.memory
        table = load_word(memory, entry + layouts.INODE_ENTRY.offset_of("table"))
        store_word(memory, table + layouts.TABLE_HEAD.offset_of(name), value)

    def _line(self) -> memoryview:
        view = self.tables.pool.medium.view(self.live_offset, LIVE_LINE.size_bytes)
        assert isinstance(view, memoryview)
        return view


@pytest.fixture(params=[Durability.VOLATILE, Durability.CACHE_LINES], ids=lambda d: d.name.lower())
def file(request: pytest.FixtureRequest, shm: Path) -> Iterator[File]:
    with some_tables(shm, has_files=True) as tables:
        made = File(tables, (int(tables.pool.first_data_pfn) + 1) * FRAME_BYTES + 64)
        made.set_durability(request.param)
        yield made


def test_appends_extend_a_file_up_to_the_limit_and_not_a_byte_beyond(file: File) -> None:
    limit = 3 * FRAME_BYTES
    file.publish(0, [extent(0, file.first, 2), extent(2, file.first + 2, 3)], limit)
    written = b""
    while len(written) + 1000 <= limit:
        data = bytes([len(written) % 251]) * 1000
        assert file.write(len(written), data) == ("answer", 0, struct.pack("<II", 1000, 0))
        written += data
        assert file.size == len(written)
    assert file.write(len(written), b"x" * 1000) == FORWARDED
    assert file.size == len(written)
    assert file.content(len(written), 1000) == bytes(1000)
    rest = limit - len(written)
    assert file.write(len(written), b"x" * rest)[:2] == ("answer", 0)
    assert file.size == limit
    assert file.write(limit, b"x") == FORWARDED
    assert file.read(0, 2 * limit) == ("answer", 0, written + b"x" * rest)


@pytest.mark.parametrize("bit", range(64))
def test_a_write_that_raises_a_damaged_size_leaves_it_damaged(file: File, bit: int) -> None:
    file.publish(5000, [extent(0, file.first, 3)], 3 * FRAME_BYTES)
    word = size_word(5000, KEY) ^ 1 << bit
    store_word(file._line(), 0, word)
    for end in (5001, 9000, 3 * FRAME_BYTES):
        before = load_word(file._line(), 0)
        if before >> SIZE_SHIFT < end - 1 or end > 3 * FRAME_BYTES:
            continue
        file.write(end - 1, b"x")
        after = load_word(file._line(), 0)
        assert after in (before, raised(before, end))
        assert key_of(after) == key_of(before) != KEY


def test_a_write_that_would_leave_a_gap_is_forwarded_and_stores_nothing(file: File) -> None:
    file.publish(100, [extent(0, file.first, 2)], 2 * FRAME_BYTES)
    assert file.write(101, b"gap") == FORWARDED
    assert file.write(FRAME_BYTES, b"gap") == FORWARDED
    assert file.content(0, 2 * FRAME_BYTES) == bytes(2 * FRAME_BYTES)
    assert file.size == 100
    assert file.written_ns == 0
    assert file.write(100, b"no gap")[0] == "answer"
    assert file.size == 106


def test_a_write_into_a_hole_is_forwarded_whole(file: File) -> None:
    file.publish(3 * FRAME_BYTES, [extent(0, file.first, 1), extent(2, file.first + 2, 1)])
    assert file.write(FRAME_BYTES - 5, b"x" * 10) == FORWARDED
    assert file.write(2 * FRAME_BYTES - 5, b"x" * 10) == FORWARDED
    assert file.content(0, 3 * FRAME_BYTES) == bytes(3 * FRAME_BYTES)
    assert file.write(2 * FRAME_BYTES, b"x")[0] == "answer"


def compressed(index: int, frame_count: int) -> Extent:
    """Frames that have data and no run."""
    return Extent(index, 0, frame_count, ExtentFlags.FORWARDED)


def test_what_touches_a_forwarded_extent_is_forwarded_whole(file: File) -> None:
    file.publish(
        4 * FRAME_BYTES, [extent(0, file.first, 1), compressed(1, 2), extent(3, file.first + 3, 1)]
    )
    file.write(0, b"a" * FRAME_BYTES)
    file.write(3 * FRAME_BYTES, b"b" * FRAME_BYTES)
    for offset, length in ((FRAME_BYTES - 1, 2), (FRAME_BYTES, 1), (3 * FRAME_BYTES - 1, 2),
                           (0, 4 * FRAME_BYTES), (2 * FRAME_BYTES, FRAME_BYTES)):  # fmt: skip
        assert file.read(offset, length) == FORWARDED
        assert file.write(offset, b"x" * length) == FORWARDED
    expected = b"a" * FRAME_BYTES + bytes(2 * FRAME_BYTES) + b"b" * FRAME_BYTES
    assert file.content(0, 4 * FRAME_BYTES) == expected
    assert file.read(0, FRAME_BYTES) == ("answer", 0, b"a" * FRAME_BYTES)
    assert file.read(3 * FRAME_BYTES, 5) == ("answer", 0, b"bbbbb")
    assert file.write(3 * FRAME_BYTES, b"c")[:2] == ("answer", 0)


def test_a_forwarded_extent_is_data_up_to_the_live_size(file: File) -> None:
    file.publish(6 * FRAME_BYTES, [compressed(1, 2), compressed(4, 2)])
    assert file.seek(0, os.SEEK_DATA) == FRAME_BYTES
    assert file.seek(0, os.SEEK_HOLE) == 0
    assert file.seek(FRAME_BYTES + 7, os.SEEK_DATA) == FRAME_BYTES + 7
    assert file.seek(FRAME_BYTES, os.SEEK_HOLE) == 3 * FRAME_BYTES
    assert file.seek(3 * FRAME_BYTES, os.SEEK_DATA) == 4 * FRAME_BYTES
    assert file.seek(5 * FRAME_BYTES, os.SEEK_HOLE) == 6 * FRAME_BYTES
    file.set_size(5 * FRAME_BYTES + 3)
    assert file.seek(4 * FRAME_BYTES, os.SEEK_HOLE) == 5 * FRAME_BYTES + 3
    assert file.read(5 * FRAME_BYTES + 3, 5) == ("answer", 0, b"")
    assert file.read(5 * FRAME_BYTES + 2, 5) == FORWARDED


def test_a_write_inside_the_file_leaves_its_size_and_sets_its_time(file: File) -> None:
    file.publish(5000, [extent(0, file.first, 2)], 2 * FRAME_BYTES)
    file.write(0, b"x")
    first = file.written_ns
    assert first > 0
    file.write(4990, b"x" * 10)
    assert file.size == 5000
    assert file.written_ns >= first
    assert file.tables.shared.last_write_ns(INODE) == 0


def test_reads_end_where_the_live_size_says_whatever_the_table_was_published_with(
    file: File,
) -> None:
    file.publish(3000, [extent(0, file.first, 3)], 3 * FRAME_BYTES)
    file.write(0, b"a" * 3000)
    for size in (3000, 10, 0, 2 * FRAME_BYTES + 7, 3 * FRAME_BYTES):
        file.set_size(size)
        wanted = file.content(0, size)
        assert file.read(0, 4 * FRAME_BYTES) == ("answer", 0, wanted)
        assert file.read(max(0, size - 1), 5) == ("answer", 0, wanted[-1:])
        assert file.read(size, 5) == ("answer", 0, b"")


def test_holes_at_the_end_reach_as_far_as_the_live_size(file: File) -> None:
    file.publish(5 * FRAME_BYTES, [extent(1, file.first, 1)])
    file.write(FRAME_BYTES, b"a" * FRAME_BYTES)
    expected = bytes(FRAME_BYTES) + b"a" * FRAME_BYTES + bytes(3 * FRAME_BYTES)
    for size in (5 * FRAME_BYTES, 4 * FRAME_BYTES - 9, 2 * FRAME_BYTES + 1, FRAME_BYTES + 5, 9):
        file.set_size(size)
        assert file.read(0, 9 * FRAME_BYTES) == ("answer", 0, expected[:size])


def test_data_and_holes_are_found_inside_the_live_size(file: File) -> None:
    file.publish(5 * FRAME_BYTES, [extent(1, file.first, 2)])
    file.write(FRAME_BYTES, b"a" * FRAME_BYTES)
    assert file.seek(0, os.SEEK_DATA) == FRAME_BYTES
    assert file.seek(0, os.SEEK_HOLE) == 0
    # The second of the frames has no memory below the pool yet.
    assert file.seek(FRAME_BYTES, os.SEEK_HOLE) == 2 * FRAME_BYTES
    file.write(2 * FRAME_BYTES, b"a")
    assert file.seek(FRAME_BYTES, os.SEEK_HOLE) == 3 * FRAME_BYTES
    assert file.seek(3 * FRAME_BYTES, os.SEEK_DATA) == -errno.ENXIO
    file.set_size(FRAME_BYTES + 10)
    assert file.seek(FRAME_BYTES, os.SEEK_HOLE) == FRAME_BYTES + 10
    assert file.seek(FRAME_BYTES + 10, os.SEEK_DATA) == -errno.ENXIO
    file.set_size(10)
    assert file.seek(0, os.SEEK_DATA) == -errno.ENXIO
    assert file.seek(3, os.SEEK_HOLE) == 3
    file.set_size(0)
    assert file.seek(0, os.SEEK_HOLE) == -errno.ENXIO


def test_what_lies_beyond_the_limit_is_asked_of_the_control_plane(file: File) -> None:
    file.publish(FRAME_BYTES, [extent(0, file.first, 1)])
    file.set_size(3 * FRAME_BYTES)
    assert file.read(0, FRAME_BYTES)[0] == "answer"
    assert file.read(1, FRAME_BYTES) == FORWARDED
    assert file.read(2 * FRAME_BYTES, 5) == FORWARDED
    assert file.read(3 * FRAME_BYTES, 5) == ("answer", 0, b"")
    assert file.write(2 * FRAME_BYTES, b"x") == FORWARDED
    assert file.write(0, b"x")[0] == "answer"
    assert file.size == 3 * FRAME_BYTES
    assert file.seek(0, os.SEEK_DATA) == "forward"
    assert file.seek(0, os.SEEK_HOLE) == "forward"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "append", "read", "size"]),
            st.integers(0, 7 * FRAME_BYTES),
            st.integers(0, 2 * FRAME_BYTES),
        ),
        max_size=30,
    )
)
def test_any_writes_and_reads_answer_as_bytes_in_memory_do(
    file: File, steps: list[tuple[str, int, int]]
) -> None:
    frames, limit = 6, 6 * FRAME_BYTES - 100
    file.publish(0, [extent(n, file.first + 2 * n, 1) for n in range(frames)], limit)
    model = bytearray()
    for number, (what, offset, length) in enumerate(steps):
        data = bytes([number % 255 + 1]) * length
        if what == "size":
            # A truncation; the control plane does not extend by it.
            del model[offset:]
            file.set_size(len(model))
        elif what == "read":
            assert file.read(offset, length) == (
                "answer", 0, bytes(model[offset : offset + length])
            )  # fmt: skip
        else:
            offset = len(model) if what == "append" else offset
            fits = length > 0 and offset <= len(model) and offset + length <= limit
            assert file.write(offset, data)[0] == ("answer" if fits else "forward")
            if fits:
                model[offset : offset + length] = data
        assert file.size == len(model)


def test_a_size_once_raised_is_not_lowered_by_a_smaller_write_at_the_same_time(
    file: File,
) -> None:
    frames = RACES * 4 // FRAME_BYTES + 2
    file.publish(1, [extent(0, file.first, frames)], frames * FRAME_BYTES)

    def grow(number: int) -> None:
        """A process of its own, that extends the file by one byte or two wherever it ends now."""
        worker = file.tables.worker(number)
        data = b"abc"[: 2 + number]
        for _ in range(RACES):
            offset = file.size - 1
            request = write_in(offset, len(data))
            reply = worker.answer(request, opcode=WRITE, inode=INODE, payload=data)
            if reply[:2] != ("answer", 0):
                os._exit(2)
            if file.size < offset + len(data):
                os._exit(3)
        os._exit(0)

    # Forked, for the descriptors: both map the same memory.
    growing = [get_context("fork").Process(target=grow, args=(number,)) for number in range(2)]
    for process in growing:
        process.start()
    for process in growing:
        process.join()
    assert [process.exitcode for process in growing] == [0, 0]
    assert 2 * RACES < file.size <= 3 * RACES + 1


def cut_off(file: File, pool_bytes: int) -> None:
    """Take the end of the pool away, so that a touch of it faults."""
    os.truncate(file.tables.pool.medium.name, pool_bytes)


def test_fsync_touches_the_live_line_where_cache_lines_are_what_is_durable(file: File) -> None:
    file.publish(0, [extent(0, file.first, 1)], FRAME_BYTES)
    file.write(0, b"x")
    before = file.tables.shared.header_word("persisted_epoch")
    assert file.fsync() == ("answer", 0, b"")
    assert file.tables.shared.header_word("persisted_epoch") > before
    must_touch = file.tables.shared.header_word("durability") == 1
    cut_off(file, file.live_offset // FRAME_BYTES * FRAME_BYTES)
    # A write-back of a line takes the same faults as a load.
    assert file.fsync() == ("answer", errno.EIO if must_touch else 0, b"")


def test_fsync_waits_for_msync_where_that_is_what_is_durable(file: File) -> None:
    file.publish(0, [extent(0, file.first, 1)], FRAME_BYTES)
    file.set_durability(Durability.MSYNC)
    assert file.fsync()[0] == "sync"
    file.tables.shared.withdraw(INODE)
    assert file.fsync() == FORWARDED


def test_fsync_of_what_is_not_published_is_forwarded_only_where_that_was_asked_for(
    file: File, tmp_path: Path
) -> None:
    assert file.fsync() == FORWARDED
    assert file.ask(SYNCFS, bytes(8))[0] == "forward"
    file.tables.shared.publish(INODE, 0, [])
    assert file.fsync() == ("answer", 0, b"")
    with some_tables(tmp_path) as others:
        for opcode in (FSYNC, SYNCFS):
            assert others.worker().answer(bytes(16), opcode=opcode, inode=INODE)[0] != "forward"


def test_fsync_of_a_published_file_fails_for_ever_after_a_lost_write_back(file: File) -> None:
    file.publish(0, [])
    file.tables.shared.set_header_word("lost_errno", errno.EIO)
    assert file.fsync() == ("answer", errno.EIO, b"")


def test_a_live_line_that_cannot_be_touched_costs_the_request(file: File) -> None:
    file.publish(5, [extent(0, file.first, 1)], FRAME_BYTES)
    cut_off(file, file.live_offset // FRAME_BYTES * FRAME_BYTES)
    assert file.read(0, 5) == ("answer", errno.EIO, b"")
    assert file.write(0, b"x") == ("answer", errno.EIO, b"")
    assert file.seek(0, os.SEEK_DATA) == -errno.EIO
    faults = file.tables.shared.faults(0)
    assert [fault.inode for fault in faults] == [INODE] * 3
    assert {fault.pool_offset for fault in faults} == {file.live_offset}
    for worker in range(2):
        assert file.tables.shared.slot_word(worker, "section") % 2 == 0


def test_a_limit_beyond_the_extents_extends_nothing_beyond_them(file: File) -> None:
    file.publish(FRAME_BYTES - 3, [extent(0, file.first, 1)], 1 << 40)
    assert file.write(FRAME_BYTES - 3, b"abcd") == FORWARDED
    assert file.size == FRAME_BYTES - 3
    assert file.write(FRAME_BYTES - 3, b"abc")[0] == "answer"
    assert file.write(FRAME_BYTES, b"x") == FORWARDED
    assert file.content(0, 2 * FRAME_BYTES).rstrip(b"\0").endswith(b"abc")


def test_the_last_line_of_a_pool_may_be_a_live_line_and_none_behind_it(file: File) -> None:
    pool_bytes = file.tables.pool.medium.size_bytes
    for offset in (pool_bytes, pool_bytes - 32, 1 << 63, (1 << 64) - 64, 8, -64):
        with pytest.raises(ValueError, match="live line"):
            file.tables.shared.publish(INODE, 0, [], live_offset=offset)
    file.live_offset = pool_bytes - 64
    file.publish(0, [extent(0, file.first, 1)], FRAME_BYTES)
    assert file.write(0, b"last")[0] == "answer"
    assert file.read(0, 9) == ("answer", 0, b"last")


@pytest.mark.parametrize("where", ["behind", "across", "crooked", "far", "farthest"])
def test_a_table_with_an_impossible_live_line_is_none(file: File, where: str) -> None:
    pool_bytes = file.tables.pool.medium.size_bytes
    file.publish(5, [extent(0, file.first, 1)], FRAME_BYTES)
    places = {
        "behind": pool_bytes,
        "across": pool_bytes - 8,
        "crooked": file.live_offset + 8,
        "far": 1 << 63,
        "farthest": (1 << 64) - 64,
    }
    file.set_table_word("live_offset", places[where])
    assert file.read(0, 5) == FORWARDED
    assert file.write(0, b"x") == FORWARDED
    assert file.seek(0, os.SEEK_DATA) == "forward"
    assert file.fsync() == FORWARDED


def test_sizes_and_limits_that_cannot_be_are_refused(file: File) -> None:
    publish = file.tables.shared.publish
    with pytest.raises(ValueError, match="bytes"):
        publish(INODE, 10, [], live_offset=file.live_offset, limit_bytes=9)
    with pytest.raises(ValueError, match="bytes"):
        publish(INODE, 10, [], live_offset=file.live_offset, limit_bytes=SIZE_LIMIT_BYTES + 1)
    with pytest.raises(ValueError, match="live line"):
        publish(INODE, 10, [], limit_bytes=11)
    assert not file.tables.shared.is_published(INODE)


def test_no_size_in_a_live_line_leads_astray(file: File) -> None:
    most = (1 << 64 - SIZE_SHIFT) - 1
    last = extent(most // FRAME_BYTES, file.first, 2)
    file.publish(0, [last])
    file.set_size(most)
    file.set_table_word("limit_bytes", (1 << 64) - 1)
    assert file.read(most - 1, 50) == ("answer", 0, b"\0")
    assert file.write(most - 1, b"x")[0] == "answer"
    # Past what a live line can hold.
    assert file.write(most - 1, b"xyz") == FORWARDED
    assert file.write(most, b"x") == FORWARDED
    assert file.size == most
    for offset in (most + 1, 1 << 63, (1 << 64) - 1):
        assert file.read(offset, 5) == ("answer", 0, b"")
        assert file.write(offset, b"x") == FORWARDED


@pytest.mark.parametrize("opcode", [IOCTL, TMPFILE, STATX])
def test_what_the_tables_say_nothing_of_is_handed_over(file: File, opcode: int) -> None:
    assert file.ask(opcode, bytes(32))[0] == "forward"
