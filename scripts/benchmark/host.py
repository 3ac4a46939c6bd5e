"""The machine: running programs, pinning them, reading their CPU time, and describing it all.

Every program runs in a session of its own, so that Ctrl-C reaches only the benchmark, which then
ends the program and cleans up in its own order.
"""

import contextlib
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable

PROJECT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")
FUSE_URING = "/sys/module/fuse/parameters/enable_uring"


@dataclass(frozen=True)
class Finished:
    """A program that ended by itself. ``cpu_seconds`` is what it and its children used.

    Kernel threads that worked for it (io_uring's) are threads of it, and counted.
    """

    code: int
    stdout: str
    stderr: str
    cpu_seconds: float = 0.0

    @property
    def last_words(self) -> str:
        """The last line it said, for a sentence about its failure."""
        lines = [
            line.strip() for line in (self.stdout + "\n" + self.stderr).splitlines() if line.strip()
        ]
        return lines[-1] if lines else f"exit code {self.code}, no message"


def run(command: Sequence[str], timeout_seconds: float) -> Finished:
    """Run to the end, or end it (and what it started) at the timeout or when interrupted.

    Output goes through files, not pipes: a daemon that keeps its starter's stdout can't hold us up.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before_seconds = _children_cpu_seconds()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_seconds)
        except BaseException as error:
            _end_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchError(
                    f"{command[0]} did not end within {timeout_seconds:.0f} s"
                ) from None
            raise
        out.seek(0)
        err.seek(0)
        used_seconds = _children_cpu_seconds() - before_seconds
        return Finished(code, out.read(), err.read(), used_seconds)


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


class Server:
    """A program that stays until `stop`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._name = Path(command[0]).name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by stop
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Never reused before `stop`, which waits for the process."""
        return self._process.pid

    def await_ready(self, is_ready: Callable[[], bool], timeout_seconds: float) -> None:
        """Return once it serves. Raises SubjectFailed with its last words if it does not."""
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            if self._process.poll() is not None:
                self._said.seek(0)
                words = Finished(self._process.returncode, self._said.read(), "").last_words
                raise SubjectFailed(f"{self._name}: {words}")
            if time.monotonic() > deadline:
                raise SubjectFailed(f"{self._name} was not ready within {timeout_seconds:.0f} s")
            time.sleep(0.02)

    def await_end(self, timeout_seconds: float) -> None:
        """Wait for it to end by itself, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_seconds)

    def stop(self) -> None:
        """End it, and what it started, if it has not ended."""
        if self._process.poll() is None:
            _end_group(self._process)
        self._said.close()


def holds_something(path: Path) -> bool:
    """Whether there is such a file, and not an empty one: a server's pid, once it is ready."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def require_tool(name: str, advice: str) -> None:
    """Raise BenchError unless the program is on the PATH."""
    if shutil.which(name) is None:
        raise BenchError(f"{name} was not found: {advice}")


def find_pmemfs() -> str:
    """The pmemfs command: beside this interpreter, in the project's .venv, or on the PATH."""
    candidates = [Path(sys.executable).parent, PROJECT / ".venv/bin"]
    found = shutil.which("pmemfs", path=os.pathsep.join(map(str, candidates))) or shutil.which(
        "pmemfs"
    )
    if found is None:
        raise SubjectUnavailable("the pmemfs command was not found: run scripts/setup")
    return found


def pinning_cpu() -> int:
    """The CPU used by pinned cells: the lowest that this process may use."""
    return min(os.sched_getaffinity(0))


def shm_free_bytes() -> int:
    """What /dev/shm can still take: the less of its own limit and the memory really available."""
    status = os.statvfs(SHM)
    return min(status.f_bavail * status.f_frsize, _meminfo_bytes("MemAvailable"))


def fuse_uring_allowed() -> bool:
    """Whether this kernel lets FUSE servers use io_uring."""
    return _first_line(FUSE_URING) == "Y"


def io_uring_allowed() -> bool:
    """Whether this kernel lets any program use io_uring; kernels without the switch do."""
    return _first_line("/proc/sys/kernel/io_uring_disabled") in ("0", None)


def drop_name_caches(folder: Path) -> bool:
    """Have the kernel forget all names and inodes that it need not keep, those below ``folder``
    written back first; whether it lets us."""
    run(["sync", "--file-system", str(folder)], timeout_seconds=60)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
    except OSError:
        return False
    return True


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted there; answers also when its server is dead."""
    listed = str(mountpoint).replace("\\", r"\134").replace(" ", r"\040")
    with open("/proc/self/mountinfo") as lines:
        return any(line.split()[4] == listed for line in lines)


# -- processes ------------------------------------------------------------------------------------


def with_descendants(pid: int) -> tuple[int, ...]:
    """``pid`` and all processes below it; those that end meanwhile are left out."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if fields := _stat_fields(int(name)):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return tuple(found)


def private_bytes(pid: int, without: Path) -> int:
    """The process's memory that nobody shares, not counting mappings of the file ``without``, nor
    of a memfd.

    The pages of a shared mapping count as private while only one process maps them: they are the
    file's all the same. A process that has ended has none.
    """
    total_kib = 0
    is_counted = True
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            # after the addresses: permissions, offset, device, inode and, if it has one, a name
            mapped = "".join(rest.split(maxsplit=4)[4:]).removesuffix(" (deleted)")
            is_counted = mapped != str(without) and not mapped.startswith("/memfd:")
        elif is_counted and name.startswith("Private_"):
            total_kib += int(rest.split()[0])
    return total_kib * 1024


def proportional_bytes(pid: int) -> int:
    """The process's memory, of what it shares only its share. A process that has ended has none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def start_time_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot, to notice a reused pid; None if ended.

    A process that ended and that nobody has waited for yet has ended.
    """
    fields = _stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time used so far by these processes together."""
    ticks = 0
    for pid in pids:
        fields = _stat_fields(pid)
        ticks += int(fields[11]) + int(fields[12]) if fields else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on: the second, a name, may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@contextlib.contextmanager
def pinned(pids: Iterable[int], cpu: int) -> Iterator[None]:
    """Hold every thread of these processes on ``cpu``; afterwards each gets back what it had.

    A thread that is held on one CPU already stays there: its program wants it so. A thread born
    meanwhile inherits the pin and gets back what its process had.
    """
    before = {pid: _affinities(pid) for pid in pids}
    changed = {
        pid: {thread: mask for thread, mask in masks.items() if len(mask) > 1}
        for pid, masks in before.items()
    }
    try:
        for masks in changed.values():
            for thread in masks:
                _set_affinity(thread, {cpu})
        yield
    finally:
        for pid, masks in changed.items():
            usual = masks.get(pid, next(iter(masks.values()), None))
            for thread, now in _affinities(pid).items():
                inherited = thread not in before[pid] and now == {cpu}
                mask = usual if inherited else masks.get(thread)
                if mask is not None:
                    _set_affinity(thread, mask)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _affinities(pid: int) -> dict[int, set[int]]:
    masks = {}
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            masks[thread] = os.sched_getaffinity(thread)
    return masks


def _set_affinity(thread: int, mask: set[int]) -> None:
    # one that has ended, or a kernel thread of io_uring's that does not let itself be moved
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, mask)


# -- description ----------------------------------------------------------------------------------


def describe() -> dict[str, object]:
    """The machine, as the report's reader needs it to compare with another."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu_model": _cpuinfo("model name"),
        "cpu_count": len(os.sched_getaffinity(0)),
        "virtual_machine": "hypervisor" in (_cpuinfo("flags") or "").split(),
        "memory_bytes": _meminfo_bytes("MemTotal"),
        "shmem_huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "fuse_io_uring": _first_line(FUSE_URING),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The project's commit, with ``-dirty`` where the working copy differs."""
    if shutil.which("git") is None:
        return None
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), *describe]
    finished = run(command, timeout_seconds=30)
    return finished.stdout.strip() if finished.code == 0 else None


def _meminfo_bytes(field: str) -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    raise BenchError(f"/proc/meminfo has no {field}")


def _cpuinfo(field: str) -> str | None:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None
