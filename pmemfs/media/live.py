"""The live line of an inode: what changes with each write, by whichever plane.

It lies in the inode's slot, in the pool itself, so that what was written survives the death of all
processes without anybody having to log it. Invariants: each word is changed by one aligned store
(the size by compare-and-swap); the bytes are stored before the size that covers them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmemfs.media.layout import Layout, stored


@dataclass(frozen=True, slots=True)
class LiveLine:
    """The live line of an inode."""

    size_word: int = stored("<u8", "size in bytes << 16, plus the truncation epoch")
    written_ns: int = stored("<u8", "of the last write; 0: none", unit="ns since 1970")
    reserved: bytes = stored("V48", "zero", default=bytes(48))


LIVE_LINE = Layout(LiveLine, 64)
