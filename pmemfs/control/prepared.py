"""The process of a daemon, forked by its command before the command knows what to mount.

To load its modules takes a daemon longer than the rest of a mount's start. So a command forks first
of all, and the daemon loads while the command reads its words and looks at the pool and the
directory. What both need is loaded once, before the fork. Invariants:
- only a program with one thread that has written nothing forks: other threads, and output that was
  not flushed, would be half there in both processes;
- a daemon takes over nothing from its command except the environment. It leads a session of its
  own, its working directory is /, it holds no descriptor, and it runs no code that its caller
  chose;
- until it is told its words, a daemon has opened nothing, so it may be killed at any time. It ends
  by itself when its command ends.
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
STARTER_FD = 3


class Process(Protocol):
    """A child process, with the interface of subprocess.Popen."""

    @property
    def pid(self) -> int:
        """The process's number."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of a signal. Raises subprocess.TimeoutExpired."""


class ForkedProcess:
    """A forked child process."""

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
    """A daemon's process, with the socket of `control/starter` and what it says on stderr."""

    def __init__(self, process: Process, ours: socket.socket, stderr_fd: int) -> None:
        self.process = process
        self.socket = ours
        self.stderr_fd = stderr_fd


_prepared: Daemon | None = None


def prepare() -> None:
    """Fork a daemon to which `started` will give its words. In the daemon this does not return.

    If the system allows no more processes, nothing happens here, and `started` will say so.
    """
    global _prepared
    stderr_fd, ours, theirs = _joined()
    # All that is loaded now stays to the end, so the garbage collector need not walk it, which
    # would also copy its pages.
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
    """A daemon that was told its words: the prepared one if there is one, else a new one."""
    global _prepared
    daemon, _prepared = _prepared, None
    if daemon is not None:
        # If it was killed, the caller notices when it waits for the daemon's answer.
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
    """End a prepared daemon that is not needed."""
    global _prepared
    daemon, _prepared = _prepared, None
    if daemon is not None:
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()


def daemon_words(words: Sequence[str]) -> list[str]:
    """The command line of a daemon with these words."""
    return [*python_words(_DAEMON), *words]


def _joined() -> tuple[int, socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return os.memfd_create("pmemfs-said", os.MFD_CLOEXEC), ours, theirs


def _serve(ours: socket.socket, theirs: socket.socket, stderr_fd: int) -> NoReturn:
    """Go on as the daemon."""
    os.setsid()
    os.chdir("/")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    ours.close()
    keep_only(theirs.detach(), stderr_fd)
    raise_limits()
    if not sys.flags.safe_path:
        # Python puts the program's directory first, and a user may have chosen that.
        del sys.path[0]
    module = importlib.import_module(_DAEMON)
    gc.freeze()
    with socket.socket(fileno=os.dup(STARTER_FD)) as starter:
        message = starter.recv(_WORDS_BYTES)
    if not message:
        os._exit(0)
    sys.argv[1:] = [*json.loads(message), "--starter-fd", str(STARTER_FD)]
    sys.exit(module.main())


def keep_only(starter_fd: int, stderr_fd: int) -> None:
    """Keep no descriptors except the standard ones and the starter's."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd, number in ((null, 0), (null, 1), (stderr_fd, 2)):
        os.dup2(fd, number)
    os.close(null)
    os.dup2(starter_fd, STARTER_FD, inheritable=False)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > STARTER_FD:
            # The descriptor of the listing itself is closed by now.
            with contextlib.suppress(OSError):
                os.close(int(name))
