"""The two planes of one mount, from the control plane's side: made, joined and ended here.

    fusermount3 -> /dev/fuse -> data plane (a process of its own)
                                  | forwarded: requests that it can't answer, and their replies
                                  | notices:   what the kernel is told

Invariants:
- a mount that is not kept (`keeping`) dies with its data plane: after `start` this process holds no
  descriptor of its connection. Otherwise callers would wait for ever for a mount that nothing
  serves;
- such a data plane ends when this process ends, because a mount whose files can't be opened or made
  durable any more is of no use;
- of a mount that is kept, this process holds all that another data plane needs: the connection,
  both ends of the sockets, the memory of the rings. So whatever was in the sockets stays there.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Self

import trio

from pmemfs.dataplane.layouts import HAVE_SECRETS, entries_bytes
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.errors import DataPlaneFailed, system_error
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.processes import bare_python_words, has_ended, limits_on_everything
from pmemfs.units import KIB, MIB, align_up

_DAEMON = "pmemfs.daemons.planed"
_READY_SECONDS = 30
_POLL_SECONDS = 0.002
_SO_SNDBUFFORCE = 32
_SOCKET_BYTES = 8 * MIB
_MESSAGE_OVERHEAD = 64
_OUT_HEADER_BYTES = 16
_HEADERS_BYTES = 4 * KIB
"""The most that a request or reply has besides the bytes that it moves."""
MAX_BACKGROUND = 16384
"""How many requests the kernel may have under way."""
_ENTRIES_BYTES = 64 * MIB
"""The memory of all rings' entries together, if that leaves each queue a few entries."""
_LARGE_PAGE_BYTES = 2 * MIB
_LEAST_DEPTH = 4
_LEAST_WRITE = 64 * KIB
_MOST_DEPTH = 32
_MOST_OWN = 64
_OTHER_VERSION = (
    "the program was replaced by a version that declares shared memory otherwise; unmount before "
    "such a version is installed"
)


class PlaneSettings(NamedTuple):
    """What the data plane is started with; see `run` in dataplane/process.pxi."""

    max_write: int
    queue_count: int
    depth: int
    reader_count: int

    @classmethod
    def of(cls, shared: SharedMemory) -> Self:
        """Those that a data plane of this memory was started with, once INIT has agreed."""
        counts = map(shared.header_word, ("queue_count", "depth", "reader_count"))
        return cls(shared.agreement.max_write, *counts)

    @property
    def longest_bytes(self) -> int:
        """The longest request."""
        return self.max_write + _HEADERS_BYTES

    @property
    def worker_count(self) -> int:
        """All threads that serve requests."""
        return self.queue_count + self.reader_count


def choose_settings(transport: str, message_bytes: int) -> PlaneSettings:
    """The settings for this machine. A request must fit into one message of a socket."""
    max_write = MIB if message_bytes >= MIB + _HEADERS_BYTES else 128 * KIB
    if transport == "uring":
        queue_count = possible_cpu_count()
        while queue_count * _LEAST_DEPTH * max_write > _ENTRIES_BYTES and max_write > _LEAST_WRITE:
            max_write //= 2
        depth = min(_MOST_DEPTH, _ENTRIES_BYTES // (queue_count * max_write))
        return PlaneSettings(max_write, queue_count, max(_LEAST_DEPTH, depth), 1)
    reader_count = len(os.sched_getaffinity(0))
    return PlaneSettings(max_write, 0, 0, reader_count)


def possible_cpu_count() -> int:
    """One more than the highest number of any CPU that may ever exist."""
    with open("/sys/devices/system/cpu/possible") as file:
        return int(file.read().strip().replace("-", ",").rsplit(",", 1)[-1]) + 1


class Sockets:
    """The sockets between the planes: `forwarded` and `notices` are this process's ends.

    The first of `forwarded` is for all workers; `add_own` adds sockets of single workers.
    """

    def __init__(self) -> None:
        self.forwarded: list[socket.socket] = []
        self.their_forwarded: list[socket.socket] = []
        self.notices, self.their_notices = _socketpair()
        self.add_own(1)

    @classmethod
    def of(cls, fds: Sequence[int]) -> Self:
        """The sockets that another daemon's `fds` were the descriptors of."""
        notices, theirs, *forwarded = (socket.socket(fileno=fd) for fd in fds)
        sockets = cls.__new__(cls)
        sockets.notices, sockets.their_notices = notices, theirs
        half = len(forwarded) // 2
        sockets.forwarded, sockets.their_forwarded = forwarded[:half], forwarded[half:]
        return sockets

    @property
    def fds(self) -> list[int]:
        """The descriptors of all ends."""
        ends = (self.notices, self.their_notices, *self.forwarded, *self.their_forwarded)
        return [end.fileno() for end in ends]

    def add_own(self, count: int) -> None:
        """Add sockets for requests, one for each of so many workers, up to a limit."""
        for _ in range(min(count, _MOST_OWN)):
            ours, theirs = _socketpair()
            self.forwarded.append(ours)
            self.their_forwarded.append(theirs)

    def close_theirs(self) -> None:
        """Close the data plane's ends, which that process has by now."""
        for end in (self.their_notices, *self.their_forwarded):
            end.close()

    @property
    def have_hung_up(self) -> bool:
        """Whether `hang_up` was called, by whatever process."""
        poll = select.poll()
        poll.register(self.forwarded[0], 0)
        return bool(poll.poll(0))

    @property
    def message_bytes(self) -> int:
        """The longest message that fits into a socket."""
        first = self.forwarded[0]
        return first.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _MESSAGE_OVERHEAD

    def hang_up(self) -> None:
        """Tell the data plane that nothing is answered here any more."""
        with suppress(OSError):
            self.forwarded[0].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this process's ends."""
        for end in (self.notices, *self.forwarded):
            end.close()


class PlaneProcess:
    """The process of a data plane: a child of this one, or of a daemon before it."""

    def __init__(self, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._child = child

    def go(self) -> None:
        """Let it begin, if it waits for that."""
        if self._child and self._child.stdin:
            with suppress(BrokenPipeError), self._child.stdin as end:
                end.write(b"\n")

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return has_ended(self.pidfd, 0)

    def status(self) -> int | None:
        """Wait for its end; its exit status, or minus the number of the signal that ended it. None
        if only its parent knows."""
        if self._child is None:
            has_ended(self.pidfd, None)
            return None
        return self._child.wait()

    def kill(self) -> None:
        """Kill it, if it has not ended yet."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Forget it."""
        os.close(self.pidfd)


class DataPlane:
    """The data plane: one process after another if they die, over the same descriptors."""

    def __init__(
        self, fuse_fd: int, shared: SharedMemory, settings: PlaneSettings, sockets: Sockets, *,
        is_kept: bool = False, entries_fd: int = -1,
    ) -> None:  # fmt: skip
        """`entries_fd` is the memory of the rings, if an earlier daemon of this mount has made
        it."""
        self._shared = shared
        self._settings = settings
        self.sockets = sockets
        self._is_kept = is_kept
        self._fuse_fd: int | None = fuse_fd
        self._process: PlaneProcess | None = None
        self._is_to_end = False
        self._said = os.memfd_create("pmemfs-said", os.MFD_CLOEXEC)
        self.entries_fd = entries_fd
        """The memory of the rings; -1 if it need not outlive a data plane."""
        self._secrets_fd = -1
        if is_kept and settings.queue_count and entries_fd < 0:
            self.entries_fd = os.memfd_create("pmemfs-entries", os.MFD_CLOEXEC)
            needed = entries_bytes(settings.queue_count, settings.depth, settings.max_write)
            os.ftruncate(self.entries_fd, align_up(needed, _LARGE_PAGE_BYTES))

    @property
    def process(self) -> PlaneProcess:
        """The process, once it was started."""
        assert self._process is not None
        return self._process

    @property
    def fuse_fd(self) -> int:
        """The connection of a mount that is kept."""
        assert self._fuse_fd is not None
        return self._fuse_fd

    def adopt(self, process: PlaneProcess) -> None:
        """Go on with the process that another daemon has started."""
        self._process = process

    def start(self, medium: MappedMedium, *, resumes: bool = False, mountpoint: str = "") -> None:
        """Start a process. It waits for the kernel's first request; with `resumes` it is to go on
        where another one has died, and waits for `PlaneProcess.go`. Then the mount is at
        `mountpoint`. Raises OSError."""
        arguments = {
            "fuse_fd": self.fuse_fd,
            "shared_fd": self._shared.fd,
            "pool_fd": medium.fileno(),
            "notices_fd": self.sockets.their_notices.fileno(),
            "map_flags": medium.map_flags,
            **self._settings._asdict(),
            **({"entries_fd": self.entries_fd} if self.entries_fd >= 0 else {}),
            **({"secrets_fd": self._secrets_fd} if self._secrets_fd >= 0 else {}),
            **({"resumes": 1} if resumes else {}),
        }
        if resumes:
            # What has died may have been about to end, for a reason that has gone with it.
            self._shared.set_header_word("ends", int(self._is_to_end))
        forward_fds = [end.fileno() for end in self.sockets.their_forwarded]
        # Only what this one says is about its end.
        os.ftruncate(self._said, 0)
        os.lseek(self._said, 0, os.SEEK_SET)
        child = subprocess.Popen(
            [
                *bare_python_words(_DAEMON),
                *(f"{name}={value}" for name, value in arguments.items()),
                f"forward_fds={','.join(map(str, forward_fds))}",
                f"mountpoint={mountpoint}",
            ],
            stdin=subprocess.PIPE if resumes else subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            cwd="/",
            pass_fds=[
                *(value for name, value in arguments.items() if name.endswith("_fd")),
                *forward_fds,
            ],
        )
        if self._process is not None:
            self._process.close()
        self._process = PlaneProcess(child.pid, os.pidfd_open(child.pid), child)
        if not self._is_kept:
            # The data plane has them. If this process kept them, too, the mount would outlive the
            # data plane.
            self._close_connection()
            self.sockets.close_theirs()

    def give_secrets(self, fd: int) -> None:
        """Let the data plane have the keys in secret memory from now on: the process that runs, and
        any that is started. Until it has them it forwards what is asked of encrypted files."""
        self._secrets_fd = fd
        if self._process is None:
            return
        # struct fuse_out_header
        message = struct.pack("<IiQ", _OUT_HEADER_BYTES, HAVE_SECRETS, 0)
        # If it has died, the next one gets them when it starts.
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.sockets.forwarded[0], [message], [fd])

    async def wait_until_ready(self) -> None:
        """Return once every worker runs. Raises DataPlaneFailed."""
        with trio.move_on_after(_READY_SECONDS):
            while not self.is_ready:
                if self.process.has_ended():
                    raise self.failure()
                await trio.sleep(_POLL_SECONDS)
            return
        raise DataPlaneFailed(why=f"it was not ready within {_READY_SECONDS} s")

    async def wait(self) -> None:
        """Return when the process has ended."""
        await trio.lowlevel.wait_readable(self.process.pidfd)

    def has_died(self) -> bool:
        """Whether the process, which has ended, was to go on. Raises DataPlaneFailed if it has
        ended because it could not."""
        ended = self._shared.header_word("ended")
        if ended > 1:
            raise self.failure()
        if ended or self._is_to_end:
            return False
        if not self._is_kept:
            raise self.failure()
        return self.is_connected()

    def is_connected(self) -> bool:
        """Whether the kernel has a mount on the connection."""
        poll = select.poll()
        poll.register(self.fuse_fd, 0)
        # The only thing that is answered though nobody asks is an error: fuse_dev_poll.
        return not poll.poll(0)

    def ask_to_end(self) -> None:
        """Let the data plane finish what it has begun, and end."""
        self._is_to_end = True
        self._shared.set_header_word("ends", 1)
        self.sockets.hang_up()

    def stop(self) -> None:
        """Wait for its end; it may have ended already, or never have been started."""
        self.ask_to_end()
        if self._process is not None:
            self._process.status()
        self._close_connection()

    def kill(self) -> None:
        """Kill the process, and return when it has ended."""
        self.process.kill()
        self.process.status()

    def close(self) -> None:
        """Close what is left of the data plane here."""
        self.sockets.close()
        self.sockets.close_theirs()
        if self._process is not None:
            self._process.close()
        if self.entries_fd >= 0:
            os.close(self.entries_fd)
        os.close(self._said)

    def _close_connection(self) -> None:
        if self._fuse_fd is not None:
            os.close(self._fuse_fd)
            self._fuse_fd = None

    @property
    def is_ready(self) -> bool:
        """Whether every worker runs."""
        workers = range(self._settings.worker_count)
        return all(self._shared.slot_word(worker, "thread_id") for worker in workers)

    def failure(self) -> DataPlaneFailed:
        """Why the data plane has ended, or is about to end."""
        status = self.process.status()
        said = os.pread(self._said, 64 * KIB, 0).decode(errors="replace").strip()
        if said:
            why = f"it ended with status {status}: {said.splitlines()[-1]}{limits_on_everything()}"
            return DataPlaneFailed(why=why)
        if status is None:
            status = self._shared.header_word("ended") - 1
            if status < 0:
                return DataPlaneFailed(why="it was killed, or has crashed")
        if status < 0:
            return DataPlaneFailed(why=f"it was ended by signal {signal.Signals(-status).name}")
        why = _OTHER_VERSION if status == errno.ESTALE else os.strerror(status).lower()
        failure = DataPlaneFailed(why=why)
        # Its exit status is the errno of a system call.
        failure.__cause__ = system_error(status)
        return failure


def _socketpair() -> tuple[socket.socket, socket.socket]:
    """Two ends that take a whole request in one message, as far as this user may have that much."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
        except PermissionError:
            # As much as net.core.wmem_max allows.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ends
