"""What a worker knows of inodes beside what Python reads in the same pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kit.data_plane import SharedFiles, shared_files
from pmemfs.dataplane import layouts
from pmemfs.dataplane.native import Responder, load_word, store_word
from pmemfs.errors import DamagedFileSystem
from pmemfs.volume.fs.inode import FIXED, Inode
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


def may_be_handed_over(inode: Inode) -> bool:
    """Whether an inode has what only the control plane knows, or had it once in its log."""
    is_rare = inode.xattrs or inode.pieces or inode.transform is not None
    return bool(is_rare) or len(inode.extents) > MOST_EXTENTS


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

    def known(self, number: int, *, pieces: int = 1 << 30) -> Known | None:
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
            names = list(inode.entries)
            expected = [tuple(inode.entries[name]) for name in names]
            assert self.worker.found(number, [*names, b"nobody"]) == [*expected, None]
        return True


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
