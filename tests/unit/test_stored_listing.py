"""A listing that is packed from what is stored says what the long way says, or nothing."""

from __future__ import annotations

import logging
import os
import random
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kit import hostile_pools
from kit.data_plane import SharedFiles, shared_files
from kit.fs_tree import Tree
from pmemfs.dataplane.listing import StoredInodes, hold_listed
from pmemfs.errors import DamagedFileSystem
from pmemfs.fuse import wire
from pmemfs.fuse.encode import CACHE_SECONDS, dirent, direntplus
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Request, WireDoor
from pmemfs.media import log as media
from pmemfs.media.filesystem import FIRST_INODES_FRAME
from pmemfs.media.inode import HEAD_WORD_AT, INLINE_OFFSET, LIVE_OFFSET, ROOT, SLOT_BYTES
from pmemfs.media.live import size_word
from pmemfs.media.log import InodeFlags
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.base import NewInode, StoredListing
from pmemfs.volume.fs.filesystem import FileSystem

ROOM = 64 * 1024
COUNT = 3000
HOSTILE_TRIES = 1500
CALLER = Caller(0, 0, 0)
TYPES = (
    stat.S_IFREG, stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO,
    stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK,
)  # fmt: skip


def listing_of(fs: FileSystem, directory: int) -> StoredListing:
    """As of a file system that shares its counts, whether this one does or not."""
    first_pfn, frame_count = fs.geometry
    zone = fs.store.ground.pool.medium.view(first_pfn << PAGE_SHIFT, frame_count << PAGE_SHIFT)
    counts = memoryview(bytearray(8 * 8 * (first_pfn + frame_count))).cast("Q")
    words = fs.inode(directory).entries.words
    fd = fs.store.medium.sparse_fd

    def hold(number: int) -> None:
        counts[number] += 1

    return StoredListing(words, zone, first_pfn, fd, counts, lambda: None, hold, lambda: False)


def packed_one(fs: FileSystem, directory: int, name: bytes, position: int = 2) -> bytes:
    """One entry as it is packed from what is stored; b"" if that is not simple."""
    stored = listing_of(fs, directory)
    answer = bytearray()
    names = [b"gone"] * (position - 2) + [name]
    inodes = StoredInodes(stored.memory, stored.first_pfn, stored.sparse_fd)
    after, is_full = inodes.pack(
        directory, stored.words, names, position, answer, ROOM, CACHE_SECONDS
    )
    assert not is_full
    assert after == position + bool(answer)
    return bytes(answer)


def long_way(fs: FileSystem, directory: int, name: bytes, position: int = 2) -> bytes:
    """The same, packed from objects. Raises OSError."""
    found = fs.listed(directory, name, follows=True)
    assert found is not None
    entry = dirent(found[1], position + 1, found[2], found[0])
    return direntplus(fs.attributes(found[1]), entry)


# Equality


@pytest.fixture
def files(shm: Path) -> Iterator[SharedFiles]:
    with shared_files(shm) as files:
        files.medium.reserve(0, files.medium.size_bytes)
        files.medium.reserved = True
        yield files


@pytest.fixture
def sparse(shm: Path) -> Iterator[SharedFiles]:
    with shared_files(shm) as files:
        assert not files.medium.reserved
        yield files


def make_some(fs: FileSystem, directory: int, rng: random.Random, count: int) -> None:
    """Inodes of all types, each with something done to it."""
    others: list[int] = []
    for number in range(count):
        kind = rng.choice(TYPES)
        target = (
            rng.randbytes(rng.randint(1, 200)).replace(b"\0", b"x") if kind == 0o120000 else b""
        )
        name = b"%d-" % number + b"n" * rng.choice((0, 1, 5, 30, 200))
        is_device = stat.S_ISCHR(kind) or stat.S_ISBLK(kind)
        new = NewInode(kind | rng.randrange(0o10000), rng.getrandbits(31), rng.getrandbits(31),
                       os.makedev(7, rng.randrange(256)) if is_device else 0,
                       target if stat.S_ISLNK(kind) else b"")  # fmt: skip
        ino = fs.make(directory, name, new)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 9))):
            with suppress(OSError):
                change_one(fs, ino, directory, others, rng)
        others.append(ino)


def change_one(fs: FileSystem, ino: int, home: int, others: list[int], rng: random.Random) -> None:
    """Raises OSError where this can't be done to this type."""
    time_ns = rng.choice((0, 1, -1, -(10**9) - 1, 2**62, -(2**62), rng.randrange(2 * 10**18)))
    way = rng.randrange(10)
    if way == 0:
        fs.set_attributes(ino, mtime_ns=time_ns, atime_ns=time_ns + 7)
    elif way == 1:
        fs.set_attributes(ino, ctime_ns=time_ns, mode=rng.randrange(0o10000))
    elif way == 2:
        fs.set_attributes(ino, size_bytes=rng.choice((0, 1, 4096, 100_000, 1 << 40)))
    elif way == 3:
        fs.write(ino, rng.choice((0, 4096, 9999, 1 << 30)), b"w" * rng.choice((1, 4096, 9000)))
    elif way == 4:
        fs.punch(ino, 4096 * rng.randrange(3), 4096)
    elif way == 5:
        fs.set_xattr(ino, b"user.%d" % rng.randrange(3), b"v" * rng.choice((0, 10, 100, 3000)))
    elif way == 6 and fs.inode(ino).type in (4, 8):
        fs.set_flags(ino, rng.choice((InodeFlags.NO_DUMP, InodeFlags.IMMUTABLE,
                                      InodeFlags.NO_ACCESS_TIME, InodeFlags(0))))  # fmt: skip
    elif way == 7:
        fs.make(ino, b"d%d" % rng.randrange(9), NewInode(stat.S_IFDIR | 0o755, 0, 0))
    elif way == 8 and others:
        fs.link(rng.choice(others), home, b"link-%d" % rng.getrandbits(60))
    else:
        fs.note_read(ino)


def answers(files: SharedFiles, fs: FileSystem, directory: int, room: int) -> list[bytes]:
    """All answers of a listing with attributes."""
    fs.inode(directory)
    door = door_of(files, fs)
    opened = door.answer(Opcode.OPENDIR, Request(directory, CALLER, wire.OPEN_IN.pack(0, 0)))
    assert isinstance(opened, bytes)
    handle, *_ = wire.OPEN_OUT.unpack(opened)
    found, position = [], 0
    while True:
        request = Request(directory, CALLER, wire.READ_IN.pack(handle, position, room, 0, 0, 0))
        raw = door.answer(Opcode.READDIRPLUS, request)
        assert isinstance(raw, bytes)
        if not raw:
            break
        assert len(raw) <= room
        found.append(raw)
        position = last_position(raw)
    door.answer(
        Opcode.RELEASEDIR, Request(directory, CALLER, wire.RELEASE_IN.pack(handle, 0, 0, 0))
    )
    return found


def last_position(raw: bytes) -> int:
    position = at = 0
    while at < len(raw):
        _, position, length, _ = wire.DIRENT.unpack_from(raw, at + 128)
        at += 152 + (length + 7) // 8 * 8
    return int(position)


@pytest.mark.parametrize("room", [500, 4096, 32768])
def test_all_answers_of_a_listing_are_those_of_the_long_way(
    files: SharedFiles, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(room)
    directory = files.fs.make(ROOT, b"all", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    files.fs.note_accesses(files.fs.inode_attributes.access_times.NEVER, of_directories=False)
    make_some(files.fs, directory, rng, COUNT if room == 4096 else 300)
    counts = files.shared.lookup_counts
    found = []
    for is_stored in (True, False):
        fs = files.again().fs
        if not is_stored:
            monkeypatch.setattr(fs, "stored_listing", lambda _: None)
        found.append((answers(files, fs, directory, room), held := dict(counts.counts())))
        for number, count in held.items():
            counts.take(number, count)
    assert found[0] == found[1]
    assert sum(found[0][1].values()) > 200


def door_of(files: SharedFiles, fs: FileSystem) -> WireDoor:
    again = files.again()
    again.fs = fs
    return again.door()[1]


def test_most_inodes_are_packed_from_what_is_stored(files: SharedFiles) -> None:
    rng, fs = random.Random(1), files.fs
    directory = fs.make(ROOT, b"all", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    make_some(fs, directory, rng, 1000)
    packed = 0
    for name in fs.names(directory):
        raw = packed_one(fs, directory, name)
        assert raw in (b"", long_way(fs, directory, name)), name
        packed += bool(raw)
    assert packed > len(fs.names(directory)) * 0.7


def looked_up(files: SharedFiles, fs: FileSystem, directory: int, name: bytes) -> bytes:
    request = Request(directory, CALLER, name + b"\0")
    answer = door_of(files, fs).answer(Opcode.LOOKUP, request)
    assert isinstance(answer, bytes)
    return answer


def test_a_look_up_answers_what_the_long_way_answers(
    files: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = files.fs.make(ROOT, b"all", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    make_some(files.fs, directory, random.Random(3), 200)
    names = [*files.fs.names(directory), b"none", b".", b".."]
    counts = files.shared.lookup_counts
    found = []
    for is_stored in (True, False):
        fs = files.again().fs
        if not is_stored:
            monkeypatch.setattr(fs, "stored_listing", lambda _: None)
        answers = [looked_up(files, fs, directory, name) for name in names]
        found.append((answers, held := dict(counts.counts())))
        assert (len(fs.store.cache) < len(names) / 2) == is_stored
        for number, count in held.items():
            counts.take(number, count)
    assert found[0] == found[1]


def test_a_look_up_that_meets_bad_memory_holds_nothing_twice(
    files: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = files.fs.make(ROOT, b"a", NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs = files.again().fs
    monkeypatch.setattr(fs.store.ground.pool.medium, "has_faulted", lambda: True)
    assert looked_up(files, fs, ROOT, b"a") == long_way(fs, ROOT, b"a")[:128]
    assert files.shared.lookup_counts.count(ino) == 1


def test_a_listing_keeps_no_inode_in_memory(files: SharedFiles) -> None:
    directory = files.fs.make(ROOT, b"all", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    for count in range(500):
        files.fs.make(directory, b"%d" % count, NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs = files.again().fs
    assert answers(files, fs, directory, 4096)
    assert len(fs.store.cache) <= 2


def test_what_was_written_without_a_record_counts(files: SharedFiles) -> None:
    """Sizes and times that only the live line has."""
    fs = files.fs
    ino = fs.make(ROOT, b"f", NewInode(stat.S_IFREG | 0o644, 1, 2))
    inode, changed_ns = fs.inode(ino), fs.attributes(ino).ctime_ns
    fs.store.set_live_size(inode, 12345)
    for written_ns in (0, changed_ns - 1, changed_ns, changed_ns + 1, 1 << 63, (1 << 64) - 1):
        for accessed_ns in (0, 5, changed_ns, (1 << 63) - 1):
            fs.store.set_written_ns(inode, written_ns)
            fs.store.lines.set_accessed_ns(inode, accessed_ns)
            assert packed_one(fs, ROOT, b"f") == long_way(fs, ROOT, b"f")
    for ahead_ns in (-1, 0, 1, 10**7, 10**7 + 1):
        fs.set_attributes(ino, mtime_ns=changed_ns + ahead_ns, ctime_ns=changed_ns)
        fs.store.set_written_ns(inode, changed_ns)
        assert packed_one(fs, ROOT, b"f") == long_way(fs, ROOT, b"f")


def test_a_live_line_that_a_crash_left_behind_is_the_long_ways(files: SharedFiles) -> None:
    fs = files.fs
    ino = fs.make(ROOT, b"f", NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs.write(ino, 0, b"x" * 100)
    fs.set_attributes(ino, size_bytes=5)
    inode = fs.inode(ino)
    word = size_word(100, inode.keys_of_line()[1])
    fs.store.medium.store(inode.slot_offset + LIVE_OFFSET, word.to_bytes(8, "little"))
    assert packed_one(fs, ROOT, b"f") == b""
    [raw] = answers(files, files.again().fs, ROOT, 4096)
    assert long_way(fs, ROOT, b"f", 2) in raw
    assert packed_one(fs, ROOT, b"f") != b""


def test_a_pool_with_holes_is_read_without_a_touch_of_them(sparse: SharedFiles) -> None:
    rng, fs = random.Random(2), sparse.fs
    make_some(fs, ROOT, rng, 300)
    before, packed = os.fstat(sparse.medium.fileno()).st_blocks, 0
    for name in fs.names(ROOT):
        raw = packed_one(fs, ROOT, name)
        assert raw in (b"", long_way(fs, ROOT, name)), name
        packed += bool(raw)
    assert packed > 200
    for pfn in range(*hole_of(fs)):
        fs.inode(ROOT).add_entry(b"in a hole", pfn * 8, stat.S_IFREG >> 12)
        assert packed_one(fs, ROOT, b"in a hole") == b""
    assert os.fstat(sparse.medium.fileno()).st_blocks == before


def hole_of(fs: FileSystem) -> tuple[int, int]:
    """The last frames of the data zone, which nobody has used."""
    first, count = fs.geometry
    assert fs.store.medium.is_hole((first + count - 64) << PAGE_SHIFT, 64 << PAGE_SHIFT)
    return first + count - 64, first + count


def test_a_name_that_is_gone_is_left_out(files: SharedFiles) -> None:
    fs = files.fs
    for name in (b"a", b"b", b"c"):
        fs.make(ROOT, name, NewInode(stat.S_IFREG | 0o644, 1, 2))
    names = fs.listing(ROOT)
    fs.unlink(ROOT, b"b")
    stored, answer = listing_of(fs, ROOT), bytearray()
    inodes = StoredInodes(stored.memory, stored.first_pfn, stored.sparse_fd)
    assert inodes.pack(ROOT, stored.words, names, 2, answer, ROOM, CACHE_SECONDS) == (5, False)
    assert answer == long_way(fs, ROOT, b"a", 2) + long_way(fs, ROOT, b"c", 4)
    assert inodes.pack(ROOT, stored.words, names, 5, answer, ROOM, 1) == (5, False)


@pytest.mark.parametrize("room", [0, 1, 159, 160, 161, 319, 320, 480, 500])
def test_an_answer_has_only_the_entries_that_have_room(files: SharedFiles, room: int) -> None:
    fs = files.fs
    for name in (b"a", b"bcdefgh", b"c"):
        fs.make(ROOT, name, NewInode(stat.S_IFREG | 0o644, 1, 2))
    stored, answer = listing_of(fs, ROOT), bytearray()
    names = fs.listing(ROOT)
    inodes = StoredInodes(stored.memory, stored.first_pfn, stored.sparse_fd)
    fit = min(room // 160, 3)
    after = inodes.pack(ROOT, stored.words, names, 2, answer, room, CACHE_SECONDS)
    assert after == (2 + fit, fit < 3)
    assert len(answer) == fit * 160
    hold_listed(stored.counts, None, answer, 0)
    assert sum(stored.counts) == fit


def test_bad_memory_is_found_and_nothing_of_it_is_told(
    files: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long way meets it as well; what was packed before is neither answered nor held."""
    for name in (b"a", b"b"):
        files.fs.make(ROOT, name, NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs = files.again().fs
    faults = iter([True, False])
    medium = fs.store.ground.pool.medium
    monkeypatch.setattr(medium, "has_faulted", lambda: next(faults))
    [raw] = answers(files, fs, ROOT, 4096)
    counts = files.shared.lookup_counts
    assert raw.endswith(long_way(fs, ROOT, b"a", 2) + long_way(fs, ROOT, b"b", 3))
    assert [counts.count(fs.lookup(ROOT, name)) for name in (b"a", b"b")] == [1, 1]


# When nothing is listed from what is stored


def test_a_damaged_file_system_is_listed_the_long_way(files: SharedFiles) -> None:
    assert files.fs.stored_listing(ROOT) is not None
    files.fs.store.found_damage("a test")
    assert files.fs.stored_listing(ROOT) is None


def test_what_a_journal_would_change_is_listed_the_long_way(files: SharedFiles) -> None:
    files.fs.store.table.pending_words = {0: 0}
    assert files.fs.stored_listing(ROOT) is None


def test_an_encrypted_directory_is_listed_the_long_way(files: SharedFiles) -> None:
    directory = files.fs.make(ROOT, b"sealed", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    assert files.fs.stored_listing(directory) is not None
    files.fs.properties.encrypt(directory, b"key of nobody   ")
    assert files.fs.stored_listing(directory) is None


def test_without_counts_that_are_shared_nothing_is_listed_from_what_is_stored() -> None:
    assert Tree().mount().stored_listing(ROOT) is None


# What no program writes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hostile_pools_are_listed_as_the_long_way_does_or_not_at_all() -> None:
    logging.disable()
    packed = refused = 0
    try:
        for seed in range(HOSTILE_TRIES):
            of, image, _ = hostile_pools.mutated(seed)
            with suppress(DamagedFileSystem):
                more, less = compare_all(of, image)
                packed, refused = packed + more, refused + less
    finally:
        logging.disable(logging.NOTSET)
    print(packed, refused)
    assert packed > HOSTILE_TRIES * 3
    assert refused > HOSTILE_TRIES


def compare_all(of: hostile_pools.Base, image: bytes) -> tuple[int, int]:
    """How many entries of a pool were packed, and how many were left to the long way."""
    pool = hostile_pools.opened(of, image, read_only=True)
    fs = hostile_pools.mounted(pool)
    pending = fs.store.table.pending_words
    packed = refused = 0
    for directory in of.directories:
        try:
            names = fs.listing(directory)
        except OSError:
            continue
        if fs.inode(directory).transform is not None or pending:
            continue
        for name in names:
            raw = packed_one(fs, directory, name)
            if raw:
                assert raw == long_way(hostile_pools.mounted(pool), directory, name)
            packed, refused = packed + bool(raw), refused + (not raw)
    return packed, refused


def test_each_bit_of_a_slot_that_flips_is_found_or_counts_for_nothing(files: SharedFiles) -> None:
    """Of the parts that a checksum covers, each bit is found. The rest says the same to both."""
    fs = files.fs
    ino = fs.make(ROOT, b"f", NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs.write(ino, 0, b"x" * 5000)
    slot, right = fs.inode(ino).slot_offset, packed_one(fs, ROOT, b"f")
    medium = fs.store.ground.pool.medium
    raw = bytes(medium.read(slot, SLOT_BYTES))
    end = fs.inode(ino).log.tail - slot
    for bit in range(SLOT_BYTES * 8):
        at = bit // 8
        medium.store(slot + at, bytes([raw[at] ^ 1 << bit % 8]))
        found = packed_one(fs, ROOT, b"f")
        if at < 48 or LIVE_OFFSET <= at < LIVE_OFFSET + 8 or INLINE_OFFSET <= at < end:
            assert found == b"", bit
        elif at >= LIVE_OFFSET + 24 or at < LIVE_OFFSET:
            assert found == right, bit
        else:
            assert found == long_way(fs, ROOT, b"f"), bit
        medium.store(slot + at, bytes([raw[at]]))
    assert packed_one(fs, ROOT, b"f") == right


@pytest.mark.parametrize("number", [0, 1, 2, 7, (1 << 55) - 1, 1 << 55, (1 << 60) - 1, 1 << 60,
                                    (1 << 64) - 1])  # fmt: skip
def test_an_entry_may_have_any_number(files: SharedFiles, number: int) -> None:
    fs = files.fs
    fs.inode(ROOT).add_entry(b"n", number, stat.S_IFREG >> 12)
    assert packed_one(fs, ROOT, b"n") == b""


def test_no_byte_outside_the_data_zone_decides(files: SharedFiles) -> None:
    """Every number near the ends of the zone, and of each group, in all of its slots."""
    fs = files.fs
    stored = listing_of(fs, ROOT)
    exact = bytes(stored.memory)
    first, count = stored.first_pfn, len(exact) >> PAGE_SHIFT
    inodes = StoredInodes(exact, first)
    pfns = {*range(max(first - 2, 0), first + 6), *range(first + count - 3, first + count + 3)}
    slots = FRAME_BYTES // SLOT_BYTES
    for number in (pfn * slots + slot for pfn in pfns for slot in range(slots)):
        answer = bytearray()
        words = {b"n": number << 4 | 8}
        assert inodes.pack(ROOT, words, [b"n"], 2, answer, ROOM, 1) == (2, False)


def test_a_directory_lies_where_it_says(files: SharedFiles) -> None:
    fs = files.fs
    home = fs.make(ROOT, b"home", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    other = fs.make(ROOT, b"other", NewInode(stat.S_IFDIR | 0o755, 0, 0))
    assert packed_one(fs, ROOT, b"home") == long_way(fs, ROOT, b"home")
    fs.inode(other).add_entry(b"home", home, stat.S_IFDIR >> 12)
    assert packed_one(fs, other, b"home") == b""


def test_a_file_with_frames_of_inodes_is_the_long_ways(files: SharedFiles) -> None:
    fs = files.fs
    ino = fs.make(ROOT, b"f", NewInode(stat.S_IFREG | 0o644, 1, 2))
    pfn = fs.inode(ino).slot_offset >> PAGE_SHIFT
    assert packed_one(fs, ROOT, b"f") != b""
    for start, count in ((pfn, 1), (pfn, 100), (pfn + 1, 100)):
        with fs.store.change() as change:
            change.append(fs.inode(ino), media.pack_extent(0, start, count))
        assert (packed_one(fs, ROOT, b"f") == b"") == (start == pfn)
    # The first frame of inodes is one whatever its bit says.
    root = fs.geometry.first_pfn + FIRST_INODES_FRAME
    with fs.store.change() as change:
        change.append(fs.inode(ino), media.pack_extent(0, root, 1))
    fs.store.table.mark_frame(root, is_marked=False)
    assert packed_one(fs, ROOT, b"f") == b""


def test_a_log_in_frames_is_the_long_ways(files: SharedFiles) -> None:
    fs = files.fs
    ino = fs.make(ROOT, b"f", NewInode(stat.S_IFREG | 0o644, 1, 2))
    fs.set_xattr(ino, b"user.x", bytes(3000))
    assert not fs.inode(ino).log.is_inline
    assert packed_one(fs, ROOT, b"f") == b""
    head = fs.inode(ino).slot_offset + HEAD_WORD_AT
    assert struct.unpack("<Q", bytes(fs.store.medium.read(head, 8)))[0] != head


# The arguments


def test_it_takes_names_and_places_only(files: SharedFiles) -> None:
    inodes = StoredInodes(b"", 0)
    with pytest.raises(TypeError):
        inodes.pack(1, {"n": 1}, ["n"], 2, bytearray(), ROOM, 1)  # type: ignore[dict-item,list-item]
    with pytest.raises(IndexError):
        inodes.pack(1, {}, [], 1, bytearray(), ROOM, 1)
    raw = bytearray(packed_at(1 << 40))
    with pytest.raises(IndexError):
        hold_listed(bytearray(80), None, raw, 0)


def packed_at(number: int) -> bytes:
    head = wire.ENTRY_OUT.pack(number, 0, 0, 0, 0, 0) + bytes(wire.ATTR.size)
    return head + wire.DIRENT.pack(number, 1, 0, 0)
