"""What the daemon of a mounted cache answers on its socket, beside what every daemon does.

cache-info                            CacheReport
cache-set    fields of CacheSettings  CacheSettings, as they are now
cache-flush                           Flushed
cache-drop   ranges, keeps dirty      Dropped
cache-verify ranges                   Verified
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import trio

from pmemfs.errors import BadSetting, CannotFlush, CannotVerify, sentence_of
from pmemfs.media.cache import Policy, TagState
from pmemfs.media.cachereport import MOST_DIFFERING, Dropped, Flushed, Verified
from pmemfs.memmap.base import Access
from pmemfs.text import counted
from pmemfs.units import MIB
from pmemfs.volume.cache.blocks import runs_of
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.volume import CacheVolume

_AT_ONCE = 64
_POLICIES = {policy.word: policy for policy in Policy}
_LIMITS = {
    "max_dirty_percent": (1, 100),
    "max_dirty_age_seconds": (0, (1 << 32) - 1),
    "origin_timeout_seconds": (1, (1 << 32) - 1),
    "read_ahead_bytes": (0, 16 * MIB),
    "bypass_bytes": (0, (1 << 64) - 1),
}
"""The least and the greatest value of each setting that is a number."""


class CacheMethods:
    """The methods of one mounted cache."""

    def __init__(self, volume: CacheVolume) -> None:
        self._volume = volume

    def methods(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """All of them, by name."""
        return {
            "cache-info": self.info,
            "cache-set": self.set,
            "cache-flush": self.flush,
            "cache-drop": self.drop,
            "cache-verify": self.verify,
        }

    async def info(self) -> dict[str, Any]:
        """The figures."""
        return asdict(self._volume.statistics())

    async def set(
        self, policy: str | None = None, max_dirty_percent: int | None = None,
        max_dirty_age_seconds: int | None = None, origin_timeout_seconds: int | None = None,
        read_ahead_bytes: int | None = None, bypass_bytes: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Change what is given. Raises BadSetting and OSError."""
        numbers = {
            "max_dirty_percent": max_dirty_percent,
            "max_dirty_age_seconds": max_dirty_age_seconds,
            "origin_timeout_seconds": origin_timeout_seconds,
            "read_ahead_bytes": read_ahead_bytes,
            "bypass_bytes": bypass_bytes,
        }
        changes = {name: value for name, value in numbers.items() if value is not None}
        for name, value in changes.items():
            least, most = _LIMITS[name]
            if not least <= value <= most:
                raise BadSetting(name=name, why=f"{value} is not between {least} and {most}")
        if policy is not None:
            if policy not in _POLICIES:
                words = ", ".join(_POLICIES)
                raise BadSetting(name="policy", why=f"{policy!r} is none of {words}")
            changes["policy"] = int(_POLICIES[policy])
            origin = self._volume.origin_link.origin
            if origin is not None and origin.read_only and policy != Policy.READ_ONLY.word:
                why = ("the origin was opened for reading only; unmount the pool, set it then, "
                       "and mount the pool again")  # fmt: skip
                raise BadSetting(name="policy", why=why)
        if changes and self._volume.read_only:
            raise BadSetting(name=next(iter(changes)), why="it is mounted read-only")
        if changes:
            await self._volume.change_settings(**changes)
        return asdict(self._volume.settings())

    async def flush(self) -> dict[str, Any]:
        """Give the origin all that is dirty now. Raises CannotFlush."""
        volume = self._volume
        before = volume.index.cleaned
        try:
            await volume.errands.run(volume.write_backs.flush, is_long=True)
        except OSError as error:
            why, origin = sentence_of(error), volume.origin_link.origin
            if origin is not None and origin.read_only:
                why = ("it was opened for reading only, as the policy says; unmount the pool, and "
                       "flush it then")  # fmt: skip
            blocks = counted(volume.count_dirty(), "block", "blocks")
            raise CannotFlush(name=volume.head.head.origin, blocks=blocks, why=why) from None
        return asdict(Flushed(volume.index.cleaned - before, volume.count_dirty()))

    async def drop(
        self, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Forget the clean blocks of a range."""
        volume, dropped, kept = self._volume, 0, 0
        for founds in self._found(offset_bytes, length_bytes):
            kept += sum(found.tag.is_dirty for found in founds)
            clean = [found for found in founds if not found.tag.is_dirty]
            for at in range(0, len(clean), _AT_ONCE):
                some = clean[at : at + _AT_ONCE]
                results = await volume.fencing.run(lambda some=some: volume.index.clearing(some))  # type: ignore[misc]
                dropped += sum(results)
            await trio.lowlevel.checkpoint()
        return asdict(Dropped(dropped, kept))

    async def verify(
        self, offset_bytes: int = 0, length_bytes: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Compare the clean blocks of a range with the origin. Raises CannotVerify."""
        compared, differing = 0, 0
        first: list[int] = []
        shift = self._volume.blocks.shift
        for founds in self._found(offset_bytes, length_bytes):
            clean = sorted(f.tag.block for f in founds if f.tag.state is TagState.CLEAN)
            for start, count in runs_of(clean, MIB >> shift):
                blocks = list(range(start, start + count))
                try:
                    same = await self._volume.errands.run(partial(self._compare, blocks))
                except OSError as error:
                    name = self._volume.head.head.origin
                    raise CannotVerify(name=name, why=sentence_of(error)) from None
                for block, is_same in same.items():
                    compared += 1
                    if not is_same:
                        differing += 1
                        first = sorted([*first, block << shift])[:MOST_DIFFERING]
            await trio.lowlevel.checkpoint()
        return asdict(Verified(compared, differing, tuple(first)))

    async def _compare(self, blocks: list[int]) -> dict[int, bool]:
        """For each block that stays clean meanwhile, whether the origin has the same bytes."""
        volume = self._volume
        held: list[Found] = []
        try:
            for block in blocks:
                found = volume.index.hold(block, Access.PIN)
                if found:
                    held.append(found)
            theirs = await volume.misses.bring_past([found.tag.block for found in held])
            length = volume.blocks.block_bytes
            return {
                found.tag.block: volume.blocks.load_held(found, 0, length)
                == theirs[found.tag.block]
                for found in held
                if found.tag.state is TagState.CLEAN and volume.index.is_same(found)
            }
        finally:
            for found in held:
                volume.index.release(found)

    def _found(self, offset_bytes: int, length_bytes: int | None) -> Iterator[list[Found]]:
        """The tags of a range, some at a time; of its ends only blocks that lie whole in it."""
        volume = self._volume
        end = volume.size_bytes if length_bytes is None else offset_bytes + length_bytes
        end = min(end, volume.size_bytes)
        block_bytes, shift = volume.blocks.block_bytes, volume.blocks.shift
        first = -(-offset_bytes // block_bytes)
        stop = -(-end // block_bytes) if end == volume.size_bytes else end >> shift
        if first < stop:
            yield from volume.cached.within(first, stop - first)
