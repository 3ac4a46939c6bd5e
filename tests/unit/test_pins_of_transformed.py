"""Pins of files that lie in the pool otherwise than their readers see them."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kit.pinning import Pinnable, end, frames, pinnable, run, settled, whole
from pmemfs.control import Peer
from pmemfs.errors import CannotMapTransformed, CannotPin, PmemfsError
from pmemfs.media.inode import ROOT
from pmemfs.media.transform import PIECE_FRAMES, StoredPiece, Transformation, TransformState
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pins.methods import PinMethods
from pmemfs.pins.pin import Client, Pin, WantedRange
from pmemfs.units import MIB

ENCRYPTED = TransformState(Transformation.XTS, 0, b"k" * 16, b"n" * 16)


@pytest.fixture(params=["python", "native"])
def fs(request: pytest.FixtureRequest, shm: Path) -> Iterator[Pinnable]:
    with pinnable("fs", request.param, shm / "pinnable") as made:
        yield made


@pytest.mark.parametrize("is_writable", [False, True])
def test_an_encrypted_file_is_refused_and_the_sentence_says_what_would_serve(
    fs: Pinnable, is_writable: bool
) -> None:
    number = fs.make("file", 4 * FRAME_BYTES)
    empty = fs.make("empty")
    for each in (number, empty):
        fs.fs.inode(each).set_transform(ENCRYPTED)

    async def test() -> None:
        for wanted in (whole(number, "/mnt/private/file"), whole(empty, "/mnt/private/file")):
            with pytest.raises(CannotMapTransformed) as refused:
                await fs.pin(wanted, is_writable=is_writable)
            assert refused.value.errno == errno.EOPNOTSUPP
            for word in ("/mnt/private/file", "encrypted", "pmemfs copy"):
                assert word in str(refused.value)
        assert fs.all_references() == {}
        assert not fs.volume.pinned.has(number)

    run(fs, test)


def test_who_must_not_make_a_file_plain_is_told_that_it_is_compressed(fs: Pinnable) -> None:
    number = fs.make("file", 64 * FRAME_BYTES, b"x")
    inode = fs.fs.inode(number)
    pfn, _ = inode.extents.find(0)
    inode.set_piece(32, StoredPiece(pfn + 32, 32, 3, 9000, 0, Transformation.ZSTD))

    async def test() -> None:
        some = WantedRange(number, 0, 33 * FRAME_BYTES, "/mnt/archive/file")
        with pytest.raises(CannotPin, match="/mnt/archive/file: it is compressed") as refused:
            await fs.pins.pin(fs.client, [some], may_make_plain=False)
        assert refused.value.errno == errno.EOPNOTSUPP
        first = WantedRange(number, 0, 32 * FRAME_BYTES)
        _, fd = await fs.pins.pin(fs.client, [first], may_make_plain=False)
        end(fd)
        assert 32 in inode.pieces

    run(fs, test)


def test_who_holds_pages_of_a_file_is_named(fs: Pinnable) -> None:
    number, other = fs.make("file", 4 * FRAME_BYTES), fs.make("other", FRAME_BYTES)

    async def test() -> None:
        assert fs.volume.pinned.holders_of(number) == []
        client = Client(4711, 1, "train.py --all")
        ends = [(await fs.pin(whole(number), client=client))[1] for _ in range(2)]
        ends.append((await fs.pin(whole(number)))[1])
        assert fs.volume.pinned.holders_of(number) == sorted(
            ["train.py --all (pid 4711)", f"test (pid {fs.client.pid})"]
        )
        assert fs.volume.pinned.holders_of(other) == []
        for each in ends:
            end(each)
        await settled(lambda: fs.volume.pinned.holders_of(number) == [])

    run(fs, test)


# Compressed files

FRAMES = 5 * PIECE_FRAMES + 7


def text(frame_count: int = FRAMES, seed: int = 1) -> bytes:
    """Bytes that shrink, and of which no two frames are the same."""
    chance = random.Random(seed)
    lines = (
        b"%08d %s\n" % (line, b"some words" * chance.randrange(4)) for line in itertools.count()
    )
    return b"".join(itertools.islice(lines, frame_count * 200))[: frame_count * FRAME_BYTES]


async def compressed(fs: Pinnable, name: str = "file", content: bytes = b"") -> int:
    """A file that lies compressed; its inode."""
    content = content or text()
    number = fs.make(name, content=content)
    fs.fs.properties.set_transform(number, Transformation.ZSTD, 0)
    await fs.fs.cooler.rewrite(number)
    inode = fs.fs.inode(number)
    assert len(inode.pieces) == -(-len(content) // FRAME_BYTES // PIECE_FRAMES)
    return number


def pinned_bytes(fs: Pinnable, pin: Pin) -> bytes:
    """What whoever has the pages of a pin sees."""
    medium = fs.pool.medium
    return b"".join(
        bytes(medium.read(at, length)) if at >= 0 else bytes(length)
        for file in pin.files
        for _, at, length in file.pieces
    )


@pytest.mark.parametrize("is_writable", [False, True])
def test_a_compressed_file_is_made_plain_and_pinned(fs: Pinnable, is_writable: bool) -> None:
    async def test() -> None:
        number = await compressed(fs)
        pin, fd = await fs.pin(whole(number), is_writable=is_writable)
        assert pinned_bytes(fs, pin) == text()
        assert not fs.fs.inode(number).pieces
        assert fs.all_references() == dict.fromkeys(frames(pin), 1)
        assert number in fs.told, "it has more blocks now"
        end(fd)

    run(fs, test)


def test_only_the_range_that_is_pinned_is_made_plain(fs: Pinnable) -> None:
    async def test() -> None:
        number = await compressed(fs)
        low, high = PIECE_FRAMES + 31, 2 * PIECE_FRAMES + 1
        pin, fd = await fs.pin(WantedRange(number, low * FRAME_BYTES, (high - low) * FRAME_BYTES))
        assert pinned_bytes(fs, pin) == text()[low * FRAME_BYTES : high * FRAME_BYTES]
        assert sorted(fs.fs.inode(number).pieces) == [0, 96, 128, 160]
        assert bytes(fs.fs.read(number, 0, len(text()))) == text()
        end(fd)

    run(fs, test)


def test_where_there_is_no_room_for_plain_bytes_the_sentence_says_so(fs: Pinnable) -> None:
    async def test() -> None:
        number = await compressed(fs)
        filler = fs.make("filler")
        with suppress(OSError):
            for at in range(0, 64 * MIB, 16 * FRAME_BYTES):
                fs.fs.allocate(filler, at, 16 * FRAME_BYTES, keep_size=False)
        pieces = dict(fs.fs.inode(number).pieces)
        methods = PinMethods(fs.pins, fs.pool, fs.pool.medium, fs.volume, 1)  # type: ignore[arg-type]
        with pytest.raises(CannotPin) as refused:
            await methods.pin(Peer(os.getpid(), os.geteuid()), [[number, 0, -1]], paths=["a.log"])
        assert refused.value.errno == errno.ENOSPC
        assert str(refused.value) == (
            "cannot pin a.log: 668KiB of it are compressed, and there is no room to make them plain"
        )
        assert dict(fs.fs.inode(number).pieces) == pieces
        assert bytes(fs.fs.read(number, 0, len(text()))) == text()
        assert not fs.volume.pinned.has(number)

    run(fs, test)


def test_what_is_pinned_is_not_compressed_until_the_pin_ends(fs: Pinnable) -> None:
    fs.fs.frames.packed.cold_seconds = 0.001

    async def test() -> None:
        number = await compressed(fs)
        pin, fd = await fs.pin(whole(number))
        with pytest.raises(OSError, match="it is mapped by test") as refused:
            await fs.fs.cooler.rewrite(number)
        assert refused.value.errno == errno.EBUSY
        await trio.sleep(0.01)
        await fs.fs.cooler.step()
        assert not fs.fs.inode(number).pieces
        assert not pin.is_stale
        end(fd)
        await settled(lambda: not fs.volume.pinned.has(number))
        await fs.fs.cooler.rewrite(number)
        assert fs.fs.inode(number).pieces

    run(fs, test)


@pytest.mark.parametrize("is_writable", [False, True])
def test_a_pin_that_is_formed_while_its_range_is_compressed_keeps_it_plain(
    fs: Pinnable, is_writable: bool
) -> None:
    async def test() -> None:
        content = text()
        number = fs.make("file", content=content)
        fs.fs.properties.set_transform(number, Transformation.ZSTD, 0)
        begun, may_go_on = trio.Event(), trio.Event()
        pack = fs.fs.cooler.pack_now

        async def slow(data: bytes, kind: int, level: int) -> bytes:
            begun.set()
            await may_go_on.wait()
            return await pack(data, kind, level)

        fs.fs.cooler.pack_now = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rewritten_unless_held, fs, number)
            await begun.wait()
            pin, fd = await fs.pin(whole(number), is_writable=is_writable)
            may_go_on.set()
        assert not fs.fs.inode(number).pieces
        assert not pin.is_stale
        assert pinned_bytes(fs, pin) == content
        end(fd)

    run(fs, test)


async def rewritten_unless_held(fs: Pinnable, number: int) -> None:
    with suppress(OSError):
        await fs.fs.cooler.rewrite(number)


def test_the_pages_of_pieces_belong_to_their_file(fs: Pinnable) -> None:
    async def test() -> None:
        # Pages that have been another file's.
        fs.make("other", content=bytes(FRAME_BYTES) * 64)
        fs.fs.unlink(ROOT, b"other")
        number = await compressed(fs)
        for index, piece in fs.fs.inode(number).pieces.items():
            for frame in range(piece.stored_frames):
                page = fs.memmap.page(piece.pfn + frame)
                assert page is not None
                assert (page.mapping, page.index, page.refcount) == (number, index + frame, 0)

    run(fs, test)


def test_a_compressed_file_is_laid_out_in_one_run(fs: Pinnable) -> None:
    async def test() -> None:
        number = await compressed(fs)
        pin, fd = await fs.pins.pin(fs.client, [whole(number)], is_contiguous=True)
        assert len(pin.files[0].pieces) == 1
        assert pinned_bytes(fs, pin) == text()
        end(fd)

    run(fs, test)


def test_stores_through_a_pin_of_what_was_compressed_are_the_files(fs: Pinnable) -> None:
    async def test() -> None:
        number = await compressed(fs)
        pin, fd = await fs.pin(whole(number), is_writable=True)
        _, at, _ = pin.files[0].pieces[0]
        fs.pool.medium.store(at, b"stored")
        end(fd)
        await settled(lambda: not fs.volume.pinned.has(number))
        await fs.fs.cooler.rewrite(number)
        assert fs.fs.inode(number).pieces
        assert bytes(fs.fs.read(number, 0, len(text()))) == b"stored" + text()[6:]

    run(fs, test)


def test_a_damaged_piece_is_named_and_the_rest_of_its_file_can_be_pinned(fs: Pinnable) -> None:
    async def test() -> None:
        number = await compressed(fs)
        inode = fs.fs.inode(number)
        fs.fs.frames.packed.forget_all()
        fs.pool.medium.store(inode.pieces[PIECE_FRAMES].pfn * FRAME_BYTES + 9, b"damage")
        methods = PinMethods(fs.pins, fs.pool, fs.pool.medium, fs.volume, 1)  # type: ignore[arg-type]
        peer = Peer(os.getpid(), os.geteuid())
        with pytest.raises(PmemfsError, match="checksum is wrong") as refused:
            await methods.pin(peer, [[number, 0, -1]], paths=["a.log"])
        assert refused.value.errno == errno.EIO
        assert not fs.volume.pinned.has(number)
        assert fs.all_references() == {}
        pin, fd = await fs.pin(WantedRange(number, 2 * PIECE_FRAMES * FRAME_BYTES, FRAME_BYTES))
        at = 2 * PIECE_FRAMES * FRAME_BYTES
        assert pinned_bytes(fs, pin) == text()[at : at + FRAME_BYTES]
        end(fd)

    run(fs, test)
