"""A full pool: what was just removed is waited for, and nothing else is for long.

The clock is not the machine's: it goes on when everything waits.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from kit.pinning import Pinnable, pinnable
from kit.posix import fails_with
from pmemfs.engine.base import Engine
from pmemfs.engine.trimming import Trimmer
from pmemfs.fuse.handlers.patience import Patience
from pmemfs.media.inode import ROOT
from pmemfs.units import MIB

ALL_WAITS_SECONDS = pytest.approx(0.261)


class Hearing(Engine):
    """One that hears of what was removed while requests wait, as the native one does."""

    hears_meanwhile = True


class Full:
    """A full pool with a file `grown`, that wants more, and a removed one that is held."""

    def __init__(self, at: Pinnable) -> None:
        fs = self.fs = at.fs
        trimmer = Trimmer(at.pool, at.pool.medium, Hearing(at.pool.medium, at.memmap), fs)  # type: ignore[arg-type]
        self.patience = Patience(fs, trimmer.find_room)
        self.others = {name: at.make(name, MIB) for name in ("one", "two")}
        for number in self.others.values():
            fs.hold(number)
        self.grown = at.make("grown")
        self.end = 0
        with fails_with(errno.ENOSPC):
            while True:
                self._grow_once()

    def _grow_once(self) -> None:
        self.fs.allocate(self.grown, self.end, MIB, keep_size=False)
        self.end += MIB

    async def grow(self) -> None:
        """As a request does."""
        answer = self.patience.begin(self._grow_once)
        if isinstance(answer, Awaitable):
            await answer

    async def refused_after(self) -> float:
        """A request that finds no room; how long it took, in s."""
        began = trio.current_time()
        with fails_with(errno.ENOSPC):
            await self.grow()
        return trio.current_time() - began

    def remove(self, name: str) -> None:
        """As unlink(2) does, after which the kernel still knows the file."""
        self.fs.unlink(ROOT, name.encode())

    async def forget(self, name: str, after_seconds: float) -> None:
        await trio.sleep(after_seconds)
        self.fs.drop(self.others[name])

    async def grow_beside_removal(self, name: str) -> None:
        """A request that begins between a removal and the word of the kernel that it forgets."""
        self.remove(name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.forget, name, 0.2)
            await self.grow()


@pytest.fixture
def full(shm: Path) -> Iterator[Full]:
    with pinnable("fs", "python", shm / "pool") as at:
        yield Full(at)


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_what_was_removed_is_waited_for(full: Full) -> None:
    async def test() -> None:
        await full.grow_beside_removal("one")

    run(test)


def test_the_second_of_two_is_waited_for_after_a_vain_wait(full: Full) -> None:
    async def test() -> None:
        full.remove("one")
        assert await full.refused_after() == ALL_WAITS_SECONDS
        await full.grow_beside_removal("two")

    run(test)


def test_where_nothing_is_removed_a_refusal_comes_soon(full: Full) -> None:
    async def test() -> None:
        assert await full.refused_after() == ALL_WAITS_SECONDS
        for _ in range(3):
            assert await full.refused_after() == pytest.approx(0.001)

    run(test)


def test_what_is_removed_during_the_last_wait_of_another_is_waited_for(full: Full) -> None:
    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(full.refused_after)
            await trio.sleep(0.2)
            full.remove("one")
            nursery.start_soon(full.forget, "one", 0.2)
            await trio.sleep(0.1)
            # The other one was refused meanwhile.
            await full.grow()

    run(test)
