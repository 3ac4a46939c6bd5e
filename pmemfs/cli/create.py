"""`pmemfs create`: label a file or device as a pool. Never overwrites without --force."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import click

from pmemfs.cli.cache_making import BLOCK_SIZES, CacheWish, cache_wish, check_wish, in_words, make
from pmemfs.cli.cache_settings import settings_options
from pmemfs.cli.options import OneOf, reporting
from pmemfs.cli.output import note, print_json, say, warn
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import BadGeometry, HasContent, NoSuchSource
from pmemfs.media.label import Mode, Scheme, check_name
from pmemfs.media.zones import (
    DEFAULT_ALIGNMENT_BYTES,
    PAGE_SIZES_BYTES,
    compute_zones,
)
from pmemfs.medium.locking import open_locked
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import (
    Source,
    SourceKind,
    check_device,
    check_link,
    check_path,
    identify,
    known_content,
    make_empty,
    make_file,
)
from pmemfs.observe.pool import pool_info
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool, PoolSpec
from pmemfs.pool.labels import read_labels
from pmemfs.units import MIB, format_size, parse_size
from pmemfs.unsaid import json_values
from pmemfs.volume.fs.filesystem import FileSystem

_PAGE_SIZES = dict(zip(("4K", "2M", "1G"), PAGE_SIZES_BYTES, strict=True))
_SCHEMES = {scheme.word: scheme for scheme in Scheme}
_MODES = {mode.word: mode for mode in (Mode.BLOCK, Mode.FS, Mode.CACHE)}
_MODES_ELSEWHERE = {
    "device": "block", "blk": "block", "sector": "block", "raw": "block",
    "file": "fs", "files": "fs", "filesystem": "fs", "file-system": "fs", "fsdax": "fs",
    "caching": "cache", "write-back": "cache", "writeback": "cache",
}  # fmt: skip
_SCHEMES_ELSEWHERE = {
    "dev": "pmem", "pool": "pmem", "media": "pmem",
    "mem": "on-demand", "dram": "on-demand", "ram": "on-demand", "memory": "on-demand",
    "off": "none", "no": "none",
}  # fmt: skip
_PAGE_SIZES_WRITTEN = {
    written: word
    for word, size_bytes in _PAGE_SIZES.items()
    for written in (word.lower(), f"{word.lower()}b", f"{word.lower()}ib", str(size_bytes))
}
_BLOCK_SIZES_WRITTEN = {
    written: word
    for word, size_bytes in BLOCK_SIZES.items()
    for written in (word.lower(), f"{word.lower()}b", f"{word.lower()}ib", str(size_bytes))
}
_WORDS = {Mode.BLOCK: "a block device", Mode.FS: "a file system", Mode.CACHE: "a cache"}


@click.command()
@click.argument("path", type=ANY_PATH)
@click.option("--size", metavar="SIZE", help="Size of the file, such as 4G; devices have theirs.")
@click.option(
    "--mode",
    type=OneOf(list(_MODES), elsewhere=_MODES_ELSEWHERE),
    default=Mode.BLOCK.word,
    show_default=True,
    help="What the pool serves: one device as large as it, files and directories, or an --origin.",
)
@click.option(
    "--scheme",
    type=OneOf(list(_SCHEMES), elsewhere=_SCHEMES_ELSEWHERE),
    default=Scheme.PMEM.word,
    show_default=True,
    help="Where page structures live: in the pool, in DRAM, or nowhere.",
)
@click.option(
    "--page-size",
    type=OneOf(list(_PAGE_SIZES), same=_PAGE_SIZES_WRITTEN),
    default="4K",
    show_default=True,
    help="What one page structure covers.",
)
@click.option("--align", metavar="SIZE", help="Alignment of the data.  [default: 2M or a page]")
@click.option("--name", help="Name of the pool and its volume.  [default: the file's name]")
@click.option("--sparse", is_flag=True, help="Take memory only when it is written to.")
@click.option("--force", is_flag=True, help="Overwrite whatever is there.")
@click.option(
    "--origin",
    metavar="ORIGIN",
    help="What a cache stands before: a file, a block device, an nbd:// URI, or rbd:POOL/IMAGE.",
)
@click.option(
    "--block-size",
    type=OneOf(list(BLOCK_SIZES), same=_BLOCK_SIZES_WRITTEN),
    help="Of a cache.  [default: 4K]",
)
@settings_options
@reporting
def create(
    path: str,
    size: str | None,
    mode: str,
    scheme: str,
    page_size: str,
    align: str | None,
    name: str | None,
    sparse: bool,
    force: bool,
    origin: str | None,
    block_size: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a pool of a file or a device.

    PATH is a file, an existing or a new one, /dev/daxX.Y or /dev/pmemN.

    A pool of mode cache stands before an origin, which is larger and slower: its mount has one file
    as large as the origin, and the pool has what is used of it. The policy of a pool that keeps its
    content without power is write-back, and of any other write-through, unless --policy says
    something else; 'pmemfs cache set' changes all this later. The origin is only read.
    """
    page_size_bytes = _PAGE_SIZES[page_size]
    spec = PoolSpec(
        name=name if name is not None else os.path.basename(os.path.abspath(path)),
        page_size_bytes=page_size_bytes,
        alignment_bytes=parse_size(align)
        if align is not None
        else max(DEFAULT_ALIGNMENT_BYTES, page_size_bytes),
        scheme=_SCHEMES[scheme],
        mode=_MODES[mode],
    )
    check_name(spec.name)
    wanted_bytes = parse_size(size) if size is not None else None
    size_bytes = _size_bytes(path, wanted_bytes)
    wish = cache_wish(path, spec, origin, block_size, settings)
    _check_fits(spec, size_bytes, wanted_bytes, wish)
    note(f"{path}: {format_size(size_bytes)}, aligned to {format_size(spec.alignment_bytes)}")
    with _made_source(path, size_bytes, sparse=sparse, force=force) as medium:
        note(f"{path}: {medium.source.kind.value}, durable by {medium.durability.value}")
        pool = Pool.create(medium, spec)
        if spec.mode is Mode.FS:
            FileSystem.format(pool, uid=os.geteuid(), gid=os.getegid())
        cache = make(wish, pool, medium) if wish else None
        if medium.source.warning:
            warn(medium.source.warning)
        report = pool_info(pool, medium)
    if as_json:
        print_json(json_values(report) | ({"cache": asdict(cache)} if cache else {}))
    else:
        pages = f"{report.page_count} pages of {page_size}, page structures: {report.scheme}"
        words = in_words(cache) if cache else f"{_WORDS[spec.mode]}: {pages}"
        say(f"pool '{report.name}' of {format_size(report.size_bytes)} on {path}, {words}")


def _size_bytes(path: str, wanted_bytes: int | None) -> int:
    """The size of the pool. Raises NoSuchSource, UnusableSource and BadGeometry."""
    check_path(path)
    if not os.path.exists(path):
        check_device(path)
        check_link(path)
        if wanted_bytes is None:
            raise NoSuchSource(path=path, why="no such file; --size says how large to make it")
        return wanted_bytes & -FRAME_BYTES
    source = identify(path)
    if wanted_bytes is None or wanted_bytes == source.size_bytes:
        return source.size_bytes
    actual = format_size(source.size_bytes)
    if source.kind.is_device:
        raise BadGeometry(why=f"{path} is a device of {actual}; it can't have another --size")
    if wanted_bytes < source.size_bytes:
        raise BadGeometry(why=f"{path} has {actual}; --size can make it larger, not smaller")
    return wanted_bytes & -FRAME_BYTES


def _check_fits(
    spec: PoolSpec, size_bytes: int, asked_bytes: int | None, wish: CacheWish | None
) -> None:
    """Refuse an impossible geometry before anything is touched. Raises BadGeometry."""
    zones = compute_zones(
        size_bytes,
        page_size_bytes=spec.page_size_bytes,
        alignment_bytes=spec.alignment_bytes,
        memmap_in_pool=spec.scheme is Scheme.PMEM,
        memmap_behind_data=True,
        asked_bytes=asked_bytes,
    )
    if wish:
        check_wish(wish, zones.data.size_bytes)


@contextmanager
def _made_source(
    path: str, size_bytes: int, *, sparse: bool, force: bool
) -> Iterator[MappedMedium]:
    """The source at its full size, locked from before its content is looked at.

    What goes wrong, here or inside, leaves no file that was not there before, and none larger.
    """
    is_new = not os.path.exists(path)
    if is_new:
        make_empty(path)
    with _locked(path) as fd:
        # Looked at again: until the lock was ours, another `create` may have made a pool of it.
        source = identify(path)
        old_size_bytes = os.fstat(fd).st_size
        try:
            if not force:
                _refuse_content(source, fd)
            if not source.kind.is_device:
                make_file(path, size_bytes, sparse=sparse)
            with closing(MappedMedium(identify(path), locked_fd=os.dup(fd))) as medium:
                yield medium
        except BaseException:
            if is_new and old_size_bytes == 0:
                os.unlink(path)
            elif not source.kind.is_device:
                os.truncate(fd, old_size_bytes)
            raise


@contextmanager
def _locked(path: str) -> Iterator[int]:
    fd = open_locked(identify(path))
    try:
        yield fd
    finally:
        os.close(fd)


def _refuse_content(source: Source, fd: int) -> None:
    """Raise HasContent where something would be lost."""
    found = _label_found(source, fd)
    if not found and source.kind is not SourceKind.DAX_DEVICE:
        found = known_content(source.path)
    found = found or _data_found(source, fd)
    if found:
        raise HasContent(path=source.path, found=found)


def _label_found(source: Source, fd: int) -> str:
    if source.size_bytes == 0:
        return ""
    with closing(MappedMedium(source, locked_fd=os.dup(fd))) as medium:
        for reading in read_labels(medium):
            if reading.label:
                pool_uuid = uuid.UUID(bytes=reading.label.uuid)
                return f"the pmemfs pool '{reading.label.name}' (uuid {pool_uuid})"
    return ""


def _data_found(source: Source, fd: int) -> str:
    """What is not zero in the first and last MiB, and behind the last whole 4 KiB."""
    if not source.kind.is_device and any(os.pread(fd, FRAME_BYTES, source.size_bytes)):
        return "data (not only zeroes) at its end"
    if source.size_bytes == 0:
        return ""
    edge_bytes = min(MIB, source.size_bytes)
    with closing(MappedMedium(source, locked_fd=os.dup(fd))) as medium:
        for where, offset_bytes in (("first", 0), ("last", source.size_bytes - edge_bytes)):
            if any(medium.read(offset_bytes, edge_bytes)):
                return f"data (not only zeroes) in its {where} MiB"
    return ""
