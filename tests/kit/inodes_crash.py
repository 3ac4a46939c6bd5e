"""Pulls the power in what a worker does to inodes and small files, and judges what is left.

As `names_crash`; bytes that were written and not made durable may be there or not, as `fs_crash`
says.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass

from kit.fs_crash import Moment, Tree, Versions, file_system
from kit.names_crash import NativeWorld, play
from kit.native_names import NativeNames, create_in
from pmemfs.dataplane.native import Responder
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.volume.fs.filesystem import FileSystem

MTIME_NS = 1_234_567_890_987_654_321


@dataclass(frozen=True)
class InodeOp:
    """A request about an inode in the root; `at` and `length` are for WRITE."""

    opcode: Opcode
    name: str
    at: int = 0
    length: int = 0

    def ask(self, world: InodesWorld) -> None:
        """Let the worker do it."""
        worker, name = world.native.worker, self.name.encode()
        if self.opcode in (Opcode.CREATE, Opcode.UNLINK):
            is_made = self.opcode is Opcode.CREATE
            asked = create_in(name, flags=os.O_RDWR) if is_made else name + b"\0"
            verdict, error, data = worker.answer(asked, opcode=self.opcode, inode=ROOT)
            if is_made:
                world.numbers[self.name] = int.from_bytes(data[:8], "little")
                at = wire.ENTRY_OUT.size + wire.ATTR.size
                world.handles[self.name] = int.from_bytes(data[at : at + 8], "little")
        else:
            verdict, error = self._ask_of_inode(world, worker)
        wanted = "drop" if self.opcode is Opcode.FORGET else "answer"
        assert (verdict, error) == (wanted, 0), f"{self}: {verdict} {errno.errorcode.get(error)}"

    def _ask_of_inode(self, world: InodesWorld, worker: Responder) -> tuple[str, int]:
        handle, data = world.handles.get(self.name, 0), b""
        if self.opcode is Opcode.WRITE:
            data = world.data(self.length)
            operation = wire.WRITE_IN.pack(handle, self.at, self.length, 0, 0, 0)
        elif self.opcode is Opcode.FSYNC:
            operation = wire.FSYNC_IN.pack(handle, 0)
        elif self.opcode is Opcode.RELEASE:
            operation = wire.RELEASE_IN.pack(handle, 0, 0, 0)
        elif self.opcode is Opcode.FORGET:
            operation = wire.FORGET_IN.pack(1)
        else:
            seconds, ns = divmod(MTIME_NS, 10**9)
            valid = wire.SETS_MTIME | wire.SETS_UID
            operation = wire.SETATTR_IN.pack(
                valid, 0, 0, 0, 0, seconds, 0, 0, ns, 0, 0, 77, 0
            )  # fmt: skip
        verdict, error, _ = worker.answer(
            operation, opcode=self.opcode, inode=world.numbers[self.name], payload=data
        )
        return verdict, error


class InodesWorld(NativeWorld):
    """A worker whose power fails, and whose writes may not be durable yet."""

    def __init__(self, native: NativeNames, *, limit: int, left_out: int = 0) -> None:
        super().__init__(native, limit=limit, left_out=left_out)
        entries = native.fs.inode(ROOT).entries.items()
        self.numbers = {name.decode(): number for name, (number, _) in entries}
        self.handles: dict[str, int] = {}
        self.volatile: dict[int, Versions] = {}
        self.counter = 0

    def data(self, length: int) -> bytes:
        """Bytes that were in no file before."""
        self.counter += 1
        return (b"%07d|" % self.counter * (length // 8 + 1))[:length]

    def do(self, op: InodeOp, *, looks: bool = True) -> None:
        """A request, looked at while it is served and when it is answered."""
        before, moments = self.tree, []
        worker = self.native.worker
        worker.record(left_out=max(0, self.left_out - self.calls))
        op.ask(self)
        calls, count, _ = worker.recorded()
        self.calls += count
        self.medium.at_each_fence = lambda: moments.append(Moment.of(self.medium))
        play(self.medium, calls)
        self.medium.at_each_fence = lambda: None
        assert bytes(self.medium.read(0, self.medium.size_bytes)) == self.stored()
        self.tree = self.seen()
        relaxed = self._relaxed(op, before)
        if looks:
            for moment in moments:
                self._look(op, moment, (before, self.tree), relaxed)
        if op.opcode in (Opcode.FSYNC, Opcode.RELEASE):
            self.volatile.pop(self.numbers[op.name], None)
        if looks:
            self._look(op, Moment.of(self.medium), (self.tree,), self.volatile)

    def _relaxed(self, op: InodeOp, before: Tree) -> dict[int, Versions]:
        """What files may be while they are written to, and after that."""
        number = self.numbers[op.name]
        if op.opcode is Opcode.WRITE and number not in self.volatile:
            self.volatile[number] = Versions([], set(), set())
            self.volatile[number].add(before[number])
        relaxed = {n: v.copy() for n, v in self.volatile.items()}
        for number, versions in list(self.volatile.items()):
            if number in self.tree:
                versions.add(self.tree[number])
                relaxed[number].add(self.tree[number])
            else:
                del self.volatile[number]
        return relaxed

    def _look(
        self, op: InodeOp, moment: Moment, legal: tuple[Tree, ...],
        relaxed: Mapping[int, Versions],
    ) -> None:  # fmt: skip
        for why in self.judge.why_not(moment, legal, relaxed, True, self.limit):
            self.violations.append(f"{op}: {why}")

    def anew(self) -> FileSystem:
        """What another process finds now."""
        return file_system(self.pool)
