"""How the processes of a mount are started, by which Python code and under which limits; their end.

Loads no pyfuse3, for the commands.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Self

import pmemfs
from pmemfs.errors import SourceBusy, cause_of
from pmemfs.units import MIB, format_size

_NO_THREAD = "can't start new thread"
"""What Python's RuntimeError says for EAGAIN."""


def python_words(module: str) -> list[str]:
    """The command that runs a module in this Python, without code of the current directory.

    Root mounts in directories that are not root's, and `-m` alone takes `trio.py` from there. What
    ignores the environment as well (`-I`, as scripts/install installs it) starts only what does so.
    """
    return [sys.executable, _flag(), "-m", module]


def has_ended(pidfd: int, seconds: float | None) -> bool:
    """Wait for a process to end, for so long at most (None: for ever); whether it did."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def bare_python_words(module: str) -> list[str]:
    """As `python_words`, for a module that needs only Python's own library and native code of ours.

    Such a process does without `site`, which takes as long as all else that it starts with. So it
    is told where pmemfs is, as its first argument. Raises FileNotFoundError where pmemfs was
    installed in part, or is being replaced.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), module)
    root = os.path.dirname(os.path.dirname(pmemfs.__file__))
    return [sys.executable, _flag(), "-S", spec.origin, root]


def _flag() -> str:
    return "-I" if sys.flags.isolated else "-P"


def needed_paths() -> Iterator[str]:
    """What the processes of a mount open while they start and serve."""
    code = (sys.prefix, os.path.dirname(os.__file__), os.path.dirname(pmemfs.__file__))
    # A command that mounts nothing does not wait for this to be loaded.
    import shutil

    programs = (sys.executable, *map(shutil.which, ("stat", "umount", "fusermount3")))
    for path in (*code, *programs):
        if path:
            yield path
            yield os.path.realpath(path)
    yield from ("/dev/fuse", "/proc", "/sys")


class SpareDescriptors:
    """Descriptors that are kept while a mount is made: some for questions, some for its end.

    Without them a mount that fails because it has run out of descriptors could neither be unmounted
    nor made durable, and would leave a clean pool dirty.
    """

    _FOR_THE_END = 16
    """More than a subprocess, which unmounts, and an event loop need."""
    _FOR_QUESTIONS = 8
    """What the first question needs: a connection, modules, and what pins take for good."""

    def __init__(self) -> None:
        """Raises OSError where there are not so many."""
        self._fds: list[int] = []
        try:
            for _ in range(self._FOR_THE_END + self._FOR_QUESTIONS):
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release_for_questions(self) -> None:
        """Let go of those that are kept for questions, which are answered from now on."""
        while len(self._fds) > self._FOR_THE_END:
            os.close(self._fds.pop())

    def release(self) -> None:
        """Let go of them: the end begins."""
        while self._fds:
            os.close(self._fds.pop())


class Limit(NamedTuple):
    """A limit of getrlimit(2) that a daemon may run into, and that its caller's shell has set."""

    number: int
    flag: str
    """Of the shell's ulimit."""
    of: str
    errnos: tuple[int, ...]
    """What system calls fail with that run into it."""
    wanted: int = resource.RLIM_INFINITY
    is_count: bool = False
    """Of something other than bytes."""

    @property
    def is_low(self) -> bool:
        """Whether this process may have less than is wanted."""
        return not _reaches(resource.getrlimit(self.number)[0], self.wanted)

    def __str__(self) -> str:
        value = resource.getrlimit(self.number)[0]
        return f"{self.of} (ulimit {self.flag}: {value if self.is_count else format_size(value)})"

    def raise_it(self) -> None:
        """Raise it to what is wanted, or as far as this user may."""
        soft, hard = resource.getrlimit(self.number)
        if _reaches(soft, self.wanted):
            return
        if not _reaches(hard, self.wanted):
            try:
                resource.setrlimit(self.number, (self.wanted, self.wanted))
            except (OSError, ValueError):
                # Only root may raise the hard limit, and in a container not even root.
                resource.setrlimit(self.number, (hard, hard))
            return
        resource.setrlimit(self.number, (self.wanted, hard))


LIMITS = (
    Limit(resource.RLIMIT_FSIZE, "-f", "the size of files", (errno.EFBIG,)),
    Limit(resource.RLIMIT_AS, "-v", "address space", (errno.ENOMEM,)),
    Limit(resource.RLIMIT_DATA, "-d", "data segments", (errno.ENOMEM,)),
    Limit(resource.RLIMIT_STACK, "-s", "the stack", (errno.ENOMEM,), 8 * MIB),
    Limit(resource.RLIMIT_NOFILE, "-n", "open files", (errno.EMFILE,), 4096, True),
    Limit(resource.RLIMIT_NPROC, "-u", "processes", (errno.EAGAIN,), is_count=True),
    Limit(resource.RLIMIT_MEMLOCK, "-l", "locked memory", ()),
    Limit(resource.RLIMIT_CPU, "-t", "CPU time", (), is_count=True),
)
"""`-m` is missing: Linux ignores it."""


def raise_limits() -> None:
    """Raise the limits of this process, and so of the daemon that it starts or becomes.

    A mount serves everybody and for long: what somebody's shell allows its commands says nothing
    about it.
    """
    for limit in LIMITS:
        limit.raise_it()


def keep_out_of_cores(pids: Iterable[int]) -> None:
    """Have core files of these processes, and of those that they start, show nothing of their
    memory. What a process has of another user's is not changed. Source: core(5)."""
    for pid in pids:
        # It may have ended.
        with suppress(OSError), open(f"/proc/{pid}/coredump_filter", "w") as file:
            file.write("0")


def raise_descriptors() -> None:
    """Let this process have as many descriptors as its user may, for a daemon holds some for each
    client."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_limit() -> str:
    """A warning about a limit that ends every daemon sooner or later; empty: there is none."""
    named = _named(limit for limit in LIMITS if limit.number == resource.RLIMIT_CPU)
    return named and f"{named}; the mount ends when a process of it has used that many seconds"


def limits_behind(error: Exception) -> str:
    """The limits that may be why something failed, as the end of a sentence; empty: none.

    Only limits that are lower than wanted, which are those that could not be raised.
    """
    cause = cause_of(error)
    if isinstance(cause, SourceBusy):
        # A lock that somebody else has answers as a limit of processes does.
        return ""
    numbers = set(_errnos_of(cause))
    named = _named(limit for limit in LIMITS if numbers & set(limit.errnos))
    return f"; {named}" if named else ""


def limits_on_everything() -> str:
    """As `limits_behind`, for what failed so early that nobody knows why."""
    # Many a user has a finite number of processes, which is seldom why.
    named = _named(limit for limit in LIMITS if limit.errnos and limit.flag != "-u")
    return f"; {named}" if named else ""


def _named(limits: Iterable[Limit]) -> str:
    low = " and ".join(str(limit) for limit in limits if limit.is_low)
    return low and f"this user may not raise the limit of {low}"


def _errnos_of(error: BaseException | None) -> Iterator[int]:
    """What the system has answered, here or where this error comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            yield error.errno
        elif isinstance(error, MemoryError):
            yield errno.ENOMEM
        elif isinstance(error, RuntimeError) and _NO_THREAD in str(error):
            yield errno.EAGAIN
        error = error.__cause__ or error.__context__


def _reaches(value: int, wanted: int) -> bool:
    if value == resource.RLIM_INFINITY:
        return True
    return wanted != resource.RLIM_INFINITY and value >= wanted
