"""Looking for pools that nobody has mounted, as `zpool import` does: by their labels alone.

Invariants:
- nothing is written, and no lock is taken, so that whoever mounts meanwhile is not disturbed;
- what could block is not opened: pipes, sockets, what lies on a mount that does not answer. Nor is
  a character device that is not memory: a watchdog would begin to count, a tape would be rewound;
- of a pool only the label is read, however large it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from glob import glob
from typing import NamedTuple

from pmemfs.errors import NewerFormat, NoSuchSource, PmemfsError, sentence_of
from pmemfs.media.label import Label
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import identify, identify_dax_device
from pmemfs.mountinfo import mounts
from pmemfs.pool.labels import newest, read_labels
from pmemfs.reach import check_answers

_DEVICES = ("/dev/pmem*", "/dev/dax*")
_DIRECTORY = "/dev/shm"


class Found(NamedTuple):
    """A file or device that was looked at."""

    path: str
    label: Label | None
    problem: str = ""
    """Why it is no pool, or none that can be used."""
    is_pool: bool = False
    """Whether it has at least what is left of a label."""
    owner_uid: int = 0


def search(directories: Iterable[str]) -> Iterator[Found]:
    """All devices of persistent memory, and what lies in /dev/shm and some other directories.

    Raises NoSuchSource for a directory that is none, and Silent.
    """
    seen: set[str] = set()
    devices = sorted(path for pattern in _DEVICES for path in glob(pattern))
    for path in [*devices, *_files(_DIRECTORY), *(p for d in directories for p in _files(d))]:
        found = _look(path)
        real = os.path.realpath(path) if found.is_pool else path
        if real not in seen:
            seen.add(real)
            yield found._replace(path=real)


def _files(directory: str) -> list[str]:
    """What may hold a pool in a directory."""
    check_answers(directory)
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        if directory == _DIRECTORY:
            return []
        raise NoSuchSource(path=directory, why=sentence_of(OSError(*error.args[:2]))) from None
    # Of a directory's entries the kernel says the type without asking what is mounted on them.
    mountpoints = {mount.mountpoint for mount in mounts()}
    return [entry.path for entry in entries
            if not entry.is_dir(follow_symlinks=False)
            and os.path.abspath(entry.path) not in mountpoints]  # fmt: skip


def _look(path: str) -> Found:
    try:
        if os.path.islink(path):
            check_answers(path)
        held = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return _look_at(path, held)
        finally:
            os.close(held)
    except PmemfsError as error:
        return Found(path, None, sentence_of(error))
    except OSError as error:
        return Found(path, None, sentence_of(OSError(*error.args[:2])))


def _look_at(path: str, held: int) -> Found:
    """Look at what a descriptor holds that has not opened it."""
    status = os.fstat(held)
    if stat.S_ISCHR(status.st_mode):
        identify_dax_device(path, status)
    elif not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        return Found(path, None, "it is neither a file nor a device")
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(f"/proc/self/fd/{held}", flags)
    try:
        return _read(path, fd)._replace(owner_uid=status.st_uid)
    finally:
        os.close(fd)


def _read(path: str, fd: int) -> Found:
    source = identify(path)
    if source.size_bytes == 0:
        return Found(path, None, "it is smaller than 4 KiB")
    with closing(MappedMedium(source, read_only=True, locked_fd=os.dup(fd))) as medium:
        readings = read_labels(medium)
    newer = [reading for reading in readings if isinstance(reading.problem, NewerFormat)]
    reading = newer[0] if newer else newest(readings)
    if reading.label:
        return Found(path, reading.label, is_pool=True)
    return Found(path, None, str(reading.problem), any(r.has_magic for r in readings))
