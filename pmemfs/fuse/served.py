"""What a mount serves, by its mode: a volume, its engine, its handlers.

A session makes the mount and the planes; this is what it lets them serve, and all it knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pmemfs.clock import AccessTimes
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.base import Engine
from pmemfs.engine.native import PublishedDevice, SharedEngine
from pmemfs.engine.trimming import Trimmer
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.published import PublishedTables, Publisher
from pmemfs.media.label import Mode
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.mount.options import MountOptions
from pmemfs.pool import Pool
from pmemfs.volume.base import Volume
from pmemfs.volume.block import BlockVolume, Onlookers
from pmemfs.volume.fs.filesystem import FileSystem

EngineT_co = TypeVar("EngineT_co", bound=Engine, covariant=True)
EngineT = TypeVar("EngineT", bound=Engine)


@dataclass(frozen=True)
class Served(Generic[EngineT_co]):
    """What is served."""

    volume: Volume
    engine: EngineT_co
    trimmer: Trimmer
    handlers: Handlers

    @property
    def fs(self) -> FileSystem | None:
        """The volume of mode `fs`."""
        return self.volume if isinstance(self.volume, FileSystem) else None


def python_served(
    pool: Pool, medium: MappedMedium, memmap: Memmap, options: MountOptions
) -> Served[Engine]:
    """What the python engine serves. Raises PmemfsError."""
    engine = Engine(medium, memmap)
    if pool.label.mode == Mode.FS:
        return _files(pool, medium, memmap, engine, None, options)
    return _device(pool, medium, memmap, engine, Onlookers(), options)


def native_served(
    pool: Pool, medium: MappedMedium, memmap: Memmap, options: MountOptions, shared: SharedMemory
) -> Served[SharedEngine]:
    """What is served behind a data plane. Raises PmemfsError."""
    engine = SharedEngine(pool, medium, memmap, shared)
    if pool.label.mode == Mode.FS:
        return _files(pool, medium, memmap, engine, PublishedTables(shared), options)
    onlookers = PublishedDevice(engine, shared, medium)
    return _device(pool, medium, memmap, engine, onlookers, options)


def _device(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: EngineT, onlookers: Onlookers,
    options: MountOptions,
) -> Served[EngineT]:  # fmt: skip
    volume = BlockVolume(
        pool, memmap, uid=options.uid, gid=options.gid, mode=options.mode, onlookers=onlookers
    )
    trimmer = Trimmer(pool, medium, engine, None)
    return Served(volume, engine, trimmer, Handlers(volume, engine, trimmer))


def _files(
    pool: Pool, medium: MappedMedium, memmap: Memmap, engine: EngineT,
    tables: PublishedTables | None, options: MountOptions,
) -> Served[EngineT]:  # fmt: skip
    """All files; `tables` is what a data plane is shown, if there is one."""
    fs = FileSystem(pool, memmap, tables)
    fs.note_accesses(options.access_times, of_directories=not options.nodiratime)
    if tables:
        tables.note_reads(AccessTimes.NEVER if fs.read_only else options.access_times)
    trimmer = Trimmer(pool, medium, engine, fs)
    handlers = Handlers(
        fs,
        engine,
        trimmer,
        publisher=Publisher(fs, tables) if tables else None,
        published=tables.attributes if tables else None,
        cached=options.cached,
    )
    return Served(fs, engine, trimmer, handlers)
