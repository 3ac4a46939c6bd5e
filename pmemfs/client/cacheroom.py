"""How much room the entries of a tensor cache take, and which of them are removed for others.

All processes that use a cache add up what they commit and remove in one small file, the ledger.
Which entry goes is decided by what the page structures know: the one whose pages were accessed the
longest ago, of several such the one with the fewest reads, and then the one that was written first.
Invariants:
- an entry that is pinned when the daemon is asked is not removed, whoever has the pin;
- an entry is added to the ledger after it appeared, and subtracted after it is gone. Where a
  process dies in between, the ledger is wrong until the next look at all files, and nothing else;
- a ledger of another mount counts for nothing. What was not durable may be lost since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pmemfs.client.connection import Connection
from pmemfs.client.entrynames import key_of
from pmemfs.client.unnamed import HIDDEN_PREFIX
from pmemfs.control.shape import Malformed, decode
from pmemfs.errors import BadCache, CannotMapTransformed, NoAnswer
from pmemfs.media.accesses import Accesses
from pmemfs.medium.addresses import Descriptor
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB, align_up

LEDGER_NAME = ".pmemfs-cache"

_LEDGER = struct.Struct("<8sQqq")
_MAGIC = b"pmemfs-c"
_ASKED_AT_ONCE = 1000
"""The daemon reads no longer requests than 64 KiB."""
_REMOVED_AT_ONCE = 64
_LOOK_AGAIN_BYTES = 64 * MIB
"""When this process has added so much, and as much as there is, it looks at all files again."""
_LEFT_BEHIND_SECONDS = 60
_ANY = -1
_NEVER_NS = 1 << 63


class Taken(NamedTuple):
    """How much the entries of a cache take."""

    entry_count: int
    room_bytes: int
    """Whole pages, as the file system has them."""


class Candidate(NamedTuple):
    """An entry that may be removed, in the order in which they are."""

    last_ns: int
    """When it was accessed, in ns since 1970; `_ANY`: remove it, whenever that was."""
    reads: int
    written_ns: int
    path: str
    inode: int
    room_bytes: int


LetGo = Callable[[int, int], list[Candidate]]
"""Takes a time in ns since 1970, and a number of bytes."""


def room_of(size_bytes: int) -> int:
    """The pages that a file of this size takes, in bytes."""
    return align_up(size_bytes, FRAME_BYTES)


class CacheRoom:
    """The room of one cache, as one process knows it."""

    def __init__(self, connection: Connection, directory: str) -> None:
        """Raises NoPageStructures if the pool knows no accesses, BadCache if nothing in the
        directory can be mapped, and OSError."""
        self._connection = connection
        self._directory = directory
        self._candidates: deque[Candidate] = deque()
        self._ledger = _Ledger(os.path.join(directory, LEDGER_NAME), self._ask([]).mount_identity)
        # Whether there can be one is said now. Who only gets entries doesn't need it.
        self._ledger.read()
        self._ledger.close()
        self._check_that_it_can_be_mapped()
        self._added_bytes = 0
        self.evicted_count = 0
        self.evicted_bytes = 0

    def _check_that_it_can_be_mapped(self) -> None:
        """Raise BadCache if the directory is encrypted. Then its files are, the ledger too."""
        path = os.path.join(self._directory, LEDGER_NAME)
        # A full or read-only mount may have no ledger, and then there is nothing to try it with.
        with contextlib.suppress(FileNotFoundError):
            try:
                wanted = [(os.stat(path).st_ino, 0, 0)]
                self._connection.pin(wanted, [path], writable=False, contiguous=False).end.end()
            except CannotMapTransformed:
                why = "it is encrypted, so nobody can map what is in it; use another directory"
                os.unlink(path)
                raise BadCache(path=self._directory, why=why) from None

    def taken(self) -> Taken:
        """What all entries take. Raises OSError, and what `Connection.ask` does."""
        with self._connection.translated():
            known = self._ledger.read()
            if known is None or self._added_bytes > max(known.room_bytes, _LOOK_AGAIN_BYTES):
                return self._look()
            return known

    def changed(self, entry_count: int, room_bytes: int) -> None:
        """Entries have come or gone. Raises OSError, and what `Connection.ask` does."""
        self._added_bytes += max(room_bytes, 0)
        with self._connection.translated():
            if not self._ledger.add(entry_count, room_bytes):
                self._look()

    def evict(self, wanted_bytes: int, let_go: LetGo) -> int:
        """Remove entries that take so much, if so many are not pinned; what they took.

        `let_go` lets go of entries that only this process has pinned, for no need, and were used
        before a time, until they take so much; and names them. Raises OSError, and what
        `Connection.ask` does.
        """
        with self._connection.translated():
            freed = self._remove(wanted_bytes, let_go)
            if not freed:
                self._look()
                freed = self._remove(wanted_bytes, let_go)
            if not freed:
                self._candidates.extend(let_go(_NEVER_NS, wanted_bytes))
                freed = self._remove(wanted_bytes, let_go)
            return freed

    def close(self) -> None:
        """Let go of the ledger."""
        self._ledger.close()

    def _remove(self, wanted_bytes: int, let_go: LetGo) -> int:
        freed = 0
        while freed < wanted_bytes:
            some = self._next(wanted_bytes - freed, let_go)
            if not some:
                break
            removed = [
                each.room_bytes
                for each, now in self._with_accesses(some)
                if _is_as_it_was(each, now) and _has_removed(each)
            ]
            if removed:
                self.changed(-len(removed), -sum(removed))
            freed += sum(removed)
            self.evicted_count += len(removed)
        self.evicted_bytes += freed
        return freed

    def _next(self, wanted_bytes: int, let_go: LetGo) -> list[Candidate]:
        """The next candidates, which take so much together if there are so many."""
        some: list[Candidate] = []
        # Another thread may take the last one in between.
        with contextlib.suppress(IndexError):
            # Of what is pinned here, only this process knows when it was used.
            some += let_go(self._candidates[0].last_ns, wanted_bytes)
            while not some or (
                sum(each.room_bytes for each in some) < wanted_bytes
                and len(some) < _REMOVED_AT_ONCE
            ):
                some.append(self._candidates.popleft())
        return some

    def _look(self) -> Taken:
        """Look at all files: find candidates, correct the ledger, remove what was left behind."""
        before = self._ledger.read()
        self._added_bytes = 0
        entries: list[Candidate] = []
        hidden: list[Candidate] = []
        empty: list[str] = []
        for path, status in files_of(self._directory, empty):
            name = os.path.relpath(path, self._directory)
            found = Candidate(
                _ANY, 0, status.st_mtime_ns, path, status.st_ino, room_of(status.st_size)
            )
            if os.path.basename(path).startswith(HIDDEN_PREFIX):
                if status.st_ctime < time.time() - _LEFT_BEHIND_SECONDS:
                    hidden.append(found)
            elif key_of(name) is not None:
                entries.append(found)
        for each, now in self._with_accesses(hidden):
            # Who is still making it has it pinned.
            if now is not None:
                _has_removed(each)
        self._candidates = deque(
            sorted(now for _, now in self._with_accesses(entries) if now is not None)
        )
        for path in empty:
            # A process that is about to use it makes it again.
            with contextlib.suppress(OSError):
                os.rmdir(path)
        taken = Taken(len(entries), sum(each.room_bytes for each in entries))
        return self._ledger.correct(before, taken)

    def _with_accesses(
        self, found: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate, Candidate | None]]:
        """Candidates, and the same with their accesses as they are now; None for what is pinned."""
        for start in range(0, len(found), _ASKED_AT_ONCE):
            some = found[start : start + _ASKED_AT_ONCE]
            known = self._ask([each.inode for each in some])
            for each, last_ns, reads, is_pinned in zip(
                some, known.last_access_ns, known.reads, known.is_pinned, strict=True
            ):
                now = each._replace(last_ns=last_ns, reads=reads)
                yield each, None if is_pinned else now

    def _ask(self, inodes: list[int]) -> Accesses:
        said, _ = self._connection.ask("accesses", inodes=inodes)
        try:
            answer = decode(Accesses, said)
        except Malformed as error:
            why = f"its answer makes no sense: {error}"
            raise NoAnswer(path=self._connection.mountpoint, why=why) from None
        if {len(answer.last_access_ns), len(answer.reads), len(answer.is_pinned)} != {len(inodes)}:
            why = "its answer makes no sense: it says nothing of some files"
            raise NoAnswer(path=self._connection.mountpoint, why=why)
        return answer


def any_candidate(path: str, inode: int, room_bytes: int) -> Candidate:
    """A candidate that is removed if nobody has it pinned, whenever it was accessed."""
    return Candidate(_ANY, 0, 0, path, inode, room_bytes)


def _is_as_it_was(candidate: Candidate, now: Candidate | None) -> bool:
    """Whether nobody has an entry, or has accessed it since it became a candidate."""
    return now is not None and (candidate.last_ns == _ANY or candidate == now)


def _has_removed(candidate: Candidate) -> bool:
    """Remove a file, unless its name is another file's by now. Raises OSError."""
    try:
        if os.lstat(candidate.path).st_ino != candidate.inode:
            return False
        os.unlink(candidate.path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def files_of(
    directory: str, empty: list[str] | None = None
) -> Iterator[tuple[str, os.stat_result]]:
    """All regular files below a directory, with their attributes, while others come and go.

    The directories in it that have nothing in them are added to `empty`.
    """
    waiting = [directory]
    while waiting:
        path, is_empty = waiting.pop(), True
        # A directory that is gone has no files.
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                is_empty = False
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield entry.path, status
            if empty is not None and is_empty and path != directory:
                empty.append(path)


class _Ledger:
    """What the entries take together, in a file that all processes lock while they change it."""

    def __init__(self, path: str, mount_identity: int) -> None:
        self._path = path
        self._mount_identity = mount_identity
        self._file: Descriptor | None = None
        self._begin()

    def read(self) -> Taken | None:
        """What they take; None if nobody has noted it since the mount. Raises OSError."""
        with _unless_it_cannot_be_noted(), self._locked() as fd:
            return self._known(fd)
        return None

    def add(self, entry_count: int, room_bytes: int) -> bool:
        """Note a change; False if there is nothing that it could be added to. Raises OSError."""
        with _unless_it_cannot_be_noted(), self._locked() as fd:
            known = self._known(fd)
            if known is not None:
                self._note(fd, known.entry_count + entry_count, known.room_bytes + room_bytes)
                return True
        return False

    def correct(self, before: Taken | None, found: Taken) -> Taken:
        """Note what was found by looking, and what others have changed since `before`."""
        entry_count, room_bytes = found
        with _unless_it_cannot_be_noted(), self._locked() as fd:
            now = self._known(fd)
            if before is not None and now is not None:
                entry_count += now.entry_count - before.entry_count
                room_bytes += now.room_bytes - before.room_bytes
            return self._note(fd, entry_count, room_bytes)
        return found

    def close(self) -> None:
        self._file = None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        if self._pid != os.getpid():
            self._begin()
        # The kernel's lock is the process's, and this one is between its threads.
        with self._lock:
            file = self._file
            if file is None or not os.fstat(file.number).st_nlink:
                file = self._file = self._opened()
            fcntl.lockf(file.number, fcntl.LOCK_EX)
            try:
                yield file.number
            finally:
                fcntl.lockf(file.number, fcntl.LOCK_UN)

    def _begin(self) -> None:
        # A fork leaves the lock as another thread of the parent had it.
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def _opened(self) -> Descriptor:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        return Descriptor.opened(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    def _known(self, fd: int) -> Taken | None:
        record = os.pread(fd, _LEDGER.size, 0)
        if len(record) == _LEDGER.size:
            magic, mount_identity, entry_count, room_bytes = _LEDGER.unpack(record)
            if (magic, mount_identity) == (_MAGIC, self._mount_identity):
                return Taken(entry_count, room_bytes)
        return None

    def _note(self, fd: int, entry_count: int, room_bytes: int) -> Taken:
        taken = Taken(max(entry_count, 0), max(room_bytes, 0))
        os.pwrite(fd, _LEDGER.pack(_MAGIC, self._mount_identity, *taken), 0)
        return taken


@contextlib.contextmanager
def _unless_it_cannot_be_noted() -> Iterator[None]:
    """Go on on a read-only mount, where nothing changes, and on a full one, where whoever has to
    know looks at all files, until there is room for the ledger."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC):
            raise
