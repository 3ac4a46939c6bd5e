"""A worker serves small files without a table as Python does."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.same_by_python import Twins, twins
from pmemfs.clock import AccessTimes
from pmemfs.dataplane.layouts import CHUNK_SHIFT, Presence
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import LIVE_OFFSET, ROOT
from pmemfs.media.label import Scheme
from pmemfs.media.page import PageFlags
from pmemfs.units import KIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.extents import MappedExtent

FRAME = 4096
SMALL = 64 * KIB
SMALL_FILE = 4 * SMALL


@pytest.fixture(params=[Scheme.NONE, Scheme.PMEM], ids=lambda scheme: scheme.word)
def both(
    shm: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Twins]:
    with twins(shm, monkeypatch, request.param) as made:
        yield made


class File:
    """An open file in a directory of its own."""

    def __init__(self, both: Twins, *, mode: int = 0o100640, flags: int = os.O_RDWR) -> None:
        self.both = both
        self.fs = both.native.fs
        self.number = self.fs.make(ROOT, b"file", NewInode(mode, 1, 2))
        answered = both.ask(Opcode.OPEN, self.number, wire.OPEN_IN.pack(flags, 0))
        assert answered is not None
        (self.handle,) = struct.unpack_from("<Q", answered[1])

    def write(
        self, offset: int, data: bytes, *, flags: int = os.O_RDWR, write_flags: int = 0
    ) -> bool:
        """Whether a worker has carried it out, as Python would have."""
        head = wire.WRITE_IN.pack(self.handle, offset, len(data), write_flags, 0, flags)
        answered = self.both.ask(Opcode.WRITE, self.number, head, data)
        assert answered in (None, (0, wire.WRITE_OUT.pack(len(data))))
        return answered is not None

    def read(self, offset: int, length: int, *, flags: int = os.O_RDWR) -> bytes | None:
        """What a worker says, as Python says it, too; None if it hands over."""
        head = wire.READ_IN.pack(self.handle, offset, length, 0, 0, flags)
        answered = self.both.ask(Opcode.READ, self.number, head)
        assert answered is None or answered[0] == 0
        return None if answered is None else answered[1]

    def seek(self, offset: int, whence: int) -> int | None:
        """What a worker says, as Python says it, too."""
        head = wire.LSEEK_IN.pack(self.handle, offset, whence)
        answered = self.both.ask(Opcode.LSEEK, self.number, head)
        assert answered is None or answered[0] == 0
        return None if answered is None else int(struct.unpack("<Q", answered[1])[0])

    def sync(self) -> bool:
        """Whether a worker has done it, as Python does it, too."""
        answered = self.both.ask(Opcode.FSYNC, self.number, wire.FSYNC_IN.pack(self.handle, 0))
        assert answered in (None, (0, b""))
        return answered is not None

    def close(self) -> bool:
        """Whether a worker has done it, as Python does it, too."""
        answered = self.both.ask(
            Opcode.RELEASE, self.number, wire.RELEASE_IN.pack(self.handle, 0, 0, 0)
        )
        assert answered in (None, (0, b""))
        return answered is not None

    def content(self) -> bytes:
        """What another process finds."""
        return bytes(self.both.native.anew().read(self.number, 0, 1 << 20))

    def extents(self) -> list[MappedExtent]:
        return self.both.native.anew().extents(self.number)


@pytest.fixture
def file(both: Twins) -> File:
    return File(both)


@pytest.mark.parametrize("length", [1, 100, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME, SMALL])
def test_the_first_bytes_of_a_file_are_written_and_read(file: File, length: int) -> None:
    data = random.Random(length).randbytes(length)
    reserve = file.both.native.names.frames.numbers()
    assert file.write(0, data)
    assert file.read(0, SMALL) == data
    assert file.content() == data
    frame_count = -(-length // FRAME)
    assert [extent.frame_count for extent in file.extents()] == [frame_count]
    assert file.both.native.names.frames.numbers() == reserve[:-frame_count]
    assert file.extents()[0].pfn == reserve[-1]


def test_bytes_are_overwritten_and_added_in_the_last_frame(file: File) -> None:
    assert file.write(0, b"a" * 5000)
    assert file.write(100, b"b" * 4500)
    assert file.write(5000, b"c" * 500)
    assert file.write(5400, b"d" * 2000)
    assert file.write(7400, b"e" * (2 * FRAME - 7400))
    assert file.content()[5399:7401] == b"c" + b"d" * 2000 + b"e"
    # A gap is Python's to make.
    assert not file.write(9000, b"g")
    assert file.read(0, 2 * FRAME) == file.content()
    assert file.read(5400, 10) == b"d" * 10
    assert file.read(2 * FRAME - 3, 10) == b"eee"
    assert file.read(2 * FRAME, 10) == b""
    assert file.read(1 << 60, 10) == b""


@pytest.mark.parametrize("step", [10240, 3 * FRAME, 50000])
def test_a_file_grows_by_writes_at_its_end(file: File, step: int) -> None:
    data = random.Random(step).randbytes(SMALL_FILE)
    for at in range(0, SMALL_FILE, step):
        assert file.write(at, data[at : at + step])
    assert file.content() == data
    assert sum(extent.frame_count for extent in file.extents()) == SMALL_FILE // FRAME
    assert file.read(SMALL_FILE - 5000, SMALL) == data[-5000:]
    # This takes the lock for too long.
    assert file.read(0, SMALL + 1) is None
    # What was there changes with what comes behind it.
    assert file.write(SMALL_FILE - 100, b"x" * 5000)
    assert file.content() == data[:-100] + b"x" * 5000
    # From here on it is a large file.
    assert not file.write(SMALL_FILE + 4900, b"y")
    assert file.close()


def test_a_file_with_holes_or_frames_ahead_grows_by_python(file: File) -> None:
    fs = file.fs
    fs.write(file.number, 0, b"a" * 3 * FRAME)
    fs.punch(file.number, FRAME, FRAME)
    file.both.native.files.tables.withdraw_all()
    assert not file.write(3 * FRAME, b"b" * 17 * FRAME)
    fs.set_attributes(file.number, size_bytes=0)
    assert file.write(0, b"c" * FRAME)
    fs.allocate(file.number, 2 * FRAME, FRAME, keep_size=True)
    assert not file.write(FRAME, b"d")


def test_what_python_has_mapped_is_served(file: File) -> None:
    fs = file.fs
    fs.write(file.number, 0, b"a" * 3000)
    fs.punch(file.number, 0, 4096)
    fs.write(file.number, 3 * FRAME, b"b" * FRAME)
    file.both.native.files.tables.withdraw_all()
    assert file.read(0, SMALL) == file.content()
    assert not file.write(FRAME, b"x")
    assert not file.write(3 * FRAME - 1, b"xx")
    assert file.write(3 * FRAME, b"c" * 10)
    assert file.seek(0, os.SEEK_DATA) == 3 * FRAME
    assert file.seek(5, os.SEEK_HOLE) == 5
    assert file.seek(3 * FRAME + 7, os.SEEK_DATA) == 3 * FRAME + 7
    assert file.seek(3 * FRAME, os.SEEK_HOLE) == 4 * FRAME
    assert file.seek(4 * FRAME, os.SEEK_HOLE) is None
    # Behind the end of the file.
    fs.allocate(file.number, 4 * FRAME, FRAME, keep_size=True)
    assert file.write(4 * FRAME, b"d" * 10)
    assert file.read(0, SMALL) == file.content()


@pytest.mark.parametrize(
    "options",
    [
        {"write_flags": wire.WRITE_CACHE},
        {"offset": 1},
        {"offset": FRAME},
        {"length": SMALL + 1},
        {"length": 0},
    ],
    ids=repr,
)
def test_writes_that_need_more_are_handed_over(file: File, options: dict[str, int]) -> None:
    rest = {name: value for name, value in options.items() if name == "write_flags"}
    assert not file.write(options.get("offset", 0), b"x" * options.get("length", 10), **rest)


def test_a_write_that_takes_privileges_is_handed_over(both: Twins) -> None:
    file = File(both, mode=0o104755)
    assert not file.write(0, b"x")
    file.fs.write(file.number, 0, b"xx")
    assert not file.write(0, b"y")
    assert file.read(0, 10) == b"xx"


def test_large_files_are_left_to_python(file: File) -> None:
    file.fs.write(file.number, 0, b"x" * (SMALL_FILE + 1))
    assert file.read(0, 10) is None
    assert not file.write(0, b"y")
    assert file.seek(0, os.SEEK_DATA) is None
    assert file.sync()


def test_without_frames_the_first_write_is_handed_over(file: File) -> None:
    frames = file.both.native.names.frames
    taken = frames.pop(frames.count - 2)
    assert not file.write(0, b"x" * 3 * FRAME)
    assert frames.count == 2
    assert file.write(0, b"x" * 2 * FRAME)
    frames.push(taken)


def test_a_file_in_many_pieces_is_left_to_python(file: File) -> None:
    frames = file.both.native.names.frames
    every_other = frames.pop(33)[::2]
    frames.push(every_other)
    before = frames.numbers()
    assert not file.write(0, b"x" * 6 * FRAME)
    assert frames.numbers() == before
    head = wire.WRITE_IN.pack(file.handle, 0, 2 * FRAME, 0, 0, 0)
    file.both.native.worker.answer(
        head, opcode=Opcode.WRITE, inode=file.number, payload=b"x" * 2 * FRAME
    )
    assert [extent.frame_count for extent in file.extents()] == [1, 1]
    assert file.read(0, SMALL) == b"x" * 2 * FRAME


def test_frames_in_no_order_make_one_extent(file: File) -> None:
    frames = file.both.native.names.frames
    first, *rest = frames.pop(9)
    frames.push([*rest[::-2], first, *rest[-2::-2]])
    assert file.write(0, b"x" * 9 * FRAME)
    assert [(extent.pfn, extent.frame_count) for extent in file.extents()] == [(first, 9)]


def test_frames_side_by_side_are_taken_from_below_others(file: File) -> None:
    native = file.both.native
    frames = native.names.frames
    lone = frames.pop(13)[::2]
    following = frames.numbers()[-9:][::-1]
    frames.push(lone)
    before = frames.numbers()
    native.set_word("in_one_piece", 1)
    head = wire.WRITE_IN.pack(file.handle, 0, 9 * FRAME, 0, 0, 0)
    verdict, *_ = native.worker.answer(
        head, opcode=Opcode.WRITE, inode=file.number, payload=b"x" * 9 * FRAME
    )
    assert verdict == "answer"
    assert [(each.pfn, each.frame_count) for each in file.extents()] == [(following[0], 9)]
    assert frames.numbers() == [pfn for pfn in before if pfn not in following]


def test_where_memory_is_mapped_in_large_units_a_file_lies_in_one_piece(file: File) -> None:
    native = file.both.native
    native.set_word("in_one_piece", 1)
    assert file.write(0, b"x" * FRAME)
    assert file.write(FRAME, b"x" * 2 * FRAME)
    top, *lone = native.names.frames.pop(33)[::2]
    native.names.frames.push([*lone, top])
    assert file.write(3 * FRAME, b"x" * FRAME)
    before = native.names.frames.numbers()
    assert not file.write(4 * FRAME, b"x" * FRAME)
    assert native.names.frames.numbers() == before


def test_a_full_log_moves_into_a_frame_of_its_own(file: File) -> None:
    for mode in range(5):
        file.fs.set_attributes(file.number, mode=0o600 + mode)
    reserve = file.both.native.names.frames.count
    assert file.write(0, b"x")
    # One more is for the byte.
    assert file.both.native.names.frames.count == reserve - 2
    assert file.read(0, 10) == b"x"


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_NOATIME])
@pytest.mark.parametrize("times", list(AccessTimes))
def test_reads_count_as_accesses_where_python_counts_them(
    both: Twins, times: AccessTimes, flags: int
) -> None:
    file = File(both, flags=flags)
    both.note_accesses(times)
    assert file.write(0, b"x" * 100)
    fs = file.fs
    for step in range(4):
        assert file.read(0, 10, flags=flags) is not None
        if step == 2:
            fs.set_attributes(file.number, atime_ns=fs.attributes(file.number).mtime_ns + 10**9)
    fs.set_attributes(file.number, atime_ns=5)
    assert file.read(0, 0, flags=flags) == b""


def test_a_sync_is_answered(file: File) -> None:
    assert file.write(0, b"x" * 100)
    assert file.sync()


def test_pages_know_their_file_and_are_not_held(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with twins(shm, monkeypatch, Scheme.PMEM) as both:
        file = File(both)
        assert file.write(0, b"x" * 3 * FRAME)
        assert file.read(FRAME, 10)
        [extent] = file.extents()
        memmap = both.native.files.memmap
        for at in range(3):
            page = memmap.page(extent.pfn + at)
            assert (page.mapping, page.index, page.refcount) == (file.number, at, 0)
            assert page.flags & PageFlags.DIRTY
            assert (page.writes, page.reads) == (1, at == 1)
        native = both.native
        native.fs.hold(file.number)
        native.fs.unlink(ROOT, b"file")
        assert both.ask(Opcode.RELEASE, file.number, wire.RELEASE_IN.pack(file.handle, 2, 0, 0))
        assert both.ask(Opcode.FORGET, file.number, wire.FORGET_IN.pack(1))
        assert not any(memmap.page(extent.pfn + at).flags & PageFlags.DIRTY for at in range(3))


def test_a_page_that_is_held_keeps_its_frame(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with twins(shm, monkeypatch, Scheme.PMEM) as both:
        file = File(both)
        assert file.write(0, b"x" * 3 * FRAME)
        [extent] = file.extents()
        native = both.native
        native.files.memmap.get_page(extent.pfn + 1)
        native.fs.hold(file.number)
        native.fs.unlink(ROOT, b"file")
        assert both.ask(Opcode.RELEASE, file.number, wire.RELEASE_IN.pack(file.handle, 2, 0, 0))
        verdict = native.worker.answer(
            wire.FORGET_IN.pack(1), opcode=Opcode.FORGET, inode=file.number
        )
        assert verdict[0] == "drop"
        assert native.names.orphans.numbers() == [file.number]


def test_a_damaged_size_is_left_to_python(file: File) -> None:
    assert file.write(0, b"x" * 100)
    at = file.fs.inode(file.number).slot_offset + LIVE_OFFSET
    word = int.from_bytes(file.fs.medium.read(at, 8), "little")
    file.both.native.files.pool.medium.store(at, (word ^ 1).to_bytes(8, "little"))
    worker, number = file.both.native.worker, file.number
    head = wire.READ_IN.pack(file.handle, 0, 100, 0, 0, 0)
    assert worker.answer(head, opcode=Opcode.READ, inode=number) == ("forward", 0, b"")
    head = wire.WRITE_IN.pack(file.handle, 0, 1, 0, 0, 0)
    said = worker.answer(head, opcode=Opcode.WRITE, inode=number, payload=b"x")
    assert said == ("forward", 0, b"")


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_are_served_as_python_serves_them(file: File, seed: int) -> None:
    chance = random.Random(seed)
    served = 0
    for _ in range(30):
        offset, length = chance.randrange(3 * FRAME), chance.randrange(1, 2 * FRAME)
        kind = chance.randrange(6)
        if kind < 2:
            served += file.read(offset, length) is not None
        elif kind < 5:
            data = chance.randbytes(length)
            at = chance.choice((0, offset, len(file.content())))
            if file.write(at, data):
                served += 1
            else:
                file.fs.write(file.number, at, data)
        else:
            file.fs.set_attributes(file.number, size_bytes=chance.choice((0, offset)))
    assert served > 5


def at_the_end(both: Twins, count: int) -> list[int]:
    """Let the next frames of the reserve be the last of the pool, which is cut off before them."""
    native = both.native
    geometry = native.fs.geometry
    end = geometry.first_pfn + geometry.frame_count
    native.names.is_on = True
    [run] = native.fs.allocator.allocate(count, goal=end - count)
    assert sum(run) == end
    native.names.frames.push(range(end - 1, end - count - 1, -1))
    # Else a worker would ask the file, and the file would say that it was cut off.
    for chunk in range(native.files.pool.medium.size_bytes >> CHUNK_SHIFT):
        native.files.shared.set_presence(chunk, Presence.WHOLE)
    return list(range(end - count, end))


def served_by_nobody(file: File, opcode: Opcode, operation: bytes, payload: bytes = b"") -> None:
    """A request that meets a fault is handed over, and nothing is left of it."""
    native = file.both.native
    reserve, handles = native.names.frames.numbers(), native.names.handles.numbers()
    said = native.worker.answer(operation, opcode=opcode, inode=file.number, payload=payload)
    assert said == ("forward", 0, b"")
    assert native.word("holder") == native.word("failed") == 0
    assert native.names.frames.numbers() == reserve
    assert native.names.handles.numbers() == handles
    assert native.decision.state in (0, 2)


def test_a_first_write_into_bad_memory_is_handed_over(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twins(shm, monkeypatch) as both:
        file = File(both)
        first, *_ = at_the_end(both, 2)
        os.truncate(both.native.files.medium.name, first << 12)
        head = wire.WRITE_IN.pack(file.handle, 0, 5000, 0, 0, 0)
        served_by_nobody(file, Opcode.WRITE, head, b"x" * 5000)
        assert both.native.anew().attributes(file.number).size_bytes == 0


def test_requests_for_bad_memory_are_handed_over(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twins(shm, monkeypatch) as both:
        file = File(both)
        first, *_ = at_the_end(both, 2)
        head = wire.WRITE_IN.pack(file.handle, 0, 5000, 0, 0, 0)
        worker = both.native.worker
        said = worker.answer(head, opcode=Opcode.WRITE, inode=file.number, payload=b"x" * 5000)
        assert said[:2] == ("answer", 0)
        both.native.catch_up()
        os.truncate(both.native.files.medium.name, first << 12)
        served_by_nobody(file, Opcode.WRITE, head, b"y" * 5000)
        read = wire.READ_IN.pack(file.handle, 0, 5000, 0, 0, 0)
        served_by_nobody(file, Opcode.READ, read)


def test_bad_page_structures_leave_nothing_held(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with twins(shm, monkeypatch, Scheme.PMEM) as both:
        file, native = File(both), both.native
        assert file.write(0, b"x" * 5000)
        memmap = native.files.pool.zones.memmap
        end = native.fs.geometry.first_pfn + native.fs.geometry.frame_count
        assert memmap.offset_bytes >= end << 12
        native.fs.hold(file.number)
        native.fs.unlink(ROOT, b"file")
        os.truncate(native.files.medium.name, memmap.offset_bytes)
        read = wire.READ_IN.pack(file.handle, 0, 5000, 0, 0, 0)
        served_by_nobody(file, Opcode.READ, read)
        # To free it, its pages would have to be looked at.
        release = wire.RELEASE_IN.pack(file.handle, 0, 0, 0)
        said = native.worker.answer(release, opcode=Opcode.RELEASE, inode=file.number)
        assert said == ("answer", 0, b"")
        said = native.worker.answer(wire.FORGET_IN.pack(1), opcode=Opcode.FORGET, inode=file.number)
        assert said == ("drop", 0, b"")
        assert native.names.orphans.numbers() == [file.number]
        assert native.word("holder") == native.word("failed") == 0
