"""Files that are compressed, on small pools, and all that can be seen of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from kit.fs_checker import Checker
from kit.fs_crash import FILE, PlainMedium, blank_image, on_medium, template
from kit.pools import mapped_pool
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.media.transform import Transformation
from pmemfs.medium.base import Medium
from pmemfs.memmap import open_memmap
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool
from pmemfs.units import KIB
from pmemfs.volume.fs.filesystem import FileSystem

__all__ = ["FILE", "FRAME", "PIECE", "Compressible", "text", "with_pages"]

PIECE = 32 * FRAME_BYTES
FRAME = FRAME_BYTES


@functools.cache
def text(length: int, seed: int = 0) -> bytes:
    """Bytes that shrink to about a third, and never repeat over a long distance."""
    chance = random.Random(seed)
    words = [chance.randbytes(6).hex().encode() for _ in range(300)]
    found = bytearray()
    while len(found) < length:
        found += chance.choice(words) + b" %d\n" % chance.randrange(1 << 20)
    return bytes(found[:length])


class Compressible:
    """A small file system in which files may be compressed."""

    def __init__(self, pool: Pool, medium: Medium, *, has_pages: bool) -> None:
        self.pool, self.medium, self.has_pages = pool, medium, has_pages
        FileSystem.format(pool)
        self.mount()

    @classmethod
    def in_memory(cls, frames: int = 2000) -> Compressible:
        """On a pool without page structures."""
        image = blank_image(frames)
        medium = PlainMedium(image)
        return cls(on_medium(template(len(image)), medium), medium, has_pages=False)

    def mount(self) -> None:
        self.fs = FileSystem(self.pool, open_memmap(self.pool) if self.has_pages else NoMemmap())
        self.fs.frames.packed.cold_seconds = 0.001

    def remount(self) -> None:
        self.fs.end()
        self.mount()

    def set(self, number: int, kind: int = Transformation.ZSTD, level: int = 0) -> None:
        """Let a file have a compression, or none."""
        self.fs.properties.set_transform(number, kind, level)

    def make(self, name: str, data: bytes = b"", kind: int = Transformation.ZSTD) -> int:
        """A file with these bytes, whose pieces are plain."""
        number = self.fs.make(ROOT, name.encode(), FILE)
        if data:
            self.fs.write(number, 0, data)
            self.fs.trim_ahead(number)
        self.set(number, kind)
        return number

    def packed(self, name: str, data: bytes, kind: int = Transformation.ZSTD) -> int:
        """A file with these bytes, whose pieces are compressed."""
        number = self.make(name, data, kind)
        self.rewrite(number)
        assert self.fs.inode(number).pieces
        return number

    def rewrite(self, number: int) -> None:
        trio.run(self.fs.cooler.rewrite, number)

    def step(self) -> None:
        """What the background does in a second, once everything is cold."""
        trio.run(self.fs.cooler.step)

    def content(self, number: int) -> bytes:
        """The bytes of a file, and that nothing but the file system's own cache has made them."""
        self.fs.frames.packed.forget_all()
        return bytes(self.fs.read(number, 0, self.fs.attributes(number).size_bytes))

    def pieces(self, number: int) -> list[int]:
        """The indexes of the pieces."""
        return sorted(self.fs.inode(number).pieces)

    def free(self) -> int:
        self.fs.tidy()
        return self.fs.room().free_frames

    def check(self) -> None:
        """What is stored is a sound file system, and nothing of it leaks."""
        self.remount()
        self.fs.end()
        image = bytes(self.medium.read(0, self.medium.size_bytes))
        report = Checker(int(self.pool.first_data_pfn), self.pool.data_pfn_count).check(image)
        assert report.problems == []
        assert (report.leaked, report.orphans) == ([], [])
        self.mount()


@contextmanager
def with_pages(directory: Path, scheme: Scheme = Scheme.PMEM) -> Iterator[Compressible]:
    """As `Compressible.in_memory`, on a pool whose pages have structures."""
    with mapped_pool(directory, scheme, 4 * KIB, 32 << 20) as pool:
        yield Compressible(pool, pool.medium, has_pages=True)
