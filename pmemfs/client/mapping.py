"""Arrays over the pages of files, and what keeps them.

A `PinnedArray` is what `Mount.map` answers: an ndarray that a `with` statement takes, too. What it
gives there, and what `Mount.open` answers, is a `Mapping`: a hold on the pages that is independent
of arrays. Invariants:
- the base of each array is a `Shown`, which holds the addresses. numpy keeps it alive for every
  view, and so do memoryview, pyarrow and torch, whatever they make of an array;
- a mapping that is closed, or whose `with` has ended, holds nothing. Views that are alive then keep
  the pages as if they had been mapped alone;
- nothing here is called when an array dies. `medium/addresses` does all of that.
"""

from __future__ import annotations

import errno
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as AnyMapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import numpy as np

from pmemfs.client.closing import Closing
from pmemfs.client.connection import Connection, PinAnswer, connection_of_process
from pmemfs.client.elements import dtype_of
from pmemfs.client.memory import make_durable, map_pieces
from pmemfs.client.pin import About, Pin, PinnedFile, memory_of
from pmemfs.errors import BadMapping, CannotPin, Closed, StillInUse
from pmemfs.medium.addresses import Addresses, Shown

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Shape = int | Sequence[int]
PinnedRange = AnyMapping[str, Any]
"""A range as the daemon says it: `inode`, `generation`, `size_bytes`, `length_bytes`, `pieces`."""

TO_THE_END = -1
_MODES = ("r", "r+", "c")
_MOST_BYTES = (1 << 63) - 1


class MapRequest(NamedTuple):
    """An array that `Mount.map_many` is to make."""

    path: str | os.PathLike[str]
    shape: Shape | None = None
    """None: one dimension, up to the end of the file."""
    dtype: DTypeLike = "u1"
    offset: int = 0
    """Where in the file the array begins, in bytes."""


class Wanted(NamedTuple):
    """A MapRequest whose values have been looked at."""

    path: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any]
    offset_bytes: int

    @property
    def length_bytes(self) -> int:
        """How much of the file is wanted, or TO_THE_END."""
        if self.shape is None:
            return TO_THE_END
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, request: MapRequest) -> Wanted:
        """Raises BadMapping, NeedsPackage, and TypeError for what is no type or no shape."""
        path = os.fsdecode(request.path)
        dtype = dtype_of(request.dtype)
        if dtype.hasobject or not dtype.itemsize:
            raise BadMapping(path=path, why=f"elements of type {dtype} can't lie in a file")
        if request.offset < 0:
            raise BadMapping(path=path, why="the offset is below zero")
        shape = None if request.shape is None else shape_of(request.shape, path)
        wanted = cls(path, shape, dtype, request.offset)
        if request.offset + wanted.length_bytes > _MOST_BYTES:
            raise BadMapping(path=path, why=f"no file has {wanted.length_bytes} bytes")
        return wanted


def shape_of(shape: Shape, path: str) -> tuple[int, ...]:
    """A shape as a tuple. Raises BadMapping, and TypeError where numpy does."""
    dimensions = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    if any(each < 0 for each in dimensions):
        raise BadMapping(path=path, why=f"the shape {dimensions} has a dimension below zero")
    return dimensions


def check_mode(mode: str, path: str) -> None:
    """Raise BadMapping unless it is a mode."""
    if mode not in _MODES:
        why = f"the mode is {mode!r}, and not 'r', 'r+' or 'c'; Mount.create makes new files"
        raise BadMapping(path=path, why=why)


class PinnedArray(np.ndarray[tuple[int, ...], np.dtype[Any]]):
    """An ndarray over the pages of a file in the pool.

    Slices of it and results of computing with it are plain ndarrays. `with` gives a `Mapping` of
    the same pages. It pickles as any array does: its content, which is a plain array afterwards.
    """

    _mapping: Mapping | None = None

    def __enter__(self) -> Mapping:
        """A mapping of the same file, with the shape that was asked for. Raises NotPinned."""
        memory, _ = memory_of(self)
        self._mapping = Mapping(memory)
        return self._mapping

    def __exit__(self, *error: object) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.release()

    def flush(self) -> None:
        """As `Mapping.flush`."""
        Mapping(memory_of(self)[0]).flush()

    if not TYPE_CHECKING:
        # numpy's own types say more of what an index gives.
        def __getitem__(self, index, /):
            return _plain(super().__getitem__(index))

    def __array_wrap__(self, array: Array, context: Any = None, return_scalar: bool = False) -> Any:
        if array is self:
            return array
        # numpy before 2.0 does not say whether it wants a scalar.
        is_scalar = return_scalar or (array.ndim == 0 and np.lib.NumpyVersion(np.__version__) < "2")
        return array[()] if is_scalar else _plain(array)

    def __reduce_ex__(self, protocol: Any, /) -> Any:
        return _plain(self).__reduce_ex__(protocol)


class Mapping(Closing):
    """A file's pages in the pool, mapped: a hold that lasts until `close`, or the end of a `with`.

    It pickles by reference: what is unpickled maps the same file anew, or raises FileNotFoundError
    if that has been removed. Arrays of it pickle by content.
    """

    def __init__(self, memory: Addresses) -> None:
        about = memory.about
        assert isinstance(about, About)
        self._memory: Addresses | None = memory
        self._about = about
        self._array: Callable[[], Array | None] = _nothing

    def __repr__(self) -> str:
        state = "closed" if self.closed else repr(self._about.mode)
        return f"<Mapping of {self._about.file.path!r}, {state}>"

    @property
    def array(self) -> Array:
        """A plain ndarray, the same one as long as it lives; every view of it keeps the pages.

        Raises Closed.
        """
        array = self._array()
        if array is None or self._memory is None:
            array = array_over(self._held())
            self._array = weakref.ref(array)
        return array

    @property
    def pin(self) -> Pin:
        """What holds the pages."""
        return self._about.pin

    @property
    def mode(self) -> str:
        """`r`, `r+` or `c`."""
        return self._about.mode

    @property
    def closed(self) -> bool:
        """Whether it holds nothing any more."""
        return self._memory is None

    def flush(self) -> None:
        """Make what was stored durable, as an fsync of the file does, and count it for its times.

        Of a mapping that is not of mode `r+` there is nothing to do. Raises Closed, OSError (EIO),
        NoAnswer, and DaemonGone if the mount has ended, also where the pool, or another one, is
        mounted there again.
        """
        memory, about = self._held(), self._about
        if about.mode == "r+":
            make_durable(memory, about.durability)
            about.connection.ask("flush", pin=about.pin.number)

    def close(self, *, force: bool = False) -> None:
        """Let go of the pages.

        Raises StillInUse if an array or a view is alive. With `force` these show zeroes from now
        on, and what is stored through them is lost.
        """
        # No variable has the addresses here: the traceback of StillInUse would hold them.
        if self._memory is not None and self._memory.is_shown:
            if not force:
                raise StillInUse(path=self._about.file.path)
            self._memory.force()
        self._memory = None

    def release(self) -> None:
        """Let go of the pages, except of those that an array or a view shows."""
        self._memory = None

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        self._held()
        about = self._about
        where = about.connection.mountpoint, about.uuid
        return unpickled, (*where, about.file, about.mode, about.dtype, about.shape)

    def _held(self) -> Addresses:
        memory = self._memory
        if memory is None:
            raise Closed(what=f"the mapping of {self._about.file.path}")
        return memory


def _nothing() -> None:
    return None


def _plain(array: Any) -> Any:
    return array.view(np.ndarray) if type(array) is PinnedArray else array


def array_over(memory: Addresses) -> Array:
    """A new ndarray over addresses, as it was asked for when they were mapped."""
    about = cast(About, memory.about)
    return np.ndarray(about.shape, about.dtype, buffer=cast(Any, Shown(memory)))


def pinned_array_over(memory: Addresses) -> PinnedArray:
    """As `array_over`, for `with` statements, too."""
    return array_over(memory).view(PinnedArray)


def map_all(
    connection: Connection, wanted: Sequence[Wanted], inodes: Sequence[int], *, mode: str,
    contiguous: bool = False,
) -> list[Addresses]:  # fmt: skip
    """Pin ranges of files with one pin, and map them. Raises as `Mount.map`."""
    if not wanted:
        return []
    answer = connection.pin(
        [
            (inode, each.offset_bytes, each.length_bytes)
            for inode, each in zip(inodes, wanted, strict=True)
        ],
        [each.path for each in wanted],
        writable=mode == "r+",
        contiguous=contiguous,
    )
    made: list[Addresses] = []
    try:
        _map_each(made, connection, wanted, answer, mode)
    except BaseException:
        # The traceback has references to all of this, and may live long.
        made.clear()
        answer.end.end()
        raise
    return made


def _map_each(
    made: list[Addresses], connection: Connection, wanted: Sequence[Wanted], answer: PinAnswer,
    mode: str,
) -> None:  # fmt: skip
    pairs = list(zip(wanted, answer.files, strict=True))
    files = tuple(
        PinnedFile(each.path, found["inode"], found["generation"], each.offset_bytes,
                   found["length_bytes"])
        for each, found in pairs
    )  # fmt: skip
    pool = answer.pool
    pin = Pin(answer.end, pool.words, number=answer.number, place=answer.place,
              is_writable=mode == "r+", files=files)  # fmt: skip
    for file, (each, found) in zip(files, pairs, strict=True):
        shape = _found_shape(each, found)
        about = About(pin, file, mode, each.dtype, shape, pool.words, pool.durability, pool.uuid,
                      connection)  # fmt: skip
        made.append(
            map_pieces(
                pool,
                found["pieces"],
                about.file.length_bytes,
                mode=mode,
                path=each.path,
                held=answer.end,
                tally=connection.tally,
                about=about,
            )
        )


def _found_shape(wanted: Wanted, found: PinnedRange) -> tuple[int, ...]:
    """The shape of what was pinned. Raises BadMapping."""
    length_bytes, item_bytes = found["length_bytes"], wanted.dtype.itemsize
    if wanted.shape is None:
        if wanted.offset_bytes > found["size_bytes"]:
            why = f"the offset is behind its end, at {found['size_bytes']} bytes"
            raise BadMapping(path=wanted.path, why=why)
        if length_bytes % item_bytes:
            why = f"its {length_bytes} bytes are not a multiple of {item_bytes}, one {wanted.dtype}"
            raise BadMapping(path=wanted.path, why=why)
        return (length_bytes // item_bytes,)
    if length_bytes < wanted.length_bytes:
        why = (
            f"it has {length_bytes} bytes from offset {wanted.offset_bytes} on, and an array of "
            f"shape {wanted.shape} of {wanted.dtype} needs {wanted.length_bytes}; make it larger "
            "first (os.truncate)"
        )
        raise BadMapping(path=wanted.path, why=why)
    return wanted.shape


def unpickled(
    mountpoint: str, uuid: str, file: PinnedFile, mode: str, dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> Mapping:  # fmt: skip
    """A mapping of the same range of the same file, as it is now. Raises FileNotFoundError if the
    file was removed, and as `Mount.open`."""
    connection = connection_of_process(mountpoint)
    wanted = Wanted(file.path, shape, dtype, file.offset_bytes)
    try:
        (memory,) = map_all(connection, [wanted], [file.inode], mode=mode)
    except CannotPin as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        raise _removed(file) from None
    about = memory.about
    assert isinstance(about, About)
    if (about.uuid, about.file.generation) != (uuid, file.generation):
        raise _removed(file)
    return Mapping(memory)


def _removed(file: PinnedFile) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "the file of the mapping was removed", file.path)
