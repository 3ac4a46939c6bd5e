"""What the control plane does to the lock of names and to what that guards; how workers wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.data_plane import Tables, some_tables
from kit.native_names import NativeNames, native_names
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import NAMES_HEAD
from pmemfs.dataplane.native import NamesShared, load_word, store_word
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT

WORKER = 1
SOON_NS = 60 * 10**9
HASTE_SECONDS = 0.005
ROOM = 1 << layouts.NAMES_STACK_SHIFT


@pytest.fixture
def tables(shm: Path) -> Iterator[Tables]:
    with some_tables(shm, has_files=True) as made:
        yield made


@pytest.fixture
def names(tables: Tables) -> NamesShared:
    names = tables.shared.names
    assert names is not None
    return names


def word_at(tables: Tables, name: str) -> int:
    return tables.shared.areas.names + NAMES_HEAD.offset_of(name)


def set_word(tables: Tables, name: str, value: int) -> None:
    store_word(tables.shared.memory, word_at(tables, name), value)


def test_the_lock_is_taken_once_and_freed(tables: Tables, names: NamesShared) -> None:
    assert names.take(SOON_NS) is False
    assert names.is_mine
    # Whoever has it may ask again.
    assert names.take(SOON_NS) is False
    names.free()
    assert not names.is_mine
    assert load_word(tables.shared.memory, word_at(tables, "holder")) == 0


def test_the_lock_of_a_worker_that_lives_is_waited_for(tables: Tables, names: NamesShared) -> None:
    tables.shared._set_slot_word(WORKER, "thread_id", threading.get_native_id())
    set_word(tables, "holder", 1 + WORKER)
    taken = threading.Event()

    def take() -> None:
        assert names.take(SOON_NS) is False
        taken.set()

    other = threading.Thread(target=take)
    other.start()
    assert not taken.wait(0.05)
    # What a worker has is not the control plane's to free.
    names.free()
    assert not taken.wait(0.05)
    set_word(tables, "holder", 0)
    assert taken.wait(10)
    other.join()


def test_a_worker_that_never_frees_the_lock_is_not_waited_for_for_ever(
    tables: Tables, names: NamesShared
) -> None:
    tables.shared._set_slot_word(WORKER, "thread_id", threading.get_native_id())
    set_word(tables, "holder", 1 + WORKER)
    assert names.take(1000) is None
    assert not names.is_mine


def test_the_lock_of_a_dead_worker_is_taken_over(tables: Tables, names: NamesShared) -> None:
    other = threading.Thread(
        target=lambda: tables.shared._set_slot_word(WORKER, "thread_id", threading.get_native_id())
    )
    other.start()
    other.join()
    set_word(tables, "holder", 1 + WORKER)
    assert names.take(SOON_NS)
    assert names.is_mine
    # No such worker ever lived.
    set_word(tables, "holder", 99)
    assert names.take(SOON_NS)


def test_a_stack_gives_back_what_was_put_there_last(names: NamesShared) -> None:
    names.slots.push([1, 2, 3])
    names.slots.push([4])
    assert (names.slots.count, names.slots.numbers()) == (4, [1, 2, 3, 4])
    assert names.slots.pop(2) == [4, 3]
    assert names.slots.pop(9) == [2, 1]
    assert names.slots.pop(9) == []
    assert names.frames.count == names.handles.count == names.orphans.count == 0


def test_a_full_stack_takes_no_more(names: NamesShared) -> None:
    names.frames.push(range(ROOM))
    with pytest.raises(IndexError):
        names.frames.push([1])
    assert names.frames.numbers() == list(range(ROOM))
    assert names.handles.numbers() == names.slots.numbers() == []


def test_a_count_that_is_not_possible_is_taken_for_a_full_stack(
    tables: Tables, names: NamesShared
) -> None:
    set_word(tables, "slot_count", 1 << 60)
    assert len(names.slots.pop(1 << 62)) == ROOM
    assert names.slots.count == 0


def test_the_ring_says_what_has_changed_until_it_has_gone_round(
    tables: Tables, names: NamesShared
) -> None:
    room = 1 << layouts.NAMES_CHANGES_SHIFT
    at = tables.shared.areas.names + layouts.NAMES_CHANGES_AT
    for number in range(room + 10):
        store_word(tables.shared.memory, at + number % room * 8, number)
    set_word(tables, "changes", room + 10)
    assert names.changes == room + 10
    assert names.changed_since(room + 7) == [room + 7, room + 8, room + 9]
    assert names.changed_since(room + 10) == []
    assert names.changed_since(10) == list(range(10, room + 10))
    assert names.changed_since(9) is None


def test_inodes_whose_logs_are_replaced_get_another_version(
    tables: Tables, names: NamesShared
) -> None:
    at = tables.shared.areas.names + layouts.NAMES_VERSIONS_AT
    names.rewritten(1027)
    names.rewritten(3)
    names.rewritten(4)
    assert [load_word(tables.shared.memory, at + place * 8) for place in (2, 3, 4)] == [0, 2, 1]


def test_other_modes_have_no_names(shm: Path) -> None:
    with some_tables(shm) as tables:
        assert tables.shared.names is None


def test_a_worker_hands_over_what_can_not_be_had_soon(shm: Path) -> None:
    with native_names(shm) as native:
        native.names.take()
        for handed_over in (1, 2):
            verdict, *_ = native.worker.answer(b"none\0", opcode=Opcode.LOOKUP, inode=ROOT)
            assert verdict == "forward"
            assert native.word("busy") == handed_over
        native.names.free()
        assert native.ask(Opcode.LOOKUP, ROOT, b"none\0") is not None
        assert native.word("busy") == 2


def is_waited_for(native: NativeNames) -> bool:
    """Whether a worker answers though it finds the lock taken, if it is free soon."""

    def free_soon() -> None:
        asked.wait()
        # The worker has begun, since it has let this thread run.
        time.sleep(0.0001)
        native.names.free()

    asked = threading.Event()
    other = threading.Thread(target=free_soon)
    native.names.take()
    other.start()
    asked.set()
    verdict, *_ = native.worker.answer(b"none\0", opcode=Opcode.LOOKUP, inode=ROOT)
    other.join()
    # After it has waited in vain, it does not wait for a while.
    time.sleep(HASTE_SECONDS if verdict == "forward" else 0)
    return verdict == "answer"


def test_a_worker_waits_for_a_lock_that_is_free_soon(shm: Path) -> None:
    with native_names(shm) as native:
        # On a loaded machine the other thread may come too late, and rarely too early.
        for _ in range(20):
            if sum(is_waited_for(native) for _ in range(20)) > 10:
                return
    pytest.fail("it hands over at once")
