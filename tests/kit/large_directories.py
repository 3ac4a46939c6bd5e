"""Directories of very many entries, made quickly: by records, not by operations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import Task

from pmemfs.media import log as media
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

DIRECTORY = NewInode(0o40755, 0, 0)
FILE = NewInode(0o100644, 0, 0)
RECORDS_A_FRAME = 63
_AT_ONCE = 20_000


def new_pool(path: Path, size_bytes: int) -> None:
    """A pool of mode `fs` in a sparse file."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    medium = MappedMedium.open(str(path))
    try:
        FileSystem.format(Pool.create(medium, PoolSpec("large", scheme=Scheme.NONE, mode=Mode.FS)))
    finally:
        medium.close()


@contextmanager
def opened(path: Path) -> Iterator[FileSystem]:
    """The file system of a pool, as its daemon has it; clean afterwards."""
    medium = MappedMedium.open(str(path))
    try:
        pool = Pool.open(medium)
        pool.begin_mount()
        fs = FileSystem(pool, NoMemmap())
        yield fs
        fs.end()
        pool.end_mount()
    finally:
        medium.close()


def large_directory(fs: FileSystem, parent: int, name: bytes, count: int) -> int:
    """A directory of so many entries, `n0` and so on, which all lead to one file."""
    directory = fs.inode(fs.make(parent, name, DIRECTORY))
    file = fs.inode(fs.make(directory.number, b"n0", FILE))
    for first in range(1, count, _AT_ONCE):
        add_names(fs, directory.number, file.number, range(first, min(count, first + _AT_ONCE)))
    state = file.state.replaced(link_count=count)
    with fs.store.change() as change:
        change.append(file, state.pack())
    file.state = state
    return directory.number


def add_names(fs: FileSystem, directory: int, file: int, numbers: Sequence[int]) -> None:
    """Names that lead to a file, all in one transaction."""
    inode = fs.inode(directory)
    now_ns = time.time_ns()
    names = [b"n%d" % at for at in numbers]
    with fs.store.change() as change:
        change.append(inode, *[media.pack_entry(name, file, 8, now_ns) for name in names])
    for name in names:
        inode.add_entry(name, file, 8)
    inode.state.modified_ns = inode.state.changed_ns = now_ns


def remove_names(fs: FileSystem, directory: int, numbers: Sequence[int]) -> None:
    """Names that are removed, all in one transaction."""
    inode = fs.inode(directory)
    now_ns = time.time_ns()
    names = [b"n%d" % at for at in numbers]
    with fs.store.change() as change:
        change.append(inode, *[media.pack_entry(name, 0, 0, now_ns) for name in names])
    for name in names:
        inode.remove_entry(name)
    inode.state.modified_ns = inode.state.changed_ns = now_ns


class Stretches(trio.abc.Instrument):
    """Counts how much is done between two awaits: what all others have to wait for."""

    def __init__(self) -> None:
        self.count = self.longest = self.total = 0
        self.longest_seconds = 0.0
        self._before = 0.0

    def before_task_step(self, task: Task) -> None:
        self.count = 0
        self._before = time.process_time()

    def after_task_step(self, task: Task) -> None:
        self.longest = max(self.longest, self.count)
        self.total += self.count
        if self.count:
            seconds = time.process_time() - self._before
            self.longest_seconds = max(self.longest_seconds, seconds)

    def count_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count the records that are read."""
        apply = Replay.apply

        def counted(replay: Replay, records: list[tuple[int, bytes]]) -> None:
            self.count += len(records)
            apply(replay, records)

        monkeypatch.setattr(Replay, "apply", counted)


def forget_all(fs: FileSystem) -> None:
    """Let nothing be in memory that need not."""
    fs.store.ground.clock += 100
    while fs.store.housekeeping.drop_idle():
        pass


assert ROOT == 1
