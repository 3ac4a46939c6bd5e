"""A connection to a daemon that stays open: for programs that ask often, and get descriptors.

    channel = Channel(socket_path(mount), mount.owner_uid)
    result, descriptors = channel.ask("pin", files=[[inode, 0, -1]])

Invariants:
- many threads may ask at once, also a finalizer within another question of its own thread. So a
  connection belongs to the question that took it, and nothing here waits for a lock of Python's;
- after a fork the child never uses a connection of its parent, because their answers would mix;
- a daemon hangs up on connections that are idle. Then the question is asked again on a new one. A
  daemon that has answered it before, for nobody, has done no harm: a pin ends with its descriptor;
- every descriptor that arrives is returned, or closed if the answer is an error.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

from pmemfs.control import (
    ANSWER_LIMIT_BYTES,
    MOST_DESCRIPTORS,
    REQUEST_LIMIT_BYTES,
    close_all,
    peer_pid,
)
from pmemfs.control.client import (
    ANSWER_TIMEOUT_SECONDS,
    connected,
    decoded_answer,
    reason,
    result_of,
)
from pmemfs.control.shape import Malformed
from pmemfs.errors import NoAnswer, TooLong, TooManyOpenFiles
from pmemfs.version import VERSION

_MOST_CONNECTIONS = 8
"""One process asks so many questions at once; a daemon takes 64 connections from all."""
_RETRY_SECONDS = 0.02
_CHUNK_BYTES = 256 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)


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
        self._begin()

    def ask(
        self, method: str, *, timeout_seconds: float | None = None, **params: Any
    ) -> tuple[Any, list[int]]:
        """The result of a method, and the descriptors that came with it, which are the caller's.

        Raises RemoteError with the daemon's own sentence, NoAnswer, TooLong, and TooManyOpenFiles
        if this process has no room for the descriptors.
        """
        if self._pid != os.getpid():
            self.close()
            self._begin()
        request = {"method": method, "params": params, "version": VERSION}
        line = json.dumps(request).encode() + b"\n"
        if len(line) > REQUEST_LIMIT_BYTES:
            raise TooLong(length=len(line), limit=REQUEST_LIMIT_BYTES)
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        descriptors: list[int] = []
        try:
            answer, pid = self._exchange(line, deadline, descriptors)
            return result_of(decoded_answer(answer), pid), descriptors
        except Malformed as error:
            close_all(descriptors)
            raise NoAnswer(path=self._path, why=f"its answer makes no sense: {error}") from None
        except BaseException:
            close_all(descriptors)
            raise

    def close(self) -> None:
        """Hang up. A question that is under way hangs up when it has its answer."""
        self._is_closed = True
        while self._idle:
            # Another thread may take the last one in between.
            with contextlib.suppress(IndexError):
                self._idle.pop().close()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._is_closed = False
        self._idle: list[socket.socket] = []
        # Unlike a semaphore, a queue may be asked again within itself, by a finalizer.
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_MOST_CONNECTIONS):
            self._places.put(None)

    def _exchange(self, line: bytes, deadline: float, descriptors: list[int]) -> tuple[bytes, int]:
        """Send a request; its answer, and the process that gave it. Raises NoAnswer."""
        places, idle = self._places, self._idle
        places.get()
        connection = None
        try:
            for known in _popped(idle):
                connection = known
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer = _asked(connection, line, deadline, descriptors)
                    if answer is not None:
                        break
                connection.close()
            else:
                connection = self._connect(deadline)
                answer = _asked(connection, line, deadline, descriptors)
                if answer is None:
                    raise OSError("it closed the connection")
            pid = peer_pid(connection)
        except OSError as error:
            if connection is not None:
                connection.close()
            raise NoAnswer(path=self._path, why=reason(error)) from None
        except BaseException:
            # What is left of this answer must not be the beginning of the next.
            if connection is not None:
                connection.close()
            raise
        finally:
            places.put(None)
        if self._is_closed:
            connection.close()
        else:
            idle.append(connection)
        return answer, pid

    def _connect(self, deadline: float) -> socket.socket:
        while True:
            try:
                return connected(self._path, self._owner_uid)
            except BlockingIOError:
                # The daemon's queue of connections is full.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)


def _popped(idle: list[socket.socket]) -> Iterator[socket.socket]:
    """Take connections that are idle, until there are no more or the caller has enough."""
    while True:
        try:
            yield idle.pop()
        except IndexError:
            return


def _asked(
    connection: socket.socket, line: bytes, deadline: float, descriptors: list[int]
) -> bytes | None:
    """The answer to a request; None if the daemon hung up instead. Raises OSError."""
    _patience(connection, deadline)
    connection.sendall(line)
    received = bytearray()
    while True:
        if received:
            _patience(connection, deadline)
        chunk, ancillary, flags, _ = connection.recvmsg(
            _CHUNK_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                rights = array.array("i")
                rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
                descriptors += rights
        if flags & socket.MSG_CTRUNC:
            raise TooManyOpenFiles(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        received += chunk
        if len(received) > ANSWER_LIMIT_BYTES:
            raise OSError(f"its answer is longer than {ANSWER_LIMIT_BYTES} bytes")
        if chunk.endswith(b"\n"):
            return bytes(received)
        if not chunk:
            if received:
                raise OSError("it closed the connection")
            return None


def _patience(connection: socket.socket, deadline: float) -> None:
    """Let the next wait on a connection last until the deadline."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it timed out")
    connection.settimeout(seconds)
