"""What `create` needs to know to make a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pmemfs.cli.cache_settings import as_option
from pmemfs.cli.output import note, warn
from pmemfs.errors import BadGeometry, BadUsage, NoPageStructures
from pmemfs.media.cachereport import StoredCache
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.base import Durability, Medium
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import format_size

# Who makes a pool of another mode waits for nothing of this.
if TYPE_CHECKING:
    from pmemfs.volume.cache.making import OriginFacts

BLOCK_SIZES = {f"{1 << shift - 10}K": 1 << shift for shift in (12, 13, 14, 15, 16)}
_DEFAULT_BLOCK_SIZE = "4K"


class CacheWish(NamedTuple):
    """A cache that is to be made."""

    facts: OriginFacts
    block_bytes: int
    policy: str | None
    settings: dict[str, int]


def cache_wish(
    path: str, spec: PoolSpec, origin: str | None, block_size: str | None,
    settings: dict[str, Any],
) -> CacheWish | None:  # fmt: skip
    """What a command line wants; None in another mode. The origin was looked at.

    Raises BadUsage, BadGeometry, NoPageStructures, and as `look_at_origin`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if spec.mode is not Mode.CACHE:
        names = [as_option(name) for name in given]
        names += ["--block-size"] if block_size is not None else []
        names = ["--origin", *names] if origin is not None else names
        if names:
            raise BadUsage(why=f"{names[0]} is for caches: give --mode cache, too")
        return None
    if origin is None:
        raise BadUsage(why="a cache stands before something: name it by --origin, a file, a block "
                       "device, an nbd:// URI or rbd:POOL/IMAGE")  # fmt: skip
    if spec.scheme is Scheme.NONE:
        raise NoPageStructures(what="mode cache")
    if spec.page_size_bytes != FRAME_BYTES:
        raise BadGeometry(why="a cache has one page structure for each page of 4K; --block-size "
                          "makes its blocks larger")  # fmt: skip
    import trio

    from pmemfs.volume.cache.making import look_at_origin, refuse_itself

    refuse_itself(origin, path)
    policy = given.pop("policy", None)

    async def look() -> OriginFacts:
        return await look_at_origin(origin, read_only=policy == "read-only", say=warn)

    facts = trio.run(look)
    note(f"{facts.origin}: {format_size(facts.origin_bytes)}, {facts.origin_identity}")
    return CacheWish(facts, BLOCK_SIZES[block_size or _DEFAULT_BLOCK_SIZE], policy, given)


def check_wish(wish: CacheWish, data_bytes: int) -> None:
    """Raise BadGeometry for a cache that does not fit, before anything is touched."""
    from pmemfs.volume.cache.making import check_fits

    check_fits(data_bytes, wish.block_bytes, wish.facts.origin_bytes)


def make(wish: CacheWish, pool: Pool, medium: Medium) -> StoredCache:
    """Make a cache of a new pool. Raises BadGeometry, DamagedCache and OSError."""
    from pmemfs.media.cache import Policy
    from pmemfs.volume.cache.making import make_cache

    is_lost = medium.durability is Durability.VOLATILE
    word = wish.policy or ("write-through" if is_lost else "write-back")
    policy = next(policy for policy in Policy if policy.word == word)
    if is_lost and policy is Policy.WRITE_BACK:
        warn("the pool is lost with the power, and with it what its origin lacks; write-through "
             "lets the origin have every write")  # fmt: skip
    return make_cache(
        pool, wish.facts, block_bytes=wish.block_bytes, policy=policy, settings=wish.settings
    )


def in_words(cache: StoredCache) -> str:
    """What was made, behind the words of the pool."""
    places = format_size(cache.place_count * cache.block_bytes)
    return (
        f"a cache of {cache.origin} ({format_size(cache.origin_bytes)}): {places} in blocks of "
        f"{format_size(cache.block_bytes)}, {cache.settings.policy}"
    )
