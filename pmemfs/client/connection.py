"""One program's connection with the daemon of a mount: questions, and the memory behind answers.

Invariants:
- a descriptor that comes with an answer has an owner before anything can fail, so none stays open;
- what goes wrong is an exception of `errors`, or the OSError of a system call. The control part
  passes on what a daemon says as RemoteError; here it becomes the class that the daemon has named;
- a daemon that has ended is DaemonGone, whichever call finds out;
- a mount may outlive its processes. Then calls wait for their successors, and what is mapped stays
  as it is. Only what the kernel was handing to a ring when that died is cancelled (ECANCELED).
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from pmemfs import errors
from pmemfs.control.channel import Channel
from pmemfs.control.client import RemoteError, daemon_pidfd
from pmemfs.control.places import socket_path
from pmemfs.errors import (
    BadMapping,
    Closed,
    DaemonGone,
    NoAnswer,
    NoNewFiles,
    NotMounted,
    NotPermitted,
    PmemfsError,
    TooManyOpenFiles,
)
from pmemfs.medium.addresses import Descriptor, PinEnd, Tally, Words, known_of
from pmemfs.medium.base import Durability
from pmemfs.mountinfo import Mount, mount_at, mount_of_device

if TYPE_CHECKING:
    from types import TracebackType

_PATIENCE_SECONDS = 24 * 3600
"""Memory for a large new array has to be cleared first, and a daemon that ends is noticed at once.
So a client waits as it would for a write; an interrupt ends that."""
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)
"""What the kernel answers for a mount whose daemon has ended, or just ends."""

_MODE_OF_FILES = "fs"

_OF_PROCESS: weakref.WeakValueDictionary[str, Connection] = weakref.WeakValueDictionary()


class PoolMemory(NamedTuple):
    """The pool, as it is to be mapped."""

    file: Descriptor
    words: Words
    map_flags: int
    unit_bytes: int
    durability: Durability
    uuid: str


class PinAnswer(NamedTuple):
    """What a daemon has pinned."""

    end: PinEnd
    number: int
    place: int
    files: Sequence[Mapping[str, Any]]
    """`inode`, `generation`, `size_bytes`, `length_bytes` and `pieces` of each."""
    pool: PoolMemory


class OpenedFile:
    """A file that exists as long as a `with` statement lasts, which gives its inode number."""

    __slots__ = ("_file", "_inode")

    def __init__(self, file: Descriptor, inode: int) -> None:
        self._file = file
        self._inode = inode

    def __enter__(self) -> int:
        return self._inode

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


class Connection:
    """Asks the daemon of a mount, from any thread, also after a fork."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        """Find the mount. Raises NotMounted and NotPermitted. Whether its daemon answers shows when
        it is asked."""
        mount = _mount_of(os.fsdecode(mountpoint))
        if os.geteuid() not in (0, mount.owner_uid):
            raise NotPermitted(path=mount.mountpoint, uid=mount.owner_uid)
        self.mountpoint = mount.mountpoint
        self.tally = Tally()
        self.is_closed = False
        self._device = mount.number
        self._owner_uid = mount.owner_uid
        self._socket = socket_path(mount)
        self._channel = Channel(self._socket, mount.owner_uid, timeout_seconds=_PATIENCE_SECONDS)
        self._pools: dict[bool, PoolMemory] = {}
        """The pool, by whether its descriptor can write."""

    def close(self) -> None:
        """Ask nothing any more. What is mapped stays, and keeps what it needs."""
        self.is_closed = True
        self._pools.clear()
        self._channel.close()

    def __del__(self) -> None:
        # There is none if there is no such mount.
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.close()

    def ask(self, method: str, **params: Any) -> tuple[Any, list[int]]:
        """What a method of the daemon answers, and descriptors, which are the caller's.

        Raises what the daemon says, Closed, DaemonGone, NoAnswer, and TooManyOpenFiles.
        """
        if self.is_closed:
            raise Closed(what=f"the connection with the mount on {self.mountpoint}")
        try:
            return self._channel.ask(method, **params)
        except RemoteError as error:
            if error.kind == DaemonGone.__name__:
                # The daemon of a later mount says so, and doesn't know the one it replaced.
                raise DaemonGone(path=self.mountpoint) from None
            raise _as_named(error) from None
        except NoAnswer:
            self._check_daemon()
            raise

    def pin(
        self, ranges: Sequence[tuple[int, int, int]], paths: Sequence[str], *, writable: bool,
        contiguous: bool, may_make_plain: bool = True,
    ) -> PinAnswer:  # fmt: skip
        """Pin (inode, offset, length in bytes) of some files. Raises as `ask`.

        Without `may_make_plain`, what is compressed is refused with CannotPin (EOPNOTSUPP).
        """
        pool = self._pools.get(writable)
        result, descriptors = self.ask(
            "pin", files=ranges, paths=[_sayable(path) for path in paths], writable=writable,
            contiguous=contiguous, may_make_plain=may_make_plain, wants_pool=pool is None,
        )  # fmt: skip
        owned = [Descriptor(fd) for fd in descriptors[1:]]
        try:
            end = PinEnd(descriptors[0], self.tally, speaks=writable)
            if pool is None:
                pool = self._pools.setdefault(writable, _pool_of(result["pool"], owned))
            return PinAnswer(end, result["pin"], result["place"], result["files"], pool)
        except (LookupError, TypeError, ValueError) as error:
            why = f"its answer makes no sense: {error!r}"
            raise NoAnswer(path=self._socket, why=why) from None

    def opened(self, path: str | os.PathLike[str], *, writable: bool) -> OpenedFile:
        """A file of the mount, for a `with` statement, which gives its inode number.

        For reading, it is not opened: that would ask the daemon, while the kernel knows whether
        this user may read. Nor is the daemon asked for its attributes. Raises OSError,
        BadMapping, NotMounted, DaemonGone, TooManyOpenFiles.
        """
        full = self.full(path)
        try:
            file = self._opened(full, os.O_CLOEXEC | (os.O_RDWR if writable else os.O_PATH))
            try:
                device, inode, mode, uid = known_of(file.number)
                self.check_device(full, device)
                if not stat.S_ISREG(mode):
                    if stat.S_ISDIR(mode):
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), full)
                    raise BadMapping(path=full, why="it is not a regular file")
                if not writable and not _may_read(file.number, mode, uid):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), full)
            except BaseException:
                file.close()
                raise
        except PmemfsError:
            raise
        except OSError as error:
            raise self._better(error) from None
        return OpenedFile(file, inode)

    def _opened(self, path: str, flags: int) -> Descriptor:
        try:
            return Descriptor.opened(path, flags)
        except OSError as error:
            if not self._is_served_after(error):
                raise
        return Descriptor.opened(path, flags)

    def _is_served_after(self, error: OSError) -> bool:
        """Whether a call was cancelled although the mount goes on."""
        if error.errno == errno.ECANCELED:
            with suppress(OSError):
                os.statvfs(self.mountpoint)
                return self.is_current
        return False

    @property
    def is_current(self) -> bool:
        """Whether the mount is still where it was."""
        return os.stat(self.mountpoint).st_dev == self._device

    def full(self, path: str | os.PathLike[str]) -> str:
        """The path of a file that is named from the mountpoint, or from the root."""
        return os.path.join(self.mountpoint, os.fsdecode(path))

    def check_device(self, path: str, device: int) -> None:
        """Raise NotMounted, or DaemonGone, unless a file of this device belongs to this mount."""
        if device != self._device:
            if not self.is_current:
                raise DaemonGone(path=self.mountpoint)
            raise NotMounted(path=path, what=f"a file of the mount on {self.mountpoint}")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise what says more than the OSError of a system call, where there is such a thing."""
        try:
            yield
        except OSError as error:
            better = self._better(error)
            if better is error:
                raise
            raise better from None

    def _better(self, error: OSError) -> OSError | PmemfsError:
        if error.errno == errno.EMFILE:
            return TooManyOpenFiles(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # The kernel knows that the mountpoint is another file system's by now, unless the mount is
        # a new one.
        if self._is_served_after(error):
            return error
        if error.errno in _DEAD or (error.errno == errno.ENOENT and not self.is_current):
            return DaemonGone(path=self.mountpoint)
        if error.errno == errno.EPERM and (mode := self._mode()) not in (_MODE_OF_FILES, None):
            return NoNewFiles(path=self.mountpoint, mode=mode)
        return error

    def _mode(self) -> str | None:
        """The mode of the mount, if its daemon says it."""
        try:
            mode = self.ask("info")[0]["pool"]["mode"]
        except (PmemfsError, LookupError, TypeError):
            return None
        return mode if isinstance(mode, str) else None

    def _check_daemon(self) -> None:
        """Raise DaemonGone if there is nobody at the other end."""
        pidfd = daemon_pidfd(self._socket, owner_uid=self._owner_uid)
        if pidfd is None:
            raise DaemonGone(path=self.mountpoint) from None
        os.close(pidfd)


def connection_of_process(mountpoint: str) -> Connection:
    """A connection with a mount that this process uses for all that it unpickles."""
    connection = _OF_PROCESS.get(mountpoint)
    if connection is None or connection.is_closed or not connection.is_current:
        connection = _OF_PROCESS[mountpoint] = Connection(mountpoint)
    return connection


def _mount_of(path: str) -> Mount:
    """The mount of ours at, or around, a path. Raises NotMounted and OSError."""
    real = os.path.realpath(path)
    # A mount whose daemon does not answer is found without asking it.
    mount = mount_at(real) or mount_of_device(os.stat(real).st_dev)
    if mount is None or not mount.is_ours:
        what = "on a mount of pmemfs; 'pmemfs list' shows those that there are"
        raise NotMounted(path=path, what=what)
    return mount


def _pool_of(said: Mapping[str, Any], owned: Sequence[Descriptor]) -> PoolMemory:
    file, words = owned
    return PoolMemory(
        file,
        Words(words.number),
        said["map_flags"],
        said["unit_bytes"],
        Durability[said["durability"].upper()],
        said["uuid"],
    )


def _as_named(error: RemoteError) -> PmemfsError:
    """The error that the daemon has raised, as its class."""
    named = getattr(errors, error.kind, None)
    if isinstance(named, type) and issubclass(named, PmemfsError):
        return named.said(str(error), error.errno)
    return error


def _may_read(fd: int, mode: int, uid: int) -> bool:
    """Whether the kernel would let this user open a file for reading."""
    # Of an owner these bits alone decide, and to look through /proc takes longer than to open.
    if mode & stat.S_IRUSR and uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.R_OK, effective_ids=True)


def _sayable(path: str) -> str:
    """A path as text that JSON has; of what is no text, something like it."""
    return path.encode("utf-8", "replace").decode()
