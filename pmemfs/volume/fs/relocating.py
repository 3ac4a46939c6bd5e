"""Lays a file out anew, in as few runs of frames as there can be, for programs that map it.

A run is 126 MiB long at most, because each group of frames begins with its bitmap. What is at least
a chunk (2 MiB) long is aligned alike in the file and in the pool, so that a huge page or the unit
of a DAX device holds nothing else. The file is moved piece by piece, and each piece is one
transaction. Invariants:
- a piece is moved while no worker of a data plane sees the file, and in one step. Otherwise a write
  between the copy and the commit would go to a frame that leaves the file;
- new frames have their bytes before the commit maps them: a crash shows the piece in its old place
  or in its new one, with the same bytes;
- a file that somebody has pinned is not moved, because the program would see frames that are the
  file's no more.
"""

from __future__ import annotations

import errno

from pmemfs.media import log as media
from pmemfs.media.filesystem import CHUNK_FRAMES, GROUP_CHUNKS
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.extents import Run, frames_of
from pmemfs.volume.fs.fileframes import FileFrames
from pmemfs.volume.fs.inode import IMMUTABLE, Inode
from pmemfs.volume.fs.store import Store

MOST_FRAMES = (GROUP_CHUNKS - 1) * CHUNK_FRAMES
"""The longest run."""
_STEP_FRAMES = 2048
"""So much is copied while nothing else is served: some ms."""
_POLL_SECONDS = 0.0005


class Relocator:
    """Moves files of one file system."""

    def __init__(self, store: Store, frames: FileFrames) -> None:
        self._store = store
        self._frames = frames
        self.moving: set[int] = set()
        """Files that are being moved. The data plane is not shown these."""

    async def lay_out(self, number: int) -> None:
        """Lay a file out in as few runs as there can be, without holes, up to its size.

        Raises OSError: EBUSY if it is pinned, ENOSPC if no run is free that is long enough.
        """
        store = self._store
        inode = self._frames.file(number)
        if self.is_laid_out(inode):
            return
        store.refuse(inode, IMMUTABLE)
        if number in self.moving or store.ground.pinned.has(number):
            raise OSError(errno.EBUSY, "it is to be laid out anew, and programs have pages of it")
        store.begin_writing()
        self.moving.add(number)
        try:
            await self._make_plain(number)
            index = 0
            while index < self._size_frames(number):
                index += await self._move_run(number, index)
        finally:
            self.moving.discard(number)

    def is_laid_out(self, inode: Inode) -> bool:
        """Whether a file lies as `lay_out` would lay it out."""
        count = frames_of(self._store.size_of(inode))
        pieces = list(inode.extents.pieces(0, count)) if len(inode.extents) <= count else []
        first_pfn = self._store.ground.geometry.first_pfn
        return len(pieces) <= -(-count // MOST_FRAMES) and all(
            piece.pfn >= 0
            and (count < CHUNK_FRAMES or (piece.pfn - first_pfn - piece.index) % CHUNK_FRAMES == 0)
            for piece in pieces
        )

    def _size_frames(self, number: int) -> int:
        return frames_of(self._store.size_of(self._frames.file(number)))

    async def _move_run(self, number: int, index: int) -> int:
        """Move what fits into one run; how many frames. Raises OSError."""
        store = self._store
        count = min(self._size_frames(number) - index, MOST_FRAMES)
        run = store.allocator.allocate_run(count)
        done = 0
        try:
            while done < count:
                await self._withdraw(number)
                # From here to the commit nothing awaits.
                inode = self._frames.file(number)
                left = frames_of(store.size_of(inode)) - index - done
                step = min(_STEP_FRAMES, count - done, left)
                if step <= 0:
                    break
                done += step
                self._move(inode, index + done - step, Run(run.pfn + done - step, step))
        finally:
            if done < count and not store.read_only:
                store.allocator.free([Run(run.pfn + done, count - done)])
        return count

    async def _make_plain(self, number: int) -> None:
        """Let nothing of the file lie compressed: for extents, a piece is a hole."""
        import trio

        while inode := self._frames.file(number):
            self._frames.packed.changes(inode, 0, inode.end)
            if not inode.pieces:
                break
            self._frames.packed.make_way(inode, min(inode.pieces), 1)
            await trio.lowlevel.checkpoint()

    async def _withdraw(self, number: int) -> None:
        """Wait until no worker sees the file."""
        # Imported here, because the commands that make file systems never get here.
        import trio

        await trio.lowlevel.checkpoint()
        tables = self._store.tables
        while (token := tables.changed(number)) is not None:
            while not tables.is_over(token):  # noqa: ASYNC110
                await trio.sleep(_POLL_SECONDS)

    def _move(self, inode: Inode, index: int, run: Run) -> None:
        page_io = self._frames.io_of(inode)
        target = (run.pfn - index) << PAGE_SHIFT
        old = list(inode.extents.pieces(index, run.frame_count))
        with self._store.change() as change:
            # Only the transaction knows whether the file may have them when it has failed.
            change.adopt(run)
            for piece in old:
                position, length = piece.index << PAGE_SHIFT, piece.frame_count << PAGE_SHIFT
                at = target + position
                if piece.pfn < 0:
                    page_io.zero(position, at, length)
                else:
                    page_io.move(piece.pfn << PAGE_SHIFT, at, length)
            change.append(inode, media.pack_extent(index, *run))
            change.then(lambda: inode.map(index, *run))
            change.release(
                inode, [Run(piece.pfn, piece.frame_count) for piece in old if piece.pfn >= 0]
            )
