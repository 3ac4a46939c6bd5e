"""What the planes of a mount share, made for its pool; the data plane itself knows no pools."""

from __future__ import annotations

from pmemfs.dataplane.layouts import MemmapPlace
from pmemfs.dataplane.memmap import SharedMemmap
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap, NoMemmap, effective_scheme
from pmemfs.pool import Pool
from pmemfs.pool.pool import random_word

_PLACES = {
    Scheme.PMEM: MemmapPlace.POOL,
    Scheme.ON_DEMAND: MemmapPlace.SHARED,
    Scheme.NONE: MemmapPlace.NOWHERE,
}


def share_pool(
    pool: Pool, *, worker_count: int, has_files: bool = False, cache_set_count: int = 0
) -> SharedMemory:
    """New shared memory for a mount of a pool; see `SharedMemory`."""
    return SharedMemory.create(
        pool.medium,
        pool.page_geometry,
        generation=pool.label.generation,
        mount_identity=random_word(),
        memmap_offset_bytes=pool.zones.memmap.offset_bytes,
        memmap_place=_PLACES[effective_scheme(pool)],
        worker_count=worker_count,
        has_files=has_files,
        cache_set_count=cache_set_count,
    )


def share_memmap(pool: Pool, medium: MappedMedium, shared: SharedMemory) -> Memmap:
    """As `pmemfs.memmap.open_memmap`, for a mount that the data plane serves."""
    if shared.memmap_place is MemmapPlace.NOWHERE:
        return NoMemmap()
    return SharedMemmap(
        medium, shared, pool.page_geometry, pool.label.generation, pool.zones.memmap
    )
