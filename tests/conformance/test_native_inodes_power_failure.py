"""The power fails, or a kill comes, everywhere in what a worker does to inodes and small files.

One part forgets each flush and fence in turn.
"""

from __future__ import annotations

import itertools
import os
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from kit.fs_crash import snapshot
from kit.inodes_crash import InodeOp, InodesWorld
from kit.names_crash import native_on, roomy_image
from kit.native_names import NativeNames
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.filesystem import FileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRAME = 4096
NEW = (InodeOp(Opcode.CREATE, "new"), InodeOp(Opcode.WRITE, "new", 0, 5000))
MORE = InodeOp(Opcode.WRITE, "new", 4990, 9000)
GONE = (InodeOp(Opcode.UNLINK, "s"), InodeOp(Opcode.FORGET, "s"))
STORIES: tuple[tuple[InodeOp, ...], ...] = (
    (*NEW, InodeOp(Opcode.RELEASE, "new")),
    (*NEW, MORE, InodeOp(Opcode.WRITE, "new", 13990, 5000), InodeOp(Opcode.FSYNC, "new")),
    (*NEW, InodeOp(Opcode.FSYNC, "new"), InodeOp(Opcode.WRITE, "new", 4990, 100)),
    (InodeOp(Opcode.WRITE, "a", 0, 3), InodeOp(Opcode.WRITE, "a", 3, 4000)),
    (InodeOp(Opcode.SETATTR, "a"), InodeOp(Opcode.WRITE, "a", 0, 3), InodeOp(Opcode.SETATTR, "a")),
    (*NEW, InodeOp(Opcode.SETATTR, "new"), InodeOp(Opcode.RELEASE, "new")),
    # What was freed is used again.
    (*GONE, *NEW, InodeOp(Opcode.FSYNC, "new")),
    (*NEW, InodeOp(Opcode.UNLINK, "new"), InodeOp(Opcode.FORGET, "new"),
     InodeOp(Opcode.RELEASE, "new"), InodeOp(Opcode.CREATE, "again"),
     InodeOp(Opcode.WRITE, "again", 0, 3 * FRAME), InodeOp(Opcode.FSYNC, "again")),
)  # fmt: skip


def violations(
    ops: Sequence[InodeOp], directory: Path, *, limit: int, left_out: int = 0
) -> tuple[list[str], int, int]:
    """What is wrong after a power failure somewhere; flushes and fences, and the states that were
    looked at."""
    with native_on(roomy_image(), directory) as native:
        world = InodesWorld(native, limit=limit, left_out=left_out)
        for op in ops:
            world.do(op)
        return world.violations, world.calls, world.judge.states


@pytest.mark.parametrize(
    "story", STORIES, ids=lambda story: " ".join(op.opcode.name for op in story)
)
def test_each_request_is_served_wholly_or_not_at_all(story: Sequence[InodeOp], shm: Path) -> None:
    found, _, states = violations(story, shm, limit=40)
    assert found == []
    assert states > 10


SYNC = InodeOp(Opcode.FSYNC, "new")


@pytest.mark.parametrize(
    ("before", "op", "after"),
    [
        (NEW, SYNC, ()),
        (NEW, InodeOp(Opcode.RELEASE, "new"), ()),
        ((), InodeOp(Opcode.SETATTR, "a"), ()),
        ((), InodeOp(Opcode.WRITE, "a", 0, 3000), (InodeOp(Opcode.FSYNC, "a"),)),
    ],
    ids=lambda part: part.opcode.name if isinstance(part, InodeOp) else "",
)
def test_without_any_one_flush_or_fence_something_goes_wrong(
    before: Sequence[InodeOp], op: InodeOp, after: Sequence[InodeOp], shm: Path
) -> None:
    assert unnoticed(before, op, after, shm) == []


def test_a_first_write_needs_no_fence_at_its_end(shm: Path) -> None:
    """Each commit ends with one. A write is durable with the next sync, which has its own."""
    missed = unnoticed(NEW[:1], NEW[1], (SYNC,), shm)
    assert len(missed) == 1


def test_neither_does_one_at_the_end_of_a_file(shm: Path) -> None:
    missed = unnoticed((*NEW, SYNC), MORE, (SYNC,), shm)
    assert len(missed) == 1


def test_freeing_needs_the_journal_only_by_its_rule(shm: Path) -> None:
    """The slot is given to another inode only through the journal, which replaces what an older one
    says of it. But a fence comes before the frames are another file's."""
    # The frames come to another file, and the journal is used again.
    after = (InodeOp(Opcode.UNLINK, "b"), NEW[1], SYNC)
    missed = unnoticed((NEW[0], GONE[0]), GONE[1], after, shm)
    # The flush of the journal, and the fence behind it.
    assert len(missed) == 2
    assert missed[1] == missed[0] + 1


def unnoticed(
    before: Sequence[InodeOp], op: InodeOp, after: Sequence[InodeOp], directory: Path
) -> list[int]:
    """The flushes and fences of a request that may be missing."""
    story = (*before, op, *after)
    with native_on(roomy_image(), directory) as native:
        world = InodesWorld(native, limit=1)
        for earlier in before:
            world.do(earlier, looks=False)
        first = world.calls
        world.do(op, looks=False)
        last = world.calls
    assert last > first
    return [
        call
        for call in range(first + 1, last + 1)
        if not violations(story, directory, limit=40, left_out=call)[0]
    ]


def killed(world: InodesWorld, op: InodeOp, step: int) -> bool:
    """Let another process do it, and kill that before a step; whether it came so far."""
    child = os.fork()
    if not child:
        world.native.worker.record(killed_before=step)
        op.ask(world)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def owned(fs: FileSystem, native: NativeNames) -> list[int]:
    """The frames of all inodes and of the reserve."""
    frames = native.names.frames.numbers()
    for number in snapshot(fs):
        runs = fs.inode(number).runs() if number != ROOT else []
        frames += [pfn for run in runs for pfn in range(run.pfn, sum(run))]
    return frames


@pytest.mark.parametrize(
    ("before", "op"),
    [(NEW[:1], NEW[1]), ((), InodeOp(Opcode.SETATTR, "a")), (GONE[:1], GONE[1])],
    ids=["write", "setattr", "free"],
)
def test_after_a_kill_nothing_belongs_to_two(
    before: Sequence[InodeOp], op: InodeOp, shm: Path
) -> None:
    outcomes = []
    for step in itertools.count(1):
        with native_on(roomy_image(), shm) as native:
            world = InodesWorld(native, limit=1)
            for earlier in before:
                world.do(earlier, looks=False)
            tree, reserve = snapshot(native.anew()), set(native.names.frames.numbers())
            if not killed(world, op, step):
                break
            anew = FileSystem(native.files.pool, NoMemmap())
            decision, found = native.decision, snapshot(anew)
            word = int.from_bytes(anew.medium.read(decision.offset, 8), "little")
            counts = decision.offset != 0 and word == decision.value
            frames = owned(anew, native)
            assert len(frames) == len(set(frames))
            if op.opcode is Opcode.WRITE:
                popped = set(struct.unpack("<16Q", decision.popped)[: decision.popped_count])
                if counts:
                    assert popped <= set(frames) | {*native.names.frames.numbers()}
                else:
                    assert found == tree
                    assert {*native.names.frames.numbers(), *popped} == reserve
                # An answer only once the size is there.
                if decision.state == 2:
                    assert found[world.numbers["new"]].size_bytes == 5000
            elif op.opcode is Opcode.SETATTR and not counts:
                assert found == tree
            elif op.opcode is Opcode.FORGET:
                assert found == tree
                is_gone = anew.store.table.head(world.numbers["s"]) is None
                assert is_gone == counts
            outcomes.append((counts, decision.state))
    assert {counts for counts, _ in outcomes} == {False, True}
    # Begun and carried out, and yet not answered: something was left to do.
    assert ((True, 1) in outcomes) or op.opcode is Opcode.FORGET
