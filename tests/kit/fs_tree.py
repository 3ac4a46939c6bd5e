"""A small file system whose parts tests know by name, and changes to it behind its back."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager

from kit.pools import MemoryMedium, content
from pmemfs.media import log as media
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.findings import Verdict
from pmemfs.volume.fs.repair import repair_filesystem

POOL_BYTES = 1024 * KIB
FILE = NewInode(0o100644, 1, 2)
DIRECTORY = NewInode(0o40755, 0, 0)


class Tree:
    """A small file system on a pool, whose parts tests know by these names."""

    def __init__(self) -> None:
        spec = PoolSpec(name="c", alignment_bytes=4096, scheme=Scheme.NONE, mode=Mode.FS)
        self.pool = Pool.create(MemoryMedium(bytes(POOL_BYTES)), spec)
        self.medium = self.pool.medium
        FileSystem.format(self.pool)
        fs = self.mount()
        self.home = fs.make(ROOT, b"home", DIRECTORY)
        self.deep = fs.make(self.home, b"deep", DIRECTORY)
        self.file = fs.make(self.deep, b"file", FILE)
        self.other = fs.make(self.deep, b"other", FILE)
        fs.link(self.file, ROOT, b"same")
        fs.write(self.file, 0, b"a" * 10_000)
        fs.write(self.other, 0, b"b" * 10_000)
        for number in (self.file, self.other):
            fs.trim_ahead(number)
        fs.end()

    def mount(self) -> FileSystem:
        """A mount; the one before counts no more."""
        return FileSystem(self.pool, NoMemmap())

    @contextmanager
    def changed(self) -> Iterator[Changes]:
        """Change what no operation would."""
        fs = self.mount()
        yield Changes(fs)
        fs.medium.fence()

    def check(self) -> Verdict:
        """Check, and see that this writes nothing."""
        before = content(self.medium)
        self.medium.read_only = True
        verdict = check_filesystem(self.pool)
        self.medium.read_only = False
        assert content(self.medium) == before
        return verdict

    def errors(self) -> list[str]:
        """What is wrong."""
        return [f"{p.path.decode()}: {p.sentence}" for p in self.check().problems if p.is_error]

    def leaks(self) -> list[str]:
        """What is nobody's."""
        return [p.sentence for p in self.check().problems if not p.is_error]

    def repair(self, *, force: bool = False) -> list[str]:
        """Repair; what was done. Nothing may be left, and all must be readable."""
        done = repaired(self.pool, force=force)
        after = self.check()
        assert after.problems == []
        fs = self.mount()
        assert not (done and fs.store.ground.may_have_leaks)
        names(fs, ROOT)
        return done


class Changes:
    """What can be done to a file system behind its back."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.medium = fs.medium

    def append(self, number: int, *records: bytes) -> None:
        """Records that are not checked."""
        with self.fs.store.change() as change:
            change.append(self.fs.inode(number), *records)

    def state(self, number: int, **changes: int) -> None:
        """Attributes."""
        self.append(
            number, self.fs.store.state_of(self.fs.inode(number)).replaced(**changes).pack()
        )

    def damage(self, number: int, record: int = 0) -> None:
        """Flip a bit in a record of a log that lies in its slot."""
        inode = self.fs.inode(number)
        assert inode.log.is_inline
        at = inode.log.head + record * media.RECORD_BYTES + 20
        self.medium.store(at, bytes([self.medium.read(at, 1)[0] ^ 1]))

    def extent(self, number: int) -> tuple[int, int, int]:
        """The first extent of a file."""
        return next(iter(self.fs.inode(number).extents))

    def mark(self, which: int, pfn: int, *, used: bool) -> None:
        """A bit of the bitmap (0) or of the inode bitmap (1)."""
        frame = pfn - self.fs.geometry.first_pfn
        at = self.fs.geometry.offset_of(which) + frame // 8
        byte = self.medium.read(at, 1)[0] & ~(1 << frame % 8) | used << frame % 8
        self.medium.store(at, bytes([byte]))


def names(fs: FileSystem, directory: int) -> dict[str, int]:
    """All names below a directory, by path, each of which can be read."""
    found = {}
    for name, (number, type_) in list(fs.inode(directory).entries.items()):
        assert fs.attributes(number).mode >> 12 == type_
        found[name.decode()] = number
        if type_ == stat.S_IFDIR >> 12:
            assert fs.parent(number) == directory
            below = names(fs, number)
            found |= {f"{name.decode()}/{path}": child for path, child in below.items()}
        elif type_ == stat.S_IFREG >> 12:
            fs.read(number, 0, 1 << 20)
    return found


def repaired(pool: Pool, *, force: bool = False) -> list[str]:
    """Repair, without reading anything; what was done."""
    done: list[str] = []
    repair_filesystem(
        pool,
        check_filesystem(pool),
        lambda problem, failure: done.append(
            failure or (problem.remedy.sentence if problem.remedy else "")
        ),
        force=force,
    )
    return done
