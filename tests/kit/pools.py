"""Small pools and media for tests that mount nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kit.sources import sparse_file
from pmemfs.media.label import Label, Scheme, pack, validate
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES
from pmemfs.medium.base import Medium
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from typing_extensions import Buffer

SMALL_BYTES = 64 * KIB

SCHEMES = tuple(Scheme)
POOL_BYTES = {4 * KIB: 300 * MIB, 2 * MIB: GIB, GIB: 5 * GIB}
"""For each page size, a pool of several sections and stretches; sparse, so it costs nothing."""


class MemoryMedium(RecordingMedium):
    """A recording medium that records nothing, for tests that need many of them."""

    def store(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._memory[offset_bytes : offset_bytes + len(view)] = view


def small_spec(scheme: Scheme = Scheme.PMEM, name: str = "small") -> PoolSpec:
    """A pool of 4 KiB pages that fits into a few of them."""
    return PoolSpec(name=name, alignment_bytes=4 * KIB, scheme=scheme)


def small_pool(scheme: Scheme = Scheme.PMEM, size_bytes: int = SMALL_BYTES) -> Pool:
    """A new pool on a recording medium."""
    return Pool.create(RecordingMedium(bytes(size_bytes)), small_spec(scheme))


def some_label(scheme: Scheme = Scheme.PMEM, **changes: object) -> Label:
    """A valid label, of a small pool."""
    return replace(small_pool(scheme).label, checksum=0, **changes)  # type: ignore[arg-type]


def older_label(label: Label) -> Label:
    """The label that the first programs wrote for such a pool, with the memmap in front."""
    zones = replace(label, incompatible_features=0).zones
    return replace(
        label,
        checksum=0,
        incompatible_features=0,
        memmap_offset_bytes=zones.memmap.offset_bytes,
        memmap_size_bytes=zones.memmap.size_bytes,
        data_offset_bytes=zones.data.offset_bytes,
        data_size_bytes=zones.data.size_bytes,
    )


def make_older(medium: Medium) -> None:
    """Make a new pool one that the first programs have made."""
    raw = pack(older_label(Pool.open(medium).label))
    for offset_bytes in (0, medium.size_bytes - LABEL_BYTES):
        medium.store(offset_bytes, raw)


def content(medium: Medium) -> bytes:
    """All bytes of a medium."""
    return bytes(medium.read(0, medium.size_bytes))


def copies(image: bytes) -> tuple[Label, Label]:
    """Both copies of the label of a pool that fills an image; each must be valid."""
    return validate(image[:LABEL_BYTES]), validate(image[-LABEL_BYTES:])


@contextmanager
def mapped_pool(
    directory: Path, scheme: Scheme, page_size_bytes: int, size_bytes: int | None = None
) -> Iterator[Pool]:
    """A new pool on a sparse file, mapped, with `begin_mount` done."""
    size_bytes = size_bytes or POOL_BYTES[page_size_bytes]
    path = sparse_file(directory / f"{scheme.word}-{page_size_bytes}-{size_bytes}", size_bytes)
    medium = MappedMedium.open(str(path))
    spec = PoolSpec(
        name="mapped",
        page_size_bytes=page_size_bytes,
        alignment_bytes=max(page_size_bytes, 2 * MIB),
        scheme=scheme,
    )
    try:
        pool = Pool.create(medium, spec)
        pool.begin_mount()
        yield pool
    finally:
        medium.close()
        path.unlink()
