"""Pages in use by programs: arrays over them, pins, entries of a cache, and direct transfers.

Each reading is the ratio of two times of one round: what the client takes, over what the same work
takes without pmemfs. So a ratio below 1 is faster. `pagework` does the work of a cell in a process
of its own.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark import backing, host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed
from benchmark.mountrun import ReadingCell
from benchmark.pmemfsmount import PmemfsMount
from benchmark.report import Reading
from benchmark.stage import Interrupts, Settings

WORK = Path(__file__).with_name("pagework.py")
WORK_SECONDS = 900.0
PINS = 5000
ENTRIES = 64
# beside what is mapped: entries of the cache, files that are pinned, metadata
SPARE_BYTES = 512 * MIB
FRAME_BYTES = 4096
PAGE_CELLS = (
    ReadingCell("arrays", "arrays", "computing over a mapped file"),
    ReadingCell("pins", "pins", "map, pin and unpin a file of 1 MiB; 5,000 pins at once"),
    ReadingCell("first", "tensors", "TensorCache.get of 1 MiB, not mapped yet"),
    ReadingCell("again", "tensors", "TensorCache.get of 1 MiB, mapped already"),
    ReadingCell("stores", "stores", "np.memmap stores through the mount, 256 MiB rewritten"),
    ReadingCell("transfer", "transfers", "pmemfs copy from a disk, O_DIRECT"),
)
ARRAY_WORK = {"sum": "sum", "copy-out": "copy out", "copy-in": "copy in",
              "gather": "random gathers of 4 KiB"}  # fmt: skip


class PageBench:
    """Takes the readings. ``say`` and ``warn`` as in `Stage`."""

    def __init__(
        self, settings: Settings, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.failed = False
        self._settings = settings
        self._say = say
        self._warn = warn

    def measure(
        self, cells: list[ReadingCell], interrupts: Interrupts, advance: Callable[[], None]
    ) -> list[Reading]:
        """All readings of these cells."""
        takers = {"arrays": self._arrays, "pins": self._pins, "first": self._first,
                  "again": self._again, "stores": self._stores,
                  "transfer": self._transfer}  # fmt: skip
        readings: list[Reading] = []
        interrupts.arm()
        with self._mounted(interrupts) as mounted:
            for cell in cells:
                self._say(cell.caption)
                try:
                    taken = takers[cell.name](mounted)
                except (BenchError, OSError) as problem:
                    self.failed = True
                    self._warn(f"{cell.name}: {problem}")
                    taken = [Reading(cell.name, cell.name, cell.caption, "ratio",
                                     error=str(problem))]  # fmt: skip
                readings += taken
                advance()
        return readings

    @contextlib.contextmanager
    def _mounted(self, interrupts: Interrupts) -> Iterator[PmemfsMount]:
        pool_bytes = self._settings.size_bytes + SPARE_BYTES
        # an array in memory beside it
        needed = pool_bytes + self._settings.size_bytes
        if needed > host.shm_free_bytes():
            raise BenchError(f"{host.SHM} can't take {needed // MIB} MiB: use a smaller --size")
        made = PmemfsMount("pages", mode="fs")
        try:
            made.create(pool_bytes)
            made.mount()
            yield made
        finally:
            interrupts.disarm()
            made.remove()

    def _arrays(self, mounted: PmemfsMount) -> list[Reading]:
        path = mounted.mountpoint / "array"
        try:
            backing.write_new(path, self._settings.size_bytes)
            told = json.loads(backing.checked([host.find_pmemfs(), "extents", str(path), "--json"]))
            extents = [
                (one["offset_bytes"], one["pfn"] * FRAME_BYTES, one["length_bytes"])
                for one in told["extents"]
            ]
            rounds = self._settings.rounds
            found = self._work("arrays", path, mounted.pool, json.dumps(extents), rounds)
        finally:
            path.unlink(missing_ok=True)
        return [
            Reading("arrays", name, f"{what}, over a bare mapping of the same memory", "ratio",
                    ratios(found[name]["pages"], found[name]["plain"]))
            for name, what in ARRAY_WORK.items()
        ]  # fmt: skip

    def _pins(self, mounted: PmemfsMount) -> list[Reading]:
        found = self._work("pins", mounted.mountpoint, PINS)
        operations, single = found["operations"], found["single"]
        return [
            Reading("pins", "pin", "map, pin and unpin 1 MiB, medians of 40", "s",
                    single["pages"]),
            Reading("pins", "echo", "a bare answer of trio with a descriptor, medians of 40", "s",
                    single["echo"]),
            Reading("pins", "pin-echo", "the pin over the bare answer", "ratio",
                    ratios(single["pages"], single["echo"])),
            Reading("pins", "pinned", f"open, read and close beside {PINS:,} pins, over without",
                    "ratio", ratios(operations["pinned"], operations["free"])),
        ]  # fmt: skip

    def _first(self, mounted: PmemfsMount) -> list[Reading]:
        with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as plain:
            found = self._work("first", mounted.mountpoint, plain, ENTRIES)["first"]
        return [
            Reading("first", "first", "first get, over load_file of safetensors on tmpfs", "ratio",
                    ratios(found["pages"], found["safetensors"])),
            Reading("first", "first-get", "first get", "s", found["pages"]),
        ]  # fmt: skip

    def _again(self, mounted: PmemfsMount) -> list[Reading]:
        with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as plain:
            found = self._work("again", mounted.mountpoint, plain, ENTRIES)["again"]
        return [
            Reading("again", "again", "get again, over get of lmdb on tmpfs", "ratio",
                    ratios(found["pages"], found["lmdb"])),
            Reading("again", "again-get", "get again", "s", found["pages"]),
        ]  # fmt: skip

    def _stores(self, mounted: PmemfsMount) -> list[Reading]:
        """The kernel's limits of dirty pages, which a mount by root lifts, are set for one side."""
        path, device = mounted.mountpoint / "stored", mounted.mountpoint.stat().st_dev
        limits = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
        if not os.access(limits / "strict_limit", os.W_OK):
            raise BenchError("only root may set the limits of dirty pages of a mount")
        try:
            found = self._work("stores", path, limits, self._settings.rounds)["stores"]
        finally:
            path.unlink(missing_ok=True)
        return [
            Reading("stores", "stores", "np.memmap stores, over those with the kernel's limits",
                    "ratio", ratios(found["ours"], found["kernel"])),
            Reading("stores", "stored", "256 MiB stored and flushed", "s", found["ours"]),
        ]  # fmt: skip

    def _transfer(self, mounted: PmemfsMount) -> list[Reading]:
        """CPU time counts what the daemon uses, too."""
        target = mounted.mountpoint / "target"
        pids = mounted.daemon_pids()
        used: dict[str, list[float]] = {"copy": [], "cp": []}
        took: dict[str, list[float]] = {"copy": [], "cp": []}
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=backing.PREFIX) as folder:
            source = Path(folder) / "source"
            backing.write_new(source, self._settings.size_bytes)
            commands = {
                "copy": [host.find_pmemfs(), "copy", "--direct", str(source), str(target)],
                "cp": ["cp", str(source), str(target)],
            }
            for round_number in range(self._settings.rounds):
                for name in sorted(commands, reverse=bool(round_number % 2)):
                    forget_pages(source)
                    target.unlink(missing_ok=True)
                    before = host.cpu_seconds(pids)
                    begin = os.times().elapsed
                    finished = host.run(commands[name], WORK_SECONDS)
                    took[name].append(os.times().elapsed - begin)
                    if finished.code:
                        raise SubjectFailed(finished.last_words)
                    daemon = host.cpu_seconds(pids) - before
                    used[name].append(finished.cpu_seconds + daemon)
        target.unlink(missing_ok=True)
        return [
            Reading("transfer", "copy-cpu", "CPU time of pmemfs copy, over cp", "ratio",
                    ratios(used["copy"], used["cp"])),
            Reading("transfer", "copy-time", "time of pmemfs copy, over cp", "ratio",
                    ratios(took["copy"], took["cp"])),
        ]  # fmt: skip

    def _work(self, *words: object) -> dict[str, Any]:
        """What `pagework` has measured. Raises BenchError."""
        command = [sys.executable, str(WORK), *map(str, words)]
        finished = host.run(command, WORK_SECONDS)
        if finished.code:
            raise SubjectFailed(finished.last_words)
        found: dict[str, Any] = json.loads(finished.stdout)
        return found


def ratios(ours: list[float], others: list[float]) -> list[float]:
    """Ours over others, round by round."""
    return [one / other for one, other in zip(ours, others, strict=True)]


def forget_pages(path: Path) -> None:
    """Let the kernel's page cache forget a file, so that both sides read it from the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
