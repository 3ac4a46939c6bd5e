"""Commands as processes that are forked from one that has loaded the program; see `kit/forking`.

To start Python and to load its modules takes a mount longer than all else it does, and there are
thousands in the tests. `PMEMFS_TESTS_START=fresh` in the environment starts each program afresh.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kit import forking

LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_lock = threading.Lock()
_channels: list[socket.socket] = []
_is_fresh = os.environ.get("PMEMFS_TESTS_START") == "fresh"


def _python_words() -> dict[str, str]:
    """What Python looks at only when it starts."""
    return {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}


_PYTHON_WORDS = _python_words()


@contextmanager
def fresh_starts() -> Iterator[None]:
    """Meanwhile each program is started afresh."""
    global _is_fresh
    before, _is_fresh = _is_fresh, True
    try:
        yield
    finally:
        _is_fresh = before


def run_program(words: Sequence[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
    """As `subprocess.run`, for a program of this environment; its output is captured."""
    if _is_fresh or _python_words() != _PYTHON_WORDS:
        return subprocess.run(
            words, capture_output=True, timeout=timeout, check=False, env=os.environ
        )
    with ExitStack() as closing:
        outputs, theirs = zip(*(os.pipe() for _ in range(2)), strict=True)
        for fd in outputs:
            closing.callback(os.close, fd)
        try:
            answers = closing.enter_context(_ask(words, [0, *theirs]))
        finally:
            for fd in theirs:
                os.close(fd)
        pid = int(answers.recv(100))
        deadline = time.monotonic() + timeout
        try:
            said = _read(outputs, deadline)
            answers.settimeout(max(0.01, deadline - time.monotonic()))
            code = int(answers.recv(100))
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout) from None
    return subprocess.CompletedProcess(words, code, *said)


def _ask(words: Sequence[str], fds: Sequence[int]) -> socket.socket:
    """Ask for a process with these standard files; the socket on which it is told of."""
    umask = Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0]
    command = {
        "words": list(words),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": int(umask, 8),
        "limits": [(limit, resource.getrlimit(limit)) for limit in LIMITS],
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command_fd = os.memfd_create("command")
    try:
        os.write(command_fd, json.dumps(command).encode())
        with theirs:
            socket.send_fds(_channel(), [b"!"], [command_fd, *fds, theirs.fileno()])
    finally:
        os.close(command_fd)
    return ours


def _channel() -> socket.socket:
    """The socket to the server of this process, which ends with this process."""
    with _lock:
        if not _channels:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            padding = "-" * forking.WORDS_BYTES
            with theirs:
                subprocess.Popen(
                    [sys.executable, "-P", forking.__file__, str(theirs.fileno()), padding],
                    pass_fds=[theirs.fileno()],
                )
            _channels.append(ours)
        return _channels[0]


def _read(fds: Sequence[int], deadline: float) -> list[bytes]:
    """All that comes from these pipes. Raises TimeoutError."""
    said = {fd: bytearray() for fd in fds}
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                said[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
    return [bytes(said[fd]) for fd in fds]
