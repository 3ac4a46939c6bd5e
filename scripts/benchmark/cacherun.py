"""Mode cache: hits against mode block, misses against the origin itself, eviction against exact
LRU, write-back, other caches, and what a mount costs.

Each reading is a ratio of two runs of one round, unless it says otherwise. What this machine lacks
for a cell is named in its readings.
"""

import contextlib
import tempfile
from pathlib import Path

from benchmark import backing, cachework, fio
from benchmark.cachepeers import PEERS, WARM_BYTES
from benchmark.cacheplaces import (
    CacheMount,
    CacheSubject,
    OriginPlace,
    ceph_image,
    disk_file,
    made_cache,
    mounted_cache,
    nbdkit,
    pool_bytes_for,
)
from benchmark.cacheshapes import HIT_SHAPES, MISS_ORIGINS, READS_32, READS_64, WRITES_32
from benchmark.cells import GIB, KIB, MIB
from benchmark.errors import BenchError, SubjectFailed
from benchmark.fio import Figures, Target
from benchmark.mountrun import ReadingCell
from benchmark.readingrun import ReadingBench
from benchmark.report import Reading, round_ratios
from benchmark.run import Bench
from benchmark.stage import Interrupts, rotated
from benchmark.subjects import Pmemfs
from benchmark.turns import ratios_of

BLOCK_BYTES = 4 * KIB
SLOW_SECONDS = 0.02
# so large that a run's reads hardly ever meet what another one has brought
LARGE_BYTES = 16 * GIB
SMALL_CACHE_BYTES = 32 * MIB
REPLAY_SECONDS = 600.0
# runs that fill a cache, of which each takes as long as one that is measured
MOST_FILLING_RUNS = 60


class CacheBench(ReadingBench):
    """The readings of mode cache."""

    def _take(self, cell: ReadingCell, interrupts: Interrupts) -> list[Reading]:
        takers = {"hits": self._hits, "zipf": self._zipf, "writes": self._writes,
                  "peers": self._peers, "attach": self._attach}  # fmt: skip
        if cell.name in takers:
            return takers[cell.name](interrupts)
        return self._misses(cell, interrupts)

    # -- hits -----------------------------------------------------------------------------------

    def _hits(self, interrupts: Interrupts) -> list[Reading]:
        runner = Bench(self._settings, self._tool, self._say, self._warn)
        with nbdkit(self._settings.size_bytes) as origin:
            subjects = [CacheSubject(origin), Pmemfs("pmemfs")]
            with runner.ready(subjects, interrupts) as working:
                if len(working) < len(subjects):
                    reasons = [f"{one.name}: {one.skipped}" for one in runner.states if one.skipped]
                    raise SubjectFailed("; ".join(reasons))
                runs = runner.measure(HIT_SHAPES, working, lambda: None)
        self.failed = self.failed or runner.failed
        readings = []
        for cell in HIT_SHAPES:
            ours, others = (
                [run for run in runs if (run.cell, run.subject) == (cell.name, name)]
                for name in ("cache", "pmemfs")
            )
            what = f"hits, {cell.group}, {cell.caption}, over mode block"
            error = next((run.error for run in ours if run.error), None)
            values = () if error else round_ratios(ours, others)
            readings.append(Reading("hits", cell.name, what, "ratio", values, error))
        return readings

    # -- what is kept ---------------------------------------------------------------------------

    def _zipf(self, interrupts: Interrupts) -> list[Reading]:
        size_bytes = self._settings.size_bytes
        block_count = size_bytes // BLOCK_BYTES
        trace = cachework.zipf_trace(block_count, 3 * block_count, seed=1)
        pool_bytes = pool_bytes_for(size_bytes // 10)
        with (
            nbdkit(size_bytes, "rdelay=1ms") as origin,
            mounted_cache("zipf", origin, pool_bytes, interrupts) as made,
        ):
            self._replay(made, trace[:block_count])
            before = made.figures()
            rate = self._replay(made, trace[block_count:]).iops
            after = made.figures()
            hot = made.target(WARM_BYTES)
            fio.read_all(hot)
            sides = self._turns.each(READS_32, {"hits": hot, "misses": origin.target()})
        exact = cachework.lru_hits(trace.tolist(), after["place_count"], block_count)
        ours = 1 - (after["fetched"] - before["fetched"]) / (len(trace) - block_count)
        ratios = [
            rate / (1 / (ours / hits.iops + (1 - ours) / misses.iops))
            for hits, misses in zip(sides["hits"], sides["misses"], strict=True)
        ]
        what = "rate of zipf reads, 32 deep, over what hit ratio and origin allow"
        return [
            Reading("zipf", "zipf-hits", "hit ratio, zipf 1.1", "share", [ours]),
            Reading("zipf", "zipf-lru", "exact LRU, same trace, as many places", "share", [exact]),
            Reading("zipf", "zipf-loss", "hit ratio below exact LRU", "share", [exact - ours]),
            Reading("zipf", "zipf-rate", what, "ratio", ratios),
            Reading("zipf", "zipf-iops", "rate of these reads", "rate", [rate]),
        ]

    def _replay(self, made: CacheMount, blocks: cachework.Blocks) -> Figures:
        """Read these blocks, in this order, 32 at a time."""
        with tempfile.TemporaryDirectory(prefix=backing.PREFIX) as folder:
            log = Path(folder) / "trace"
            cachework.write_iolog(log, made.path, blocks)
            command = fio.replay_command(log, READS_32.depth, self._tool.deep_engine)
            return fio.run(command, READS_32, REPLAY_SECONDS)[0]

    # -- misses ---------------------------------------------------------------------------------

    def _misses(self, cell: ReadingCell, interrupts: Interrupts) -> list[Reading]:
        name = cell.name.removeprefix("misses-")
        places = {
            "slow": lambda: nbdkit(LARGE_BYTES, "rdelay=1ms"),
            "ceph": ceph_image,
            "file": lambda: disk_file(self._settings.size_bytes),
            "prompt": lambda: nbdkit(LARGE_BYTES),
        }
        with places[name]() as origin:
            cached_bytes = min(SMALL_CACHE_BYTES, origin.size_bytes // 16)
            pool_bytes = pool_bytes_for(cached_bytes)
            with mounted_cache(cell.name, origin, pool_bytes, interrupts) as made:
                rates, shares = self._missing(made, origin)
        what = f"misses 64 deep, {MISS_ORIGINS[name][0]}"
        pairs = zip(rates["cache"], rates["origin"], strict=True)
        ratios = [one / other for one, other in pairs]
        return [
            Reading(cell.name, cell.name, f"{what}, over the origin itself", "ratio", ratios),
            Reading(cell.name, f"{cell.name}-rate", what, "rate", rates["cache"]),
            Reading(cell.name, f"{cell.name}-origin", "the origin itself", "rate", rates["origin"]),
            Reading(cell.name, f"{cell.name}-share", "reads that were misses", "share", shares),
        ]

    def _missing(
        self, made: CacheMount, origin: OriginPlace
    ) -> tuple[dict[str, list[float]], list[float]]:
        """Rates of misses and of reads of the origin, and how many reads were misses. What few hits
        there are is not counted."""
        rates: dict[str, list[float]] = {"cache": [], "origin": []}
        shares = []
        for round_number in range(self._settings.rounds):
            for side in rotated(("cache", "origin"), round_number):
                if side == "origin":
                    rates[side].append(
                        self._turns.run(READS_64, origin.target(), round_number).iops
                    )
                    continue
                before = made.figures()
                run = self._turns.run(READS_64, made.target(origin.size_bytes), round_number)
                after = made.figures()
                hits = after["read_hits"] - before["read_hits"]
                missed = after["misses"] - before["misses"]
                shares.append(missed / (hits + missed))
                rates[side].append(run.iops * shares[-1])
        return rates, shares

    # -- writes ---------------------------------------------------------------------------------

    def _writes(self, interrupts: Interrupts) -> list[Reading]:
        size_bytes = self._settings.size_bytes
        with (
            nbdkit(4 * size_bytes, f"wdelay={1000 * SLOW_SECONDS:.0f}ms") as origin,
            mounted_cache("writes", origin, pool_bytes_for(size_bytes), interrupts) as made,
        ):
            filling = self._filling(made)
            self._fill(made, origin)
            sides = {"cache": made.target(origin.size_bytes), "origin": origin.target()}
            full = self._turns.each(WRITES_32, sides)
        stalls = [(run.longest_us or 0) / 1e6 / SLOW_SECONDS for run in full["cache"]]
        what = "4 KiB random writes, 32 deep, origin of 20 ms a write"
        return [
            Reading("writes", "filling", f"{what}: until it is full, over write hits", "ratio",
                    filling),
            Reading("writes", "full", f"{what}: when it is full, over the origin itself", "ratio",
                    ratios_of(full["cache"], full["origin"])),
            Reading("writes", "stall", "the longest of them, in writes of the origin", "ratio",
                    stalls),
        ]  # fmt: skip

    def _filling(self, made: CacheMount) -> list[float]:
        """Rates of writes of new blocks over those of the same blocks again, in another part of the
        origin in each round; half of the cache in all."""
        rounds = self._settings.rounds
        written = self._settings.size_bytes // 2 // rounds // BLOCK_BYTES
        part_bytes = 4 * self._settings.size_bytes // rounds // MIB * MIB
        ratios = []
        for number in range(rounds):
            command = fio.counted_command(
                WRITES_32, made.target(part_bytes), self._tool.deep_engine, written,
                number * part_bytes,
            )  # fmt: skip
            first, again = (fio.run(command, WRITES_32, REPLAY_SECONDS)[0] for _ in range(2))
            ratios.append(first.iops / again.iops)
        return ratios

    def _fill(self, made: CacheMount, origin: OriginPlace) -> None:
        """Write until writes have to wait, and no more blocks become dirty than clean: the first
        sets are full long before the cache is."""
        dirty = 0
        for number in range(MOST_FILLING_RUNS):
            self._turns.run(WRITES_32, made.target(origin.size_bytes), 1000 + number)
            figures = made.figures()
            risen, dirty = figures["dirty"] - dirty, figures["dirty"]
            is_level = figures["full_set_waits"] and risen < figures["place_count"] / 100
            if figures["limit_waits"] or is_level:
                return
        raise SubjectFailed("the cache did not become full")

    # -- other caches ---------------------------------------------------------------------------

    def _peers(self, interrupts: Interrupts) -> list[Reading]:
        """Hits are reads of what was read just before; misses are reads all over the origin."""
        lacking, rates = [], {}
        with contextlib.ExitStack() as stack:
            origin = stack.enter_context(nbdkit(LARGE_BYTES, "rdelay=1ms"))
            pool_bytes = pool_bytes_for(4 * SMALL_CACHE_BYTES)
            made = stack.enter_context(mounted_cache("peers", origin, pool_bytes, interrupts))
            paths = {"cache": made.path}
            for name, peer in PEERS.items():
                try:
                    paths[name] = stack.enter_context(peer(origin))
                except (BenchError, OSError) as problem:
                    self._warn(f"{name} is left out: {problem}")
                    lacking.append(Reading("peers", name, f"peer {name}", "ratio",
                                           lacking=str(problem)))  # fmt: skip
            warm = {name: Target(path, WARM_BYTES, True) for name, path in paths.items()}
            for target in warm.values():
                fio.read_all(target)
            rates["hits"] = self._turns.each(READS_32, warm)
            # s3backer has an origin of its own kind, whose misses nothing can be compared with
            large = {name: Target(path, LARGE_BYTES, True) for name, path in paths.items()
                     if name != "s3backer"}  # fmt: skip
            rates["misses"] = self._turns.each(READS_64, large)
        readings = []
        for kind, key in (("hits", "peer-hits"), ("misses", "peer-misses")):
            ours = rates[kind].pop("cache")
            best = [max(runs, key=lambda run: run.iops) for runs in zip(*rates[kind].values(),
                                                                        strict=True)]  # fmt: skip
            values = ratios_of(ours, best) if best else []
            readings.append(Reading("peers", key, f"{kind}, over the best peer", "ratio", values))
            for name, runs in rates[kind].items():
                what = f"{kind}, over {name}"
                readings.append(Reading("peers", f"{key}-{name}", what, "ratio",
                                        ratios_of(ours, runs)))  # fmt: skip
        return readings + lacking

    # -- mounting -------------------------------------------------------------------------------

    def _attach(self, interrupts: Interrupts) -> list[Reading]:
        """Half of the sets of the large one have tags; both were killed with a block dirty."""
        large_bytes = self._settings.cache_bytes
        seconds: dict[str, list[float]] = {"large": [], "small": []}
        used: dict[str, list[float]] = {"large": [], "small": []}
        sizes = {"large": large_bytes, "small": GIB}
        with contextlib.ExitStack() as stack:
            origin = stack.enter_context(nbdkit(max(large_bytes // 2, GIB)))
            mounts = {
                name: stack.enter_context(made_cache(name, origin, size, interrupts, True))
                for name, size in sizes.items()
            }
            for name, made in mounts.items():
                self._say(f"storing tags of {sizes[name] // GIB} GiB")
                cachework.plant_in_pool(made.pool, min(sizes[name], origin.size_bytes))
                _mount_and_kill(made)
            for round_number in range(self._settings.rounds):
                for name in rotated(("large", "small"), round_number):
                    took, private = _mount_and_kill(mounts[name])
                    seconds[name].append(took)
                    used[name].append(private)
        pairs = zip(seconds["large"], seconds["small"], strict=True)
        ratios = [one / other for one, other in pairs]
        large = f"{large_bytes // GIB:,} GiB"
        what = "private memory of both processes"
        return [
            Reading("attach", "attach-time", f"mount of {large} after kill -9", "s",
                    seconds["large"]),
            Reading("attach", "attach-small", "mount of 1 GiB after kill -9", "s",
                    seconds["small"]),
            Reading("attach", "attach-ratio", "the ratio of the two", "ratio", ratios),
            Reading("attach", "attach-memory", f"{what}, {large}", "bytes", used["large"]),
            Reading("attach", "attach-memory-small", f"{what}, 1 GiB", "bytes", used["small"]),
        ]  # fmt: skip


def _mount_and_kill(made: CacheMount) -> tuple[float, int]:
    """Seconds of a mount, and the private memory of its processes; it ends with a dirty block."""
    seconds = made.mount()
    with open(made.path, "r+b", buffering=0) as opened:
        opened.write(b"x" * BLOCK_BYTES)
        used = made.private_bytes()
        made.kill()
        with contextlib.suppress(OSError):
            opened.close()
    if used is None:
        raise SubjectFailed("the daemon ended by itself")
    return seconds, used
