"""What every origin promises.

Invariants:
- what a `read` or `write` was given is touched by nobody once the call is over, however it ended.
  The caller gives these pages to another block then, and a late transfer would put one block's
  bytes into another one. So a call that is cancelled goes on until its native part is over, and
  ends as if nobody had cancelled it; the task sees the cancellation at its next checkpoint. Whoever
  wants to wait for less time lets another task do the transfer, and waits for that task;
- `cut` ends what hangs: transfers under way fail with OriginGone, and only then does it return. A
  kind that can't be cut says so (`can_cut`), and its process has to end instead;
- a `write` that returned is seen by every later `read`, and is durable after the next `flush` that
  returned;
- a transfer is all or nothing for the caller only: after an error any part of a write may be there;
- two writes to one range that are under way together end in any order. The caller orders them;
- nothing here retries in secret: a lost connection is OriginGone for all that was under way, and
  the next call connects anew. Waiting and trying again is for whoever uses it (a cache does so in
  `volume/cache/link.py`).

Errors: OSError with the errno that the origin gave (EIO, ENOSPC, …), EINVAL for a range that is not
aligned or lies outside, EROFS for a change of an origin that is open for reading; OriginGone where
the connection is lost, so that another attempt has a point; OriginFenced where another host took
the right to write, so that none has.

All offsets and lengths are bytes and multiples of `block_bytes`. Each of the views begins at an
address that is a multiple of 512. At most MOST_VIEWS views and MOST_BYTES bytes make one call.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from pmemfs.errors import system_error
from pmemfs.origin.vectors import Vectors
from pmemfs.units import MIB, format_size

MOST_BYTES = 4 * MIB
MOST_VIEWS = 1024
"""So many views the system calls take at once (IOV_MAX)."""
MARK_BYTES = 32
_ZEROES_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Identity:
    """Which thing an origin is, as far as its kind has a name for things that stays."""

    kind: str
    """`file`, `device`, `nbd` or `rbd`."""
    text: str
    """For `file` the file system and the inode, for `device` its serial number or the like, for
    `nbd` the name of the export, for `rbd` the cluster, the pool and the image, by their ids."""
    size_bytes: int

    @property
    def digest(self) -> bytes:
        """32 bytes that are the same for the same thing, whatever its size has become."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).digest()


class Left(NamedTuple):
    """What lasts of an origin whose process has died, so that the next one can go on with it."""

    fds: Sequence[int] = ()
    """They have the fence."""
    data: bytes = b""


def say_nothing(sentence: str) -> None:
    """Nobody listens."""


def wake(vectors: Vectors) -> None:
    """Tell whoever waits for a transfer that it is over: a task, or something to be called."""
    waiter, vectors.waiter = vectors.waiter, None
    if isinstance(waiter, trio.lowlevel.Task):
        trio.lowlevel.reschedule(waiter)
    elif waiter is not None:
        waiter(vectors)


class Origin(ABC):
    """Something large and slow, addressed by bytes.

    One trio run uses it. Calls may be under way together, as many as the caller likes.
    """

    name: str
    """Its canonical text, which `open_origin` takes again."""
    size_bytes: int
    """As it was when it was opened, or when `resize_seen` was last asked."""
    block_bytes: int
    """The smallest unit of I/O: 512 or 4096."""
    can_discard: bool
    zeroes_on_discard: bool
    """Whether what was discarded reads as zeroes afterwards."""
    read_only: bool
    can_cut: bool
    can_fence: bool
    """Whether `fence` keeps others away."""
    losses: int = 0
    """How often writes that had returned, and were not flushed yet, may have been lost."""

    @abstractmethod
    async def identity(self) -> Identity:
        """Which thing this is."""

    @abstractmethod
    async def mark(self) -> bytes:
        """MARK_BYTES bytes that change when somebody writes, as far as the kind lets one know.

        Our own writes change it, too: take it anew after the last `flush`. A fence doesn't, so
        compare it once nobody else can write. docs/origins.md says for each kind what it can't
        see. Raises OSError, OriginGone.
        """

    async def next_mark(self) -> bytes | None:
        """What the mark will be once we have changed something; None if each change changes it.

        To be asked after the fence. Whoever keeps both marks can tell after a crash, too, whether
        somebody else has written. Raises OSError, OriginGone.
        """
        await trio.lowlevel.checkpoint()
        return None

    @abstractmethod
    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        """Fill writable views, one after the other, from a range."""

    def begin_reads(self, reads: Sequence[tuple[int, Vectors]]) -> int:
        """Begin to read ranges into memory, together: as many of them, from the first on, as can be
        begun without waiting; how many.

        The `waiter` of each is called with it when it is over, maybe from here already. Its
        `result` is the number of bytes, or -errno. Whoever finds an error or fewer bytes asks again
        by `read`, which knows what the error means.
        """
        return 0

    @abstractmethod
    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        """Write what the views show, one after the other, to a range."""

    @abstractmethod
    async def flush(self, losses: int | None = None) -> None:
        """Make every write that returned before durable.

        A server that was started anew knows nothing of writes that the one before it had answered
        and not flushed, so a flush there proves nothing. Who has written notes `losses` before the
        first write, and gives it here: OriginGone says that there was a loss since, and everything
        has to be written again. Without it, the first flush after a loss raises OriginGone.

        Raises OSError. A file or device whose flush fails has had a loss by that. Without `losses`,
        every later flush of it fails as well.
        """

    @abstractmethod
    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Tell that nobody needs a range any more; it reads as anything afterwards.

        Does nothing where `can_discard` is false. The length has no limit.
        """

    @abstractmethod
    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        """Make a range read as zeroes; with `may_trim` its room may be given back.

        The length has no limit. An origin that can't do it by itself is written zeroes.
        """

    async def _store_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        """Write zeroes where the origin can't make them by itself."""
        # Freed with its last view: after an error, the traceback has one.
        zeroes = memoryview(mmap.mmap(-1, _ZEROES_BYTES))
        for start in range(0, length_bytes, _ZEROES_BYTES):
            view = zeroes[: min(_ZEROES_BYTES, length_bytes - start)]
            await self.write(offset_bytes + start, [view])

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        """Raise OSError (EINVAL) for a range that is unaligned or reaches beyond the end."""
        if (offset_bytes | length_bytes) % self.block_bytes:
            raise system_error(errno.EINVAL)
        if offset_bytes + length_bytes > self.size_bytes:
            # It may have become smaller, so somebody may read this.
            raise OSError(errno.EINVAL, f"it ends at {format_size(self.size_bytes)}, before that")

    def _check_change(self, offset_bytes: int, length_bytes: int) -> None:
        """As `_check`, for a change. Raises OSError (EROFS), too."""
        if self.read_only:
            raise system_error(errno.EROFS)
        self._check(offset_bytes, length_bytes)

    @abstractmethod
    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        """Take the exclusive right to write, and keep it until `close`.

        `say` is told, in a sentence, what this waits for. Raises OriginBusy if somebody else has
        the right. Does nothing where `can_fence` is false.
        """

    @abstractmethod
    async def resize_seen(self) -> int:
        """The size as it is now, which `size_bytes` is from then on. Raises OSError, OriginGone."""

    @abstractmethod
    async def cut(self) -> None:
        """End the connection, so that every transfer under way fails with OriginGone.

        The next call connects anew. Does nothing where `can_cut` is false.
        """

    def hold(self, *fds: int) -> None:  # noqa: B027  # most kinds have nothing to do
        """Keep the files of descriptors open until no transfer touches pages any more, even if this
        process is killed: the pool, whose lock keeps others out for so long, and what a successor
        waits for.

        To be called once, before the first transfer. The kernel carries on what a killed process
        had under way in an io_uring, so whoever serves the pool next would find pages that change
        by themselves.
        """

    def left(self) -> Left:
        """What a successor goes on with if this process is killed: before the fence only the data
        counts."""
        return Left()

    @abstractmethod
    async def close(self) -> None:
        """Wait for what is under way, give the right back, and let go. Nothing is flushed."""
