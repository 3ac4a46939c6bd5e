"""What is said of an origin: since when it is slow, failing or away, and how often it was."""

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
from pmemfs.origin.health import HANGS_SECONDS, SLOW_SECONDS, Health, Patient, State
from pmemfs.origin.naming import FileName
from pmemfs.units import KIB, MIB

PAGE = 4 * KIB


class Moody(Patient):
    """A real file that takes as long, and fails as often, as it is told."""

    def __init__(self, origin: FileOrigin) -> None:
        super().__init__(origin, Health())
        self.seconds = 0.0
        self.errors: list[OSError] = []

    async def read(self, offset_bytes: int, views: object) -> None:
        await trio.sleep(self.seconds)
        if self.errors:
            raise self.errors.pop(0)

    write = read  # type: ignore[assignment]


@pytest.fixture
def view() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))


def with_moody(tmp_path: Path, work: Callable[[Moody, Patient], Awaitable[None]]) -> None:
    """Run something on a clock that jumps over every wait."""

    async def main() -> None:
        path = sparse_file(tmp_path / "origin", MIB)
        moody = Moody(await FileOrigin.open(FileName(str(path))))
        await work(moody, Patient(moody, Health()))
        await moody.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def gone() -> OriginGone:
    return OriginGone(name="x", why="the connection is lost")


def test_calls_are_counted_with_their_bytes_and_their_times(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        for seconds in (0.1, 0.3):
            moody.seconds = seconds
            await patient.read(0, [view])
        await patient.write(0, [view])
        told = patient.statistics()
        assert (told.reads.count, told.reads.bytes) == (2, 2 * PAGE)
        assert told.reads.mean_seconds == pytest.approx(0.2)
        assert told.reads.worst_seconds == pytest.approx(0.3)
        assert told.writes.count == 1
        assert (told.state, told.under_way, told.oldest_seconds) == (State.GOOD, 0, 0)
        assert told.last_success_seconds == 0

    with_moody(tmp_path, work)


def test_an_origin_is_slow_while_it_takes_long_and_then_away(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        moody.seconds = HANGS_SECONDS + 5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(patient.read, 0, [view])
            await trio.sleep(SLOW_SECONDS + 1)
            assert patient.statistics().state is State.SLOW
            await trio.sleep(HANGS_SECONDS)
            told = patient.statistics()
            assert told.state is State.AWAY
            assert told.state_seconds == told.oldest_seconds
            assert told.oldest_seconds == pytest.approx(SLOW_SECONDS + 1 + HANGS_SECONDS)
            assert told.last_success_seconds is None
        assert patient.statistics().state is State.GOOD
        moody.seconds = SLOW_SECONDS * 2
        for _ in range(20):
            await patient.read(0, [view])
        assert patient.statistics().state is State.SLOW
        moody.seconds = 0
        for _ in range(40):
            await patient.read(0, [view])
        assert patient.statistics().state is State.GOOD

    with_moody(tmp_path, work)


def test_an_error_that_may_pass_is_tried_three_times_and_then_told(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        moody.errors = [system_error(errno.EIO) for _ in range(2)]
        await patient.read(0, [view])
        assert patient.statistics().retries == 2
        moody.errors = [system_error(errno.EIO) for _ in range(4)]
        with pytest.raises(OSError, match="Input/output"):
            await patient.read(0, [view])
        assert len(moody.errors) == 1
        told = patient.statistics()
        assert told.state is State.FAILING
        assert told.errors == {"EIO": 5}

    with_moody(tmp_path, work)


@pytest.mark.parametrize(
    "error", [system_error(errno.EINVAL), system_error(errno.ENOSPC),
              OriginFenced(name="x", why="y")],
)  # fmt: skip
def test_a_final_error_is_not_tried_again(tmp_path: Path, view: memoryview, error: OSError) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        moody.errors = [error]
        with pytest.raises(type(error)):
            await patient.read(0, [view])
        assert patient.statistics().retries == 0

    with_moody(tmp_path, work)


def test_a_call_waits_for_an_origin_that_is_away_until_its_time_is_over(
    tmp_path: Path, view: memoryview
) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        began = trio.current_time()
        moody.errors = [gone() for _ in range(1000)]
        with pytest.raises(OriginGone):
            await patient.read(0, [view])
        assert trio.current_time() - began == pytest.approx(patient.timeout_seconds)
        told = patient.statistics()
        assert told.state is State.AWAY
        assert told.state_seconds == pytest.approx(patient.timeout_seconds)
        assert told.retries < 20
        # One that has no patience shares the account.
        hasty = Patient(moody, patient.health, timeout_seconds=0)
        before = trio.current_time()
        with pytest.raises(OriginGone):
            await hasty.read(0, [view])
        assert trio.current_time() == before
        assert patient.statistics().errors == hasty.statistics().errors

    with_moody(tmp_path, work)


def test_the_first_success_wakes_all_that_wait(tmp_path: Path, view: memoryview) -> None:
    async def work(moody: Moody, patient: Patient) -> None:
        moody.errors = [gone() for _ in range(6)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(patient.read, 0, [view])
            await trio.sleep(4)
            # The first one waits for seconds between its attempts by now.
            moody.errors = []
            await patient.write(0, [view])
            await trio.testing.wait_all_tasks_blocked()
            assert patient.statistics().under_way == 0
            assert patient.statistics().reads.count == 1

    with_moody(tmp_path, work)
