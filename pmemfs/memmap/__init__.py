"""Page structures: one protocol, three schemes."""

from __future__ import annotations

from pmemfs.media.label import Scheme
from pmemfs.memmap.base import Access, Memmap
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool

__all__ = [
    "Access",
    "Memmap",
    "NoMemmap",
    "effective_scheme",
    "open_memmap",
]


def effective_scheme(pool: Pool) -> Scheme:
    """The scheme that a mount of the pool can use.

    A pool that is open for reading has no room for page structures that change, so its mount keeps
    them in DRAM.
    """
    if pool.medium.read_only and pool.scheme is Scheme.PMEM:
        return Scheme.ON_DEMAND
    return pool.scheme


def open_memmap(pool: Pool) -> Memmap:
    """The page structures of a mounted pool; `begin_mount` must have been called before.

    They are for a process that alone writes them. The structures that a data plane shares are in
    `dataplane.memmap`.
    """
    # Imported here, because these load numpy, and the native engine's daemon needs neither.
    from pmemfs.memmap.on_demand import OnDemandMemmap
    from pmemfs.memmap.pmem import PmemMemmap

    match effective_scheme(pool):
        case Scheme.PMEM:
            zone = pool.zones.memmap
            return PmemMemmap(pool.page_geometry, pool.label.generation, pool.medium, zone)
        case Scheme.ON_DEMAND:
            return OnDemandMemmap(pool.page_geometry, pool.label.generation)
        case Scheme.NONE:
            return NoMemmap()
