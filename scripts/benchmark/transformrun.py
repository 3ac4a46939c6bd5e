"""Files that are encrypted or compressed: against plain ones, against the libraries by themselves,
and against gocryptfs.

Each reading is a ratio of two runs of one round, unless it says otherwise.
"""

import contextlib
import json
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard

from benchmark import backing, corpora, gocryptfs, host
from benchmark.cells import CELLS, KIB, MIB, Cell
from benchmark.errors import BenchError, SubjectFailed
from benchmark.fio import Target
from benchmark.mountrun import ReadingCell
from benchmark.pmemfsmount import PmemfsMount
from benchmark.readingrun import ReadingBench
from benchmark.report import Reading
from benchmark.stage import Interrupts, rotated
from benchmark.transformcells import CIPHER_SHAPES, CORPORA, PLAIN_SHAPES
from benchmark.turns import ratios_of

SEQUENTIAL_READ = next(cell for cell in CELLS if cell.name == "seqread")
# beside the files: what is compressed, metadata, pieces that are being replaced
SPARE_BYTES = 512 * MIB
WORK_SECONDS = 1800.0
# so much that the commands which begin it don't count
BUSY_BYTES = 256 * MIB
WARM_BYTES = 32 * MIB
WARM_SECONDS = 60.0
# between two reads of what is to become hot
QUIET_SECONDS = 0.5
NEVER_COLD = "cold_seconds=1000000"
SOON_COLD = "cold_seconds=1"


class TransformBench(ReadingBench):
    """The readings of transformed files."""

    def _take(self, cell: ReadingCell, interrupts: Interrupts) -> list[Reading]:
        takers = {"encrypted": self._encrypted, "gocryptfs": self._gocryptfs,
                  "at-rest": self._at_rest,
                  "cold": self._cold, "beside": self._beside}  # fmt: skip
        with self._mounted(interrupts) as made:
            return takers[cell.name](made)

    @contextlib.contextmanager
    def _mounted(self, interrupts: Interrupts) -> Iterator[PmemfsMount]:
        """A file system that compresses only what it is told to; removed when this ends."""
        pool_bytes = 2 * self._settings.size_bytes + SPARE_BYTES
        needed = pool_bytes + self._settings.size_bytes
        if needed > host.shm_free_bytes():
            raise BenchError(f"{host.SHM} can't take {needed // MIB} MiB: use a smaller --size")
        made = PmemfsMount("transform", mode="fs", options=NEVER_COLD)
        try:
            made.create(pool_bytes, is_sparse=True)
            made.mount()
            yield made
        finally:
            interrupts.disarm()
            made.remove()

    # -- encryption -----------------------------------------------------------------------------

    def _encrypted(self, made: PmemfsMount) -> list[Reading]:
        size_bytes = self._settings.size_bytes
        sides = {"private": _target(_private(made) / "file", size_bytes),
                 "plain": _target(made.mountpoint / "file", size_bytes)}  # fmt: skip
        readings = []
        for cell in CIPHER_SHAPES:
            self._say(f"encrypted, {cell.name}")
            what = f"encrypted, {cell.group}, {cell.caption}"
            runs = self._turns.each(cell, sides)
            pairs = ratios_of(runs["private"], runs["plain"])
            key = f"encrypted-{cell.name}"
            readings.append(Reading("encrypted", key, f"{what}, over plain", "ratio", pairs))
            if not cell.random:
                ours, theirs = self._against_openssl(cell, sides["private"])
                pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
                key = f"openssl-{cell.name}"
                rate = "openssl speed, 1 core, AES-256-XTS of 4 KiB, MiB"
                readings += [
                    Reading("encrypted", key, f"{what}, over openssl speed", "ratio", pairs),
                    Reading("encrypted", f"{key}-rate", rate, "rate", theirs),
                ]
        return readings

    def _against_openssl(self, cell: Cell, target: Target) -> tuple[list[float], list[float]]:
        """MiB/s of one caller, and of openssl on one core, by turns."""
        ours, theirs = [], []
        for number in range(self._settings.rounds):
            for side in rotated(("ours", "openssl"), number):
                if side == "openssl":
                    theirs.append(_openssl_speed(cell.direction == "read"))
                else:
                    run = self._turns.run(cell, target, number)
                    ours.append(run.iops * cell.block_bytes / MIB)
        return ours, theirs

    def _gocryptfs(self, made: PmemfsMount) -> list[Reading]:
        size_bytes = self._settings.size_bytes
        with gocryptfs.mounted() as other:
            sides = {"ours": _target(_private(made) / "file", size_bytes),
                     "gocryptfs": _target(other / "file", size_bytes)}  # fmt: skip
            readings = []
            for cell in CIPHER_SHAPES:
                self._say(f"gocryptfs, {cell.name}")
                runs = self._turns.each(cell, sides)
                what = f"encrypted, {cell.group}, {cell.caption}"
                readings += [
                    Reading("gocryptfs", f"gocryptfs-{cell.name}", f"{what}, over gocryptfs",
                            "ratio", ratios_of(runs["ours"], runs["gocryptfs"])),
                    Reading("gocryptfs", f"gocryptfs-{cell.name}-rate", f"gocryptfs, {cell.group}",
                            "rate", [run.iops for run in runs["gocryptfs"]]),
                ]  # fmt: skip
        return readings

    # -- compression ----------------------------------------------------------------------------

    def _at_rest(self, made: PmemfsMount) -> list[Reading]:
        part_bytes = self._settings.size_bytes // len(CORPORA) // MIB * MIB
        archive = _compressing(made)
        readings = []
        for name, what in CORPORA.items():
            self._say(f"at rest: {what}")
            path = archive / name
            _write(path, corpora.content(name, part_bytes))
            size_bytes = path.stat().st_size
            packed = sum(min(len(one), corpora.PIECE_BYTES) for one in corpora.compressed(path))
            _rewrite(path)
            ours, theirs = size_bytes / corpora.stored_bytes(path), size_bytes / packed
            readings += [
                Reading("at-rest", f"rest-{name}", f"{what}: ratio, over that of zstd -1 on "
                        "128 KiB", "ratio", [ours / theirs]),
                Reading("at-rest", f"rest-{name}-own", f"{what}: ratio at rest", "ratio", [ours]),
            ]  # fmt: skip
            path.unlink()
        return [*readings, *self._small_files(archive / "tree")]

    def _small_files(self, tree: Path) -> list[Reading]:
        """Files of more than a page shrink by whole pages; what the ends of their last pages hold
        nothing in is what packing of tails could save."""
        tree.mkdir()
        paths = []
        for number, source in enumerate(corpora.source_files()):
            path = tree / f"{number}.py"
            path.write_bytes(source.read_bytes())
            paths.append(path)
        size_bytes = sum(path.stat().st_size for path in paths)
        plain_bytes = sum(map(corpora.stored_bytes, paths))
        packed = sum(sum(map(len, corpora.compressed(path))) for path in paths)
        _rewrite(tree)
        stored = sum(map(corpora.stored_bytes, paths))
        what = f"{len(paths):,} sources of Python, {size_bytes // len(paths) / KIB:.0f} KiB each"
        return [
            Reading("at-rest", "small-plain", f"{what}: plain, bytes over what they take",
                    "ratio", [size_bytes / plain_bytes]),
            Reading("at-rest", "small-own", f"{what}: at rest, bytes over what they take",
                    "ratio", [size_bytes / stored]),
            Reading("at-rest", "small-zstd", f"{what}: zstd -1 by itself", "ratio",
                    [size_bytes / packed]),
            Reading("at-rest", "small-frames", f"{what}: of what they take at rest, empty",
                    "share", [(stored - packed) / stored]),
        ]  # fmt: skip

    def _cold(self, made: PmemfsMount) -> list[Reading]:
        """A new mount for each round, so that no piece is kept plain from the one before."""
        size_bytes = self._settings.size_bytes // 2
        path = _compressing(made) / "tar"
        _write(path, corpora.content("tar", size_bytes))
        packed = corpora.compressed(path)
        # Read first, so that the daemon has loaded what it reads the other one with.
        first = path.with_name("first")
        _write(first, corpora.content("tar", corpora.PIECE_BYTES))
        _rewrite(path.parent)
        rates: dict[str, list[float]] = {"ours": [], "zstd": []}
        for number in range(self._settings.rounds):
            for side in rotated(("ours", "zstd"), number):
                self._say(f"cold, round {number + 1}: {side}")
                if side == "zstd":
                    rates[side].append(size_bytes / MIB / _seconds_of_zstd(packed))
                    continue
                made.unmount()
                made.mount()
                _seconds_of_reading(first)
                rates[side].append(size_bytes / MIB / _seconds_of_reading(path))
        ratios = [one / other for one, other in zip(rates["ours"], rates["zstd"], strict=True)]
        return [
            Reading("cold", "cold", "1 MiB reads of what is cold, over libzstd on one core",
                    "ratio", ratios),
            Reading("cold", "cold-rate", "1 MiB reads of what is cold, MiB", "rate",
                    rates["ours"]),
            Reading("cold", "cold-zstd", "libzstd on one core, MiB", "rate", rates["zstd"]),
            *self._hot(made),
        ]  # fmt: skip

    def _hot(self, made: PmemfsMount) -> list[Reading]:
        """The same file once it was read so often that all of it is plain again."""
        hot, plain = made.mountpoint / "archive" / "hot", made.mountpoint / "plain"
        _write(hot, corpora.content("tar", WARM_BYTES))
        _write(plain, corpora.content("tar", WARM_BYTES))
        _rewrite(hot)
        begin = time.monotonic()
        while json.loads(_ask("get", hot, "--json"))["packed_bytes"]:
            if time.monotonic() - begin > WARM_SECONDS:
                raise SubjectFailed(f"{hot.name} stays cold for {WARM_SECONDS:.0f} s")
            _seconds_of_reading(hot)
            time.sleep(QUIET_SECONDS)
        took = time.monotonic() - begin
        sides = {"hot": Target(hot, WARM_BYTES, True), "plain": Target(plain, WARM_BYTES, True)}
        runs = self._turns.each(SEQUENTIAL_READ, sides)
        return [
            Reading("cold", "hot", "1 MiB reads of what was cold and is hot, over plain", "ratio",
                    ratios_of(runs["hot"], runs["plain"])),
            Reading("cold", "hot-after", "until all of it was plain, read all the time", "s",
                    [took]),
        ]  # fmt: skip

    def _beside(self, made: PmemfsMount) -> list[Reading]:
        """All of a large file becomes cold, and is compressed in the background."""
        target = _target(made.mountpoint / "file", self._settings.size_bytes)
        busy = _compressing(made) / "busy"
        _write(busy, corpora.content("tar", BUSY_BYTES))
        rates: dict[tuple[str, str], list[float]] = {}
        compressed = []
        for number in range(self._settings.rounds):
            for cell in PLAIN_SHAPES:
                for side in rotated(("idle", "busy"), number):
                    self._say(f"beside, {cell.name}, round {number + 1}: {side}")
                    if side == "idle":
                        run = self._turns.run(cell, target, number)
                    else:
                        with _compressed_when_cold(busy, made):
                            before = _compressed_count(made)
                            begin = time.monotonic()
                            run = self._turns.run(cell, target, number)
                            took = time.monotonic() - begin
                            compressed.append((_compressed_count(made) - before) / took)
                    rates.setdefault((side, cell.name), []).append(run.iops)
        if not all(compressed):
            runs = f"{compressed.count(0)} of {len(compressed)} runs"
            self._warn(f"beside: in {runs} nothing was compressed: others wanted the CPUs")
        readings = [
            Reading("beside", f"beside-{cell.name}", f"plain file, {cell.group}, {cell.caption}, "
                    "while another is compressed, over without", "ratio",
                    [one / other for one, other in zip(rates["busy", cell.name],
                                                       rates["idle", cell.name], strict=True)])
            for cell in PLAIN_SHAPES
        ]  # fmt: skip
        done = [count * corpora.PIECE_BYTES / MIB for count in compressed]
        return [*readings, Reading("beside", "beside-compressed", "compressed meanwhile, MiB",
                                   "rate", done)]  # fmt: skip


def _ask(*words: object) -> str:
    """stdout of a command of pmemfs that may take long. Raises SubjectFailed."""
    finished = host.run([host.find_pmemfs(), *map(str, words)], WORK_SECONDS)
    if finished.code:
        raise SubjectFailed(f"pmemfs {words[0]}: {finished.last_words}")
    return finished.stdout


def _rewrite(path: Path) -> None:
    _ask("rewrite", "--quiet", path)


def _private(made: PmemfsMount) -> Path:
    """A new encrypted directory of a mount."""
    key = made.pool.with_name("key")
    path = made.mountpoint / "private"
    key.write_bytes(secrets.token_bytes(64))
    try:
        _ask("key", "add", made.mountpoint, "--name", "bench", "--key-file", key)
    finally:
        key.unlink()
    path.mkdir()
    _ask("encrypt", path, "--key", "bench")
    return path


def _compressing(made: PmemfsMount) -> Path:
    """A new directory whose files are compressed as zstd -1 does."""
    path = made.mountpoint / "archive"
    path.mkdir()
    _ask("set", path, f"compression=zstd:{corpora.LEVEL}")
    return path


def _target(path: Path, size_bytes: int) -> Target:
    """A new file, written to its end."""
    backing.write_new(path, size_bytes)
    return Target(path, size_bytes, backing.opens_direct(path))


def _write(path: Path, parts: Iterator[bytes]) -> None:
    with path.open("xb") as file:
        file.writelines(parts)


def _openssl_speed(decrypts: bool) -> float:
    """MiB/s of AES-256-XTS in units of 4 KiB, on one core, by the clock on the wall."""
    backing.require_program("openssl", "install openssl")
    way = ["-decrypt"] if decrypts else []
    words = ["-evp", "aes-256-xts", "-bytes", "4096", "-seconds", "1", "-elapsed", "-mr"]
    told = backing.checked(["openssl", "speed", *way, *words])
    line = next(line for line in told.splitlines() if line.startswith("+F:"))
    return float(line.rpartition(":")[2]) / MIB


def _seconds_of_zstd(packed: list[bytes]) -> float:
    begin = time.monotonic()
    unpacker = zstandard.ZstdDecompressor()
    for piece in packed:
        unpacker.decompress(piece)
    return time.monotonic() - begin


def _seconds_of_reading(path: Path) -> float:
    """All of a file once, 1 MiB at a time, past the kernel's page cache."""
    buffer = mmap.mmap(-1, MIB)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    begin, offset = time.monotonic(), 0
    try:
        while got := os.preadv(fd, [buffer], offset):
            offset += got
    finally:
        os.close(fd)
    return time.monotonic() - begin


def _compressed_count(made: PmemfsMount) -> int:
    """Pieces that were compressed since the mount."""
    compression = made.info().get("compression") or {}
    return int(compression.get("compressed_count", 0))


@contextlib.contextmanager
def _compressed_when_cold(path: Path, made: PmemfsMount) -> Iterator[None]:
    """A file begins to be compressed in the background, and is plain again when this ends."""
    _ask("mount", "-o", f"remount,{SOON_COLD}", made.mountpoint)
    try:
        begin, count = time.monotonic(), _compressed_count(made)
        while _compressed_count(made) == count and time.monotonic() - begin < WARM_SECONDS:
            time.sleep(QUIET_SECONDS / 10)
        yield
    finally:
        _ask("mount", "-o", f"remount,{NEVER_COLD}", made.mountpoint)
        _ask("set", path, "compression=none")
        _rewrite(path)
        _ask("set", path, f"compression=zstd:{corpora.LEVEL}")
