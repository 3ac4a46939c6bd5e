"""A second writer of a file system: plays a worker that changes names behind the daemon's back.

`TwoWriters` are two file systems over one pool, by the protocol of `dataplane/names.pxd`: only one
of them runs at a time, the worker takes slots and frames only from the stacks of the daemon, and
says which inodes it has changed. The worker is the Python file system, too, so it changes more than
a native one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kit.fs_tree import Tree
from pmemfs.media.filesystem import Geometry
from pmemfs.media.inode import read_free_slot
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.catchup import CatchUp
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.holds import OwnHolds
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.publication import NoTables
from pmemfs.volume.fs.reserves import Reserves


class PlainStack:
    """A stack in this process."""

    def __init__(self, room: int = 4096) -> None:
        self._numbers: list[int] = []
        self.room = room

    @property
    def count(self) -> int:
        return len(self._numbers)

    def push(self, numbers: Sequence[int]) -> None:
        assert len(self._numbers) + len(numbers) <= self.room
        assert not set(numbers) & set(self._numbers)
        self._numbers += numbers

    def pop(self, count: int) -> list[int]:
        count = min(count, len(self._numbers))
        taken = self._numbers[len(self._numbers) - count :]
        del self._numbers[len(self._numbers) - count :]
        return taken[::-1]

    def numbers(self) -> list[int]:
        return list(self._numbers)


class StackAllocator(Allocator):
    """Takes frames from a stack, and puts back there what is freed."""

    stack: PlainStack

    def allocate(
        self, frame_count: int, *, goal: int = 0, whole: bool = False, urgent: bool = False
    ) -> list[Run]:
        if frame_count > self.stack.count:
            raise OSError(28, "the reserve is empty")
        return [Run(pfn, 1) for pfn in self.stack.pop(frame_count)]

    def free(self, runs: Iterable[Run]) -> None:
        for run in runs:
            self.stack.push(range(run.pfn, run.pfn + run.frame_count))

    def is_tight(self, wanted: int) -> bool:
        return False


class Told(NoTables):
    """Notes which inodes were changed, and whose logs were replaced."""

    def __init__(self) -> None:
        self.changes: list[int] = []
        self.replaced: set[int] = set()

    def touched(self, number: int, changed_ns: int) -> None:
        self.changes.append(number)

    def gone(self, number: int) -> object | None:
        self.changes.append(number)
        return None

    def rewritten(self, number: int) -> None:
        self.replaced.add(number)


class TwoWriters:
    """A daemon's file system and a worker's."""

    def __init__(self) -> None:
        self.tree = Tree()
        holds = OwnHolds()
        self.of_daemon, self.of_worker = Told(), Told()
        self.daemon = FileSystem(self.tree.pool, NoMemmap(), self.of_daemon, holds)
        self.daemon.store.begin_writing()
        ground = self.daemon.store.ground
        while self.daemon.search_on():
            pass
        self.slots, self.frames = PlainStack(), PlainStack()
        self.reserves = ground.reserves = Reserves(
            ground.medium, ground.allocator, ground.table, self.slots, self.frames
        )
        self.worker = FileSystem(self.tree.pool, NoMemmap(), self.of_worker, holds)
        self._let_take_from_stacks(self.worker, ground.geometry)
        self.refill()

    def refill(self) -> None:
        """Hand out what is missing."""
        while self.reserves.keep_some():
            pass

    def _let_take_from_stacks(self, worker: FileSystem, geometry: Geometry) -> None:
        ground = worker.store.ground
        allocator = StackAllocator(ground.medium, geometry)
        allocator.stack = self.frames
        ground.allocator = worker.store.allocator = worker.allocator = allocator
        ground.busy._allocator = allocator
        ground.may_have_leaks = False
        table = ground.table

        def take() -> tuple[int, int]:
            if not self.slots.count:
                raise OSError(28, "the reserve is empty")
            [slot] = self.slots.pop(1)
            generation = read_free_slot(ground.medium.read(slot, 64))
            assert generation is not None
            return slot, generation

        def give_back(slot: int) -> None:
            self.slots.push([slot])

        table.take, table.give_back = take, give_back  # type: ignore[method-assign]

    @contextmanager
    def turn(self, *, of_worker: bool, lost: bool = False) -> Iterator[FileSystem]:
        """Let one of them have the lock; `lost` says that it has missed which inodes changed."""
        if of_worker:
            own, other, told = self.worker, self.of_daemon, self.of_worker
            for number in self.of_daemon.replaced:
                # As a worker that finds another version.
                self.worker.store.cache.forget(number)
            self.of_daemon.replaced.clear()
        else:
            own, other, told = self.daemon, self.of_worker, self.of_daemon
        # The daemon does not say which inodes it has changed: a worker compares words.
        all_of_them = lost or of_worker
        CatchUp(own.store).with_changes(None if all_of_them else list(other.changes))
        other.changes.clear()
        made: list[Inode] = []
        keep = own.store.cache.keep

        def note(inode: Inode) -> None:
            made.append(inode)
            keep(inode)

        own.store.keep = note
        yield own
        own.store.keep = keep
        told.changes += [inode.number for inode in made]


def described(inode: Inode) -> dict[str, object]:
    """All that an inode is, as its log says."""
    log = inode.log
    return {
        "state": inode.state, "xattrs": inode.xattrs, "extents": list(inode.extents),
        "pieces": dict(inode.pieces), "entries": list(inode.entries.items()),
        "target": inode.target, "parent": inode.parent, "live_slots": inode.live_slots,
        "subdirectories": inode.subdirectory_count, "transform": inode.transform,
        "log": (log.head, log.tail, list(log.frames), log.slot_count),
        "generation": inode.generation, "birth_ns": inode.birth_ns,
    }  # fmt: skip
