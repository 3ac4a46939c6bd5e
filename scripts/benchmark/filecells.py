"""Workloads over many files, and over one that grows. A cell is one phase of ``files.c``, or a
program on a tree of source files.

Invariants: names are unique; the cells of one series are measured one after the other on one
subject, in their order, for each needs what the one before it left behind. A series runs wholly
even where only one of its cells was asked for, and leaves nothing behind. No cell needs what a cell
leaves that not all subjects of the series can do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmark.cells import KIB, MIB

Operation = Literal[
    "create", "stat", "list", "rename", "mkdir", "rmdir", "symlink", "link", "unlink",
    "mail", "mail-fsync", "untar", "git-status", "rm", "new", "over",
]  # fmt: skip
FILE_SYSTEMS = ("fs", "fuse2fs", "ext4", "tmpfs")
# examples of libfuse; memfs_ll has no symbolic links, and git dies where it maps files of it
PASSTHROUGH = ("passthrough_hp", "passthrough_hp-uring")
MEMFS = ("memfs_ll", "memfs_ll-uring")
# fuse2fs is left out where it would take minutes
WITHOUT_MEMFS = ("fs", *PASSTHROUGH, "ext4", "tmpfs")
MANY_FILES = (*WITHOUT_MEMFS, *MEMFS)
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


def _callers(count: int) -> str:
    return f"{count} caller{'s' if count > 1 else ''}"


def _phase_cells(callers: int) -> tuple[FileCell, ...]:
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
            group=f"many small files, {_callers(callers)}",
            caption=caption,
            series=_callers(callers),
            operation=operation,
            callers=callers,
            is_cold=is_cold,
            subjects=(*FILE_SYSTEMS, *PASSTHROUGH, *(() if operation == "symlink" else MEMFS)),
        )
        for name, operation, caption, is_cold in phases
    )


def _mail_cells(callers: int) -> tuple[FileCell, ...]:
    group = f"a mail queue, {_callers(callers)}"
    ways: tuple[tuple[Operation, str], ...] = (
        ("mail", "create, write 4 KiB, close, rename, unlink"),
        ("mail-fsync", "the same, fsync before close"),
    )
    return tuple(
        FileCell(
            name=f"{operation}-{callers}",
            group=group,
            caption=caption,
            series=group,
            operation=operation,
            callers=callers,
            subjects=MANY_FILES,
        )
        for operation, caption in ways
    )


def _tree_cells() -> tuple[FileCell, ...]:
    group = "a source tree, 1 caller"
    steps: tuple[tuple[str, Operation, str, bool], ...] = (
        ("untar", "untar", "tar -xf", False),
        ("git-first", "git-status", "git status, first: reads all", False),
        ("git-status", "git-status", "git status, again", False),
        ("git-cold", "git-status", "git status, kernel's caches dropped", True),
        ("rm-rf", "rm", "rm -rf", False),
    )
    return tuple(
        FileCell(
            name=name,
            group=group,
            caption=caption,
            series=group,
            operation=operation,
            is_cold=is_cold,
            subjects=WITHOUT_MEMFS if operation == "git-status" else MANY_FILES,
        )
        for name, operation, caption, is_cold in steps
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


PHASE_CELLS = (*_phase_cells(1), *_phase_cells(2))
MAIL_CELLS = (*_mail_cells(1), *_mail_cells(2))
TREE_CELLS = _tree_cells()
METADATA_CELLS = (*PHASE_CELLS, *MAIL_CELLS, *TREE_CELLS)
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
