"""A pool is a medium with a label: here it is created, opened, mounted, grown and checked."""

from __future__ import annotations

from pmemfs.pool.pool import Pool, PoolSpec

__all__ = ["Pool", "PoolSpec"]
