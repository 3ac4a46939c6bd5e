"""How an origin is doing, and waiting for one that is away.

`Health` accounts every call, so that a report can say since when an origin is away and how slow it
is. `Patient` is an origin in the place of another one: it tries again what may succeed later, and
counts it all. Several can share one `Health`, such as one that waits for readers and one that
doesn't, for writing back.

Invariants:
- what may succeed later is tried again: anything after OriginGone until `timeout_seconds` have
  passed since the call began, and after an error such as EIO a few times, shortly after each other.
  EINVAL, ENOSPC or OriginFenced are final;
- a call that hangs is not ended, because its transfer still may touch the pages; it shows as the
  oldest under way, and makes the state `away`. Whoever waits for it decides for how long.
"""

from __future__ import annotations

import enum
import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from pmemfs.errors import OriginFenced, OriginGone, sentence_of
from pmemfs.origin.base import Identity, Origin, say_nothing

SLOW_SECONDS = 1.0
"""An origin is slow if it has taken that long lately, on average, or takes it now."""
HANGS_SECONDS = 10.0
"""A call that takes longer looks like an origin that is away."""
TIMEOUT_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_ATTEMPTS = 3
_PASSING = (errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS, errno.ETIMEDOUT, errno.EBUSY)
_LATELY = 1 / 16
"""How much a call counts in the average of late."""

_T = TypeVar("_T")
_Words = TypeVarTuple("_Words")


class State(enum.Enum):
    """How an origin is doing."""

    GOOD = "good"
    SLOW = "slow"
    FAILING = "failing"
    """It answers, and the last answer was an error."""
    AWAY = "away"
    """The connection is lost, or it has not answered for long."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of one kind that have ended well."""

    count: int = 0
    bytes: int = 0
    mean_seconds: float = 0.0
    worst_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class OriginStatistics:
    """How an origin is doing now, and has done since it was opened."""

    state: State
    state_seconds: float
    """For so long, unless it is good."""
    why: str
    """The last failure in a sentence; empty while the state is good."""
    last_success_seconds: float | None
    """So long ago something was answered well; None if nothing was."""
    under_way: int
    oldest_seconds: float
    """For so long the oldest call has been under way; 0 if there is none."""
    reads: Calls
    writes: Calls
    flushes: Calls
    retries: int
    errors: dict[str, int]
    """How often each error came, by the name of its errno."""


class _Account:
    """Sums of one kind of call."""

    __slots__ = ("bytes", "count", "seconds", "worst_seconds")

    def __init__(self) -> None:
        self.count = self.bytes = 0
        self.seconds = self.worst_seconds = 0.0

    def calls(self) -> Calls:
        mean = self.seconds / self.count if self.count else 0.0
        return Calls(self.count, self.bytes, mean, self.worst_seconds)


class Health:
    """The account of one origin."""

    def __init__(self) -> None:
        self.read = _Account()
        self.write = _Account()
        self.flush = _Account()
        self.other = _Account()
        self.retries = 0
        self._errors: Counter[str] = Counter()
        self._under_way: dict[object, float] = {}
        self._late_seconds = 0.0
        self._last_success: float | None = None
        self._failing_since: float | None = None
        self._slow_since: float | None = None
        self._is_lost = False
        self._why = ""
        self._is_back = trio.Event()

    def begin(self) -> object:
        """A call begins; what names it."""
        call = object()
        self._under_way[call] = trio.current_time()
        return call

    def succeed(self, call: object, account: _Account, length_bytes: int) -> None:
        """A call has ended well."""
        now = trio.current_time()
        seconds = now - self._under_way.pop(call)
        account.count += 1
        account.bytes += length_bytes
        account.seconds += seconds
        account.worst_seconds = max(account.worst_seconds, seconds)
        self._late_seconds += (seconds - self._late_seconds) * _LATELY
        if self._late_seconds < SLOW_SECONDS:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        self._last_success = now
        if self._failing_since is not None:
            self._failing_since, self._is_lost, self._why = None, False, ""
            self._is_back.set()
            self._is_back = trio.Event()

    def fail(self, call: object, error: OSError) -> None:
        """A call has failed."""
        began = self._under_way.pop(call)
        number = error.errno or errno.EIO
        self._errors[errno.errorcode.get(number, str(number))] += 1
        if self._failing_since is None:
            self._failing_since = began
        self._is_lost = isinstance(error, OriginGone)
        self._why = sentence_of(error)

    def forget(self, call: object) -> None:
        """A call was given up before anything was known."""
        self._under_way.pop(call, None)

    async def pause(self, seconds: float) -> None:
        """Wait a little before another attempt, less if another call succeeds meanwhile."""
        with trio.move_on_after(seconds):
            await self._is_back.wait()

    def statistics(self) -> OriginStatistics:
        """How it is now."""
        now = trio.current_time()
        oldest = now - next(iter(self._under_way.values()), now)
        state, seconds, why = self._state(now, oldest)
        success = None if self._last_success is None else now - self._last_success
        return OriginStatistics(
            state, seconds, why, success, len(self._under_way), oldest,
            self.read.calls(), self.write.calls(), self.flush.calls(),
            self.retries, dict(self._errors),
        )  # fmt: skip

    def _state(self, now: float, oldest: float) -> tuple[State, float, str]:
        if self._failing_since is not None:
            state = State.AWAY if self._is_lost else State.FAILING
            return state, now - self._failing_since, self._why
        if oldest >= HANGS_SECONDS:
            return State.AWAY, oldest, f"it has not answered for {oldest:.0f} s"
        if oldest >= SLOW_SECONDS:
            return State.SLOW, oldest, f"it has not answered for {oldest:.0f} s"
        if self._slow_since is not None:
            why = f"it takes {self._late_seconds:.1f} s to answer"
            return State.SLOW, now - self._slow_since, why
        return State.GOOD, 0.0, ""


class Patient(Origin):
    """An origin that waits for the one behind it, and accounts what that does."""

    def __init__(
        self, origin: Origin, health: Health, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.origin = origin
        self.health = health
        self.timeout_seconds = timeout_seconds
        self.name = origin.name
        self.block_bytes = origin.block_bytes
        self.read_only = origin.read_only
        self.can_cut = origin.can_cut
        self.can_fence = origin.can_fence

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        return self.origin.size_bytes

    @property
    def can_discard(self) -> bool:  # type: ignore[override]
        return self.origin.can_discard

    @property
    def zeroes_on_discard(self) -> bool:  # type: ignore[override]
        return self.origin.zeroes_on_discard

    @property
    def losses(self) -> int:  # type: ignore[override]
        return self.origin.losses

    def statistics(self) -> OriginStatistics:
        """How the origin is now."""
        return self.health.statistics()

    async def identity(self) -> Identity:
        return await self.origin.identity()

    async def mark(self) -> bytes:
        return await self._try(self.health.other, 0, self.origin.mark)

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        length_bytes = sum(map(len, views))
        await self._try(self.health.read, length_bytes, self.origin.read, offset_bytes, views)

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        length_bytes = sum(map(len, views))
        await self._try(self.health.write, length_bytes, self.origin.write, offset_bytes, views)

    async def flush(self, losses: int | None = None) -> None:
        # No second attempt: where one fails, what was written before may be lost.
        await self._once(self.health.flush, 0, self.origin.flush, losses)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        await self._try(
            self.health.other, length_bytes, self.origin.discard, offset_bytes, length_bytes
        )

    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        async def attempt() -> None:
            await self.origin.write_zeroes(offset_bytes, length_bytes, may_trim=may_trim)

        await self._try(self.health.other, length_bytes, attempt)

    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        await self.origin.fence(say)

    async def resize_seen(self) -> int:
        return await self._try(self.health.other, 0, self.origin.resize_seen)

    async def cut(self) -> None:
        await self.origin.cut()

    def hold_lock(self, pool_fd: int) -> None:
        self.origin.hold_lock(pool_fd)

    async def close(self) -> None:
        await self.origin.close()

    async def _try(
        self,
        account: _Account,
        length_bytes: int,
        attempt: Callable[[Unpack[_Words]], Awaitable[_T]],
        *words: *_Words,
    ) -> _T:
        """Attempt it until it succeeds, or another attempt has no point."""
        deadline = trio.current_time() + self.timeout_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        failures = 0
        while True:
            try:
                return await self._once(account, length_bytes, attempt, *words)
            except OSError as error:
                failures += not isinstance(error, OriginGone)
                left_seconds = deadline - trio.current_time()
                if not _is_passing(error) or failures >= _ATTEMPTS or left_seconds <= 0:
                    raise
            await self.health.pause(min(pause_seconds, left_seconds))
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            self.health.retries += 1

    async def _once(
        self,
        account: _Account,
        length_bytes: int,
        attempt: Callable[[Unpack[_Words]], Awaitable[_T]],
        *words: *_Words,
    ) -> _T:
        call = self.health.begin()
        try:
            result = await attempt(*words)
        except OSError as error:
            self.health.fail(call, error)
            raise
        except BaseException:
            self.health.forget(call)
            raise
        self.health.succeed(call, account, length_bytes)
        return result


def _is_passing(error: OSError) -> bool:
    if isinstance(error, OriginFenced):
        return False
    return isinstance(error, OriginGone) or error.errno in _PASSING
