"""What the daemon of a mounted file system answers on its socket about transformations.

transform-get inode, path                        TransformReport
transform-set inode, path, compression, level    TransformReport, as it is now
rewrite       inode, path                        RewrittenReport

The path is what the user calls the inode, for sentences.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pmemfs.errors import BadSetting, CannotTransform, PmemfsError
from pmemfs.media.transform import COMPRESSIONS, Transformation, TransformState
from pmemfs.media.transformreport import RewrittenReport, TransformReport
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.transform.codec import codec_of
from pmemfs.volume.fs.filesystem import FileSystem

if TYPE_CHECKING:
    from pmemfs.volume.fs.cold import Cooler

_KINDS = {"none": Transformation.NONE, "zstd": Transformation.ZSTD, "lz4": Transformation.LZ4}
_WORDS = {int(kind): word for word, kind in _KINDS.items()}


class TransformMethods:
    """The methods of one mounted file system."""

    def __init__(
        self, fs: FileSystem, begin: Callable[[], Cooler], tell: Callable[[int], object],
        hear_ends: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """`begin` gives what compresses; `tell` says that attributes of an inode have changed;
        `hear_ends` ends the pins that programs have let go of."""
        self._fs = fs
        self._begin = begin
        self._tell = tell
        self._hear_ends = hear_ends

    def methods(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """All of them, by name."""
        return {
            "transform-get": self.get, "transform-set": self.set, "rewrite": self.rewrite,
        }  # fmt: skip

    async def get(self, inode: int, path: str = "") -> dict[str, Any]:
        """How an inode is transformed. Raises CannotTransform."""
        with _named(inode, path):
            return self._report(inode)

    def _report(self, inode: int) -> dict[str, Any]:
        found, size_bytes = self._fs.inode(inode), self._fs.attributes(inode).size_bytes
        state = found.transform
        packed = sum(piece.frame_count for piece in found.pieces.values())
        return TransformReport(
            compression=_compression(state),
            is_encrypted=found.is_encrypted,
            size_bytes=size_bytes,
            plain_bytes=found.extents.frame_count << PAGE_SHIFT,
            packed_bytes=packed << PAGE_SHIFT,
            stored_bytes=found.piece_frames << PAGE_SHIFT,
        )._asdict()

    async def set(
        self, inode: int, compression: str, level: int = 0, path: str = ""
    ) -> dict[str, Any]:
        """Let an inode have a compression. Raises BadSetting and CannotTransform."""
        kind = _KINDS.get(compression)
        if kind is None:
            raise BadSetting(
                name="compression", why=f"{compression!r} is none of {', '.join(_KINDS)}"
            )
        codec = codec_of(kind)
        most = codec.MOST_LEVEL if codec else 0
        if not 0 <= level <= most:
            raise BadSetting(name="compression", why=f"{compression} has levels from 1 to {most}")
        # Nothing is awaited between this and the check that nobody has it mapped.
        await self._hear_ends()
        with _named(inode, path):
            self._fs.properties.set_transform(inode, kind, level)
            await self._was_changed(inode)
            return self._report(inode)

    async def rewrite(self, inode: int, path: str = "") -> dict[str, Any]:
        """Let a file lie as its transformation says. Raises CannotTransform."""
        await self._hear_ends()
        with _named(inode, path):
            rewritten = await self._begin().rewrite(inode)
            await self._was_changed(inode)
            return RewrittenReport(
                rewritten.before_frames << PAGE_SHIFT, rewritten.after_frames << PAGE_SHIFT,
                self._fs.attributes(inode).size_bytes, self._fs.inode(inode).is_encrypted,
            )._asdict()  # fmt: skip

    async def _was_changed(self, inode: int) -> None:
        told = self._tell(inode)
        if isinstance(told, Awaitable):
            await told


@contextmanager
def _named(inode: int, path: str) -> Iterator[None]:
    """Raise CannotTransform, which names the file, for an OSError."""
    try:
        yield
    except PmemfsError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        raise CannotTransform(
            error.errno or errno.EIO, path=path or f"inode {inode}", why=why[:1].lower() + why[1:]
        ) from None


def _compression(state: TransformState | None) -> str:
    if state is None or state.is_encrypted:
        return "none"
    if state.id not in COMPRESSIONS:
        return "unknown"
    return _WORDS[state.id] + (f":{state.level}" if state.level else "")
