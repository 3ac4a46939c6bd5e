"""Reads a file system of mode `fs` from its bytes, by docs/format.md alone, and says what is wrong.

It shares no code with pmemfs.volume.fs, so that a mistake there isn't repeated here. It
trusts nothing, and is right only for a pool that was recovered: the journal isn't looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import google_crc32c

FRAME = 4096
SLOT = 512
LINE = 64
GROUP_FRAMES = 32768
ROOT = 1
TYPES = {0o010: "fifo", 0o020: "chr", 0o040: "dir", 0o060: "blk", 0o100: "file", 0o120: "link",
         0o140: "sock"}  # fmt: skip

_HEAD = struct.Struct("<IIQQqQQ")
_RECORD = struct.Struct("<BBHI")
_ATTRIBUTES = struct.Struct("<8xIIIIQqqqIHH")
_EXTENT = struct.Struct("<8xQQQ")
_ENTRY = struct.Struct("<8xQqBH")
_VALUE = struct.Struct("<8xIIHH")
_TRANSFORM = struct.Struct("<8xBb6x16s16s")
_PIECE = struct.Struct("<8xQQIIIIB")
_FRAME = struct.Struct("<IIQQ")
_PLACE = struct.Struct("<QQQ")


class Piece(NamedTuple):
    """What lies compressed."""

    pfn: int
    frame_count: int
    stored_frames: int
    stored_bytes: int
    checksum: int
    id: int


@dataclass
class Found:
    """One inode, as its log says."""

    number: int
    generation: int
    mode: int = 0
    link_count: int = 0
    size_bytes: int = 0
    epoch: int = 0
    parent: int = 0
    target: bytes = b""
    entries: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    keeps_ahead: bool = False
    frames: dict[int, int] = field(default_factory=dict)
    """The pfn of each mapped frame."""
    pieces: dict[int, Piece] = field(default_factory=dict)
    transform: tuple[int, int, bytes, bytes] = (0, 0, bytes(16), bytes(16))
    """ID, level, key's ID, nonce."""
    log_frames: list[int] = field(default_factory=list)
    values: dict[bytes, bytearray] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return self.mode >> 12 == 0o04


@dataclass
class Report:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    leaked: list[int] = field(default_factory=list)
    """Frames that are used and nobody's."""
    orphans: list[int] = field(default_factory=list)
    """Inodes without a name."""
    inodes: dict[int, Found] = field(default_factory=dict)
    is_clean: bool = False
    free_frames: int = 0


class Checker:
    """Checks images of one pool; remembers logs that it has read, by all their bytes."""

    def __init__(self, first_pfn: int, frame_count: int) -> None:
        self._first_pfn = first_pfn
        self._frame_count = frame_count
        self._known: dict[tuple[int, bytes], list[tuple[tuple[tuple[int, bytes], ...], Found]]] = {}

    def check(self, image: bytearray | bytes) -> Report:
        report = Report()
        base = self._first_pfn * FRAME
        report.is_clean = image[base + 2 * FRAME + 48 : base + 2 * FRAME + 56] != bytes(8)
        owners: dict[int, str] = {}
        used = self._bits(image, 0)
        tables = self._bits(image, 1)
        for pfn in tables:
            self._own(report, owners, pfn, "inodes")
            for slot in range(pfn * FRAME, (pfn + 1) * FRAME, SLOT):
                if image[slot + 40 : slot + 48] != bytes(8):
                    self._inode(report, owners, image, slot)
        for pfn, owner in owners.items():
            if pfn not in used:
                report.problems.append(f"frame {pfn} of {owner} is free in the bitmap")
        report.leaked = sorted(used - owners.keys())
        report.free_frames = len(self._managed() - used)
        self._tree(report)
        return report

    def _managed(self) -> set[int]:
        managed = set()
        for start in range(0, self._frame_count, GROUP_FRAMES):
            kept = 4 if start == 0 else 2
            end = min(start + GROUP_FRAMES, self._frame_count)
            managed |= set(range(self._first_pfn + start + kept, self._first_pfn + end))
        return managed

    def _bits(self, image: bytearray | bytes, which: int) -> set[int]:
        found = set()
        for start in range(0, self._frame_count, GROUP_FRAMES):
            at = (self._first_pfn + start + which) * FRAME
            bits = int.from_bytes(image[at : at + FRAME], "little")
            while bits:
                bit = (bits & -bits).bit_length() - 1
                bits &= bits - 1
                found.add(self._first_pfn + start + bit)
        return found

    def _own(self, report: Report, owners: dict[int, str], pfn: int, owner: str) -> None:
        start = pfn - self._first_pfn
        kept = 4 if start < GROUP_FRAMES else 2
        if not (0 <= start < self._frame_count and start % GROUP_FRAMES >= kept):
            report.problems.append(f"frame {pfn} of {owner} is nobody's to have")
        if pfn in owners:
            report.problems.append(f"frame {pfn} is of {owners[pfn]} and of {owner}")
        owners[pfn] = owner

    def _inode(
        self, report: Report, owners: dict[int, str], image: bytearray | bytes, slot: int
    ) -> None:
        number = ROOT if slot == (self._first_pfn + 4) * FRAME else slot // SLOT
        raw = bytes(image[slot : slot + SLOT])
        found = self._remembered(number, raw, image)
        if found is None:
            try:
                found = self._parse(number, slot, raw, image)
            except ValueError as problem:
                report.problems.append(f"inode {number}: {problem}")
                return
        report.inodes[number] = found
        end = -(-found.size_bytes // FRAME)
        if (
            report.is_clean
            and not found.keeps_ahead
            and any(at >= end for at in (*found.frames, *found.pieces))
        ):
            report.problems.append(f"clean, but inode {number} has frames behind its size")
        for pfn in found.frames.values():
            self._own(report, owners, pfn, f"the data of inode {number}")
        for index, piece in found.pieces.items():
            for pfn in range(piece.pfn, piece.pfn + piece.stored_frames):
                self._own(report, owners, pfn, f"a piece of inode {number}")
            start = piece.pfn * FRAME
            if crc(image[start : start + piece.stored_bytes]) != piece.checksum:
                report.problems.append(f"the piece at {index} of inode {number} has other bytes")
        for pfn in found.log_frames:
            self._own(report, owners, pfn, f"the log of inode {number}")

    def _remembered(self, number: int, raw: bytes, image: bytearray | bytes) -> Found | None:
        for frames, found in self._known.get((number, raw), ()):
            if all(image[pfn * FRAME : (pfn + 1) * FRAME] == content for pfn, content in frames):
                return found
        return None

    def _parse(self, number: int, slot: int, raw: bytes, image: bytearray | bytes) -> Found:
        magic, checksum, own, generation, birth, head, tail = _HEAD.unpack_from(raw)
        expect(magic == 0x6F6E6970, "it has no magic")
        expect(checksum == crc(_HEAD.pack(magic, 0, own, generation, birth, 0, 0)[:32]), "head")
        expect(own == number, f"it says that it is {own}")
        found = Found(number, generation)
        for record in self._records(found, slot, raw, head, tail, image):
            apply(found, record)
        expect(found.mode >> 12 << 3 in TYPES, f"its mode is {found.mode:o}")
        expect(not found.values, "a value is not whole")
        is_file, is_link = found.mode >> 12 == 0o10, found.mode >> 12 == 0o12
        expect(is_file or not (found.frames or found.pieces), "it has frames, but is no file")
        expect(found.transform[0] != 1 or not found.pieces, "it is encrypted and compressed")
        expect(is_link == bool(found.target), "a target and its type differ")
        expect(found.is_directory or not found.entries, "it has entries, but is no directory")
        expect(found.is_directory == bool(found.parent), "a parent and its type differ")
        frames = tuple(
            (pfn, bytes(image[pfn * FRAME : (pfn + 1) * FRAME])) for pfn in found.log_frames
        )
        # The live line is no part of what is remembered about an inode.
        if is_file:
            found.size_bytes = live_size(found, int.from_bytes(raw[64:72], "little"))
        self._known.setdefault((number, raw), []).append((frames, found))
        return found

    def _records(
        self, found: Found, slot: int, raw: bytes, head: int, tail: int, image: bytearray | bytes
    ) -> list[bytes]:
        records: list[bytes] = []
        if slot + 128 <= head < slot + SLOT:
            expect(head == slot + 128, "its log begins inside the slot")
            expect(head < tail <= slot + SLOT, "its tail is not in its slot")
            cut(found, head, raw[128 : tail - slot], records, is_last=True)
            return records
        frame = head - LINE
        while True:
            pfn = frame // FRAME
            expect(frame % FRAME == 0, "a frame of its log is at no frame")
            expect(self._first_pfn <= pfn < self._first_pfn + self._frame_count, "log outside")
            expect(pfn not in found.log_frames, "its log goes in a circle")
            found.log_frames.append(pfn)
            content = bytes(image[frame : frame + FRAME])
            magic, checksum, number, after = _FRAME.unpack_from(content)
            expect(magic == 0x676F6C70 and number == found.number, f"frame {pfn} is no log of it")
            place = _PLACE.pack(number, found.generation, frame)
            expect(checksum == crc(place + content[:4] + bytes(4)), f"log frame {pfn}")
            if frame < tail <= frame + FRAME:
                cut(found, frame + LINE, content[LINE : tail - frame], records, is_last=True)
                return records
            cut(found, frame + LINE, content[LINE:], records, is_last=False)
            frame = after

    def _tree(self, report: Report) -> None:
        inodes = report.inodes
        names: dict[int, int] = {}
        if ROOT not in inodes:
            report.problems.append("there is no root")
            return
        for number, inode in inodes.items():
            for name, (to, type_) in inode.entries.items():
                other = inodes.get(to)
                if other is None:
                    report.problems.append(f"{name!r} in {number} leads to {to}, which is none")
                    continue
                names[to] = names.get(to, 0) + 1
                if other.mode >> 12 != type_:
                    report.problems.append(f"{name!r} in {number} is of another type than {to}")
                if other.is_directory and other.parent != number:
                    report.problems.append(f"{to} is in {number}, but says {other.parent}")
        for number, inode in inodes.items():
            count = names.get(number, 0) + (number == ROOT)
            if count != inode.link_count:
                report.problems.append(f"{number} has {count} names, but says {inode.link_count}")
            if inode.link_count == 0:
                report.orphans.append(number)
                if inode.entries:
                    report.problems.append(f"{number} has entries and no name")
        reached = {ROOT}
        todo = [ROOT]
        while todo:
            for to, _ in inodes[todo.pop()].entries.values():
                if to in inodes and to not in reached:
                    reached.add(to)
                    todo.append(to)
        lost = [n for n in inodes if n not in reached and inodes[n].link_count]
        if lost:
            report.problems.append(f"{lost} can't be reached")


def live_size(found: Found, word: int) -> int:
    """The size of a file, by its live line and its log."""
    size = word >> 16
    mixed = (size * 0x9E3779B97F4A7C15 % 2**64) >> 49
    expect(word.bit_count() % 2 == 0, "an odd number of bits is set in its size word")
    mixed ^= (word & 0xFFFF) >> 1
    for epoch in (found.epoch, (found.epoch - 1) % 2**16):
        whose = struct.pack("<QQH", found.number, found.generation, epoch)
        if mixed == crc(whose) & 0x7FFF:
            return size if epoch == found.epoch else found.size_bytes
    raise ValueError("its size word is of no epoch")


def cut(found: Found, offset: int, area: bytes, records: list[bytes], *, is_last: bool) -> None:
    """The records of an area that lies at this offset, to its end."""
    at = 0
    while at < len(area):
        kind, slots, reserved, checksum = _RECORD.unpack_from(area, at)
        raw = area[at : at + slots * LINE]
        expect(slots > 0 and len(raw) == slots * LINE, "a record has no valid length")
        expect(reserved == 0, "a record's reserved bytes are not zero")
        place = _PLACE.pack(found.number, found.generation, offset + at)
        expect(
            checksum == crc(place + raw[:4] + bytes(4) + raw[8:]), "a record's checksum is wrong"
        )
        if kind == 1:
            expect(not is_last, "a padding is before the tail")
            return
        records.append(raw)
        at += slots * LINE


def apply(found: Found, raw: bytes) -> None:
    """What one record says."""
    kind = raw[0]
    if kind == 2:
        values = _ATTRIBUTES.unpack_from(raw)
        found.mode, found.link_count, found.size_bytes, found.epoch = (
            values[0], values[1], values[4], values[9],
        )  # fmt: skip
        found.keeps_ahead = bool(values[10] & 1)
    elif kind in (3, 4):
        index, pfn, count = _EXTENT.unpack_from(raw)
        expect(0 < count < 1 << 35, "an extent has no length")
        replace_pieces(found, index, count)
        if kind == 3:
            found.frames.update({index + at: pfn + at for at in range(count)})
        else:
            found.frames = {
                at: frame for at, frame in found.frames.items() if not index <= at < index + count
            }
    elif kind in (5, 6):
        number, _, type_, length = _ENTRY.unpack_from(raw)
        name = raw[27 : 27 + length]
        expect(0 < length == len(name), "a name is cut")
        if kind == 5:
            found.entries[name] = number, type_
        else:
            expect(name in found.entries, f"{name!r} was removed, but never there")
            del found.entries[name]
    elif kind in (7, 8, 9):
        value(found, kind, raw)
    elif kind == 10:
        found.parent = int.from_bytes(raw[8:16], "little")
    elif kind == 11:
        found.transform = _TRANSFORM.unpack_from(raw)
        id_, level, key_id, nonce = found.transform
        expect(id_ < 4, f"transformation {id_} is not known")
        expect((id_ == 1) == any(key_id) == any(nonce), "a key, and no encryption, or without one")
        expect(id_ in (2, 3) or level == 0, "a level of no compression")
    elif kind == 12:
        index, *values = _PIECE.unpack_from(raw)
        piece = Piece(*values)
        expect(index % 32 == 0 and 0 < piece.frame_count <= 32, "a piece is at no place for one")
        expect(0 < piece.stored_frames < piece.frame_count, "a piece saves nothing")
        expect(piece.stored_frames == -(-piece.stored_bytes // FRAME), "a piece's length is wrong")
        expect(piece.id in (2, 3), f"a piece is compressed with {piece.id}")
        replace_pieces(found, index, piece.frame_count)
        for at in range(index, index + piece.frame_count):
            found.frames.pop(at, None)
        found.pieces[index] = piece
    else:
        expect(False, f"a record of kind {kind}")


def replace_pieces(found: Found, index: int, count: int) -> None:
    """Something else is there now instead of the pieces in a range."""
    for at, piece in list(found.pieces.items()):
        end = at + piece.frame_count
        if index < end and at < index + count:
            expect(index <= at and end <= index + count, "half a piece is gone")
            del found.pieces[at]


def value(found: Found, kind: int, raw: bytes) -> None:
    """A part of a value."""
    total, offset, length, name_length = _VALUE.unpack_from(raw)
    name, part = raw[20 : 20 + name_length], raw[20 + name_length : 20 + name_length + length]
    if kind == 8:
        expect(name in found.xattrs, f"{name!r} was removed, but never there")
        del found.xattrs[name]
        return
    whole = found.values.setdefault(name, bytearray()) if offset else bytearray()
    expect(len(whole) == offset, "a part of a value is missing")
    whole += part
    found.values[name] = whole
    if len(whole) == total:
        del found.values[name]
        if kind == 9:
            found.target = bytes(whole)
        else:
            found.xattrs[name] = bytes(whole)


def crc(raw: bytes) -> int:
    return int(google_crc32c.value(bytes(raw)))


def expect(condition: bool, why: str) -> None:
    if not condition:
        raise ValueError(why)
