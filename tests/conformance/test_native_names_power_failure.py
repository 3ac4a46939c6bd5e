"""The power fails, or a kill comes, everywhere in what a worker does to names.

`names_crash` has the rules. The last part forgets each flush and fence in turn.
"""

from __future__ import annotations

import itertools
import os
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kit.fs_crash import Tree, snapshot
from kit.names_crash import (
    IN_FULL_LOGS,
    OPERATIONS,
    NativeOp,
    NativeWorld,
    full_image,
    native_on,
    roomy_image,
)
from kit.native_names import HANDLES, OPEN_FLAGS, NativeNames
from pmemfs.dataplane.layouts import OPEN_PLACE, OpenPlace
from pmemfs.fuse import wire
from pmemfs.fuse.encode import entry_out
from pmemfs.fuse.wire import Opcode
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.filesystem import FileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENTRY_BYTES = wire.ENTRY_OUT.size + wire.ATTR.size
AFTER = (
    NativeOp(Opcode.CREATE, "after"),
    NativeOp(Opcode.RENAME2, "after", "later"),
    NativeOp(Opcode.SETATTR, "later"),
)
"""These use the journal again, and not."""


EVERY = [(op, roomy_image) for op in OPERATIONS] + [(op, full_image) for op in IN_FULL_LOGS]
"""Operations, and the images in which they are carried out."""
Image = Callable[[], bytes]
each_one = pytest.mark.parametrize(
    ("op", "image"), EVERY, ids=lambda value: str(value)[:80] if isinstance(value, NativeOp) else ""
)


def violations(
    ops: Sequence[NativeOp], image: Image, directory: Path, *, limit: int, left_out: int = 0
) -> tuple[list[str], int, int]:
    """What is wrong after a power failure somewhere; flushes and fences of the first operation, and
    the states that were looked at."""
    with native_on(image(), directory) as native:
        world = NativeWorld(native, limit=limit, left_out=left_out)
        world.run(ops[0])
        calls = world.calls
        for op in ops[1:]:
            world.run(op)
        return world.violations, calls, world.judge.states


def test_each_operation_is_there_wholly_or_not_at_all(shm: Path) -> None:
    states = 0
    for op, image in EVERY:
        found, _, count = violations([op, *AFTER], image, shm, limit=40)
        assert found == []
        states += count
    assert states > 100 * len(EVERY)


def test_so_is_each_of_two(shm: Path) -> None:
    possible = [op for op in OPERATIONS if op.opcode is not Opcode.SETATTR]
    for first, second in itertools.product(possible, possible):
        if {first.path, first.new} & {second.path, second.new, second.path[:1], second.to} - {""}:
            continue
        assert violations([first, second], roomy_image, shm, limit=12)[0] == []


@each_one
def test_without_any_one_flush_or_fence_something_goes_wrong(
    op: NativeOp, image: Image, shm: Path
) -> None:
    _, calls, _ = violations([op], image, shm, limit=1)
    unnoticed = [
        call
        for call in range(1, calls + 1)
        if not violations([op, *AFTER], image, shm, limit=40, left_out=call)[0]
    ]
    assert unnoticed == []


def killed(native: NativeNames, op: NativeOp, step: int) -> bool:
    """Let another process do it, and kill that before a step; whether it came so far."""
    child = os.fork()
    if not child:
        native.worker.record(killed_before=step)
        answered = op.ask(native, native.fs)
        os._exit(0 if answered is not None else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def without_times(tree: Tree) -> dict[int, tuple[object, ...]]:
    """A tree without what differs from one run to the next."""
    return {
        number: (node.fixed[:7], node.fixed[8:], node.size_bytes, node.content)
        for number, node in tree.items()
    }


@each_one
def test_after_a_kill_the_decision_says_what_became_of_it(
    op: NativeOp, image: Image, shm: Path
) -> None:
    with native_on(image(), shm) as native:
        assert op.ask(native, native.fs) is not None
        assert bool(native.decision.popped_count) == (op in IN_FULL_LOGS)
        after = without_times(snapshot(native.anew()))
    outcomes = []
    for step in itertools.count(1):
        with native_on(image(), shm) as native:
            before = snapshot(native.anew())
            names = native.names
            reserves = [
                set(stack.numbers()) for stack in (names.slots, names.handles, names.frames)
            ]
            if not killed(native, op, step):
                break
            # This carries out the journal.
            anew = FileSystem(native.files.pool, NoMemmap())
            decision = native.decision
            is_carried_out = decision.state == 2 or (
                decision.state == 1
                and decision.offset != 0
                and int.from_bytes(anew.medium.read(decision.offset, 8), "little") == decision.value
            )
            outcomes.append(is_carried_out)
            found = snapshot(anew)
            if not is_carried_out:
                assert found == before
                # Nothing that was taken is lost.
                frames = struct.unpack_from(f"<{decision.popped_count}Q", decision.popped)
                assert [
                    {*names.slots.numbers(), decision.slot} - {0},
                    {*names.handles.numbers(), decision.handle} - {0},
                    {*names.frames.numbers(), *frames},
                ] == reserves
                continue
            assert without_times(found) == after
            check_answer(native, op, anew)
    # It is decided once, and not at the very start or end.
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def check_answer(native: NativeNames, op: NativeOp, anew: FileSystem) -> None:
    """The decision has the answer, and what the answer says is held."""
    decision = native.decision
    answer = decision.answer[: decision.length]
    assert decision.error == 0
    assert decision.opcode == op.opcode
    if op.opcode in (Opcode.CREATE, Opcode.MKDIR):
        assert answer[:ENTRY_BYTES] == entry_out(anew.attributes(decision.inode))
    elif op.opcode is not Opcode.SETATTR:
        assert answer == b""
    if op.opcode is Opcode.MKDIR:
        assert native.fs.store.is_held(decision.inode)
    if op.opcode is Opcode.CREATE:
        assert native.files.shared.lookup_counts.count(decision.inode) == 2
        (place,) = places_of(native, decision.inode)
        assert place.handle == decision.handle
        assert answer[ENTRY_BYTES:] == wire.OPEN_OUT.pack(decision.handle, OPEN_FLAGS)


def places_of(native: NativeNames, number: int) -> list[OpenPlace]:
    """The open places of an inode."""
    opens = native.files.shared.opens
    size = OPEN_PLACE.size_bytes
    places = (
        OPEN_PLACE.unpack(opens[at * size : at * size + size]) for at in range(2 * HANDLES + 1)
    )
    return [place for place in places if place.inode == number]
