"""Checks what is transformed: compressed pieces, wrapped keys, and what this program cannot serve.

No key is needed for any of it. Invariant: an inode of a newer program is a finding, and no error,
because a repair that "mended" it would destroy what is sound.
"""

from __future__ import annotations

from pmemfs.errors import DamagedPiece, MemoryFault
from pmemfs.media.inode import ROOT
from pmemfs.media.keys import RESERVED_XATTRS, read_key_attribute, why_wrong
from pmemfs.media.transform import StoredPiece, piece_checksum
from pmemfs.medium.base import Medium
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.transform.codec import codec_of
from pmemfs.volume.fs.findings import Problem, Remedy, Stage, Verdict
from pmemfs.volume.fs.inode import Inode

_MOST_KEYS = 1000
"""Keys beyond this number are not counted: a pool may come from anybody."""


class TransformCheck:
    """The look at transformations, inode by inode."""

    def __init__(self, medium: Medium, verdict: Verdict) -> None:
        self._medium = medium
        self._verdict = verdict
        self._wrapped: set[bytes] = set()
        """The keys that something can unlock."""
        self._users: dict[bytes, int] = {}
        """How many inodes are encrypted with each key."""

    def look_at(self, inode: Inode) -> None:
        """Look at one inode that could be read."""
        if inode.number == ROOT:
            self._look_at_keys(inode)
        if inode.unknown_id:
            why = (
                f"it has a transformation ({inode.unknown_id}) that this program does not know, so "
                "its content is refused; the program that made it can serve it"
            )
            self._verdict.add(Problem("inode", False, why, inode.number))
        if inode.transform is not None and inode.is_encrypted:
            key_id = inode.transform.key_id
            if key_id in self._users or len(self._users) < _MOST_KEYS:
                self._users[key_id] = self._users.get(key_id, 0) + 1
        for index, piece in inode.pieces.items():
            self._look_at_piece(inode.number, index, piece)

    def say_lost_keys(self) -> None:
        """All inodes were looked at: name the keys that nothing unlocks any more."""
        for key_id, count in self._users.items():
            if key_id not in self._wrapped:
                what = "1 inode is" if count == 1 else f"{count} inodes are"
                why = f"{what} encrypted with the key {key_id.hex()}, which nothing here unlocks"
                self._verdict.add(Problem("keys", False, why))

    def _look_at_keys(self, root: Inode) -> None:
        verdict, found = self._verdict, set()
        for name, value in root.xattrs.items():
            named = read_key_attribute(name) if name.startswith(RESERVED_XATTRS) else None
            if named is None:
                continue
            found.add(named[0])
            verdict.way_count += 1
            why = why_wrong(name, value)
            if not why:
                self._wrapped.add(named[0])
                continue
            verdict.damaged_way_count += 1
            sentence = f"the wrapped key {name.decode('ascii')} is damaged: {why}"
            verdict.error("keys", sentence, ROOT, _removal(name))
        verdict.key_count = len(found)

    def _look_at_piece(self, number: int, index: int, piece: StoredPiece) -> None:
        why = self._why_damaged(piece)
        if not why:
            return
        first, end = index << PAGE_SHIFT, (index + piece.frame_count) << PAGE_SHIFT
        drop = Remedy(
            Stage.INODES, "they become zeroes, and what they were is lost",
            lambda m: m.drop_piece(number, index), needs_force=True,
        )  # fmt: skip
        sentence = (
            f"its bytes {first} to {end - 1} lie in a compressed piece that is damaged: {why}"
        )
        self._verdict.error("inode", sentence, number, drop)

    def _why_damaged(self, piece: StoredPiece) -> str:
        """Why nobody can read a piece; "" if the program that compressed it can."""
        try:
            raw = bytes(self._medium.read(piece.pfn << PAGE_SHIFT, piece.stored_bytes))
        except MemoryFault as fault:
            return str(fault)
        if piece_checksum(raw) != piece.checksum:
            return "its checksum is wrong"
        codec = codec_of(piece.id)
        if codec is not None:
            try:
                codec.decompress(raw, piece.frame_count << PAGE_SHIFT)
            except DamagedPiece as damage:
                return str(damage.facts["why"])
        return ""


def _removal(name: bytes) -> Remedy:
    return Remedy(
        Stage.INODES, "it is removed; what only it unlocks can never be read again",
        lambda m: m.remove_attribute(ROOT, name), needs_force=True,
    )  # fmt: skip
