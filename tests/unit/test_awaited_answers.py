"""A volume may answer reads, writes, copies and write-backs later: each door waits for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.data_plane import door_to
from kit.doors import Failed, Pyfuse3Way, WireWay, outcome
from kit.pools import mapped_pool
from pmemfs.engine.base import Engine
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.label import Scheme
from pmemfs.memmap import open_memmap
from pmemfs.units import KIB, MIB
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.onefile import INODE


class Slow(BlockVolume):
    """A device that answers after other tasks had their turn, and notes what it was asked."""

    asked: tuple[str, ...] = ()

    async def _later(self, what: str, answer: Any) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked = (*self.asked, what)
        return answer()

    def read(self, *request: Any) -> Any:
        return self._later("read", lambda: BlockVolume.read(self, *request))

    def write(self, *request: Any, **more: Any) -> Any:
        return self._later("write", lambda: BlockVolume.write(self, *request, **more))

    def write_back(self, number: int) -> Any:
        return self._later("write_back", lambda: None)

    def copy(self, source: int, source_bytes: int, target: int, *rest: Any, **more: Any) -> Any:
        def copied() -> int:
            length = rest[1]
            data = bytes(BlockVolume.read(self, source, source_bytes, length))
            return BlockVolume.write(self, target, rest[0], data)

        return self._later("copy", copied)


@pytest.mark.parametrize("door", ["wire", "pyfuse3"])
def test_each_door_waits_for_an_answer(
    shm: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    with mapped_pool(shm, Scheme.PMEM, 4 * KIB, 32 * MIB) as pool:
        memmap = open_memmap(pool)
        volume = Slow(pool, memmap)
        engine = Engine(pool.medium, memmap)
        handlers, wire_door = door_to(volume, engine)
        way: Any = WireWay(wire_door) if door == "wire" else Pyfuse3Way(handlers, monkeypatch)
        handle = way.open(INODE, os.O_RDWR)
        assert way.write(handle, 4096, b"x" * 5000) == 5000
        assert bytes(way.read(handle, 4095, 5002)) == b"\0" + b"x" * 5000 + b"\0"
        way.fsync(handle)
        assert volume.asked == ("write", "read", "write_back")
        end = volume.size_bytes
        assert outcome(way, "write", (handle, end, b"x")) == Failed(errno.ENOSPC)
        statistics = engine.statistics()
        assert (statistics.written_bytes, statistics.read_bytes) == (5000, 5002)
        if door == "wire":
            trio.run(handlers.files.sync_all)
            assert volume.asked[-1] == "write_back"
            request = wire.COPY_IN.pack(handle, 4096, INODE, handle, MIB, 5000, 0)
            copied = way.ask(Opcode.COPY_FILE_RANGE, INODE, request)
            assert wire.WRITE_OUT.unpack(copied)[0] == 5000
            assert volume.asked[-1] == "copy"
            assert bytes(way.read(handle, MIB, 5000)) == b"x" * 5000


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_DSYNC])
def test_a_synchronous_write_is_written_back_before_it_is_answered(shm: Path, flags: int) -> None:
    with mapped_pool(shm, Scheme.PMEM, 4 * KIB, 32 * MIB) as pool:
        memmap = open_memmap(pool)
        volume = Slow(pool, memmap)
        _, door = door_to(volume, Engine(pool.medium, memmap))
        way = WireWay(door)
        handle = way.open(INODE, flags)
        head = wire.WRITE_IN.pack(handle, 0, 3, 0, 0, flags)
        way.ask(Opcode.WRITE, INODE, head + b"abc")
        wanted = ("write", "write_back") if flags & os.O_DSYNC else ("write",)
        assert volume.asked == wanted
