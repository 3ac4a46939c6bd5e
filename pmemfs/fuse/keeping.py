"""The daemon's end of the keeper: what outlives the daemon is stored there (`daemons/keeperd`).

Invariants:
- a mount goes on without its keeper, so nothing here raises because the keeper is gone;
- what is stored under a name is stored whole: a message carries a name's data and descriptors, and
  replaces what had that name.

| name | descriptors | data |
|---|---|---|
| `arguments` | | the command line of a successor, NUL between its words |
| `pool` | the pool, which has the lock | |
| `shared` | the memory that the planes share | |
| `fuse` | the connection to the kernel | |
| `sockets` | both ends of all sockets between the planes | how many are which |
| `entries` | the memory of the rings | |
| `plane` | a pidfd of the data plane | its pid |
| `listener` | the control socket, and its name (`O_PATH`) | its path |
| `standby` | the socket of the process that waits, its pidfd | its pid |
| `log` | where the log goes | a line, with `{time}`, `{pid}` and `{message}` |
| `counts` | the memory of what daemons have counted | |
| `pin-words` | the memory of the words of pins | |
| `pin-N` | the daemon's end of the pin that has the place N | its description (`pins/kept`) |
| `keys` | the secret memory, once there is a key | |
| `transfers`, `origin` | of a cache, see `volume/cache/life` | |
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from pmemfs.mount.processes import bare_python_words
from pmemfs.units import KIB

_DAEMON = "pmemfs.daemons.keeperd"
_DATA_LIMIT_BYTES = 60 * KIB
_MESSAGE_BYTES = 64 * KIB
_MOST_FDS = 253
_IN_MEMORY = b"\0memfd"
"""In place of data that is too long for a message: it is in the memory of the last descriptor."""
_PATIENCE_SECONDS = 5
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stored(NamedTuple):
    """What the keeper has under a name. The descriptors are the receiver's."""

    data: bytes
    fds: list[int]


class Deaths(NamedTuple):
    """How often daemons have died unexpectedly."""

    times: int
    last_ns: int
    """When the last one did, in ns since 1970; 0: none has."""


class Keeper:
    """The keeper of this daemon's mount."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        # One that takes no messages must not hold the mount up for ever.
        connection.settimeout(_PATIENCE_SECONDS)
        self.pid: int | None = pid
        """None: it is gone."""

    @classmethod
    def start(cls, words: Sequence[str] = ()) -> Keeper:
        """Start a keeper for this process, with these words if it is of another version. Raises
        OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        this_process = os.pidfd_open(os.getpid())
        # The keeper begins with them blocked, so that none ends it before it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
        try:
            process = subprocess.Popen(
                [*(words or bare_python_words(_DAEMON)), str(theirs.fileno()), str(this_process)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=[theirs.fileno(), this_process],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(this_process)
            theirs.close()
        # It outlives this process, so nothing may wait for it when the interpreter ends.
        process.returncode = 0
        return cls(ours, process.pid)

    def check(self) -> None:
        """Return when it has answered. Raises OSError if it does not, and ends it."""
        try:
            self._connection.send(b"get\0" + b"0")
            if not self._connection.recv(_MESSAGE_BYTES).startswith(b"keeper\0"):
                raise ConnectionResetError("the keeper does not answer as one")
        except OSError:
            self._kill()
            self._gone()
            raise

    def store(self, name: str, fds: Sequence[int] = (), data: bytes = b"") -> None:
        """Store descriptors and data; they replace what had that name."""
        kept = list(fds)
        memory = -1
        if len(data) > _DATA_LIMIT_BYTES:
            memory = _memory_with(data)
            kept, data = [*kept, memory], _IN_MEMORY
        self._send(b"store\0%s\0%s" % (name.encode(), data), kept)
        if memory >= 0:
            os.close(memory)

    def drop(self, name: str) -> None:
        """Forget what has that name, if anything has."""
        self._send(b"drop\0" + name.encode())

    def replace(self, words: Sequence[str]) -> None:
        """Plan the end of this process: the keeper then starts these words, and counts no death."""
        self._send(b"replace\0" + b"\0".join(map(os.fsencode, words)))

    def watch(self, seconds: float) -> None:
        """Have this process killed if it does not get round to `wait_until_gone` for so long."""
        self._send(b"watch\0%d" % round(seconds * 1000))

    def end(self) -> None:
        """The mount has ended in order: return when the keeper holds nothing any more."""
        self._send(b"end")
        if self.pid is not None:
            try:
                # The keeper says nothing that is of interest now; its last is that it hangs up.
                while self._connection.recv(_MESSAGE_BYTES):
                    pass
            except TimeoutError:
                # It stands still, such as by SIGSTOP, and would keep this process from ending.
                self._kill()
            except OSError:
                pass
        self._gone()

    def close(self) -> None:
        """Leave the mount to the keeper, because this process is about to end."""
        self._connection.close()
        self.pid = None

    async def wait_until_gone(self) -> None:
        """Return when the keeper has ended, though nobody has asked it to. Meanwhile tell it that
        this process lives, whenever it asks."""
        while self.pid is not None:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                if self._connection.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT):
                    self._send(b"pong")
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            self._gone()

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        if self.pid is None:
            return
        try:
            socket.send_fds(self._connection, [message], fds)
        except TimeoutError:
            self._kill()
        except OSError:
            # It is gone, which `wait_until_gone` notices.
            pass

    def _kill(self) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _gone(self) -> None:
        if self.pid is not None:
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        self.close()


def stored(connection: socket.socket) -> dict[str, Stored]:
    """All that a keeper has stored, for the successor that has this connection to it.

    Raises OSError. `keeper` is what the keeper says of itself; see `joined`.
    """
    items: dict[str, Stored] = {}
    while True:
        connection.send(b"get\0%d" % len(items))
        message, fds, _, _ = socket.recv_fds(
            connection, _MESSAGE_BYTES, _MOST_FDS, socket.MSG_CMSG_CLOEXEC
        )
        name, is_item, data = message.partition(b"\0")
        if not is_item:
            if message:
                return items
            raise ConnectionResetError("the keeper is gone")
        if data == _IN_MEMORY:
            memory = fds.pop()
            data = os.pread(memory, os.fstat(memory).st_size, 0)
            os.close(memory)
        items[name.decode()] = Stored(data, fds)


def joined(connection: socket.socket, itself: Stored) -> tuple[Keeper, Deaths]:
    """The keeper at the other end of a successor's connection, and the daemons that have died and
    that no successor was told of; `itself` is the item `keeper`."""
    pid, *deaths = map(int, itself.data.split())
    return Keeper(connection, pid), Deaths(*deaths)


def _memory_with(data: bytes) -> int:
    memory = os.memfd_create("pmemfs-stored", os.MFD_CLOEXEC)
    os.write(memory, data)
    return memory
