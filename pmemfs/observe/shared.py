"""What lies in the memory that the two planes of a mount share, read from outside.

The reader opens that memory through /proc/PID/fd of any process that has it, so it needs no answer
of anybody: the daemon may be stopped or dead. It derives what it tells with the constructors that a
daemon uses, so what it tells is what a daemon that takes the mount over would know. It changes
nothing. While both planes run, what it reads may be a moment old.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pmemfs.dataplane.answers import AnswerState
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import EXTENT, TABLE_HEAD, ExtentFlags, HandleKind
from pmemfs.dataplane.tables import NAME, Published, SharedMemory
from pmemfs.errors import ForeignSharedMemory, NotMounted
from pmemfs.mountinfo import Mount, mount_at

_LINK = f"/memfd:{NAME} (deleted)"
_COUNT, _FLAGS = (EXTENT.offset_of(name) // 8 for name in ("frame_count", "flags"))
_ATTEMPTS = 10
"""How often to read again: a table may go between two looks at it."""


@dataclass(frozen=True)
class WorkerState:
    """A thread of the data plane."""

    number: int
    thread_id: int
    """0 if it does not run."""
    is_in_section: bool
    is_paused: bool
    sleeps: int
    spins: int
    handed_over: int
    """Requests that it gave to the daemon, and that need a reply."""


@dataclass(frozen=True)
class Opened:
    """An open file or directory."""

    handle: int
    inode: int
    kind: str
    flags: int
    """The flags of open(2)."""
    uid: int
    gid: int
    pid: int


@dataclass(frozen=True)
class Table:
    """A table by which the data plane serves an inode."""

    inode: int
    extent_count: int
    size_bytes: int
    """The size of the file when it was published."""
    limit_bytes: int
    table_bytes: int
    forwarded_frames: int
    """Of the file, that workers forward: they lie compressed, or are being compressed."""
    is_encrypted: bool


@dataclass(frozen=True)
class Answer:
    """What became of a request that must not be carried out twice."""

    number: int
    opcode: int
    state: str
    error: int
    length: int


@dataclass(frozen=True)
class SharedReport:
    """All that the shared memory says."""

    pids: tuple[int, ...]
    """The processes that have it open."""
    device: int
    options: str
    agreement: dict[str, int]
    """What INIT agreed on, as in `Agreement`."""
    queue_count: int
    depth: int
    reader_count: int
    has_files: bool
    pool_bytes: int
    reach_bytes: int
    page_count: int
    generation: int
    write_epoch: int
    persisted_epoch: int
    lost_errno: int
    fault_count: int
    workers: tuple[WorkerState, ...]
    unanswered: int
    """Requests that the daemon has got and not answered yet."""
    opened: tuple[Opened, ...]
    held_inodes: int
    most_held: tuple[int, int]
    """The inode that is held most often, and how often: by lookups, and once by each open file."""
    tables: tuple[Table, ...]
    answers: tuple[Answer, ...]
    """What became of the last requests that must not be carried out twice; the newest first."""
    attribute_inodes: tuple[int, ...]
    """Inodes whose GETATTR the data plane answers."""
    table_bytes: int
    shared_bytes: int
    """The memory that all of it takes. Its size is much larger, because most of it is sparse."""

    @property
    def transport(self) -> str:
        """The name of the transport."""
        return "uring" if self.queue_count else "fd"


def open_memory(place: str) -> tuple[int, tuple[int, ...]]:
    """The shared memory of a mount, by its mountpoint or by one of its processes: a descriptor, and
    all processes that have it open. Raises NotMounted, and OSError if this user may not look."""
    if place.isdecimal():
        found = [(int(place), fd) for fd in _descriptors(Path("/proc", place))]
        what = "a process of a mount that the native engine serves"
    else:
        mount = mount_at(os.path.abspath(place))
        found = [(pid, fd) for pid, fd in _all_descriptors()
                 if mount and mount.is_ours and _is_of(pid, fd, mount)]  # fmt: skip
        what = "a mount that the native engine serves, or you may not look into its processes"
    if not found:
        raise NotMounted(path=place, what=what)
    memory = os.open(f"/proc/{found[0][0]}/fd/{found[0][1]}", os.O_RDONLY)
    inode = os.fstat(memory).st_ino
    pids = {pid for pid, fd in _all_descriptors() if _is(pid, fd, inode)} - {os.getpid()}
    return memory, tuple(sorted(pids))


def read_shared(fd: int, pids: tuple[int, ...] = ()) -> SharedReport:
    """What the shared memory says. Raises ForeignSharedMemory."""
    for attempt in range(_ATTEMPTS):
        try:
            return _report(SharedMemory(fd, read_only=True), pids)
        except ForeignSharedMemory:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt has ended in one way or the other")


def _report(shared: SharedMemory, pids: tuple[int, ...]) -> SharedReport:
    header = shared.header
    holds = sorted(shared.lookup_counts.counts(), key=lambda held: held[1])
    return SharedReport(
        pids=pids,
        device=header.device,
        options=shared.options,
        agreement=shared.agreement._asdict(),
        queue_count=header.queue_count,
        depth=header.depth,
        reader_count=header.reader_count,
        has_files=bool(header.has_files),
        pool_bytes=header.pool_bytes,
        reach_bytes=header.reach_bytes,
        page_count=header.page_count,
        generation=header.generation,
        write_epoch=header.write_epoch,
        persisted_epoch=header.persisted_epoch,
        lost_errno=header.lost_errno,
        fault_count=header.fault_count,
        workers=tuple(_worker(shared, number) for number in range(shared.worker_count)),
        unanswered=shared.unanswered,
        opened=tuple(
            Opened(o.handle, o.inode, HandleKind(o.kind).name.lower(), o.flags, o.uid, o.gid, o.pid)
            for o in OpenPlaces(shared.opens)
        ),
        held_inodes=len(holds),
        most_held=holds[-1] if holds else (0, 0),
        tables=tuple(
            Table(
                t.inode,
                t.head.extent_count,
                t.head.size_bytes,
                t.head.limit_bytes,
                t.size_bytes,
                _forwarded_frames(shared, t),
                is_encrypted=t.head.key_slot != 0,
            )
            for t in shared.published()
        ),
        answers=tuple(
            Answer(a.number, a.opcode, AnswerState(a.state).name.lower(), a.error, a.length)
            for a in shared.answers.newest()
        ),
        attribute_inodes=tuple(sorted(shared.published_attributes().values())),
        table_bytes=shared.table_bytes,
        shared_bytes=os.fstat(shared.fd).st_blocks * 512,
    )


def _forwarded_frames(shared: SharedMemory, table: Published) -> int:
    start, end = table.offset + TABLE_HEAD.size_bytes, table.offset + table.size_bytes
    with shared.memory[start:end].cast("Q") as words:
        fields = len(EXTENT.fields)
        counts, flags = words[_COUNT::fields].tolist(), words[_FLAGS::fields].tolist()
    pairs = zip(counts, flags, strict=True)
    return sum(count for count, flag in pairs if flag & ExtentFlags.FORWARDED)


def _worker(shared: SharedMemory, number: int) -> WorkerState:
    return WorkerState(
        number=number,
        thread_id=shared.slot_word(number, "thread_id"),
        is_in_section=bool(shared.slot_word(number, "section") & 1),
        is_paused=bool(shared.slot_word(number, "paused")),
        sleeps=shared.slot_word(number, "sleeps"),
        spins=shared.slot_word(number, "spins"),
        handed_over=shared.slot_word(number, "handed_over"),
    )


def _all_descriptors() -> Iterator[tuple[int, int]]:
    for process in Path("/proc").glob("[0-9]*"):
        for fd in _descriptors(process):
            yield int(process.name), fd


def _descriptors(process: Path) -> list[int]:
    """The descriptors of shared memory in a process, if this user may see them."""
    found = []
    with suppress(OSError):
        for fd in (process / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(fd) == _LINK:
                    found.append(int(fd.name))
    return found


def _is(pid: int, fd: int, inode: int) -> bool:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/fd/{fd}").st_ino == inode
    return False


def _is_of(pid: int, fd: int, mount: Mount) -> bool:
    """Whether a descriptor has the memory of a mount, by the word of the user whose mount it is.

    Others may have memory of that name, and say in it whatever they like.
    """
    with suppress(OSError, ForeignSharedMemory):
        memory = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
        try:
            if os.fstat(memory).st_uid == mount.owner_uid:
                shared = SharedMemory(memory, read_only=True)
                return shared.header_word("device") == mount.number
        finally:
            os.close(memory)
    return False
