"""Addresses over pieces of a file: what they show, when they let go, and what an end of a pin says.

All over real mappings of a file in memory; a socket stands where the daemon is.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pmemfs.medium.addresses import Addresses, PinEnd, Shown, Tally, Words
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB

FRAMES = 1024
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
Piece = tuple[int, int, int]


@pytest.fixture
def pool(shm: Path) -> Iterator[int]:
    """A file each frame of which has its number in every word."""
    words = np.repeat(np.arange(FRAMES, dtype="<u8"), FRAME_BYTES // 8)
    (shm / "pool").write_bytes(words.tobytes())
    fd = os.open(shm / "pool", os.O_RDWR)
    yield fd
    os.close(fd)


class Pinned:
    """An end of a pin, and what the other side hears of it."""

    def __init__(self, *, speaks: bool = True) -> None:
        ours, self.theirs = socket.socketpair()
        self.tally = Tally()
        self.end: PinEnd | None = PinEnd(ours.detach(), self.tally, speaks=speaks)

    def heard(self) -> bytes:
        """All that was said, once the end is over; blocks until then."""
        self.theirs.settimeout(20)
        said = b""
        while word := self.theirs.recv(100):
            said += word
        return said

    def is_over(self) -> bool:
        """Whether the other side has heard of the end."""
        self.theirs.setblocking(False)
        try:
            while self.theirs.recv(100):
                pass
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def pinned() -> Iterator[Pinned]:
    made = Pinned()
    yield made
    made.theirs.close()


def mapped(
    fd: int, pieces: list[Piece], pinned: Pinned | None = None, *, prot: int = READ,
    flags: int = mmap.MAP_SHARED, lead: int = 0, length: int | None = None,
    unit: int = FRAME_BYTES, shift: int = 0, about: object = None,
) -> Addresses:  # fmt: skip
    if length is None:
        length = sum(piece[2] for piece in pieces) - lead
    return Addresses(
        fd, pieces, lead=lead, length=length, unit=unit, shift=shift, prot=prot, flags=flags,
        held=pinned.end if pinned else None, tally=pinned.tally if pinned else Tally(),
        about=about,
    )  # fmt: skip


def array(memory: Addresses, dtype: str = "u1") -> np.ndarray:
    shown = Shown(memory)
    return np.ndarray(memory.length // np.dtype(dtype).itemsize, dtype, buffer=shown)


def side_by_side(*pieces: tuple[int, int]) -> list[Piece]:
    """Pieces of (first frame or -1, frame count), one behind the other."""
    found, at = [], 0
    for frame, count in pieces:
        found.append((at, frame * FRAME_BYTES if frame >= 0 else -1, count * FRAME_BYTES))
        at += count * FRAME_BYTES
    return found


def frames_shown(memory: Addresses) -> list[int]:
    """The first word of each frame."""
    return [int(word) for word in array(memory, "<u8")[:: FRAME_BYTES // 8]]


def test_pieces_of_a_file_are_one_array(pool: int) -> None:
    memory = mapped(pool, side_by_side((7, 2), (100, 1), (3, 3)))
    assert frames_shown(memory) == [7, 8, 100, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 255, 1000])
def test_any_number_of_pieces_is_one_array(pool: int, count: int) -> None:
    order = [random.Random(count).randrange(FRAMES) for _ in range(count)]
    assert frames_shown(mapped(pool, side_by_side(*((frame, 1) for frame in order)))) == order


def test_holes_are_zeroes_that_nobody_can_store_into(pool: int) -> None:
    memory = mapped(pool, side_by_side((7, 1), (-1, 2), (9, 1)))
    assert frames_shown(memory) == [7, 0, 0, 9]
    with pytest.raises(ValueError, match="read-only"):
        array(memory)[FRAME_BYTES] = 1


def test_what_begins_and_ends_within_a_frame_shows_no_more(pool: int) -> None:
    memory = mapped(pool, side_by_side((7, 1), (9, 1)), lead=4000, length=100)
    shown = array(memory)
    assert len(shown) == 100
    assert shown.tobytes() == bytes([7, *bytes(7)] * 12) + bytes([9, *bytes(3)])


def test_a_mapping_of_nothing_is_an_empty_array(pool: int) -> None:
    assert len(array(mapped(pool, []))) == 0


def test_an_array_for_reading_cannot_be_made_writable(pool: int) -> None:
    shown = array(mapped(pool, side_by_side((7, 1))))
    with pytest.raises(ValueError, match="WRITEABLE"):
        shown.flags.writeable = True


def test_stores_are_in_the_file(pool: int) -> None:
    array(mapped(pool, side_by_side((9, 1), (7, 1)), prot=BOTH))[4090:4100] = 0xFF
    assert os.pread(pool, 6, 10 * FRAME_BYTES - 6) == b"\xff" * 6
    assert os.pread(pool, 5, 7 * FRAME_BYTES) == b"\xff\xff\xff\xff\x00"


def test_stores_into_a_private_mapping_are_the_processs_own(pool: int) -> None:
    memory = mapped(pool, side_by_side((9, 1), (-1, 1)), prot=BOTH, flags=mmap.MAP_PRIVATE)
    shown = array(memory)
    shown[:] = 1
    assert set(os.pread(pool, FRAME_BYTES, 9 * FRAME_BYTES)) == {9, 0}
    assert (array(memory) == 1).all()


@pytest.mark.parametrize("frame", [0, 5, 300])
def test_addresses_are_where_huge_pages_can_be(pool: int, frame: int) -> None:
    start = frame * FRAME_BYTES
    memory = mapped(pool, side_by_side((frame, 600)), unit=2 * MIB, shift=start % (2 * MIB))
    assert array(memory).ctypes.data % (2 * MIB) == start % (2 * MIB)
    assert frames_shown(memory)[:3] == [frame, frame + 1, frame + 2]


def address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def test_no_addresses_are_left_over(pool: int) -> None:
    before = address_space_bytes()
    for _ in range(200):
        array(mapped(pool, side_by_side((3, 600), (-1, 9), (1, 1)), unit=2 * MIB, shift=12288))
    assert address_space_bytes() - before < 100 * MIB


@pytest.mark.parametrize(
    "pieces",
    [
        [(FRAME_BYTES, 0, FRAME_BYTES)],
        [(0, 0, FRAME_BYTES), (2 * FRAME_BYTES, 0, FRAME_BYTES)],
        [(0, 0, 2 * FRAME_BYTES), (FRAME_BYTES, 0, FRAME_BYTES)],
        [(0, 100, FRAME_BYTES)],
        [(0, -2, FRAME_BYTES)],
        [(0, 0, 100)],
        [(0, 0, 0)],
    ],
    ids=str,
)
def test_pieces_with_gaps_or_overlaps_are_refused(pool: int, pieces: list[Piece]) -> None:
    with pytest.raises(ValueError, match="side by side"):
        mapped(pool, pieces)


def test_more_than_is_mapped_is_never_shown(pool: int) -> None:
    for lead, length in ((0, FRAME_BYTES + 1), (100, FRAME_BYTES), (FRAME_BYTES + 1, 0)):
        with pytest.raises(ValueError, match="shorter"):
            mapped(pool, side_by_side((1, 1)), lead=lead, length=length)


def test_a_mapping_that_fails_leaves_nothing(pool: int, pinned: Pinned) -> None:
    before = address_space_bytes()
    reader = os.open(f"/proc/self/fd/{pool}", os.O_RDONLY)
    for _ in range(20):
        with pytest.raises(OSError, match="Permission denied"):
            mapped(reader, side_by_side((-1, 900), (1, 2)), pinned, prot=BOTH)
    os.close(reader)
    assert address_space_bytes() - before < 40 * MIB
    assert (pinned.tally.pins, pinned.tally.mappings, pinned.tally.mapped_bytes) == (1, 0, 0)


# The end of a pin


def views_of(whole: np.ndarray) -> list[object]:
    """Each way to look at an array that numpy and Python have."""
    return [
        whole[3:5], whole[::-2], whole.reshape(-1, 64), whole.view("<u4"), whole.T, whole.ravel(),
        memoryview(whole)[3:], whole.view(np.recarray), np.asarray(whole), whole[None],
        np.frombuffer(whole, "u2"), np.ndarray(8, "u1", whole), whole[1:][1:][1:],
        np.lib.stride_tricks.as_strided(whole), np.broadcast_to(whole, (3, len(whole))),
        iter(whole), whole.flat,
    ]  # fmt: skip


NUMBER_OF_VIEWS = len(views_of(np.zeros(4096, "u1")))


@pytest.mark.parametrize("number", range(NUMBER_OF_VIEWS))
def test_the_last_view_is_the_end_of_the_pin(pool: int, pinned: Pinned, number: int) -> None:
    memory = mapped(pool, side_by_side((7, 1)), pinned)
    pinned.end = None
    whole = array(memory)
    view = views_of(whole)[number]
    assert memory.is_shown
    del whole, memory
    assert not pinned.is_over()
    assert pinned.tally.mappings == 1
    del view
    assert pinned.heard() == b"d"
    assert (pinned.tally.pins, pinned.tally.mappings, pinned.tally.mapped_bytes) == (0, 0, 0)


@pytest.mark.parametrize("copy", [np.copy, bytes, np.ndarray.tolist, lambda a: a + 0])
def test_a_copy_keeps_no_pin(pool: int, pinned: Pinned, copy: object) -> None:
    assert callable(copy)
    kept = copy(array(mapped(pool, side_by_side((7, 1)), pinned)))
    pinned.end = None
    assert pinned.heard() == b"d"
    assert len(kept) == FRAME_BYTES


def test_a_pin_of_several_mappings_ends_with_the_last(pool: int, pinned: Pinned) -> None:
    memories = [mapped(pool, side_by_side((frame, 1)), pinned) for frame in range(3)]
    pinned.end = None
    while len(memories) > 1:
        memories.pop()
        assert pinned.tally.pins == 1
    memories.clear()
    assert pinned.heard() == b"d"


def test_force_shows_zeroes_and_lets_go_at_once(pool: int, pinned: Pinned) -> None:
    memory = mapped(pool, side_by_side((7, 1), (-1, 1), (3, 2)), pinned, prot=BOTH)
    pinned.end = None
    whole = array(memory)
    memory.force()
    assert pinned.heard() == b"xd"
    assert not whole.any()
    whole[:] = 5
    assert os.pread(pool, 1, 7 * FRAME_BYTES) == b"\x07"
    memory.force()
    assert not whole.any()


def keep_looking(whole: np.ndarray, ended: threading.Event, sums: list[int]) -> None:
    while not ended.is_set():
        sums.append(int(whole.sum()))


def test_force_never_lets_a_thread_that_looks_fall(pool: int) -> None:
    for prot in (READ, BOTH):
        memory = mapped(pool, side_by_side(*((frame, 1) for frame in range(64))), prot=prot)
        whole, ended = array(memory), threading.Event()
        sums: list[int] = []
        threads = [
            threading.Thread(target=keep_looking, args=(whole, ended, sums)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        while not sums:
            pass
        memory.force()
        ended.set()
        for thread in threads:
            thread.join()
        assert not whole.any()


def test_the_collector_never_takes_memory_from_under_a_view(pool: int, pinned: Pinned) -> None:
    class Ring:
        """Looks at its array when it is collected."""

        def __init__(self, held: object) -> None:
            self.held, self.ring = held, self

        def __del__(self) -> None:
            assert memoryview(self.held)[0] == 7  # type: ignore[arg-type]
            seen.append(True)

    seen: list[bool] = []
    memory = mapped(pool, side_by_side((7, 1)), pinned)
    pinned.end = None
    gc.disable()  # It comes whenever enough was made, perhaps before it is looked for.
    try:
        shown = Shown(memory)
        for held in (shown, memoryview(shown), array(memory)):
            Ring(held)
        del memory, shown, held
        assert not pinned.is_over()
    finally:
        gc.enable()
    gc.collect()
    assert seen == [True] * 3
    assert pinned.heard() == b"d"


def test_what_shows_addresses_can_be_referred_to_weakly(pool: int) -> None:
    memory = mapped(pool, side_by_side((7, 1)))
    shown = Shown(memory)
    known = weakref.ref(shown)
    assert memory.is_shown
    del shown
    assert known() is None
    assert not memory.is_shown


def test_a_child_says_that_there_are_two_ends_now(pool: int, pinned: Pinned) -> None:
    whole = array(mapped(pool, side_by_side((7, 1)), pinned))
    pinned.end = None
    child = os.fork()
    if child == 0:
        pinned.theirs.close()
        code = int(whole[0] != 7)
        del whole
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not pinned.is_over() or pytest.fail("the child's end was the last")
    assert whole[0] == 7
    del whole
    assert pinned.is_over()


def test_the_ends_of_parent_and_child_are_counted(pool: int, pinned: Pinned) -> None:
    whole = array(mapped(pool, side_by_side((7, 1)), pinned))
    pinned.end = None
    child = os.fork()
    if child == 0:
        pinned.theirs.close()
        del whole
        os._exit(0)
    os.waitpid(child, 0)
    del whole
    assert sorted(pinned.heard()) == sorted(b"fdd")


def test_a_child_that_dies_leaves_an_end_uncounted(pool: int, pinned: Pinned) -> None:
    whole = array(mapped(pool, side_by_side((7, 1)), pinned))
    pinned.end = None
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    del whole
    assert sorted(pinned.heard()) == sorted(b"fd")


def test_a_pin_that_nobody_writes_by_is_silent_until_its_end(pool: int) -> None:
    pinned = Pinned(speaks=False)
    memory = mapped(pool, side_by_side((7, 1)), pinned)
    assert pinned.end is not None
    pinned.end.taint()
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not pinned.is_over()
    pinned.end = None
    del memory
    assert pinned.heard() == b""
    assert pinned.tally.pins == 0
    pinned.theirs.close()


def test_an_end_that_nobody_hears_is_no_error(pool: int, pinned: Pinned) -> None:
    memory = mapped(pool, side_by_side((7, 1)), pinned)
    pinned.end = None
    pinned.theirs.close()
    del memory
    assert pinned.tally.pins == 0


def test_an_end_never_waits_for_who_does_not_listen(pool: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while ours.send(bytes(4096)):
                pass
        end = PinEnd(ours.detach(), Tally(), speaks=True)
        end.taint()
        del end


def test_what_could_not_be_made_closes_nobodys_file(pool: int) -> None:
    first = os.fstat(0)
    with pytest.raises(TypeError):
        PinEnd(pool, None, speaks=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        PinEnd("no number", Tally(), speaks=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Shown(None)  # type: ignore[arg-type]
    gc.collect()
    assert os.path.samestat(os.fstat(0), first)
    assert os.fstat(pool)


def test_words_are_read_as_they_are_now() -> None:
    fd = os.memfd_create("words")
    try:
        os.truncate(fd, 1 << 20)
        words = Words(fd)
        assert words.read(1000) == 0
        os.pwrite(fd, (5).to_bytes(8, sys.byteorder), 8000)
        assert words.read(1000) == 5
        with pytest.raises(IndexError):
            words.read(1 << 17)
    finally:
        os.close(fd)
