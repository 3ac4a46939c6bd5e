"""The pins of one mount, from the first reference to the last.

    wanted -> forming -> living -> (resting) -> over

A pin is an end of a socket that its client has. When the last copy of that end is closed, the
kernel says so here, whoever closed it and however: so a pin needs no protocol, and none can leak.
Invariants:
- a pin is registered in the volume before it takes references. Where frames leave the file while it
  takes them in steps, it is stale, and begins anew. Otherwise it would hold another file's frames;
- what was taken is what is dropped: each call that took references is remembered, and undone once;
- nothing here runs longer than a step of some ms without letting requests be served;
- page structures of a new generation know of no reference. Until those of a pin are taken again, a
  step at a time, being registered keeps its frames from being freed (`volume/fs/busy`);
- frames that a client could write to rest when it did not end in order, because another device may
  still be writing to them: so long as they rest, nobody else gets them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import resource
import select
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from pmemfs.errors import (
    CannotPin,
    MemoryFault,
    NoPageStructures,
    PmemfsError,
    TooManyPins,
    system_error,
)
from pmemfs.medium.addresses import pin_ends
from pmemfs.medium.base import Durability, Medium
from pmemfs.medium.shortage import Attempts, FindRoom, with_room
from pmemfs.memmap.base import Access, Memmap
from pmemfs.mount.processes import raise_descriptors
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pins import kept
from pmemfs.pins.kept import Description, Keeper, Stored
from pmemfs.pins.pin import (
    HEARING,
    OVER,
    Client,
    HeldRun,
    Marks,
    Pin,
    PinnedFile,
    WantedRange,
    read_client,
)
from pmemfs.pins.ranges import PinnedRanges
from pmemfs.pins.words import MOUNT_ENDED, PinWord, Words
from pmemfs.units import GIB, MIB
from pmemfs.volume.base import Volume

REST_SECONDS = 30
MOST_PINS = 16_384
"""Of one client."""
MOST_POOLS = 16
"""One client may pin so many times the pages that the pool has, or `MOST_PAGES` if that is more."""
MOST_PAGES = 1 << 24

_STEP_PAGES = 8192
"""References are taken and dropped so many at a time: that is some tenths of a millisecond, and a
few milliseconds if the memory of the structures is new."""
_RUN_PAGES = 16
"""A run takes as long as so many pages, however short it is."""
_FILES_AT_ONCE = 128
_RESERVE_AT_ONCE_BYTES = 2 * MIB
_RESERVE_BYTES = GIB
_TRIES = 100
_EVENTS = 64
_DROP_SECONDS = 1
_PAUSE_SECONDS = 0.002
"""Ends of pins are noticed so often. A program that lets go of one pin after another, as it takes
others, would wake the daemon for each."""
_HEARING_SECONDS = 5


class Pins:
    """The pins of one mount. `tell` lets the kernel ask for an inode's attributes again."""

    def __init__(
        self, medium: Medium, memmap: Memmap, volume: Volume,
        tell: Callable[[int], Awaitable[None] | None], *, rest_seconds: float = REST_SECONDS,
    ) -> None:  # fmt: skip
        self._medium = medium
        self.memmap = memmap
        self._volume = volume
        self._tell = tell
        self.find_room: FindRoom | None = None
        self._ranges = PinnedRanges(medium, volume, self._told)
        self._lay_out = with_room(self._ranges.lay_out, self._find_room)
        self._form_once = with_room(self._try_to_form, self._find_room)
        self._rest_seconds = rest_seconds
        self._order = memmap.geometry.order if memmap.geometry else 0
        self._keeper: Keeper | None = None
        self._numbers = itertools.count(1)
        self._all: dict[int, Pin] = {}
        """Every pin that may have references, in the making or over."""
        self._clients: weakref.WeakValueDictionary[tuple[int, int], Client] = (
            weakref.WeakValueDictionary()
        )
        self._living: dict[int, Pin] = {}
        self._by_fd: dict[int, Pin] = {}
        self._resting: deque[tuple[float, Pin]] = deque()
        self._rest_begins = trio.Event()
        self._over: dict[int, None] = {}
        """Places whose pins are over, though the keeper has them."""
        self._over_begins = trio.Event()
        self._leaving_count = 0
        """Pins that have ended, and whose references are being dropped in steps."""
        self._nursery: trio.Nursery | None = None
        self._epoll = select.epoll()
        raise_descriptors()

    @functools.cached_property
    def words(self) -> Words:
        """The words of the pins. Made with the first pin, because a limit may forbid them."""
        words = Words()
        if self._keeper is not None:
            self._keeper.store(kept.WORDS, [words.memory_fd])
        return words

    def keep_with(self, keeper: Keeper) -> None:
        """Have a keeper hold the pins, for the daemon that takes the place of this one."""
        self._keeper = keeper
        if "words" in self.__dict__:
            keeper.store(kept.WORDS, [self.words.memory_fd])
        for pin in self._living.values():
            self._keep(pin)

    def _keep(self, pin: Pin) -> None:
        if self._keeper is not None:
            self._keeper.store(kept.name_of(pin.place), [pin.fd], kept.describe(pin))
            self._over.pop(pin.place, None)
            pin.is_kept = True

    @property
    def living(self) -> Sequence[Pin]:
        """The pins that clients have."""
        return tuple(self._living.values())

    @property
    def resting(self) -> Sequence[Pin]:
        """The pins whose clients are gone, while their frames rest."""
        return tuple(pin for _, pin in self._resting)

    def writers(self) -> list[int]:
        """The processes that may write to pages."""
        # A client that has just let go of pins counts on that.
        while self.notice_ends():
            pass
        return sorted({pin.client.pid for pin in self._living.values() if pin.is_writable})

    def living_pin(self, number: int) -> Pin:
        """A pin that lives. Raises CannotPin."""
        pin = self._living.get(number)
        if pin is None:
            raise CannotPin(errno.EBADF, what=f"again, as pin {number}", why="that pin has ended")
        return pin

    async def serve(self) -> None:
        """Notice the ends of pins, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._end_rests)
            nursery.start_soon(self._take_owed)
            nursery.start_soon(self._drop_over)
            try:
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    while self.notice_ends():
                        await trio.lowlevel.checkpoint()
                    await trio.sleep(_PAUSE_SECONDS)
            finally:
                self._nursery = None

    def client(self, pid: int) -> Client:
        """The client with this pid. It may have several connections, and pins of a daemon before
        this one."""
        found = read_client(pid)
        return self._clients.setdefault((found.pid, found.started), found)

    def notice_ends(self) -> bool:
        """End pins that their clients have closed, a step of them; whether there were any."""
        has_ended = False
        for fd, event in self._epoll.poll(0, _EVENTS):
            pin = self._by_fd[fd]
            is_over = event & select.EPOLLHUP
            # How a pin ends that nobody could write by is all the same.
            if pin.is_writable or not is_over:
                self._hear(pin, until_its_end=bool(is_over))
            if is_over:
                del self._by_fd[fd]
                self._end(pin)
                has_ended = True
        return has_ended

    async def hear_ends(self) -> None:
        """Return when what clients have let go of by now is let go of here, too, or after a while
        in which they let go of more and more. Who asks for something that pins may forbid counts
        on that."""
        with trio.move_on_after(_HEARING_SECONDS):
            while self.notice_ends() or self._leaving_count:
                await trio.lowlevel.checkpoint()

    def take_over(self, stored: Mapping[str, Stored], keeper: Keeper) -> None:
        """Have the pins of a daemon that has died, as its keeper has them.

        Before anything is freed or given out, and before anybody is served. Those whose clients are
        gone end as soon as somebody notices ends. Raises what `kept_pins` does.
        """
        self._keeper = keeper
        if kept.WORDS not in stored:
            return
        self.words = Words(stored[kept.WORDS].fds[0])
        found = kept.kept_pins(stored)
        self.words.take_again({of.place for of, _ in found})
        for of, fd in found:
            if self.words.marks(of.place) & OVER:
                os.close(fd)
                self._over[of.place] = None
                self.words.give_back(of.place)
            else:
                self._live_again(of, fd)
        self._numbers = itertools.count(max((of.number for of, _ in found), default=0) + 1)
        self._take_again()

    def _live_again(self, of: Description, fd: int) -> None:
        place = of.place
        client = self._clients.setdefault(
            (of.pid, of.started), Client(of.pid, of.started, of.command)
        )
        pin = Pin(of.number, place, client, of.since_ns, is_writable=of.is_writable,
                  tell=self._mark)  # fmt: skip
        pin.fd, pin.is_kept = fd, True
        word = self.words.read(place)
        pin.is_stale, pin.is_renamed = bool(word & PinWord.STALE), bool(word & PinWord.RENAMED)
        pin.marks = Marks(self.words.marks(place))
        self._all[pin.number] = self._living[pin.number] = self._by_fd[fd] = pin
        client.pin_count += 1
        for file in of.files:
            self._ranges.register(pin, file.inode, file.offset_bytes, file.pieces)
            pin.piece_count += len(file.pieces)
        pin.files = of.files
        pin.owed = pin.runs[:]
        with contextlib.suppress(TooManyPins):
            # It has them, whatever was allowed then.
            self._count(pin)
        self._epoll.register(fd, select.EPOLLIN)

    def renew(self) -> None:
        """The page structures are of a new generation: take all references again.

        Some of them at once, and the rest while others are served.
        """
        for pin in self._all.values():
            pin.owed += pin.taken
            pin.taken = []
        self._take_again()

    def _take_again(self) -> None:
        # What begins to serve later takes the rest.
        if self._take_owed_step() and self._nursery is not None:
            self._nursery.start_soon(self._take_owed)

    async def _take_owed(self) -> None:
        while self._take_owed_step():
            await trio.lowlevel.checkpoint()

    def _take_owed_step(self) -> bool:
        """Take some references that pins had in older page structures; whether there are more."""
        left, order = _STEP_PAGES, self._order
        for pin in self._all.values():
            access = Access.WRITE if pin.is_writable else Access.READ
            while pin.owed:
                if left <= 0:
                    return True
                pfn, count, number, index = pin.owed.pop()
                step = min(count, _STEP_PAGES << order)
                if step < count:
                    pin.owed.append(HeldRun(pfn + step, count - step, number, index + step))
                # Without them it is registered, and that keeps its frames.
                with contextlib.suppress(OSError, PmemfsError):
                    self.memmap.get_pages(pfn, step, access, number, index >> order)
                    pin.taken.append(HeldRun(pfn, step, number, index))
                left -= (step >> order) + _RUN_PAGES
        return False

    def close(self) -> bool:
        """The mount has ended in order; whether clients still have pages, which they keep."""
        for pin in self.living:
            if pin.is_writable:
                self._flush(pin)
            os.close(pin.fd)
        if "words" in self.__dict__:
            self.words.mark(0, MOUNT_ENDED)
            self.words.close()
        self._epoll.close()
        return bool(self._living)

    # The beginning of a pin

    async def pin(
        self,
        client: Client,
        wanted: Sequence[WantedRange],
        *,
        is_writable: bool = False,
        is_contiguous: bool = False,
        may_make_plain: bool = True,
    ) -> tuple[Pin, int]:
        """Pin ranges of files for a client; the pin, and the client's end of it.

        With `is_contiguous` the files are laid out anew first, in as few runs as there can be.
        What is compressed is made plain first, or is refused if that may not be.
        Raises NoPageStructures, CannotMapTransformed, TooManyPins, TooManyPieces, CannotPin,
        MemoryFault, and OSError: ENOSPC, EMFILE, and what the volume says of the inodes.
        """
        if not self.memmap.has_pages:
            raise NoPageStructures(what="a pin")
        if is_writable and self._volume.read_only:
            raise system_error(errno.EROFS)
        if is_contiguous or client.pin_count >= MOST_PINS:
            # A client that has just let go of pins counts on that.
            while self.notice_ends() or (is_contiguous and self._leaving_count):
                await trio.lowlevel.checkpoint()
        if client.pin_count >= MOST_PINS:
            raise TooManyPins(pid=client.pid, why=f"it has {client.pin_count} pins")
        pin = Pin(next(self._numbers), self.words.take(), client, time.time_ns(),
                  is_writable=is_writable, tell=self._mark)  # fmt: skip
        self._all[pin.number] = pin
        client.pin_count += 1
        try:
            if is_contiguous:
                for number in dict.fromkeys(one.inode for one in wanted):
                    await self._lay_out(number)
            await self._form(pin, wanted, may_make_plain=may_make_plain)
            return pin, self._connect(pin)
        except BaseException:
            self._leave_client(pin)
            self._let_go(pin)
            raise

    async def _form(self, pin: Pin, wanted: Sequence[WantedRange], *, may_make_plain: bool) -> None:
        for _ in range(_TRIES):
            await self._form_once(pin, wanted, may_make_plain=may_make_plain)
            if pin.is_writable and self._volume.read_only:
                raise system_error(errno.EROFS)
            if not pin.is_stale:
                return
            await self._undo(pin)
        raise CannotPin(errno.EAGAIN, what="a file", why="its frames go on changing")

    async def _try_to_form(
        self, pin: Pin, wanted: Sequence[WantedRange], *, may_make_plain: bool
    ) -> None:
        try:
            for number, one in enumerate(wanted, 1):
                await self._ranges.find(pin, one, may_make_plain=may_make_plain)
                if number % _FILES_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            self._count(pin)
            lock = self._volume.pinned.memory_lock
            if lock is not None and lock.locked():
                # Memory is being taken from under a range that was not registered before.
                async with lock:
                    pass
            await self._take(pin)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                await self._undo(pin)
            raise

    async def _undo(self, pin: Pin) -> None:
        """Let a pin have nothing again."""
        await self._drop(pin)
        pin.forget()
        self.words.clear(pin.place)
        self._mark(pin)

    async def _find_room(self, attempts: Attempts) -> bool:
        """As of `FindRoom`."""
        await self.hear_ends()
        return self.find_room is not None and await self.find_room(attempts)

    def _count(self, pin: Pin) -> None:
        """Count the pages of a pin for its client. Raises TooManyPins."""
        order, client, count = self._order, pin.client, 0
        for pfn, frames, _, _ in pin.runs:
            count += ((pfn + frames - 1) >> order) - (pfn >> order) + 1
        client.page_count += count - pin.page_count
        pin.page_count = count
        if self.memmap.geometry is not None:
            page_count = self.memmap.geometry.page_count
            if client.page_count > max(MOST_POOLS * page_count, MOST_PAGES):
                raise TooManyPins(pid=client.pid, why=f"it has pinned {client.page_count} pages, "
                                  f"and the pool has {page_count}")  # fmt: skip

    async def _take(self, pin: Pin) -> None:
        """Take a reference on every page, a step at a time, until the pin is stale."""
        memmap, order = self.memmap, self._order
        # An access, as the page structures count them.
        access = Access.WRITE if pin.is_writable else Access.READ
        left = _STEP_PAGES
        for run in pin.runs:
            pfn, count, number, index = run
            if not self._medium.reserved:
                await self._reserve(pfn, count)
            while count:
                step = min(count, _STEP_PAGES << order)
                if pin.is_stale:
                    return
                memmap.get_pages(pfn, step, access, number, index >> order)
                is_whole = step == run.frame_count
                pin.taken.append(run if is_whole else HeldRun(pfn, step, number, index))
                left -= (step >> order) + _RUN_PAGES
                pfn, count, index = pfn + step, count - step, index + step
                if left <= 0:
                    await trio.lowlevel.checkpoint()
                    left = _STEP_PAGES

    async def _reserve(self, pfn: int, count: int) -> None:
        """Get memory under a run of a sparse pool: a client that touched a hole would fault."""
        if self._medium.read_only:
            return
        start, end = pfn << PAGE_SHIFT, (pfn + count) << PAGE_SHIFT
        if end - start <= _RESERVE_AT_ONCE_BYTES:
            # This takes less time than to wake a thread.
            self._medium.reserve(start, end - start)
            return
        for at in range(start, end, _RESERVE_BYTES):
            step = min(_RESERVE_BYTES, end - at)
            await trio.to_thread.run_sync(self._medium.reserve, at, step)

    def _connect(self, pin: Pin) -> int:
        """Let a pin live; the client's end of it. Raises CannotPin."""
        if self._open_count >= (most := most_living()):
            self.notice_ends()
            if self._open_count >= most:
                why = f"its daemon has {len(self._living)} already, of all programs"
                raise CannotPin(errno.EMFILE, what="more pages of this mount", why=why)
        pin.fd, theirs = pin_ends()
        self._keep(pin)
        self._living[pin.number] = self._by_fd[pin.fd] = pin
        # What is said is heard soon, not at the end: a copy of the client's end that somebody sends
        # over itself lies in this queue, and as long as it lies there it isn't closed.
        self._epoll.register(pin.fd, select.EPOLLIN)
        return theirs

    @property
    def _open_count(self) -> int:
        """How many pins have a descriptor, here or with the keeper."""
        return len(self._living) + len(self._resting) + len(self._over)

    # Its life

    async def flush(self, number: int) -> None:
        """The client has made its stores durable: note them as writes. Raises CannotPin."""
        pin = self.living_pin(number)
        if not pin.is_writable:
            raise CannotPin(errno.EBADF, what=f"again, as pin {number}", why="it is read-only")
        self._flush(pin)
        for file in pin.files:
            if self._note(file):
                self._volume.write_back(file.inode)
                await self._told(file.inode)
        if self._medium.durability is Durability.CACHE_LINES:
            self._medium.fence()

    def _flush(self, pin: Pin) -> None:
        if self._medium.durability is Durability.MSYNC:
            # The client's mapping is another one, so the next fence has to be told of its stores.
            for pfn, count, _, _ in pin.runs:
                self._medium.flush(pfn << PAGE_SHIFT, count << PAGE_SHIFT)

    def _note(self, file: PinnedFile) -> bool:
        """Note stores into a file; False if it is not there any more."""
        with contextlib.suppress(OSError, PmemfsError):
            if self._volume.attributes(file.inode).generation == file.generation:
                self._volume.note_stores(file.inode)
                return True
        return False

    async def _told(self, number: int) -> None:
        told = self._tell(number)
        if told is not None:
            await told

    def _hear(self, pin: Pin, *, until_its_end: bool) -> None:
        """Hear what the users of a pin say; what has been heard, the next daemon will know."""
        words, place = self.words, pin.place
        has_more = True
        while has_more:
            words.note_marks(place, pin.marks.word | HEARING)
            has_more = pin.hear() and until_its_end
            words.note_marks(place, pin.marks.word)

    def _mark(self, pin: Pin) -> None:
        self.words.mark(pin.place, PinWord.STALE if pin.is_stale else 0)
        self.words.mark(pin.place, PinWord.RENAMED if pin.is_renamed else 0)

    # Its end

    def _end(self, pin: Pin) -> None:
        """The last copy of a client's end was closed."""
        if pin.is_kept:
            # What the keeper has open as well doesn't leave the epoll when it is closed here.
            self._epoll.unregister(pin.fd)
        os.close(pin.fd)
        pin.fd = -1
        del self._living[pin.number]
        self._leave_client(pin)
        self.words.mark(pin.place, PinWord.ENDED)
        if pin.is_writable:
            self._flush(pin)
            for file in pin.files:
                if self._note(file) and self._nursery is not None:
                    self._nursery.start_soon(self._told, file.inode)
            if not pin.marks.are_orderly:
                self._resting.append((trio.current_time() + self._rest_seconds, pin))
                self._rest_begins.set()
                return
        self._let_go(pin)

    async def _end_rests(self) -> None:
        while True:
            while not self._resting:
                self._rest_begins = trio.Event()
                await self._rest_begins.wait()
            await trio.sleep_until(self._resting[0][0])
            self._let_go(self._resting.popleft()[1])

    async def _drop_over(self) -> None:
        """Let the keeper drop pins that are over, unless others have got their places soon."""
        while True:
            while not self._over:
                self._over_begins = trio.Event()
                await self._over_begins.wait()
            await trio.sleep(_DROP_SECONDS)
            if self._keeper is not None:
                for place in self._over:
                    self._keeper.drop(kept.name_of(place))
            self._over.clear()

    def _leave_client(self, pin: Pin) -> None:
        pin.client.pin_count -= 1
        pin.client.page_count -= pin.page_count

    def _let_go(self, pin: Pin) -> None:
        """Drop all references, at once if they are few."""
        pin.owed = []
        pages = 0
        for _, count, _, _ in pin.taken:
            pages += (count >> self._order) + _RUN_PAGES
        if pages <= _STEP_PAGES or self._nursery is None:
            self._drop_some(pin, pages)
            self._withdraw(pin)
        else:
            self._leaving_count += 1
            self._nursery.start_soon(self._let_go_in_steps, pin)

    async def _let_go_in_steps(self, pin: Pin) -> None:
        try:
            await self._drop(pin)
            self._withdraw(pin)
        finally:
            self._leaving_count -= 1

    async def _drop(self, pin: Pin) -> None:
        pin.owed = []
        while pin.taken:
            self._drop_some(pin, _STEP_PAGES)
            await trio.lowlevel.checkpoint()
        for held in pin.held:
            self._volume.pinned.remove(held)

    def _drop_some(self, pin: Pin, pages: int) -> None:
        while pin.taken and pages > 0:
            pfn, count, _, _ = pin.taken.pop()
            # What can't be read was reported when it was met, and stays busy.
            with contextlib.suppress(MemoryFault):
                self.memmap.put_pages(pfn, count)
            pages -= (count >> self._order) + _RUN_PAGES

    def _withdraw(self, pin: Pin) -> None:
        for held in pin.held:
            self._volume.pinned.remove(held)
        pin.forget()
        if pin.is_kept:
            self.words.note_marks(pin.place, OVER)
            if not self._over:
                self._over_begins.set()
            self._over[pin.place] = None
        del self._all[pin.number]
        self.words.give_back(pin.place)


def most_living() -> int:
    """How many pins may live. Each needs a descriptor, and the daemon needs some for all else."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - limit // 8
