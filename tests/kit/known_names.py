"""What a worker knows of inodes beside what Python reads in the same pool."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kit.data_plane import SharedFiles, shared_files
from pmemfs.dataplane import layouts
from pmemfs.dataplane.native import Responder, load_word, store_word
from pmemfs.errors import DamagedFileSystem
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import DIRECTORY_TYPE, FILE_TYPE, FIXED, Inode
from pmemfs.volume.fs.reading import read_inode
from pmemfs.volume.fs.transaction import Transaction

MOST_EXTENTS = 4


class Known(NamedTuple):
    """What is known of an inode."""

    generation: int
    birth_ns: int
    head: int
    tail: int
    slot_count: int
    log_frame_count: int
    live_slots: int
    parent: int
    state: tuple[int, ...]
    target_bytes: int
    line_keys: tuple[int, int]
    is_plain: bool
    extents: list[tuple[int, int, int]]
    data_frames: int
    entry_count: int
    subdirectory_count: int
    capacity: int = 0
    """Words of its index, which only a worker has."""


def as_known(inode: Inode) -> Known:
    """What a worker should know of an inode that Python has read."""
    state = inode.state
    can_change = inode.is_file or (inode.is_directory and state.link_count > 0)
    return Known(
        inode.generation, inode.birth_ns, inode.log.head, inode.log.tail, inode.log.slot_count,
        len(inode.log.frames), inode.live_slots, inode.parent,
        (state.mode, state.link_count, state.uid, state.gid, state.size_bytes, state.accessed_ns,
         state.modified_ns, state.changed_ns, state.device, state.epoch, state.flags),
        len(inode.target), inode.keys_of_line(), can_change and not state.flags & FIXED,
        [tuple(extent) for extent in inode.extents], inode.extents.frame_count,
        len(inode.entries), inode.subdirectory_count,
    )  # fmt: skip


def is_rare(inode: Inode) -> bool:
    """Whether an inode has what only the control plane knows."""
    has_more = inode.xattrs or inode.pieces or inode.transform is not None
    return bool(has_more) or len(inode.extents) > MOST_EXTENTS


class NamesReader:
    """A worker that reads what a file system in this process writes."""

    def __init__(self, files: SharedFiles, memory_bytes: int) -> None:
        self.files = files
        self.at = files.shared.header_word("names_offset")
        geometry = files.fs.geometry
        self.set_word("first_pfn", geometry.first_pfn)
        self.set_word("frame_count", geometry.frame_count)
        self.set_word("memory_bytes", memory_bytes)
        self.worker: Responder = files.worker()

    def word(self, name: str) -> int:
        """A word of the head of names."""
        return load_word(self.files.shared.memory, self.at + layouts.NAMES_HEAD.offset_of(name))

    def set_word(self, name: str, value: int) -> None:
        """Store a word of the head of names."""
        at = self.at + layouts.NAMES_HEAD.offset_of(name)
        store_word(self.files.shared.memory, at, value)

    def raise_version(self, number: int) -> None:
        """Note that the log of an inode was replaced."""
        at = self.at + layouts.NAMES_VERSIONS_AT
        at += 8 * (number % (1 << layouts.NAMES_VERSIONS_SHIFT))
        memory = self.files.shared.memory
        store_word(memory, at, load_word(memory, at) + 1)

    def known(self, number: int, *, pieces: int = 1 << 14) -> Known | None:
        """What the worker knows; None: it would hand over."""
        found = self.worker.known(number, pieces=pieces)
        return None if found is None else Known(*found)

    def stored(self, number: int) -> Inode | None:
        """What Python reads in the pool; None if the slot is free. Raises DamagedFileSystem."""
        return read_inode(self.files.fs.medium, self.files.fs.store.table, number)

    def compare(self, number: int) -> bool:
        """See that the worker knows what Python reads, or hands over; whether it knows."""
        try:
            inode = self.stored(number)
        except DamagedFileSystem:
            inode = None
        known = self.known(number)
        if known is None:
            return False
        assert inode is not None, f"a worker knows {number}, and Python does not"
        assert known._replace(capacity=0) == as_known(inode)
        if inode.is_directory:
            expected: dict[bytes, object] = {n: tuple(e) for n, e in inode.entries.items()}
            assert self.found(number, [*expected, b"nobody"]) == {**expected, b"nobody": None}
        return True

    def found(self, number: int, names: Iterable[bytes]) -> dict[bytes, object]:
        """What the worker finds: an inode and its type, None, or -1 where it would hand over."""
        names = list(names)
        answers = self.worker.found(number, names)
        assert answers is not None
        return {
            name: answer[:2] if isinstance(answer, tuple) else answer
            for name, answer in zip(names, answers, strict=True)
        }


@contextmanager
def names_reader(directory: Path, memory_bytes: int = 64 << 20) -> Iterator[NamesReader]:
    """A worker that reads what a new file system writes, and is told of logs that are replaced."""
    replace_log, remove = Transaction.replace_log, Transaction.remove
    with shared_files(directory) as files:
        reader = NamesReader(files, memory_bytes)

        def replace_and_tell(change: Transaction, inode: Inode, new: object) -> None:
            reader.raise_version(inode.number)
            replace_log(change, inode, new)  # type: ignore[arg-type]

        def remove_and_tell(change: Transaction, inode: Inode) -> None:
            reader.raise_version(inode.number)
            remove(change, inode)

        Transaction.replace_log = replace_and_tell  # type: ignore[method-assign]
        Transaction.remove = remove_and_tell  # type: ignore[method-assign]
        try:
            yield reader
        finally:
            Transaction.replace_log = replace_log  # type: ignore[method-assign]
            Transaction.remove = remove  # type: ignore[method-assign]


class Life:
    """Operations at random on a file system, each of which says which inodes it has changed."""

    def __init__(self, fs: FileSystem, seed: int) -> None:
        self.fs = fs
        self.rng = random.Random(seed)
        self.directories = [ROOT]
        self.others: list[int] = []
        self.files = [fs.make(ROOT, b"first", NewInode(0o100644, 1, 2))]
        self._ways = [
            (self.make, 8), (self.remove, 4), (self.rename, 4), (self.link, 2), (self.write, 5),
            (self.cut, 3), (self.punch, 2), (self.attributes, 3), (self.flags, 1),
            (self.xattr, 1), (self.compact, 1), (self.many, 1),
        ]  # fmt: skip

    @property
    def numbers(self) -> list[int]:
        """Inodes that there are or were."""
        return [*self.directories, *self.files, *self.others]

    def step(self) -> list[int]:
        """One operation, which may fail; the inodes that it may have changed."""
        ways, weights = zip(*self._ways, strict=True)
        changed: list[int] = []
        with suppress(OSError, KeyError):
            self.rng.choices(ways, weights)[0](changed)
        return changed

    def make(self, changed: list[int]) -> None:
        parent, name = self._directory(changed), self._name()
        mode = self.rng.choice((0o100644, 0o100600, 0o040755, 0o040755, 0o120777, 0o010644))
        target = b"t" * self.rng.choice((1, 60, 1700, 1701, 4095)) if mode == 0o120777 else b""
        number = self.fs.make(parent, name, NewInode(mode, 1, 2, target=target))
        changed.append(number)
        kinds = {0o04: self.directories, 0o10: self.files}
        kinds.get(mode >> 12, self.others).append(number)

    def remove(self, changed: list[int]) -> None:
        parent = self._directory(changed)
        name = self.rng.choice(self.fs.names(parent) or [b"nothing"])
        number = self.fs.lookup(parent, name)
        changed.append(number)
        if number in self.directories:
            self.fs.rmdir(parent, name)
        else:
            self.fs.unlink(parent, name)

    def rename(self, changed: list[int]) -> None:
        parent, target = self._directory(changed), self._directory(changed)
        if self.rng.random() < 0.5:
            target = parent
        name = self.rng.choice(self.fs.names(parent) or [b"nothing"])
        new_name = self.rng.choice([self._name(), *self.fs.names(target)[:3]])
        changed.append(self.fs.lookup(parent, name))
        with suppress(OSError):
            changed.append(self.fs.lookup(target, new_name))
        self.fs.rename(parent, name, target, new_name, self.rng.choice((0, 0, 0, 1, 2)))

    def link(self, changed: list[int]) -> None:
        number = self._file(changed)
        self.fs.link(number, self._directory(changed), self._name())

    def many(self, changed: list[int]) -> None:
        number, parent = self._file(changed), self._directory(changed)
        for _ in range(self.rng.choice((20, 70, 200))):
            self.fs.link(number, parent, self._name())

    def write(self, changed: list[int]) -> None:
        at = self.rng.choice((0, 0, 100, 4096, 9000, 40_000, 1 << 20))
        self.fs.write(self._file(changed), at, bytes(self.rng.choice((10, 4096, 9000))))

    def cut(self, changed: list[int]) -> None:
        size = self.rng.choice((0, 1, 4096, 5000, 100_000))
        self.fs.set_attributes(self._file(changed), size_bytes=size)

    def punch(self, changed: list[int]) -> None:
        self.fs.punch(self._file(changed), self.rng.choice((0, 4096, 8192)), 4096)

    def attributes(self, changed: list[int]) -> None:
        changed.append(self.rng.choice(self.numbers))
        for _ in range(self.rng.choice((1, 1, 7, 70))):
            self.fs.set_attributes(changed[0], mode=self.rng.randrange(0o1000), uid=3)

    def flags(self, changed: list[int]) -> None:
        changed.append(self.rng.choice(self.files + self.directories[1:]))
        # A slot may have been given to an inode of another type, which can't have flags.
        if self.fs.inode(changed[0]).type not in (FILE_TYPE, DIRECTORY_TYPE):
            return
        self.fs.set_flags(changed[0], InodeFlags(self.rng.choice((0, 0, 0, 2, 4, 8, 16))))

    def xattr(self, changed: list[int]) -> None:
        number = self._file(changed)
        if self.rng.random() < 0.3:
            self.fs.set_xattr(number, b"user.name", bytes(self.rng.choice((3, 3000))))
        else:
            self.fs.remove_xattr(number, b"user.name")

    def compact(self, changed: list[int]) -> None:
        number = self._directory(changed)
        with self.fs.store.change() as change:
            change.compact(self.fs.inode(number))

    def _name(self) -> bytes:
        length = self.rng.choice((1, 2, 8, 20, 36, 37, 38, 100, 101, 255))
        return bytes(self.rng.choices(b"abcdefgh.", k=length))

    def _directory(self, changed: list[int]) -> int:
        changed.append(self.rng.choice(self.directories))
        return changed[-1]

    def _file(self, changed: list[int]) -> int:
        changed.append(self.rng.choice(self.files))
        return changed[-1]
