"""Live lines: what damages one is found, and loses nothing that somebody wrote."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.fs_tree import FILE, Tree, names
from kit.pools import MemoryMedium, content
from pmemfs.media import log as media
from pmemfs.media.filesystem import HEAD, HEAD_FRAME
from pmemfs.media.inode import EPOCH_MASK, ROOT
from pmemfs.media.live import LIVE_LINE, key_of, line_key, raised, size_check, size_word
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.repair import repair_filesystem

SIZES = st.integers(0, (1 << 47) - 1) | st.integers(0, 47).map(lambda bit: (1 << bit) - 1)
NUMBERS = st.integers(1, (1 << 64) - 1)
EPOCHS = st.integers(0, EPOCH_MASK)
FLIPS = st.sets(st.integers(0, 63), min_size=1, max_size=9).filter(lambda bits: len(bits) % 2)


@given(SIZES, NUMBERS, NUMBERS, EPOCHS, FLIPS)
def test_an_odd_number_of_flipped_bits_is_always_found(
    size: int, number: int, generation: int, epoch: int, flips: set[int]
) -> None:
    keys = [line_key(number, generation, e & EPOCH_MASK) for e in (epoch, epoch - 1)]
    word = size_word(size, keys[0])
    assert (word >> 16, key_of(word)) == (size, keys[0])
    for bit in flips:
        word ^= 1 << bit
    assert key_of(word) not in keys


@pytest.mark.parametrize("which", [(1, 1), (123456, 7), ((1 << 64) - 1, (1 << 64) - 1)])
def test_a_truncation_always_changes_the_key(which: tuple[int, int]) -> None:
    keys = [line_key(*which, epoch) for epoch in (*range(EPOCH_MASK + 1), 0)]
    assert all(first != second for first, second in pairwise(keys))
    assert all(key.bit_count() % 2 == 0 and key <= 0xFFFF for key in keys)


@given(SIZES, SIZES, st.integers(0, (1 << 64) - 1))
def test_raising_a_size_keeps_the_key_whatever_it_is(first: int, second: int, word: int) -> None:
    assert key_of(raised(word, first)) == key_of(word)
    assert raised(raised(word, first), second) == raised(word, second)
    assert size_check(first) <= 0xFFFF
    assert size_check(first).bit_count() % 2 == first.bit_count() % 2


# In a file system

DATA = b"data of somebody" * 10_000  # 160,000 bytes
Make = Callable[[FileSystem, int], None]


def closed(fs: FileSystem, number: int) -> None:
    fs.write(number, 0, DATA)
    fs.trim_ahead(number)


def empty(fs: FileSystem, number: int) -> None:
    return


def kept_ahead(fs: FileSystem, number: int) -> None:
    fs.write(number, 0, DATA)
    fs.trim_ahead(number)
    fs.allocate(number, 0, 300_000, keep_size=True)


def truncated(fs: FileSystem, number: int) -> None:
    for size_bytes in (200_000, 170_000, 0):
        fs.write(number, 0, DATA + DATA)
        fs.set_attributes(number, size_bytes=size_bytes)
    fs.write(number, 0, DATA)
    fs.trim_ahead(number)


def sparse(fs: FileSystem, number: int) -> None:
    fs.set_attributes(number, size_bytes=1 << 30)
    fs.write(number, 0, DATA)
    fs.trim_ahead(number)


def still_open(fs: FileSystem, number: int) -> None:
    """In pieces, so that more was mapped ahead than is written."""
    fs.hold(number)
    for start in range(0, len(DATA), 1000):
        fs.write(number, start, DATA[start : start + 1000])


KINDS: list[Make] = [closed, empty, kept_ahead, truncated, sparse, still_open]


class Damaged:
    """A pool with a file of some kind, whose live line can be changed."""

    def __init__(self, make: Make, *, is_clean: bool) -> None:
        self.tree = Tree()
        fs = self.tree.mount()
        self.number = fs.make(ROOT, b"victim", FILE)
        make(fs, self.number)
        self.size = fs.attributes(self.number).size_bytes
        self.content = bytes(fs.read(self.number, 0, 200_000))
        self.line = fs.live_line(self.number)
        self.frames = list(fs.extents(self.number))
        if is_clean:
            fs.end()
            self.frames = list(self.tree.mount().extents(self.number))
        self.image = content(self.tree.medium)

    def flip(self, *bits: int) -> None:
        """Start anew with these bits of the line flipped."""
        raw = bytearray(self.image)
        for bit in bits:
            raw[self.line + bit // 8] ^= 1 << bit % 8
        self.tree.pool = Pool.open(MemoryMedium(bytes(raw)))
        self.tree.medium = self.tree.pool.medium

    def repair(self, *, force: bool) -> list[str]:
        said: list[str] = []
        verdict = check_filesystem(self.tree.pool)
        repair_filesystem(
            self.tree.pool, verdict, lambda problem, failure: said.append(failure), force=force
        )
        return [failure for failure in said if failure]

    def free_frames(self) -> int:
        return FileSystem(self.tree.pool, NoMemmap()).room().free_frames


def assert_found(damaged: Damaged) -> None:
    """Nobody is told another size: EIO, nothing is written any more, and check says which file."""
    tree = damaged.tree
    fs = tree.mount()
    with pytest.raises(OSError, match=f"inode {damaged.number}: its live line") as raised:
        fs.attributes(damaged.number)
    assert raised.value.errno == errno.EIO
    assert fs.read_only
    assert str(damaged.number) in fs.damage
    [error] = tree.errors()
    assert error.startswith("/victim: its live line is damaged")


def assert_repairable(damaged: Damaged) -> None:
    """Without force nothing of it is freed; with force its size covers all that it has."""
    tree = damaged.tree
    free_frames = damaged.free_frames()
    [failure] = damaged.repair(force=False)
    assert failure.startswith("only with --force: its size becomes ")
    assert_found(damaged)
    assert damaged.free_frames() == free_frames
    assert damaged.repair(force=True) == []
    assert tree.check().problems == []
    fs = tree.mount()
    assert fs.attributes(damaged.number).size_bytes >= len(damaged.content.rstrip(b"\0"))
    assert bytes(fs.read(damaged.number, 0, len(DATA))) == damaged.content[: len(DATA)]
    assert list(fs.extents(damaged.number)) == damaged.frames


@pytest.mark.parametrize("is_clean", [True, False], ids=["unmounted", "killed"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_flipped_bit_of_a_live_line_is_found_and_frees_nothing(
    make: Make, is_clean: bool
) -> None:
    damaged = Damaged(make, is_clean=is_clean)
    damaged.flip()
    assert damaged.tree.errors() == []
    assert [damaged.tree.leaks() == [], make is still_open and not is_clean].count(True) == 1
    for bit in range(64):
        damaged.flip(bit)
        assert_found(damaged)
        if bit % 7 == 0:
            assert_repairable(damaged)


@pytest.mark.parametrize("is_clean", [True, False], ids=["unmounted", "killed"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_rest_of_a_live_line_has_no_say_in_the_size(make: Make, is_clean: bool) -> None:
    damaged = Damaged(make, is_clean=is_clean)
    for bit in range(64, 8 * LIVE_LINE.size_bytes, 3):
        damaged.flip(bit)
        assert damaged.tree.errors() == []
        fs = damaged.tree.mount()
        assert fs.attributes(damaged.number).size_bytes == damaged.size
        assert bytes(fs.read(damaged.number, 0, 200_000)) == damaged.content


@pytest.mark.parametrize("bits", [(0, 1), (0, 63), (16, 17), (20, 40), (3, 33), (62, 63)])
def test_two_flipped_bits_are_found_too(bits: tuple[int, int]) -> None:
    damaged = Damaged(truncated, is_clean=True)
    damaged.flip(*bits)
    assert_found(damaged)


@pytest.mark.parametrize("is_same_file", [True, False])
def test_a_live_line_of_another_file_or_time_is_damage(is_same_file: bool) -> None:
    damaged = Damaged(closed, is_clean=True)
    damaged.flip()
    fs = damaged.tree.mount()
    source = fs.live_line(damaged.number if is_same_file else damaged.tree.other)
    word = bytes(fs.medium.read(source, 8))
    for size_bytes in (100, 200, 300):
        fs.set_attributes(damaged.number, size_bytes=size_bytes)
    fs.medium.store(damaged.line, word)
    assert_found(damaged)


def test_a_line_that_is_damaged_under_a_mount_is_found_too() -> None:
    damaged = Damaged(closed, is_clean=True)
    damaged.flip()
    fs = damaged.tree.mount()
    number = damaged.number
    assert fs.attributes(number).size_bytes == len(DATA)
    fs.make(ROOT, b"written to", FILE)
    byte = fs.medium.read(damaged.line + 3, 1)[0]
    fs.medium.store(damaged.line + 3, bytes([byte ^ 8]))
    operations: list[Callable[[], object]] = [
        lambda: fs.read(number, 0, 10),
        lambda: fs.attributes(number),
        lambda: fs.write(number, 0, b"x"),
        lambda: fs.set_attributes(number, mode=0o600),
        lambda: fs.link(number, ROOT, b"more"),
    ]
    for operation in operations:
        with pytest.raises(OSError, match=r"live line|read-only|Read-only") as raised:
            operation()
        assert raised.value.errno in (errno.EIO, errno.EROFS)
    assert fs.read_only
    fs.tidy()
    fs.end()
    head = bytes(fs.medium.read(fs.geometry.offset_of(HEAD_FRAME), HEAD.size_bytes))
    assert not HEAD.unpack(head).is_clean


def test_frames_behind_a_size_in_a_clean_file_system_are_an_error() -> None:
    tree = Tree()
    with tree.changed() as changes:
        [run] = changes.fs.allocator.allocate(3)
        changes.append(tree.other, media.pack_extent(5, *run))
        changes.fs.end()
    [error] = tree.errors()
    assert error == "/home/deep/other: 3 frames are behind its size without a reason"
    free_frames = tree.mount().room().free_frames
    damaged = Damaged.__new__(Damaged)
    damaged.tree = tree
    [failure] = damaged.repair(force=False)
    assert failure.startswith(f"only with --force: its size becomes {8 * FRAME_BYTES} bytes")
    assert tree.mount().room().free_frames == free_frames
    tree.repair(force=True)
    fs = tree.mount()
    assert fs.attributes(tree.other).size_bytes == 8 * FRAME_BYTES
    assert fs.room().free_frames == free_frames


def test_what_a_killed_mount_has_mapped_ahead_is_a_leak_and_freed() -> None:
    damaged = Damaged(still_open, is_clean=False)
    damaged.flip()
    tree = damaged.tree
    assert tree.errors() == []
    [leak] = tree.leaks()
    assert "behind the sizes of 1 files" in leak
    tree.repair()
    fs = tree.mount()
    assert fs.attributes(damaged.number).size_bytes == len(DATA)
    assert bytes(fs.read(damaged.number, 0, 200_000)) == damaged.content


def test_what_a_crash_left_mapped_ahead_of_a_file_that_is_only_looked_at_goes_at_the_end() -> None:
    damaged = Damaged(still_open, is_clean=False)
    damaged.flip()
    tree = damaged.tree
    fs = tree.mount()
    fs.hold(damaged.number)
    while fs.tidy():
        pass
    assert not fs.store.ground.may_have_leaks
    fs.end()
    assert tree.check().problems == []
    assert not tree.mount().store.ground.may_have_leaks


def test_the_end_gives_back_what_is_mapped_ahead_of_files_that_are_open() -> None:
    damaged = Damaged(still_open, is_clean=True)
    damaged.flip()
    assert damaged.tree.check().problems == []
    [extent] = damaged.frames
    assert extent.frame_count == -(-len(DATA) // FRAME_BYTES)
    assert not damaged.tree.mount().store.ground.may_have_leaks


def test_an_end_that_cannot_give_back_what_is_mapped_ahead_is_not_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = Tree()
    fs = tree.mount()
    number = fs.make(ROOT, b"victim", FILE)
    still_open(fs, number)

    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(fs.frames, "trim_ahead", fail)
    fs.end()
    assert tree.mount().store.ground.may_have_leaks
    assert tree.errors() == []


def test_a_size_of_before_a_truncation_that_a_crash_has_interrupted_does_not_count() -> None:
    damaged = Damaged(closed, is_clean=False)
    damaged.flip()
    fs = damaged.tree.mount()
    word = bytes(fs.medium.read(damaged.line, 8))
    fs.set_attributes(damaged.number, size_bytes=1234)
    fs.medium.store(damaged.line, word)
    assert damaged.tree.errors() == []
    fs = damaged.tree.mount()
    assert fs.attributes(damaged.number).size_bytes == 1234
    assert bytes(fs.medium.read(damaged.line, 8)) != word


def test_without_force_nothing_is_freed_that_an_unreadable_file_may_have_had() -> None:
    tree = Tree()
    with tree.changed() as changes:
        changes.damage(tree.file)
        changes.state(tree.other, link_count=7)
    free_frames = tree.mount().room().free_frames
    damaged = Damaged.__new__(Damaged)
    damaged.tree = tree
    failures = damaged.repair(force=False)
    assert len(failures) == 2
    assert failures[0] == "only with --force: it is removed, and what it had is lost"
    assert failures[1] == "only with --force: they are freed"
    assert tree.mount().room().free_frames == free_frames
    assert not any("says 7" in error for error in tree.errors())
    tree.repair(force=True)
    assert "same" not in names(tree.mount(), ROOT)
    assert tree.mount().room().free_frames > free_frames
