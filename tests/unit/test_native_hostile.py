"""Workers read logs of pools that somebody has made up: they hand over, and nothing worse."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit import hostile_pools
from kit.hostile_pools import Base, GuardedMedium, mutated
from kit.known_names import Known, NamesReader, as_known, names_reader
from kit.large_directories import add_names
from pmemfs.dataplane import layouts
from pmemfs.dataplane.native import Responder, store_word
from pmemfs.engine.sharing import share_pool
from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import FIRST_INODES_FRAME, JOURNAL_FRAME, Geometry
from pmemfs.media.inode import HEAD_WORD_AT, ROOT, SLOT_BYTES, TAIL_WORD_AT
from pmemfs.media.log import (
    NEXT_AT,
    RecordKind,
    pack_extent,
    pack_frame_head,
    pack_hole,
    pack_parent,
    pack_values,
    record,
    seal,
)
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.reading import read_inode
from pmemfs.volume.fs.table import InodeTable

TRIES = 1500
SECONDS = 120
FILE, DIRECTORY = NewInode(0o100644, 1, 2), NewInode(0o40755, 0, 0)


class MadeUp:
    """A file of a pool that others make up, and a worker to whom all but the data zone of it can't
    be touched."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(hostile_pools.base(0).image)
        self.path = path
        self.medium = MappedMedium.open(str(path))
        self.shared = share_pool(Pool.open(self.medium), worker_count=1, has_files=True)
        self.at = self.shared.header_word("names_offset")

    def worker(self, of: Base, image: bytes) -> Responder:
        """A worker that meets this pool."""
        os.pwrite(self.medium.fileno(), image, 0)
        geometry = geometry_of(of)
        for name, value in (
            ("first_pfn", geometry.first_pfn),
            ("frame_count", geometry.frame_count),
            ("memory_bytes", 1 << 20),
        ):
            at = self.at + layouts.NAMES_HEAD.offset_of(name)
            store_word(self.shared.memory, at, value)
        before = mappings_of(self.path)
        worker = Responder(self.shared.fd, self.medium.fileno(), self.medium.map_flags, 1 << 16)
        [(start, end)] = mappings_of(self.path) - before
        protect(start, start + of.data_start)
        protect(start + of.data_start + of.data_bytes, end)
        return worker


def geometry_of(of: Base) -> Geometry:
    return Geometry(of.data_start >> PAGE_SHIFT, of.data_bytes >> PAGE_SHIFT)


def mappings_of(path: Path) -> set[tuple[int, int]]:
    """Where this process has mapped a file."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = line.split()[0].split("-")
            found.add((int(start, 16), int(end, 16)))
    return found


def protect(start: int, end: int) -> None:
    """A touch there ends this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if end > start and libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def read_by_python(of: Base, image: bytes, numbers: list[int]) -> dict[int, Known | None]:
    """What Python reads; None where it finds damage, or nothing."""
    medium = GuardedMedium(image)
    medium.read_only = True
    medium.guard = range(of.data_start, of.data_start + of.data_bytes)
    geometry = geometry_of(of)
    table = InodeTable(medium, geometry, Allocator(medium, geometry))
    found: dict[int, Known | None] = {}
    for number in numbers:
        with contextlib.suppress(DamagedFileSystem):
            inode = read_inode(medium, table, number)
            if inode is not None and any(map(table.has_inodes, inode.runs())):
                continue
            found[number] = as_known(inode) if inode is not None else None
    return found


def attempt(made_up: MadeUp, seed: int) -> tuple[int, int]:
    """How many inodes of a made-up pool a worker knows, and how many Python reads."""
    of, image, _ = mutated(seed)
    rng = random.Random(seed)
    worker = made_up.worker(of, image)
    numbers = [*of.numbers, 0, 2, of.data_start >> 9, (of.data_start + of.data_bytes) >> 9]
    numbers += [rng.getrandbits(64), (1 << 64) - 1, rng.choice(of.numbers) + 1]
    read = read_by_python(of, image, numbers)
    known_count = 0
    for number in numbers:
        known = worker.known(number)
        if known is None:
            continue
        known_count += 1
        assert read.get(number) is not None, f"{number}: known, and damaged"
        assert Known(*known)._replace(capacity=0) == read[number]
    # What was known before the pool became another.
    of, image, _ = mutated(seed + 1)
    os.pwrite(made_up.medium.fileno(), image[of.data_start : of.data_start + of.data_bytes],
              of.data_start)  # fmt: skip
    for number in numbers:
        worker.known(number)
        worker.found(number, [b"dir0", b"file1", b"x" * 255])
    return known_count, sum(inode is not None for inode in read.values())


def in_a_child(work: Callable[[], None]) -> None:
    """See that this comes to its end in a process of its own, soon."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work, however long it waits
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_of_a_made_up_pool_a_worker_knows_only_what_python_reads_without_damage() -> None:
    def work() -> None:
        known_count = read_count = 0
        with tempfile.TemporaryDirectory() as directory:
            made_up = MadeUp(Path(directory) / "pool")
            for seed in range(TRIES):
                try:
                    known, read = attempt(made_up, seed)
                except BaseException:
                    print(f"seed {seed}: {mutated(seed)[2]}", file=sys.stderr)
                    raise
                known_count += known
                read_count += read
        # Were all handed over, this would have tested nothing.
        assert known_count > read_count // 2, (known_count, read_count)

    in_a_child(work)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[NamesReader]:
    with names_reader(tmp_path) as reader:
        yield reader


def word_at(reader: NamesReader, offset: int, value: int) -> None:
    """Store a word in the pool."""
    reader.files.medium.store(offset, (value % (1 << 64)).to_bytes(8, "little"))


def in_frames(reader: NamesReader, count: int = 200) -> tuple[int, list[int]]:
    """A directory whose log takes several frames, and where these are."""
    fs = reader.files.fs
    directory, file = fs.make(ROOT, b"directory", DIRECTORY), fs.make(ROOT, b"file", FILE)
    for at in range(count):
        fs.link(file, directory, b"n%d" % at)
    return directory, fs.inode(directory).log.frames


def far(reader: NamesReader) -> list[int]:
    """Offsets where no frame of this log can be."""
    geometry = reader.files.fs.geometry
    start, end = geometry.first_pfn << PAGE_SHIFT, geometry.end_pfn << PAGE_SHIFT
    return [
        0, 64, 4096, start, start + 4096, start + 3 * 4096, start - 4096, end - 4096, end,
        end + 4096, start + 20 * 4096 + 64, 1 << 40, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
    ]  # fmt: skip


def test_a_log_that_goes_on_far_away_is_handed_over(reader: NamesReader) -> None:
    directory, frames = in_frames(reader)
    assert reader.compare(directory)
    for offset in far(reader):
        word_at(reader, frames[1] + NEXT_AT, offset)
        reader.raise_version(directory)
        assert not reader.compare(directory)
    word_at(reader, frames[1] + NEXT_AT, frames[2])
    reader.raise_version(directory)
    assert reader.compare(directory)


def test_what_a_group_keeps_for_itself_is_neither_of_a_log_nor_of_a_file(
    reader: NamesReader,
) -> None:
    directory, frames = in_frames(reader)
    inode, first_pfn = reader.files.fs.inode(directory), reader.files.fs.geometry.first_pfn
    assert reader.compare(directory)
    # A sound frame of this log, with a sound record. The journal is there.
    forged = (first_pfn + JOURNAL_FRAME) << PAGE_SHIFT
    head = pack_frame_head(directory, inode.generation, forged)
    raw = seal([pack_parent(ROOT)], directory, inode.generation, forged + 64)
    reader.files.medium.store(forged, head + raw)
    word_at(reader, frames[-2] + NEXT_AT, forged)
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, forged + 128)
    reader.raise_version(directory)
    assert not reader.compare(directory)
    file = reader.files.fs.lookup(ROOT, b"file")
    for pfn, count, is_possible in (
        (first_pfn + JOURNAL_FRAME, 1, False), (first_pfn - 1, 1, False),
        (first_pfn + 5, 1, True), (first_pfn + 5, 1 << 40, False), (first_pfn + 5, 0, False),
        (reader.files.fs.geometry.end_pfn - 1, 1, True),
        (reader.files.fs.geometry.end_pfn - 1, 2, False),
    ):  # fmt: skip
        assert is_known_with(reader, file, pack_extent(0, pfn, count)) == is_possible


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_file_that_owns_frames_of_inodes_is_handed_over(
    reader: NamesReader, *, is_marked: bool
) -> None:
    fs = reader.files.fs
    numbers = [fs.make(ROOT, b"n%d" % at, FILE) for at in range(20)]
    last = max(fs.store.table.frames())
    root = fs.geometry.first_pfn + FIRST_INODES_FRAME
    if not is_marked:
        # The first one holds inodes whatever its bit says.
        fs.store.table.mark_frame(root, is_marked=False)
    for pfn, count, is_possible in (
        (last, 1, False), (last - 1, 3, False), (last + 1, 1, True), (last + 1, 1000, True),
        (root, 1, False), (root, 100, False),
    ):  # fmt: skip
        extent = pack_extent(0, pfn, count)
        assert is_known_with(reader, numbers[0], extent) == is_possible
        # Only what counts in the end is the file's.
        assert is_known_with(reader, numbers[0], extent, pack_hole(0, count))


def test_a_log_that_begins_far_away_is_handed_over(reader: NamesReader) -> None:
    directory, frames = in_frames(reader)
    slot = reader.files.fs.inode(directory).slot_offset
    for offset in far(reader):
        word_at(reader, slot + HEAD_WORD_AT, offset + 64)
        assert not reader.compare(directory)
    word_at(reader, slot + HEAD_WORD_AT, frames[0] + 64)
    assert reader.compare(directory)


@pytest.mark.parametrize("kind", ["slot", "frames"])
def test_a_log_that_ends_elsewhere_is_handed_over(reader: NamesReader, kind: str) -> None:
    directory, _ = in_frames(reader, 2 if kind == "slot" else 200)
    inode = reader.files.fs.inode(directory)
    tail, known_count = inode.log.tail, 0
    near = [tail + distance for distance in range(-640, 640, 32)]
    for offset in [*far(reader), *near, inode.slot_offset, inode.slot_offset + SLOT_BYTES]:
        word_at(reader, inode.slot_offset + TAIL_WORD_AT, offset)
        reader.raise_version(directory)
        known_count += reader.compare(directory)
        word_at(reader, inode.slot_offset + TAIL_WORD_AT, tail)
        reader.raise_version(directory)
        assert reader.compare(directory)
        # The same without a word about it.
        word_at(reader, inode.slot_offset + TAIL_WORD_AT, offset)
        reader.compare(directory)
        word_at(reader, inode.slot_offset + TAIL_WORD_AT, tail)
    # In frames, a log may end where any of its last records does.
    assert known_count < 20


def test_a_tail_that_went_back_without_a_word_has_the_log_read_anew(reader: NamesReader) -> None:
    directory, _ = in_frames(reader)
    inode = reader.files.fs.inode(directory)
    assert reader.compare(directory)
    # A record fewer.
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, inode.log.tail - 64)
    assert not reader.compare(directory)
    assert reader.compare(directory)


@pytest.mark.parametrize("back", [0, 1, 2, 3, 70, 199])
def test_a_log_that_goes_in_a_circle_is_handed_over(reader: NamesReader, back: int) -> None:
    directory, _ = in_frames(reader, 5)
    fs = reader.files.fs
    inode = fs.inode(directory)
    add_names(fs, directory, fs.lookup(ROOT, b"file"), range(100, 200 * 63 + 100))
    assert reader.compare(directory)
    frames = inode.log.frames
    # The last frame is not full.
    word_at(reader, frames[199] + NEXT_AT, frames[199 - back])
    tail = inode.log.tail
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, frames[200] + FRAME_BYTES + 128)
    reader.raise_version(directory)
    with pytest.raises(DamagedFileSystem, match="circle"):
        reader.stored(directory)
    assert not reader.compare(directory)
    word_at(reader, frames[199] + NEXT_AT, frames[200])
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, tail)
    reader.raise_version(directory)
    assert reader.compare(directory)


def test_a_link_behind_the_tail_counts_for_nothing(reader: NamesReader) -> None:
    directory, _ = in_frames(reader)
    inode = reader.files.fs.inode(directory)
    while inode.log.tail % FRAME_BYTES:
        reader.files.fs.set_attributes(directory, mode=0o700)
    word_at(reader, inode.log.frames[-1] + NEXT_AT, 1 << 50)
    assert reader.compare(directory)
    reader.raise_version(directory)
    assert reader.compare(directory)


def last_record(reader: NamesReader, number: int, *records: bytes) -> None:
    """Put sound records behind a log, whatever they say."""
    inode = reader.files.fs.inode(number)
    tail, raw = inode.log.tail, seal(records, number, inode.generation, inode.log.tail)
    reader.files.medium.store(tail, raw)
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, tail + len(raw))


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_records_of_any_kind_are_known_or_handed_over(reader: NamesReader, slots: int) -> None:
    rng = random.Random(slots)
    directory, _ = in_frames(reader)
    file = reader.files.fs.lookup(ROOT, b"file")
    tails = {n: reader.files.fs.inode(n).log.tail for n in (directory, file)}
    known_count = 0
    for kind in [*range(14), 200, 255] * 12:
        for number in tails:
            raw = bytearray(rng.randbytes(slots * 64) if rng.random() < 0.7 else slots * 64)
            if rng.random() < 0.7:
                raw[8:64] = bytes(rng.choice((0, 0, 0, 1, 2, 8)) for _ in range(56))
            last_record(reader, number, record(kind, raw))
            known_count += reader.compare(number)
            slot = reader.files.fs.inode(number).slot_offset
            word_at(reader, slot + TAIL_WORD_AT, tails[number])
            reader.raise_version(number)
            assert reader.compare(number)
    assert known_count or slots > 1


@pytest.mark.parametrize("slots", [0, 2, 62, 63, 64, 255])
def test_a_record_has_a_length_that_fits(reader: NamesReader, slots: int) -> None:
    directory, _ = in_frames(reader)
    inode = reader.files.fs.inode(directory)
    raw = bytearray(record(RecordKind.HOLE, bytearray(64)))
    raw[1] = slots
    at = inode.log.tail
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, at + 64)
    medium = reader.files.medium
    whole = bytes(raw) + bytes(medium.read(at + 64, max(0, slots - 1) * 64))
    medium.store(at, seal([whole], directory, inode.generation, at)[:64])
    assert not reader.compare(directory)


def is_known_with(reader: NamesReader, number: int, *records: bytes) -> bool:
    """Whether a worker knows an inode with more records, which are taken away again."""
    inode = reader.files.fs.inode(number)
    last_record(reader, number, *records)
    is_known = reader.compare(number)
    word_at(reader, inode.slot_offset + TAIL_WORD_AT, inode.log.tail)
    reader.raise_version(number)
    assert reader.compare(number)
    return is_known


def entry(type_: int, length: int, name: bytes) -> bytes:
    """An ENTRY that says that its name has this length."""
    raw = bytes(8) + (5).to_bytes(8, "little") * 2 + struct.pack("<BH", type_, length) + name
    return record(RecordKind.ENTRY, bytearray(raw))


def test_names_and_types_are_possible_ones(reader: NamesReader) -> None:
    directory, _ = in_frames(reader, 5)
    possible = (b"n" * 255, b"...", b"\xff")
    for name in (*possible, b"", b".", b"..", b"a/b", b"a\0", b"/", b"n" * 256):
        for type_ in (0, 1, 3, 4, 8, 12, 13, 14, 255):
            is_possible = name in possible and type_ in (1, 4, 8, 12)
            raw = entry(type_, len(name), name)
            assert is_known_with(reader, directory, raw) == is_possible


def test_a_name_is_as_long_as_its_record_says(reader: NamesReader) -> None:
    directory, _ = in_frames(reader, 5)
    for length in (0, 36, 37, 38, 101, 255, 256, 65535):
        raw = entry(8, length, b"n" * 37)
        assert is_known_with(reader, directory, raw) == (length in (36, 37))


def test_a_target_is_whole(reader: NamesReader) -> None:
    fs = reader.files.fs
    number = fs.make(ROOT, b"file", FILE)
    state = fs.inode(number).state.replaced(mode=0o120777).pack()
    [whole] = pack_values(RecordKind.TARGET, b"", b"t")
    assert not is_known_with(reader, number, whole)
    assert is_known_with(reader, number, state, whole)
    # It says that one byte more follows.
    part = whole[:8] + b"\x02" + whole[9:]
    assert not is_known_with(reader, number, state, part)


def test_a_frame_of_another_inode_is_not_read(reader: NamesReader) -> None:
    directory, frames = in_frames(reader)
    inode = reader.files.fs.inode(directory)
    for number, generation, offset in (
        (directory + 1, inode.generation, frames[1]),
        (directory, inode.generation + 1, frames[1]),
        (directory, inode.generation, frames[2]),
    ):
        head = pack_frame_head(number, generation, offset, frames[2])
        reader.files.medium.store(frames[1], head)
        reader.raise_version(directory)
        assert not reader.compare(directory)
    head = pack_frame_head(directory, inode.generation, frames[1], frames[2])
    reader.files.medium.store(frames[1], head)
    reader.raise_version(directory)
    assert reader.compare(directory)
    word_at(reader, frames[1] + 8, directory + 1)
    reader.raise_version(directory)
    assert not reader.compare(directory)


def test_a_slot_counts_only_where_the_bitmap_says_that_inodes_are(reader: NamesReader) -> None:
    fs, medium = reader.files.fs, reader.files.medium
    numbers = [fs.make(ROOT, b"n%d" % at, FILE) for at in range(20)]
    number = max(numbers)
    # A file that looks like an inode.
    file = fs.make(ROOT, b"file", FILE)
    fs.write(file, 0, bytes(FRAME_BYTES))
    pfn = next(iter(fs.inode(file).extents)).pfn
    medium.store(pfn << PAGE_SHIFT, bytes(medium.read(number * SLOT_BYTES, SLOT_BYTES)))
    assert reader.known((pfn << PAGE_SHIFT) // SLOT_BYTES) is None
    fs.store.table.mark_frame(number * SLOT_BYTES >> PAGE_SHIFT, is_marked=False)
    reader.raise_version(number)
    assert not reader.compare(number)
    fs.store.table.mark_frame(number * SLOT_BYTES >> PAGE_SHIFT, is_marked=True)
    assert reader.compare(number)
