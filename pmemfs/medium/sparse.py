"""Which parts of a file have memory: what was never written need not be looked at."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def next_data(fd: int, start_bytes: int, end_bytes: int) -> int:
    """The first byte of a range that has memory, or `end_bytes`; the first of all if the file
    system knows no holes."""
    try:
        return min(os.lseek(fd, start_bytes, os.SEEK_DATA), end_bytes)
    except OSError as error:
        return end_bytes if error.errno == errno.ENXIO else start_bytes


def data_ranges(fd: int, start_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that have memory; the whole file if its file system knows no holes."""
    position = start_bytes
    while position < end_bytes:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                yield position, end_bytes
            return
        if data >= end_bytes:
            return
        try:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end_bytes)
        except OSError:
            # The file was cut off meanwhile.
            return
        yield data, hole
        position = hole
