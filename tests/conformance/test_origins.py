"""Every kind of origin, each with the real thing behind it: one suite, the same promises."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kit.origins import KINDS, SIZE_BYTES, Thing, thing
from kit.sources import sparse_file
from pmemfs.errors import BadOrigin, OriginBusy
from pmemfs.medium.mapped import MappedMedium
from pmemfs.origin.base import MARK_BYTES, MOST_BYTES, Origin
from pmemfs.origin.opening import open_origin
from pmemfs.origin.vectors import Vectors
from pmemfs.units import KIB, MIB

PAGE = 4 * KIB
PAGES = 512
"""Of the pool into whose pages origins are read."""

Work = Callable[[Origin, "Pages"], Awaitable[None]]


class Pages:
    """Pages of a real mapping of a pool."""

    def __init__(self, medium: MappedMedium) -> None:
        self.medium = medium

    def view(self, page: int, length_bytes: int = PAGE) -> memoryview:
        """The memory of some pages in a row."""
        return self.medium.view(page * PAGE, length_bytes)

    def filled(self, page: int, data: bytes) -> memoryview:
        """Pages with some content."""
        view = self.view(page, len(data))
        view[:] = data
        return view

    def scattered(self, count: int, seed: int = 0) -> list[memoryview]:
        """Pages that lie anywhere."""
        return [self.view(page) for page in random.Random(seed).sample(range(PAGES), count)]


@pytest.fixture
def pages() -> Iterator[Pages]:
    with tempfile.TemporaryDirectory(prefix="pmemfs-test-", dir="/dev/shm") as directory:
        path = sparse_file(Path(directory) / "pool", PAGES * PAGE)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, PAGES * PAGE)
        medium = MappedMedium.open(str(path))
        yield Pages(medium)
        medium.close()


@pytest.fixture(params=KINDS)
def origin(request: pytest.FixtureRequest) -> Iterator[Thing]:
    with thing(request.param, request) as made:
        yield made


@asynccontextmanager
async def opened(text: str, *, read_only: bool = False) -> AsyncIterator[Origin]:
    found = await open_origin(text, read_only=read_only)
    try:
        yield found
    finally:
        await found.close()


def with_origin(origin: Thing, pages: Pages, work: Work) -> None:
    """Do something with an origin that is open."""

    async def main() -> None:
        async with opened(origin.text) as found:
            await work(found, pages)

    trio.run(main)


async def content(found: Origin, pages: Pages, offset_bytes: int, length_bytes: int) -> bytes:
    view = pages.view(PAGES // 2, length_bytes)
    await found.read(offset_bytes, [view])
    return bytes(view)


async def number_of(attempt: Awaitable[object]) -> int:
    """The errno of what fails."""
    with pytest.raises(OSError, match=r"\w") as caught:
        await attempt
    assert caught.value.errno is not None
    return caught.value.errno


def test_what_was_written_is_read_by_whoever_opens_it_next(origin: Thing, pages: Pages) -> None:
    data = os.urandom(3 * PAGE)

    async def main() -> None:
        async with opened(origin.text) as found:
            assert (found.size_bytes, found.block_bytes) == (SIZE_BYTES, 512)
            assert await content(found, pages, 0, MIB) == bytes(MIB)
            await found.write(5 * PAGE, [pages.filled(7, data)])
            await found.flush()
            assert await content(found, pages, 4 * PAGE, 5 * PAGE) == (
                bytes(PAGE) + data + bytes(PAGE)
            )
        async with opened(origin.text) as found:
            assert await content(found, pages, 5 * PAGE, 3 * PAGE) == data

    trio.run(main)


def test_a_range_is_transferred_between_pages_that_lie_anywhere(
    origin: Thing, pages: Pages
) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        data = os.urandom(64 * PAGE)
        views = pages.scattered(64)
        for number, view in enumerate(views):
            view[:] = data[number * PAGE : (number + 1) * PAGE]
        await found.write(MIB, views)
        for view in views:
            view[:] = bytes(PAGE)
        again = pages.scattered(64, seed=1)
        await found.read(MIB, again)
        assert b"".join(again) == data
        # Pieces of any multiple of a block, the smallest one among them.
        await found.read(MIB + 512, [again[0][:512], again[1][512:2048], again[2]])
        assert bytes(again[0][:512]) == data[512:1024]
        assert bytes(again[1][512:2048]) == data[1024 : 1024 + 1536]
        assert bytes(again[2]) == data[2560 : 2560 + PAGE]

    with_origin(origin, pages, work)


def test_any_sequence_of_changes_leaves_what_an_oracle_has(origin: Thing, pages: Pages) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        chance = random.Random(7)
        oracle = bytearray(SIZE_BYTES)
        for _ in range(60):
            blocks = chance.choice((1, 1, 8, 9, 64, 255))
            length = blocks * 512
            offset = chance.randrange((SIZE_BYTES - length) // 512 + 1) * 512
            what = chance.choice(("write", "write", "zero", "trim"))
            if what == "write":
                data = chance.randbytes(length)
                await found.write(offset, [pages.filled(0, data)])
                oracle[offset : offset + length] = data
            else:
                await found.write_zeroes(offset, length, may_trim=what == "trim")
                oracle[offset : offset + length] = bytes(length)
        for start in range(0, SIZE_BYTES, MIB):
            assert await content(found, pages, start, MIB) == oracle[start : start + MIB]

    with_origin(origin, pages, work)


def test_256_transfers_are_under_way_together(origin: Thing, pages: Pages) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        data = os.urandom(256 * PAGE)

        async def write(number: int) -> None:
            view = pages.filled(number, data[number * PAGE : (number + 1) * PAGE])
            await found.write(number * PAGE, [view])

        async def read(number: int) -> None:
            await found.read(number * PAGE, [pages.view(256 + 255 - number)])

        for each in (write, read):
            async with trio.open_nursery() as nursery:
                for number in range(256):
                    nursery.start_soon(each, number)
        for number in range(256):
            assert pages.view(511 - number) == data[number * PAGE : (number + 1) * PAGE]

    with_origin(origin, pages, work)


def test_reads_that_are_begun_together_are_told_of_one_by_one(origin: Thing, pages: Pages) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        data = os.urandom(256 * PAGE)
        await found.write(MIB, [pages.filled(0, data)])
        everything = pages.view(0, 256 * PAGE)
        everything[:] = bytes(256 * PAGE)
        # Every second page lies elsewhere than before, and all come in another order.
        numbers = random.Random(5).sample(range(128), 128)
        left, over = set(numbers), trio.Event()
        reads = []
        for number in numbers:
            views = [pages.view(256 + number), pages.view(number)]
            vectors = Vectors(views, True, found.block_bytes)

            def told(vectors: Vectors, number: int = number) -> None:
                assert vectors.result == 2 * PAGE
                left.remove(number)
                if not left:
                    over.set()

            vectors.waiter = told
            reads.append((MIB + 2 * number * PAGE, vectors))
        # One after another is begun wherever there is no more room, or a connection to be made.
        while reads:
            begun = found.begin_reads(reads)
            if not begun:
                offset_bytes, vectors = reads.pop(0)
                await content(found, pages, offset_bytes, PAGE)
                reads.append((offset_bytes, vectors))
            reads = reads[begun:]
        await over.wait()
        for number in numbers:
            at = 2 * number * PAGE
            if number:  # `content` reads into the first page of the other half.
                assert pages.view(256 + number) == data[at : at + PAGE]
            assert pages.view(number) == data[at + PAGE : at + 2 * PAGE]
        vectors = Vectors([pages.view(0)], True, found.block_bytes)
        ended = trio.Event()
        vectors.waiter = lambda _: ended.set()
        if found.begin_reads([(found.size_bytes, vectors)]):
            await ended.wait()
            assert vectors.result != PAGE

    with_origin(origin, pages, work)


def test_the_largest_transfer_is_one_call_and_a_larger_one_is_refused(
    origin: Thing, tmp_path: Path, shm: Path
) -> None:
    pool = shm / "pool"
    pool.write_bytes(os.urandom(MOST_BYTES + PAGE))
    medium = MappedMedium.open(str(pool))

    async def main() -> None:
        async with opened(origin.text) as found:
            views = [medium.view(page * PAGE, PAGE) for page in range(MOST_BYTES // PAGE + 1)]
            whole = bytes(medium.read(0, MOST_BYTES))
            assert await number_of(found.write(0, views)) == errno.EINVAL
            await found.write(0, views[:-1])
            for view in views:
                view[:] = bytes(PAGE)
            await found.read(0, views[:-1][::-1])
            assert b"".join(views[:-1][::-1]) == whole

    trio.run(main)
    medium.close()


def test_what_is_not_aligned_or_outside_is_refused_and_changes_nothing(
    origin: Thing, pages: Pages
) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        whole, odd = pages.filled(0, os.urandom(PAGE)), pages.view(0, 100)
        refused = (
            lambda: found.read(0, [odd]),
            lambda: found.read(100, [whole]),
            lambda: found.write(0, [odd]),
            lambda: found.write(100, [whole]),
            lambda: found.write(0, [pages.view(1)[8 : 8 + 512]]),
            lambda: found.read(SIZE_BYTES, [whole]),
            lambda: found.read(SIZE_BYTES - 512, [whole]),
            lambda: found.write(SIZE_BYTES, [whole]),
            lambda: found.write(SIZE_BYTES - 512, [whole]),
            lambda: found.discard(SIZE_BYTES - 512, PAGE),
            lambda: found.discard(100, PAGE),
            lambda: found.write_zeroes(SIZE_BYTES, PAGE, may_trim=True),
            lambda: found.write_zeroes(0, 100, may_trim=False),
        )
        for attempt in refused:
            assert await number_of(attempt()) in (errno.EINVAL, errno.EIO)
        assert await found.resize_seen() == SIZE_BYTES
        assert await content(found, pages, 0, PAGE) == bytes(PAGE)
        assert await content(found, pages, SIZE_BYTES - PAGE, PAGE) == bytes(PAGE)

    with_origin(origin, pages, work)


def test_a_discard_leaves_its_neighbours_alone(origin: Thing, pages: Pages) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        data = os.urandom(MIB)
        await found.write(MIB, [pages.filled(0, data)])
        await found.discard(MIB + 64 * KIB, MIB // 2)
        after = await content(found, pages, MIB, MIB)
        assert after[: 64 * KIB] == data[: 64 * KIB]
        assert after[64 * KIB + MIB // 2 :] == data[64 * KIB + MIB // 2 :]
        if found.zeroes_on_discard:
            assert after[64 * KIB : 64 * KIB + MIB // 2] == bytes(MIB // 2)
        await found.discard(0, SIZE_BYTES)
        await found.discard(0, 0)

    with_origin(origin, pages, work)


@pytest.mark.parametrize("may_trim", [True, False])
def test_zeroes_are_zeroes(origin: Thing, pages: Pages, may_trim: bool) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        data = os.urandom(MIB)
        await found.write(0, [pages.filled(0, data)])
        await found.write_zeroes(512, 3 * 512, may_trim=may_trim)
        await found.write_zeroes(64 * KIB, MIB // 2, may_trim=may_trim)
        expected = bytearray(data)
        expected[512:2048] = bytes(1536)
        expected[64 * KIB : 64 * KIB + MIB // 2] = bytes(MIB // 2)
        assert await content(found, pages, 0, MIB) == expected
        await found.write_zeroes(0, SIZE_BYTES, may_trim=may_trim)
        assert await content(found, pages, 0, MIB) == bytes(MIB)

    with_origin(origin, pages, work)


def test_what_is_open_for_reading_refuses_every_change(origin: Thing, pages: Pages) -> None:
    async def main() -> None:
        async with opened(origin.text, read_only=True) as found:
            view = pages.filled(0, os.urandom(PAGE))
            for attempt in (
                found.write(0, [view]),
                found.discard(0, PAGE),
                found.write_zeroes(0, PAGE, may_trim=True),
            ):
                assert await number_of(attempt) == errno.EROFS
            assert await content(found, pages, 0, PAGE) == bytes(PAGE)

    trio.run(main)


def test_a_thing_has_one_identity_and_another_thing_another_one(
    origin: Thing, pages: Pages
) -> None:
    async def main() -> None:
        async with opened(origin.text) as found:
            first = await found.identity()
            await found.write(0, [pages.filled(0, os.urandom(PAGE))])
            await found.flush()
        async with opened(origin.text) as found:
            assert await found.identity() == first
        assert first.size_bytes == SIZE_BYTES
        assert first.kind in ("file", "device", "nbd", "rbd")
        if origin.another:
            async with opened(origin.another) as found:
                assert (await found.identity()).digest != first.digest

    trio.run(main)


def test_a_mark_stays_while_nobody_writes_and_changes_when_somebody_else_does(
    origin: Thing, pages: Pages
) -> None:
    async def mark() -> bytes:
        async with opened(origin.text) as found:
            return await found.mark()

    async def main() -> None:
        async with opened(origin.text) as found:
            await found.fence()
            await found.write(MIB, [pages.filled(0, os.urandom(PAGE))])
            await found.flush()
            left = await found.mark()
        assert len(left) == MARK_BYTES
        assert await mark() == left
        async with opened(origin.text) as found:
            await found.fence()
            assert await found.mark() == left
        async with opened(origin.text, read_only=True) as found:
            await content(found, pages, 0, MIB)
        assert await mark() == left
        for _ in range(5 if origin.kind == "rbd" else 1):
            # Ceph says to the second when an image was written to, and a client notes that by the
            # way: perhaps only when it writes again. A kernel's times may be as coarse as its tick.
            await trio.sleep(1.1 if origin.kind == "rbd" else 0.02)
            origin.meddle()
            if await mark() != left:
                return
        pytest.fail("a write of somebody else left the mark as it was")

    trio.run(main)


def test_a_second_holder_is_refused_until_the_first_lets_go(origin: Thing, pages: Pages) -> None:
    async def main() -> None:
        async with opened(origin.text) as found:
            await found.fence()
            await found.write(0, [pages.filled(0, os.urandom(PAGE))])
            if not found.can_fence:
                return
            second = await open_origin(origin.text)
            with pytest.raises(OriginBusy) as caught:
                await second.fence()
            assert caught.value.errno == errno.EBUSY
            assert origin.text in str(caught.value)
            await second.close()
            # What the second one tried takes nothing away from the first.
            await found.write(PAGE, [pages.view(0)])
            await found.flush()
        async with opened(origin.text) as found:
            await found.fence()
            await found.write(0, [pages.view(0)])

    trio.run(main)


def test_no_transfer_touches_pages_after_its_task_was_cancelled(
    origin: Thing, pages: Pages
) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        for page in range(256):
            pages.filled(page, bytes([1]) * PAGE)
        for start in range(0, 256, 64):
            await found.write(start * PAGE, [pages.view(start, 64 * PAGE)])
        for steps in range(6):
            async with trio.open_nursery() as nursery:
                for page in range(256):
                    pages.view(page)[:] = bytes(PAGE)
                    nursery.start_soon(found.read, page * PAGE, [pages.view(page)])
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            seen = [bytes(pages.view(page)) for page in range(256)]
            assert set(seen) <= {bytes(PAGE), bytes([1]) * PAGE}, "a part of a page"
            # The pages belong to somebody else now.
            for page in range(256):
                pages.view(page)[:] = bytes([2]) * PAGE
            await trio.sleep(0.02)
            assert {bytes(pages.view(page)) for page in range(256)} == {bytes([2]) * PAGE}
        assert await content(found, pages, 0, PAGE) == bytes([1]) * PAGE

    with_origin(origin, pages, work)


def test_more_room_is_seen_and_can_be_used(origin: Thing, pages: Pages) -> None:
    async def work(found: Origin, pages: Pages) -> None:
        assert await found.resize_seen() == SIZE_BYTES
        origin.grow(2 * SIZE_BYTES)
        assert await found.resize_seen() == 2 * SIZE_BYTES == found.size_bytes
        data = os.urandom(PAGE)
        await found.write(2 * SIZE_BYTES - PAGE, [pages.filled(0, data)])
        assert await content(found, pages, 2 * SIZE_BYTES - PAGE, PAGE) == data

    with_origin(origin, pages, work)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a path"),
        ("http://host/x", "http"),
        ("nbd:///x", "HOST"),
        ("nbd://host:0/x", "HOST"),
        ("nbd://host:99999/x", "port"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix://host/x?socket=/s", "socket"),
        ("rbd:image", "POOL/IMAGE"),
        ("rbd:pool/", "POOL/IMAGE"),
        ("rbd:pool/image@", "SNAPSHOT"),
        ("rbd:pool/image?mon=1", "mon is not an option"),
        ("rbd:pool/image?x", "x is not an option"),
        ("a\0b", "a path"),
    ],
)
def test_a_text_that_names_nothing_is_a_mistake_of_its_user(text: str, why: str) -> None:
    with pytest.raises(BadOrigin, match="is not an origin") as caught:
        trio.run(open_origin, text)
    assert why in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
