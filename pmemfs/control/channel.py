"""A connection to a daemon that stays open: for programs that ask often, and get descriptors.

    channel = Channel(socket_path(mount), mount.owner_uid)
    result, descriptors = channel.ask("pin", files=[[inode, 0, -1]])

Invariants:
- many threads may ask at once, also a finalizer within another question of its own thread. So a
  connection belongs to the question that took it, and nothing here waits for a lock of Python's;
- after a fork the child never uses a connection of its parent, because their answers would mix;
- a daemon hangs up on connections that are idle, and all end when it dies. Then the question is
  asked again on a new one, which may lead to the daemon that takes the place of a dead one. Who has
  answered it before, for nobody, has done no harm: a pin ends with its descriptor;
- the first answer says which mount it is of, and after that no other mount's daemon answers. A
  socket is named after a device number, which the kernel gives to a later mount;
- every descriptor that arrives is returned, or closed if the answer is an error.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import socket
import struct
import time
from queue import SimpleQueue
from typing import Any, NamedTuple

from pmemfs.control import (
    ANSWER_LIMIT_BYTES,
    MOST_DESCRIPTORS,
    REQUEST_LIMIT_BYTES,
    close_all,
    peer_pid,
)
from pmemfs.control.client import (
    ANSWER_TIMEOUT_SECONDS,
    DYING_SECONDS,
    MOST_DEATHS,
    RemoteError,
    connected,
    decoded_answer,
    has_died,
    living_pid,
    reason,
    result_of,
)
from pmemfs.control.shape import Malformed
from pmemfs.errors import DaemonGone, NoAnswer, TooLong, TooManyOpenFiles
from pmemfs.version import VERSION

_MOST_CONNECTIONS = 8
"""One process asks so many questions at once; a daemon takes 64 connections from all."""
_RETRY_SECONDS = 0.02
_SHORT_BYTES = 16 * 1024
"""Most questions and answers are shorter. The kernel takes such a question at once."""
_CHUNK_BYTES = 256 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
_CUT = int(socket.MSG_CTRUNC)
"""Plain, because an operation on an enum takes as long as to decode an answer."""
_TIMEVAL = struct.Struct("@ll")
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class _Line(NamedTuple):
    """A connection, and who is at its other end, as the kernel noted when it was made."""

    socket: socket.socket
    pid: int


class Channel:
    """Asks one daemon."""

    def __init__(
        self, path: str | os.PathLike[str], owner_uid: int | None = None, *,
        timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    ) -> None:  # fmt: skip
        """The daemon must belong to this user unless `owner_uid` names another."""
        self._path = path
        self._owner_uid = os.geteuid() if owner_uid is None else owner_uid
        self._timeout_seconds = timeout_seconds
        self._is_closed = False
        self._mount: int | None = None
        """Tells the mount from others, once it has answered."""
        self._begin()

    def ask(self, method: str, **params: Any) -> tuple[Any, list[int]]:
        """The result of a method, and the descriptors that came with it, which are the caller's.

        Raises RemoteError with the daemon's own sentence, of the kind DaemonGone if it serves
        another mount; NoAnswer, TooLong, and TooManyOpenFiles if this process has no room for the
        descriptors.
        """
        if self._pid != os.getpid():
            self.close()
            self._begin()
        request = {"method": method, "params": params, "mount": self._mount, "version": VERSION}
        question = _ENCODE(request).encode() + b"\n"
        if len(question) > REQUEST_LIMIT_BYTES:
            raise TooLong(length=len(question), limit=REQUEST_LIMIT_BYTES)
        deadline = time.monotonic() + self._timeout_seconds
        descriptors: list[int] = []
        try:
            answer, pid = self._exchange(question, deadline, descriptors)
            said = decoded_answer(answer)
            self._check_mount(said.get("mount"))
            return result_of(said, pid), descriptors
        except Malformed as error:
            close_all(descriptors)
            raise NoAnswer(path=self._path, why=f"its answer makes no sense: {error}") from None
        except BaseException:
            close_all(descriptors)
            raise

    def _check_mount(self, mount: Any) -> None:
        """Raise RemoteError, of the kind DaemonGone, if an answer is another mount's."""
        if mount is None:
            return
        if self._mount is None:
            self._mount = mount
        elif self._mount != mount:
            gone = DaemonGone(path=self._path)
            raise RemoteError(str(gone), gone.exit_code, gone.kind, gone.errno)

    def close(self) -> None:
        """Hang up. A question that is under way hangs up when it has its answer."""
        self._is_closed = True
        while self._idle:
            # Another thread may take the last one in between.
            with contextlib.suppress(IndexError):
                self._idle.pop().socket.close()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._is_closed = False
        self._idle: list[_Line] = []
        # Unlike a semaphore, a queue may be asked again within itself, by a finalizer.
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_MOST_CONNECTIONS):
            self._places.put(None)

    def _exchange(
        self, question: bytes, deadline: float, descriptors: list[int]
    ) -> tuple[bytes, int]:
        """Send a request; its answer, and the process that gave it. Raises NoAnswer."""
        places, idle = self._places, self._idle
        places.get()
        line = None
        deaths = 0
        try:
            answer = None
            while answer is None:
                try:
                    line, is_new = idle.pop(), False
                except IndexError:
                    line, is_new = self._connect(deadline), True
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer = _asked(line.socket, question, deadline, descriptors)
                if answer is None:
                    line.socket.close()
                    close_all(descriptors)
                    descriptors.clear()
                    if is_new:
                        deaths += 1
                        if deaths == MOST_DEATHS or not has_died(line.pid, DYING_SECONDS):
                            raise OSError("it closed the connection")
        except OSError as error:
            if line is not None:
                line.socket.close()
            raise NoAnswer(path=self._path, why=reason(error)) from None
        except BaseException:
            # What is left of this answer must not be the beginning of the next.
            if line is not None:
                line.socket.close()
            raise
        finally:
            places.put(None)
        assert line is not None
        if is_new:
            line = line._replace(pid=living_pid(line.pid, self._path, self._owner_uid))
        if self._is_closed:
            line.socket.close()
        else:
            idle.append(line)
        return answer, line.pid

    def _connect(self, deadline: float) -> _Line:
        while True:
            try:
                made = connected(self._path, self._owner_uid)
                break
            except BlockingIOError:
                # The daemon's queue of connections is full.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
        # The kernel ends a wait that is too long. If Python did, it would ask before each call
        # whether the socket is ready, which is one more system call.
        patience = _TIMEVAL.pack(int(self._timeout_seconds), int(self._timeout_seconds % 1 * 1e6))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        made.setblocking(True)
        return _Line(made, peer_pid(made))


def _asked(
    connection: socket.socket, question: bytes, deadline: float, descriptors: list[int]
) -> bytes | None:
    """The answer to a request; None if the daemon hung up instead. Raises OSError."""
    try:
        if len(question) > _SHORT_BYTES:
            return _long_asked(connection, question, deadline, descriptors)
        connection.sendall(question)
        chunk = _received(connection, _SHORT_BYTES, descriptors)
        if chunk.endswith(b"\n"):
            return chunk
        return _rest(connection, chunk, deadline, descriptors) if chunk else None
    except BlockingIOError:
        raise TimeoutError("it timed out") from None


def _rest(
    connection: socket.socket, begun: bytes, deadline: float, descriptors: list[int]
) -> bytes | None:
    """An answer that comes in many parts, of which one may have come."""
    received = bytearray(begun)
    while True:
        # Each part may be late, but all of them together may not.
        _patience(connection, deadline)
        chunk = _received(connection, _CHUNK_BYTES, descriptors)
        received += chunk
        if len(received) > ANSWER_LIMIT_BYTES:
            raise OSError(f"its answer is longer than {ANSWER_LIMIT_BYTES} bytes")
        if chunk.endswith(b"\n"):
            connection.setblocking(True)
            return bytes(received)
        if not chunk:
            return None


def _long_asked(
    connection: socket.socket, question: bytes, deadline: float, descriptors: list[int]
) -> bytes | None:
    _patience(connection, deadline)
    connection.sendall(question)
    return _rest(connection, b"", deadline, descriptors)


def _received(connection: socket.socket, most_bytes: int, descriptors: list[int]) -> bytes:
    """What comes next; its descriptors are added to the list. Raises TooManyOpenFiles."""
    chunk, ancillary, flags, _ = connection.recvmsg(
        most_bytes, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            rights = array.array("i")
            rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
            descriptors += rights
    if flags & _CUT:
        raise TooManyOpenFiles(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return chunk


def _patience(connection: socket.socket, deadline: float) -> None:
    """Let the next wait on a connection last until the deadline."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it timed out")
    connection.settimeout(seconds)
