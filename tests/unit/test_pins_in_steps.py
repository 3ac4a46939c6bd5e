"""Pins that take many steps: others are served meanwhile, and the file may change meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.pinning import Pinnable, end, frames, pinnable, run, settled, whole
from pmemfs.fuse.handlers.attributes import AttributeHandlers
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pins import registry
from pmemfs.pins.pin import WantedRange
from pmemfs.units import GIB, MIB
from pmemfs.volume.block import INODE

PAGES = 512
STEP_PAGES = 32


@pytest.fixture(params=("native", "python"))
def fs(
    request: pytest.FixtureRequest, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pinnable]:
    monkeypatch.setattr(registry, "_STEP_PAGES", STEP_PAGES)
    with pinnable("fs", request.param, shm / "pool") as made:
        # Memory under sparse pools is got in a thread, which would count as a step too.
        made.pool.medium.reserved = True
        yield made


class Turns:
    """Counts how often other tasks had their turn."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.count = 0
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


def test_others_are_served_while_a_large_pin_is_made_and_while_it_ends(fs: Pinnable) -> None:
    async def test() -> None:
        number = fs.make("file", PAGES * FRAME_BYTES)
        async with trio.open_nursery() as nursery:
            turns = Turns(nursery)
            await trio.lowlevel.checkpoint()
            before = turns.count
            _, fd = await fs.pin(whole(number))
            assert turns.count - before >= PAGES // STEP_PAGES - 1
            before = turns.count
            end(fd)
            await settled(lambda: fs.all_references() == {})
            assert turns.count - before >= PAGES // STEP_PAGES - 1
            nursery.cancel_scope.cancel()

    run(fs, test)


def test_others_are_served_while_holes_are_filled_for_a_pin(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, filled = fs.fs.allocate, []

    async def test() -> None:
        number = fs.make("file")
        fs.fs.set_attributes(number, size_bytes=12 * MIB)
        async with trio.open_nursery() as nursery:
            turns = Turns(nursery)

            def noted(number: int, offset: int, length: int, *, keep_size: bool) -> None:
                filled.append((length, turns.count))
                allocate(number, offset, length, keep_size=keep_size)

            monkeypatch.setattr(fs.fs, "allocate", noted)
            await trio.lowlevel.checkpoint()
            _, fd = await fs.pin(whole(number), is_writable=True)
            end(fd)
            nursery.cancel_scope.cancel()

    run(fs, test)
    lengths, counts = zip(*filled, strict=True)
    assert sum(lengths) == 12 * MIB
    # To store zeroes takes up to 10 ms a MiB where the memory is new.
    assert max(lengths) <= 4 * MIB
    # Of tasks that can all run, each has one turn a round, in any order.
    assert counts[-1] - counts[0] >= len(counts) - 2


@pytest.mark.parametrize("who", ["statfs", "pin"])
def test_others_are_served_while_the_bitmaps_of_a_large_pool_are_read(shm: Path, who: str) -> None:
    no_files: Any = None

    async def test() -> None:
        number = fs.make("file")
        fs.fs.set_attributes(number, size_bytes=MIB)
        async with trio.open_nursery() as nursery:
            turns = Turns(nursery)
            await trio.lowlevel.checkpoint()
            before = turns.count
            if who == "pin":
                _, fd = await fs.pin(whole(number), is_writable=True)
                end(fd)
            else:
                answer = AttributeHandlers(fs.fs, no_files, None).room()
                assert isinstance(answer, Coroutine)
                room = await answer
                assert room == fs.fs.room()
            assert turns.count - before >= fs.fs.geometry.group_count // 32 - 1
            nursery.cancel_scope.cancel()

    with pinnable("fs", "native", shm / "pool", size_bytes=64 * GIB) as fs:
        run(fs, test)


@pytest.mark.parametrize("how", ["truncate", "unlink and write", "collapse"])
def test_a_pin_whose_file_changes_while_it_is_made_begins_anew(fs: Pinnable, how: str) -> None:
    async def test() -> None:
        number = fs.make("file", PAGES * FRAME_BYTES)
        fs.fs.hold(number)

        async def change() -> None:
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            if how == "truncate":
                fs.fs.set_attributes(number, size_bytes=PAGES * FRAME_BYTES // 2)
            elif how == "collapse":
                fs.fs.collapse(number, 0, FRAME_BYTES)
            else:
                fs.fs.unlink(ROOT, b"file")
                fs.fs.set_attributes(number, size_bytes=0)
                fs.make("other", 100 * FRAME_BYTES)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            pin, fd = await fs.pin(whole(number))
        assert not pin.is_stale
        size = fs.fs.attributes(number).size_bytes
        assert pin.files[0].size_bytes == size
        assert len(frames(pin)) == size // FRAME_BYTES
        assert fs.all_references() == dict.fromkeys(frames(pin), 1)
        end(fd)
        await settled(lambda: fs.all_references() == {})

    run(fs, test)


def test_a_pin_that_is_given_up_drops_what_it_has_taken(fs: Pinnable) -> None:
    async def test() -> None:
        number = fs.make("file", PAGES * FRAME_BYTES)

        async def stop() -> None:
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop)
                await fs.pin(whole(number))
        assert scope.cancelled_caught
        await settled(lambda: not fs.volume.pinned.has(number))
        assert fs.all_references() == {}
        assert (fs.client.pin_count, fs.client.page_count) == (0, 0)

    run(fs, test)


def test_a_file_that_never_stays_as_it_is_is_refused(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_TRIES", 3)

    async def test() -> None:
        number = fs.make("file", PAGES * FRAME_BYTES)

        async def change() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                fs.fs.punch(number, 0, FRAME_BYTES)
                fs.fs.write(number, 0, b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            with pytest.raises(registry.CannotPin, match="go on changing") as caught:
                await fs.pin(whole(number))
            assert caught.value.errno == errno.EAGAIN
            nursery.cancel_scope.cancel()
        await settled(lambda: fs.all_references() == {})

    run(fs, test)


def test_what_is_busy_is_not_looked_at_again_while_it_is_pinned(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        before = fs.free_frames()
        number = fs.make("file", PAGES * FRAME_BYTES)
        _, fd = await fs.pin(WantedRange(number, 0, 2 * FRAME_BYTES))
        _, other = await fs.pin(WantedRange(number, FRAME_BYTES, 100 * FRAME_BYTES))
        fs.fs.unlink(ROOT, b"file")
        fs.fs.tidy()
        fs.fs.tidy()
        assert fs.fs.space().busy_frames == 101
        looks: list[int] = []
        ask = fs.memmap.are_referenced
        monkeypatch.setattr(
            fs.memmap, "are_referenced", lambda *run: looks.append(run[1]) or ask(*run)
        )
        for _ in range(10):
            fs.fs.tidy()
        assert looks == []
        end(fd)
        await settled(lambda: len(fs.pins.living) == 1)
        fs.fs.tidy()
        assert fs.fs.space().busy_frames == 100
        end(other)
        await settled(lambda: fs.fs.space().busy_frames == 0)
        assert sum(looks) < 300
        assert fs.free_frames() == before

    run(fs, test)


def test_a_section_on_demand_stays_while_a_page_of_it_is_pinned(shm: Path) -> None:
    for engine in ("native", "python"):
        with pinnable("block", engine, shm / engine, scheme=Scheme.ON_DEMAND) as at:

            async def test(at: Pinnable = at) -> None:
                pin, fd = await at.pin(WantedRange(INODE, 0, FRAME_BYTES))
                assert at.memmap.drop_idle(0) == 0
                assert at.memmap.drop_idle(0) == 0
                assert at.references(frames(pin)[0]) == 1
                end(fd)
                await settled(lambda: at.pins.living == ())
                # In two steps, where another plane may be at it.
                assert at.memmap.drop_idle(0) + at.memmap.drop_idle(0) > 0

            run(at, test)


def test_a_pin_waits_for_a_punch_that_is_under_way_and_a_punch_spares_what_is_pinned(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pinnable("block", "python", shm / "pool", size_bytes=64 * MIB) as at:
        medium = at.pool.medium

        def blocks() -> int:
            return os.stat(medium.name).st_blocks

        async def test() -> None:
            at.volume.write(INODE, 0, b"x" * (8 * MIB))
            before = blocks()
            began, go_on = trio.Event(), trio.Event()
            release = at.volume._release  # type: ignore[attr-defined]

            async def slowly(*words: int, **how: bool) -> None:
                began.set()
                await go_on.wait()
                await release(*words, **how)

            monkeypatch.setattr(at.volume, "_release", slowly)
            made = []

            async def pin() -> None:
                made.append(await at.pin(WantedRange(INODE, 0, MIB)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.volume.punch, INODE, 0, 4 * MIB)
                await began.wait()
                nursery.start_soon(pin)
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                assert made == []
                go_on.set()
                punched = before - 4 * MIB // 512
            ((first, fd),) = made
            start = first.files[0].pieces[0][1]
            assert blocks() == punched + MIB // 512, "a touch must not fault"
            at.volume.write(INODE, 0, b"y" * (8 * MIB))
            await at.volume.punch(INODE, 0, 4 * MIB)  # type: ignore[misc]
            assert bytes(at.volume.read(INODE, 0, 4 * MIB)) == bytes(4 * MIB)
            assert not medium.is_hole(start, MIB)
            assert medium.is_hole(start + MIB, 3 * MIB)
            end(fd)

        run(at, test)
