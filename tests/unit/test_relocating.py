"""A file that is laid out anew: where it lies then, and what of it stays as it was."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kit.pinning import Pinnable, end, pinnable, run, settled, whole
from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.media.inode import ROOT
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.units import MIB
from pmemfs.volume.fs import relocating

CHUNK_BYTES = CHUNK_FRAMES * FRAME_BYTES


@pytest.fixture
def at(shm: Path) -> Iterator[Pinnable]:
    with pinnable("fs", "native", shm / "pool", size_bytes=400 * MIB) as made:
        yield made


def fragmented(at: Pinnable, frame_count: int, name: str = "file") -> int:
    """A file whose frames don't follow one another; each begins with its own number."""
    number, other = at.make(name), at.make(f"{name}-between")
    for index in range(frame_count):
        at.fs.write(number, index * FRAME_BYTES, index.to_bytes(8, "little") * 512)
        if index % 7 == 0:
            at.fs.allocate(other, index * FRAME_BYTES, FRAME_BYTES, keep_size=False)
        at.fs.trim_ahead(number)
    return number


def content(at: Pinnable, number: int) -> bytes:
    return bytes(at.fs.read(number, 0, at.fs.attributes(number).size_bytes))


@pytest.mark.parametrize("frame_count", [1, 20, CHUNK_FRAMES - 1, CHUNK_FRAMES + 5])
def test_the_file_is_one_aligned_run_with_the_same_bytes(at: Pinnable, frame_count: int) -> None:
    async def test() -> None:
        number = fragmented(at, frame_count)
        before, attributes = content(at, number), at.fs.attributes(number)
        free = at.free_frames()
        await at.fs.lay_out(number)
        ((_, pool_bytes, length),) = at.fs.pieces(number, 0, len(before), 100)
        assert length == frame_count * FRAME_BYTES
        first = (pool_bytes >> PAGE_SHIFT) - int(at.pool.first_data_pfn)
        assert frame_count < CHUNK_FRAMES or first % CHUNK_FRAMES == 0
        assert content(at, number) == before
        assert at.fs.attributes(number)._replace(block_count=0) == attributes._replace(
            block_count=0
        )
        at.fs.tidy()
        assert abs(at.free_frames() - free) <= 16, "logs may have become longer"

    run(at, test)


def test_a_file_that_lies_well_is_left_alone(at: Pinnable) -> None:
    async def test() -> None:
        number = at.make("file", 130 * MIB)
        assert at.fs.relocator.is_laid_out(at.fs.inode(number))
        before = at.fs.pieces(number, 0, 130 * MIB, 100)
        await at.fs.lay_out(number)
        assert at.fs.pieces(number, 0, 130 * MIB, 100) == before

    run(at, test)


def test_a_large_file_gets_as_few_runs_as_there_are_groups(at: Pinnable) -> None:
    async def test() -> None:
        number = at.make("file")
        at.fs.set_attributes(number, size_bytes=140 * MIB)
        for offset in range(0, 140 * MIB, 5 * MIB):
            at.fs.write(number, offset, offset.to_bytes(8, "little"))
        await at.fs.lay_out(number)
        pieces = at.fs.pieces(number, 0, 140 * MIB, 100)
        assert len(pieces) == 2
        assert all(offset % CHUNK_BYTES == 0 for offset, _, _ in pieces)
        for offset in range(0, 140 * MIB, 5 * MIB):
            assert bytes(at.fs.read(number, offset, 8)) == offset.to_bytes(8, "little")

    run(at, test)


def test_what_is_pinned_is_not_moved(at: Pinnable) -> None:
    async def test() -> None:
        number = fragmented(at, 20)
        _, fd = await at.pin(whole(number))
        with pytest.raises(OSError, match="programs have pages") as caught:
            await at.fs.lay_out(number)
        assert caught.value.errno == errno.EBUSY
        end(fd)
        await settled(lambda: at.all_references() == {})
        pin, fd = await at.pins.pin(at.client, [whole(number)], is_contiguous=True)
        assert len(pin.files[0].pieces) == 1
        end(fd)

    run(at, test)


def test_writes_between_the_steps_are_in_the_file(
    at: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relocating, "_STEP_FRAMES", 2)

    async def test() -> None:
        number = fragmented(at, 40)
        expected = bytearray(content(at, number))

        async def write() -> None:
            for turn in range(60):
                offset = (turn * 37) % 40 * FRAME_BYTES + 100
                at.fs.write(number, offset, bytes([turn]) * 300)
                expected[offset : offset + 300] = bytes([turn]) * 300
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(at.fs.lay_out, number)
        assert content(at, number) == expected

    run(at, test)


@pytest.mark.parametrize("size_frames", [0, 7])
def test_a_file_that_is_cut_off_meanwhile_keeps_no_frames(
    at: Pinnable, monkeypatch: pytest.MonkeyPatch, size_frames: int
) -> None:
    monkeypatch.setattr(relocating, "_STEP_FRAMES", 2)

    async def test() -> None:
        free = at.free_frames()
        number = fragmented(at, 40)

        async def cut() -> None:
            for _ in range(6):
                await trio.lowlevel.checkpoint()
            at.fs.set_attributes(number, size_bytes=size_frames * FRAME_BYTES)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            nursery.start_soon(at.fs.lay_out, number)
        assert at.fs.attributes(number).size_bytes == size_frames * FRAME_BYTES
        for name in (b"file", b"file-between"):
            at.fs.unlink(ROOT, name)
        at.fs.tidy()
        assert at.free_frames() == free

    run(at, test)


def test_a_pool_without_such_a_run_says_so(at: Pinnable, shm: Path) -> None:
    with pinnable("fs", "native", shm / "small", size_bytes=16 * MIB) as small:

        async def test() -> None:
            number = fragmented(small, CHUNK_FRAMES + 10)
            size = small.free_frames() - small.fs.room().reserved_frames - 64
            small.make("rest", size * FRAME_BYTES)
            before = content(small, number)
            free = small.free_frames()
            with pytest.raises(OSError, match="No space"):
                await small.fs.lay_out(number)
            assert (content(small, number), small.free_frames()) == (before, free)

        run(small, test)
