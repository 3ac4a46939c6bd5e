"""Pins: references on pages for as long as a client has its end of a socket."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kit.pinning import Pinnable, end, file_of, frames, pinnable, run, settled, whole
from kit.users import as_user
from pmemfs.errors import CannotPin, NoPageStructures, TooManyPieces, TooManyPins
from pmemfs.media.accesses import Accesses
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pins import methods, ranges, registry
from pmemfs.pins.accesses import accesses_of
from pmemfs.pins.pin import Client, Pin, WantedRange, read_client
from pmemfs.pins.words import PinWord, Words

BOTH = [(kind, engine) for kind in ("fs", "block") for engine in ("native", "python")]


@pytest.fixture(params=BOTH, ids="-".join)
def at(request: pytest.FixtureRequest, shm: Path) -> Iterator[Pinnable]:
    with pinnable(*request.param, shm / "pool") as made:
        yield made


@pytest.fixture(params=("native", "python"))
def fs(request: pytest.FixtureRequest, shm: Path) -> Iterator[Pinnable]:
    with pinnable("fs", request.param, shm / "pool") as made:
        yield made


def word(at: Pinnable, place: int) -> int:
    with mmap.mmap(at.pins.words.fd, 0, prot=mmap.PROT_READ) as words:
        return int.from_bytes(words[8 * place : 8 * place + 8], "little")


def test_a_pin_holds_every_page_of_its_range_until_its_descriptor_is_closed(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at)
        pin, fd = await at.pin(WantedRange(number, 100, 2 * FRAME_BYTES))
        ((offset, pool_bytes, length),) = pin.files[0].pieces
        assert (offset, length) == (-100, 3 * FRAME_BYTES), "whole frames"
        assert at.all_references() == dict.fromkeys(frames(pin), 1)
        assert frames(pin)[0] == pool_bytes // FRAME_BYTES
        end(fd)
        await settled(lambda: at.all_references() == {})
        assert at.pins.living == ()

    run(at, test)


def test_a_pin_lasts_until_the_last_copy_of_its_descriptor_is_closed(at: Pinnable) -> None:
    async def test() -> None:
        pin, fd = await at.pin(whole(file_of(at)))
        copy = os.dup(fd)
        os.close(fd)
        await settled(lambda: True)
        assert at.pins.living == (pin,)
        assert at.references(frames(pin)[0]) == 1
        os.close(copy)
        await settled(lambda: at.pins.living == ())

    run(at, test)


def test_a_pin_counts_as_an_access_of_its_pages(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at)
        first, fd = await at.pin(whole(number))
        _, other = await at.pin(whole(number), is_writable=True)
        page = at.memmap.page(frames(first)[1])
        assert page is not None
        assert (page.reads, page.writes, page.refcount) == (1, 1, 2)
        assert page.mapping == number
        assert page.last_access_ns > 0
        end(fd)
        end(other)
        await settled(lambda: at.all_references() == {})

    run(at, test)


def test_one_pin_may_hold_many_files_and_a_page_twice(fs: Pinnable) -> None:
    async def test() -> None:
        one, two = fs.make("one", 3 * FRAME_BYTES), fs.make("two", 2 * FRAME_BYTES)
        pin, fd = await fs.pin(whole(one), whole(two), WantedRange(one, 0, FRAME_BYTES))
        assert sorted(fs.all_references().values()) == [1, 1, 1, 1, 2]
        assert pin.page_count == 6
        end(fd)
        await settled(lambda: fs.all_references() == {})

    run(fs, test)


def test_a_hole_has_no_page_and_a_writable_pin_fills_it(fs: Pinnable) -> None:
    async def test() -> None:
        number = fs.make("sparse")
        fs.fs.set_attributes(number, size_bytes=4 * FRAME_BYTES)
        fs.fs.write(number, FRAME_BYTES, b"x")
        free = fs.free_frames()
        pin, fd = await fs.pin(whole(number))
        assert [piece[1] >= 0 for piece in pin.files[0].pieces] == [False, True, False]
        assert fs.free_frames() == free
        end(fd)
        pin, fd = await fs.pin(whole(number), is_writable=True)
        assert all(piece[1] >= 0 for piece in pin.files[0].pieces)
        assert bytes(fs.fs.read(number, 0, 1 << 20)) == bytes(FRAME_BYTES) + b"x" + bytes(
            3 * FRAME_BYTES - 1
        )
        assert number in fs.told, "the kernel knows another number of blocks"
        end(fd)

    run(fs, test)


def test_a_range_ends_with_its_file(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at, 5 * FRAME_BYTES)
        size = at.volume.attributes(number).size_bytes
        pin, fd = await at.pin(WantedRange(number, size - 10, 1 << 40))
        assert (pin.files[0].length_bytes, pin.files[0].size_bytes) == (10, size)
        end(fd)
        pin, fd = await at.pin(WantedRange(number, size + 1, 5))
        assert (pin.files[0].length_bytes, pin.files[0].pieces) == (0, [])
        end(fd)

    run(at, test)


def test_what_has_no_pages_can_not_be_pinned(shm: Path) -> None:
    with pinnable("block", "python", shm / "pool", scheme=Scheme.NONE) as at:

        async def test() -> None:
            with pytest.raises(NoPageStructures, match="a pin needs page structures"):
                await at.pin(whole(2))

        run(at, test)


def test_an_inode_that_is_no_file_can_not_be_pinned(fs: Pinnable) -> None:
    async def test() -> None:
        for number, code in ((ROOT, errno.EISDIR), (12345, errno.ESTALE)):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await fs.pin(whole(number))
            assert caught.value.errno == code
        assert fs.client.pin_count == 0

    run(fs, test)


def test_a_read_only_volume_has_no_writable_pins(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at)
        at.volume.stop_writing()
        with pytest.raises(OSError, match="Read-only") as caught:
            await at.pin(whole(number), is_writable=True)
        assert caught.value.errno == errno.EROFS
        _, fd = await at.pin(whole(number))
        end(fd)

    run(at, test)


def test_pages_that_left_their_file_are_free_when_their_pin_has_ended(fs: Pinnable) -> None:
    async def test() -> None:
        before = fs.free_frames()
        number = fs.make("file", 16 * FRAME_BYTES)
        pin, fd = await fs.pin(WantedRange(number, 4 * FRAME_BYTES, 4 * FRAME_BYTES))
        assert word(fs, pin.place) == 0
        fs.fs.set_attributes(number, size_bytes=0)
        assert word(fs, pin.place) == PinWord.STALE
        assert fs.fs.space().busy_frames == 16
        fs.fs.tidy()
        assert fs.fs.space().busy_frames == 4, "what nobody holds goes at once"
        end(fd)
        await settled(lambda: fs.fs.space().busy_frames == 0)
        assert fs.free_frames() == before

    run(fs, test)


@pytest.mark.parametrize("how", ["punch", "collapse", "insert", "unlink", "rename over"])
def test_a_pin_whose_pages_leave_or_move_is_stale(fs: Pinnable, how: str) -> None:
    async def test() -> None:
        number, other = fs.make("file", 16 * FRAME_BYTES), fs.make("other", FRAME_BYTES)
        pin, fd = await fs.pin(WantedRange(number, 4 * FRAME_BYTES, 4 * FRAME_BYTES))
        apart, apart_fd = await fs.pin(whole(other))
        {
            "punch": lambda: fs.fs.punch(number, 0, 5 * FRAME_BYTES),
            "collapse": lambda: fs.fs.collapse(number, 0, FRAME_BYTES),
            "insert": lambda: fs.fs.insert(number, 0, FRAME_BYTES),
            "unlink": lambda: fs.fs.unlink(ROOT, b"file"),
            "rename over": lambda: fs.fs.rename(ROOT, b"other", ROOT, b"file"),
        }[how]()
        assert word(fs, pin.place) & PinWord.STALE
        assert not word(fs, apart.place) & PinWord.STALE
        end(fd)
        end(apart_fd)

    run(fs, test)


def test_a_punch_beside_a_pin_leaves_it_as_it_is(fs: Pinnable) -> None:
    async def test() -> None:
        number = fs.make("file", 16 * FRAME_BYTES)
        pin, fd = await fs.pin(WantedRange(number, 4 * FRAME_BYTES, 4 * FRAME_BYTES))
        fs.fs.punch(number, 8 * FRAME_BYTES, FRAME_BYTES)
        fs.fs.punch(number, 0, 4 * FRAME_BYTES)
        assert word(fs, pin.place) == 0
        end(fd)

    run(fs, test)


def test_a_pin_is_told_of_other_names(fs: Pinnable) -> None:
    async def test() -> None:
        one, two = fs.make("one", FRAME_BYTES), fs.make("two", FRAME_BYTES)
        (first, first_fd), (second, second_fd) = await fs.pin(whole(one)), await fs.pin(whole(two))
        fs.fs.link(one, ROOT, b"more")
        assert word(fs, first.place) == 0
        fs.fs.unlink(ROOT, b"more")
        assert word(fs, first.place) == PinWord.RENAMED
        assert word(fs, second.place) == 0
        fs.fs.rename(ROOT, b"two", ROOT, b"three")
        assert word(fs, second.place) == PinWord.RENAMED
        end(first_fd)
        end(second_fd)

    run(fs, test)


def test_stores_count_when_they_are_flushed_and_when_the_pin_ends(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at)

        def forget() -> None:
            at.volume.set_attributes(number, mtime_ns=1, atime_ns=1)
            at.told.clear()

        def is_noted() -> bool:
            return at.volume.attributes(number).mtime_ns > 1 and number in at.told

        pin, fd = await at.pin(whole(number), is_writable=True)
        forget()
        await at.pins.flush(pin.number)
        assert is_noted()
        forget()
        end(fd)
        await settled(is_noted)
        with pytest.raises(CannotPin, match="has ended"):
            await at.pins.flush(pin.number)
        reading, fd = await at.pin(whole(number))
        with pytest.raises(CannotPin, match="read-only"):
            await at.pins.flush(reading.number)
        forget()
        end(fd)
        await settled(lambda: at.pins.living == ())
        assert not is_noted()

    run(at, test)


@pytest.mark.parametrize(
    ("marks", "rests"),
    [(b"", True), (b"x", True), (b"dx", True), (b"fd", True), (b"fdd", False), (b"d", False)],
)
def test_what_a_client_could_write_to_rests_unless_it_ended_in_order(
    fs: Pinnable, marks: bytes, rests: bool
) -> None:
    async def test() -> None:
        before = fs.free_frames()
        number = fs.make("file", 4 * FRAME_BYTES)
        pin, fd = await fs.pin(whole(number), is_writable=True)
        end(fd, marks)
        # At once, because a rest may be over before a task that waits comes to look.
        while fs.pins.notice_ends():
            pass
        assert fs.pins.living == ()
        assert fs.pins.resting == ((pin,) if rests else ())
        fs.fs.unlink(ROOT, b"file")
        assert (fs.free_frames() == before) != rests
        await settled(lambda: fs.free_frames() == before)
        assert fs.pins.resting == ()

    run(fs, test)


def test_what_a_client_only_read_never_rests(at: Pinnable) -> None:
    async def test() -> None:
        _, fd = await at.pin(whole(file_of(at)))
        end(fd, b"")
        await settled(lambda: at.all_references() == {})
        assert at.pins.resting == ()

    run(at, test)


def test_a_place_is_given_to_another_pin_only_after_the_end(at: Pinnable) -> None:
    async def test() -> None:
        number = file_of(at)
        first, fd = await at.pin(whole(number))
        second, other = await at.pin(whole(number))
        assert first.place != second.place
        end(fd)
        await settled(lambda: len(at.pins.living) == 1)
        assert word(at, first.place) == PinWord.ENDED
        third, fd = await at.pin(whole(number))
        assert (third.place, word(at, third.place)) == (first.place, 0)
        end(fd)
        end(other)

    run(at, test)


def test_nobody_else_can_write_the_words(at: Pinnable) -> None:
    fd = at.pins.words.fd
    with pytest.raises(OSError, match="Bad file"):
        os.write(fd, bytes(8))
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0)


def test_a_program_of_the_same_user_can_not_open_the_words_for_writing() -> None:
    def reopen() -> None:
        os.open(f"/proc/self/fd/{Words().fd}", os.O_RDWR)

    with pytest.raises(PermissionError):
        as_user(reopen)


def test_each_client_has_its_quota(at: Pinnable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_PINS", 3)
    other = Client(1, 1, "another")

    async def test() -> None:
        number = file_of(at)
        fds = [(await at.pin(WantedRange(number, 0, 1)))[1] for _ in range(3)]
        with pytest.raises(TooManyPins, match="it has 3 pins"):
            await at.pin(WantedRange(number, 0, 1))
        fds.append((await at.pin(WantedRange(number, 0, 1), client=other))[1])
        end(fds.pop())
        end(fds.pop())
        await settled(lambda: at.client.pin_count == 2)
        fds.append((await at.pin(WantedRange(number, 0, 1)))[1])
        for fd in fds:
            end(fd)
        await settled(lambda: at.client.pin_count == 0)
        monkeypatch.setattr(registry, "MOST_POOLS", 0)
        monkeypatch.setattr(registry, "MOST_PAGES", 0)
        with pytest.raises(TooManyPins, match="it has pinned"):
            await at.pin(WantedRange(number, 0, 1))
        await settled(lambda: at.client.pin_count == 0)
        assert (at.client.page_count, at.all_references()) == (0, {})

    run(at, test)


def test_pins_leave_the_daemon_descriptors_for_all_else(
    at: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.most_living() < resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100
    monkeypatch.setattr(registry, "most_living", lambda: 3)

    async def test() -> None:
        number = file_of(at)
        ends = [(await at.pin(whole(number), client=read_client(1)))[1] for _ in range(3)]
        with pytest.raises(CannotPin, match="of all programs") as refused:
            await at.pin(whole(number))
        assert refused.value.errno == errno.EMFILE
        end(ends.pop())
        await settled(lambda: len(at.pins.living) == 2)
        ends.append((await at.pin(whole(number)))[1])
        for fd in ends:
            end(fd)
        await settled(lambda: at.all_references() == {} and at.client.pin_count == 0)

    run(at, test)


def test_a_file_in_too_many_pieces_is_refused_with_the_remedy(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MOST_PIECES", 8)
    monkeypatch.setattr(ranges, "_PIECES_AT_ONCE", 3)

    async def test() -> None:
        number = fs.make("holes")
        for index in range(0, 12, 2):
            fs.fs.write(number, index * FRAME_BYTES, b"x")
        pin, fd = await fs.pin(WantedRange(number, 5, 8 * FRAME_BYTES - 5))
        assert [piece[0] for piece in pin.files[0].pieces] == [
            index * FRAME_BYTES - 5 for index in range(8)
        ]
        end(fd)
        with pytest.raises(TooManyPieces, match="contiguous=True"):
            await fs.pin(whole(number))
        await settled(lambda: fs.all_references() == {})

    run(fs, test)


def test_the_pieces_of_all_files_of_a_pin_are_counted(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MOST_PIECES", 8)

    async def test() -> None:
        numbers = [fs.make(f"file{n}", FRAME_BYTES) for n in range(9)]
        _, fd = await fs.pin(*map(whole, numbers[:8]))
        end(fd)
        with pytest.raises(TooManyPieces):
            await fs.pin(*map(whole, numbers))
        await settled(lambda: fs.all_references() == {})

    run(fs, test)


def test_a_file_that_becomes_shorter_while_its_holes_are_filled_shows_no_other_bytes(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_FILL_BYTES", FRAME_BYTES)
    size = 64 * FRAME_BYTES

    async def test() -> None:
        fs.make("secret", content=b"s" * 8 * (1 << 20))
        fs.fs.unlink(ROOT, b"secret")
        number = fs.make("sparse")
        fs.fs.set_attributes(number, size_bytes=size)
        found = []

        async def pin() -> None:
            found.append(await fs.pin(whole(number), is_writable=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pin)
            await settled(lambda: fs.fs.attributes(number).block_count > 0)
            fs.fs.set_attributes(number, size_bytes=FRAME_BYTES)
        ((pinned, fd),) = found
        assert pinned.files[0].length_bytes == FRAME_BYTES
        for frame in frames(pinned):
            content = fs.pool.medium.read(frame * FRAME_BYTES, FRAME_BYTES)
            assert bytes(content) == bytes(FRAME_BYTES)
        end(fd)

    run(fs, test)


def test_what_has_no_room_for_its_holes_leaves_them_as_they_are(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_FILL_BYTES", 1 << 20)

    async def test() -> None:
        number = fs.make("sparse")
        fs.fs.set_attributes(number, size_bytes=1 << 40)
        before = fs.free_frames()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            await fs.pin(whole(number), is_writable=True)
        assert fs.free_frames() == before

    run(fs, test)


def test_a_descriptor_that_is_sent_over_itself_does_not_keep_its_pin(at: Pinnable) -> None:
    async def test() -> None:
        _, fd = await at.pin(whole(file_of(at)))
        with socket.socket(fileno=fd) as theirs:
            socket.send_fds(theirs, [b"f"], [fd])
            socket.send_fds(theirs, [b"d"], [fd, fd])
        await settled(lambda: at.pins.living == () and at.all_references() == {})

    run(at, test)


@pytest.mark.parametrize(("marks", "rests"), [(b"f" * 999 + b"d" * 1000, False), (b"fdd?d", True)])
def test_marks_are_counted_whenever_they_come(fs: Pinnable, marks: bytes, rests: bool) -> None:
    async def test() -> None:
        pin, fd = await fs.pin(whole(file_of(fs)), is_writable=True)
        for at in range(0, len(marks), 100):
            os.write(fd, marks[at : at + 100])
            await trio.lowlevel.checkpoint()
        os.close(fd)
        while fs.pins.notice_ends():  # At once, as above.
            pass
        assert fs.pins.living == ()
        assert fs.pins.resting == ((pin,) if rests else ())

    run(fs, test)


def test_a_client_is_known_by_its_number_and_its_start() -> None:
    client = read_client(os.getpid())
    assert client.pid == os.getpid()
    assert client.started > 0
    assert "py" in client.command
    assert read_client(0).command == ""


def test_the_accesses_of_files_are_told_by_their_pages(fs: Pinnable) -> None:
    async def told(*inodes: int) -> Accesses:
        return await accesses_of(inodes, fs.pins, fs.volume, 7)

    async def test() -> None:
        read, written, empty = (fs.make(name, 8 * FRAME_BYTES) for name in ("a", "b", "c"))
        fs.fs.write(empty, 0, b"")
        _, fd = await fs.pin(whole(read))
        end((await fs.pin(whole(read)))[1])
        end((await fs.pin(whole(written), is_writable=True))[1])
        first = await told(read, written, empty, 12345)
        assert first.mount_identity == 7
        assert first.reads == [2, 0, 0, 0]
        assert first.is_pinned == [True, False, False, False]
        assert 0 < first.last_access_ns[0] < first.last_access_ns[1]
        assert first.last_access_ns[2:] == [0, 0]
        # An end counts as soon as the client has closed its descriptor.
        end(fd)
        assert (await told(read)).is_pinned == [False]
        end((await fs.pin(whole(read)))[1])
        assert (await told(read)).last_access_ns[0] > first.last_access_ns[1]

    run(fs, test)


def test_without_page_structures_nobody_knows_of_accesses(shm: Path) -> None:
    async def test() -> None:
        with pytest.raises(NoPageStructures, match="accesses"):
            await accesses_of([1], at.pins, at.volume, 7)

    with pinnable("fs", "python", shm / "pool", scheme=Scheme.NONE) as at:
        run(at, test)


def test_a_pin_of_a_file_without_a_name_says_so_from_its_beginning(fs: Pinnable) -> None:
    async def test() -> None:
        number = fs.make("file", 8 * FRAME_BYTES)
        fs.fs.hold(number)
        named, _ = await fs.pin(whole(number))
        fs.fs.unlink(ROOT, b"file")
        assert word(fs, named.place) == PinWord.RENAMED
        unnamed, _ = await fs.pin(whole(number))
        assert word(fs, unnamed.place) == PinWord.RENAMED
        # One that is being made gets its name later.
        making, _ = await fs.pin(whole(number), is_writable=True)
        assert word(fs, making.place) == 0

    run(fs, test)


def test_a_new_name_is_told_although_the_pin_begins_anew(
    fs: Pinnable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_STEP_PAGES", 4)

    async def test() -> None:
        number = fs.make("file", 64 * FRAME_BYTES)
        got: list[Pin] = []

        async def pin() -> None:
            got.append((await fs.pin(whole(number)))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pin)
            while not fs.volume.pinned.has(number):
                # Each turn of the loop takes a step of the pin.
                await trio.lowlevel.checkpoint()
            assert got == []
            fs.fs.rename(ROOT, b"file", ROOT, b"other")
            fs.fs.punch(number, 0, FRAME_BYTES)
        assert word(fs, got[0].place) == PinWord.RENAMED

    run(fs, test)


def test_a_list_of_pins_fits_into_an_answer(at: Pinnable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REPORT_BYTES", 3000)

    async def test() -> None:
        number = file_of(at)
        pool, medium = at.pool, at.pool.medium
        assert isinstance(medium, MappedMedium)
        asked = methods.PinMethods(at.pins, pool, medium, at.volume, 1)
        fds = [(await at.pin(WantedRange(number, 0, 1, "a name")))[1] for _ in range(30)]
        listed = await asked.pins()
        assert 1 < len(listed) < 30
        assert [one["pin"] for one in listed] == list(range(1, len(listed) + 1))
        for fd in fds:
            end(fd)

    run(at, test)
