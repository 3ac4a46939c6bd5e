"""How a pool becomes a cache: its origin is looked at before anything is written.

Invariant: the pool that is made says of its origin what the next mount will find. So the origin is
fenced while it is looked at: nobody else has it, and nobody has written to it meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from pmemfs.errors import BadGeometry, BadOrigin, UnusableOrigin
from pmemfs.media.cache import BLOCK, HEAD, CacheHead, Policy, set_count_of
from pmemfs.media.cachereport import CacheSettings, StoredCache
from pmemfs.origin.blocks import loop_devices_over
from pmemfs.origin.naming import FileName, parse_origin
from pmemfs.pool import Pool
from pmemfs.units import MIB, format_size
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.opening import identity_text

DEFAULTS = {
    "max_dirty_percent": 50,
    "max_dirty_age_seconds": 30,
    "origin_timeout_seconds": 30,
    "read_ahead_bytes": MIB,
    "bypass_bytes": 0,
}
"""The settings of a new cache, but for its policy."""


class OriginFacts(NamedTuple):
    """What a cache says of its origin."""

    origin: str
    origin_bytes: int
    origin_identity: str
    origin_mark: bytes


async def look_at_origin(text: str, *, read_only: bool, say: Callable[[str], None]) -> OriginFacts:
    """Open an origin, and let it go again; `say` is told what this waits for.

    Raises BadOrigin, NeedsPackage, UnusableOrigin, OriginBusy, OriginGone and OSError.
    """
    # Imported here, because who makes another pool waits for no trio.
    from pmemfs.origin.opening import open_origin
    from pmemfs.volume.cache.link import OriginLink, watched

    _check_can_be_stored(text)
    origin = await open_origin(text, read_only=read_only)
    try:
        if not read_only:
            await origin.fence(say)
        link = OriginLink(origin, timeout_seconds=DEFAULTS["origin_timeout_seconds"])
        async with watched(link):
            return OriginFacts(
                origin.name,
                origin.size_bytes,
                identity_text(await origin.identity()),
                await link.mark(),
            )
    finally:
        await origin.close()


def _check_can_be_stored(text: str) -> None:
    """Raise BadOrigin for a name that the head of a cache can't keep."""
    name, most = parse_origin(text).text, HEAD.room_of("origin")
    if not name.isprintable():
        raise BadOrigin(text=text, why="its name contains characters that can't be printed")
    if (length := len(name.encode())) > most:
        raise BadOrigin(text=text, why=f"a pool keeps {most} bytes of a name, and this one has "
                        f"{length}; a symbolic link can be a shorter one")  # fmt: skip


def refuse_itself(text: str, pool_path: str) -> None:
    """Raise UnusableOrigin if a text names the pool, and BadOrigin if it names nothing."""
    name = parse_origin(text)
    if not isinstance(name, FileName) or not os.path.exists(pool_path):
        return
    if not os.path.exists(name.path):
        return
    if os.path.samefile(name.path, pool_path):
        raise UnusableOrigin(name=name.text, why="it is the pool itself")
    if os.path.realpath(name.path) in loop_devices_over(os.stat(pool_path)):
        raise UnusableOrigin(name=name.text, why="behind it is the pool itself")


def check_fits(data_bytes: int, block_bytes: int, origin_bytes: int) -> None:
    """Raise BadGeometry where a cache of such blocks can't stand before such an origin."""
    shift = block_bytes.bit_length() - 1
    if not set_count_of(data_bytes, shift):
        raise BadGeometry(
            why=f"the pool is too small for a cache: of its {format_size(data_bytes)} for data "
            f"not even one set of blocks of {format_size(block_bytes)} is left"
        )
    if origin_bytes > BLOCK.mask + 1 << shift:
        raise BadGeometry(
            why=f"with blocks of {format_size(block_bytes)} an origin of "
            f"{format_size(origin_bytes)} is too large: take a larger --block-size"
        )


def make_cache(
    pool: Pool, facts: OriginFacts, *, block_bytes: int, policy: Policy, settings: dict[str, int]
) -> StoredCache:
    """Make a cache of a new pool. Raises BadGeometry, DamagedCache and OSError."""
    fields: dict[str, Any] = DEFAULTS | settings | facts._asdict()
    head = CacheHead(block_shift=block_bytes.bit_length() - 1, policy=policy, **fields)
    StoredHead.create(pool, head)
    return stored_cache(pool)


def stored_cache(pool: Pool) -> StoredCache:
    """What the head of a cache says. Raises DamagedCache."""
    stored = StoredHead.open(pool)
    head = stored.head
    return StoredCache(
        block_bytes=1 << head.block_shift,
        place_count=stored.ground.place_count,
        settings=CacheSettings(
            Policy(head.policy).word, head.max_dirty_percent, head.max_dirty_age_seconds,
            head.origin_timeout_seconds, head.read_ahead_bytes, head.bypass_bytes,
        ),
        origin=head.origin,
        origin_identity=head.origin_identity,
        origin_bytes=head.origin_bytes,
        dirty=head.dirty_blocks if head.is_settled else None,
    )  # fmt: skip
