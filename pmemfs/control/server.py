"""The side of the daemon: listens, and answers with the methods that it is given."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from pmemfs.control import check_private
from pmemfs.errors import PmemfsError

log = logging.getLogger(__name__)

_LINE_LIMIT_BYTES = 64 * 1024

Method = Callable[..., Awaitable[Any]]


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket for the mount of this process; the path goes with the context.

    Unless it is another's by then: the device number of a mount that has ended, which names the
    path, is given to the next one while the daemon still ends.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path.parent, os.geteuid())
    # What is there belongs to a daemon that died: device numbers are given out again.
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        ours = path.stat()
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), ours):
                    path.unlink()


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
            await stream.send_all(answer + b"\n")
        if len(received) > _LINE_LIMIT_BYTES:
            return


async def _answer(line: bytes, methods: Mapping[str, Method]) -> bytes:
    try:
        request = json.loads(line)
        method, params = methods[request["method"]], request.get("params", {})
        inspect.signature(method).bind(**params)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _failure("the daemon does not understand this request", 1)
    try:
        return json.dumps({"result": await method(**params)}).encode()
    except PmemfsError as error:
        return _failure(str(error), error.exit_code)
    except Exception:
        log.exception("control request %r failed", line[:200])
        return _failure("the daemon failed; its log says why", 1)


def _failure(message: str, exit_code: int) -> bytes:
    return json.dumps({"error": {"message": message, "exit_code": exit_code}}).encode()
