"""A pool: a medium, its label in two copies (see `labels`), and the zones that follow from it.

Invariants:
- both copies record generation g before any page structure gets generation g. So whichever copy
  survives, no stale structure counts as a current one;
- `create` and `open` touch nothing but the two labels;
- a label that is announced has the generation of the label in force, whatever happens meanwhile:
  otherwise the first mount of a pool that has just grown could take old structures for its own;
- a pool grows (see `growth`) onto the end of the medium. The new copy of the label is written there
  first, so that it is found whatever becomes of the two that say the old size.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import NamedTuple

from pmemfs.errors import (
    InvalidPool,
    NewerFormat,
    NotAPool,
    ReadOnlyPool,
)
from pmemfs.media.label import (
    Incompatible,
    Label,
    Mode,
    Scheme,
    State,
    check_name,
    pack,
    validate,
    with_zones,
)
from pmemfs.media.layout import replace
from pmemfs.media.zones import DEFAULT_ALIGNMENT_BYTES, LABEL_BYTES, Zones
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT, PageGeometry, Pfn
from pmemfs.pool.labels import (
    LabelReading,
    newest,
    read_labels,
    stray_sequence,
    write_label,
    write_labels,
)
from pmemfs.units import format_size
from pmemfs.version import VERSION

_GENERATION_LIMIT = 1 << 64


def random_word() -> int:
    """62 random bits, for what no other life of a pool, and no other mount, may have: not 0, which
    says that there was none."""
    return int.from_bytes(os.urandom(8)) >> 2 or 1


def next_generation(generation: int) -> int:
    """The generation after another one."""
    return (generation + 1) % _GENERATION_LIMIT or 1


class PoolSpec(NamedTuple):
    """What a new pool should be like."""

    name: str
    page_size_bytes: int = FRAME_BYTES
    alignment_bytes: int = DEFAULT_ALIGNMENT_BYTES
    scheme: Scheme = Scheme.PMEM
    mode: Mode = Mode.BLOCK


class Pool:
    """An open pool."""

    def __init__(self, medium: Medium, readings: tuple[LabelReading, LabelReading]) -> None:
        self.medium = medium
        self.readings = readings
        self._current = newest(readings)
        assert self._current.label is not None, "a pool is opened only if a copy is valid"
        self.label: Label = self._current.label
        self.zones: Zones = self.label.zones
        # A growth that was interrupted may have left a copy at the end of the medium.
        self._least_sequence = max(self.label.sequence, stray_sequence(medium, self.label))
        self._announced: Label | None = None
        self.lock = threading.RLock()
        """Held while labels are written: a growth writes them in a thread."""

    @classmethod
    def create(cls, medium: Medium, spec: PoolSpec) -> Pool:
        """Label a medium, whatever it holds. Raises BadGeometry, BadName and InvalidLabel."""
        check_name(spec.name)
        readings = read_labels(medium)
        label = _readable(_new_label(medium, spec, readings))
        write_labels(medium, label, in_force=newest(readings))
        return cls.open(medium)

    @classmethod
    def open(cls, medium: Medium) -> Pool:
        """The pool on a medium. Raises, for the first of these that holds:

        1. neither copy of the label starts with the magic: NotAPool
        2. a copy is whole and has a format that this program does not know: InvalidPool
        3. neither copy is valid: InvalidPool
        4. the medium is smaller than the pool: InvalidPool
        5. a feature allows only reading, and the medium is writable: ReadOnlyPool
        """
        readings = read_labels(medium)
        if not any(reading.has_magic for reading in readings):
            raise NotAPool(path=medium.name)
        for reading in readings:
            if isinstance(reading.problem, NewerFormat):
                raise InvalidPool(path=medium.name, why=f"{reading.where}: {reading.problem}")
        if all(reading.label is None for reading in readings):
            why = "; ".join(f"{reading.where}: {reading.problem}" for reading in readings)
            raise InvalidPool(path=medium.name, why=why)
        pool = cls(medium, readings)
        if pool.label.pool_size_bytes > medium.size_bytes:
            raise InvalidPool(
                path=medium.name,
                why=f"it is cut off: {format_size(medium.size_bytes)} are left of "
                f"{format_size(pool.label.pool_size_bytes)}; restore it from a backup",
            )
        if pool.label.needs_read_only and not medium.read_only:
            raise ReadOnlyPool(path=medium.name, why="a newer version of pmemfs has written it")
        return pool

    @property
    def scheme(self) -> Scheme:
        """Where the pool's page structures lie."""
        return Scheme(self.label.scheme)

    @property
    def first_data_pfn(self) -> Pfn:
        """The first page frame of the data zone."""
        return Pfn(self.zones.data.offset_bytes >> PAGE_SHIFT)

    @property
    def data_pfn_count(self) -> int:
        """The page frames of the data zone."""
        return self.zones.data.size_bytes >> PAGE_SHIFT

    @property
    def page_geometry(self) -> PageGeometry:
        """Which pfns have page structures. If these are in DRAM, the offsets are only virtual."""
        return self.geometry_of(self.zones)

    def geometry_of(self, zones: Zones) -> PageGeometry:
        """As `page_geometry`, for these zones instead of those that the pool has now."""
        return PageGeometry(
            first_pfn=Pfn(zones.data.offset_bytes >> PAGE_SHIFT),
            page_count=zones.data.size_bytes // self.label.page_size_bytes,
            order=(self.label.page_size_bytes >> PAGE_SHIFT).bit_length() - 1,
            memmap_offset_bytes=zones.memmap.offset_bytes,
        )

    @property
    def damaged_copies(self) -> list[LabelReading]:
        """The copies of the label that were not valid when the pool was opened."""
        return [reading for reading in self.readings if reading.label is None]

    def begin_mount(self) -> None:
        """Record a writable mount: a new generation, and dirty until `end_mount`.

        Raises OSError, and InvalidLabel if the sequence number has run out.
        """
        self._write(
            replace(
                self.label,
                generation=next_generation(self.label.generation),
                mount_count=self.label.mount_count + 1,
                mounted_ns=time.time_ns(),
                state=State.DIRTY,
            )
        )

    def end_mount(self) -> None:
        """Record that everything is durable and nothing is written. Raises as `begin_mount`."""
        if self.label.state != State.CLEAN:
            self._write(replace(self.label, state=State.CLEAN))

    def renew(self) -> int:
        """Record one more generation for the mount that lasts, and return it. Raises as
        `begin_mount`.

        No page may be in use meanwhile: from now on, each structure reads as uninitialised.
        """
        with self.lock:
            generation = next_generation(self.label.generation)
            if self._announced is not None:
                sequence = self._least_sequence + 1
                label = replace(self._announced, generation=generation, sequence=sequence)
                self.announce(_readable(label))
            self._write(replace(self.label, generation=generation))
        return generation

    def resume_mount(self) -> None:
        """Take `end_mount` back, as long as the mount lasts. Raises as `begin_mount`.

        The generation stays, since page structures go on being those of this mount.
        """
        self._write(replace(self.label, state=State.DIRTY))

    def rewrite(self) -> None:
        """Write both copies of the label anew, whatever they hold, and forget what was announced.
        Raises as `begin_mount`."""
        with self.lock:
            self._announced = None
            self._write(self.label)

    def grown_label(self, size_bytes: int, generation: int) -> Label:
        """The label of this pool at another size. Raises BadGeometry and InvalidLabel."""
        label = replace(
            self.label,
            sequence=self._least_sequence + 1,
            pool_size_bytes=size_bytes,
            generation=generation,
            software=_software(),
        )
        return _readable(with_zones(label))

    def announce(self, label: Label) -> None:
        """Write the copy of a `grown_label` to its place, where it does not count yet."""
        with self.lock:
            self._announced = label
            self._least_sequence = label.sequence
            write_label(self.medium, label, label.pool_size_bytes - LABEL_BYTES)

    def adopt(self) -> None:
        """Write the announced label in front; from now on it is the pool's label."""
        with self.lock:
            assert self._announced is not None
            write_label(self.medium, self._announced, 0)
            self.label, self.zones = self._announced, self._announced.zones
            self._announced = None
            self._read_back()

    def _write(self, label: Label) -> None:
        with self.lock:
            self._least_sequence += 1
            label = replace(label, sequence=self._least_sequence, software=_software())
            self.label = _readable(label)
            write_labels(self.medium, self.label, in_force=self._current)
            self._read_back()

    def _read_back(self) -> None:
        self.readings = read_labels(self.medium)
        self._current = newest(self.readings)


def _readable(label: Label) -> Label:
    """The label as it will be read back. If its sequence number has run out, this raises."""
    return validate(pack(label))


def _new_label(
    medium: Medium, spec: PoolSpec, readings: tuple[LabelReading, LabelReading]
) -> Label:
    is_in_pool = spec.scheme is Scheme.PMEM
    # The pool that is overwritten must lose against the new one, whichever copies a crash leaves.
    sequence = 1 + max(reading.label.sequence if reading.label else 0 for reading in readings)
    label = Label(
        sequence=sequence,
        uuid=uuid.uuid4().bytes,
        # In other schemes the feature would mean nothing and still keep older programs out.
        incompatible_features=Incompatible.MEMMAP_BEHIND_DATA if is_in_pool else 0,
        pool_size_bytes=medium.size_bytes,
        alignment_bytes=spec.alignment_bytes,
        page_size_bytes=spec.page_size_bytes,
        scheme=spec.scheme,
        mode=spec.mode,
        state=State.CLEAN,
        # The memmap zone may hold anything. A random start keeps old structures from counting.
        generation=random_word(),
        created_ns=time.time_ns(),
        name=spec.name,
        software=_software(),
    )
    return with_zones(label)


def _software() -> str:
    return f"pmemfs {VERSION}"
