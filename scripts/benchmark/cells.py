"""The workloads. A cell is one workload; its figures are compared across subjects.

Invariants: names are unique; a pinned cell has one caller at depth 1, for only then do "the
caller's CPU" and "the server's CPU" mean one CPU each. The cells in a file system of their own come
last: they leave another content behind.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from benchmark.errors import BenchError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

Direction = Literal["read", "write"]
# what fio works on: the subject's own file or device, or a file in an ext4 on a loop device on it
Place = Literal["subject", "ext4-loop"]
# a second setting of a peer, of interest only where the best peer counts; it would cost much time
ONLY_2XDEEP = ("qsd-buffered",)


@dataclass(frozen=True)
class Cell:
    """One workload: ``jobs`` callers, each with ``depth`` requests of ``block_bytes`` in flight.

    ``engine`` is fio's engine where the cell wants a certain one, ``subjects`` the names of those
    that the cell is for; empty means all, but for those of ``not_subjects``.
    """

    name: str
    group: str
    caption: str
    direction: Direction
    random: bool
    block_bytes: int
    jobs: int = 1
    depth: int = 1
    pinned: bool = False
    place: Place = "subject"
    engine: str | None = None
    subjects: tuple[str, ...] = ()
    not_subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.pinned or (self.jobs, self.depth) == (1, 1)

    @property
    def fio_rw(self) -> str:
        """The workload in fio's word: ``randread``, ``randwrite``, ``read`` or ``write``."""
        return f"rand{self.direction}" if self.random else self.direction

    def takes(self, subject: str) -> bool:
        """Whether the cell is for the subject of this name."""
        return subject in self.subjects or not (self.subjects or subject in self.not_subjects)


def _random_cells(direction: Direction) -> tuple[Cell, ...]:
    shapes = (
        ("pinned", "1 caller, pinned with server", 1, 1, True),
        ("free", "1 caller, free", 1, 1, False),
        ("deep", "1 caller x 32 deep", 1, 32, False),
        ("2xdeep", "2 callers x 32 deep", 2, 32, False),
    )
    return tuple(
        Cell(
            name=f"rand{direction}-{suffix}",
            group=f"4 KiB random {direction}",
            caption=caption,
            direction=direction,
            random=True,
            block_bytes=4 * KIB,
            jobs=jobs,
            depth=depth,
            pinned=pinned,
            not_subjects=() if suffix == "2xdeep" else ONLY_2XDEEP,
        )
        for suffix, caption, jobs, depth, pinned in shapes
    )


def _sequential_cell(direction: Direction) -> Cell:
    return Cell(
        name=f"seq{direction}",
        group=f"1 MiB sequential {direction}",
        caption="1 caller, free",
        direction=direction,
        random=False,
        block_bytes=MIB,
        not_subjects=ONLY_2XDEEP,
    )


def _ext4_cell(direction: Direction) -> Cell:
    return Cell(
        name=f"ext4-loop-{direction}",
        group=f"4 KiB random {direction} in ext4 on a loop device on the subject",
        caption="1 caller x 32 deep",
        direction=direction,
        random=True,
        block_bytes=4 * KIB,
        depth=32,
        place="ext4-loop",
        engine="libaio",
        subjects=("tmpfs", "pmemfs", "pmemfs-uring", "pmemfs-fd", "fs", "python"),
    )


CELLS: tuple[Cell, ...] = (
    *_random_cells("read"),
    *_random_cells("write"),
    _sequential_cell("read"),
    _sequential_cell("write"),
    _ext4_cell("read"),
    _ext4_cell("write"),
)


def choose_names(patterns: str | None, known: Iterable[str], what: str) -> list[str]:
    """Names of ``known``, in its order, matching any of the comma-separated shell patterns.

    ``None`` means all. A pattern that matches nothing is a mistake worth stopping for.
    """
    names = list(known)
    if patterns is None:
        return names
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BenchError(f"no {what} is called {pattern!r}; there are: {', '.join(names)}")
    if not wanted:
        raise BenchError(f"no {what} was named; there are: {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def parse_size_bytes(text: str) -> int:
    """Bytes meant by ``1G``, ``256M``, ``64MiB`` or a plain number; a whole number of MiB, at least
    16.

    Raises BenchError with a sentence otherwise.
    """
    word = text.strip().upper().removesuffix("B").removesuffix("I")
    scale = {"K": KIB, "M": MIB, "G": GIB, "T": GIB * KIB}.get(word[-1:], 1)
    digits = word if scale == 1 else word[:-1]
    if not digits.isdecimal():
        raise BenchError(f"{text!r} is not a size; write for example 256M or 1G")
    size_bytes = int(digits) * scale
    if size_bytes < 16 * MIB or size_bytes % MIB:
        raise BenchError(f"the size must be a whole number of MiB and at least 16M, not {text!r}")
    return size_bytes
