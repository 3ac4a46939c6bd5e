"""What workers know of inodes and names is what Python reads in the pool."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import pytest

from kit.known_names import Life, NamesReader, is_rare, names_reader
from kit.large_directories import add_names, remove_names
from pmemfs.dataplane.native import checksum
from pmemfs.media.inode import LIVE_OFFSET, ROOT, SLOT_BYTES, TAIL_WORD_AT
from pmemfs.media.log import seal
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.base import NewInode

FILE = NewInode(0o100644, 1, 2)
DIRECTORY = NewInode(0o40755, 0, 0)
FRAMES_AT_ONCE = 64
RECORDS_A_FRAME = 63


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[NamesReader]:
    with names_reader(tmp_path) as reader:
        yield reader


def large_directory(reader: NamesReader, count: int) -> tuple[int, int]:
    """A directory of so many names, `n0` and so on, and the file that they lead to."""
    fs = reader.files.fs
    directory, file = fs.make(ROOT, b"large", DIRECTORY), fs.make(ROOT, b"file", FILE)
    add_names(fs, directory, file, range(count))
    return directory, file


def scribble(reader: NamesReader, offset: int) -> None:
    """Flip a bit in the pool."""
    medium = reader.files.medium
    medium.store(offset, bytes([medium.read(offset, 1)[0] ^ 1]))


# Equal to what Python reads


@pytest.mark.parametrize("seed", range(6))
def test_after_each_operation_a_worker_knows_what_python_reads(
    reader: NamesReader, seed: int
) -> None:
    life, rare, known = Life(reader.files.fs, seed), set(), 0
    for count in range(500):
        changed = life.step()
        looked_at = {*changed, life.rng.choice(life.numbers)}
        for number in looked_at if count % 50 else life.numbers:
            is_known = reader.compare(number)
            inode = reader.stored(number)
            # What is rare stays in the log until it is written anew.
            rare |= {number} if inode is None or is_rare(inode) else set()
            assert is_known or number in rare
            known += is_known
    assert known > 1000


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_looks_seldom_knows_the_same(reader: NamesReader, seed: int) -> None:
    life = Life(reader.files.fs, 100 + seed)
    for _ in range(30):
        for _ in range(life.rng.randint(1, 60)):
            life.step()
        for number in life.rng.sample(life.numbers, len(life.numbers) // 2):
            reader.compare(number)
    assert sum(map(reader.compare, life.numbers)) > len(life.numbers) // 3


def test_a_worker_with_little_memory_knows_the_same(tmp_path: Path) -> None:
    with names_reader(tmp_path, memory_bytes=16 << 10) as reader:
        life, known = Life(reader.files.fs, 7), 0
        for count in range(1000):
            changed = life.step()
            for number in changed if count % 100 else life.numbers:
                known += reader.compare(number)
                assert reader.word("used_bytes") <= 16 << 10
        assert known > 1000


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64, 1000])
def test_checksums_are_the_same_with_and_without_the_instruction(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert checksum(data) == checksum(data, by_table=True) == google_crc32c.value(data)


# Up to date


def test_what_is_known_is_not_read_again(reader: NamesReader) -> None:
    fs = reader.files.fs
    directory, file = large_directory(reader, 200)
    known = reader.known(directory)
    assert known is not None
    # Damage in what was read already.
    scribble(reader, fs.inode(directory).log.head + 20)
    add_names(fs, directory, file, [1000])
    later = reader.known(directory)
    assert later is not None
    assert later.entry_count == known.entry_count + 1
    assert reader.found(directory, [b"n1000"]) == {b"n1000": (file, 8)}
    reader.raise_version(directory)
    assert reader.known(directory) is None


def test_another_version_of_a_log_is_read_anew_though_it_looks_the_same(
    reader: NamesReader,
) -> None:
    fs = reader.files.fs
    number = fs.make(ROOT, b"file", FILE)
    before = reader.known(number)
    assert before is not None
    inode = fs.inode(number)
    inode.state.uid = 77
    with fs.store.change() as change:
        change.append(inode, inode.state.pack())
    # As if the log had been written anew with as many records as before, at the same place.
    medium, at = reader.files.medium, inode.log.head
    medium.store(at, seal([inode.state.pack()], number, inode.generation, at))
    medium.store(inode.slot_offset + TAIL_WORD_AT, before.tail.to_bytes(8, "little"))
    reader.raise_version(number)
    after = reader.known(number)
    assert after is not None
    assert after.tail == before.tail
    assert after.state[2] == 77


def test_an_inode_that_took_the_slot_of_another_is_another(reader: NamesReader) -> None:
    fs = reader.files.fs
    number = fs.make(ROOT, b"first", FILE)
    assert reader.compare(number)
    fs.unlink(ROOT, b"first")
    assert reader.known(number) is None
    made = [fs.make(ROOT, b"n%d" % at, DIRECTORY) for at in range(16)]
    assert number in made
    assert all(map(reader.compare, made))


def test_a_damaged_live_line_makes_a_known_file_unknown(reader: NamesReader) -> None:
    fs = reader.files.fs
    number = fs.make(ROOT, b"file", FILE)
    assert reader.compare(number)
    scribble(reader, number * SLOT_BYTES + LIVE_OFFSET)
    assert reader.known(number) is None
    scribble(reader, number * SLOT_BYTES + LIVE_OFFSET)
    assert reader.compare(number)


# Names


def test_an_entry_whose_record_is_damaged_by_now_is_not_found(reader: NamesReader) -> None:
    directory, file = large_directory(reader, 100)
    [at] = [found[2] for found in reader.worker.found(directory, [b"n50"]) or []]
    scribble(reader, at + 8)
    assert reader.found(directory, [b"n50", b"n51"]) == {b"n50": -1, b"n51": (file, 8)}


def test_the_index_follows_names_that_come_and_go(reader: NamesReader) -> None:
    directory, _ = large_directory(reader, 3000)
    rng = random.Random(5)
    entries = {b"n%d" % at: None for at in range(3000)}
    offsets = dict(zip(entries, reader.worker.found(directory, list(entries)), strict=True))
    there = set(entries)
    for _ in range(20_000):
        name = rng.choice(list(entries)) if rng.random() < 0.01 else b"n%d" % rng.randrange(3000)
        if name in there:
            assert reader.worker.change_index(directory, name)
            there.discard(name)
        else:
            assert reader.worker.change_index(directory, name, offsets[name][2], 8)
            there.add(name)
    found = reader.worker.found(directory, list(entries))
    assert found is not None
    for name, answer in zip(entries, found, strict=True):
        assert answer == (offsets[name] if name in there else None)
    known = reader.known(directory)
    assert known is not None
    assert known.entry_count == len(there)


# Large directories


def test_a_large_directory_is_read_in_pieces_while_it_changes(reader: NamesReader) -> None:
    fs = reader.files.fs
    directory, file = large_directory(reader, 5 * FRAMES_AT_ONCE * RECORDS_A_FRAME)
    pieces = 0
    while (known := reader.known(directory, pieces=1)) is None:
        pieces += 1
        remove_names(fs, directory, [pieces])
        add_names(fs, directory, file, range(10**6 + 100 * pieces, 10**6 + 100 * pieces + 100))
        assert pieces < 10
    assert pieces == 5
    assert known.entry_count == len(fs.inode(directory).entries)
    assert reader.compare(directory)


def test_a_large_directory_that_is_written_anew_between_pieces_is_read_anew(
    reader: NamesReader,
) -> None:
    fs = reader.files.fs
    directory, _ = large_directory(reader, 3 * FRAMES_AT_ONCE * RECORDS_A_FRAME)
    assert reader.known(directory, pieces=2) is None
    remove_names(fs, directory, range(1, 10_000))
    with fs.store.change() as change:
        change.compact(fs.inode(directory))
    assert reader.compare(directory)


def test_a_directory_that_would_take_too_much_memory_is_handed_over(tmp_path: Path) -> None:
    with names_reader(tmp_path, memory_bytes=256 << 10) as reader:
        fs = reader.files.fs
        directory, file = large_directory(reader, 6000)
        assert reader.compare(directory)
        used_bytes = reader.word("used_bytes")
        # 8192 words of 8 bytes are a quarter, and three quarters of them are full.
        add_names(fs, directory, file, range(6000, 6200))
        assert reader.known(directory) is None
        assert reader.word("used_bytes") == used_bytes - (8192 * 8)
        assert reader.compare(file)
        # It may have become smaller when its log is written anew.
        remove_names(fs, directory, range(5000))
        assert reader.known(directory) is None
        with fs.store.change() as change:
            change.compact(fs.inode(directory))
        assert reader.compare(directory)


# Memory


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    with names_reader(tmp_path, memory_bytes=64 << 10) as reader:
        fs = reader.files.fs
        numbers = [fs.make(ROOT, b"n%d" % at, FILE) for at in range(600)]
        often, others = numbers[:20], numbers[20:]
        assert all(map(reader.compare, often))
        # What is read again would be found to be damaged.
        for number in often:
            scribble(reader, fs.inode(number).log.head + 20)
        for turn, number in enumerate(others):
            assert reader.compare(number)
            assert reader.known(often[turn % 20]) is not None
            assert reader.word("used_bytes") <= 64 << 10
        known = reader.word("known_inodes")
        assert 100 < known < 200
        for number in others[-known:]:
            reader.known(number)
        assert [reader.known(number) for number in often] == [None] * 20


def test_without_memory_everything_is_handed_over(tmp_path: Path) -> None:
    with names_reader(tmp_path, memory_bytes=0) as reader:
        assert reader.known(ROOT) is None
        reader.set_word("memory_bytes", 1 << 20)
        assert reader.compare(ROOT)
        reader.set_word("memory_bytes", 0)
        number = reader.files.fs.make(ROOT, b"file", FILE)
        assert reader.known(number) is None


# Bad memory


def test_memory_that_faults_costs_only_the_operation(reader: NamesReader) -> None:
    fs, medium = reader.files.fs, reader.files.medium
    directory, _ = large_directory(reader, 3 * FRAMES_AT_ONCE * RECORDS_A_FRAME)
    file = fs.make(directory, b"one", FILE)
    frames = fs.inode(directory).log.frames
    middle = sorted(frames)[len(frames) // 2]
    assert middle > fs.inode(directory).slot_offset
    expected = {n: tuple(entry) for n, entry in fs.inode(directory).entries.items()}
    rest = bytes(medium.read(middle, medium.size_bytes - middle))
    os.ftruncate(medium.fileno(), middle)
    for _ in range(3):
        assert reader.known(directory) is None
    assert reader.known(ROOT) is not None
    os.ftruncate(medium.fileno(), medium.size_bytes)
    os.pwrite(medium.fileno(), rest, middle)
    known = reader.known(directory)
    assert known is not None
    assert reader.found(directory, expected) == expected
    os.ftruncate(medium.fileno(), middle)
    lost = {name for name, found in reader.found(directory, expected).items() if found == -1}
    assert len(lost) > len(expected) // 3
    os.ftruncate(medium.fileno(), medium.size_bytes)
    os.pwrite(medium.fileno(), rest, middle)
    assert reader.compare(directory)
    assert reader.compare(file)


def test_a_slot_that_faults_costs_only_the_operation(reader: NamesReader) -> None:
    medium = reader.files.medium
    numbers = [reader.files.fs.make(ROOT, b"n%d" % at, FILE) for at in range(30)]
    slot = max(numbers) * SLOT_BYTES >> PAGE_SHIFT << PAGE_SHIFT
    rest = bytes(medium.read(slot, medium.size_bytes - slot))
    assert all(map(reader.compare, numbers))
    os.ftruncate(medium.fileno(), slot)
    gone = [number for number in numbers if number * SLOT_BYTES >= slot]
    assert gone
    assert [reader.known(number) for number in gone] == [None] * len(gone)
    os.ftruncate(medium.fileno(), medium.size_bytes)
    os.pwrite(medium.fileno(), rest, slot)
    assert all(map(reader.compare, numbers))
