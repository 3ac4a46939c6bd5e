"""Calls on files, and the errors they answer."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kit.processes import wait_until
from pmemfs.clock import coarse_ns
from pmemfs.units import MIB

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_all(fd: int, length: int, offset: int) -> bytes:
    """Read a range in pieces of 1 MiB."""
    pieces = []
    while length:
        piece = os.pread(fd, min(length, MIB), offset)
        assert piece, f"the file ends at {offset}"
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces)


@contextmanager
def fails_with(number: int) -> Iterator[None]:
    """What is inside must fail with this errno."""
    try:
        yield
    except OSError as error:
        assert error.errno == number, error  # noqa: PT017
    else:
        pytest.fail(f"no {errno.errorcode[number]}")


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return path.lstat().st_mode & 0o7777


def names(path: Path) -> set[str]:
    """What a directory lists."""
    return set(os.listdir(path))


def pattern(length: int, start: int = 0) -> bytes:
    """Bytes of which each says where it is."""
    return np.arange(start, start + length + 8, 8, dtype="<u8").tobytes()[:length]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """See fallocate(2)."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def next_tick() -> None:
    """Let the clock of files go on, beyond the finest time that a file may have by now. On a busy
    machine that takes longer than a tick."""
    now_ns = time.time_ns()
    wait_until(lambda: coarse_ns() > now_ns, "the clock of files goes on")
