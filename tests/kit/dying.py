"""A daemon that dies at any line of what it does for a request, and the one that takes its place.

Each of them is a process of its own over a copy of a pool and of the shared memory, so a death
leaves exactly what a killed daemon leaves. The first counts the lines of pmemfs that it runs for
one request, and ends without a word before the n-th. The second is asked the same again.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pmemfs
from kit.data_plane import (
    ALL,
    LONGEST,
    SharedDevice,
    SharedFiles,
    share_device,
    share_files,
)
from kit.doors import replies
from kit.processes import wait_until
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.sharing import share_pool
from pmemfs.errors import SourceBusy
from pmemfs.fuse.forwarded import ForwardedRequests
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.sparse import data_ranges
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.onefile import INODE

_HERE = str(Path(pmemfs.__file__).parent)
_WAITING = str(Path(_HERE, "fuse/inbox.py"))
"""How many lines of it run depends on the time."""
_DEAD = 42
NEVER = 1 << 60


class Message(NamedTuple):
    """A request as a worker sends it."""

    unique: int
    opcode: int
    ino: int
    operation: bytes
    uid: int = 0

    def packed(self) -> bytes:
        """Its bytes."""
        return struct.pack(
            "<IIQQIIIHH", 40 + len(self.operation), self.opcode, self.unique, self.ino, self.uid,
            self.uid, 0, 0, 0,
        ) + self.operation  # fmt: skip


class Reply(NamedTuple):
    """What comes back."""

    unique: int
    error: int
    data: bytes


def ask(raw: ForwardedRequests, *messages: Message) -> list[Reply]:
    """All replies to these messages, in their order."""
    found = []
    for reply in replies(raw, *(m.packed() for m in messages), longest_bytes=LONGEST):
        _, error, unique = struct.unpack_from("<IiQ", reply)
        found.append(Reply(unique, -error, reply[16:]))
    return found


@dataclass
class State:
    """All that a mount is, without its times and without numbers that mean nothing."""

    tree: dict[int, object]
    opened: list[tuple[int, int, int]]
    holds: dict[int, int]


def state_of(files: SharedFiles | SharedDevice) -> State:
    """What a mount is now."""
    opened = sorted(
        (place.inode, place.kind, place.flags & ~os.O_TRUNC)
        for place in OpenPlaces(files.shared.opens)
    )
    if isinstance(files, SharedDevice):
        return State(_device(files.volume), opened, {})
    fs = files.fs
    holds = dict(files.shared.lookup_counts.counts())
    tree: dict[int, object] = {}
    todo = [ROOT, *holds]
    while todo:
        number = todo.pop()
        if number in tree:
            continue
        a = fs.attributes(number)
        inode = fs.inode(number)
        entries = sorted((name, *entry) for name, entry in inode.entries.items())
        todo += [to for _, to, _ in entries]
        content = bytes(fs.read(number, 0, a.size_bytes)) if inode.is_file else b""
        tree[number] = (
            a.mode, a.nlink, a.uid, a.gid, a.rdev, a.flags, content, entries, inode.target,
            inode.parent if inode.is_directory else 0, sorted(inode.xattrs.items()),
        )  # fmt: skip
    return State(tree, opened, holds)


def _device(volume: BlockVolume) -> dict[int, object]:
    device = volume.attributes(INODE)
    content = hash(bytes(volume.read(INODE, 0, volume.size_bytes)))
    return {INODE: (device.mode, device.uid, device.gid, content)}


@dataclass
class Template:
    """A pool and its shared memory, as files that are copied for each death."""

    directory: Path
    pool: Path
    memory: int
    has_files: bool

    @classmethod
    def made(
        cls, directory: Path, prepare: Callable[[Any], Any], *, size_bytes: int = 64 * MIB,
        has_files: bool = True,
    ) -> tuple[Template, Any]:  # fmt: skip
        """A new one; what `prepare` does to the SharedFiles (or SharedDevice) is part of it."""
        path = directory / "template"
        with path.open("wb") as file:
            file.truncate(size_bytes)
        medium = MappedMedium.open(str(path))
        pool = Pool.create(
            medium, PoolSpec(name="pool", page_size_bytes=4 * KIB, scheme=Scheme.NONE)
        )
        pool.begin_mount()
        if has_files:
            FileSystem.format(pool)
        shared = share_pool(pool, worker_count=1, has_files=has_files)
        shared.set_header_word("answered", ALL)
        share = share_files if has_files else share_device
        prepared = prepare(share(pool, shared))
        memory = os.dup(shared.fd)
        shared.close()
        medium.close()
        return cls(directory, path, memory, has_files), prepared

    def copied(self) -> Copy:
        """A copy for one death."""
        path = self.directory / "copy"
        source = os.open(self.pool, os.O_RDONLY)
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        memory = os.memfd_create("copy")
        _copy(source, target)
        _copy(self.memory, memory)
        os.close(source)
        os.close(target)
        return Copy(path, memory, self.has_files)


def _copy(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in data_ranges(source, 0, size):
        os.pwrite(target, os.pread(source, end - start, start), start)


def _opened(path: str) -> MappedMedium:
    """The medium of a copy. A process that a dead daemon has just started may have it until that
    runs its own program."""
    media: list[MappedMedium] = []

    def is_open() -> bool:
        with suppress(SourceBusy):
            media.append(MappedMedium.open(path))
        return bool(media)

    wait_until(is_open, "nobody has the copy open")
    return media[0]


@dataclass
class Copy:
    """A pool and its shared memory."""

    path: Path
    memory: int
    has_files: bool

    def open(self) -> Any:
        """The SharedFiles (or SharedDevice) of a daemon that finds it so."""
        medium = _opened(str(self.path))
        share = share_files if self.has_files else share_device
        return share(Pool.open(medium), SharedMemory(os.dup(self.memory)))

    def close(self) -> None:
        """Remove it."""
        os.close(self.memory)
        self.path.unlink()


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own; None if that ended by `os._exit`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reading)
            result = pickle.dumps(work())
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(result)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _DEAD), f"the process ended with {code}"
    return pickle.loads(said) if code == 0 else None


def ask_until(
    raw: ForwardedRequests, message: Message | None, line: int
) -> tuple[Reply | None, int]:
    """Ask, and die before so many lines of pmemfs have run for the request; the reply, if one is
    due, and how many lines there were."""
    if message is None:
        return None, 0
    count = -NEVER

    def run(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count >= line:
                os._exit(_DEAD)
        return run

    def call(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        code = frame.f_code
        if not code.co_filename.startswith(_HERE) or code.co_filename == _WAITING:
            return None
        if code.co_name == "_serve_one" and count < 0:
            count = 0
        return run

    sys.settrace(call)
    try:
        replies = ask(raw, message)
    finally:
        sys.settrace(None)
    return next(iter(replies), None), count


@dataclass
class Outcome:
    """What the second daemon says and leaves."""

    reply: Reply | None
    state: State
    verdict: str
    first: Reply | None
    """What the first daemon has said, if it lived so long."""
    lines: int


def die_at(
    template: Template, message: Message | None, again: Message | None, line: int
) -> Outcome:
    """Let a daemon die at a line of its request, and ask the next one again. Either may be asked
    nothing (None)."""
    copy = template.copied()
    try:
        first = in_child(lambda: ask_until(copy.open().forwarded(), message, line))

        def succeed() -> tuple[Reply | None, State]:
            files = copy.open()
            raw = files.forwarded()
            reply = next(iter(ask(raw, again)), None) if again else None
            state = state_of(files)
            if template.has_files:
                while files.fs.tidy() or files.fs.go_on():
                    pass
                assert state_of(files) == state
                files.fs.end()
            return reply, state

        reply, state = in_child(succeed)
        problems = _problems(copy) if template.has_files else ""
    finally:
        copy.close()
    said, lines = first or (None, 0)
    return Outcome(reply, state, problems, said, lines)


def _problems(copy: Copy) -> str:
    medium = _opened(str(copy.path))
    try:
        verdict = check_filesystem(Pool.open(medium))
        return "; ".join(str(problem) for problem in verdict.problems)
    finally:
        medium.close()
