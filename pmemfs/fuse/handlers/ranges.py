"""Ranges of files: fallocate, holes, and copies."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine

import trio

from pmemfs.errors import system_error
from pmemfs.fuse.handlers.openfiles import OpenFiles
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.units import MIB
from pmemfs.volume.base import Later, Volume

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
COLLAPSE_RANGE = 0x08
ZERO_RANGE = 0x10
INSERT_RANGE = 0x20

_OFFSET_LIMIT = 1 << 63
_COPY_AT_ONCE_BYTES = 128 * MIB
"""copy_file_range(2) may copy less than it is asked for, so a request need not last for long."""
_COPY_STEP_BYTES = 4 * MIB


class RangeHandlers:
    """The kernel's questions about ranges."""

    def __init__(self, volume: Volume, files: OpenFiles) -> None:
        self._volume = volume
        self._files = files

    def allocate(
        self, caller: Caller, ino: int, offset_bytes: int, length_bytes: int, mode: int
    ) -> Later[None]:
        """Do as fallocate(2) does."""
        if not length_bytes or max(offset_bytes, length_bytes) >= _OFFSET_LIMIT:
            raise OSError(errno.EINVAL, "no such range")
        return self._files.change(
            caller, ino, lambda: self._allocate(ino, offset_bytes, length_bytes, mode)
        )

    def _allocate(self, ino: int, offset: int, length: int, mode: int) -> Later[None]:
        volume = self._volume
        keep_size = bool(mode & KEEP_SIZE)
        kind = mode & ~KEEP_SIZE
        if kind == 0:
            return volume.allocate(ino, offset, length, keep_size=keep_size)
        if mode == PUNCH_HOLE | KEEP_SIZE:
            return volume.punch(ino, offset, length)
        if kind == ZERO_RANGE:
            if volume.has_hole(ino, offset, length):
                # Mapping the hole would fill a thin image (mkfs zeroes a journal this way), and
                # leaving it would break the promise of ZERO_RANGE. As on tmpfs the caller chooses.
                raise OSError(errno.EOPNOTSUPP, "zeroing a hole")
            return volume.zero(ino, offset, length, keep_size=keep_size)
        if mode == COLLAPSE_RANGE:
            return volume.collapse(ino, offset, length)
        if mode == INSERT_RANGE:
            return volume.insert(ino, offset, length)
        raise OSError(errno.EOPNOTSUPP, "no such mode of fallocate")

    def seek(self, ino: int, offset_bytes: int, whence: int) -> int:
        """Where data (or a hole) comes next: lseek(2)."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "seeking to neither data nor hole")
        if offset_bytes >= _OFFSET_LIMIT:
            raise OSError(errno.ENXIO, "beyond any file")
        return self._volume.seek(ino, offset_bytes, for_data=whence == os.SEEK_DATA)

    def copy(
        self, caller: Caller, source: int, source_handle: int, source_bytes: int, target: int,
        target_handle: int, target_bytes: int, length_bytes: int,
    ) -> Later[int]:  # fmt: skip
        """Do as copy_file_range(2) does; how much was copied, perhaps less than there is."""
        if max(source_bytes, target_bytes) >= _OFFSET_LIMIT:
            raise OSError(errno.EINVAL, "no such range")
        length = min(length_bytes, _COPY_AT_ONCE_BYTES)
        if source == target and abs(source_bytes - target_bytes) < length:
            raise system_error(errno.EINVAL)
        files, may_overwrite = self._files, self._files.may_overwrite(target_handle)

        async def change() -> int:
            told = files.note_copy(source_handle)
            done = 0
            try:
                while done < length:
                    step = min(_COPY_STEP_BYTES, length - done)
                    copying = self._volume.copy(
                        source, source_bytes + done, target, target_bytes + done, step,
                        may_overwrite=may_overwrite,
                    )  # fmt: skip
                    copied = await copying if isinstance(copying, Coroutine) else copying
                    done += copied
                    if copied < step:
                        break
                    await trio.lowlevel.checkpoint()
            except OSError:
                if not done:
                    raise
            finally:
                if told is not None:
                    await told
            return done

        return files.change(caller, target, change)
