"""Keys of files are derived, kept in slots, given to other files, wiped; and outlive a process."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from pmemfs.transform.keyring import Keyring
from pmemfs.transform.secrets import FREE, MASTER, SLOT_COUNT, create_secrets

KEY_BYTES, SLOT_BYTES = 64, 128


class Transform(NamedTuple):
    key_id: bytes
    nonce: bytes


class File(NamedTuple):
    number: int
    transform: Transform
    generation: int = 1


@dataclass
class Tables:
    """Tables that workers see until somebody says that they don't."""

    shown: set[int] = field(default_factory=set)
    withdrawn: list[int] = field(default_factory=list)
    are_over: bool = False

    def changed(self, number: int) -> object | None:
        self.withdrawn.append(number)
        return number if number in self.shown else None

    def is_over(self, token: object) -> bool:
        assert token in self.shown
        return self.are_over


@pytest.fixture
def memory() -> Iterator[int]:
    fd = create_secrets()
    yield fd
    os.close(fd)


def unlocked(memory: int, tables: Tables | None = None) -> tuple[Keyring, bytes]:
    keyring = Keyring(lambda: memory, tables or Tables())
    slot = keyring.take_master()
    keyring.secrets.generate(slot)
    return keyring, keyring.keep_master(slot)


def file(number: int, key_id: bytes) -> File:
    return File(number, Transform(key_id, number.to_bytes(16, "little")))


def keys_in(memory: int) -> set[bytes]:
    with mmap.mmap(memory, SLOT_COUNT * SLOT_BYTES) as slots:
        raw = slots[:]
    return {raw[at : at + KEY_BYTES] for at in range(0, len(raw), SLOT_BYTES)}


def seal(keyring: Keyring, slot: int) -> bytes:
    return keyring.secrets.siv_encrypt(slot, b"", b"what it says")


def test_before_the_first_key_no_memory_is_locked_and_every_key_is_missing(memory: int) -> None:
    keyring = Keyring(lambda: memory, Tables())
    with pytest.raises(OSError, match="Required key") as refused:
        keyring.slot_of(bytes(16))
    assert refused.value.errno == errno.ENOKEY
    assert keyring._secrets is None
    keyring.wipe_all()
    assert keyring._secrets is None


def test_a_file_has_one_key_for_each_purpose_and_no_other_file_has_it(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    one, other = file(7, key_id), file(8, key_id)
    ways = (keyring.file_slot, keyring.names_slot, keyring.values_slot)
    sealed = [seal(keyring, slot_of(inode)) for inode in (one, other) for slot_of in ways]
    assert len(set(sealed)) == len(sealed)
    assert [seal(keyring, slot_of(inode)) for inode in (one, other) for slot_of in ways] == sealed


def test_an_inode_that_has_the_number_of_a_removed_one_has_another_key(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    before = File(7, Transform(key_id, b"a" * 16), generation=1)
    after = File(7, Transform(key_id, b"b" * 16), generation=2)
    assert seal(keyring, keyring.file_slot(before)) != seal(keyring, keyring.file_slot(after))


def test_an_inode_that_was_not_made_after_all_leaves_no_key_to_the_next_one(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    failed = File(7, Transform(key_id, b"a" * 16))
    made = File(7, Transform(key_id, b"b" * 16))
    seal(keyring, keyring.values_slot(failed))
    sealed = seal(keyring, keyring.values_slot(made))
    fresh = Keyring(lambda: memory, Tables(), may_have_keys=True)
    assert seal(fresh, fresh.values_slot(made)) == sealed


def test_who_takes_over_finds_the_keys_and_the_slots_of_files(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    slots = {number: keyring.file_slot(file(number, key_id)) for number in range(1, 20)}
    keyring.names_slot(file(1, key_id))
    after = Keyring(lambda: memory, Tables(), may_have_keys=True)
    assert after.unlocked == {key_id}
    assert {number: after.file_slot(file(number, key_id)) for number in slots} == slots
    # What only the dead process could use is gone.
    used = [slot for slot in range(SLOT_COUNT) if after.secrets.kind(slot) != FREE]
    assert len(used) == 1 + len(slots)


def test_what_was_about_to_be_a_key_when_a_process_died_is_wiped(memory: int) -> None:
    Keyring(lambda: memory, Tables()).take_master()
    with mmap.mmap(memory, SLOT_COUNT * SLOT_BYTES) as slots:
        slots[3 * SLOT_BYTES : 3 * SLOT_BYTES + KEY_BYTES] = b"k" * KEY_BYTES
    Keyring(lambda: memory, Tables(), may_have_keys=True)
    assert keys_in(memory) == {bytes(KEY_BYTES)}


def test_a_key_that_was_only_tried_is_neither_unlocked_nor_left_for_who_takes_over(
    memory: int,
) -> None:
    keyring, key_id = unlocked(memory)
    secrets, secret, salt = keyring.secrets, b"a passphrase", bytes(16)
    wrapped = secrets.wrap(keyring.slot_of(key_id), secret, salt, 4, 1, 1, b"")
    # A process dies while it tries what unlocks a key that is unlocked, and a locked one.
    assert secrets.unwrap(keyring.take_master(), secret, salt, 4, 1, 1, wrapped, b"")
    locked = secrets.generate(keyring.take_master())
    fresh = Keyring(lambda: memory, Tables(), may_have_keys=True)
    assert fresh.unlocked == {key_id}
    assert not fresh.is_unlocked(locked)
    fresh.begin_lock(key_id)
    fresh.lock(key_id)
    assert keys_in(memory) == {bytes(KEY_BYTES)}
    assert not Keyring(lambda: memory, Tables(), may_have_keys=True).unlocked


def test_more_files_than_slots_are_served_the_least_recently_used_one_gives_way(
    memory: int,
) -> None:
    tables = Tables()
    keyring, key_id = unlocked(memory, tables)
    first = seal(keyring, keyring.file_slot(file(1, key_id)))
    favourite = keyring.file_slot(file(2, key_id))
    for number in range(3, 3 * SLOT_COUNT):
        keyring.file_slot(file(number, key_id))
        assert keyring.file_slot(file(2, key_id)) == favourite
    assert tables.withdrawn[0] == 1
    assert seal(keyring, keyring.file_slot(file(1, key_id))) == first
    assert keyring.secrets.kind(keyring.slot_of(key_id)) == MASTER


def test_a_slot_is_given_to_another_file_only_when_no_worker_sees_its_table_any_more(
    memory: int,
) -> None:
    tables = Tables(shown=set(range(1, 10)))
    keyring, key_id = unlocked(memory, tables)
    slots = {number: keyring.file_slot(file(number, key_id)) for number in range(1, 10)}
    keys = {number: seal(keyring, slot) for number, slot in slots.items()}
    others = [keyring.file_slot(file(n, key_id)) for n in range(100, 100 + 2 * SLOT_COUNT)]
    assert set(tables.withdrawn) > set(slots)
    assert not set(others) & set(slots.values())
    assert {number: seal(keyring, slot) for number, slot in slots.items()} == keys
    tables.are_over = True
    others = [keyring.file_slot(file(n, key_id)) for n in range(100, 100 + 2 * SLOT_COUNT)]
    assert set(slots.values()) < set(others)


def test_a_key_that_is_being_locked_gives_out_nothing_and_still_counts(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    slot = keyring.file_slot(file(7, key_id))
    key = seal(keyring, slot)
    keyring.begin_lock(key_id)
    assert not keyring.is_unlocked(key_id)
    assert key_id not in keyring.unlocked
    with pytest.raises(OSError, match="Required key"):
        keyring.file_slot(file(7, key_id))
    assert seal(keyring, slot) == key
    keyring.keep_unlocked(key_id)
    assert keyring.file_slot(file(7, key_id)) == slot


@pytest.mark.parametrize("is_taken_over", [False, True])
def test_a_lock_wipes_the_key_and_what_was_derived_from_it(
    memory: int, is_taken_over: bool
) -> None:
    keyring, key_id = unlocked(memory)
    for number in range(1, 50):
        keyring.file_slot(file(number, key_id))
        keyring.names_slot(file(number, key_id))
        keyring.values_slot(file(number, key_id))
    tables = Tables()
    if is_taken_over:
        keyring = Keyring(lambda: memory, tables, may_have_keys=True)
    keyring.begin_lock(key_id)
    keyring.lock(key_id)
    assert keys_in(memory) == {bytes(KEY_BYTES)}
    assert not keyring.has_keys
    if is_taken_over:
        assert set(tables.withdrawn) == set(range(1, 50))


def test_a_lock_leaves_other_keys_and_their_files(memory: int) -> None:
    tables = Tables()
    keyring, key_id = unlocked(memory, tables)
    slot = keyring.take_master()
    keyring.secrets.generate(slot)
    other_id = keyring.keep_master(slot)
    keyring.file_slot(file(1, key_id))
    kept = keyring.file_slot(file(2, other_id))
    keyring.begin_lock(key_id)
    keyring.lock(key_id)
    assert tables.withdrawn == [1]
    assert keyring.file_slot(file(2, other_id)) == kept
    assert keyring.unlocked == {other_id}


def test_a_lock_waits_until_no_worker_sees_a_table_with_a_key(memory: int) -> None:
    tables = Tables(shown={7})
    keyring, key_id = unlocked(memory, tables)
    slot = keyring.file_slot(file(7, key_id))
    asked = []

    def is_over(token: object) -> bool:
        asked.append(keyring.secrets.kind(slot))
        return len(asked) > 3

    tables.is_over = is_over  # type: ignore[method-assign]
    keyring.begin_lock(key_id)
    keyring.lock(key_id)
    assert FREE not in asked
    assert keys_in(memory) == {bytes(KEY_BYTES)}


def test_the_end_of_a_mount_wipes_everything(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    keyring.file_slot(file(7, key_id))
    keyring.wipe_all()
    assert keys_in(memory) == {bytes(KEY_BYTES)}
    assert not keyring.unlocked


def test_a_key_that_is_unlocked_twice_has_one_slot(memory: int) -> None:
    keyring, key_id = unlocked(memory)
    first, second = keyring.slot_of(key_id), keyring.take_master()
    wrapped = keyring.secrets.wrap(first, b"f" * 64, b"s" * 16, 0, 0, 0, b"")
    assert keyring.secrets.unwrap(second, b"f" * 64, b"s" * 16, 0, 0, 0, wrapped, b"")
    assert keyring.keep_master(second) == key_id
    assert keyring.slot_of(key_id) == first
    assert keyring.secrets.kind(second) == FREE
