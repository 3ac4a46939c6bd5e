"""The daemon's side of the socket: it listens, and answers with the methods that it is given.

Invariants:
- it answers only the daemon's own user and root, and hangs up on anybody else at once;
- a connection takes bounded memory, and a connection that says or takes nothing ends soon;
- there is a fixed number of connections at most. For one more, the connection that has been silent
  longest is closed. Otherwise clients that hang would shut out all others.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import inspect
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import trio

from pmemfs.control import (
    ANSWER_LIMIT_BYTES,
    REQUEST_LIMIT_BYTES,
    Peer,
    WithDescriptors,
    close_all,
    peer_of,
)
from pmemfs.control.places import check_private
from pmemfs.control.shape import Malformed, decode
from pmemfs.errors import EXIT_FAILED, DaemonGone, NoControlSocket, PmemfsError, cause_of
from pmemfs.version import VERSION

log = logging.getLogger(__name__)

_CONNECTIONS = 64
_PATIENCE_SECONDS = 20
"""How long a whole request may take to come, and a whole answer to be taken."""
_CHUNK_BYTES = 16 * 1024
_VERSION_LIMIT = 40
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
_DECODE = json.JSONDecoder().decode

Method = Callable[..., Awaitable[Any]]
"""A parameter of the type `Peer` says who asks; no request can give it. The result may be one
`WithDescriptors`."""
Methods = Callable[[], Mapping[str, Method]]
"""Called when a request comes, so that the modules which make answers need not be loaded before."""


class Listening(NamedTuple):
    """A listening socket, and a descriptor of its name.

    While the descriptor is open, no other file can get the same inode number. So it tells whether a
    path still leads to this socket.
    """

    socket: socket.socket
    name_fd: int


@contextlib.contextmanager
def listening(path: str | os.PathLike[str]) -> Iterator[Listening]:
    """A listening socket for the mount of this process; its path goes with the context.

    The path stays if it belongs to another daemon by then: it is named after a device number, and
    the kernel gives the number of an ended mount to the next mount while this daemon still ends.
    Raises NoControlSocket.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            parent = os.path.dirname(path)
            check_private(parent, os.lstat(parent), os.geteuid())
            with _alone_in(parent):
                # A socket that is there belongs to a daemon that died with this device number.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                listener.bind(os.fspath(path))
                listener.listen(_CONNECTIONS)
                ours = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _no_socket(path, error) from None
        with _removing(path, ours):
            yield Listening(listener, ours)


@contextlib.contextmanager
def listening_again(fd: int, name_fd: int, path: str | os.PathLike[str]) -> Iterator[Listening]:
    """The listening socket of a daemon that has died, for the one that takes its place.

    Its path goes with the context, if it still leads to this socket: the mount may have ended
    meanwhile, and another mount have its number. Who has connected since then waits in its queue,
    and is served. Raises NoControlSocket.
    """
    with socket.socket(fileno=fd) as listener, _removing(path, name_fd):
        try:
            # From now on the kernel names this process to who connects.
            listener.listen(_CONNECTIONS)
        except OSError as error:
            raise _no_socket(path, error) from None
        yield Listening(listener, name_fd)


@contextlib.contextmanager
def _removing(path: str | os.PathLike[str], ours: int) -> Iterator[None]:
    """Remove the name of a socket in the end, if it still is the one that is open as `ours`."""
    try:
        yield
    finally:
        # A path that stays does no harm: the next daemon of this number removes it.
        with contextlib.suppress(OSError), _alone_in(os.path.dirname(path)):
            if os.path.samestat(os.lstat(path), os.fstat(ours)):
                os.unlink(path)
        os.close(ours)


def _no_socket(path: str | os.PathLike[str], error: OSError) -> NoControlSocket:
    why = error.strerror.lower() if error.strerror else str(error)
    return NoControlSocket(why=f"{os.fspath(path)}: {why}")


@contextlib.contextmanager
def _alone_in(directory: str) -> Iterator[None]:
    """Meanwhile no other daemon changes a name in a directory of sockets.

    Otherwise a daemon that ends could see its own socket, and then remove the one that the next
    daemon has put in its place.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


async def serve(
    listener: socket.socket,
    methods: Methods,
    *,
    mount: int | None = None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> None:
    """Answer requests until cancelled.

    `mount` tells this mount from all others. Who asks for another one is told DaemonGone.
    """
    trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    server = _Server(methods, patience_seconds, mount)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.end_silent)
        await trio.serve_listeners(server.serve_one, [trio_listener])


class _Way:
    """How to call a method. To find that out takes longer than most answers."""

    def __init__(self, method: Method) -> None:
        parameters = inspect.signature(method).parameters.values()
        self.hints = get_type_hints(method)
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.peer = next((name for name, hint in self.hints.items() if hint is Peer), "")
        """The parameter that says who asks; "" if it has none."""
        self.required = {
            p.name for p in parameters if p.default is p.empty and p.name in self.names
        } - {self.peer}

    def params(self, given: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        """The parameters that the method takes. Others must be null, and then ask for nothing.

        Raises TypeError, and Malformed.
        """
        known: dict[str, Any] = {}
        for name, value in given.items():
            if name in self.names or self.takes_all:
                hint = self.hints.get(name, Any)
                # These are right as they are, and decoding them takes long beside a short answer.
                is_plain = hint is Any or (hint in (bool, str) and type(value) is hint)
                known[name] = value if is_plain else decode(hint, value)
            elif value is not None:
                raise TypeError(f"there is no parameter {name}")
        if self.peer:
            if self.peer in known:
                raise TypeError("a request can't say who asks")
            known[self.peer] = peer
        if not self.required <= known.keys():
            raise TypeError("a parameter is missing")
        return known


class _Server:
    """All connections of one daemon.

    They are plain sockets that don't block: trio's own would turn its loop once more for each
    answer, which takes as long as many an answer.
    """

    def __init__(self, methods: Methods, patience_seconds: float, mount: int | None = None) -> None:
        self._methods = methods
        self._mount = mount
        self._said = {"version": VERSION} | ({} if mount is None else {"mount": mount})
        """What each answer says beside its result or error."""
        self._patience_seconds = patience_seconds
        self._ways: dict[Method, _Way] = {}
        self._count = 0
        self._silent: dict[trio.CancelScope, float] = {}
        """The connections that wait for a request, and since when: the one that has waited longest
        comes first."""

    async def serve_one(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends, one way or another."""
        with socket.socket(fileno=stream.socket.detach()) as connection:
            connection.setblocking(False)
            peer = peer_of(connection)
            if peer.uid not in (0, os.geteuid()):
                return
            if self._count >= _CONNECTIONS:
                if not self._silent:
                    return
                oldest = next(iter(self._silent))
                del self._silent[oldest]
                oldest.cancel()
            self._count += 1
            try:
                with trio.CancelScope() as scope, contextlib.suppress(OSError, trio.TooSlowError):
                    await self._answer_all(connection, peer, scope)
            finally:
                self._count -= 1

    async def end_silent(self) -> None:
        """Hang up on who stays silent for too long.

        One task does that for all, because a deadline for each request takes as long as many an
        answer.
        """
        while True:
            latest = trio.current_time() - self._patience_seconds
            for scope, since in tuple(self._silent.items()):
                if since > latest:
                    break
                del self._silent[scope]
                scope.cancel()
            oldest = next(iter(self._silent.values()), trio.current_time())
            await trio.sleep_until(oldest + self._patience_seconds)

    async def _answer_all(
        self, connection: socket.socket, peer: Peer, scope: trio.CancelScope
    ) -> None:
        received = bytearray()
        while await self._has_line(connection, received, scope):
            line, _, received = received.partition(b"\n")
            answer, descriptors = await self._answer(bytes(line), peer)
            try:
                await self._send(connection, answer, descriptors)
            finally:
                close_all(descriptors)

    async def _has_line(
        self, connection: socket.socket, received: bytearray, scope: trio.CancelScope
    ) -> bool:
        """Receive until there is a line; False if no line comes or it doesn't end."""
        self._silent[scope] = trio.current_time()
        try:
            if b"\n" in received:
                # Whoever sends many requests at once is not the only one who waits.
                await trio.lowlevel.checkpoint()
                return True
            while len(received) <= REQUEST_LIMIT_BYTES:
                await trio.lowlevel.wait_readable(connection)
                try:
                    chunk = connection.recv(_CHUNK_BYTES)
                except BlockingIOError:
                    continue
                if not chunk:
                    return False
                received += chunk
                # Only what is new: to look at all of a long line each time takes long.
                if b"\n" in chunk:
                    return True
        finally:
            self._silent.pop(scope, None)
        return False

    async def _send(
        self, connection: socket.socket, answer: bytes, descriptors: Sequence[int]
    ) -> None:
        """Send an answer, the descriptors with its first byte. Raises OSError and TooSlowError."""
        unsent = memoryview(answer)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        deadline = 0.0
        while unsent:
            try:
                sent = connection.sendmsg([unsent], rights if descriptors else ())
            except BlockingIOError:
                deadline = deadline or trio.current_time() + self._patience_seconds
                with trio.fail_at(deadline):
                    await trio.lowlevel.wait_writable(connection)
            else:
                unsent, descriptors = unsent[sent:], ()

    async def _answer(self, line: bytes, peer: Peer) -> tuple[bytes, Sequence[int]]:
        """The answer to a request, and the descriptors that go with it, which are the caller's."""
        theirs: Any = VERSION
        try:
            # This may load modules, which may fail. That must not end the daemon.
            known = self._methods()
        except Exception as error:
            return self._line(_failed("any", error)), ()
        try:
            request = _DECODE(line.decode())
            theirs = request.get("version", "")
            if request.get("mount") not in (None, self._mount):
                gone = DaemonGone(path="the mount that is asked for")
                return self._line(_failed("any", gone)), ()
            name = request["method"]
            method = known[name]
            way = self._ways.get(method)
            if way is None:
                way = self._ways[method] = _Way(method)
            params = way.params(request.get("params", {}), peer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Malformed):
            why = f"the daemon does not understand this request{_otherness(theirs)}"
            return self._line(_failure(why)), ()
        descriptors: Sequence[int] = ()
        try:
            result = await method(**params)
            if type(result) is WithDescriptors:
                result, descriptors = result.result, result.descriptors
            answer = self._line({"result": result})
            if len(answer) <= ANSWER_LIMIT_BYTES:
                return answer, descriptors
        except Exception as error:
            close_all(descriptors)
            return self._line(_failed(name, error)), ()
        close_all(descriptors)
        return self._line(_failure("the answer is too long to be sent")), ()

    def _line(self, said: dict[str, Any]) -> bytes:
        return _ENCODE(said | self._said).encode() + b"\n"


def _failed(method: str, error: Exception) -> dict[str, Any]:
    cause = cause_of(error)
    if isinstance(cause, PmemfsError):
        return _failure(str(cause), cause.exit_code, kind=cause.kind, errno=cause.errno)
    # Without what was said: it may be a passphrase.
    log.error("control request %s failed", method, exc_info=cause)
    return _failure("the daemon failed; its log says why")


def _otherness(theirs: Any) -> str:
    """What to add to a sentence about a request of another version."""
    if theirs == VERSION:
        return ""
    is_said = isinstance(theirs, str) and theirs
    whose = f"pmemfs {theirs[:_VERSION_LIMIT]}" if is_said else "another version of pmemfs"
    return f" (it is of pmemfs {VERSION}, the command of {whose}; mount again to have them alike)"


def _failure(message: str, exit_code: int = EXIT_FAILED, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "exit_code": exit_code, **more}}
