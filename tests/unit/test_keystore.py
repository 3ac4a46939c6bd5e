"""Wrapped keys in the root directory: stored, found, damaged; the power fails in each change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from kit.fs_crash import built, on_medium, template
from kit.fs_tree import Tree
from pmemfs.media.inode import ROOT
from pmemfs.media.keys import WRAPPED_KEY, WrappedKey, WrappedKind, key_attribute
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap.none import NoMemmap
from pmemfs.transform.secrets import Secrets, create_secrets
from pmemfs.volume.fs import keystore
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.keystore import (
    KeyStore,
    Secret,
    Way,
    key_report,
    name_of,
    stored_keys,
    wrapped,
)

FIRST, SECOND, THIRD = (Secret(WrappedKind.KEY_FILE, bytes([at]) * 64) for at in (1, 2, 3))
PHRASE = Secret(WrappedKind.PASSPHRASE, b"a passphrase")
KEY, SPARE = 0, 1
"""Slots: of the key that is wrapped, and of what a test unwraps."""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Secrets]:
    # What guessing costs is not what these tests are about.
    monkeypatch.setattr(keystore, "SCRYPT_LOG2_N", 4)
    fd = create_secrets()
    secrets = Secrets(fd)
    secrets.generate(KEY)
    yield secrets
    os.close(fd)


def store_of(fs: FileSystem) -> KeyStore:
    return KeyStore(fs.store, fs.xattrs)


def value(secrets: Secrets, secret: Secret, name: str = "work") -> bytes:
    return wrapped(name, secrets.key_id(KEY), secret, secrets, KEY)


def opening(store: KeyStore, secrets: Secrets, *tried: Secret) -> list[bool]:
    """Which of these secrets unlock the key."""
    ways = store.of_key(secrets.key_id(KEY))
    return [any(way.is_unlocked_by(secret, secrets, SPARE) for way in ways) for secret in tried]


def test_each_way_unlocks_the_key_and_nothing_else_does(secrets: Secrets) -> None:
    tree = Tree()
    store = store_of(tree.mount())
    key_id = secrets.key_id(KEY)
    assert store.key_ids() == []
    assert [store.add(key_id, value(secrets, secret)) for secret in (FIRST, PHRASE)] == [1, 2]
    store = store_of(tree.mount())
    assert store.key_ids() == [key_id]
    assert (store.named("work"), store.named("other")) == (key_id, None)
    assert opening(store, secrets, FIRST, PHRASE, SECOND) == [True, True, False]
    # The bytes of a key file are no passphrase.
    other = Secret(WrappedKind.PASSPHRASE, FIRST.text)
    assert opening(store, secrets, other, PHRASE._replace(text=b"")) == [False, False]


def test_a_number_that_is_free_again_is_used_again_and_others_stay(secrets: Secrets) -> None:
    store = store_of(Tree().mount())
    key_id = secrets.key_id(KEY)
    for secret in (FIRST, SECOND, THIRD):
        store.add(key_id, value(secrets, secret))
    store.remove(store.of_key(key_id)[1:2])
    assert [way.number for way in store.of_key(key_id)] == [1, 3]
    assert store.add(key_id, value(secrets, PHRASE)) == 2
    assert opening(store, secrets, FIRST, SECOND, THIRD, PHRASE) == [True, False, True, True]


def test_keys_of_several_names_are_kept_apart_the_oldest_first(secrets: Secrets) -> None:
    store = store_of(Tree().mount())
    first = secrets.key_id(KEY)
    store.add(first, value(secrets, FIRST, "one"))
    second = secrets.generate(KEY)
    store.add(second, value(secrets, FIRST, "two"))
    assert [name_of(store.of_key(key_id)) for key_id in store.key_ids()] == ["one", "two"]
    assert store.named("two") == second


@pytest.mark.parametrize("offset", range(0, WRAPPED_KEY.size_bytes, 7))
def test_a_wrapped_key_that_is_damaged_anywhere_unlocks_nothing(
    secrets: Secrets, offset: int
) -> None:
    fs = Tree().mount()
    raw = bytearray(value(secrets, FIRST))
    raw[offset] ^= 1
    key_id = secrets.key_id(KEY)
    fs.xattrs.set_xattrs_and_mode(ROOT, {key_attribute(key_id, 1): bytes(raw)}, None)
    store = store_of(fs)
    (way,) = store.of_key(key_id)
    assert way.wrapped is None or not way.problem
    # What the checks of the fields can't see, what authenticates them does.
    assert opening(store, secrets, FIRST) == [False]
    store.add(key_id, value(secrets, SECOND))
    assert opening(store, secrets, FIRST, SECOND) == [False, True]
    store.remove([way])
    assert [each.problem for each in store.of_key(key_id)] == [""]


def test_a_key_that_was_put_under_the_name_of_another_unlocks_neither(secrets: Secrets) -> None:
    fs = Tree().mount()
    raw, first = value(secrets, FIRST), secrets.key_id(KEY)
    second = secrets.generate(KEY)
    fs.xattrs.set_xattrs_and_mode(ROOT, {key_attribute(second, 1): raw}, None)
    (way,) = store_of(fs).of_key(second)
    assert "of another key" in way.problem
    assert not way.is_unlocked_by(FIRST, secrets, SPARE)
    stored = WRAPPED_KEY.unpack(raw)
    assert stored.key_id == first
    moved = WrappedKey(**{**stored._asdict(), "key_id": second})  # type: ignore[attr-defined]
    assert not Way(second, 1, moved, "").is_unlocked_by(FIRST, secrets, SPARE)


def test_a_secret_is_in_no_representation() -> None:
    assert "passphrase" not in repr(PHRASE)
    assert "passphrase" not in f"{PHRASE} {[PHRASE]}"


def add_third(store: KeyStore, secrets: Secrets) -> None:
    store.add(secrets.key_id(KEY), value(secrets, THIRD))


def change_first(store: KeyStore, secrets: Secrets) -> None:
    store.replace(store.of_key(secrets.key_id(KEY))[:1], value(secrets, THIRD))


def remove_first(store: KeyStore, secrets: Secrets) -> None:
    store.remove(store.of_key(secrets.key_id(KEY))[:1])


def remove_all(store: KeyStore, secrets: Secrets) -> None:
    store.remove(store.of_key(secrets.key_id(KEY)))


@pytest.mark.parametrize("change", [add_third, change_first, remove_first, remove_all])
def test_a_power_failure_leaves_the_ways_of_before_or_those_of_after(
    secrets: Secrets, change: Callable[[KeyStore, Secrets], None]
) -> None:
    image = built(lambda world: None)
    medium = RecordingMedium(image)
    fs = FileSystem(on_medium(template(len(image)), medium), NoMemmap())
    store = store_of(fs)
    for secret in (FIRST, SECOND):
        store.add(secrets.key_id(KEY), value(secrets, secret))
    tried = (FIRST, SECOND, THIRD)
    before = opening(store, secrets, *tried)
    found: list[list[bool]] = []

    def look() -> None:
        for survived in medium.after_power_failure(limit=100):
            left = RecordingMedium(survived)
            pool = on_medium(template(len(survived)), left)
            unmounted = stored_keys(pool)
            mounted = store_of(FileSystem(pool, NoMemmap()))
            assert unmounted == tuple(
                key_report(key_id, mounted.of_key(key_id), is_unlocked=False)
                for key_id in mounted.key_ids()
            )
            found.append(opening(mounted, secrets, *tried))

    medium.at_each_fence = look
    change(store, secrets)
    medium.at_each_fence = lambda: None
    after = opening(store, secrets, *tried)
    assert before != after
    during = len(found)
    assert during > 10
    assert {tuple(each) for each in found} == {tuple(before), tuple(after)}
    look()
    assert all(each == after for each in found[during:])
