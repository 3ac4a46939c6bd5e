"""The process of a daemon, forked by its command before anybody knows what it is to mount.

What a daemon loads takes longer than the rest of a mount's start. So a command forks first of all,
and the daemon loads while the command reads its words and looks at the pool and the directory. What
both need is loaded before, once. Invariants:
- a process is forked only by a program that has one thread, and has written nothing: the other
  threads, and what nobody has flushed, would be half there in both;
- a daemon gets nothing of its command's but the environment: it leads a session of its own, its
  working directory is /, it holds no descriptor and takes no code that its caller chose;
- until it is told its words it has opened nothing, so it may be killed at any time. It ends by
  itself when its command does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from pmemfs.mount.processes import has_ended, python_words, raise_limits
from pmemfs.units import KIB

_DAEMON = "pmemfs.daemons.mountd"
_WORDS_BYTES = 64 * KIB
_STARTER_FD = 3


class Process(Protocol):
    """A child, as subprocess.Popen has it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or less than 0 by a signal. Raises subprocess.TimeoutExpired."""


class ForkedProcess:
    """A child that has been forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """As Popen.wait."""
        if self._status is None:
            if timeout is not None:
                self._wait_for(timeout)
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def _wait_for(self, seconds: float) -> None:
        pidfd = os.pidfd_open(self.pid)
        try:
            if not has_ended(pidfd, seconds):
                raise subprocess.TimeoutExpired(_DAEMON, seconds)
        finally:
            os.close(pidfd)


class Daemon:
    """The process of a daemon, with the socket of `control/starter` and what it says on stderr."""

    def __init__(self, process: Process, ours: socket.socket, stderr_fd: int) -> None:
        self.process = process
        self.socket = ours
        self.stderr_fd = stderr_fd


_prepared: Daemon | None = None


def prepare() -> None:
    """Fork a daemon that `started` will give its words. Does not return in the daemon.

    Where there can't be one more process, `started` will say so.
    """
    global _prepared
    stderr_fd, ours, theirs = _joined()
    # What is there stays until the end: nobody need look at it again and again, nor copy it.
    gc.freeze()
    try:
        pid = os.fork()
    except OSError:
        os.close(stderr_fd)
        ours.close()
        theirs.close()
        return
    if not pid:
        _serve(ours, theirs, stderr_fd)
    theirs.close()
    _prepared = Daemon(ForkedProcess(pid), ours, stderr_fd)


def started(words: Sequence[str]) -> Daemon:
    """A daemon that has been told its words: the one that is prepared, or else a new one."""
    global _prepared
    daemon, _prepared = _prepared, None
    if daemon is not None:
        # One that has been killed is found dead by whoever waits for its answer.
        with contextlib.suppress(OSError):
            daemon.socket.send(json.dumps(words).encode())
        return daemon
    stderr_fd, ours, theirs = _joined()
    with theirs:
        process = subprocess.Popen(
            [*daemon_words(words), "--starter-fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr_fd,
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return Daemon(process, ours, stderr_fd)


def discard() -> None:
    """End a daemon that is prepared and not needed."""
    global _prepared
    daemon, _prepared = _prepared, None
    if daemon is not None:
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()


def daemon_words(words: Sequence[str]) -> list[str]:
    """The command that is a daemon of these words."""
    return [*python_words(_DAEMON), *words]


def _joined() -> tuple[int, socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return os.memfd_create("pmemfs-said", os.MFD_CLOEXEC), ours, theirs


def _serve(ours: socket.socket, theirs: socket.socket, stderr_fd: int) -> NoReturn:
    """Be the daemon."""
    os.setsid()
    os.chdir("/")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    ours.close()
    _keep_only(theirs.detach(), stderr_fd)
    raise_limits()
    if not sys.flags.safe_path:
        # The directory of the program.
        del sys.path[0]
    module = importlib.import_module(_DAEMON)
    gc.freeze()
    with socket.socket(fileno=os.dup(_STARTER_FD)) as starter:
        message = starter.recv(_WORDS_BYTES)
    if not message:
        os._exit(0)
    sys.argv[1:] = [*json.loads(message), "--starter-fd", str(_STARTER_FD)]
    sys.exit(module.main())


def _keep_only(starter_fd: int, stderr_fd: int) -> None:
    """Have no descriptors but the standard ones and the starter's."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd, number in ((null, 0), (null, 1), (stderr_fd, 2)):
        os.dup2(fd, number)
    os.close(null)
    os.dup2(starter_fd, _STARTER_FD, inheritable=False)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > _STARTER_FD:
            # That of the list itself is closed by now.
            with contextlib.suppress(OSError):
                os.close(int(name))
