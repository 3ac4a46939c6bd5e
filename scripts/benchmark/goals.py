"""What is wanted of the subject ``pmemfs`` (engine native, scheme pmem, transport auto): a table.

Invariants: the cells and subjects named here exist; no goal compares `SUBJECT` with itself; reads
and writes have goals of their own, so that one can't hide behind the other. Page structures
cost so little that one cell's rounds can't tell it from noise: their goals take the rounds of all
cells of one block size and direction together.
"""

from dataclasses import dataclass

from benchmark.cells import MIB

SUBJECT = "pmemfs"
# fewer rounds than this make a figure, but no verdict to rely on
WANTED_ROUNDS = 5


@dataclass(frozen=True)
class RatioGoal:
    """`SUBJECT` does ``at_least`` so many times the IOPS of ``bases``, in the median of the rounds.

    Of several bases the best one in each round counts; of several cells all rounds count alike.
    """

    what: str
    cells: tuple[str, ...]
    bases: tuple[str, ...]
    at_least: float


@dataclass(frozen=True)
class MemoryGoal:
    """The private memory of all processes of `SUBJECT` after the cells is at most so much."""

    what: str
    at_most_bytes: int


Goal = RatioGoal | MemoryGoal

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


GOALS: tuple[Goal, ...] = (
    *_goals_of("read"),
    *_goals_of("write"),
    MemoryGoal("private memory of control plane and data plane", 150 * MIB),
)
