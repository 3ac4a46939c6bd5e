"""Named arrays in a directory of a mount, for any number of processes at once.

    cache = TensorCache("/mnt/pmem/kv", capacity="64GiB")
    cache.put("layer0/prefix9", array)
    t = cache.get("layer0/prefix9")

Each entry is one file of the safetensors format (`tensorfile`), named after its key (`entrynames`).
`cacheroom` finds room for new ones. Invariants:
- an entry appears under its name when it is complete and durable, in one step, so nobody ever gets
  a part of one, also after a kill or a power failure;
- what `get` answers shows the entry that had the key at some instant of the call, and goes on doing
  so. A word in shared memory says whether a mapping is still that of its key;
- an entry that is mapped here, and that no array shows, is *idle*. It stays pinned so that the next
  `get` asks nobody. Idle entries are few, because nobody can remove an entry that is pinned;
- no lock is held while anything can wait or run a finalizer. What threads share are dictionaries,
  and each operation on one is whole.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
from collections.abc import Callable
from time import time_ns
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from pmemfs.client.cacheroom import CacheRoom, Candidate, any_candidate, files_of, room_of
from pmemfs.client.closing import Closing
from pmemfs.client.connection import Connection
from pmemfs.client.elements import dtype_of
from pmemfs.client.entrynames import key_of, name_of
from pmemfs.client.mapping import Array, Shape, Wanted, map_all, shape_of
from pmemfs.client.newfile import NewFile
from pmemfs.client.pin import About
from pmemfs.client.tensorfile import as_stored, header_of, read_header
from pmemfs.errors import (
    BadCache,
    BadEntry,
    CacheFull,
    Closed,
    NoNewFiles,
    NotMounted,
    PmemfsError,
    TooManyOpenFiles,
    TooManyPins,
)
from pmemfs.medium.addresses import Addresses, Shown
from pmemfs.units import format_size, parse_size

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

Made = TypeVar("Made")

_MOST_IDLE = 256
_IDLE_DESCRIPTORS = 8
"""Idle entries have at most one of so many descriptors that the process may have."""
_IDLE_SHARE = 64
"""Idle entries of one process take at most one of so many parts of the capacity, or of the pool.
The one that was used last always stays."""
_TRIES = 20


class CacheStatistics(NamedTuple):
    """What a cache holds, and what this object has done with it."""

    entry_count: int
    """Of the cache, as far as the processes that use it have noted."""
    room_bytes: int
    """That these entries take, in whole pages; as above."""
    capacity_bytes: int | None
    mapped_count: int
    """Entries that are mapped here, those that are idle included."""
    hits: int
    """Calls of `get` that asked nobody."""
    first_gets: int
    """Calls of `get` that mapped an entry."""
    misses: int
    """Calls of `get` that answered None."""
    puts: int
    evicted_count: int
    """Entries that were removed for others."""
    evicted_bytes: int


class _Mapped:
    """An entry that is mapped here."""

    __slots__ = (
        "dtype", "inode", "memory", "offset_bytes", "path", "place", "shape", "used_ns", "words",
    )  # fmt: skip

    def __init__(self, path: str, memory: Addresses) -> None:
        """Raises BadEntry."""
        about = memory.about
        assert isinstance(about, About)
        self.path = path
        self.memory = memory
        self.words = about.words
        self.place = about.pin.place
        self.inode = about.file.inode
        self.used_ns = 0
        with memoryview(Shown(memory)) as file:
            self.dtype, self.shape, self.offset_bytes = read_header(file, path)

    @property
    def is_current(self) -> bool:
        """Whether it still is what its name stands for. Asks nobody."""
        return not self.words.read(self.place)

    def array(self) -> Array:
        """A new array over it."""
        # numpy's own types don't know of buffers.
        shown: Any = Shown(self.memory)
        return np.ndarray(self.shape, self.dtype, shown, self.offset_bytes)


class TensorCache(Closing):
    """A cache of named arrays. Its methods may be called by any thread, and by a forked child.

    `with` closes it in the end. Arrays outlive that.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, capacity: int | str | None = None
    ) -> None:
        """Use a directory of a mount of mode `fs`, which is made if it isn't there.

        Args:
            directory: where the entries are. Other files in it are left alone, unless they are of
                the safetensors format: those are entries, too.
            capacity: how much the entries may take, in bytes or as "64GiB"; by default as much as
                the pool has. It holds for what this object adds.

        Raises:
            BadCache: the directory can't be used, for example because it is encrypted.
            BadSize: the capacity is not a size.
            NotMounted, NotPermitted, DaemonGone, NoAnswer: as of `connect`.
            NoPageStructures: the pool has the scheme `none`, so no page can be pinned.
        """
        self.directory = os.path.abspath(os.fsdecode(directory))
        self.capacity_bytes = parse_size(str(capacity)) if capacity is not None else None
        self._mapped: dict[str, _Mapped] = {}
        self._hits = self._first_gets = self._misses = self._puts = 0
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_idle = max(1, min(_MOST_IDLE, descriptors // _IDLE_DESCRIPTORS))
        self._sweep_at = self._most_idle
        self._unswept_bytes = 0
        try:
            self._connection = _connection_around(self.directory)
            with self._connection.translated():
                is_new = not os.path.isdir(self.directory)
                os.makedirs(self.directory, exist_ok=True)
                self._connection.check_device(self.directory, os.stat(self.directory).st_dev)
                self._room = CacheRoom(self._connection, self.directory)
                pool = os.statvfs(self.directory)
        except BadCache:
            if is_new:
                os.rmdir(self.directory)
            raise
        except NoNewFiles as error:
            raise BadCache(path=self.directory, why=str(error)) from None
        except OSError as error:
            if isinstance(error, PmemfsError):
                raise
            raise BadCache(
                path=self.directory, why=(error.strerror or str(error)).lower()
            ) from None
        most_bytes = self.capacity_bytes or pool.f_blocks * pool.f_frsize
        self._most_idle_bytes = most_bytes // _IDLE_SHARE

    def __repr__(self) -> str:
        return f"<TensorCache {self.directory!r}{', closed' if self._is_closed else ''}>"

    def get(self, key: str) -> Array | None:
        """The array of an entry, over its pages in the pool; None if there is none.

        It is read-only, and keeps its pages and what they say, whatever becomes of the entry. If
        this process has the entry mapped, nobody is asked.

        Raises BadKey, BadEntry if the file is no entry, NeedsPackage if its type is one of
        ml_dtypes and that is not installed, TooManyOpenFiles or TooManyPins if arrays
        of too many entries are alive, OSError, DaemonGone, NoAnswer, and Closed.
        """
        mapped = self._mapped.get(key)
        if mapped is not None and not mapped.words.read(mapped.place):
            mapped.used_ns = time_ns()
            self._hits += 1
            return mapped.array()
        return self._first(key)

    def put(self, key: str, array: ArrayLike) -> None:
        """Make an array the entry of a key, for all processes; it replaces the one that was there.

        The elements are copied once, into the pool. What is put at the same time under one key by
        several processes appears one after the other, each of it whole.

        Raises BadKey, BadArray if safetensors has no name for the type of the elements, CacheFull
        if no room can be made, OSError, DaemonGone, NoAnswer, and Closed.
        """
        given = np.asarray(array)
        with self.reserve(key, given.shape, given.dtype) as made:
            made.array[...] = given
            made.commit()

    def reserve(self, key: str, shape: Shape, dtype: DTypeLike) -> Reservation:
        """A new entry, whose array lies in the pool and is to be filled, and then committed.

        The array begins as zeroes. Nobody sees the entry before, and without a commit nothing
        remains of it. Raises what `put` does.
        """
        name = name_of(key)
        given = dtype_of(dtype)
        stored = as_stored(given)
        header = header_of(key, stored, dimensions := shape_of(shape, key))
        path = os.path.join(self.directory, name)
        size_bytes = len(header) + math.prod(dimensions) * stored.itemsize
        self._check_open()
        self._fit(room_of(size_bytes))
        new = self._made(path, size_bytes)
        new.array[: len(header)] = np.frombuffer(header, np.uint8)

        def commit() -> None:
            self._committed(key, new, path, size_bytes)

        return Reservation(key, new, commit, stored, dimensions, len(header))

    def delete(self, key: str) -> bool:
        """Remove an entry; False if there is none. Arrays of it keep its pages.

        Raises BadKey, OSError, DaemonGone, NoAnswer, and Closed.
        """
        self._check_open()
        path = os.path.join(self.directory, name_of(key))
        self._mapped.pop(key, None)
        with self._connection.translated():
            try:
                room_bytes = room_of(os.lstat(path).st_size)
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        if (directory := os.path.dirname(path)) != self.directory:
            # It stays if there is anything in it.
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        self._room.changed(-1, -room_bytes)
        return True

    def keys(self) -> list[str]:
        """The keys of all entries, sorted, as the directory has them now. Raises OSError,
        DaemonGone, and Closed."""
        self._check_open()
        with self._connection.translated():
            names = [os.path.relpath(path, self.directory) for path, _ in files_of(self.directory)]
        return sorted(key for name in names if (key := key_of(name)) is not None)

    def statistics(self) -> CacheStatistics:
        """What the cache holds, and what this object has done. Raises OSError, DaemonGone, NoAnswer
        and Closed."""
        self._check_open()
        taken = self._room.taken()
        return CacheStatistics(
            entry_count=taken.entry_count,
            room_bytes=taken.room_bytes,
            capacity_bytes=self.capacity_bytes,
            mapped_count=len(self._mapped),
            hits=self._hits,
            first_gets=self._first_gets,
            misses=self._misses,
            puts=self._puts,
            evicted_count=self._room.evicted_count,
            evicted_bytes=self._room.evicted_bytes,
        )

    def close(self) -> None:
        """Let go of everything, except of what arrays show."""
        self._connection.close()
        self._mapped.clear()
        self._room.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.directory, self.capacity_bytes)

    # What `get` is made of

    def _first(self, key: str) -> Array | None:
        """Map an entry, and answer it."""
        self._check_open()
        self._mapped.pop(key, None)
        path = os.path.join(self.directory, name_of(key))
        for _ in range(_TRIES):
            memory = self._map(path)
            if memory is None:
                self._misses += 1
                return None
            mapped = _Mapped(path, memory)
            # Where the name was another file's when the pages were pinned, look again.
            if mapped.is_current:
                break
        try:
            array = mapped.array()
        except ValueError as error:
            raise BadEntry(path=path, why=f"numpy has no such array ({error})") from None
        self._first_gets += 1
        self._keep(key, mapped)
        return array

    def _map(self, path: str) -> Addresses | None:
        """Pin and map a file; None if there is none."""
        wanted = Wanted(path, None, np.dtype(np.uint8), 0)
        for may_retry in (True, False):
            try:
                with self._connection.opened(path, writable=False) as inode:
                    (memory,) = map_all(self._connection, [wanted], [inode], mode="r")
                return memory
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (TooManyOpenFiles, TooManyPins):
                if not may_retry or not self._sweep(0):
                    raise
        raise AssertionError("the last try returns or raises")

    def _keep(self, key: str, mapped: _Mapped) -> None:
        """Keep an entry mapped, and let go of others if there are too many."""
        mapped.used_ns = time_ns()
        self._mapped[key] = mapped
        self._unswept_bytes += mapped.memory.length
        if len(self._mapped) > self._sweep_at or self._unswept_bytes > self._most_idle_bytes:
            self._sweep(self._most_idle)

    def _sweep(self, most_idle: int) -> int:
        """Let go of idle entries: of those that are entries no more, and of those that were used
        the longest ago. How many."""
        let_go = kept = kept_bytes = 0
        for key, mapped in reversed(self._idle()):
            kept_bytes += mapped.memory.length
            is_little = kept == 0 or kept_bytes <= self._most_idle_bytes
            if kept < most_idle and is_little and mapped.is_current:
                kept += 1
            elif self._mapped.pop(key, None) is not None:
                let_go += 1
        # The next time when there are as many more, so that this costs little for each.
        self._sweep_at = len(self._mapped) + self._most_idle
        self._unswept_bytes = 0
        return let_go

    def _idle(self) -> list[tuple[str, _Mapped]]:
        """Entries that are mapped, and that no array shows; those first that were used the longest
        ago."""
        mapped = self._mapped.copy()
        idle = [each for each in mapped.items() if not each[1].memory.is_shown]
        return sorted(idle, key=lambda each: each[1].used_ns)

    # What `put` is made of

    def _fit(self, room_bytes: int) -> None:
        """Make so much room within the capacity. Raises CacheFull."""
        capacity = self.capacity_bytes
        if capacity is None:
            return
        if room_bytes > capacity:
            raise self._full(room_bytes, f"its capacity is {format_size(capacity)}")
        while (over := self._room.taken().room_bytes + room_bytes - capacity) > 0:
            if not self._evict(over):
                if self._room.taken().room_bytes + room_bytes <= capacity:
                    return
                raise self._full(room_bytes, "what it holds is in use")

    def _made(self, path: str, size_bytes: int) -> NewFile:
        """A new file that can have a path."""
        wanted = Wanted(path, (size_bytes,), np.dtype(np.uint8), 0)
        return self._with_room(path, size_bytes, lambda: NewFile(self._connection, wanted))

    def _committed(self, key: str, new: NewFile, path: str, size_bytes: int) -> None:
        """Give a complete entry its name, and note it."""
        entry_count, room_bytes = 1, room_of(size_bytes)
        # Where several processes replace it at once, the next look at all files corrects this.
        with contextlib.suppress(FileNotFoundError):
            room_bytes -= room_of(os.lstat(path).st_size)
            entry_count = 0
        self._with_room(path, size_bytes, new.commit)
        self._mapped.pop(key, None)
        self._puts += 1
        self._room.changed(entry_count, room_bytes)
        # Others may have made room for theirs at the same time.
        with contextlib.suppress(CacheFull):
            self._fit(0)

    def _with_room(self, path: str, size_bytes: int, make: Callable[[], Made]) -> Made:
        """Do what makes a file, with its directory there, and with room in the pool."""
        needs_directory = False
        for tries_left in reversed(range(_TRIES)):
            try:
                if needs_directory:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                return make()
            except FileNotFoundError:
                if not tries_left:
                    raise
                needs_directory = True
            except (TooManyOpenFiles, TooManyPins):
                if not self._sweep(0):
                    raise
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if not self._evict(room_of(size_bytes)):
                    break
        why = "the pool is full, and what the cache holds is in use"
        raise self._full(size_bytes, why) from None

    def _evict(self, wanted_bytes: int) -> int:
        """Remove entries that take so much, if they can be; what they took."""
        return self._room.evict(wanted_bytes, self._let_go)

    def _let_go(self, before_ns: int, wanted_bytes: int) -> list[Candidate]:
        """Let go of idle entries that were used before a time, those first that were used the
        longest ago, until they take so much."""
        found: list[Candidate] = []
        for key, mapped in self._idle():
            if mapped.used_ns >= before_ns or wanted_bytes <= 0:
                break
            if self._mapped.pop(key, None) is not None:
                room_bytes = room_of(mapped.memory.length)
                found.append(any_candidate(mapped.path, mapped.inode, room_bytes))
                wanted_bytes -= room_bytes
        return found

    def _full(self, room_bytes: int, why: str) -> CacheFull:
        return CacheFull(wanted=format_size(room_bytes), path=self.directory, why=why)

    @property
    def _is_closed(self) -> bool:
        return self._connection.is_closed

    def _check_open(self) -> None:
        if self._is_closed:
            raise Closed(what=f"the cache {self.directory}")


class Reservation(Closing):
    """An entry in the making. `with` gives it up if it is not committed.

    Views of its array that are alive after the commit can still store into the entry. So drop them,
    unless this is wanted.
    """

    def __init__(
        self, key: str, new: NewFile, commit: Callable[[], None], dtype: np.dtype[Any],
        shape: tuple[int, ...], offset_bytes: int,
    ) -> None:  # fmt: skip
        self.key = key
        self._new = new
        self._commit = commit
        self._dtype = dtype
        self._shape = shape
        self._offset_bytes = offset_bytes

    def __repr__(self) -> str:
        return f"<Reservation of {self.key!r}>"

    @property
    def array(self) -> Array:
        """The array to fill. Raises Closed."""
        return np.ndarray(self._shape, self._dtype, self._new.array, self._offset_bytes)

    def commit(self) -> None:
        """Make it durable, then make it the entry of its key. Raises what `put` does."""
        self._commit()

    def close(self) -> None:
        """Let go of it, and without a commit of all that was stored."""
        self._new.close()


def _connection_around(directory: str) -> Connection:
    """A connection with the mount that a directory is in, or will be. Raises as `Connection`."""
    # It is made afterwards: outside of a mount nothing is to be left behind.
    there = directory
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        return Connection(there)
    except NotMounted as error:
        raise NotMounted(path=directory, what=error.facts["what"]) from None


def _unpickled(directory: str, capacity_bytes: int | None) -> TensorCache:
    return TensorCache(directory, capacity=capacity_bytes)
