"""Pins against a model: whatever happens, references are those of living and resting pins alone."""

from __future__ import annotations

import errno
import random
from collections import Counter
from pathlib import Path

import pytest
import trio

from kit.pinning import Pinnable, end, frames, pinnable, run, settled
from pmemfs.media.inode import ROOT
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pins import registry
from pmemfs.pins.pin import Pin, WantedRange
from pmemfs.units import MIB

FILES = 4
FILE_FRAMES = 24
STEPS = 100


class Model:
    """Files, and the pins of a client that does anything at any time."""

    def __init__(self, at: Pinnable, seed: int) -> None:
        self.at = at
        self.chance = random.Random(seed)
        self.living: dict[int, tuple[Pin, int, Counter[int]]] = {}
        self.resting: list[tuple[Pin, Counter[int]]] = []
        self.count = 0

    def file(self) -> tuple[bytes, int]:
        name = b"%d" % self.chance.randrange(FILES)
        try:
            return name, self.at.fs.lookup(ROOT, name)
        except FileNotFoundError:
            return name, self.at.make(name.decode(), self.chance.randrange(1, FILE_FRAMES) << 12)

    def range(self) -> tuple[int, int]:
        first = self.chance.randrange(FILE_FRAMES)
        return first * FRAME_BYTES, self.chance.randrange(1, FILE_FRAMES) * FRAME_BYTES

    async def pin(self) -> None:
        wanted = [
            WantedRange(self.file()[1], *self.range()) for _ in range(self.chance.choice((1, 1, 3)))
        ]
        try:
            pin, fd = await self.at.pin(*wanted, is_writable=self.chance.random() < 0.5)
        except OSError as error:
            # Nobody has the file open here, so it may be gone before it is pinned.
            if error.errno != errno.ESTALE:
                raise
            return
        self.living[pin.number] = pin, fd, Counter(frames(pin))

    async def pin_while_files_change(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pin)
            for _ in range(self.chance.randrange(4)):
                await trio.lowlevel.checkpoint()
                self.change()

    async def unpin(self) -> None:
        if not self.living:
            return
        number = self.chance.choice(list(self.living))
        pin, fd, held = self.living.pop(number)
        is_orderly = self.chance.random() < 0.6
        end(fd, b"d" if is_orderly else b"")
        if pin.is_writable and not is_orderly:
            self.resting.append((pin, held))
        await settled(lambda: pin not in self.at.pins.living)

    def change(self) -> None:
        name, number = self.file()
        fs, (offset, length) = self.at.fs, self.range()
        size = fs.attributes(number).size_bytes
        match self.chance.randrange(8):
            case 0 | 1:
                fs.set_attributes(number, size_bytes=self.chance.randrange(FILE_FRAMES << 12))
            case 2:
                fs.punch(number, offset, length)
            case 3 if offset + FRAME_BYTES < size:
                fs.collapse(number, offset, FRAME_BYTES)
            case 4 if offset < size < MIB:
                fs.insert(number, offset, FRAME_BYTES)
            case 5:
                fs.unlink(ROOT, name)
            case 6:
                other, number = self.file()
                if other != name:
                    fs.rename(ROOT, name, ROOT, other)
            case _:
                fs.write(number, offset, b"x" * self.chance.randrange(1, length))

    async def check(self) -> None:
        """References, lists, and that no frame of a pin is given to another file."""
        await settled(self.is_as_expected)
        held = self.held()
        free = [pfn for pfn in held if self.at.fs.allocator.is_free(pfn)]
        assert free == [], "a held frame could be given out"

    def held(self) -> Counter[int]:
        total: Counter[int] = Counter()
        for _, _, held in self.living.values():
            total += held
        for _, held in self.resting:
            total += held
        return total

    def is_as_expected(self) -> bool:
        """Large pins end in steps, and rests end at any time."""
        resting = self.at.pins.resting
        self.resting = [(pin, held) for pin, held in self.resting if pin in resting]
        return (
            {pin.number for pin in self.at.pins.living} == self.living.keys()
            and len(resting) == len(self.resting)
            and self.at.all_references() == dict(self.held())
        )


@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize("seed", range(4))
def test_references_are_those_of_living_and_resting_pins(
    shm: Path, monkeypatch: pytest.MonkeyPatch, engine: str, seed: int
) -> None:
    # So that some pins take several steps.
    monkeypatch.setattr(registry, "_STEP_PAGES", 40)
    with pinnable("fs", engine, shm / "pool", rest_seconds=0.02, size_bytes=6 * MIB) as at:
        at.pool.medium.reserved = seed % 2 == 0
        # Whatever the pool gives for its own use has been given before it is looked at.
        free = at.free_frames()
        model = Model(at, seed)

        async def test() -> None:
            actions = [model.pin, model.pin, model.pin_while_files_change, model.unpin, model.unpin]
            for _ in range(STEPS):
                if model.chance.random() < 0.5:
                    await model.chance.choice(actions)()
                else:
                    model.change()
                if model.chance.random() < 0.2:
                    at.fs.tidy()
                await model.check()
            while model.living:
                await model.unpin()
            await settled(lambda: at.pins.resting == () and at.all_references() == {})
            for name in list(at.fs.names(ROOT)):
                at.fs.unlink(ROOT, name)
            at.fs.tidy()
            at.fs.tidy()
            assert at.fs.space().busy_frames == 0
            # The root's log may have become longer.
            assert free - 4 <= at.free_frames() <= free
            assert at.pins.living == at.pins.resting == ()
            assert (at.client.pin_count, at.client.page_count) == (0, 0)

        run(at, test)
