"""Other processes: whether they live, what they hold, and waiting for what they do."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_STOP_SECONDS = 5.0


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to notice its end.

    Its first thread may be a zombie while another one still ends, and has its files open.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    state, thread_count = fields[0], int(fields[17])
    return state != "Z" or thread_count > 1


def end_process(pid: int, seconds: float = 10) -> None:
    """Wait a little for a process to end by itself, then end it."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    # It may end just now.
    with suppress(ProcessLookupError):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """Let a process stand still until it gets SIGCONT. When this returns, all its threads do, but
    those that the kernel lets wait for something else, which stop after that."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _STOP_SECONDS
    while not _stands_still(pid) and time.monotonic() < deadline:
        time.sleep(0.005)


def _stands_still(pid: int) -> bool:
    # A thread that ends meanwhile is none of them.
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "TtZX":
                return False
        return True
    return False


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes stand still meanwhile; one that was ended meanwhile is left alone."""
    with ExitStack() as going_on:
        for pid in pids:
            stop(pid)
            going_on.callback(_go_on, pid)
        yield


def _go_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.02)


def private_bytes(pid: int, pool: Path) -> int:
    """The memory of a process that nobody shares, without the pool, whose memory is the pool's."""
    total_kib = 0
    is_counted = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_counted = str(pool) not in line
        elif is_counted and name in ("Private_Clean:", "Private_Dirty:"):
            total_kib += int(values[0])
    return total_kib * 1024


def readable_memory(pid: int) -> Iterator[bytes]:
    """All memory that a process shares with nobody and that another one can read."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            start, end = (int(word, 16) for word in re.findall(r"^(\w+)-(\w+)", line)[0])
            if "[v" in line or line.split()[1][3] != "p":
                continue
            try:
                memory.seek(start)
                yield memory.read(end - start)
            except OSError:
                if " ---p " not in line:
                    raise
