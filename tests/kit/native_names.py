"""A worker that changes names, beside the control plane of the same file system, in one process.

The lock of names is free while the worker runs, and the control plane catches up before it runs.
"""

from __future__ import annotations

import struct
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kit.data_plane import SharedFiles, shared_files
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import NAMES_DECISION, NAMES_HEAD, NamesDecision
from pmemfs.dataplane.native import Responder, load_word, store_word
from pmemfs.fuse import wire
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, WireDoor
from pmemfs.memmap.none import NoMemmap
from pmemfs.units import MIB
from pmemfs.volume.fs.catchup import CatchUp
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.reserves import Reserves

OPEN_FLAGS = wire.FOPEN_DIRECT_IO | wire.FOPEN_PARALLEL_DIRECT_WRITES | wire.FOPEN_NOFLUSH
HANDLES = 4000
ROOT_USER = Caller(0, 0, 0)
Answered = tuple[int, bytes]
"""An errno, and the bytes of the answer."""


def create_in(name: bytes, *, flags: int = 0, mode: int = 0o644, umask: int = 0) -> bytes:
    """fuse_create_in and the name."""
    return wire.CREATE_IN.pack(flags, mode, umask, 0) + name + b"\0"


def mkdir_in(name: bytes, *, mode: int = 0o755, umask: int = 0) -> bytes:
    """fuse_mkdir_in and the name."""
    return wire.MKDIR_IN.pack(mode, umask) + name + b"\0"


def rename_in(old: bytes, new: bytes, directory: int, flags: int = 0) -> bytes:
    """fuse_rename2_in and the names."""
    return wire.RENAME2_IN.pack(directory, flags) + old + b"\0" + new + b"\0"


class NativeNames:
    """A file system whose names a worker changes."""

    def __init__(
        self, files: SharedFiles, *, memory_bytes: int = 64 * MIB, more_log_frames: int = 64
    ) -> None:
        self.files, self.fs = files, files.fs
        names = files.shared.names
        assert names is not None
        self.names = names
        self.seen = 0
        self.more_log_frames = more_log_frames
        self.forwarded = self.answered = 0
        fs = self.fs
        fs.store.begin_writing()
        while fs.search_on():
            pass
        geometry = fs.geometry
        self.set_word("first_pfn", geometry.first_pfn)
        self.set_word("frame_count", geometry.frame_count)
        self.set_word("journal_offset", fs.store.ground.journal_offset)
        self.set_word("open_flags", OPEN_FLAGS)
        self.set_word("memory_bytes", memory_bytes)
        ground = fs.store.ground
        self.reserves = ground.reserves = Reserves(
            ground.medium, ground.allocator, ground.table, names.slots, names.frames
        )
        self.refill()
        self.tell_log_frames()
        handlers, self.door = files.door()
        handlers.directories.names_after = names.names_after
        self.set_word("notes_directories", 1)
        names.handles.push(handlers.directories._places.reserve(HANDLES))
        self.catch_up_with = CatchUp(fs.store)
        self.worker: Responder = files.worker()
        names.is_on = True

    def word(self, name: str) -> int:
        """A word of the head of names."""
        return load_word(self.files.shared.memory, self._at(name))

    def set_word(self, name: str, value: int) -> None:
        """Store a word of the head of names."""
        store_word(self.files.shared.memory, self._at(name), value)

    def _at(self, name: str) -> int:
        return self.files.shared.header_word("names_offset") + NAMES_HEAD.offset_of(name)

    @property
    def decision(self) -> NamesDecision:
        """What the worker has decided last."""
        at = self.files.shared.header_word("names_offset") + layouts.NAMES_DECISIONS_AT
        return NAMES_DECISION.unpack(
            bytes(self.files.shared.memory[at : at + NAMES_DECISION.size_bytes])
        )

    def refill(self) -> None:
        """Hand out slots and frames."""
        while self.reserves.keep_some():
            pass

    def tell_log_frames(self) -> None:
        """Say how long a log may become here: by some frames longer than the longest so far."""
        self.set_word("log_frames", self.fs.allocator.log_frames + self.more_log_frames)

    def catch_up(self) -> None:
        """See what the worker has changed."""
        self.catch_up_with.with_changes(self.names.changed_since(self.seen))
        self.seen = self.names.changes

    def ask(
        self, opcode: Opcode, inode: int, operation: bytes, caller: Caller = ROOT_USER,
        **rest: int,
    ) -> Answered | None:  # fmt: skip
        """What the worker answers; None if it hands over."""
        verdict, error, data = self.worker.answer(
            operation, opcode=opcode, inode=inode, uid=caller.uid, gid=caller.gid, pid=caller.pid,
            **rest,
        )  # fmt: skip
        assert verdict in ("answer", "forward")
        assert self.word("holder") == 0
        return (error, data) if verdict == "answer" else None

    def ask_here(
        self, opcode: Opcode, inode: int, operation: bytes, caller: Caller = ROOT_USER
    ) -> Answered:
        """What the control plane answers."""
        self.names.take()
        self.catch_up()
        try:
            return answer_of(self.door, opcode, inode, operation, caller)
        finally:
            self.tell_log_frames()
            self.names.free()

    def serve(
        self, opcode: Opcode, inode: int, operation: bytes, caller: Caller = ROOT_USER
    ) -> Answered:
        """What is answered, by whoever can."""
        answered = self.ask(opcode, inode, operation, caller)
        if answered is None:
            self.forwarded += 1
            return self.ask_here(opcode, inode, operation, caller)
        self.answered += 1
        return answered

    def anew(self) -> FileSystem:
        """The file system as another process reads it."""
        return FileSystem(self.files.pool, NoMemmap())


def answer_of(
    door: WireDoor, opcode: Opcode, inode: int, operation: bytes, caller: Caller = ROOT_USER
) -> Answered:
    """What a door answers."""
    try:
        data = door.answer(opcode, Request(inode, caller, operation))
        if isinstance(data, Coroutine):
            # A long log is read in steps.
            data = trio.run(partial(_result_of, data))
    except OSError as error:
        return error.errno or 0, b""
    assert data is None or isinstance(data, bytes)
    return 0, data or b""


async def _result_of(coming: Coroutine[Any, Any, Answer]) -> Answer:
    return await coming


def inode_of(answer: bytes) -> int:
    """The inode in a fuse_entry_out."""
    return int(struct.unpack_from("<Q", answer)[0])


@contextmanager
def native_names(directory: Path, **options: int) -> Iterator[NativeNames]:
    """A new file system whose names a worker changes."""
    with shared_files(directory) as files:
        yield NativeNames(files, **options)
