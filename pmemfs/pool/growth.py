"""Grows a pool onto the end of its medium, in steps between which the power may fail.

    announce      the new copy of the label is written at the new end, where no reader looks yet
    clear         what becomes data reads as zeroes from now on
    commit        the old copy of the label, which becomes data too, is cleared; then the label in
                  front is written, and the pool has its new size

Invariants:
- at every instant the pool opens with its old size or its new one. Before the label in front is
  written, it says the old size. While it is being written and torn, the medium's end leads to the
  new copy. Afterwards both copies say the new size;
- a pool that opens with its new size reads as zeroes where nothing was written. Otherwise old page
  structures, or another user's bytes, would show up as data;
- the data zone starts where it did, so nothing that is stored moves;
- the new memmap zone has no page structure of a generation to come. A pool that is not mounted gets
  another random generation, as at `create`. A mounted pool keeps its generation, or gets the next
  one if a process of the mount has died, so its new zone is cleared.

An interrupted growth leaves a longer medium, with a label at its end that loses against the labels
of the pool.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

from pmemfs.errors import BadGeometry, CannotGrow, CannotShrink, NoSizeGiven
from pmemfs.media.label import Incompatible, Mode, Scheme, pack
from pmemfs.media.zones import LABEL_BYTES, Zone, Zones
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import identify
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool.pool import Pool, random_word
from pmemfs.ranges import Range, without
from pmemfs.units import align_up, format_size


@dataclass(frozen=True, slots=True)
class Grown:
    """The outcome of growing; the sizes are equal if there was nothing to do."""

    name: str
    old_bytes: int
    new_bytes: int


class Growth:
    """One growth of an open pool: its labels and zones."""

    def __init__(
        self, pool: Pool, size_bytes: int, unknown_end_bytes: int, *, is_mounted: bool = False
    ) -> None:
        """Plan a growth, and touch nothing. Raises CannotGrow, BadGeometry and InvalidLabel.

        Before `unknown_end_bytes` the medium may hold anything. What lies behind that is added to
        the medium, and is zero.
        """
        _check_order(pool)
        self._pool = pool
        self._is_mounted = is_mounted
        self._is_clean_behind = align_up(unknown_end_bytes, FRAME_BYTES)
        self.old = pool.zones
        generation = pool.label.generation if is_mounted else random_word()
        self._label = pool.grown_label(size_bytes, generation)
        self.new: Zones = self._label.zones
        assert self.new.data.offset_bytes == self.old.data.offset_bytes

    def run(self) -> None:
        """Do all steps, for a pool that is not mounted. Call `abandon` if this raises OSError."""
        self.announce()
        self.clear_data()
        self.commit()

    def announce(self) -> None:
        """See the module's docstring. Raises OSError, as all steps do."""
        pool, generation = self._pool, self._label.generation
        with pool.lock:
            if self._is_mounted:
                # It may be another one by now.
                generation = pool.label.generation
            pool.announce(pool.grown_label(self._label.pool_size_bytes, generation))

    def clear_data(self) -> None:
        """Clear what becomes data, except for the old copy of the label.

        Page structures that are in use must have been moved before. The old copy stays, because
        until `commit` it is what serves if the label in front is damaged.
        """
        self._clear(self._new_data(), [self.old.label_copy])

    def clear_memmap(self) -> None:
        """Clear the new memmap zone, except for what moving the page structures clears."""
        zone = self.new.memmap
        if zone.offset_bytes > self.new.data.offset_bytes:
            self._clear((zone.offset_bytes, zone.end_bytes), [self.old.memmap, self.old.label_copy])

    def commit(self) -> None:
        """See the module's docstring."""
        # This order: if the old copy were cleared after the label in front was written, a crash
        # between the two would leave a label in the data.
        copy = self.old.label_copy
        with self._pool.lock:
            # Nobody writes the old copy again in between.
            if copy.offset_bytes < self.new.data.end_bytes:
                self._pool.medium.clear(copy.offset_bytes, copy.size_bytes)
            self._pool.adopt()

    def abandon(self) -> bool:
        """Go back to the old size after a step that failed; whether the labels surely say it.

        If they may not, the medium must stay as large as it is now: a label may say the new size.
        """
        try:
            self._pool.rewrite()
        except OSError:
            # So that readers on this running machine see the old size. What a later one will find
            # is unknown.
            self._pool.medium.store(0, pack(self._pool.label))
            return False
        return True

    def _new_data(self) -> Range:
        return self.old.data.end_bytes, self.new.data.end_bytes

    def _clear(self, wanted: Range, kept: Iterable[Zone]) -> None:
        start, end = wanted
        taken = sorted((zone.offset_bytes, zone.end_bytes) for zone in kept if zone.size_bytes)
        for part_start, part_end in without([(start, min(end, self._is_clean_behind))], taken):
            self._pool.medium.clear(part_start, part_end - part_start)


def _check_order(pool: Pool) -> None:
    """Raise CannotGrow if page structures lie in front of the data."""
    is_behind = pool.label.incompatible_features & Incompatible.MEMMAP_BEHIND_DATA
    if pool.scheme is Scheme.PMEM and not is_behind:
        raise CannotGrow(
            path=pool.medium.name,
            why="its page structures lie in front of the data, as the first versions of pmemfs put "
            "them, and there is no room for more; copy the data to a new pool",
        )


def _check_keeps_no_size(pool: Pool) -> None:
    """Raise CannotGrow for a cache: where its tags and blocks lie follows from the pool's size, so
    in a larger pool they would all be lost."""
    if pool.label.mode == Mode.CACHE:
        raise CannotGrow(
            path=pool.medium.name,
            why="a cache keeps the size of its pool; for a larger one run 'pmemfs flush' and then "
            "'pmemfs create --force'; if its origin has grown, mount it and resize the mount",
        )


def target_bytes(pool: Pool, medium: MappedMedium, wanted_bytes: int | None) -> int:
    """The size that a pool should get, from what the user asked for and what its source is.

    Raises CannotShrink, BadGeometry, NoSizeGiven, and what `identify` raises.
    """
    old_bytes = pool.label.pool_size_bytes
    source = identify(medium.name)
    if wanted_bytes is not None and wanted_bytes & -FRAME_BYTES < old_bytes:
        raise CannotShrink(
            path=medium.name, size=format_size(old_bytes), wanted=format_size(wanted_bytes)
        )
    if wanted_bytes is None:
        if source.size_bytes <= old_bytes and not source.kind.is_device:
            raise NoSizeGiven(path=medium.name, size=format_size(old_bytes))
        return max(source.size_bytes, old_bytes)
    wanted_bytes &= -FRAME_BYTES
    actual = format_size(source.size_bytes)
    if wanted_bytes not in (old_bytes, source.size_bytes):
        if source.kind.is_device:
            raise BadGeometry(
                why=f"{medium.name} is a device of {actual}; a pool on it can't have another --size"
            )
        if wanted_bytes < source.size_bytes:
            raise BadGeometry(
                why=f"{medium.name} has {actual}; --size can make it larger, not smaller"
            )
    return wanted_bytes


def unknown_end_bytes(medium: MappedMedium, size_bytes: int) -> int:
    """The offset up to which the medium, once it has this size, may hold anything."""
    if medium.source.kind.is_device:
        return size_bytes
    return align_up(os.fstat(medium.fileno()).st_size, FRAME_BYTES)


def grow_unmounted(path: str, wanted_bytes: int | None) -> Grown:
    """Grow the pool on a path, which is not mounted.

    Raises as `target_bytes`, `Pool.open` and `MappedMedium.open` do; CannotGrow for a cache;
    NoSpace; and OSError if the medium fails. Then all is as it was.
    """
    with closing(MappedMedium.open(path)) as medium:
        pool = Pool.open(medium)
        _check_keeps_no_size(pool)
        old_bytes = pool.label.pool_size_bytes
        size_bytes = target_bytes(pool, medium, wanted_bytes)
        if size_bytes > old_bytes:
            heal(pool)
            growth = Growth(pool, size_bytes, unknown_end_bytes(medium, size_bytes))
            file_bytes = medium.extend(size_bytes)
            try:
                growth.run()
            except BaseException:
                if growth.abandon():
                    medium.give_back(file_bytes)
                raise
        return Grown(pool.label.name, old_bytes, size_bytes)


def heal(pool: Pool) -> None:
    """Make both copies of the label whole and alike, before a growth begins.

    Once the medium is longer, its end does not lead to the old copy any more. Only the label in
    front does, so that one must be good.
    """
    first, second = (reading.label for reading in pool.readings)
    if first != second:
        pool.rewrite()
    else:
        # A killed process may have written it, and not made it durable.
        pool.medium.persist(0, LABEL_BYTES)
