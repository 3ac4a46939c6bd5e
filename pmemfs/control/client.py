"""The side of the commands. Loads no trio: a command should start at once."""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from pmemfs.errors import NoAnswer, PmemfsError

ANSWER_TIMEOUT_SECONDS = 20

_UCRED = struct.Struct("3i")
"""pid, uid, gid of the peer of a Unix socket, see unix(7)."""


class RemoteError(PmemfsError):
    """{message}"""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message=message)
        self.exit_code = exit_code


def call(
    path: Path, method: str, *, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS, **params: Any
) -> Any:
    """Ask a daemon. Raises RemoteError with the daemon's own sentence, and NoAnswer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(str(path))
            request = json.dumps({"method": method, "params": params})
            connection.sendall(request.encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
    except OSError as error:
        raise NoAnswer(path=path, why=(error.strerror or str(error)).lower()) from None
    except ValueError:
        raise NoAnswer(path=path, why="it closed the connection") from None
    if "error" in answer:
        raise RemoteError(answer["error"]["message"], answer["error"]["exit_code"])
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
