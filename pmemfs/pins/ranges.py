"""Where the ranges of files lie that a client wants to pin.

A range is registered in the volume as it is found, so that the pin hears of each frame that leaves
the file from then on. Where stores are to be made, holes get frames first. What is compressed is
made plain first, and stays plain while it is registered.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from operator import itemgetter

import trio

from pmemfs.errors import CannotMapTransformed, CannotPin, TooManyPieces, system_error
from pmemfs.medium.base import Medium
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pins.pin import Pin, PinnedFile, WantedRange, runs_of
from pmemfs.units import MIB, format_size
from pmemfs.volume.base import HOLE, NOT_PLAIN, Piece, Volume, looked_at
from pmemfs.volume.pinned import Held

MOST_PIECES = 60_000
"""A process may have 65,530 mappings (vm.max_map_count), and needs some for itself."""
_PIECES_AT_ONCE = 4096
_place_of = itemgetter(1)
_FILL_BYTES = 4 * MIB
_PLAIN_BYTES = MIB
"""So much is made plain while nothing else is served: some ms."""


class PinnedRanges:
    """Finds the ranges of the pins of one mount. `tell` lets the kernel ask for an inode's
    attributes again."""

    def __init__(
        self, medium: Medium, volume: Volume, tell: Callable[[int], Awaitable[None]]
    ) -> None:
        self._medium = medium
        self._volume = volume
        self._tell = tell

    async def lay_out(self, number: int) -> None:
        """Lay a file out anew, in as few runs as there can be. Raises OSError."""
        while self._volume.read_on(number):
            await trio.lowlevel.checkpoint()
        laid_out = self._volume.lay_out(number)
        if isinstance(laid_out, Coroutine):
            await laid_out
        await self._tell(number)

    async def find(self, pin: Pin, wanted: WantedRange, *, may_make_plain: bool) -> None:
        """Find the frames of a range, and register them, a part at a time.

        Raises CannotMapTransformed, CannotPin for what is compressed and may not be made plain,
        TooManyPieces, MemoryFault and OSError: ENOSPC where there is no room to make it plain.
        """
        volume, number = self._volume, wanted.inode
        while volume.read_on(number):
            await trio.lowlevel.checkpoint()
        attributes = volume.attributes(number)
        if not stat.S_ISREG(attributes.mode):
            raise system_error(errno.EISDIR if stat.S_ISDIR(attributes.mode) else errno.EINVAL)
        if volume.is_encrypted(number):
            raise CannotMapTransformed(what=wanted.path or f"inode {number}")
        if not attributes.nlink and not pin.is_writable:
            # Its client may have found it by a name that was removed since.
            pin.was_renamed()
        start, size_bytes = wanted.offset_bytes, attributes.size_bytes
        if start < 0 or wanted.length_bytes < -1:
            raise system_error(errno.EINVAL)
        length = max(0, size_bytes - start)
        if wanted.length_bytes >= 0:
            length = min(length, wanted.length_bytes)
        pieces: list[Piece] = []
        file = PinnedFile(
            number, attributes.generation, wanted.path, start, length, size_bytes, pieces
        )
        pin.files.append(file)
        position, has_waited = start, False
        while position < start + length:
            if has_waited and not self._is_as_it_was(file):
                pin.become_stale()
                return
            some = volume.pieces(number, position, start + length - position, _PIECES_AT_ONCE)
            if NOT_PLAIN in map(_place_of, some):
                if not may_make_plain:
                    what = wanted.path or f"inode {number}"
                    raise CannotPin(errno.EOPNOTSUPP, what=what, why="it is compressed")
                await self._make_plain(file, position, some)
                has_waited = True
                continue
            if pin.is_writable and await self._fill(file, position, some):
                has_waited = True
                continue
            if self._medium.read_only and not self._medium.reserved:
                # Nothing gets memory here, and a touch of what has none may be a SIGBUS. No frame
                # can leave the file meanwhile: such a mount stays read-only.
                some = await trio.to_thread.run_sync(with_holes_of, self._medium, some)
            self.register(pin, number, position, some)
            before = position - start
            pieces += [(offset + before, at, size) for offset, at, size in some]
            pin.piece_count += len(some)
            if pin.piece_count > MOST_PIECES:
                raise TooManyPieces(what=wanted.path or f"inode {number}", most=MOST_PIECES)
            position += some[-1][0] + some[-1][2]
            if len(some) == _PIECES_AT_ONCE:
                await trio.lowlevel.checkpoint()
                has_waited = True

    def register(self, pin: Pin, number: int, position: int, pieces: Sequence[Piece]) -> None:
        """Register the frames of some pieces of a file, whose offsets count from a position."""
        runs = runs_of(number, position, pieces)
        if runs:
            held = Held(pin, number, [(pfn, pfn + count) for pfn, count, _, _ in runs])
            self._volume.pinned.add(held)
            pin.held.append(held)
            pin.runs += runs

    def _is_as_it_was(self, file: PinnedFile) -> bool:
        """Whether the range still lies in the file: behind the end of one that became shorter in
        the meantime, frames have undefined content, perhaps another file's."""
        attributes = self._volume.attributes(file.inode)
        end = file.offset_bytes + file.length_bytes
        return attributes.generation == file.generation and attributes.size_bytes >= end

    async def _make_plain(self, file: PinnedFile, position: int, pieces: Sequence[Piece]) -> None:
        """Make plain what is compressed in a range. Raises OSError: ENOSPC before anything is made
        plain if all of it is larger than what is free."""
        if self._volume.read_only:
            why = "it is compressed, and nothing can be made plain on a read-only mount"
            raise OSError(errno.EROFS, why)
        compressed = [piece for piece in pieces if piece[1] == NOT_PLAIN]
        await looked_at(self._volume)
        total_bytes = sum(length for _, _, length in compressed)
        try:
            self._check_room(total_bytes >> PAGE_SHIFT)
            for offset, _, length in compressed:
                for at in range(position + offset, position + offset + length, _PLAIN_BYTES):
                    if not self._is_as_it_was(file):
                        return
                    step = min(_PLAIN_BYTES, position + offset + length - at)
                    made = self._volume.make_plain(file.inode, at, step)
                    if isinstance(made, Coroutine):
                        await made
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size = format_size(total_bytes)
            why = f"{size} of it are compressed, and there is no room to make them plain"
            raise OSError(errno.ENOSPC, why) from None
        # It takes more blocks now.
        await self._tell(file.inode)

    async def _fill(self, file: PinnedFile, position: int, pieces: Sequence[Piece]) -> bool:
        """Give frames to the holes of a range, a step at a time; whether there were any.

        Raises OSError: ENOSPC before anything is filled if they are larger than what is free.
        """
        holes_bytes = sum(length for _, pool_bytes, length in pieces if pool_bytes == HOLE)
        if holes_bytes:
            await looked_at(self._volume)
            self._check_room(holes_bytes >> PAGE_SHIFT)
        has_holes = False
        for offset, pool_bytes, length in pieces:
            if pool_bytes >= 0:
                continue
            has_holes = True
            low = max(position, position + offset)
            high = min(file.offset_bytes + file.length_bytes, position + offset + length)
            for at in range(low, high, _FILL_BYTES):
                if not self._is_as_it_was(file):
                    return True
                step = min(_FILL_BYTES, high - at)
                filled = self._volume.allocate(file.inode, at, step, keep_size=True)
                if isinstance(filled, Coroutine):
                    await filled
                await trio.lowlevel.checkpoint()
        if has_holes:
            await self._tell(file.inode)
        return has_holes

    def _check_room(self, frame_count: int) -> None:
        """Raise ENOSPC if there are not so many free frames, nor others that become free now."""
        volume = self._volume
        if frame_count > volume.room().free_frames:
            is_freeing = volume.settle()
            room = volume.room()
            if frame_count > (room.total_frames if is_freeing else room.free_frames):
                raise system_error(errno.ENOSPC)


def with_holes_of(medium: Medium, pieces: list[Piece]) -> list[Piece]:
    """Pieces of a file, where holes of the pool are holes of the file, too. Raises MemoryFault."""
    found: list[Piece] = []
    for offset, pool_bytes, length in pieces:
        # How much of the piece is in `found`.
        done = 0
        for start, size in medium.with_memory(pool_bytes, length) if pool_bytes >= 0 else ():
            if start > pool_bytes + done:
                found.append((offset + done, -1, start - pool_bytes - done))
            found.append((offset + start - pool_bytes, start, size))
            done = start + size - pool_bytes
        if done < length:
            found.append((offset + done, -1, length - done))
        if len(found) > MOST_PIECES:
            # The caller refuses them, and the rest need not be looked for.
            break
    return found
