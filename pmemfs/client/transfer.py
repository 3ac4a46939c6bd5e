"""Moves stretches between two files: one by system calls, the other by its pages in the pool.

    disk --preadv, O_DIRECT--> pages        the device writes into the pool, no byte is copied
    pages --pwritev, O_DIRECT--> disk       the device reads out of the pool

This is the *page path*. What stands in its way leads to the *bounce path*, on which bytes go
through a buffer: of ours, or of the kernel (its page cache). Invariants:
- pages are pinned while they are moved to or from. So whatever becomes of their file meanwhile, no
  byte goes into, or comes out of, another file;
- a stretch has been moved when both ends have it; what fails half way is moved again as a whole, or
  fails. Nothing is lost if the path changes in between;
- O_DIRECT is used for whole blocks only. A tail of a file that is shorter goes the ordinary way, on
  the page path, too.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from pmemfs.client.connection import Connection, PinAnswer
from pmemfs.client.memory import make_durable, map_pieces
from pmemfs.client.stretches import Stretch, in_batches
from pmemfs.control.client import RemoteError
from pmemfs.errors import CannotMapTransformed, DaemonGone, NotDirect, PmemfsError, naming
from pmemfs.medium.addresses import Addresses, Shown
from pmemfs.mountinfo import Mount, mount_of_device
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB

BLOCK_BYTES = FRAME_BYTES
"""What direct I/O is aligned to: no common device asks for more, and pages have no less."""
_STEP_BYTES = 16 * MIB
"""For one system call, which no Ctrl-C interrupts. It is many requests of a device at once."""
_BOUNCE_BYTES = 8 * MIB
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""What a pin fails with where ordinary writes would fail as well."""
_EHWPOISON = 133
_ENCRYPTED = "its pages are encrypted"
_DAMAGED = (errno.EFAULT, _EHWPOISON)
"""What a system call answers if the memory that it is given can't be touched."""

Progress = Callable[[int], object]


class Route:
    """Which path the bytes take, and why, if it is not the page path."""

    def __init__(self, *, insists: bool) -> None:
        self.why = ""
        """Empty on the page path."""
        self._insists = insists

    def bounce(self, path: str, why: str) -> None:
        """Something stands in the way. Raises NotDirect if the user insists on the page path."""
        if self._insists:
            raise NotDirect(path=path, why=why)
        self.why = self.why or why


class End:
    """A file or a device, open, from which bytes come or to which they go."""

    def __init__(self, path: str, fd: int, route: Route) -> None:
        self.path = path
        self.fd = fd
        with naming(path):
            status = os.fstat(fd)
            is_device = stat.S_ISBLK(status.st_mode)
            self.size_bytes = os.lseek(fd, 0, os.SEEK_END) if is_device else status.st_size
        self.inode = status.st_ino
        self.mount: Mount | None = None if is_device else mount_of_device(status.st_dev)
        self._route = route
        self._can_be_direct = True
        self.was_direct = False
        """Whether anything was moved by direct I/O."""
        self._is_direct = False

    @property
    def is_in_pool(self) -> bool:
        """Whether it is a file of a mount of ours."""
        return self.mount is not None and self.mount.is_ours

    def read(self, view: memoryview, offset: int) -> int:
        """Fill a buffer; how much of it was filled, which is less at the end. Raises OSError."""
        done = 0
        while done < len(view):
            with self._blamed(offset + done, len(view) - done) as length:
                count = os.preadv(self.fd, [view[done : done + length]], offset + done)
                if count == 0:
                    break
                done += count
        return done

    def write(self, view: memoryview, offset: int) -> None:
        """Write a buffer. Raises OSError."""
        done = 0
        while done < len(view):
            with self._blamed(offset + done, len(view) - done) as length:
                done += os.pwritev(self.fd, [view[done : done + length]], offset + done)

    @contextmanager
    def _blamed(self, offset: int, length: int) -> Iterator[int]:
        """How many bytes to move at once. An error within names the file, unless O_DIRECT is the
        reason: then nothing was moved, and the next time it goes without."""
        try:
            yield self._prepared(offset, length)
            self.was_direct |= self._is_direct
        except OSError as error:
            if error.errno == errno.EINVAL and self._is_direct:
                self._refuse("it takes no direct I/O of blocks of 4 KiB (O_DIRECT: EINVAL)")
                return
            error.filename = error.filename or self.path
            raise

    def _prepared(self, offset: int, length: int) -> int:
        """Switch O_DIRECT on or off for a range; as much of it as is moved so."""
        length = min(length, _STEP_BYTES)
        if not self._can_be_direct:
            self._switch(is_direct=False)
            return length
        ahead = -offset % BLOCK_BYTES
        whole = length // BLOCK_BYTES * BLOCK_BYTES
        self._switch(is_direct=not ahead and whole > 0)
        if self._is_direct:
            return whole
        return min(length, ahead) if ahead else length

    def _switch(self, *, is_direct: bool) -> None:
        if is_direct == self._is_direct:
            return
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | (os.O_DIRECT if is_direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:
                raise
            where = self.mount.fs_type if self.mount else "its file system"
            self._refuse(f"there is no O_DIRECT on {where}")
        else:
            self._is_direct = is_direct

    def _refuse(self, why: str) -> None:
        self._can_be_direct = False
        self._route.bounce(self.path, why)


class PinnedBatch:
    """The pages of some stretches of a file as buffers, for as long as this lives."""

    def __init__(self, answer: PinAnswer, memories: Sequence[Addresses], *, is_writable: bool):
        self._memories = memories
        self._durability = answer.pool.durability
        self._is_writable = is_writable
        self.views = [memoryview(Shown(memory)) for memory in memories]
        """A view is shorter than its stretch where the file is."""

    def persist(self) -> None:
        """Make what was written to the pages durable. Raises OSError."""
        if self._is_writable:
            for memory in self._memories:
                make_durable(memory, self._durability)


class Pages:
    """The pages of a file of a mount."""

    def __init__(self, end: End, *, is_writable: bool) -> None:
        """Raises NotPermitted, NotMounted, and OSError."""
        assert end.mount is not None
        if not is_writable:
            # What a program has stored through a mapping of the mount is in the kernel's cache yet.
            with naming(end.path):
                os.fdatasync(end.fd)
        self._end = end
        self._name = os.path.relpath(os.path.realpath(end.path), end.mount.mountpoint)
        self._is_writable = is_writable
        self._connection = Connection(end.mount.mountpoint)

    def close(self) -> None:
        """Ask the daemon nothing more."""
        self._connection.close()

    def pin(self, batch: Sequence[Stretch]) -> PinnedBatch:
        """Pin some stretches, and map them. Raises what the daemon says, and OSError."""
        end, connection = self._end, self._connection
        answer = connection.pin(
            [(end.inode, *stretch) for stretch in batch],
            # Once is enough to say whose pages these are.
            [self._name, *[""] * (len(batch) - 1)],
            writable=self._is_writable,
            contiguous=False,
            # To read a file must not make it take more room.
            may_make_plain=self._is_writable,
        )
        # All of it is touched next, and the kernel maps it faster at once.
        pool = answer.pool._replace(map_flags=answer.pool.map_flags | mmap.MAP_POPULATE)
        mode = "r+" if self._is_writable else "r"
        memories = [
            map_pieces(
                pool, found["pieces"], found["length_bytes"], mode=mode, path=end.path,
                held=answer.end, tally=connection.tally,
            )
            for found in answer.files
        ]  # fmt: skip
        return PinnedBatch(answer, memories, is_writable=self._is_writable)


class PinnedAhead:
    """A batch that is pinned by a thread while the one before it is moved, so that a device need
    not wait for the daemon."""

    def __init__(self, pages: Pages, batch: Sequence[Stretch]) -> None:
        self.batch = batch
        self._pages = pages
        self._outcome: PinnedBatch | Exception | None = None
        self._thread = threading.Thread(target=self._pin)
        self._thread.start()

    def _pin(self) -> None:
        try:
            self._outcome = self._pages.pin(self.batch)
        except Exception as error:
            self._outcome = error

    def result(self) -> PinnedBatch:
        """Wait for it. Raises as `Pages.pin`."""
        self._thread.join()
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome

    def forget(self) -> None:
        """Wait for it, and let go of it."""
        self._thread.join()
        self._outcome = None


class Transfer:
    """Moves stretches of one file to the same place in another one."""

    def __init__(self, source: End, target: End, route: Route, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._route = route
        self._progress = progress
        # Between two mounts the target's come first: reading by a system call is what both have
        # fewest reasons to refuse.
        self._candidates = [end for end in (target, source) if end.is_in_pool]
        self._pages: Pages | None = None
        self._ahead: PinnedAhead | None = None
        self._buffer: memoryview | None = None
        self.moved_bytes = 0

    def move(self, stretches: Iterable[Stretch]) -> int | None:
        """Move stretches that are in whole frames, in their order.

        Returns where the source ends if it turns out to be shorter than they say.
        Raises OSError, NotDirect, DaemonGone.
        """
        self._find_cipher()
        batches = in_batches(stretches)
        batch = next(batches, None)
        try:
            while batch is not None:
                following = next(batches, None)
                end = self._move_batch(batch, following)
                limit = batch[-1].end if end is None else end
                self.moved_bytes += sum(max(0, min(one.end, limit) - one.start) for one in batch)
                if end is not None:
                    return end
                batch = following
            return None
        finally:
            self._let_go()

    def _find_cipher(self) -> None:
        """Between two files of mounts, the pages of one can be had although the other is encrypted,
        but the bytes go through a cipher. Raises NotDirect."""
        if len(self._candidates) == 2:
            for held in self._candidates:
                if _is_encrypted(held):
                    self._route.bounce(held.path, _ENCRYPTED)

    def _move_batch(
        self, batch: Sequence[Stretch], following: Sequence[Stretch] | None
    ) -> int | None:
        while self._candidates:
            held = self._candidates[0]
            try:
                return self._move_by_pages(held, batch, following)
            except (NotDirect, DaemonGone):
                raise
            except PmemfsError as error:
                why = _reason(held, error)
            except OSError as error:
                if error.errno not in _DAMAGED:
                    raise
                why = "its memory can't be touched"
            self._candidates.pop(0)
            self._let_go()
            if not self._candidates:
                self._route.bounce(held.path, why)
        return self._move_by_buffer(batch)

    def _move_by_buffer(self, batch: Sequence[Stretch]) -> int | None:
        buffer = self._buffer = self._buffer or memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        for stretch in batch:
            for start in range(stretch.start, stretch.end, len(buffer)):
                part = buffer[: min(len(buffer), stretch.end - start)]
                count = self._source.read(part, start)
                self._target.write(part[:count], start)
                self._progress(start + count)
                if count < len(part):
                    return start + count
        return None

    def _move_by_pages(
        self, held: End, batch: Sequence[Stretch], following: Sequence[Stretch] | None
    ) -> int | None:
        if self._pages is None:
            self._pages = Pages(held, is_writable=held is self._target)
        ahead, self._ahead = self._ahead, None
        pinned = ahead.result() if ahead else self._pages.pin(batch)
        if following is not None:
            self._ahead = PinnedAhead(self._pages, following)
        for stretch, view in zip(batch, pinned.views, strict=True):
            for at in range(0, len(view), _STEP_BYTES):
                part = view[at : at + _STEP_BYTES]
                count = len(part)
                if held is self._target:
                    count = self._source.read(part, stretch.start + at)
                else:
                    self._target.write(part, stretch.start + at)
                self._progress(stretch.start + at + count)
                if count < len(part):
                    pinned.persist()
                    return stretch.start + at + count
            if len(view) < stretch.length:
                return stretch.start + len(view)
        pinned.persist()
        return None

    def _let_go(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.forget()
        if self._pages is not None:
            self._pages.close()
            self._pages = None


def _is_encrypted(end: End) -> bool:
    assert end.mount is not None
    try:
        connection = Connection(end.mount.mountpoint)
    except PmemfsError:
        # Nor are pages of such a mount to be had.
        return False
    try:
        answer, _ = connection.ask("transform-get", inode=end.inode)
    except PmemfsError:
        # A mount of another mode, where nothing is encrypted.
        return False
    finally:
        connection.close()
    return bool(answer["is_encrypted"])


def _reason(held: End, error: PmemfsError) -> str:
    """Why pages can't be had. Raises OSError where ordinary writes would fail as well."""
    if error.errno in _HOPELESS and not isinstance(error, RemoteError):
        raise OSError(error.errno, os.strerror(error.errno), held.path) from None
    if isinstance(error, CannotMapTransformed):
        return _ENCRYPTED
    return str(error)
