"""What a mount costs in time and memory, and metadata in space: pools of mode fs with many files.

Invariants: a mount that is timed is compared with one of an empty pool of the same size within one
round, one right after the other; whatever was made is removed; a reading that could not be taken
says why.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmark import files, host
from benchmark.cells import KIB, MIB
from benchmark.errors import BenchError, SubjectFailed
from benchmark.pmemfsmount import PmemfsMount
from benchmark.report import Reading
from benchmark.stage import Interrupts, Settings, rotated

POPULATE = Path(__file__).with_name("populate.py")
FILES_PER_DIRECTORY = 1000
# inode and name of an empty file take about a third of this
POOL_BYTES_PER_FILE = 2 * KIB
LEAST_POOL_BYTES = 256 * MIB
SPACE_FILE_BYTES = 64 * KIB
CALLERS = 2
# the readings that goals are for
MOUNT_RATIO, WALK_IDLE, SPACE_SHARE = "mount-ratio", "walk-idle", "space-share"
# for what is done once, however many files there are
LONG_SECONDS = 3600.0


@dataclass(frozen=True)
class ReadingCell:
    """One kind of reading."""

    name: str
    group: str
    caption: str
    subjects: tuple[str, ...] = ("fs",)

    def takes(self, subject: str) -> bool:
        """Whether the cell is for the subject of this name."""
        return subject in self.subjects


MOUNT_CELLS = (
    ReadingCell("mount", "mounting", "mount after kill -9, many files"),
    ReadingCell("walk", "memory", "control plane after a walk over many files"),
    ReadingCell("space", "space", "metadata of files of 64 KiB"),
)


class MountBench:
    """Takes the readings. ``say`` and ``warn`` as in `Stage`."""

    def __init__(
        self,
        settings: Settings,
        program: Path,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.failed = False
        self._settings = settings
        self._program = program
        self._say = say
        self._warn = warn

    def measure(
        self, cells: list[ReadingCell], interrupts: Interrupts, advance: Callable[[], None]
    ) -> list[Reading]:
        """All readings of these cells."""
        takers = {"mount": self._mount_times, "walk": self._walk, "space": self._space}
        wanted = [cell.name for cell in cells]
        readings: list[Reading] = []
        many = self._settings.many_files
        with contextlib.ExitStack() as stack:
            full = None
            for name in wanted:
                interrupts.arm()
                try:
                    if name != "space" and full is None:
                        full = stack.enter_context(self._pool("full", interrupts, many))
                        self._populate(full)
                    taken = takers[name](full, interrupts)
                except (BenchError, OSError) as problem:
                    self.failed = True
                    self._warn(f"{name}: {problem}")
                    taken = [Reading(name, name, name, "ratio", error=str(problem))]
                readings += taken
                advance()
        return readings

    @contextlib.contextmanager
    def _pool(self, name: str, interrupts: Interrupts, file_count: int) -> Iterator[PmemfsMount]:
        """A pool with room for so many empty files, sparse; removed when this ends."""
        pool_bytes = max(LEAST_POOL_BYTES, file_count * POOL_BYTES_PER_FILE) // MIB * MIB
        with self._pool_of(name, interrupts, pool_bytes, is_sparse=True) as made:
            yield made

    @contextlib.contextmanager
    def _pool_of(
        self, name: str, interrupts: Interrupts, pool_bytes: int, is_sparse: bool
    ) -> Iterator[PmemfsMount]:
        if pool_bytes > host.shm_free_bytes():
            raise BenchError(f"{host.SHM} can't take {pool_bytes // MIB} MiB: use fewer files")
        made = PmemfsMount(name, mode="fs")
        try:
            made.create(pool_bytes, is_sparse)
            yield made
        finally:
            interrupts.disarm()
            made.remove()

    def _populate(self, full: PmemfsMount) -> None:
        count = self._settings.many_files
        self._say(f"making {count:,} files")
        words = [sys.executable, str(POPULATE), str(full.pool)]
        finished = host.run([*words, str(count), str(FILES_PER_DIRECTORY)], LONG_SECONDS)
        if finished.code != 0:
            raise SubjectFailed(f"{POPULATE.name}: {finished.last_words}")

    # -- time -----------------------------------------------------------------------------------

    def _mount_times(self, full: PmemfsMount | None, interrupts: Interrupts) -> list[Reading]:
        assert full is not None
        many = self._settings.many_files
        seconds: dict[str, list[float]] = {"full": [], "empty": []}
        with self._pool("empty", interrupts, many) as empty:
            _mount_and_kill(full)
            for round_number in range(self._settings.rounds):
                self._say(f"mount, round {round_number + 1}")
                for name in rotated(("full", "empty"), round_number):
                    took = _mount_and_kill(full) if name == "full" else _mount_and_unmount(empty)
                    seconds[name].append(took)
        ratios = [one / other for one, other in zip(seconds["full"], seconds["empty"], strict=True)]
        what = f"mount of {many:,} files after kill -9"
        return [
            Reading("mount", "mount-full", what, "s", seconds["full"]),
            Reading(
                "mount", "mount-empty", "mount of an empty pool as large", "s", seconds["empty"]
            ),
            Reading("mount", MOUNT_RATIO, "ratio of the two in one round", "ratio", ratios),
        ]

    # -- memory ---------------------------------------------------------------------------------

    def _walk(self, full: PmemfsMount | None, interrupts: Interrupts) -> list[Reading]:
        assert full is not None
        count = self._settings.many_files
        full.mount()
        before = full.control_plane_bytes()
        self._say(f"walking over {count:,} files")
        walk = 'n=$(find "$1" -name "file-*" -ls | wc -l) && echo "$n"'
        begin = time.monotonic()
        finished = host.run(["sh", "-c", walk, "sh", str(full.mountpoint)], LONG_SECONDS)
        seconds = time.monotonic() - begin
        if finished.code != 0 or finished.last_words != str(count):
            raise SubjectFailed(f"find found {finished.last_words} of {count} files")
        at_once = full.control_plane_bytes()
        idle_seconds = self._settings.idle_seconds
        self._say(f"idle for {idle_seconds:g} s")
        time.sleep(idle_seconds)
        idle, both = full.control_plane_bytes(), full.private_bytes()
        full.unmount()
        if before is None or at_once is None or idle is None or both is None:
            raise SubjectFailed("the daemon ended during the walk")
        after = f"after find -ls over {count:,} files"
        return [
            Reading("walk", "walk-time", f"find -ls over {count:,} files", "s", [seconds]),
            Reading(
                "walk",
                "walk-before",
                "private memory of the control plane, mounted",
                "bytes",
                [before],
            ),
            Reading("walk", "walk-at-once", f"the same {after}, at once", "bytes", [at_once]),
            Reading(
                "walk",
                WALK_IDLE,
                f"the same {after}, idle for {idle_seconds:g} s",
                "bytes",
                [idle],
            ),
            Reading("walk", "walk-both", "the same with the data plane", "bytes", [both]),
        ]

    # -- space ----------------------------------------------------------------------------------

    def _space(self, _full: PmemfsMount | None, interrupts: Interrupts) -> list[Reading]:
        count = self._settings.files
        data_bytes = count * SPACE_FILE_BYTES
        pool_bytes = (data_bytes + data_bytes // 8) // MIB * MIB + 64 * MIB
        with self._pool_of("space", interrupts, pool_bytes, is_sparse=False) as made:
            self._say(f"writing {count:,} files of 64 KiB")
            made.mount()
            empty = os.statvfs(made.mountpoint)
            words = [str(self._program), "create", str(made.mountpoint)]
            files.run([*words, str(count), str(CALLERS), str(SPACE_FILE_BYTES)])
            used = os.statvfs(made.mountpoint)
            made.unmount()
        frame_bytes = empty.f_frsize
        used_bytes = (empty.f_bfree - used.f_bfree) * frame_bytes
        share = metadata_share(pool_bytes, empty.f_blocks * frame_bytes, used_bytes, data_bytes)
        return [
            Reading(
                "space",
                "space-used",
                f"space used by {count:,} files of 64 KiB",
                "bytes",
                [used_bytes],
            ),
            Reading(
                "space",
                SPACE_SHARE,
                "metadata with page structures, of the data",
                "share",
                [share],
            ),
        ]


def metadata_share(pool_bytes: int, offered_bytes: int, used_bytes: int, data_bytes: int) -> float:
    """Metadata for each byte of data.

    What statvfs says is used beyond the data; and of what a pool has that statvfs doesn't offer
    (page structures, labels, alignment) as large a part as is used of what it offers.
    """
    around_bytes = (pool_bytes - offered_bytes) * used_bytes / offered_bytes
    return (used_bytes - data_bytes + around_bytes) / data_bytes


def _mount_and_unmount(empty: PmemfsMount) -> float:
    seconds = empty.mount()
    empty.unmount()
    return seconds


def _mount_and_kill(full: PmemfsMount) -> float:
    """The pool is left as kill -9 leaves it, with something half done for the next mount to find.

    Nothing of the mount goes on meanwhile, such as its search for leaks.
    """
    seconds = full.mount()
    path = full.mountpoint / "changed"
    path.unlink(missing_ok=True)
    with open(path, "wb", buffering=0) as opened:
        opened.write(b"x" * 4096)
        full.kill()
        with contextlib.suppress(OSError):
            opened.close()
    return seconds
