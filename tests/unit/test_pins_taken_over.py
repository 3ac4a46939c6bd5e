"""Pins outlive their daemon: another registry is made over what a keeper has, and equals the first.

The first daemon is an object here that is not used any more. Its page structures are those of an
older generation. The python engine has no such pins: its mount ends with its daemon.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from kit.pinning import Pinnable, end, file_of, frames, pinnable, settled, whole
from pmemfs.dataplane.memmap import SharedMemmap
from pmemfs.media.inode import ROOT
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pins import kept, registry
from pmemfs.pins.pin import Client, Pin, PinnedFile, WantedRange
from pmemfs.pins.registry import Pins
from pmemfs.pins.words import PinWord
from pmemfs.volume.base import NewInode
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.transaction import Transaction
from pmemfs.volume.onefile import INODE

REST_SECONDS = 0.05


class Kept(NamedTuple):
    data: bytes
    fds: Sequence[int]


class Keeping:
    """Keeps descriptors as the keeper does: copies of them, in this process."""

    def __init__(self) -> None:
        self.stored: dict[str, Kept] = {}

    def store(self, name: str, fds: Sequence[int], data: bytes = b"") -> None:
        self.drop(name)
        self.stored[name] = Kept(data, [os.dup(fd) for fd in fds])

    def drop(self, name: str) -> None:
        if name in self.stored:
            for fd in self.stored.pop(name).fds:
                os.close(fd)

    def hand_out(self) -> dict[str, Kept]:
        """Copies of all, for one daemon."""
        return {
            name: Kept(data, [os.dup(fd) for fd in fds])
            for name, (data, fds) in self.stored.items()
        }


class Mounted:
    """A volume whose daemon may die and be followed by another."""

    def __init__(self, at: Pinnable) -> None:
        self.at = at
        self.keeper = Keeping()
        self._serving = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._dead: list[Pins] = []
        at.pins.keep_with(self.keeper)

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """Run a test while ends of pins are noticed, by whichever daemon lives."""

        async def main() -> None:
            with trio.fail_after(60):
                async with trio.open_nursery() as self._nursery:
                    self._begin_to_serve()
                    await test()
                    self._nursery.cancel_scope.cancel()

        trio.run(main)

    def close(self) -> None:
        """The keeper ends, and what the dead daemons had is closed."""
        for pins in self._dead:
            if "words" in vars(pins):
                pins.words.close()
            pins._epoll.close()
        for name in list(self.keeper.stored):
            self.keeper.drop(name)

    def _begin_to_serve(self) -> None:
        self._serving = scope = trio.CancelScope()
        pins = self.at.pins

        async def serve() -> None:
            with scope:
                await pins.serve()

        if self._nursery is not None:
            self._nursery.start_soon(serve)

    def _pins(self) -> Pins:
        at = self.at
        return Pins(at.pool.medium, at.memmap, at.volume, at.told.append,
                    rest_seconds=REST_SECONDS, keeper=self.keeper)  # fmt: skip

    def die(self) -> None:
        """The daemon dies, which closes what it has open and nothing else. The next one begins."""
        at = self.at
        self._serving.cancel()
        for pin in at.pins.living:
            os.close(pin.fd)
        self._dead.append(at.pins)
        begin_generation(at)
        is_files = isinstance(at.volume, FileSystem)
        at.volume = (FileSystem if is_files else BlockVolume)(at.pool, at.memmap)
        at.pins = Pins(at.pool.medium, at.memmap, at.volume, at.told.append,
                       rest_seconds=REST_SECONDS)  # fmt: skip
        at.pins.take_over(self.keeper.hand_out(), self.keeper)
        self._begin_to_serve()


def begin_generation(at: Pinnable) -> None:
    """Every page structure reads as uninitialised from now on."""
    memmap = at.memmap
    assert isinstance(memmap, SharedMemmap)
    memmap.renew(at.pool.renew())


@pytest.fixture(autouse=True)
def drops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_DROP_SECONDS", 0.01)


@pytest.fixture(params=("fs", "block"))
def mounted(request: pytest.FixtureRequest, shm: Path) -> Iterator[Mounted]:
    with pinnable(request.param, "native", shm / "pool") as at, closing(Mounted(at)) as mounted:
        yield mounted


@pytest.fixture
def device(shm: Path) -> Iterator[Mounted]:
    with pinnable("block", "native", shm / "pool") as at, closing(Mounted(at)) as mounted:
        yield mounted


@pytest.fixture
def files(shm: Path) -> Iterator[Mounted]:
    with pinnable("fs", "native", shm / "pool") as at, closing(Mounted(at)) as mounted:
        yield mounted


def facts_of(pin: Pin) -> tuple[object, ...]:
    client = pin.client
    return (
        pin.number, pin.place, pin.since_ns, pin.is_writable, pin.is_stale, pin.is_renamed,
        pin.marks.word, pin.page_count, pin.piece_count, pin.files, sorted(pin.runs),
        client.pid, client.started, client.command, client.pin_count, client.page_count,
    )  # fmt: skip


def state_of(at: Pinnable) -> tuple[object, ...]:
    found = sorted(at.pins.living, key=lambda pin: pin.number)
    return [facts_of(pin) for pin in found], at.all_references()


def test_pins_made_anew_equal_the_first(mounted: Mounted) -> None:
    at = mounted.at

    async def test() -> None:
        number, other = file_of(at), Client(4711, 12, "naïve --name 'ü'")
        ends = [
            await at.pin(WantedRange(number, 0, 3 * FRAME_BYTES, "d/naïve ü")),
            await at.pin(WantedRange(number, FRAME_BYTES, 100), WantedRange(number, 0, 1)),
            await at.pin(whole(number), is_writable=True, client=other),
            await at.pin(WantedRange(number, 0, 1), client=other),
        ]
        os.write(ends[2][1], b"f")
        await settled(lambda: at.pins.living[2].marks.word != 0)
        end(ends[3][1])
        await settled(lambda: len(at.pins.living) == 3)
        before = state_of(at)
        mounted.die()
        await settled(lambda: state_of(at) == before)
        assert {pin.tell for pin in at.pins.living} == {at.pins._mark}
        for _, fd in ends[:3]:
            end(fd)

    mounted.run(test)


def test_a_description_says_all_of_a_pin() -> None:
    pieces = [(n * 8192, n * 16384, 4096) for n in range(-1, 5000)]
    pin = Pin(7, 3, Client(5, 6, "c"), 1 << 62, is_writable=True, tell=lambda _: None)
    pin.files = [PinnedFile(1, 2, "a", 0, 5, 6, []), PinnedFile(1, 2, "b", 8, 9, 10, pieces)]
    stored = {kept.WORDS: Kept(b"", [5]), "pin-7": Kept(kept.describe(pin), [6])}
    description = kept.Description(7, 3, 1 << 62, True, 5, 6, "c", pin.files)
    assert kept.kept_pins(stored) == [(description, 6)]


def test_a_pin_made_anew_ends_with_its_client(mounted: Mounted) -> None:
    at = mounted.at

    async def test() -> None:
        number = file_of(at)
        (_, gone), (_, fd) = [await at.pin(whole(number)) for _ in range(2)]
        await at.pin(WantedRange(number, 0, 1))
        assert len(mounted.keeper.stored) == 4
        os.close(gone)
        mounted.die()
        assert len(at.pins.living) == 3
        while at.pins.notice_ends():
            pass
        assert len(at.pins.living) == 2, "its client died before the daemon that takes over"
        end(fd)
        await settled(lambda: len(at.pins.living) == 1)
        await settled(lambda: len(mounted.keeper.stored) == 2)
        # It knows the pins that it makes from those that it has found.
        last, fd = await at.pin(WantedRange(number, 0, 1))
        (other,) = set(at.pins.living) - {last}
        assert last.number > other.number
        assert last.place != other.place
        end(fd)

    mounted.run(test)


@pytest.mark.parametrize(
    ("marks", "rests"), [(b"d", False), (b"", True), (b"f", True), (b"fdd", False), (b"xd", True)]
)
def test_what_users_said_to_a_dead_daemon_counts(
    mounted: Mounted, marks: bytes, rests: bool
) -> None:
    at = mounted.at

    async def test() -> None:
        pin, fd = await at.pin(whole(file_of(at)), is_writable=True)
        before = pin.marks.word
        os.write(fd, marks)
        await settled(lambda: not marks or pin.marks.word != before)
        mounted.die()
        os.close(fd)
        while at.pins.notice_ends():
            pass
        assert at.pins.living == ()
        assert bool(at.pins.resting) == rests
        await settled(lambda: at.pins.resting == ())
        await settled(lambda: at.all_references() == {})

    mounted.run(test)


def test_marks_that_a_daemon_may_have_lost_count_as_disorder(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = mounted.at

    class Killed(BaseException):
        pass

    async def test() -> None:
        _, fd = await at.pin(whole(file_of(at)), is_writable=True)
        heard = Pin.hear

        def killed_then(pin: Pin) -> bool:
            heard(pin)
            raise Killed

        os.write(fd, b"f")
        with monkeypatch.context() as patched:
            patched.setattr(Pin, "hear", killed_then)
            with pytest.raises(Killed):
                at.pins.notice_ends()
        mounted.die()
        # One of two users says that it needs the pages no more, and the other one is killed.
        end(fd)
        while at.pins.notice_ends():
            pass
        assert [pin.number for pin in at.pins.resting] == [1]

    trio.run(test)


def test_what_rests_goes_on_resting(mounted: Mounted) -> None:
    at = mounted.at

    async def test() -> None:
        pin, fd = await at.pin(whole(file_of(at)), is_writable=True)
        os.close(fd)
        while at.pins.notice_ends():
            pass
        assert at.pins.resting == (pin,)
        mounted.die()
        while at.pins.notice_ends():
            pass
        assert [pin.number for pin in at.pins.resting] == [1]

    trio.run(test)


def test_a_pin_that_is_over_is_not_made_anew_though_the_keeper_still_has_it(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_DROP_SECONDS", 60)
    at = mounted.at

    async def test() -> None:
        number = file_of(at)
        for _ in range(3):
            _, fd = await at.pin(whole(number), is_writable=True)
            end(fd)
            while not at.pins.notice_ends():
                pass
            assert mounted.keeper.stored.keys() == {kept.WORDS, "pin-1"}, "one place serves all"
        mounted.die()
        assert at.pins.living == ()
        pin, fd = await at.pin(whole(number))
        assert (pin.number, pin.place) == (4, 1)
        end(fd)
        monkeypatch.setattr(registry, "_DROP_SECONDS", 0)
        mounted.die()
        await settled(lambda: mounted.keeper.stored.keys() == {kept.WORDS})

    mounted.run(test)


def test_words_go_on_in_the_memory_that_clients_look_at(files: Mounted) -> None:
    at = files.at

    async def test() -> None:
        one, two = at.make("one", 4 * FRAME_BYTES), at.make("two", 4 * FRAME_BYTES)
        pins = [await at.pin(whole(number)) for number in (one, two)]
        words = at.pins.words
        at.fs.unlink(ROOT, b"one")
        files.die()
        assert words.read(pins[0][0].place) == PinWord.STALE | PinWord.RENAMED
        assert words.read(pins[1][0].place) == 0
        assert [(pin.is_stale, pin.is_renamed) for pin in at.pins.living] == [
            (True,) * 2,
            (False,) * 2,
        ]
        at.fs.set_attributes(two, size_bytes=0)
        assert words.read(pins[1][0].place) == PinWord.STALE
        end(pins[0][1])
        await settled(lambda: bool(words.read(pins[0][0].place) & PinWord.ENDED))
        end(pins[1][1])

    files.run(test)


def test_pinned_pages_of_a_removed_file_are_given_to_nobody_before_the_pin_ends(
    files: Mounted,
) -> None:
    at = files.at

    async def test() -> None:
        number = at.make("file", 8 * FRAME_BYTES, b"pinned" * 4000)
        pin, fd = await at.pin(WantedRange(number, FRAME_BYTES, 3 * FRAME_BYTES))
        again, other = await at.pin(WantedRange(number, 2 * FRAME_BYTES, 4 * FRAME_BYTES))
        held = set(frames(pin)) | set(frames(again))
        content = bytes(at.pool.medium.read(frames(pin)[0] << PAGE_SHIFT, 3 * FRAME_BYTES))
        at.fs.unlink(ROOT, b"file")
        files.die()
        while at.fs.tidy():
            pass
        fill(at, b"others" * 1000)
        assert not any(at.fs.allocator.is_free(pfn) for pfn in held)
        assert bytes(at.pool.medium.read(frames(pin)[0] << PAGE_SHIFT, len(content))) == content
        assert at.fs.space().busy_frames == len(held)
        # They come back, each once.
        full = at.free_frames()
        end(other)
        end(fd)
        await settled(lambda: at.all_references() == {})
        while at.fs.tidy():
            pass
        assert at.fs.space().busy_frames == 0
        assert at.free_frames() - full >= len(held)

    files.run(test)


def fill(at: Pinnable, content: bytes) -> None:
    """Write a file until the volume is full."""
    number = at.make("filling")
    try:
        for at_bytes in range(0, 1 << 40, 1 << 20):
            at.fs.write(number, at_bytes, content * ((1 << 20) // len(content)))
    except OSError:
        pass


def test_a_pinned_range_of_a_device_is_zeroed_in_place(device: Mounted) -> None:
    at = device.at

    async def test() -> None:
        pin, fd = await at.pin(WantedRange(INODE, 0, 4 * FRAME_BYTES))
        first = frames(pin)[0] << PAGE_SHIFT
        at.pool.medium.store(first, b"x" * 8 * FRAME_BYTES)
        device.die()
        await at.volume.punch(INODE, 0, 8 * FRAME_BYTES)
        medium = at.pool.medium
        assert bytes(medium.read(first, 8 * FRAME_BYTES)) == bytes(8 * FRAME_BYTES)
        assert not medium.is_hole(first, 4 * FRAME_BYTES)
        assert medium.is_hole(first + 4 * FRAME_BYTES, 4 * FRAME_BYTES)
        end(fd)

    device.run(test)


def test_references_are_taken_again_in_steps_and_none_is_freed_before(
    files: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_STEP_PAGES", 40)
    at = files.at

    async def test() -> None:
        _, first = await at.pin(whole(at.make("first", 200 * FRAME_BYTES)))
        number = at.make("file", 200 * FRAME_BYTES)
        pin, fd = await at.pin(whole(number))
        before = at.all_references()
        begin_generation(at)
        at.pins.renew()
        assert not set(frames(pin)) & at.all_references().keys()
        at.fs.unlink(ROOT, b"file")
        while at.fs.tidy():
            pass
        assert not any(at.fs.allocator.is_free(pfn) for pfn in frames(pin))
        await settled(lambda: at.all_references() == before)
        end(first)
        end(fd)
        await settled(lambda: at.all_references() == {})
        at.fs.tidy()
        assert at.fs.space().busy_frames == 0

    files.run(test)


def test_a_pin_that_is_made_or_ends_meanwhile_counts_each_page_once(
    files: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_STEP_PAGES", 40)
    at = files.at

    async def test() -> None:
        number = at.make("file", 200 * FRAME_BYTES)
        at.pool.medium.reserved = True
        _, leaving = await at.pin(whole(number))
        end(leaving)
        while not at.pins.notice_ends():
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            made: list[int] = []

            async def make() -> None:
                made.append((await at.pin(whole(number)))[1])

            nursery.start_soon(make)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            begin_generation(at)
            at.pins.renew()
        await settled(lambda: list(at.all_references().values()) == [1] * 200)
        end(made[0])
        await settled(lambda: at.all_references() == {})

    files.run(test)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda fs, number: fs.set_attributes(number, size_bytes=0), PinWord.STALE),
        (lambda fs, number: fs.punch(number, 0, FRAME_BYTES), PinWord.STALE),
        (lambda fs, number: fs.collapse(number, 0, FRAME_BYTES), PinWord.STALE),
        (lambda fs, number: fs.insert(number, 0, FRAME_BYTES), PinWord.STALE),
        (lambda fs, number: fs.unlink(ROOT, b"file"), PinWord.STALE | PinWord.RENAMED),
        (lambda fs, number: fs.rename(ROOT, b"file", ROOT, b"new"), PinWord.RENAMED),
        (lambda fs, number: fs.rename(ROOT, b"other", ROOT, b"file"),
         PinWord.STALE | PinWord.RENAMED),
        (lambda fs, number: fs.rename(ROOT, b"directory", ROOT, b"new"), PinWord.RENAMED),
    ],
)  # fmt: skip
def test_clients_are_told_before_a_change_counts(
    files: Mounted, monkeypatch: pytest.MonkeyPatch, change: Callable[..., object], told: PinWord
) -> None:
    at, words = files.at, []

    async def test() -> None:
        at.make("other")
        at.fs.make(ROOT, b"directory", NewInode(stat.S_IFDIR | 0o700, 0, 0))
        number = at.make("file", 4 * FRAME_BYTES)
        pin, fd = await at.pin(whole(number))
        move_words = Transaction._move_words

        def killed_then(transaction: Transaction) -> None:
            words.append(at.pins.words.read(pin.place))
            move_words(transaction)

        monkeypatch.setattr(Transaction, "_move_words", killed_then)
        change(at.fs, number)
        end(fd)

    files.run(test)
    assert words[0] == told
