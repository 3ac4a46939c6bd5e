"""A file that is compressed at any moment is, byte for byte, what a plain file would be."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kit.compressible import FRAME, PIECE, Compressible, text, with_pages
from pmemfs.media.label import Scheme
from pmemfs.media.transform import Transformation
from pmemfs.volume.fs.cold import pack_here
from pmemfs.volume.fs.readahead import ReadAhead

EXECUTOR = ThreadPoolExecutor(1)
LENGTH = 5 * PIECE
SOURCE = text(4 * LENGTH)


class Model:
    """A file system with a file, and what the file must be."""

    def __init__(self, at: Compressible, chance: random.Random) -> None:
        self.at, self.chance = at, chance
        self.number = at.make("file", kind=chance.choice((2, 3)))
        self.data = bytearray()
        self.done: list[str] = []

    def place(self) -> int:
        """A position, often at an edge."""
        near = self.chance.choice((0, PIECE, 2 * PIECE, 3 * PIECE, len(self.data), FRAME))
        return max(
            0, near + self.chance.choice((0, 0, -1, 1, -FRAME, self.chance.randrange(PIECE)))
        )

    def length(self) -> int:
        chance = self.chance
        return chance.choice((1, 17, FRAME, PIECE, chance.randrange(1, 3 * PIECE)))

    def grow(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))

    def write(self) -> None:
        at, length = min(self.place(), LENGTH), self.length()
        start = self.chance.randrange(len(SOURCE) - length)
        part = SOURCE[start : start + length]
        assert self.at.fs.write(self.number, at, part) == length
        self.grow(at + length)
        self.data[at : at + length] = part

    def truncate(self) -> None:
        size = min(self.place(), LENGTH)
        self.at.fs.set_attributes(self.number, size_bytes=size)
        del self.data[size:]
        self.grow(size)

    def zeroes(self, start: int, length: int) -> None:
        end = min(start + length, len(self.data))
        if end > start:
            self.data[start:end] = bytes(end - start)

    def punch(self) -> None:
        at, length = self.place(), self.length()
        self.at.fs.punch(self.number, at, length)
        self.zeroes(at, length)

    def zero(self) -> None:
        at, length, keep = self.place(), self.length(), self.chance.random() < 0.5
        self.at.fs.zero(self.number, at, length, keep_size=keep)
        if not keep:
            self.grow(at + length)
        self.zeroes(at, length)

    def allocate(self) -> None:
        at, length, keep = self.place(), self.length(), self.chance.random() < 0.5
        self.at.fs.allocate(self.number, at, length, keep_size=keep)
        if not keep:
            self.grow(at + length)

    def collapse(self) -> None:
        at, length = self.place() & -FRAME, max(FRAME, self.length() & -FRAME)
        with suppress(OSError):
            self.at.fs.collapse(self.number, at, length)
            del self.data[at : at + length]

    def insert(self) -> None:
        at, length = self.place() & -FRAME, max(FRAME, self.length() & -FRAME)
        with suppress(OSError):
            self.at.fs.insert(self.number, at, length)
            self.data[at:at] = bytes(length)

    def copy(self) -> None:
        source, target = self.place(), min(self.place(), LENGTH)
        length = min(self.length(), max(0, len(self.data) - source))
        with suppress(OSError):
            done = self.at.fs.copy(self.number, source, self.number, target, length)
            part = self.data[source : source + done]
            self.grow(target + done if done else 0)
            self.data[target : target + done] = part

    def trim(self) -> None:
        self.at.fs.trim_ahead(self.number)

    def plain(self) -> None:
        self.at.fs.make_plain(self.number, self.place(), self.length())

    def read(self) -> None:
        at, length = self.place(), self.length()
        assert bytes(self.at.fs.read(self.number, at, length)) == self.data[at : at + length]

    def look(self) -> None:
        """All of it, and that data and holes are told from each other."""
        fs, number = self.at.fs, self.number
        assert fs.attributes(number).size_bytes == len(self.data)
        assert self.at.content(number) == self.data
        position, is_data = 0, True
        while position < len(self.data):
            try:
                position = fs.seek(number, position, for_data=is_data)
            except OSError:
                break
            after = len(self.data)
            if not is_data:
                with suppress(OSError):
                    after = fs.seek(number, position, for_data=True)
                assert not any(self.data[position:after]), "a hole has data"
            is_data = not is_data

    def step(self) -> None:
        """Do something."""
        steps: list[Callable[[], None]] = [
            self.write, self.write, self.write, self.write, self.truncate, self.punch, self.zero,
            self.allocate, self.collapse, self.insert, self.copy, self.trim, self.plain, self.read,
            self.look,
        ]  # fmt: skip
        step = self.chance.choice(steps)
        self.done.append(step.__name__)
        step()

    async def meanwhile(self, data: bytes, kind: int, level: int) -> bytes:
        """Compress, and let something happen before that is done."""
        packed = await pack_here(data, kind, level)
        for _ in range(self.chance.choice((0, 0, 0, 1, 3))):
            self.step()
        return packed


def explore(at: Compressible, seed: int, step_count: int) -> None:
    model = Model(at, random.Random(seed))
    cooler = at.fs.cooler
    cooler.pack = cooler.pack_now = model.meanwhile
    if seed % 2:
        at.fs.frames.packed.ahead = ReadAhead(EXECUTOR)

    async def run() -> None:
        for _ in range(step_count):
            model.step()
            if model.chance.random() < 0.4:
                model.done.append("cool")
                if at.has_pages and model.chance.random() < 0.5:
                    at.fs.store.cache.compressed.add(model.number)
                    await cooler.step()
                else:
                    with suppress(OSError):
                        await cooler.rewrite(model.number)
        model.look()

    try:
        trio.run(run)
        at.check()
        assert at.content(model.number) == model.data
    except BaseException as error:
        raise AssertionError(f"seed {seed} after {' '.join(model.done)}") from error


@pytest.mark.parametrize("seed", range(40))
def test_a_file_that_is_compressed_all_the_time_is_what_a_plain_one_is(seed: int) -> None:
    explore(Compressible.in_memory(4000), seed, 60)


@pytest.mark.parametrize("scheme", [Scheme.PMEM, Scheme.ON_DEMAND])
@pytest.mark.parametrize("seed", range(6))
def test_so_is_one_whose_pages_have_structures(seed: int, scheme: Scheme, tmp_path: Path) -> None:
    with with_pages(tmp_path, scheme) as at:
        explore(at, seed, 60)


@pytest.mark.parametrize("seed", range(10))
def test_so_is_one_in_a_pool_that_is_nearly_full(seed: int) -> None:
    """Whatever finds no room leaves the file as it was."""
    chance = random.Random(seed)
    at = Compressible.in_memory(330)
    number, data = at.packed("file", SOURCE[: 3 * PIECE]), bytearray(SOURCE[: 3 * PIECE])
    for _ in range(60):
        start, length = chance.randrange(3 * PIECE), chance.choice((1, FRAME, PIECE))
        part = SOURCE[start : start + length]
        try:
            at.fs.write(number, start, part)
            data[len(data) :] = bytes(max(0, start + length - len(data)))
            data[start : start + length] = part
        except OSError:
            pass
        if chance.random() < 0.3:
            with suppress(OSError):
                at.rewrite(number)
        if chance.random() < 0.1:
            at.set(number, chance.choice((Transformation.ZSTD, Transformation.LZ4)))
        assert at.content(number) == data
    at.check()
    assert at.content(number) == data
