"""The origin as the volume uses it: with patience, and with what reports say of it.

Invariants:
- a read ends: when the origin answers, or when its time is over. Then it fails with EIO, as that of
  a broken disk does;
- a call is never given up while the origin may still touch its views, see `origin/base.py`. So a
  reader whose time is over leaves the transfer behind, and whatever hangs is cut where that can be
  done;
- writes are tried once. The block stays dirty, and whoever writes it back tries again later;
- when the mount ends, nothing waits for the origin for long. What hangs is cut; where that can't be
  done, `give_up` ends the process, because pages that a transfer may still touch can't be let go.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import TypeVar

import trio

from pmemfs.errors import OriginFenced, OriginGone, sentence_of, system_error
from pmemfs.origin.base import Origin
from pmemfs.origin.vectors import Vectors

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 2.0
_POLL_SECONDS = 0.1
_END_POLL_SECONDS = 0.02
_END_SECONDS = 5.0
_ATTEMPTS = 3
"""At reads that the origin answers with an error. One that is away is asked until the time is
over."""


class LinkState(Enum):
    """How the origin was when it was last asked."""

    PRESENT = "present"
    AWAY = "away"
    FAILING = "failing"
    ABSENT = "absent"
    """The mount was made without it."""


class OriginLink:
    """The origin of one mount; `origin` None is a mount without it."""

    def __init__(self, origin: Origin | None, *, timeout_seconds: float) -> None:
        self.origin = origin
        self.timeout_seconds = timeout_seconds
        self.state = LinkState.PRESENT if origin else LinkState.ABSENT
        self.last_error = ""
        self.errors = 0
        """Calls that the origin has failed."""
        self.retries = 0
        self.timeouts = 0
        """Requests whose time was over."""
        self.read_bytes = 0
        self.written_bytes = 0
        self.has_unflushed = False
        """Whether something was written since the last flush that succeeded."""
        self._owed = self._paid = 0
        self._has_lost_owed = False
        self.has_owed: Callable[[], None] = lambda: None
        """Called whenever `owes_flush` may have changed."""
        self.failed_flushes = 0
        """After each, everything has to be written again that was written before it ended."""
        self.give_up: Callable[[str], None] = lambda why: None
        """Called while the mount ends, if the origin hangs and can't be cut. Ends the process."""
        self._under_way: dict[object, float] = {}
        self._losses = 0
        self.end_seconds = _END_SECONDS
        """How long what can be cut may take after the end of `watch`."""
        self._end_seconds: float | None = None
        """How long it may take from now on to answer, because the mount ends."""
        self._expected = None if origin else trio.Event()
        """Set by `begin`, until which whoever asks waits: a command may come before that."""
        self._noted: float | None = None
        """When the call began of which it was said that it hangs."""

    def begin(self, origin: Origin | None) -> None:
        """Use this origin from now on."""
        self.origin = origin
        self.state = LinkState.PRESENT if origin else LinkState.ABSENT
        expected, self._expected = self._expected, None
        if expected is not None:
            expected.set()

    def expect(self) -> None:
        """The origin of a daemon that has died is being opened again, until `begin`."""
        self.state = LinkState.AWAY
        self.last_error = "it is being opened again"
        # Nobody knows what that daemon had written since its last flush.
        self.has_unflushed = True
        self.owe_flush()

    @property
    def name(self) -> str:
        """How the user named it; empty without an origin."""
        return self.origin.name if self.origin else ""

    @property
    def is_away(self) -> bool:
        """Whether the next call has little hope."""
        return self.state in (LinkState.AWAY, LinkState.ABSENT)

    @property
    def can_cut(self) -> bool:
        """Whether what hangs can be ended."""
        return self.origin is None or self.origin.can_cut

    @property
    def block_bytes(self) -> int:
        """The smallest unit of I/O."""
        return self.origin.block_bytes if self.origin else 512

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        """Fill views, with some patience. Raises OSError."""
        origin = await self._awaited()
        deadline = trio.current_time() + self.timeout_seconds
        pause, attempts = _FIRST_PAUSE_SECONDS, 0
        while True:
            attempts += 1
            try:
                await self._ask(lambda: origin.read(offset_bytes, views))
                break
            except OSError as error:
                left = deadline - trio.current_time()
                may_again = isinstance(error, OriginGone) or attempts < _ATTEMPTS
                if left <= 0 or not may_again or isinstance(error, OriginFenced):
                    raise
            self.retries += 1
            # The last attempt is made when the time is over, however long the pauses have become.
            await trio.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self.read_bytes += sum(map(len, views))

    @property
    def is_well(self) -> bool:
        """Whether the last call has succeeded."""
        return self.state is LinkState.PRESENT

    def begin_reads(
        self, reads: Sequence[tuple[int, Vectors]], over: Callable[[Vectors], None]
    ) -> int:
        """As `Origin.begin_reads`. `over` is told of the end of each one that has begun, and has to
        call `end_read`."""
        origin, now = self._present(), trio.current_time()
        for _, vectors in reads:
            vectors.waiter = over
            self._under_way[vectors] = now
        begun = origin.begin_reads(reads)
        for _, vectors in reads[begun:]:
            vectors.waiter = None
            del self._under_way[vectors]
        return begun

    def end_read(self, vectors: Vectors) -> None:
        """A read that `begin_reads` has begun is over."""
        del self._under_way[vectors]
        self.read_bytes += max(0, vectors.result)

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        """Write views. Raises OSError."""
        origin = await self._begin_change()
        try:
            await self._ask(lambda: origin.write(offset_bytes, views))
        finally:
            # A flush that began meanwhile has not covered it.
            self.has_unflushed = True
        self.written_bytes += sum(map(len, views))

    async def write_copy(self, offset_bytes: int, data: bytes) -> None:
        """Write bytes that lie anywhere. Raises OSError."""
        # Freed with its last view: after an error, the traceback has one.
        memory = mmap.mmap(-1, len(data))
        memory[:] = data
        await self.write(offset_bytes, [memoryview(memory)])

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeroes; its room may be given back. Raises OSError."""
        origin = await self._begin_change()
        try:
            await self._ask(lambda: origin.write_zeroes(offset_bytes, length_bytes, may_trim=True))
        finally:
            self.has_unflushed = True

    @property
    def owes_flush(self) -> bool:
        """Whether a change was answered that only the origin has, and that it may lose: an fsync
        has to flush the origin, whatever the policy is by then."""
        return self._owed != self._paid

    def owe_flush(self) -> None:
        """The origin was given what the cache doesn't keep; no flush that has begun covers it."""
        self._owed += 1
        self.has_owed()

    def check_owed(self) -> None:
        """Raise OSError, once, if the origin may have lost what it was given: whoever has flushed
        it in vain was not the caller of an fsync."""
        if self._has_lost_owed:
            self._has_lost_owed = False
            raise system_error(errno.EIO)

    async def flush(self) -> None:
        """Make durable what was written before. Raises OSError, and then all of that has to be
        written again: the origin may have lost it."""
        origin = await self._awaited()
        self.has_unflushed = False
        losses, owed = self._losses, self._owed
        try:
            await self._ask(lambda: origin.flush(losses))
        except BaseException:
            self.has_unflushed = True
            self.failed_flushes += 1
            self._has_lost_owed |= self.owes_flush
            self._losses = origin.losses
            raise
        self._paid = owed
        self.has_owed()

    async def mark(self) -> bytes:
        """As `Origin.mark`. Raises OSError."""
        return await self._ask((await self._awaited()).mark)

    async def resize_seen(self) -> int:
        """As `Origin.resize_seen`. Raises OSError."""
        return await self._ask((await self._awaited()).resize_seen)

    async def watch(self) -> None:
        """Note what hangs for longer than its time, and cut it where that can be done."""
        try:
            while True:
                await trio.sleep(_POLL_SECONDS)
                await self._end_what_hangs()
        finally:
            # The mount ends, and with it whoever waits, but not what the origin does to pages.
            before = self._end_seconds
            self.note_end(self.end_seconds if self.can_cut else self.timeout_seconds)
            with trio.CancelScope(shield=True):
                while self._under_way:
                    await trio.sleep(_END_POLL_SECONDS)
                    await self._end_what_hangs()
            self._end_seconds = before

    def note_end(self, seconds: float) -> None:
        """The mount ends: from now on nobody waits longer than this."""
        self._end_seconds = min(seconds, self.patience_seconds)

    @property
    def patience_seconds(self) -> float:
        """What takes longer hangs."""
        return self.timeout_seconds if self._end_seconds is None else self._end_seconds

    @property
    def hangs(self) -> bool:
        """Whether a call has got no answer for as long as a request waits."""
        oldest = min(self._under_way.values(), default=None)
        return oldest is not None and oldest <= trio.current_time() - self.timeout_seconds

    async def _end_what_hangs(self) -> None:
        origin, oldest = self.origin, min(self._under_way.values(), default=None)
        seconds = self.patience_seconds
        if origin is None or oldest is None or oldest > trio.current_time() - seconds:
            return
        why = f"it has not answered for {seconds:g} s"
        if oldest != self._noted:
            # Once for each call: others may be answered meanwhile.
            self._noted = oldest
            self._note(LinkState.AWAY, why)
        if origin.can_cut:
            log.warning("%s: %s; connecting anew", self.name, why)
            await origin.cut()
        elif self._end_seconds is not None:
            self.give_up(f"the origin {self.name} hangs: {why}")

    def note_timeout(self) -> OSError:
        """A request has waited for long enough; the error that it gets."""
        if self.state is not LinkState.AWAY:
            # If it is away already, what is known of it says more.
            self._note(LinkState.AWAY, f"it did not answer within {self.timeout_seconds:g} s")
        return self.timed_out()

    def timed_out(self) -> OSError:
        """As `note_timeout`, where the origin answers, but not fast enough."""
        self.timeouts += 1
        return OSError(errno.EIO, f"the origin took longer than {self.timeout_seconds:g} s")

    async def _begin_change(self) -> Origin:
        origin = await self._awaited()
        if not self.has_unflushed:
            self._losses = origin.losses
        self.has_unflushed = True
        return origin

    async def _awaited(self) -> Origin:
        """The origin, once it is there. Raises OSError (EIO) if there is none, or if it has not
        come for as long as a request waits."""
        if self._expected is not None:
            with trio.move_on_after(self.timeout_seconds):
                await self._expected.wait()
        return self._present()

    def _present(self) -> Origin:
        if self.origin is None:
            raise system_error(errno.EIO)
        return self.origin

    async def _ask(self, call: Callable[[], Awaitable[_T]]) -> _T:
        token = object()
        self._under_way[token] = trio.current_time()
        try:
            result = await call()
        except OSError as error:
            self.errors += 1
            is_gone = isinstance(error, OriginGone)
            self._note(LinkState.AWAY if is_gone else LinkState.FAILING, sentence_of(error))
            raise
        finally:
            del self._under_way[token]
        if self.state is not LinkState.PRESENT:
            self._note(LinkState.PRESENT, "")
        return result

    def _note(self, state: LinkState, why: str) -> None:
        if state is not self.state:
            if why:
                log.warning("the origin %s is %s: %s", self.name, state.value, why)
            else:
                log.info("the origin %s is there again", self.name)
        self.state = state
        self.last_error = why or self.last_error


@asynccontextmanager
async def watched(link: OriginLink) -> AsyncIterator[None]:
    """While this lasts, what hangs is cut; in the end nothing is under way any more."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.watch)
        try:
            yield
        except trio.Cancelled:
            raise
        except BaseException as error:
            # Raised in here it would come out in a group.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
