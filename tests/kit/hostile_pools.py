"""Pools that nobody would make: valid file systems with something changed, and what may come of it.

    scripts/fuzz-pool --seed 1 --tries 1000

One try takes a small valid pool, changes one or a few things that are stored, mostly with checksums
made right again so that what is behind them is reached, and then mounts it, walks all of it, works
on it, checks it and repairs it. Invariants:
- a try is determined by its seed;
- mounting may say DamagedFileSystem, and any operation OSError; nothing else is raised, nothing
  takes seconds, and nothing outside the data zone is touched (`GuardedMedium`);
- what was repaired is without errors, and all of it can be read.
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import logging
import os
import random
import signal
import struct
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest.mock import patch

import google_crc32c

from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as log_media
from pmemfs.media.filesystem import HEAD, HEAD_FRAME, JOURNAL_FRAME, pack_head
from pmemfs.media.inode import HEAD as INODE_HEAD
from pmemfs.media.inode import LIVE_OFFSET, ROOT, SLOT_BYTES
from pmemfs.media.journal import MOST_ENTRIES, pack_journal
from pmemfs.media.label import Mode, Scheme
from pmemfs.media.layout import replace
from pmemfs.media.live import LIVE_LINE, line_key, redo_check, size_word
from pmemfs.media.log import InodeFlags
from pmemfs.media.transform import (
    StoredPiece,
    Transformation,
    TransformState,
    pack_piece,
    pack_transform,
)
from pmemfs.medium.base import Durability, Medium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap import open_memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool, PoolSpec
from pmemfs.transform.codec import codec_of
from pmemfs.units import KIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.findings import Verdict
from pmemfs.volume.fs.repair import repair_filesystem

if TYPE_CHECKING:
    from typing_extensions import Buffer

POOL_BYTES = 512 * KIB
TRY_SECONDS = 10
REPAIR_EVERY = 4
_FILE, _DIRECTORY, _LINK, _FIFO = 0o100644, 0o40755, 0o120777, 0o10644


class Trespass(BaseException):
    """Something outside the data zone was touched. Nobody may catch this by accident."""


class TooSlow(BaseException):
    """A try takes too long: it hangs, or goes round in a circle."""


class GuardedMedium(Medium):
    """Memory of a process, of which nothing but the data zone may be touched once `guard` is set.

    What is read lies there as well, or `Trespass` is raised.
    """

    def __init__(self, image: Buffer) -> None:
        self.memory = bytearray(image)
        self.name = "guarded medium"
        self.size_bytes = len(self.memory)
        self.durability = Durability.CACHE_LINES
        self.read_only = False
        self.reserved = True
        self.guard = range(self.size_bytes)

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        self._look(offset_bytes, length_bytes)
        return bytes(self.memory[offset_bytes : offset_bytes + length_bytes])

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        self._look(offset_bytes, length_bytes)
        return memoryview(self.memory)[offset_bytes : offset_bytes + length_bytes]

    def has_faulted(self) -> bool:
        return False

    def check_touched(self) -> None:
        """Nothing to find: no memory of a process is bad."""

    def store(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._look(offset_bytes, len(view))
        if self.read_only:
            raise Trespass("a store on a medium that is open for reading")
        self.memory[offset_bytes : offset_bytes + len(view)] = view

    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        self._look(offset_bytes, length_bytes)

    def fence(self) -> None:
        """Nothing to wait for."""

    def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing to do: all of it is there."""

    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing to do: all of it is there."""

    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        self._look(offset_bytes, length_bytes)
        return False

    def _look(self, offset_bytes: int, length_bytes: int) -> None:
        if length_bytes < 0 or offset_bytes < self.guard.start:
            raise Trespass(f"{length_bytes} bytes at {offset_bytes:#x}")
        if offset_bytes + length_bytes > self.guard.stop:
            raise Trespass(f"{length_bytes} bytes at {offset_bytes:#x}")


# Valid pools


@dataclass
class Base:
    """A valid pool, and where things are in it."""

    image: bytes
    data_start: int
    data_bytes: int
    slots: list[int] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    """Offset and length."""
    owners: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Number and generation of the inode whose slot, record or frame of a log is at an offset."""
    epochs: dict[int, int] = field(default_factory=dict)
    """The truncation epoch of the inode in a slot."""
    log_frames: list[int] = field(default_factory=list)
    inode_frames: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    directories: list[int] = field(default_factory=list)


def populate(fs: FileSystem, rng: random.Random) -> None:
    """A bit of everything."""
    directories, files = [ROOT], []
    for count in range(rng.randint(3, 6)):
        parent = rng.choice(directories)
        directories.append(fs.make(parent, b"dir%d" % count, NewInode(_DIRECTORY, 0, 0)))
    for count in range(rng.randint(5, 9)):
        ino = fs.make(rng.choice(directories), b"file%d" % count, NewInode(_FILE, 1, 2))
        files.append(ino)
        for _ in range(rng.randint(0, 4)):
            size = rng.choice((10, 4096, 9000))
            fs.write(ino, rng.choice((0, 4096, 20000, 1 << 20)), rng.randbytes(size))
    fs.make(rng.choice(directories), b"link", NewInode(_LINK, 0, 0, target=b"there"))
    fs.make(rng.choice(directories), b"long", NewInode(_LINK, 0, 0, target=b"t" * 3000))
    fs.make(rng.choice(directories), b"fifo", NewInode(_FIFO, 0, 0))
    for ino in files[:3]:
        fs.link(ino, rng.choice(directories), b"hard%d" % ino)
    fs.set_xattr(files[0], b"user.short", b"v")
    fs.set_xattr(files[0], b"user.long", rng.randbytes(5000))
    fs.set_xattr(directories[-1], b"user.dir", b"value")
    for count in range(rng.choice((0, 20, 90))):
        fs.link(rng.choice(files), directories[1], b"n%d" % count + b"x" * (count % 60))
    for ino in files[1:3]:
        for size in range(rng.choice((1, 8, 70))):
            fs.set_attributes(ino, size_bytes=size * 3000)
    fs.allocate(files[3], 0, 20000, keep_size=True)
    fs.punch(files[4], 0, 4096)
    fs.rename(ROOT, fs.names(ROOT)[0], directories[-1], b"moved") if rng.random() < 0.3 else 0
    transform(fs, rng)


def transform(fs: FileSystem, rng: random.Random) -> None:
    """Compressed files, and an encrypted directory whose key nobody has."""
    archive = fs.make(ROOT, b"archive", NewInode(_DIRECTORY, 0, 0))
    fs.properties.set_transform(archive, Transformation.ZSTD, 3)
    for kind in (Transformation.ZSTD, Transformation.LZ4):
        ino, count = fs.make(archive, b"packed%d" % kind, NewInode(_FILE, 0, 0)), 6
        fs.write(ino, 0, b"".join(b"line %d\n" % at for at in range(4000))[: count * FRAME_BYTES])
        fs.trim_ahead(ino)
        pack(fs, ino, count, kind)
    sealed = fs.make(ROOT, b"sealed", NewInode(_DIRECTORY, 0, 0))
    fs.properties.encrypt(sealed, b"key of nobody   ")
    for count in range(2):
        ino = fs.make_unnamed(ROOT, NewInode(_FILE, 0, 0))
        fs.write(ino, 0, rng.randbytes(5000))
        encrypt(fs, sealed, ino, rng.randbytes(20 + count))


def pack(fs: FileSystem, ino: int, frame_count: int, kind: int) -> None:
    """Compress the start of a file."""
    inode, codec = fs.inode(ino), codec_of(kind)
    assert codec is not None
    packed = codec.compress(fs.read(ino, 0, frame_count * FRAME_BYTES), 0)
    with fs.store.change() as change:
        assert fs.frames.packed.replace(change, inode, 0, frame_count, packed, kind)


def encrypt(fs: FileSystem, directory: int, ino: int, name: bytes) -> None:
    """Let a file lie in an encrypted directory, as if it had been made there."""
    parent, inode = fs.inode(directory), fs.inode(ino)
    assert parent.transform is not None
    state, transformed = inode.state.replaced(link_count=1), parent.transform
    with fs.store.change() as change:
        change.append(parent, log_media.pack_entry(name, ino, inode.type, 5))
        change.append(inode, pack_transform(transformed), state.pack())
        change.then(lambda: parent.add_entry(name, ino, inode.type))
        change.then(lambda: inode.set_transform(transformed))
        change.then(lambda: inode.set_state(state))


@contextmanager
def same_every_time(rng: random.Random) -> Iterator[None]:
    """Time passes by a millisecond with each look at the clock, and identifiers are no surprise."""
    clock = itertools.count(1_700_000_000 * 10**9, 10**6)
    with (
        patch("time.time_ns", lambda: next(clock)),
        patch("time.clock_gettime_ns", lambda _: next(clock)),
        patch("uuid.uuid4", lambda: uuid.UUID(int=rng.getrandbits(128))),
        patch("secrets.randbits", rng.getrandbits),
        patch("os.urandom", rng.randbytes),
    ):
        yield


@functools.cache
def base(seed: int) -> Base:
    """A valid pool."""
    rng = random.Random(seed)
    with same_every_time(rng):
        return _made(seed, rng)


def _made(seed: int, rng: random.Random) -> Base:
    medium = GuardedMedium(bytes(POOL_BYTES))
    scheme = (Scheme.NONE, Scheme.ON_DEMAND, Scheme.NONE, Scheme.PMEM)[seed % 4]
    spec = PoolSpec(name="hostile", alignment_bytes=4096, scheme=scheme, mode=Mode.FS)
    pool = Pool.create(medium, spec)
    pool.begin_mount()
    FileSystem.format(pool)
    fs = FileSystem(pool, open_memmap(pool))
    with suppress(OSError):
        populate(fs, rng)
    image = bytes(medium.memory)
    if seed % 2:
        fs.make_unnamed(ROOT, NewInode(_FILE, 0, 0))
        image = _interrupted(bytes(medium.memory), rng)
    else:
        fs.end()
        pool.end_mount()
        image = bytes(medium.memory)
    return _surveyed(image)


def _interrupted(image: bytes, rng: random.Random) -> bytes:
    """The same after a power failure whose journal is to be carried out."""
    medium = RecordingMedium(image)
    pool = Pool.open(medium)
    fs = FileSystem(pool, open_memmap(pool))
    fs.make(ROOT, b"interrupted", NewInode(_FILE, 0, 0))
    return next(medium.after_power_failure(limit=1))


def _surveyed(image: bytes) -> Base:
    pool = Pool.open(GuardedMedium(image))
    zone = pool.zones.data
    found = Base(image, zone.offset_bytes, zone.size_bytes)
    pool.medium.read_only = True
    fs = FileSystem(pool, open_memmap(pool))
    for pfn in fs.store.table.frames():
        found.inode_frames.append(pfn << PAGE_SHIFT)
        for number in fs.store.table.numbers_in(pfn):
            slot = fs.store.table.slot_offset(number)
            inode = fs.store.cache.read_inode(number)
            if inode is None:
                continue
            found.slots.append(slot)
            found.numbers.append(number)
            found.owners[slot] = number, inode.generation
            found.epochs[slot] = inode.state.epoch
            if inode.is_directory:
                found.directories.append(number)
            found.log_frames += inode.log.frames
            found.owners |= dict.fromkeys(inode.log.frames, (number, inode.generation))
            areas = [(frame + 64, frame + FRAME_BYTES) for frame in inode.log.frames] or [
                (slot + 128, slot + SLOT_BYTES)
            ]
            for start, end in areas:
                while start < end and image[start] and image[start + 1]:
                    length = image[start + 1] * 64
                    found.records.append((start, length))
                    found.owners[start] = number, inode.generation
                    start += length
    return found


# Mutations


class Mutation:
    """A pool on its way to become hostile."""

    def __init__(self, of: Base, rng: random.Random) -> None:
        self.of = of
        self.rng = rng
        self.image = bytearray(of.image)

    def number(self) -> int:
        """A number that could mean something, or breaks something."""
        of, rng = self.of, self.rng
        kind = rng.randrange(9)
        if kind == 0:
            return rng.choice(of.numbers)
        if kind == 1:
            return rng.choice(of.slots) + rng.choice((0, 64, 128, 192, 512))
        if kind == 2:
            return self.frame() + rng.choice((0, 64, 128, 4096))
        if kind == 3:
            return self.frame() >> PAGE_SHIFT
        if kind == 4:
            return rng.choice((0, 1, 2, 3, 63, 64, 255, 4095, 4096, 32767, 32768, 65535, 65536))
        if kind == 5:
            return (1 << rng.randint(0, 64)) - rng.randint(0, 2) & (1 << 64) - 1
        if kind == 6:
            return (of.data_start + of.data_bytes >> PAGE_SHIFT) + rng.randint(-3, 3)
        if kind == 7:
            return rng.randrange(200)
        return rng.getrandbits(64)

    def frame(self) -> int:
        """The offset of a frame, that of a log or of inodes rather often."""
        of, rng = self.of, self.rng
        which = rng.randrange(4)
        if which == 0 and of.log_frames:
            return rng.choice(of.log_frames)
        if which == 1:
            return rng.choice(of.inode_frames)
        return of.data_start + (rng.randrange(of.data_bytes >> PAGE_SHIFT) << PAGE_SHIFT)

    def put(self, at: int, raw: bytes) -> None:
        """Change bytes in the data zone."""
        end = self.of.data_start + self.of.data_bytes
        if self.of.data_start <= at and at + len(raw) <= end:
            self.image[at : at + len(raw)] = raw

    def reseal(self, at: int, length: int) -> None:
        """Make the checksum of a record right for the inode that had one there."""
        raw = bytes(self.image[at : at + length])
        self.put(at, log_media.seal([raw], *self.of.owners[at], at))

    def word(self, at: int) -> None:
        """Change a word of some width."""
        width = self.rng.choice((1, 2, 4, 8, 8))
        self.put(at, (self.number() & (1 << 8 * width) - 1).to_bytes(width, "little"))


def change_record(pool: Mutation) -> None:
    """A field of a record."""
    rng = pool.rng
    at, length = rng.choice(pool.of.records)
    for _ in range(rng.choice((1, 1, 2))):
        where = rng.choice((8, 16, 24, 32, 12, 20, 25, 28, rng.randrange(2, length)))
        pool.word(at + where)
    if rng.random() < 0.95:
        pool.reseal(at, length)


def change_record_head(pool: Mutation) -> None:
    """Kind or length of a record."""
    rng = pool.rng
    at, length = rng.choice(pool.of.records)
    if rng.random() < 0.7:
        pool.put(at, bytes([rng.choice((*range(14), 255))]))
    else:
        pool.put(at + 1, bytes([rng.choice((0, 1, 2, 5, 63, 255))]))
        length = max(64, pool.image[at + 1] * 64)
    pool.reseal(at, length)


def move_record(pool: Mutation) -> None:
    """A record of one inode at the place of another."""
    source, length = pool.rng.choice(pool.of.records)
    target, room = pool.rng.choice(pool.of.records)
    if length <= room:
        pool.put(target, bytes(pool.image[source : source + length]))
        if pool.rng.random() < 0.8:
            pool.reseal(target, length)


def invent_record(pool: Mutation) -> None:
    """A sound record that says something else."""
    rng = pool.rng
    at, length = rng.choice(pool.of.records)
    kind = rng.randrange(8)
    name = rng.choice((b"file1", b"dir0", b"x", b"..", b"a/b", b"lost+found", b"\xff\n", b""))
    inode = rng.choice((*pool.of.numbers, pool.number()))
    if kind == 0:
        raw = log_media.pack_entry(name, inode, rng.choice((0, 4, 8, 10, 1, 15)), 5)
    elif kind == 1:
        raw = log_media.pack_parent(rng.choice((*pool.of.directories, inode)))
    elif kind == 2:
        pfn = pool.frame() >> PAGE_SHIFT
        raw = log_media.pack_extent(rng.choice((0, 1, 5, pool.number() & (1 << 63) - 1)), pfn,
                                    rng.choice((1, 2, 9, 100, pool.number())))  # fmt: skip
    elif kind == 3:
        raw = log_media.pack_hole(rng.randrange(10), rng.choice((1, 50, pool.number())))
    elif kind == 4:
        raw = pack_transform(some_state(rng))
    elif kind == 5:
        raw = pack_piece(rng.choice((0, 0, 32, 64, 5, pool.number())), some_piece(pool))
    elif kind == 6:
        raw = log_media.pack_entry(rng.randbytes(rng.choice((16, 17, 40))), inode, 8, 5)
    else:
        raw = log_media.pack_xattr_removed(b"user.short")
    if len(raw) <= length:
        pool.put(at, log_media.seal([raw], *pool.of.owners[at], at))


def some_state(rng: random.Random) -> TransformState | None:
    """A transformation, mostly a possible one."""
    id_, zero = rng.choice((0, 1, 1, 2, 3, 4, 255)), bytes(16)
    key_id, nonce = rng.choice(((zero, zero), (b"key of nobody   ", rng.randbytes(16))))
    return TransformState(id_, rng.choice((0, 0, 3, -128)), key_id, nonce)


def some_piece(pool: Mutation) -> StoredPiece:
    """A piece, mostly a possible one."""
    rng = pool.rng
    frame_count, stored_frames = rng.choice((2, 6, 32, 33, 0)), rng.choice((1, 1, 2, 5))
    stored_bytes = stored_frames * FRAME_BYTES - rng.choice((0, 1, 4095, 4096))
    pfn = pool.frame() >> PAGE_SHIFT
    start = pfn << PAGE_SHIFT
    checksum = int(google_crc32c.value(bytes(pool.image[start : start + stored_bytes])))
    id_ = rng.choice((2, 2, 3, 0, 1, 4, 255))
    return StoredPiece(
        pfn, frame_count, stored_frames, stored_bytes, checksum ^ (rng.random() < 0.3), id_
    )


def change_slot(pool: Mutation) -> None:
    """The head of an inode."""
    rng = pool.rng
    slot = rng.choice(pool.of.slots)
    head = list(INODE_HEAD.struct.unpack(bytes(pool.image[slot : slot + 64])))
    which = rng.choice((2, 3, 4, 5, 5, 6, 6, 6))
    head[which] = pool.number() if which != 4 else pool.number() - (1 << 63)
    if which == 6 and rng.random() < 0.5:
        head[6] = (head[6] + 64 * rng.randint(-8, 8)) & (1 << 64) - 1
    raw = bytearray(INODE_HEAD.struct.pack(*head))
    constant = struct.pack("<IIQQq", head[0], 0, *head[2:5])
    if rng.random() < 0.95:
        raw[4:8] = int(google_crc32c.value(constant)).to_bytes(4, "little")
    pool.put(slot, bytes(raw))


def change_live_line(pool: Mutation) -> None:
    """Size, time or redo record in the live line; the size mostly as if somebody had written so
    far."""
    rng = pool.rng
    slot = rng.choice(pool.of.slots)
    if rng.random() < 0.3:
        pool.word(slot + LIVE_OFFSET + rng.choice((0, 2, 8, 24, 48)))
        return
    if rng.random() < 0.3:
        # As if the power had failed while a block was stored, wherever that lies.
        at, block = pool.frame() + rng.choice((0, 16, 64, 5)), rng.randbytes(16)
        redo = struct.pack("<Q16sQ", at, block, redo_check(at, block))
        pool.put(slot + LIVE_OFFSET + LIVE_LINE.offset_of("redo_offset"), redo)
        return
    key = line_key(*pool.of.owners[slot], pool.of.epochs[slot])
    word = size_word(pool.number() & (1 << 48) - 1, key)
    pool.put(slot + LIVE_OFFSET, word.to_bytes(8, "little"))


def change_bitmap(pool: Mutation) -> None:
    """Bits of one of the bitmaps."""
    rng = pool.rng
    start = pool.of.data_start + rng.choice((0, FRAME_BYTES))
    frames = pool.of.data_bytes >> PAGE_SHIFT
    for _ in range(rng.choice((1, 1, 3, 20))):
        bit = rng.randrange(frames if rng.random() < 0.9 else 8 * FRAME_BYTES)
        if rng.random() < 0.3:
            bit = (rng.choice(pool.of.inode_frames) - pool.of.data_start) >> PAGE_SHIFT
        at = start + bit // 8
        pool.put(at, bytes([pool.image[at] ^ 1 << bit % 8]))
    if rng.random() < 0.1:
        pool.put(start, rng.choice((b"\0", b"\xff")) * rng.choice((8, 64, FRAME_BYTES)))


def change_journal(pool: Mutation) -> None:
    """A journal that was to be carried out."""
    rng = pool.rng
    entries = []
    for _ in range(rng.choice((1, 2, 5, MOST_ENTRIES))):
        at = rng.choice(pool.of.slots) + rng.choice((32, 40, 40, 40))
        if rng.random() < 0.1:
            at = pool.number() & (1 << 64) - 1
        old = pool.number()
        if at + 8 <= len(pool.image) and rng.random() < 0.9:
            old = int.from_bytes(pool.image[at : at + 8], "little")
        new = rng.choice((0, old + 64 & (1 << 64) - 1, pool.number()))
        entries.append((at & (1 << 64) - 1, old, new))
    at = pool.of.data_start + (JOURNAL_FRAME << PAGE_SHIFT)
    pool.put(at, pack_journal(entries))
    if rng.random() < 0.1:
        pool.word(at + rng.randrange(64))


def change_log_frame(pool: Mutation) -> None:
    """The head of a frame of a log: where it goes on, and whose it is."""
    rng = pool.rng
    if not pool.of.log_frames:
        return
    frame = rng.choice(pool.of.log_frames)
    if rng.random() < 0.6:
        pool.put(frame + 16, (pool.frame() if rng.random() < 0.7 else pool.number())
                 .to_bytes(8, "little"))  # fmt: skip
    else:
        after = int.from_bytes(pool.image[frame + 16 : frame + 24], "little")
        owner = pool.of.owners[rng.choice(pool.of.log_frames)]
        pool.put(frame, log_media.pack_frame_head(*owner, frame, after))


def change_head(pool: Mutation) -> None:
    """The head of the file system."""
    at = pool.of.data_start + (HEAD_FRAME << PAGE_SHIFT)
    if pool.rng.random() < 0.5:
        pool.word(at + pool.rng.randrange(64))
        return
    head = HEAD.unpack(bytes(pool.image[at : at + 64]))
    pool.put(at, pack_head(replace(head, is_clean=pool.number())))


def copy_slot(pool: Mutation) -> None:
    """One inode over another, with the number made right, and the records in its slot."""
    rng = pool.rng
    source, target = rng.choice(pool.of.slots), rng.choice(pool.of.slots)
    raw = bytearray(pool.image[source : source + SLOT_BYTES])
    number = pool.of.numbers[pool.of.slots.index(target)]
    head = list(INODE_HEAD.struct.unpack(bytes(raw[:64])))
    constant = struct.pack("<IIQQq", head[0], 0, number, *head[3:5])
    head[1], head[2] = int(google_crc32c.value(constant)), number
    if rng.random() < 0.6 and head[5] == source + 128:
        head[5], head[6] = target + 128, head[6] - source + target & (1 << 64) - 1
    raw[:64] = INODE_HEAD.struct.pack(*head)
    size = int.from_bytes(raw[LIVE_OFFSET : LIVE_OFFSET + 8], "little") >> 16
    word = size_word(size, line_key(number, head[3], pool.of.epochs[source]))
    raw[LIVE_OFFSET : LIVE_OFFSET + 8] = word.to_bytes(8, "little")
    at = 128
    while at < SLOT_BYTES and raw[at + 1]:
        end = at + raw[at + 1] * 64
        raw[at:end] = log_media.seal([bytes(raw[at:end])], number, head[3], target + at)
        at = end
    pool.put(target, bytes(raw))


def copy_frame(pool: Mutation) -> None:
    """One frame over another."""
    source, target = pool.frame(), pool.frame()
    pool.put(target, bytes(pool.image[source : source + FRAME_BYTES]))


def scribble(pool: Mutation) -> None:
    """Anything, anywhere."""
    rng = pool.rng
    at = rng.choice((pool.frame(), rng.choice(pool.of.slots), rng.choice(pool.of.records)[0]))
    pool.put(at + rng.randrange(128), rng.randbytes(rng.choice((1, 2, 8, 64, 512))))


MUTATIONS: tuple[tuple[Callable[[Mutation], None], int], ...] = (
    (change_record, 6), (invent_record, 5), (change_record_head, 2), (move_record, 2),
    (change_slot, 3), (change_live_line, 2), (change_bitmap, 3), (change_journal, 2),
    (change_log_frame, 2), (change_head, 1), (copy_slot, 2), (copy_frame, 1), (scribble, 2),
)  # fmt: skip
_WAYS = [way for way, weight in MUTATIONS for _ in range(weight)]


def mutated(seed: int) -> tuple[Base, bytes, list[str]]:
    """The pool of a try, and what was done to it."""
    rng = random.Random(seed)
    of = base(rng.randrange(16))
    mutation = Mutation(of, rng)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        way = rng.choice(_WAYS)
        way(mutation)
        done.append(way.__name__)
    return of, bytes(mutation.image), done


# What is done with it


def opened(of: Base, image: bytes, *, read_only: bool) -> Pool:
    """The pool on a guarded medium."""
    medium = GuardedMedium(image)
    pool = Pool.open(medium)
    medium.read_only = read_only
    medium.guard = range(of.data_start, of.data_start + of.data_bytes)
    return pool


def mounted(pool: Pool) -> FileSystem:
    """A mount. Its page structures may be touched as well."""
    medium = pool.medium
    assert isinstance(medium, GuardedMedium)
    zone = pool.zones.memmap
    if zone.size_bytes and not medium.read_only:
        medium.guard = range(
            min(zone.offset_bytes, medium.guard.start), max(zone.end_bytes, medium.guard.stop)
        )
    return FileSystem(pool, open_memmap(pool))


def walk(fs: FileSystem) -> tuple[list[int], list[tuple[int, bytes]], list[OSError]]:
    """Read everything: the inodes, the names, and what could not be read."""
    seen: list[int] = []
    names: list[tuple[int, bytes]] = []
    errors: list[OSError] = []
    todo = [ROOT]
    known = {ROOT}
    while todo:
        number = todo.pop()
        try:
            look_at(fs, number)
            seen.append(number)
            if fs.attributes(number).mode >> 12 != 4:
                continue
            entries = fs.names(number)
            if len(entries) != len(fs.inode(number).entries):
                raise AssertionError("an entry that has no name")
            for name in entries:
                names.append((number, name))
                child = fs.lookup(number, name)
                if fs.has_entry(number, name) != child:
                    raise AssertionError("an entry that can't be looked up")
                if child not in known:
                    known.add(child)
                    todo.append(child)
        except OSError as error:
            if not is_refused_rightly(fs, number, error):
                errors.append(error)
    return seen, names, errors


def is_refused_rightly(fs: FileSystem, number: int, error: OSError) -> bool:
    """Whether an inode is sound, and only its key or its transformation is not known."""
    if error.errno == errno.ENOKEY:
        return fs.inode(number).is_encrypted
    return error.errno == errno.EOPNOTSUPP and bool(fs.inode(number).unknown_id)


def look_at(fs: FileSystem, number: int) -> None:
    """Ask an inode everything. Raises OSError."""
    attributes = fs.attributes(number)
    for name in fs.list_xattrs(number):
        fs.get_xattr(number, name)
    kind = attributes.mode >> 12
    if kind == 4:
        fs.parent(number)
    elif kind == 10:
        fs.target(number)
    elif kind == 8:
        size = attributes.size_bytes
        for offset in (0, 5000, size >> 1, max(0, size - 3000)):
            if len(fs.read(number, offset, 20000)) > 20000:
                raise AssertionError("more than was asked for")
        fs.extents(number)
        fs.live_line(number)
        fs.append_limit(number)
        fs.note_read(number)
        for for_data in (True, False):
            with suppress(OSError):
                fs.seek(number, 0, for_data=for_data)


def work(
    fs: FileSystem, rng: random.Random, seen: list[int], names: list[tuple[int, bytes]]
) -> None:
    """Some operations on what there is; each may fail."""
    numbers = seen or [ROOT]
    directory = functools.partial(rng.choice, sorted({parent for parent, _ in names} | {ROOT}))
    number = functools.partial(rng.choice, numbers)
    some = names or [(ROOT, b"none")]
    size = functools.partial(rng.choice, (0, 1, 4096, 5000, 100_000, 1 << 30, (1 << 47) - 1))
    long = functools.partial(rng.choice, (1, 4096, 8192, 30_000))
    operations: list[Callable[[], object]] = [
        lambda: fs.make(directory(), b"new%d" % rng.randrange(99), NewInode(_FILE, 0, 0)),
        lambda: fs.make(directory(), b"new%d" % rng.randrange(99), NewInode(_DIRECTORY, 0, 0)),
        lambda: fs.unlink(*rng.choice(some)),
        lambda: fs.unlink(*rng.choice(some)),
        lambda: fs.rmdir(*rng.choice(some)),
        lambda: fs.rename(*rng.choice(some), directory(), b"renamed"),
        lambda: fs.rename(*rng.choice(some), *rng.choice(some)),
        lambda: fs.rename(*rng.choice(some), *rng.choice(some), 2),
        lambda: fs.rename(
            *rng.choice(some), *rng.choice(some), 4, NewInode(0o020000, rng.getrandbits(16), 2)
        ),
        lambda: fs.link(number(), directory(), b"linked%d" % rng.randrange(99)),
        lambda: fs.write(number(), size(), rng.randbytes(long())),
        lambda: fs.write(number(), 0, rng.randbytes(long())),
        lambda: fs.set_attributes(number(), size_bytes=size()),
        lambda: fs.set_attributes(number(), mode=0o600, mtime_ns=5),
        lambda: fs.set_xattr(number(), b"user.new", rng.randbytes(rng.choice((1, 3000)))),
        lambda: fs.remove_xattr(number(), b"user.short"),
        lambda: fs.punch(number(), size(), long()),
        lambda: fs.allocate(number(), size(), long(), keep_size=rng.random() < 0.5),
        lambda: fs.zero(number(), 0, long(), keep_size=rng.random() < 0.5),
        lambda: fs.collapse(number(), 4096, 4096),
        lambda: fs.insert(number(), 4096, 4096),
        lambda: fs.copy(number(), 0, number(), 5000, 5000),
        lambda: fs.trim_ahead(number()),
        lambda: fs.persist(number()),
        lambda: fs.properties.set_transform(number(), rng.choice((0, 2, 3))),
        lambda: fs.properties.encrypt(number(), b"key of nobody   "),
        lambda: fs.set_flags(number(), InodeFlags(rng.choice((0, 8, 1 << 16, 1 << 17)))),
        lambda: fs.make_plain(number(), 0, 1 << 20),
        lambda: fs.make_unnamed(ROOT, NewInode(_FILE, 0, 0)),
        lambda: fs.hold(number()),
        lambda: fs.drop(number()),
        fs.tidy,
    ]  # fmt: skip
    for _ in range(rng.randrange(25)):
        with suppress(OSError):
            rng.choice(operations)()


def use(of: Base, image: bytes, rng: random.Random, *, read_only: bool) -> str:
    """Mount, walk, work, unmount; what became of it."""
    pool = opened(of, image, read_only=read_only)
    try:
        fs = mounted(pool)
    except DamagedFileSystem:
        return "refused"
    seen, names, errors = walk(fs)
    fs.space()
    work(fs, rng, seen, names)
    for _ in range(1000):
        if not fs.tidy():
            break
    else:
        raise TooSlow("tidying never ends")
    was_damaged = fs.read_only and not read_only
    walk(fs)
    with suppress(OSError):
        fs.end()
    if was_damaged:
        return "damaged, served read-only"
    return "errors" if errors else "served"


def repaired(of: Base, image: bytes) -> tuple[str, bytes]:
    """Check and repair; what became of it, and the image."""
    pool = opened(of, image, read_only=True)
    before = check_filesystem(pool)
    pool = opened(of, image, read_only=False)
    failures: list[str] = []
    repair_filesystem(
        pool,
        before,
        lambda problem, failure: failures.append(failure) if failure else None,
        force=True,
    )
    medium = pool.medium
    assert isinstance(medium, GuardedMedium)
    result = bytes(medium.memory)
    pool = opened(of, result, read_only=True)
    after = check_filesystem(pool)
    if after.has_errors:
        if all(problem.remedy is None for problem in after.problems if problem.is_error):
            return "check: beyond repair", result
        if any("space" in failure for failure in failures):
            return "check: no space to repair", result
        if any("has a transformation" in failure for failure in failures):
            return "check: of a newer program", result
        raise AssertionError(f"repaired, and not without errors: {sentences(after)}, {failures}")
    if after.leaked_frames:
        raise AssertionError(f"repaired, and leaking: {sentences(after)}, {failures}")
    fs = mounted(opened(of, result, read_only=False))
    _, _, errors = walk(fs)
    if errors:
        raise AssertionError(f"repaired, and not readable: {errors}")
    return "check: repaired" if before.has_errors else "check: clean", result


def sentences(verdict: Verdict) -> list[str]:
    """What a check has found."""
    return [f"{problem.what} {problem.inode}: {problem.sentence}" for problem in verdict.problems]


def checked(of: Base, image: bytes) -> str:
    """Check, and repair nothing; what was found."""
    verdict = check_filesystem(opened(of, image, read_only=True))
    return "check: errors" if verdict.has_errors else "check: clean"


def attempt(seed: int) -> tuple[str, str]:
    """One try; what became of the mount and of the check, or (it takes longest) of the repair."""
    of, image, _ = mutated(seed)
    rng = random.Random(seed)
    with same_every_time(rng):
        return use(of, image, rng, read_only=rng.random() < 0.25), (
            checked(of, image) if seed % REPAIR_EVERY else repaired(of, image)[0]
        )


def too_slow(*_: object) -> None:
    """For SIGPROF: a try that waits for the machine is not slow."""
    raise TooSlow(f"after {TRY_SECONDS} seconds of work")


def main() -> int:
    """Run tries, and print what became of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first try")
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--keep-going", action="store_true", help="after a failure")
    options = parser.parse_args()
    logging.disable()
    signal.signal(signal.SIGPROF, too_slow)
    run = Run(options.seed)
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)
    for seed in range(options.seed, options.seed + options.tries):
        run.attempt(seed)
        if run.is_stopped or (run.failed and not options.keep_going) or run.failed >= 50:
            break
        if run.tries % 1000 == 0:
            print(run.summary(), flush=True)
    print(run.summary())
    for outcome, count in run.outcomes.most_common():
        print(f"{count:9} {outcome}")
    return 1 if run.failed else 0


class Run:
    """Tries one after the other, until somebody stops it."""

    def __init__(self, first_seed: int) -> None:
        self.first_seed = first_seed
        self.outcomes: Counter[str] = Counter()
        self.tries = self.failed = 0
        self.is_stopped = False
        self._started = time.monotonic()

    def attempt(self, seed: int) -> None:
        """One try, with a traceback where it fails."""
        self.tries += 1
        signal.setitimer(signal.ITIMER_PROF, TRY_SECONDS)
        try:
            self.outcomes.update(attempt(seed))
        except BaseException:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.failed += 1
            print(f"seed {seed}, {mutated(seed)[2]}:")
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)

    def stop(self, *_: object) -> None:
        """For signals: end after this try."""
        self.is_stopped = True

    def summary(self) -> str:
        """How far it is."""
        seconds = time.monotonic() - self._started
        return (
            f"{self.tries} tries from seed {self.first_seed} in {seconds:.0f} s, "
            f"{self.failed} failed"
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
