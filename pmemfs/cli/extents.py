"""`pmemfs extents`: where a file of a mounted file system is in the pool."""

from __future__ import annotations

import stat

import click

from pmemfs.cli.find import ask
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, print_table, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.place import find_place
from pmemfs.errors import NoExtents
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import ExtentReport, FileExtents
from pmemfs.text import counted
from pmemfs.units import format_size
from pmemfs.unsaid import json_values

_MOST_EXTENTS = 1 << 20


@click.command()
@click.argument("file", type=ANY_PATH)
@reporting
def extents(file: str, as_json: bool) -> None:
    """Show where a file of a mount lies in the pool.

    FILE is in a mounted pool of mode fs. An extent is a run of page frames. It is aligned if all of
    it is whole 2 MiB, and a multiple of 2 MiB from the start of the file and from the start of the
    pool. A piece that lies compressed takes fewer bytes of the pool than it is long. What no extent
    covers is a hole, and reads as zeroes; what lies beyond the size was allocated ahead.
    """
    mount, inode = find_file(file)
    report = _ask(mount, inode)
    if as_json:
        print_json(json_values(report))
        return
    if report.extents:
        # Most files have no pieces, and need no column for them.
        count = 6 if any(row.stored_bytes for row in report.extents) else 5
        print_table(
            ["OFFSET", "PFN", "LENGTH", "SIZE", "ALIGNED", "COMPRESSED"][:count],
            [
                (
                    row.offset_bytes,
                    f"{row.pfn:#x}",
                    row.length_bytes,
                    format_size(row.length_bytes),
                    "yes" if row.is_aligned else "no",
                    f"to {format_size(row.stored_bytes)}" if row.stored_bytes else "no",
                )[:count]
                for row in report.extents
            ],
        )
    say(_summary(report))


def _ask(mount: Mount, inode: int) -> FileExtents:
    """All extents of a file; as many as we have room for, of one that has millions."""
    rows: list[ExtentReport] = []
    while True:
        start = rows[-1].offset_bytes + 1 if rows else 0
        part = ask(mount, "extents", FileExtents, inode=inode, start_bytes=start)
        rows += part.extents
        if part.is_complete or not part.extents or len(rows) >= _MOST_EXTENTS:
            return part._replace(extents=tuple(rows[:_MOST_EXTENTS]))


def find_file(path: str) -> tuple[Mount, int]:
    """The mount that a file is of, and its inode. Raises PmemfsError."""
    mount, status = find_place(path)
    if not stat.S_ISREG(status.st_mode):
        raise NoExtents(path=path, why="it is not a regular file")
    return mount, status.st_ino


def _summary(report: FileExtents) -> str:
    rows = report.extents
    plain = [row for row in rows if not row.stored_bytes]
    packed = [row for row in rows if row.stored_bytes]
    mapped_bytes = sum(row.length_bytes for row in plain)
    aligned_bytes = sum(row.length_bytes for row in rows if row.is_aligned)
    count = counted(len(plain), "extent", "extents")
    packed_bytes = sum(row.length_bytes for row in packed)
    stored_bytes = sum(row.stored_bytes for row in packed)
    return (
        f"{format_size(report.size_bytes)} in {count} of {format_size(mapped_bytes)}, "
        f"of which {format_size(aligned_bytes)} aligned"
        + (
            f"; {format_size(packed_bytes)} in {counted(len(packed), 'piece', 'pieces')} of "
            f"{format_size(stored_bytes)}"
            if packed
            else ""
        )
        + ("" if report.is_complete else "; more extents follow")
    )
