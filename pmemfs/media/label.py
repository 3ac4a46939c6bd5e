"""The label: a pool's identity, geometry and state, in 4 KiB, stored twice.

Invariants:
- magic, checksum and format version keep their places and meanings in every format version, so that
  any program can tell a pool of a newer format from a damaged pool;
- a label with the right checksum was written whole by some program. `validate` still believes
  nothing of it, because anybody can compute the checksum;
- the recorded zones equal those that follow from the recorded geometry. Otherwise a program that
  computes other zones would take page structures for data.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

import google_crc32c

from pmemfs.errors import BadGeometry, BadName, InvalidLabel, NewerFormat
from pmemfs.media.layout import Layout, replace, stored, structure
from pmemfs.media.zones import LABEL_BYTES, Zones, compute_zones
from pmemfs.pfn import PAGE_STRUCTURE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"pmemfs pool\r\n\x1a\n\x00"
FORMAT_VERSION = 1
NAME_BYTES = 64


class Scheme(IntEnum):
    """Where page structures lie."""

    PMEM = 1
    ON_DEMAND = 2
    NONE = 3

    @property
    def word(self) -> str:
        """As the command line and the reports write it."""
        return self.name.lower().replace("_", "-")


class Mode(IntEnum):
    """What the pool serves."""

    BLOCK = 1
    FS = 2
    CACHE = 3

    @property
    def word(self) -> str:
        """As the command line and the reports write it."""
        return self.name.lower()


class State(IntEnum):
    """Whether the last writable mount ended by unmounting."""

    CLEAN = 1
    DIRTY = 2

    @property
    def word(self) -> str:
        """As the reports write it."""
        return self.name.lower()


class Incompatible(IntFlag):
    """Features that a program must know to open the pool."""

    MEMMAP_BEHIND_DATA = 1 << 0
    """The page structures of the scheme `pmem` lie behind the data, so that the pool can grow."""


class ReadOnlyCompatible(IntFlag):
    """Features that a program must know to write the pool, not to read it. Format 1 has none."""


@structure
class Label:
    """One copy of the label."""

    magic: bytes = stored("V16", "`MAGIC`: a pmemfs pool", default=MAGIC)
    checksum: int = stored("<u4", "CRC-32C of the 4096 bytes with this field zero")
    format_version: int = stored("<u4", "of the format, not of the software", default=1)
    sequence: int = stored("<u8", "counts the writes of the label; the newest valid copy wins")
    uuid: bytes = stored("V16", "the pool's identity, RFC 9562", default=bytes(16))
    incompatible_features: int = stored("<u8", "with an unknown bit set, the pool is refused")
    readonly_features: int = stored("<u8", "with an unknown bit set, the pool is read-only")
    compatible_features: int = stored("<u8", "an unknown bit makes no difference")
    pool_size_bytes: int = stored("<u8", "from the first byte to the last", unit="bytes")
    alignment_bytes: int = stored("<u8", "of the data zone; a power of two", unit="bytes")
    page_size_bytes: int = stored("<u8", "what one page structure covers", unit="bytes")
    page_structure_bytes: int = stored(
        "<u4", "the size of one page structure", unit="bytes", default=PAGE_STRUCTURE_BYTES
    )
    scheme: int = stored("u1", "1 `pmem`, 2 `on-demand`, 3 `none`")
    mode: int = stored("u1", "1 `block`, 2 `fs`, 3 `cache`")
    state: int = stored("u1", "1 clean, 2 dirty (mounted, or never unmounted)")
    reserved0: int = stored("u1", "zero")
    memmap_offset_bytes: int = stored("<u8", "start of the page structures", unit="bytes")
    memmap_size_bytes: int = stored("<u8", "0: page structures lie elsewhere", unit="bytes")
    data_offset_bytes: int = stored("<u8", "start of the data", unit="bytes")
    data_size_bytes: int = stored("<u8", "a whole number of pages", unit="bytes")
    generation: int = stored("<u8", "of page structures; starts at random, each mount adds one")
    mount_count: int = stored("<u8", "writable mounts since `create`")
    created_ns: int = stored("<u8", "time of `create`", unit="ns since 1970")
    mounted_ns: int = stored("<u8", "time of the last writable mount; 0: never", unit="ns")
    name: str = stored(f"S{NAME_BYTES}", "of the pool and its volume; UTF-8, filled with NULs")
    software: str = stored("S32", "program and version that wrote this copy")
    reserved: bytes = stored("V3832", "zero; kept as found", default=bytes(3832))

    @property
    def zones(self) -> Zones:
        """The zones that follow from the geometry. Raises BadGeometry if it is not valid."""
        return compute_zones(
            self.pool_size_bytes,
            page_size_bytes=self.page_size_bytes,
            alignment_bytes=self.alignment_bytes,
            memmap_in_pool=self.scheme == Scheme.PMEM,
            memmap_behind_data=bool(self.incompatible_features & Incompatible.MEMMAP_BEHIND_DATA),
        )

    @property
    def needs_read_only(self) -> bool:
        """Whether a feature that this program doesn't know forbids writing."""
        return bool(self.readonly_features & ~_all_bits(ReadOnlyCompatible))


LAYOUT = Layout(Label, LABEL_BYTES)
_COUNTER_LIMIT = 1 << 62
_CHECKSUM_OFFSET = LAYOUT.offset_of("checksum")


def pack(label: Label) -> bytes:
    """The stored form, with the checksum computed."""
    blank = LAYOUT.pack(replace(label, checksum=0))
    return LAYOUT.pack(replace(label, checksum=google_crc32c.value(blank)))


def validate(buffer: Buffer) -> Label:
    """The label in a buffer of 4096 bytes. Raises InvalidLabel for the first of these that holds:

    1. the magic differs
    2. the checksum differs
    3. the format is newer than this program's (NewerFormat), or 0
    4. an incompatible feature is unknown (NewerFormat)
    5. the size of a page structure isn't 64 bytes
    6. scheme, mode or state is not a known number
    7. the generation is 0, or a counter is too large to have been counted
    8. the geometry is impossible: sizes, alignment, room for a page
    9. the recorded zones aren't those that follow from the geometry
    10. the name isn't one that `create` would allow
    """
    raw = bytes(buffer)
    label = LAYOUT.unpack(raw)
    _refuse(label.magic != MAGIC, "it does not start with the magic of a pool")
    _refuse(label.checksum != checksum(raw), "its checksum is wrong")
    _refuse(label.format_version == 0, "its format version is 0")
    _check_features(label)
    _refuse(
        label.page_structure_bytes != PAGE_STRUCTURE_BYTES,
        f"its page structures are {label.page_structure_bytes} bytes, not {PAGE_STRUCTURE_BYTES}",
    )
    for word, kind, value in (
        ("memmap scheme", Scheme, label.scheme),
        ("mode", Mode, label.mode),
        ("state", State, label.state),
    ):
        _refuse(value not in set(kind), f"its {word} is {value}, which is not a known number")
    _refuse(label.generation == 0, "its generation is 0")
    for word, count in (("sequence", label.sequence), ("mount count", label.mount_count)):
        _refuse(count > _COUNTER_LIMIT, f"its {word} is {count}, which is too large for a count")
    _check_zones(label)
    try:
        check_name(label.name)
    except BadName as error:
        raise InvalidLabel(why=f"its name is bad: {error}") from None
    return label


def checksum(raw: bytes) -> int:
    """The CRC-32C that belongs in a label's checksum field."""
    before, after = raw[:_CHECKSUM_OFFSET], raw[_CHECKSUM_OFFSET + 4 :]
    return int(google_crc32c.value(before + bytes(4) + after))


def has_magic(buffer: Buffer) -> bool:
    """Whether the buffer starts like a label, valid or not."""
    return bytes(memoryview(buffer)[: len(MAGIC)]) == MAGIC


def with_zones(label: Label) -> Label:
    """The label with the zones that follow from its geometry. Raises BadGeometry."""
    zones = label.zones
    return replace(
        label,
        memmap_offset_bytes=zones.memmap.offset_bytes,
        memmap_size_bytes=zones.memmap.size_bytes,
        data_offset_bytes=zones.data.offset_bytes,
        data_size_bytes=zones.data.size_bytes,
    )


def check_name(name: str) -> None:
    """Raise BadName unless `name` can be a file name of at most 63 bytes."""
    for wrong, why in (
        (not name, "it is empty"),
        (name in (".", ".."), "it means a directory"),
        ("/" in name, "it contains a slash"),
        (not name.isprintable(), "it contains characters that can't be printed"),
        (len(name.encode("utf-8", "surrogateescape")) >= NAME_BYTES, "it is over 63 bytes long"),
    ):
        if wrong:
            raise BadName(name=name, why=why)


def _check_features(label: Label) -> None:
    if label.format_version > FORMAT_VERSION:
        raise NewerFormat(
            why=f"its format is {label.format_version}, and this program knows formats up to "
            f"{FORMAT_VERSION}; use a newer pmemfs"
        )
    unknown = label.incompatible_features & ~_all_bits(Incompatible)
    if unknown:
        raise NewerFormat(
            why=f"it uses features that this program does not know ({unknown:#x}); use a newer "
            "pmemfs"
        )


def _check_zones(label: Label) -> None:
    try:
        computed = with_zones(label)
    except BadGeometry as error:
        raise InvalidLabel(why=f"its geometry is impossible: {error}") from None
    _refuse(label != computed, "its zones do not follow from its geometry")


def _all_bits(flags: type[IntFlag]) -> int:
    return sum(flag.value for flag in flags)


def _refuse(condition: bool, why: str) -> None:
    if condition:
        raise InvalidLabel(why=why)
