"""A medium with a label on it: created, opened, mounted, grown, checked."""

from __future__ import annotations

from pmemfs.pool.pool import Pool, PoolSpec

__all__ = ["Pool", "PoolSpec"]
