"""A mount, as a program has it: `connect` answers a `Mount`, and that maps its files.

A path is named from the mountpoint or from the root. What the kernel doesn't let this user open, it
doesn't let it map.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from pmemfs.client.closing import Closing
from pmemfs.client.connection import Connection
from pmemfs.client.mapping import (
    Mapping,
    MapRequest,
    PinnedArray,
    Shape,
    Wanted,
    check_mode,
    map_all,
    pinned_array_over,
)
from pmemfs.client.newfile import NewFile
from pmemfs.control.shape import Malformed, decode
from pmemfs.errors import NoAnswer
from pmemfs.media.pinreport import PinReport
from pmemfs.medium.addresses import Addresses

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


class MountStatistics(NamedTuple):
    """What this process has of a mount."""

    pin_count: int
    mapping_count: int
    """Of arrays that were mapped one by one; views don't count."""
    mapped_bytes: int
    """Addresses, in whole pages."""


def connect(mountpoint: str | os.PathLike[str]) -> Mount:
    """A mount of pmemfs, by its mountpoint or any path in it.

    Raises NotMounted, NotPermitted if it is another user's (only its owner and root get pages), and
    OSError.
    """
    return Mount(mountpoint)


class Mount(Closing):
    """A mounted pool, whose files can be mapped as arrays. Its methods may be called by any thread.

    `with` closes it in the end. Arrays outlive that.
    """

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        self._connection = Connection(mountpoint)

    def __repr__(self) -> str:
        return f"<Mount {self.mountpoint!r}{', closed' if self._connection.is_closed else ''}>"

    @property
    def mountpoint(self) -> str:
        """Where it is mounted."""
        return self._connection.mountpoint

    def map(
        self, path: str | os.PathLike[str], *, shape: Shape | None = None, dtype: DTypeLike = "u1",
        mode: str = "r", offset: int = 0, contiguous: bool = False,
    ) -> PinnedArray:  # fmt: skip
        """A file, or a part of it, as an array over its pages in the pool.

        Args:
            path: the file.
            shape: of the array; by default one dimension, up to the end of the file.
            dtype: of the elements, anything that numpy takes, without Python objects.
            mode: `r` read-only, `r+` stores go to the file, `c` stores go to private copies of
                pages. With `r`, holes read as zeroes and take no room; with `r+` they get memory.
            offset: where in the file the array begins, in bytes.
            contiguous: lay the file out anew, in one piece and without holes, if it isn't so. That
                needs a file that nobody has mapped.

        The array and all views of it keep the pages, whatever becomes of the file. Stores are
        durable after `flush`. The file may grow or shrink; the array stays as large as it is.

        Raises:
            OSError: the file can't be opened, the pool is full (ENOSPC) or read-only (EROFS).
            BadMapping: the mode, the shape or the type can't be had; it is a ValueError.
            NeedsPackage: the type is one of ml_dtypes, which is not installed.
            CannotMapTransformed: the file is encrypted. One that is compressed is made plain first;
                if there is no room for that, it is an OSError (ENOSPC).
            NoPageStructures: the pool has the scheme `none`.
            TooManyPins, TooManyPieces, TooManyMappings, TooManyOpenFiles: a limit is reached.
            DaemonGone, NoAnswer, Closed: the daemon can't be asked.
        """
        return pinned_array_over(
            self._map_one(MapRequest(path, shape, dtype, offset), mode, contiguous)
        )

    def open(
        self, path: str | os.PathLike[str], *, shape: Shape | None = None, dtype: DTypeLike = "u1",
        mode: str = "r", offset: int = 0, contiguous: bool = False,
    ) -> Mapping:  # fmt: skip
        """A hold on the pages of a file, with an array over them, that can be closed.

        Takes and raises what `map` does.
        """
        return Mapping(self._map_one(MapRequest(path, shape, dtype, offset), mode, contiguous))

    def map_many(
        self, requests: Iterable[MapRequest | str | os.PathLike[str]], *, mode: str = "r",
        contiguous: bool = False,
    ) -> list[PinnedArray]:  # fmt: skip
        """Arrays over many files, which one pin holds; a path stands for all of its file.

        So they need one open file of this process, and one question. All pages are held until the
        last of the arrays is gone. Raises what `map` does, and then nothing is mapped.
        """
        wanted = [each if isinstance(each, MapRequest) else MapRequest(each) for each in requests]
        return [pinned_array_over(memory) for memory in self._map(wanted, mode, contiguous)]

    def create(
        self, path: str | os.PathLike[str], shape: Shape, dtype: DTypeLike = "u1"
    ) -> NewFile:
        """A new file, as an array of zeroes in the pool, that nobody sees until it is committed.

        Raises what `map` does, and NoNewFiles for a mount that is one device. The directory must be
        there; a file of that name is replaced by the commit.
        """
        return NewFile(self._connection, Wanted.of(MapRequest(path, shape, dtype)))

    def pins(self) -> list[PinReport]:
        """All pins of the mount, of this process and of others. Raises DaemonGone, NoAnswer, and
        Closed."""
        said, _ = self._connection.ask("pins")
        try:
            return decode(list[PinReport], said)
        except Malformed as error:
            why = f"its answer makes no sense: {error}"
            raise NoAnswer(path=self.mountpoint, why=why) from None

    def statistics(self) -> MountStatistics:
        """What this process has pinned and mapped through this object."""
        tally = self._connection.tally
        return MountStatistics(tally.pins, tally.mappings, tally.mapped_bytes)

    def close(self) -> None:
        """Ask the daemon nothing more. Arrays stay, and keep their pages."""
        self._connection.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return connect, (self.mountpoint,)

    def _map_one(self, request: MapRequest, mode: str, contiguous: bool) -> Addresses:
        wanted = Wanted.of(request)
        check_mode(mode, wanted.path)
        with self._connection.opened(wanted.path, writable=mode == "r+") as inode:
            (memory,) = map_all(self._connection, [wanted], [inode], mode=mode,
                                contiguous=contiguous)  # fmt: skip
        return memory

    def _map(self, requests: Iterable[MapRequest], mode: str, contiguous: bool) -> list[Addresses]:
        wanted = [Wanted.of(request) for request in requests]
        with ExitStack() as opened:
            inodes = []
            for each in wanted:
                check_mode(mode, each.path)
                file = self._connection.opened(each.path, writable=mode == "r+")
                inodes.append(opened.enter_context(file))
            return map_all(self._connection, wanted, inodes, mode=mode, contiguous=contiguous)
