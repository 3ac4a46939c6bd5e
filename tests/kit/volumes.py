"""Volumes of every mode on pools in memory, and the handlers and the wire door before them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kit.data_plane import door_to
from kit.pools import mapped_pool
from pmemfs.engine.base import Engine
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.wiredoor import WireDoor
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.memmap import open_memmap
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode, Volume
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.filesystem import FileSystem

MODES = ("block", "fs")


@dataclass
class Mode:
    """A volume with one file in its root, which the kernel holds."""

    volume: Volume
    handlers: Handlers
    door: WireDoor
    name: bytes
    ino: int


@contextmanager
def mode(kind: str, directory: Path) -> Iterator[Mode]:
    directory.mkdir(exist_ok=True)
    with mapped_pool(directory, Scheme.PMEM, 4 * KIB, 32 * MIB) as pool:
        memmap = open_memmap(pool)
        volume: Volume
        if kind == "fs":
            FileSystem.format(pool)
            volume = fs = FileSystem(pool, memmap)
            name = b"file"
            ino = fs.make(ROOT, name, NewInode(stat.S_IFREG | 0o600, 0, 0))
            fs.hold(ino)
        else:
            volume = block = BlockVolume(pool, memmap)
            name, ino = os.fsencode(block.name), 2
        handlers, door = door_to(volume, Engine(pool.medium, memmap))
        yield Mode(volume, handlers, door, name, ino)
