"""The tables that the planes share: publication, grace periods, and the arena they lie in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data_plane import READ, Tables, extent, read_in, some_tables
from pmemfs.dataplane import layouts
from pmemfs.dataplane.arena import Arena
from pmemfs.dataplane.native import load_word, store_word
from pmemfs.pfn import FRAME_BYTES

INODE = 7
ENTRIES = layouts.INODE_ENTRIES
CYCLES = 100_000
READS = 1000
SWAPS = int(os.environ.get("PMEMFS_TABLE_SWAPS", "1000000"))


@pytest.fixture
def tables(shm: Path) -> Iterator[Tables]:
    with some_tables(shm) as made:
        yield made


def fill(tables: Tables, pfn: int, byte: bytes) -> None:
    tables.pool.medium.store(pfn * FRAME_BYTES, byte * FRAME_BYTES)


def read(tables: Tables, inode: int, offset: int, size: int) -> tuple[str, int, bytes]:
    return tables.worker().answer(read_in(offset, size), opcode=READ, inode=inode)


def test_what_is_published_is_served_and_what_is_not_is_forwarded(tables: Tables) -> None:
    first = int(tables.pool.first_data_pfn)
    fill(tables, first, b"a")
    assert read(tables, INODE, 0, 10)[0] == "forward"
    tables.shared.publish(INODE, 3 * FRAME_BYTES, [extent(1, first, 1)])
    assert read(tables, INODE, 0, 3 * FRAME_BYTES) == (
        "answer", 0, bytes(FRAME_BYTES) + b"a" * FRAME_BYTES + bytes(FRAME_BYTES)
    )  # fmt: skip
    assert read(tables, INODE, 2 * FRAME_BYTES - 1, 2) == ("answer", 0, b"a\0")
    assert read(tables, INODE, 3 * FRAME_BYTES - 1, 20) == ("answer", 0, b"\0")
    assert read(tables, INODE + 1, 0, 10)[0] == "forward"
    tables.shared.withdraw(INODE)
    assert read(tables, INODE, 0, 10)[0] == "forward"


def test_extents_are_found_wherever_they_lie(tables: Tables) -> None:
    first = int(tables.pool.first_data_pfn)
    extents, expected = [], bytearray(4000 * FRAME_BYTES)
    for number in range(1000):
        fill(tables, first + number * 2, bytes([number % 250 + 1]))
    for number, index in enumerate(range(1, 3000, 3)):
        pfn = first + number * 2
        extents.append(extent(index, pfn, 1))
        expected[index * FRAME_BYTES : (index + 1) * FRAME_BYTES] = bytes(
            tables.pool.medium.read(pfn * FRAME_BYTES, FRAME_BYTES)
        )
    tables.shared.publish(INODE, len(expected), extents)
    for offset in (0, 1, 4095, 4096, 5000 * 2, 1_234_567, 8_999_999, len(expected) - 5):
        assert read(tables, INODE, offset, 100_000)[2] == expected[offset : offset + 100_000]


def share_a_bucket(one: int, other: int) -> bool:
    return bool(set(layouts.buckets_of(one)) & set(layouts.buckets_of(other)))


def test_inodes_that_share_a_place_and_inodes_that_come_and_go_are_told_apart(
    tables: Tables,
) -> None:
    first = int(tables.pool.first_data_pfn)
    step = next(n for n in range(1, 1 << 20) if share_a_bucket(INODE, INODE + n))
    for number in range(4):
        fill(tables, first + number, bytes([65 + number]))
        tables.shared.publish(INODE + number * step, FRAME_BYTES, [extent(0, first + number, 1)])
    tables.shared.withdraw(INODE + step)
    assert read(tables, INODE + step, 0, 1)[0] == "forward"
    assert read(tables, INODE + 3 * step, 0, 1)[2] == b"D"
    tables.shared.publish(INODE + 9 * step, FRAME_BYTES, [extent(0, first, 1)])
    assert read(tables, INODE + 9 * step, 0, 1)[2] == b"A"
    assert read(tables, INODE + 2 * step, 0, 1)[2] == b"C"
    assert read(tables, INODE + step, 0, 1)[0] == "forward"


def publish_all_that_go_in(tables: Tables) -> int:
    """Publish inodes from 1 on; the first that is refused."""
    for inode in range(1, layouts.INODE_ENTRIES + 1):
        try:
            tables.shared.publish(inode, 1, [])
        except OSError:
            return inode
    return layouts.INODE_ENTRIES + 1


def test_more_open_files_than_there_are_entries_are_refused_until_some_are_closed(
    tables: Tables,
) -> None:
    inode = publish_all_that_go_in(tables)
    assert inode > layouts.INODE_ENTRIES // 2
    with pytest.raises(OSError, match="too many") as caught:
        tables.shared.publish(inode, 1, [])
    assert caught.value.errno == errno.ENOSPC
    worker = tables.worker()
    assert all(
        worker.answer(read_in(0, 5), opcode=READ, inode=other) == ("answer", 0, b"\0")
        for other in range(1, inode)
    )
    assert worker.answer(read_in(0, 5), opcode=READ, inode=inode)[0] == "forward"
    rivals = tables.shared.rivals(inode)
    assert len(set(rivals)) == 2 * layouts.INODE_WAYS
    assert all(tables.shared.is_published(rival) for rival in rivals)
    tables.shared.withdraw(rivals[3])
    assert rivals[3] not in tables.shared.rivals(inode)
    tables.shared.publish(inode, FRAME_BYTES, [])
    assert read(tables, inode, 0, 3) == ("answer", 0, bytes(3))
    assert read(tables, rivals[3], 0, 3)[0] == "forward"


def test_an_inode_of_any_number_is_found_where_it_was_put(tables: Tables) -> None:
    worker = tables.worker()

    @given(st.integers(1, (1 << 64) - 1))
    def find(inode: int) -> None:
        tables.shared.publish(inode, 3, [])
        assert worker.answer(read_in(0, 9), opcode=READ, inode=inode) == ("answer", 0, bytes(3))
        tables.shared.withdraw(inode)
        assert worker.answer(read_in(0, 9), opcode=READ, inode=inode)[0] == "forward"

    find()


def test_no_request_finds_an_entry_that_is_free(tables: Tables) -> None:
    with pytest.raises(ValueError, match="inode 0"):
        tables.shared.publish(0, 1, [])
    tables.shared.publish(INODE, 1, [])
    # An entry between its two words, as a worker may meet it.
    store_word(tables.shared.memory, tables.shared._entries[INODE], 0)
    for inode in (0, INODE):
        assert read(tables, inode, 0, 1)[0] == "forward"


def test_files_that_come_and_go_a_hundred_thousand_times_leave_nothing_behind(
    tables: Tables,
) -> None:
    first = int(tables.pool.first_data_pfn)
    fill(tables, first, b"a")
    worker = tables.worker()
    part = [extent(0, first, 1)]
    for cycle in range(CYCLES):
        inode = (cycle * 0x1_0003 << 3) + 11
        tables.shared.publish(inode, FRAME_BYTES, part)
        if cycle % 100 == 0:
            assert worker.answer(read_in(0, 1), opcode=READ, inode=inode)[2] == b"a"
            tables.shared.withdraw(inode)
            assert worker.answer(read_in(0, 1), opcode=READ, inode=inode)[0] == "forward"
        else:
            tables.shared.withdraw(inode)
    start = tables.shared.areas.inodes
    size = layouts.INODE_ENTRY.size_bytes
    words = [load_word(tables.shared.memory, start + n * size) for n in range(ENTRIES)]
    assert words == [0] * ENTRIES
    assert tables.shared._arena.take(layouts.EXTENT_ARENA_BYTES) == tables.shared.areas.tables


def test_an_entry_goes_to_another_inode_only_after_its_grace_period(tables: Tables) -> None:
    tables.shared.publish(INODE, 1, [])
    entry = tables.shared._entries[INODE]
    set_section(tables, 1, 1)
    grace = tables.shared.withdraw(INODE)
    twins = twins_of(INODE, 2 * layouts.INODE_WAYS)
    for twin in twins[:-1]:
        tables.shared.publish(twin, 1, [])
    with pytest.raises(OSError, match="too many"):
        tables.shared.publish(twins[-1], 1, [])
    assert sorted(tables.shared.rivals(twins[-1])) == sorted(twins[:-1])
    set_section(tables, 1, 2)
    assert tables.shared.is_over(grace)
    tables.shared.publish(twins[-1], 1, [])
    assert tables.shared._entries[twins[-1]] == entry
    assert read(tables, twins[-1], 0, 9) == ("answer", 0, b"\0")
    assert read(tables, INODE, 0, 9)[0] == "forward"


def twins_of(inode: int, count: int) -> list[int]:
    """Inodes that may have their entries in the same two buckets as another."""
    word = 1 << 64
    inverse = pow(layouts.INODE_HASH, -1, word)
    shift = 64 - 2 * layouts.INODE_BUCKETS_SHIFT
    mixed = (inode * layouts.INODE_HASH % word) >> shift << shift
    twins = [(mixed + n) * inverse % word for n in range(count + 1)]
    return [twin for twin in twins if twin != inode][:count]


def test_a_table_that_does_not_fit_is_refused_and_the_old_one_stays(tables: Tables) -> None:
    first = int(tables.pool.first_data_pfn)
    fill(tables, first, b"a")
    tables.shared.publish(INODE, FRAME_BYTES, [extent(0, first, 1)])
    taken = dict(tables.shared._arena._orders)
    too_many = layouts.EXTENT_ARENA_BYTES // layouts.EXTENT.size_bytes
    with pytest.raises(OSError, match="full"):
        tables.shared.publish(INODE, FRAME_BYTES, [extent(0, first, 1)] * too_many)
    assert tables.shared._arena._orders == taken
    assert read(tables, INODE, 0, 1)[2] == b"a"


def set_section(tables: Tables, worker: int, value: int) -> None:
    at = tables.shared.areas.slots + worker * layouts.SLOT_BYTES
    store_word(tables.shared.memory, at + layouts.SLOT_HEAD.offset_of("section"), value)


def test_a_grace_period_lasts_until_all_who_may_look_at_the_old_table_have_ended(
    tables: Tables,
) -> None:
    set_section(tables, 1, 5)
    grace = tables.shared.publish(INODE, 0, [])
    assert grace.sections == ((1, 5),)
    set_section(tables, 0, 7)
    assert not tables.shared.is_over(grace)
    # It may have begun another since: that one sees the new table.
    set_section(tables, 1, 7)
    assert tables.shared.is_over(grace)


def test_the_memory_of_a_table_is_used_again_only_after_its_grace_period(tables: Tables) -> None:
    def table(inode: int = INODE) -> int:
        entry = tables.shared._entries[inode]
        return load_word(tables.shared.memory, entry + layouts.INODE_ENTRY.offset_of("table"))

    tables.shared.publish(INODE, 0, [])
    first = table()
    set_section(tables, 0, 1)
    for _ in range(3):
        tables.shared.publish(INODE, 0, [])
        assert table() != first
    set_section(tables, 0, 2)
    tables.shared.publish(INODE, 0, [])
    used = []
    for inode in range(INODE + 1, INODE + 9):
        tables.shared.publish(inode, 0, [])
        used.append(table(inode))
    assert first in used
    assert len(set(used)) == 8


@given(st.lists(st.integers(1, 5000) | st.integers(-50, -1), max_size=200))
def test_what_an_arena_gives_out_never_overlaps_and_comes_back_whole(steps: list[int]) -> None:
    arena = Arena(4096, 64 * 1024)
    taken: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            try:
                start = arena.take(step)
            except OSError:
                continue
            assert start % 64 == 0
            assert start >= 4096
            assert start + step <= 4096 + 64 * 1024
            assert all(start + step <= other or other + size <= start for other, size in taken)
            taken.append((start, step))
        elif taken:
            arena.give_back(taken.pop(-step % len(taken))[0])
    for start, _ in taken:
        arena.give_back(start)
    assert arena.take(64 * 1024) == 4096


def test_an_arena_full_of_small_tables_has_room_for_large_ones_once_they_are_gone() -> None:
    arena = Arena(4096, layouts.EXTENT_ARENA_BYTES)
    lines = layouts.EXTENT_ARENA_BYTES // 64
    taken = [arena.take(64) for _ in range(lines)]
    assert len(set(taken)) == lines
    with pytest.raises(OSError, match="full"):
        arena.take(1)
    for start in taken[::2]:
        arena.give_back(start)
    with pytest.raises(OSError, match="full"):
        arena.take(65)
    for start in taken[1::2]:
        arena.give_back(start)
    assert arena.take(layouts.EXTENT_ARENA_BYTES) == 4096


@pytest.mark.slow
def test_a_million_swaps_under_reading_workers_tear_no_read(tables: Tables) -> None:
    """Each table names frames of one letter only; after its grace period they get another."""
    first = int(tables.pool.first_data_pfn)
    frames = 4
    sets = [[extent(n, first + which * 64 + n * 3, 1) for n in range(frames)] for which in range(3)]
    letters = [b"a", b"b", b"c"]
    for which, extents in enumerate(sets):
        for part in extents:
            fill(tables, part.pfn, letters[which])
    tables.shared.publish(INODE, frames * FRAME_BYTES, sets[0])
    length = (frames - 1) * FRAME_BYTES

    fork = get_context("fork")
    reads = fork.Value("Q", 0, lock=False)

    def hammer(number: int) -> None:
        """A process of its own, as the data plane is; its exit says what it found."""
        worker = tables.worker(number)
        request = read_in(FRAME_BYTES // 2, length)
        while not tables.shared.header_word("ends"):
            data = worker.answer(request, opcode=READ, inode=INODE)[2]
            reads.value += 1
            if data != data[:1] * length:
                os._exit(2)
        os._exit(0)

    # Forked, for the descriptors: the reader maps the same memory.
    reader = fork.Process(target=hammer, args=(1,))
    reader.start()
    try:
        for swap in count():
            # On a busy machine it may take long until the reader gets a processor.
            if swap >= SWAPS and (reads.value > READS or not reader.is_alive()):
                break
            grace = tables.shared.publish(INODE, frames * FRAME_BYTES, sets[(swap + 1) % 3])
            # Some of the old frames are reused at once when nobody can see them any more.
            if swap % 64 == 0:
                while not tables.shared.is_over(grace):
                    pass
                old = sets[swap % 3]
                letter = bytes([97 + swap // 64 % 26])
                for part in old:
                    fill(tables, part.pfn, letter)
    finally:
        tables.shared.set_header_word("ends", 1)
        reader.join()
    assert reader.exitcode == 0
