"""Arithmetic of the part `cache`: what is asked for, what exact LRU makes of it, and the tags of a
cache that has been in use for long."""

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pmemfs.media.cache import (
    BLOCK,
    MIX,
    MIX_PLACE,
    REGION_SHIFT,
    SET_BYTES,
    WAYS,
    Ground,
    TagState,
    ground_of,
)
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pool import Pool
from pmemfs.volume.cache.heads import newer_head, read_heads

Blocks = npt.NDArray[np.int64]
ZIPF_EXPONENT = 1.1
REGION_BLOCKS = 1 << REGION_SHIFT


def zipf_trace(block_count: int, length: int, seed: int) -> Blocks:
    """Numbers of blocks, the k-th most wanted one in proportion to 1 / k^1.1; the wanted ones lie
    anywhere."""
    rng = np.random.default_rng(seed)
    shares = np.cumsum(np.arange(1, block_count + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    ranks = np.searchsorted(shares, rng.random(length) * shares[-1])
    return rng.permutation(block_count)[ranks]


def lru_hits(trace: Iterable[int], places: int, warm: int) -> float:
    """The hit ratio of exact LRU with so many places, after the first `warm` requests."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = count = 0
    for number, block in enumerate(trace):
        is_held = block in held
        if is_held:
            held.move_to_end(block)
        else:
            held[block] = None
            if len(held) > places:
                held.popitem(last=False)
        if number >= warm:
            hits += is_held
            count += 1
    return hits / count


def write_iolog(path: Path, target: Path, blocks: Blocks, block_bytes: int = 4096) -> None:
    """The trace as reads that fio replays."""
    with path.open("w") as log:
        log.write(f"fio version 2 iolog\n{target} add\n{target} open\n")
        for block in blocks.tolist():
            log.write(f"{target} read {block * block_bytes} {block_bytes}\n")
        log.write(f"{target} close\n")


def plant_in_pool(path: Path, origin_bytes: int) -> int:
    """`plant_tags` for the blocks of an origin of that size, in a pool that was just made."""
    medium = MappedMedium.open(str(path), read_only=True)
    try:
        pool = Pool.open(medium)
        head = newer_head(read_heads(pool)).head
        assert head is not None
        ground = ground_of(head, pool.zones.data.offset_bytes)
    finally:
        medium.close()
    return plant_tags(path, ground, origin_bytes >> ground.block_shift + REGION_SHIFT)


def plant_tags(pool: Path, ground: Ground, region_count: int) -> int:
    """Tags of clean blocks in the first half of the sets, which are all free; how many were stored.

    A region of 512 blocks has sets side by side, so it is one step here. Each takes a way of its
    own, as far as there are any.
    """
    half, planted = ground.set_count // 2, 0
    tags = np.memmap(pool, np.uint64, "r+", ground.tags_offset, (half, SET_BYTES // 8))
    low_of_block = np.arange(REGION_BLOCKS, dtype=np.uint64) << np.uint64(BLOCK.shift)
    for region in range(region_count):
        first = ground.set_of(region << REGION_SHIFT)
        last = first + REGION_BLOCKS
        if last > half:
            continue
        way = region % WAYS
        start = np.uint64((region << REGION_SHIFT) << BLOCK.shift | TagState.CLEAN)
        low = low_of_block + start
        places = np.arange(first, last, dtype=np.uint64) * np.uint64(WAYS) + np.uint64(way)
        mixed = (low ^ (places ^ np.uint64(ground.seed)) * np.uint64(MIX_PLACE)) * np.uint64(MIX)
        tags[first:last, way] = (mixed >> np.uint64(48)) << np.uint64(48) | low
        planted += REGION_BLOCKS
    return planted
