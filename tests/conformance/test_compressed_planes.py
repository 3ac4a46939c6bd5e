"""A file that both planes serve while it is compressed, made plain, pinned and changed, as in a
model: whatever comes in between, a reader gets what was written last."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from kit.data_plane import (
    LSEEK,
    READ,
    WRITE,
    SharedFiles,
    lseek_in,
    read_in,
    shared_files,
    write_in,
)
from pmemfs.fuse.published import Publisher
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.media.transform import PIECE_FRAMES, Transformation
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.cold import pack_here
from pmemfs.volume.pinned import Held

SEEDS = int(os.environ.get("PMEMFS_SEEDS", "8"))
STEPS = 250
PIECE = PIECE_FRAMES * FRAME_BYTES
LENGTHS = (1, 100, FRAME_BYTES, 3 * FRAME_BYTES + 9, PIECE, 2 * PIECE + 1)
MOST_BYTES = 12 * PIECE


@contextmanager
def expected(*numbers: int) -> Iterator[None]:
    """An operation may fail with one of these."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


class Holder:
    """What a pin is for a volume."""

    is_stale = False
    who = "a model"

    def become_stale(self) -> None:
        self.is_stale = True

    def was_renamed(self) -> None:
        return


class Model:
    """The file, what is in it, and the steps."""

    def __init__(self, made: SharedFiles, chance: random.Random) -> None:
        self.fs, self.worker, self.chance = made.fs, made.worker(), chance
        self.publisher = Publisher(made.fs, made.tables)
        self.ino = made.fs.make(ROOT, b"file", NewInode(stat.S_IFREG | 0o644, 0, 0))
        made.fs.hold(self.ino)
        made.fs.properties.set_transform(self.ino, Transformation.ZSTD)
        self.publisher.opened(self.ino)
        self.content = bytearray()
        self.held: list[Held] = []
        self.answered = {"READ": 0, "WRITE": 0}
        made.fs.cooler.pack = made.fs.cooler.pack_now = self.slow_pack

    async def slow_pack(self, data: bytes, kind: int, level: int) -> bytes:
        for _ in range(self.chance.randrange(5)):
            await trio.lowlevel.checkpoint()
        return await pack_here(data, kind, level)

    async def rewrite_for_ever(self) -> None:
        while True:
            with expected(errno.EBUSY, errno.ENOSPC):
                await self.fs.cooler.rewrite(self.ino)
            await trio.lowlevel.checkpoint()

    def step(self) -> None:
        chance = self.chance
        steps: tuple[tuple[int, Callable[[], None]], ...] = (
            (8, self.write), (3, self.append), (10, self.read), (3, self.seek),
            (2, self.truncate), (2, self.punch), (2, self.zero), (2, self.allocate),
            (1, self.collapse), (1, self.insert), (1, self.make_plain), (1, self.pin),
            (2, self.unpin),
        )  # fmt: skip
        chance.choices([each for _, each in steps], [weight for weight, _ in steps])[0]()

    def place(self) -> tuple[int, int]:
        at = self.chance.randrange(len(self.content) + 1)
        if self.chance.random() < 0.3:
            at = min(len(self.content), round(at / PIECE) * PIECE)
        return at, self.chance.choice(LENGTHS)

    def write(self, at: int = -1) -> None:
        place, length = self.place()
        at = place if at < 0 else at
        data = (self.chance.randbytes(7) * 70)[:: self.chance.choice((1, 2))]
        data = (data * (length // len(data) + 1))[: max(0, min(length, MOST_BYTES - at))]
        if not data:
            return
        operation = write_in(at, len(data))
        verdict, error, answer = self.worker.answer(
            operation, opcode=WRITE, inode=self.ino, payload=data
        )
        if verdict == "forward":
            assert self.fs.write(self.ino, at, data) == len(data)
            self.publisher.was_written(self.ino, len(data))
        else:
            self.answered["WRITE"] += 1
            assert (error, struct.unpack_from("<I", answer)[0]) == (0, len(data))
        self.content[at : at + len(data)] = data

    def append(self) -> None:
        self.write(len(self.content))

    def read(self) -> None:
        at, length = self.place()
        verdict, error, data = self.worker.answer(read_in(at, length), opcode=READ, inode=self.ino)
        assert not error
        if verdict == "forward":
            data = bytes(self.fs.read(self.ino, at, length))
            self.publisher.was_read(self.ino, at + length)
        else:
            self.answered["READ"] += 1
        assert data == self.content[at : at + length], (at, length, verdict)

    def seek(self) -> None:
        at, _ = self.place()
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            request = lseek_in(at, whence)
            verdict, error, data = self.worker.answer(request, opcode=LSEEK, inode=self.ino)
            found = len(self.content)
            with expected(errno.ENXIO):
                found = self.fs.seek(self.ino, at, for_data=whence == os.SEEK_DATA)
            # The pool's file may have holes where frames are mapped, so these may differ.
            said = struct.unpack("<Q", data)[0] if data else len(self.content)
            for end in (found, said) if whence == os.SEEK_DATA and verdict == "answer" else ():
                assert not any(self.content[at:end]), "what is skipped is zeroes"
            assert error in (0, errno.ENXIO)

    def truncate(self) -> None:
        size = min(MOST_BYTES, max(0, self.place()[0] + self.chance.randrange(-PIECE, PIECE)))
        self.fs.set_attributes(self.ino, size_bytes=size)
        self.content = self.content[:size] + bytes(size - len(self.content[:size]))
        self.publisher.was_changed(self.ino)

    def punch(self) -> None:
        self._zeroed(self.fs.punch)

    def zero(self) -> None:
        self._zeroed(lambda *range_: self.fs.zero(*range_, keep_size=True))

    def _zeroed(self, operation: Callable[[int, int, int], None]) -> None:
        at, length = self.place()
        operation(self.ino, at, length)
        end = min(len(self.content), at + length)
        self.content[at:end] = bytes(max(0, end - at))
        self.publisher.was_changed(self.ino)

    def allocate(self) -> None:
        at, length = self.place()
        keeps = self.chance.random() < 0.5
        self.fs.allocate(self.ino, at, length, keep_size=keeps)
        if not keeps:
            self.content += bytes(max(0, at + length - len(self.content)))
        self.publisher.was_changed(self.ino)

    def collapse(self) -> None:
        at, length = self._frames()
        if at + length < len(self.content):
            self.fs.collapse(self.ino, at, length)
            del self.content[at : at + length]
            self.publisher.was_changed(self.ino)

    def insert(self) -> None:
        at, length = self._frames()
        if at < len(self.content) and len(self.content) + length < MOST_BYTES:
            self.fs.insert(self.ino, at, length)
            self.content[at:at] = bytes(length)
            self.publisher.was_changed(self.ino)

    def _frames(self) -> tuple[int, int]:
        at, _ = self.place()
        length = self.chance.choice((FRAME_BYTES, 7 * FRAME_BYTES, PIECE, 2 * PIECE))
        unit = self.chance.choice((FRAME_BYTES, PIECE))
        return at // unit * unit, length

    def make_plain(self) -> None:
        at, length = self.place()
        self.fs.make_plain(self.ino, at, length)
        assert self.fs.inode(self.ino).is_plain_range(
            at // FRAME_BYTES, (at + length - 1) // FRAME_BYTES + 1 - at // FRAME_BYTES
        )

    def pin(self) -> None:
        if not self.content:
            return
        self.fs.make_plain(self.ino, 0, len(self.content))
        pieces = self.fs.pieces(self.ino, 0, len(self.content), 1 << 20)
        assert all(at >= -1 for _, at, _ in pieces)
        frames = [(at // FRAME_BYTES, (at + n) // FRAME_BYTES) for _, at, n in pieces if at >= 0]
        if frames:
            held = Held(Holder(), self.ino, frames)
            self.fs.pinned.add(held)
            self.held.append(held)

    def unpin(self) -> None:
        if self.held:
            self.fs.pinned.remove(self.held.pop())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_is_read_is_what_was_written_while_pieces_come_and_go(shm: Path, seed: int) -> None:
    chance = random.Random(seed)
    with shared_files(shm, Scheme.PMEM) as made:
        model = Model(made, chance)

        async def main() -> None:
            seen = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(model.rewrite_for_ever)
                for _ in range(STEPS):
                    model.step()
                    seen = max(seen, len(made.fs.inode(model.ino).pieces))
                    for _ in range(chance.choice((0, 0, 1, 5, 40))):
                        await trio.lowlevel.checkpoint()
                while model.held:
                    model.unpin()
                nursery.cancel_scope.cancel()
            assert seen, "some of it was compressed at times"
            with trio.CancelScope(shield=True):
                await made.fs.cooler.rewrite(model.ino)

        trio.run(main)
        assert all(model.answered.values()), "the data plane had its part"
        whole = bytes(made.fs.read(model.ino, 0, MOST_BYTES))
        assert whole == model.content
        made.fs.drop(model.ino)
        again = made.again()
        assert bytes(again.fs.read(model.ino, 0, MOST_BYTES)) == model.content
