"""What pages in use cost: a pin, a device's transfer into pinned pages, a truncate meanwhile.

All of it goes through `pmemfs.connect`, as a user's program does it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pmemfs.client.mount import connect
from pmemfs.compare.device import Device
from pmemfs.compare.subject import Subject
from pmemfs.errors import WorkloadFailed
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB

_PIN_COUNT = 50
_FILE_BYTES = MIB
_SETTLING_SECONDS = 1.5
"""Longer than the daemon takes to give back frames that nothing holds."""
_MOMENT_SECONDS = 0.02


class CutWhilePinned(NamedTuple):
    """What a truncate did to a file of which one page is pinned."""

    seconds: float
    busy_bytes: int
    """What can't be given out again, until the pin ends."""


def pin_seconds(subject: Subject) -> float:
    """How long a program takes to get an array over a file of 1 MiB and to let go of it."""
    path = _made(subject.mountpoint / "pinned")
    taken = []
    with connect(subject.mountpoint) as fs:
        for _ in range(_PIN_COUNT):
            began = time.perf_counter()
            with fs.open(path.name):
                pass
            taken.append(time.perf_counter() - began)
    path.unlink()
    return median(taken)


def transfer(subject: Subject, name: str, device: Device, timed: Callable[..., None]) -> None:
    """Have a device's bytes go into the pages of a file, and make them durable; `timed` runs it."""
    with (
        connect(subject.mountpoint) as fs,
        fs.open(name, shape=(device.size_bytes,), mode="r+") as mapping,
    ):
        memory = mapping.array.data

        def move() -> None:
            for offset in range(0, device.size_bytes, MIB):
                device.read_into(memory[offset : offset + MIB], offset)
            mapping.flush()

        try:
            timed(move)
        finally:
            # A view that is still alive would keep the pin.
            memory.release()


def cut_while_pinned(subject: Subject) -> CutWhilePinned:
    """Truncate a file while its first page is pinned, and remove its neighbour.

    Raises WorkloadFailed if the array doesn't go on showing what it showed.
    """
    pinned, neighbour = (_made(subject.mountpoint / name) for name in ("cut", "neighbour"))
    with (
        connect(subject.mountpoint) as fs,
        fs.open(pinned.name, shape=(FRAME_BYTES,)) as mapping,
    ):
        shown = mapping.array.tobytes()
        began = time.perf_counter()
        os.truncate(pinned, 0)
        seconds = time.perf_counter() - began
        neighbour.unlink()
        busy_bytes = _settled_busy_bytes(subject)
        if mapping.array.tobytes() != shown:
            raise WorkloadFailed(what="truncate while pinned", why="the array shows other bytes")
    pinned.unlink()
    return CutWhilePinned(seconds, busy_bytes)


def _settled_busy_bytes(subject: Subject) -> int:
    """What the file system keeps back, when it has given back all that it can."""
    busy, since = _busy_bytes(subject), time.monotonic()
    while busy > FRAME_BYTES and time.monotonic() < since + _SETTLING_SECONDS:
        time.sleep(_MOMENT_SECONDS)
        now = _busy_bytes(subject)
        if now != busy:
            busy, since = now, time.monotonic()
    return busy


def _busy_bytes(subject: Subject) -> int:
    space = subject.status().space
    return space.busy_frames * FRAME_BYTES if space else 0


def _made(path: Path) -> Path:
    path.write_bytes(os.urandom(_FILE_BYTES))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
