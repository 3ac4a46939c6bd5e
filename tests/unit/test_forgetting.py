"""The kernel forgets what it knows of a key that is locked, in steps, and others are served between
them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import trio

from kit.pools import MemoryMedium
from kit.sealed import Keys
from pmemfs.fuse.forgetting import Shown, forget, kept_of, read_kept
from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.sealing import encoded

FILE, DIRECTORY = NewInode(0o100644, 0, 0), NewInode(0o40755, 0, 0)
COUNT = 2000
UNKNOWN = 100
"""So many more names the kernel has never looked up."""
NAMES = [b"file %d" % number for number in range(COUNT)]


@dataclass
class Rig:
    """A file system with an encrypted directory that the kernel knows, and what it is told."""

    fs: FileSystem
    keys: Keys
    private: int
    inodes: set[int]
    notifier: Notifier
    forgotten: list[tuple[int, bytes | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.notifier.forget_name = lambda ino, name: self.forgotten.append((ino, name))
        self.notifier.forget_inode = lambda ino: self.forgotten.append((ino, None))

    @property
    def names(self) -> list[bytes]:
        """Those in the directory that were forgotten."""
        return [name for ino, name in self.forgotten if name and ino == self.private]

    def lock(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Lock the key; how often something else had its turn."""
        return self._forget(self.keys.lock, self.fs.store.sealing.plain_name, meanwhile)

    def unlock(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        return self._forget(self.keys.unlock, lambda _, stored: encoded(stored), meanwhile)

    def _forget(
        self, change: Callable[[], None], shown: Shown, meanwhile: Callable[[], None]
    ) -> int:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                meanwhile()
                turns += 1

        async def main() -> None:
            await read_kept(self.fs)
            kept = kept_of(self.fs, self.keys.key_id)
            change()
            async with trio.open_nursery() as tasks:
                tasks.start_soon(others)
                await forget(self.notifier, kept, shown)
                tasks.cancel_scope.cancel()

        trio.run(main)
        return turns


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Keys() as keys:
        spec = PoolSpec("sealed", alignment_bytes=4 * KIB, scheme=Scheme.NONE, mode=Mode.FS)
        pool = Pool.create(MemoryMedium(bytes(8 * MIB)), spec)
        FileSystem.format(pool)
        fs = FileSystem(pool, NoMemmap(), sealing=keys.native)
        private = fs.make(ROOT, b"private", DIRECTORY)
        fs.properties.encrypt(private, keys.key_id)
        known = [private, *(fs.make(private, name, FILE) for name in NAMES)]
        for number in known:
            fs.hold(number)
        for number in range(UNKNOWN):
            fs.make(private, b"unknown %d" % number, FILE)
        fs.hold(fs.make(ROOT, b"plain", FILE))
        yield Rig(fs, keys, private, set(known), Notifier())


def test_what_the_kernel_knows_of_a_key_is_forgotten_and_nothing_else(rig: Rig) -> None:
    rig.lock()
    assert sorted(rig.names) == sorted(NAMES)
    assert {ino for ino, name in rig.forgotten if name is None} == rig.inodes
    assert len(rig.forgotten) == COUNT + len(rig.inodes)
    rig.forgotten.clear()
    shown = set(rig.fs.names(rig.private))
    rig.unlock()
    assert len(rig.names) == COUNT
    assert set(rig.names) < shown


def test_others_have_their_turns_while_many_names_are_forgotten(rig: Rig) -> None:
    assert rig.lock() > COUNT // 256
    assert rig.unlock() > COUNT // 256


def test_nothing_is_shown_in_the_clear_while_it_is_forgotten(rig: Rig) -> None:
    def look() -> None:
        for name in (NAMES[0], NAMES[-1]):
            with pytest.raises(OSError, match=r".") as raised:
                rig.fs.lookup(rig.private, name)
            assert raised.value.errno == errno.ENOENT
        with pytest.raises(OSError, match=r".") as raised:
            rig.fs.make(rig.private, b"new", FILE)
        assert raised.value.errno == errno.ENOKEY

    assert rig.lock(look)
    rig.keys.keyring.lock(rig.keys.key_id)
    secrets = rig.keys.keyring.secrets
    assert not any(secrets.kind(slot) for slot in range(1024))


def test_a_name_that_is_removed_meanwhile_is_forgotten_all_the_same(rig: Rig) -> None:
    left = [encoded(stored) for stored in reversed(rig.fs.listing(rig.private))]

    def remove() -> None:
        for name in left[:100]:
            rig.fs.unlink(rig.private, name)
        del left[:100]

    rig.lock(remove)
    assert len(left) < COUNT
    assert sorted(rig.names) == sorted(NAMES)
