"""Talking to a running daemon: JSON lines over a Unix socket, one for each mount.

A request is `{"method": NAME, "params": {…}}`, its answer `{"result": …}` or
`{"error": {"message": SENTENCE, "exit_code": N}}`. The socket is named after the mount's device
number, which stat(2) of any file of the mount tells: /run/pmemfs/0:57.sock. So the daemon of a
mount is found without asking the mount, and a socket whose daemon died belongs to no mount.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from pmemfs.errors import NoAnswer, PmemfsError
from pmemfs.mountinfo import Mount

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_SECONDS = 20
_LINE_LIMIT_BYTES = 64 * 1024

_UCRED = struct.Struct("3i")
"""pid, uid, gid of the peer of a Unix socket, see unix(7)."""

Method = Callable[..., Awaitable[Any]]


def runtime_directory() -> Path:
    """Where this user's daemons keep their sockets."""
    if os.geteuid() == 0:
        return Path("/run/pmemfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "pmemfs" if base else Path(f"/tmp/pmemfs-{os.geteuid()}")


def socket_path(mount: Mount, directory: Path | None = None) -> Path:
    """The control socket of a mount."""
    return (directory or runtime_directory()) / f"{mount.device}.sock"


class RemoteError(PmemfsError):
    """{message}"""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message=message)
        self.remote_exit_code = exit_code


def call(path: Path, method: str, **params: Any) -> Any:
    """Ask a daemon. Raises RemoteError with the daemon's own sentence, and NoAnswer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_TIMEOUT_SECONDS)
            connection.connect(str(path))
            request = json.dumps({"method": method, "params": params})
            connection.sendall(request.encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline() or b"{}")
    except (OSError, ValueError) as error:
        raise NoAnswer(path=path, why=str(error)) from None
    if "error" in answer:
        raise RemoteError(answer["error"]["message"], answer["error"]["exit_code"])
    if "result" not in answer:
        raise NoAnswer(path=path, why="it closed the connection")
    return answer["result"]


def daemon_pidfd(path: Path) -> int | None:
    """A pidfd of the daemon that listens on a socket, to wait for its end; None if it's gone."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            return os.pidfd_open(_UCRED.unpack(credentials)[0])
        except OSError:
            return None


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket for the mount of this process; the path goes with the context."""
    _make_private(path.parent)
    # What is there belongs to a daemon that died: device numbers are given out again.
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def serve(listener: socket.socket, methods: Mapping[str, Method]) -> None:
    """Answer requests until cancelled."""
    trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))

    async def serve_one(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await _serve_connection(stream, methods)

    await trio.serve_listeners(serve_one, [trio_listener])


async def _serve_connection(stream: trio.SocketStream, methods: Mapping[str, Method]) -> None:
    received = bytearray()
    async for chunk in stream:
        received += chunk
        while (end := received.find(b"\n")) >= 0:
            answer = await _answer(bytes(received[:end]), methods)
            del received[: end + 1]
            await stream.send_all(json.dumps(answer).encode() + b"\n")
        if len(received) > _LINE_LIMIT_BYTES:
            return


async def _answer(line: bytes, methods: Mapping[str, Method]) -> dict[str, Any]:
    try:
        request = json.loads(line)
        method = methods[request["method"]]
        return {"result": await method(**request.get("params", {}))}
    except PmemfsError as error:
        return _failure(str(error), error.exit_code)
    except (ValueError, TypeError, KeyError, AttributeError):
        return _failure("the daemon does not understand this request", 1)
    except Exception:
        log.exception("control request %r failed", line[:200])
        return _failure("the daemon failed; its log says why", 1)


def _failure(message: str, exit_code: int) -> dict[str, Any]:
    return {"error": {"message": message, "exit_code": exit_code}}


def _make_private(directory: Path) -> None:
    """A directory that is ours alone, as it may lie in one where anybody can write."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} does not belong to this user alone")
