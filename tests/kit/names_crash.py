"""Pulls the power in operations on names that a worker carries out, and judges what is left.

A `NativeWorld` is what `fs_crash.World` is for the control plane: the worker records each store,
flush and fence, and the recording medium makes of these all that a power failure could leave.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kit.data_plane import ALL, share_files
from kit.fs_crash import (
    DIRECTORY,
    FILE,
    FRAME,
    Judge,
    Moment,
    Tree,
    World,
    built,
    file_system,
    on_medium,
    snapshot,
    write,
)
from kit.fs_operations import fill_log, standard
from kit.native_names import Answered, NativeNames, create_in, mkdir_in, rename_in
from pmemfs.engine.sharing import share_pool
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.pool import Pool
from pmemfs.volume.fs.filesystem import FileSystem

CACHE_LINES = 1
"""As the header of the shared memory has it."""


@dataclass(frozen=True)
class NativeOp:
    """An operation of a worker, on a path. A new name is one in the same directory, or in `to`."""

    opcode: Opcode
    path: str
    new: str = ""
    flags: int = 0
    to: str | None = None

    def ask(self, native: NativeNames, fs: FileSystem) -> Answered | None:
        """Let the worker do it; None if it hands over."""
        directory, _, name = self.path.rpartition("/")
        number, raw = _walk(fs, directory), name.encode()
        if self.opcode is Opcode.SETATTR:
            number, operation = fs.lookup(number, raw), _chmod_in(0o600)
        elif self.opcode is Opcode.CREATE:
            operation = create_in(raw)
        elif self.opcode is Opcode.MKDIR:
            operation = mkdir_in(raw)
        elif self.opcode is Opcode.RENAME2:
            target = number if self.to is None else _walk(fs, self.to)
            operation = rename_in(raw, self.new.encode(), target, self.flags)
        else:
            operation = raw + b"\0"
        return native.ask(self.opcode, number, operation)


def _walk(fs: FileSystem, path: str) -> int:
    number = ROOT
    for part in path.split("/"):
        number = fs.lookup(number, part.encode()) if part else number
    return number


def _chmod_in(mode: int) -> bytes:
    return wire.SETATTR_IN.pack(
        wire.SETS_MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, mode, 0, 0
    )  # fmt: skip


def roomy(w: World) -> None:
    """As `standard`, and the log of each directory has been moved into a frame."""
    standard(w)
    for path in ("", "d", "e"):
        for at in range(6):
            w.fs.make(w.ino(path), b"%d" % at, FILE)
        for at in range(6):
            w.fs.unlink(w.ino(path), b"%d" % at)


@functools.cache
def roomy_image() -> bytes:
    """The image of `roomy`."""
    return built(roomy)


def full(w: World) -> None:
    """Logs that have no room: in their slots (`i`, `i/f`), in a frame (`m`), or only for one slot
    more (`o`)."""
    fs = w.fs
    a = fs.make(ROOT, b"a", FILE)
    for name in (b"i", b"m", b"o"):
        fs.make(ROOT, name, DIRECTORY)
    fs.make(*w.at("i/f"), FILE)
    fs.make(*w.at("i/g"), FILE)
    fs.link(a, *w.at("i/f2"))
    fs.rename(*w.at("i/f2"), *w.at("i/g"))
    write(w, "i/f", 0, 6000)
    for path in ("m", "o"):
        for at in range(8):
            fs.link(a, w.ino(path), b"%d" % at)
    fs.make(*w.at("m/v"), FILE)
    for path in ("i", "i/f"):
        fill_log(w, w.ino(path), inline=True)
    fill_log(w, w.ino("m"))
    log = fs.inode(w.ino("o"))
    while log.log.tail % FRAME != FRAME - 64:
        fs.set_attributes(log.number, mode=0o700 + log.log.slot_count % 2)


@functools.cache
def full_image() -> bytes:
    """The image of `full`."""
    return built(full)


@contextmanager
def native_on(image: bytes, directory: Path) -> Iterator[NativeNames]:
    """A worker over a pool that begins with an image, in which all inodes with names are held."""
    path = directory / f"pool-{os.getpid()}"
    path.write_bytes(image)
    medium = MappedMedium.open(str(path))
    pool = Pool.open(medium)
    pool.begin_mount()
    shared = share_pool(pool, worker_count=1, has_files=True)
    shared.set_header_word("answered", ALL)
    shared.set_header_word("durability", CACHE_LINES)
    try:
        native = NativeNames(share_files(pool, shared))
        for number in snapshot(native.fs):
            native.fs.hold(number)
        yield native
    finally:
        shared.close()
        medium.close()
        path.unlink()


class NativeWorld:
    """A worker whose power fails. `left_out` is the number of a flush or fence that is forgotten,
    from 1 on, counted over all operations."""

    def __init__(self, native: NativeNames, *, limit: int, left_out: int = 0) -> None:
        self.native = native
        self.limit = limit
        self.left_out = left_out
        self.calls = 0
        """How many flushes and fences there were."""
        self.image = self.stored()
        self.medium = RecordingMedium(self.image)
        self.pool = on_medium(Pool.open(RecordingMedium(self.image)), self.medium)
        self.judge = Judge(on_medium(self.pool, RecordingMedium(self.image)))
        self.violations: list[str] = []
        self.tree = self.seen()

    def stored(self) -> bytes:
        """What the pool holds."""
        medium = self.native.files.medium
        return bytes(medium.read(0, medium.size_bytes))

    def seen(self) -> Tree:
        """What another process reads."""
        return snapshot(file_system(self.pool))

    def run(self, op: NativeOp, *, looks: bool = True) -> Answered:
        """An operation, looked at while it runs and when it has returned."""
        before, moments = self.tree, []
        worker = self.native.worker
        worker.record(left_out=max(0, self.left_out - self.calls))
        answered = op.ask(self.native, file_system(self.pool))
        assert answered is not None, f"{op} was handed over"
        calls, count, _ = worker.recorded()
        self.calls += count
        self.medium.at_each_fence = lambda: moments.append(Moment.of(self.medium))
        play(self.medium, calls)
        assert bytes(self.medium.read(0, self.medium.size_bytes)) == self.stored()
        self.tree = self.seen()
        if looks:
            for legal, seen in (((before, self.tree), moments), ((self.tree,), None)):
                for moment in [Moment.of(self.medium)] if seen is None else seen:
                    for why in self.judge.why_not(moment, legal, {}, True, self.limit):
                        self.violations.append(f"{op}: {why}")
        return answered


def play(
    medium: RecordingMedium, calls: Sequence[tuple[int, bytes] | tuple[int, int] | None]
) -> None:
    """Do what a worker has recorded to a medium."""
    for call in calls:
        if call is None:
            medium.fence()
        elif isinstance(call[1], bytes):
            medium.store(call[0], call[1])
        else:
            medium.flush(*call)


OPERATIONS = (
    NativeOp(Opcode.CREATE, "new"),
    NativeOp(Opcode.CREATE, "d/" + "n" * 200),
    NativeOp(Opcode.MKDIR, "e/new"),
    NativeOp(Opcode.UNLINK, "b"),
    NativeOp(Opcode.UNLINK, "d/l"),
    NativeOp(Opcode.RMDIR, "e"),
    NativeOp(Opcode.RENAME2, "d/x", "y"),
    NativeOp(Opcode.RENAME2, "a", "s"),
    NativeOp(Opcode.RENAME2, "d", "e"),
    NativeOp(Opcode.RENAME2, "a", "c", 1),
    NativeOp(Opcode.RENAME2, "d/x", "y", to="e"),
    NativeOp(Opcode.RENAME2, "a", "x", to="d"),
    NativeOp(Opcode.RENAME2, "e", "e", to="d"),
    NativeOp(Opcode.SETATTR, "a"),
)
"""Each of them has room in all logs of `roomy_image`."""
IN_FULL_LOGS = (
    NativeOp(Opcode.CREATE, "i/new"),
    NativeOp(Opcode.UNLINK, "i/f"),
    NativeOp(Opcode.RENAME2, "i/f", "g"),
    NativeOp(Opcode.CREATE, "m/new"),
    NativeOp(Opcode.MKDIR, "m/" + "n" * 200),
    NativeOp(Opcode.UNLINK, "m/3"),
    NativeOp(Opcode.RENAME2, "m/3", "v"),
    NativeOp(Opcode.RENAME2, "o/3", "new"),
    NativeOp(Opcode.RENAME2, "o/3", "n" * 200),
    NativeOp(Opcode.RENAME2, "i/f", "new", to="m"),
    NativeOp(Opcode.RENAME2, "i/f", "v", to="m"),
    NativeOp(Opcode.RENAME2, "i", "new", to="m"),
    NativeOp(Opcode.SETATTR, "i/f"),
)
"""In `full_image`, each of them has a log that goes on in a new frame."""
