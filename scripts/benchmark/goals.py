"""What is wanted of the subjects ``pmemfs`` and ``fs`` (both: engine native, scheme pmem, transport
auto; one in mode block, the other in mode fs), in tables, one for each part of the run.

Invariants: the cells, subjects and readings named here exist; no goal compares a subject with
itself in the same cell; reads and writes have goals of their own, so that one can't hide behind the
other. Page structures
cost so little that one cell's rounds can't tell it from noise: their goals take the rounds of all
cells of one block size and direction together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmark.cacheshapes import HIT_SHAPES, MISS_ORIGINS
from benchmark.cells import CELLS, MIB, Cell
from benchmark.filecells import MAIL_CELLS, PHASE_CELLS, TREE_CELLS, FileCell
from benchmark.filerun import share_name
from benchmark.mountrun import MOUNT_RATIO, SPACE_SHARE, WALK_IDLE
from benchmark.pagesrun import ARRAY_WORK, PINS
from benchmark.report import Unit
from benchmark.restartrun import VICTIMS, pause_name
from benchmark.transformcells import CIPHER_SHAPES, CORPORA, PLAIN_SHAPES

SUBJECT = "pmemfs"
# the same in mode fs
FILE = "fs"
# a pool of mode cache
CACHE = "cache"
# fewer rounds than this make a figure, but no verdict to rely on
WANTED_ROUNDS = 5


@dataclass(frozen=True)
class RatioGoal:
    """``subject`` does ``at_least`` so many times the IOPS of ``bases``, in the median of the
    rounds.

    Of several bases the best one in each round counts; of several cells all rounds count alike.
    ``base_cells`` are the cells of the bases, where those are others.
    """

    what: str
    cells: tuple[str, ...]
    bases: tuple[str, ...]
    at_least: float
    subject: str = SUBJECT
    base_cells: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Each cell with the one that it is compared with."""
        return tuple(zip(self.cells, self.base_cells or self.cells, strict=True))


@dataclass(frozen=True)
class MemoryGoal:
    """The private memory of all processes of `SUBJECT` after the cells is at most so much."""

    what: str
    at_most_bytes: int


@dataclass(frozen=True)
class LimitGoal:
    """The median of a reading of a cell is at most ``bound``, or, with ``is_least``, at least so
    much."""

    what: str
    cell: str
    reading: str
    unit: Unit
    bound: float
    is_least: bool = False
    subject: str = FILE

    def takes(self, value: float) -> bool:
        """Whether such a median meets it."""
        return value >= self.bound if self.is_least else value <= self.bound


Goal = RatioGoal | MemoryGoal | LimitGoal

PEERS = ("nbdfuse", "qsd", "qsd-buffered")
RANDOM_SHAPES = ("pinned", "free", "deep", "2xdeep")


def _goals_of(direction: str) -> tuple[RatioGoal, ...]:
    def random(shape: str, caption: str, bases: tuple[str, ...], at_least: float) -> RatioGoal:
        what = f"4 KiB random {direction}, {caption}"
        return RatioGoal(what, (f"rand{direction}-{shape}",), bases, at_least)

    def sequential(base: str, at_least: float) -> RatioGoal:
        return RatioGoal(f"1 MiB sequential {direction}", (f"seq{direction}",), (base,), at_least)

    def cost(size: str, cells: tuple[str, ...], at_least: float) -> RatioGoal:
        what = f"cost of page structures, {size} {direction}"
        return RatioGoal(what, cells, ("none",), at_least)

    both_deep = "2 callers x 32 deep"
    all_random = tuple(f"rand{direction}-{shape}" for shape in RANDOM_SHAPES)
    return (
        random("2xdeep", both_deep, ("loop",), 1.4),
        random("2xdeep", both_deep, PEERS, 4.0),
        random("2xdeep", both_deep, ("tmpfs",), 0.6),
        random("deep", "1 caller x 32 deep", ("loop",), 1.0),
        random("free", "1 caller, free", ("loop",), 2.0),
        random("pinned", "1 caller, pinned", ("loop",), 2.3),
        sequential("loop", 1.2),
        sequential("tmpfs", 0.8),
        RatioGoal(
            f"4 KiB random {direction}, 32 deep, in ext4 on a loop device on it",
            (f"ext4-loop-{direction}",),
            ("tmpfs",),
            0.4,
        ),
        cost("4 KiB", all_random, 0.95),
        cost("1 MiB", (f"seq{direction}",), 0.97),
    )


def _goal_of_file(cell: Cell) -> RatioGoal:
    what = f"{cell.group}, {cell.caption}: a file in mode fs"
    return RatioGoal(what, (cell.name,), (SUBJECT,), 0.95, subject=FILE)


def _goal_of_growth(what: str, suffix: str, at_least: float) -> RatioGoal:
    new, over = (f"new-{suffix}",), (f"over-{suffix}",)
    return RatioGoal(what, new, (FILE,), at_least, subject=FILE, base_cells=over)


def _goal_of_phase(cell: FileCell) -> RatioGoal:
    what = f"{cell.caption}; {cell.series}"
    return RatioGoal(what, (cell.name,), ("fuse2fs",), 2.0, subject=FILE)


def _goals_of_names() -> Iterator[RatioGoal | LimitGoal]:
    """Against a server in C++ that keeps nothing: the speed that FUSE allows."""
    at_least = {"create": 1.2, "stat": 1.0, "list": 1.0, "rename": 1.0, "unlink": 1.0}
    just_made = [cell for cell in PHASE_CELLS if cell.operation in at_least]
    for cell in just_made:
        if not cell.name.startswith("stat-cold"):
            what = f"{cell.caption}; {cell.series}"
            bound = at_least[cell.operation]
            yield RatioGoal(what, (cell.name,), ("passthrough_hp",), bound, subject=FILE)
    for cell, durable in zip(MAIL_CELLS[::2], MAIL_CELLS[1::2], strict=True):
        yield RatioGoal(f"{cell.group}, with fsync over without", (durable.name,), (FILE,), 0.8,
                        subject=FILE, base_cells=(cell.name,))  # fmt: skip
    for cell in TREE_CELLS:
        if cell.operation in ("untar", "rm"):
            what = f"{cell.group}, {cell.caption}"
            yield RatioGoal(what, (cell.name,), ("ext4",), 0.25, subject=FILE)
    for cell in (*just_made, *MAIL_CELLS, *TREE_CELLS):
        what = f"requests that the daemon answers: {cell.group}, {cell.caption}"
        yield LimitGoal(what, cell.name, share_name(cell), "share", 0.05)


def _goal_of_pages(
    what: str, cell: str, reading: str, at_most: float, unit: Unit = "ratio"
) -> LimitGoal:
    return LimitGoal(what, cell, reading, unit, at_most)


def _goal_of_cache(
    what: str, cell: str, reading: str, bound: float, unit: Unit = "ratio", is_least: bool = True
) -> LimitGoal:
    return LimitGoal(what, cell, reading, unit, bound, is_least, CACHE)


def _goals_of_pause(cell: str, what: str, median: float, late: float) -> tuple[LimitGoal, ...]:
    return tuple(
        LimitGoal(f"pause after kill -9 of {victim}, {what}, p{at}", cell,
                  pause_name(cell, victim, at), "s", bound)
        for victim in VICTIMS
        for at, bound in ((50, median), (99, late))
    )  # fmt: skip


def _goal_of_array(name: str, what: str) -> LimitGoal:
    return _goal_of_pages(f"{what} of a mapped file, over a bare mapping", "arrays", name, 1 / 0.95)


def _at_least(what: str, cell: str, reading: str, bound: float) -> LimitGoal:
    return LimitGoal(what, cell, reading, "ratio", bound, is_least=True)


def _goals_of_transforms() -> Iterator[LimitGoal]:
    for cell in CIPHER_SHAPES:
        what = f"encrypted, {cell.group}, {cell.caption}"
        if cell.random:
            yield _at_least(f"{what}, over plain", "encrypted", f"encrypted-{cell.name}", 0.75)
        else:
            yield _at_least(f"{what}, over openssl's XTS", "encrypted", f"openssl-{cell.name}", 0.6)
        yield _at_least(f"{what}, over gocryptfs", "gocryptfs", f"gocryptfs-{cell.name}", 3.0)
    for name, content in CORPORA.items():
        what = f"{content} at rest: ratio, over zstd -1 on 128 KiB"
        yield _at_least(what, "at-rest", f"rest-{name}", 0.9)
    yield _at_least("cold reads of 1 MiB, over libzstd on one core", "cold", "cold", 0.6)
    yield _at_least("reads of 1 MiB of what was cold, over plain", "cold", "hot", 0.95)
    for cell in PLAIN_SHAPES:
        what = f"plain, {cell.group}, {cell.caption}, while others are compressed"
        yield _at_least(what, "beside", f"beside-{cell.name}", 0.9)


GOALS: dict[str, tuple[Goal, ...]] = {
    "io": (
        *_goals_of("read"),
        *_goals_of("write"),
        MemoryGoal("private memory of control plane and data plane", 150 * MIB),
        *(_goal_of_file(cell) for cell in CELLS),
    ),
    "growth": (
        _goal_of_growth("1 MiB sequential write of new files, over overwriting", "1M", 0.7),
        _goal_of_growth("4 KiB appends to a new file, over overwriting", "4K", 0.5),
    ),
    "metadata": (*map(_goal_of_phase, PHASE_CELLS), *_goals_of_names()),
    "mount": (
        LimitGoal(
            "mount with many files after kill -9, over mount of an empty pool",
            cell="mount",
            reading=MOUNT_RATIO,
            unit="ratio",
            bound=1.2,
        ),
        LimitGoal(
            "private memory of the control plane after a walk over many files, idle",
            cell="walk",
            reading=WALK_IDLE,
            unit="bytes",
            bound=300 * MIB,
        ),
        LimitGoal(
            "metadata and page structures of files of 64 KiB, of their data",
            cell="space",
            reading=SPACE_SHARE,
            unit="share",
            bound=0.03,
        ),
    ),
    "pages": (
        *(_goal_of_array(name, what) for name, what in ARRAY_WORK.items()),
        _goal_of_pages("map, pin and unpin 1 MiB", "pins", "pin", 200e-6, "s"),
        _goal_of_pages(f"work of the mount beside {PINS:,} pins", "pins", "pinned", 1 / 0.9),
        _goal_of_pages("first get of 1 MiB, over load_file", "first", "first", 1 / 1.5),
        _goal_of_pages("get of 1 MiB again, over lmdb", "again", "again", 2.0),
        _goal_of_pages("np.memmap stores, over the kernel's limits", "stores", "stores", 1 / 5),
        _goal_of_pages("CPU time of pmemfs copy, over cp", "transfer", "copy-cpu", 0.5),
        _goal_of_pages("time of pmemfs copy, over cp", "transfer", "copy-time", 1.0),
    ),
    "cache": (
        *(
            _goal_of_cache(
                f"hits, {cell.group}, {cell.caption}, over mode block",
                "hits",
                cell.name,
                0.9 if cell.random else 0.7,
            )
            for cell in HIT_SHAPES
        ),
        _goal_of_cache("hit ratio below exact LRU", "zipf", "zipf-loss", 0.015, "share", False),
        _goal_of_cache(
            "zipf reads, over what hit ratio and origin allow", "zipf", "zipf-rate", 0.9
        ),
        *(
            _goal_of_cache(
                f"misses 64 deep, {what}, over the origin",
                f"misses-{name}",
                f"misses-{name}",
                0.8 if is_slow else 0.5,
            )
            for name, (what, is_slow) in MISS_ORIGINS.items()
        ),
        _goal_of_cache("writes until the cache is full, over write hits", "writes", "filling", 0.9),
        _goal_of_cache("writes when it is full, over the origin", "writes", "full", 0.9),
        _goal_of_cache(
            "longest stall then, in writes of the origin", "writes", "stall", 10, is_least=False
        ),
        _goal_of_cache("hits, over the best peer", "peers", "peer-hits", 4.0),
        _goal_of_cache("misses, over the best peer", "peers", "peer-misses", 0.8),
        _goal_of_cache(
            "mount of 1 TiB after kill -9, over 1 GiB",
            "attach",
            "attach-ratio",
            1.2,
            is_least=False,
        ),
        _goal_of_cache("mount of 1 TiB after kill -9", "attach", "attach-time", 1.0, "s", False),
        _goal_of_cache(
            "private memory of both processes, 1 TiB",
            "attach",
            "attach-memory",
            150 * MIB,
            "bytes",
            False,
        ),
    ),
    "restart": (
        *_goals_of_pause("standby", "with a standby", 0.5, 1.5),
        *_goals_of_pause("started", "without one", 1.5, 4.0),
        LimitGoal("private memory of the keeper", "kept", "keeper-private", "bytes", 4 * MIB),
    ),
    "transform": tuple(_goals_of_transforms()),
}
