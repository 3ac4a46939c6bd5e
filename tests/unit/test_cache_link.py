"""How patient a cache is with its origin, and what it says of it."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kit.sources import sparse_file
from pmemfs.errors import OriginFenced, OriginGone, system_error
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache.link import LinkState, OriginLink

PAGE = 4 * KIB


class Moody(FileOrigin):
    """A real file that hangs as long, and fails as often, as it is told."""

    seconds = 0.0
    errors: list[OSError]
    attempts = 0

    async def read(self, offset_bytes: int, views: object) -> None:
        await self._be_moody()

    async def write(self, offset_bytes: int, views: object) -> None:
        await self._be_moody()

    async def mark(self) -> bytes:
        await self._be_moody()
        return bytes(32)

    async def _be_moody(self) -> None:
        self.attempts += 1
        with trio.CancelScope(shield=True):
            await trio.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)


class Cuttable(Moody):
    """One whose calls can be ended."""

    can_cut = True
    _cutting: trio.CancelScope | None = None

    async def cut(self) -> None:
        if self._cutting:
            self._cutting.cancel()

    async def _be_moody(self) -> None:
        with trio.CancelScope(shield=True) as self._cutting:
            await trio.sleep(self.seconds)
        if self._cutting.cancelled_caught:
            raise gone()


@pytest.fixture
def view() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))


def with_moody(
    tmp_path: Path, work: Callable[[Moody, OriginLink], Awaitable[None]], kind: type[Moody] = Moody
) -> None:
    """Run something on a clock that jumps over every wait."""

    async def main() -> None:
        path = sparse_file(tmp_path / "origin", MIB)
        moody = await kind.open(FileName(str(path)))
        assert isinstance(moody, Moody)
        moody.errors = []
        await work(moody, OriginLink(moody, timeout_seconds=2))
        await moody.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def gone() -> OriginGone:
    return OriginGone(name="x", why="the connection is lost")


def test_an_origin_that_is_away_is_asked_until_the_time_is_over(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, link: OriginLink) -> None:
        moody.errors = [gone()] * 1000
        began = trio.current_time()
        with pytest.raises(OriginGone):
            await link.read(0, [view])
        assert trio.current_time() - began == pytest.approx(2)
        assert (link.state, link.errors) == (LinkState.AWAY, moody.attempts)
        assert link.retries == moody.attempts - 1
        moody.errors = [gone()] * 6
        await link.read(0, [view])
        assert link.state is LinkState.PRESENT

    with_moody(tmp_path, work)


def test_an_error_is_tried_again_a_few_times_and_a_lost_fence_never(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, link: OriginLink) -> None:
        moody.errors = [system_error(errno.EIO)] * 2
        await link.read(0, [view])
        moody.errors = [system_error(errno.EIO)] * 3
        with pytest.raises(OSError, match="Input/output"):
            await link.read(0, [view])
        assert link.state is LinkState.FAILING
        moody.errors, moody.attempts = [OriginFenced(name="x", why="it was taken")], 0
        with pytest.raises(OriginFenced):
            await link.read(0, [view])
        assert moody.attempts == 1

    with_moody(tmp_path, work)


def test_a_write_is_tried_once(tmp_path: Path, view: memoryview) -> None:
    async def work(moody: Moody, link: OriginLink) -> None:
        moody.errors = [gone()]
        with pytest.raises(OriginGone):
            await link.write(0, [view])
        assert link.has_unflushed
        assert moody.attempts == 1

    with_moody(tmp_path, work)


@pytest.mark.parametrize("ask", ["write", "mark"])
def test_what_hangs_is_said_and_cut(tmp_path: Path, view: memoryview, ask: str) -> None:
    async def work(moody: Moody, link: OriginLink) -> None:
        moody.seconds = 1e6
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.watch)
            with pytest.raises(OriginGone):
                await (link.mark() if ask == "mark" else link.write(0, [view]))
            nursery.cancel_scope.cancel()
        assert trio.current_time() < 1000
        assert link.state is LinkState.AWAY

    with_moody(tmp_path, work, Cuttable)


def test_what_hangs_and_cannot_be_cut_is_said_and_given_up_in_the_end(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, link: OriginLink) -> None:
        given_up: list[str] = []
        link.give_up = given_up.append
        moody.seconds = 60
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.watch)
            nursery.start_soon(link.write, 0, [view])
            await trio.sleep(5)
            assert (link.state, given_up) == (LinkState.AWAY, [])
            assert "has not answered for 2 s" in link.last_error
            nursery.cancel_scope.cancel()
        assert "hangs" in given_up[0]
        assert link.state is LinkState.PRESENT

    with_moody(tmp_path, work)
