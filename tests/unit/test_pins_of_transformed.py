"""Pins of files that lie in the pool otherwise than their readers see them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.pinning import Pinnable, end, pinnable, run, settled, whole
from pmemfs.errors import CannotMapTransformed, CannotPin
from pmemfs.media.transform import StoredPiece, Transformation, TransformState
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pins.pin import Client, WantedRange

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
