"""Random operations on a cache against an oracle: what is read, and what the origin has in the end.

The cache is small, so sets are full and blocks are evicted all the time, and the origin is a real
file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.caches import fsync, make_cache, new_origin, opened_pool, punch, read, served_cache, write
from pmemfs.media.cache import Policy
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache.methods import CacheMethods
from pmemfs.volume.cache.volume import CacheVolume

POOL_BYTES = 2 * MIB + 640 * KIB
SIZE_BYTES = MIB + 512
"""The last block reaches beyond the end."""

OFFSETS = st.integers(0, SIZE_BYTES - 1)
LENGTHS = st.one_of(st.integers(1, 9000), st.sampled_from([512, 4096, 65_536]))
RANGES = st.tuples(OFFSETS, LENGTHS)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), RANGES, st.integers(1, 255)),
        st.tuples(st.just("read"), RANGES),
        st.tuples(st.just("both"), RANGES, RANGES, st.integers(1, 255)),
        st.tuples(st.just("punch"), RANGES),
        st.tuples(st.just("policy"), st.sampled_from([*Policy][:3])),
        st.tuples(st.just("fsync")),
        st.tuples(st.just("flush")),
        st.tuples(st.just("drop")),
        st.tuples(st.just("verify")),
        st.tuples(st.just("remount")),
        st.tuples(st.just("crash")),
    ),
    max_size=25,
)


class Oracle:
    """What the file must hold."""

    def __init__(self, origin: Path) -> None:
        self.origin = origin
        self.bytes = bytearray(origin.read_bytes())

    async def do(self, volume: CacheVolume, name: str, *given: Any) -> None:
        """Do an operation to both, and compare."""
        if name in ("write", "both"):
            (offset, length), value = given[0], given[-1]
            length = min(length, SIZE_BYTES - offset)
            async with trio.open_nursery() as nursery:
                if name == "both":
                    nursery.start_soon(read, volume, *given[1])
                assert await write(volume, offset, bytes([value]) * length) == length
            self.bytes[offset : offset + length] = bytes([value]) * length
        elif name == "read":
            offset, length = given[0]
            assert await read(volume, offset, length) == self.bytes[offset : offset + length]
        elif name == "punch":
            offset, length = given[0]
            length = min(length, SIZE_BYTES - offset)
            await punch(volume, offset, length)
            self.bytes[offset : offset + length] = bytes(length)
        elif name == "policy":
            await volume.change_settings(policy=given[0])
        elif name == "fsync":
            await fsync(volume)
        elif name == "flush":
            await CacheMethods(volume).flush()
            assert self.origin_bytes() == self.bytes
        elif name == "drop":
            await CacheMethods(volume).drop()
        elif name == "verify":
            assert (await CacheMethods(volume).verify())["differing"] == 0

    def origin_bytes(self) -> bytes:
        """What the origin has."""
        return self.origin.read_bytes()


def lives(operations: list[tuple[Any, ...]]) -> list[tuple[list[tuple[Any, ...]], bool]]:
    """The operations of each mount, and whether it is killed in the end."""
    found: list[tuple[list[tuple[Any, ...]], bool]] = [([], False)]
    for operation in operations:
        if operation[0] in ("remount", "crash"):
            found[-1] = found[-1][0], operation[0] == "crash"
            found.append(([], False))
        else:
            found[-1][0].append(operation)
    return found


@settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    operations=OPERATIONS, block_shift=st.sampled_from([12, 14]),
    kind=st.sampled_from(["memory", "sparse", "disk"]), is_native=st.booleans(),
)  # fmt: skip
def test_a_cache_and_its_origin_hold_what_was_written(
    operations: list[tuple[Any, ...]], block_shift: int, kind: str, is_native: bool
) -> None:
    # A pool on a disk needs msync for its fences.
    with tempfile.TemporaryDirectory(dir=None if kind == "disk" else "/dev/shm") as name:
        directory = Path(name)
        origin = new_origin(directory / "origin", SIZE_BYTES, seed=b"o")
        oracle = Oracle(origin)
        pool_path = directory / "pool"
        make_cache(pool_path, str(origin), pool_bytes=POOL_BYTES, block_shift=block_shift,
                   sparse=kind == "sparse")  # fmt: skip

        async def live(some: list[tuple[Any, ...]], is_killed: bool) -> None:
            with opened_pool(pool_path) as pool:
                async with served_cache(pool, is_killed=is_killed, is_native=is_native) as volume:
                    for operation in some:
                        await oracle.do(volume, *operation)

        for some, is_killed in lives(operations):
            trio.run(live, some, is_killed)
        trio.run(live, [("flush",)], False)
        assert oracle.origin_bytes() == oracle.bytes
