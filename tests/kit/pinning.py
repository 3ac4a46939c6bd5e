"""Pins of volumes in this process, with real sockets: what a daemon does, without its mount."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from kit.pools import mapped_pool
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.memmap import Memmap, open_memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pins.pin import Client, Pin, WantedRange
from pmemfs.pins.registry import Pins
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode, Volume
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.onefile import INODE


@dataclass
class Pinnable:
    """A volume and its pins."""

    pool: Pool
    memmap: Memmap
    volume: Volume
    pins: Pins
    told: list[int]
    """The inodes whose attributes the kernel was told to ask for again."""
    client: Client

    @property
    def fs(self) -> FileSystem:
        assert isinstance(self.volume, FileSystem)
        return self.volume

    def make(self, name: str, size_bytes: int = 0, content: bytes = b"") -> int:
        """A file in mode `fs`, with that content up to its size; its inode."""
        number = self.fs.make(ROOT, name.encode(), NewInode(stat.S_IFREG | 0o600, 0, 0))
        if size_bytes:
            self.fs.allocate(number, 0, size_bytes, keep_size=False)
        if content:
            self.fs.write(number, 0, content)
        return number

    async def pin(
        self, *wanted: WantedRange, is_writable: bool = False, client: Client | None = None
    ) -> tuple[Pin, int]:
        return await self.pins.pin(client or self.client, wanted, is_writable=is_writable)

    def references(self, pfn: int) -> int:
        page = self.memmap.page(pfn)
        return 0 if page is None else page.refcount

    def all_references(self) -> dict[int, int]:
        """The frames whose pages have references, and how many."""
        first = int(self.pool.first_data_pfn)
        found = ((pfn, self.references(pfn)) for pfn in range(first, first + self._frame_count()))
        return {pfn: count for pfn, count in found if count}

    def free_frames(self) -> int:
        return self.fs.room().free_frames

    def _frame_count(self) -> int:
        return self.pool.data_pfn_count


def whole(number: int, path: str = "") -> WantedRange:
    return WantedRange(number, 0, -1, path)


def frames(pin: Pin) -> list[int]:
    """The frames of a pin."""
    return [
        frame
        for file in pin.files
        for _, at, length in file.pieces
        if at >= 0
        for frame in range(at >> PAGE_SHIFT, (at + length) >> PAGE_SHIFT)
    ]


def end(fd: int, marks: bytes = b"d") -> None:
    """What a client does that needs its pages no more."""
    if marks:
        os.write(fd, marks)
    os.close(fd)


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@contextmanager
def pinnable(
    kind: str, engine: str, directory: Path, *, scheme: Scheme = Scheme.PMEM,
    size_bytes: int = 16 * MIB, page_size_bytes: int = 4 * KIB, rest_seconds: float = 0.05,
) -> Iterator[Pinnable]:  # fmt: skip
    """A volume of a new pool; for the native engine its page structures are shared ones."""
    directory.mkdir(exist_ok=True)
    with mapped_pool(directory, scheme, page_size_bytes, size_bytes) as pool:
        shared = None
        if engine == "native":
            shared = share_pool(pool, worker_count=1, has_files=kind == "fs")
            memmap = share_memmap(pool, pool.medium, shared)  # type: ignore[arg-type]
        else:
            memmap = open_memmap(pool)
        volume: Volume
        if kind == "fs":
            FileSystem.format(pool)
            volume = FileSystem(pool, memmap)
        else:
            volume = BlockVolume(pool, memmap)
        told: list[int] = []
        pins = Pins(pool.medium, memmap, volume, told.append, rest_seconds=rest_seconds)
        at = Pinnable(pool, memmap, volume, pins, told, Client(os.getpid(), 1, "test"))
        try:
            yield at
        finally:
            with suppress(ValueError):
                at.pins.close()
            if shared is not None:
                shared.close()


def run(at: Pinnable, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test while ends of pins are noticed."""

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.pins.serve)
                await test()
                nursery.cancel_scope.cancel()

    trio.run(main)


def file_of(at: Pinnable, size_bytes: int = 64 * FRAME_BYTES) -> int:
    """A file that can be pinned, whatever the mode; its inode."""
    return at.make("file", size_bytes) if isinstance(at.volume, FileSystem) else INODE
