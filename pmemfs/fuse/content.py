"""What a mount shows, by the mode of its pool: a device, or a file system.

A session makes the mount and the planes; this is what it lets them serve, and all it knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import pyfuse3

from pmemfs.clock import AccessTimes
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.fuse.block import BlockOperations
from pmemfs.fuse.engine import Engine, PythonEngine
from pmemfs.fuse.filesystem import FileSystemOperations
from pmemfs.fuse.native import NativeEngine, SharedEngine
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.fuse.options import MountOptions
from pmemfs.fuse.patience import Patience
from pmemfs.fuse.published import PublishedTables, Publisher
from pmemfs.fuse.raw import Handler
from pmemfs.fuse.raw_block import RawBlock
from pmemfs.fuse.raw_filesystem import RawFileSystem
from pmemfs.fuse.trimming import Trimmer
from pmemfs.media.label import Mode
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.pool import Pool
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.linear import LinearVolume

EngineT_co = TypeVar("EngineT_co", bound=Engine, covariant=True)


def _nothing() -> None:
    """There is nothing to do."""


def _no_more() -> bool:
    """There was nothing to do, and is nothing."""
    return False


@dataclass(frozen=True)
class Content(Generic[EngineT_co]):
    """What is served."""

    engine: EngineT_co
    operations: pyfuse3.Operations
    trimmer: Trimmer
    raw: Mapping[int, Handler] = field(default_factory=dict)
    """Answers that need no pyfuse3, by opcode."""
    fs: FileSystem | None = None
    """In mode `fs`."""
    device_name: str | None = None
    """The file of mode `block`."""
    show_growth: Callable[[], None] = _nothing
    """To be called when the pool's zones have become larger."""
    tidy: Callable[[], bool] = _no_more
    """To be called every second or so while it is served; whether to `go_on` soon. Raises OSError
    and PmemfsError."""
    go_on: Callable[[], bool] = _no_more
    """To be called until it says that there is no more. Raises as `tidy`."""
    end: Callable[[], None] = _nothing
    """To be called when nobody is served any more, before the pool is clean. Raises as `tidy`."""


def is_file_system(pool: Pool) -> bool:
    """Whether a pool has files, and not one device."""
    return pool.label.mode == Mode.FS


def python_content(
    pool: Pool, medium: MappedMedium, memmap: Memmap, options: MountOptions
) -> Content[Engine]:
    """What the python engine serves. Raises PmemfsError."""
    if is_file_system(pool):
        fs = FileSystem(pool, memmap)
        return _files(pool, medium, fs, Engine(medium, memmap), None, options)
    volume = LinearVolume(pool)
    engine = PythonEngine(medium, memmap, volume)
    operations = BlockOperations(engine, volume, options, pool.label.created_ns)

    def show_growth() -> None:
        volume.look_again()
        operations.look_again()

    trimmer = Trimmer(pool, medium, engine, None)
    return Content(engine, operations, trimmer, device_name=volume.name, show_growth=show_growth)


def native_content(
    pool: Pool,
    medium: MappedMedium,
    memmap: Memmap,
    options: MountOptions,
    shared: SharedMemory,
) -> Content[SharedEngine]:
    """What is served behind a data plane. Raises PmemfsError."""
    if is_file_system(pool):
        tables = PublishedTables(shared)
        fs = FileSystem(pool, memmap, tables)
        return _files(pool, medium, fs, SharedEngine(pool, medium, memmap, shared), tables, options)
    volume = LinearVolume(pool)
    engine = NativeEngine(pool, medium, memmap, volume, shared)
    engine.publish()
    operations = BlockOperations(engine, volume, options, pool.label.created_ns)

    def show_growth() -> None:
        volume.look_again()
        engine.publish()
        operations.look_again()

    return Content(
        engine,
        operations,
        Trimmer(pool, medium, engine, None),
        RawBlock(engine, read_only=options.read_only).handlers(),
        device_name=volume.name,
        show_growth=show_growth,
    )


EngineT = TypeVar("EngineT", bound=Engine)


def _files(
    pool: Pool,
    medium: MappedMedium,
    fs: FileSystem,
    engine: EngineT,
    tables: PublishedTables | None,
    options: MountOptions,
) -> Content[EngineT]:
    """All files; `tables` is what a data plane is shown, if there is one."""
    publisher = Publisher(fs, tables) if tables else None
    fs.note_accesses(options.access_times, of_directories=not options.nodiratime)
    if tables:
        tables.note_reads(AccessTimes.NEVER if fs.read_only else options.access_times)
    files = OpenFiles(fs, engine, publisher, cached=options.cached)
    patience = Patience(fs)
    trimmer = Trimmer(pool, medium, engine, fs)
    raw = RawFileSystem(fs, files, tables.attributes, patience, trimmer) if tables else None
    return Content(
        engine,
        FileSystemOperations(fs, files, patience),
        trimmer,
        raw.handlers() if raw else {},
        fs,
        show_growth=fs.grow,
        tidy=fs.tidy,
        go_on=fs.go_on,
        end=fs.end,
    )
