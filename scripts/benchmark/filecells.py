"""Workloads over many files, and over one that grows. A cell is one phase of ``files.c``.

Invariants: names are unique; the cells of one series are measured one after the other on one
subject, in their order, for each needs what the one before it left behind. The cells of metadata
with one number of callers are a series, and run wholly even where only one of them was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmark.cells import KIB, MIB

Operation = Literal[
    "create", "stat", "list", "rename", "mkdir", "rmdir", "symlink", "link", "unlink", "new", "over"
]
FILE_SYSTEMS = ("fs", "fuse2fs", "ext4", "tmpfs")
CREATED_BYTES = 4 * KIB
# the file that grows takes one in so many bytes of the working set
PARTS_OF_WORKING_SET = {MIB: 4, 4 * KIB: 16}


@dataclass(frozen=True)
class FileCell:
    """One phase. ``is_cold``: the kernel's caches of names and inodes are dropped before it."""

    name: str
    group: str
    caption: str
    series: str
    operation: Operation
    callers: int = 1
    block_bytes: int = 0
    is_cold: bool = False
    subjects: tuple[str, ...] = FILE_SYSTEMS

    def takes(self, subject: str) -> bool:
        """Whether the cell is for the subject of this name."""
        return subject in self.subjects


def _metadata_cells(callers: int) -> tuple[FileCell, ...]:
    who = f"{callers} caller{'s' if callers > 1 else ''}"
    phases: tuple[tuple[str, Operation, str, bool], ...] = (
        ("create", "create", "create, write 4 KiB, close", False),
        ("stat", "stat", "stat of files just made", False),
        ("stat-cold", "stat", "stat, kernel's caches dropped", True),
        ("list", "list", "readdir and stat, kernel's caches dropped", True),
        ("rename", "rename", "rename", False),
        ("mkdir", "mkdir", "mkdir", False),
        ("rmdir", "rmdir", "rmdir", False),
        ("symlink", "symlink", "symlink", False),
        ("link", "link", "link", False),
        ("unlink", "unlink", "unlink", False),
    )
    return tuple(
        FileCell(
            name=f"{name}-{callers}",
            group=f"many small files, {who}",
            caption=caption,
            series=who,
            operation=operation,
            callers=callers,
            is_cold=is_cold,
        )
        for name, operation, caption, is_cold in phases
    )


def _growth_cells(suffix: str, what: str, block_bytes: int) -> tuple[FileCell, ...]:
    ways: tuple[tuple[str, Operation, str], ...] = (
        ("new", "new", "a new file"),
        ("over", "over", "over what is there"),
    )
    return tuple(
        FileCell(
            name=f"{name}-{suffix}",
            group=what,
            caption=caption,
            series=suffix,
            operation=operation,
            block_bytes=block_bytes,
        )
        for name, operation, caption in ways
    )


METADATA_CELLS = (*_metadata_cells(1), *_metadata_cells(2))
GROWTH_CELLS = (
    *_growth_cells("1M", "1 MiB sequential write, 1 caller", MIB),
    *_growth_cells("4K", "4 KiB sequential write, 1 caller", 4 * KIB),
)


def series_of(chosen: Sequence[FileCell]) -> list[list[FileCell]]:
    """All cells of each series that a chosen one belongs to."""
    wanted = {cell.series for cell in chosen}
    every: dict[str, list[FileCell]] = {}
    for cell in (*GROWTH_CELLS, *METADATA_CELLS):
        if cell.series in wanted:
            every.setdefault(cell.series, []).append(cell)
    return list(every.values())
