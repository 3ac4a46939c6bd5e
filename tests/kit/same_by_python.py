"""What a worker does to inodes, beside what Python does to a copy of the same pool.

A copy of pool, lookup counts and open places is made before each request. Python's clock stands
still at the tick in which the worker was asked, so times are compared as they are.
"""

from __future__ import annotations

import mmap
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.data_plane import ALL, MAX_WRITE, share_files
from kit.native_names import NativeNames
from kit.pools import MemoryMedium, content, mapped_pool
from pmemfs import clock
from pmemfs.clock import AccessTimes
from pmemfs.dataplane import layouts
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import OPEN_PLACE
from pmemfs.engine.base import Engine
from pmemfs.engine.sharing import share_pool
from pmemfs.engine.trimming import Trimmer
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.handshake import Terms
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, WireDoor
from pmemfs.media.inode import SLOT_BYTES, SLOTS_PER_FRAME
from pmemfs.media.label import Scheme
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.fs.extents import MappedExtent
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.holds import OwnHolds

ROOT_CALLER = Caller(0, 0, 0)
_PLACES = 1 << 14
Said = tuple[int, bytes]


class Twins:
    """A worker, and Python in a copy."""

    def __init__(self, native: NativeNames, monkeypatch: pytest.MonkeyPatch) -> None:
        self.native = native
        self.monkeypatch = monkeypatch
        self.note_accesses(AccessTimes.RELATIVE)

    def note_accesses(self, times: AccessTimes) -> None:
        """Which reads count as accesses from now on."""
        self.access_times = times
        self.native.files.tables.note_reads(times)

    def ask(
        self, opcode: Opcode, inode: int, operation: bytes, payload: bytes = b"",
        caller: Caller = ROOT_CALLER,
    ) -> Said | None:  # fmt: skip
        """What the worker answers, once Python has said and done the same; None if it hands over,
        and then it has changed nothing."""
        native = self.native
        before = content(native.files.pool.medium)
        counts = dict(native.files.shared.lookup_counts.counts())
        places = bytes(native.files.shared.opens[: _PLACES * OPEN_PLACE.size_bytes])
        latest_ns = native.word("last_time_ns")
        started_ns = clock.coarse_ns()
        verdict, error, data = native.worker.answer(
            operation, opcode=opcode, inode=inode, payload=payload, uid=caller.uid, gid=caller.gid,
            pid=caller.pid,
        )  # fmt: skip
        ended_ns = clock.coarse_ns()
        assert native.word("holder") == native.word("failed") == 0
        if verdict == "forward":
            assert content(native.files.pool.medium) == before
            assert dict(native.files.shared.lookup_counts.counts()) == counts
            return None
        native.catch_up()
        found = self._described(native.anew(), counts=native.files.shared.lookup_counts.counts())
        for now_ns in (started_ns, ended_ns):
            copy = Copy(before, counts, places, latest_ns)
            copy.fs.note_accesses(self.access_times, of_directories=True)
            with self.monkeypatch.context() as patch:
                patch.setattr(clock, "coarse_ns", lambda now_ns=now_ns: now_ns)
                said = self._said(opcode, *copy.ask(opcode, inode, operation + payload, caller))
                expected = self._described(copy.fs, counts=copy.holds.counts())
            if said == self._said(opcode, error, data) and expected == found:
                break
        assert self._said(opcode, error, data) == said
        assert found == expected
        return error, data

    def _said(self, opcode: Opcode, error: int, data: bytes) -> Said:
        if opcode == Opcode.OPEN and not error:
            # Each has its own handles.
            return error, data[8:]
        return error, data

    def _described(
        self, fs: FileSystem, counts: Iterable[tuple[int, int]]
    ) -> Mapping[object, object]:
        """All that a program can find, and how many frames nobody uses."""
        table = fs.store.table
        found: dict[object, object] = {"counts": sorted(counts)}
        for pfn in table.frames():
            for at in range(SLOTS_PER_FRAME):
                number = table.number_at((pfn << PAGE_SHIFT) + at * SLOT_BYTES)
                if table.head(number) is not None:
                    found[number] = self._inode(fs, number)
        return found

    def _inode(self, fs: FileSystem, number: int) -> object:
        inode = fs.inode(number)
        data, attributes = b"", fs.attributes(number)
        if inode.is_file:
            data = bytes(fs.read(number, 0, 1 << 20))
        return (
            # Python maps frames ahead.
            attributes._replace(block_count=0), inode.parent,
            list(inode.entries.items()), inode.xattrs, data,
            mapped_below(inode.extents, attributes.size_bytes), inode.live_slots,
            # Each finds free frames in pieces of its own.
            inode.data_frames == 0 and inode.log.slot_count, inode.state.size_bytes,
            fs.store.lines.accessed_ns(inode),
        )  # fmt: skip


def mapped_below(extents: Iterable[MappedExtent], size_bytes: int) -> list[int]:
    """The frames of a file that are mapped, as far as its size goes."""
    end = (size_bytes + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT
    return [
        index
        for extent in extents
        for index in range(extent.index, min(extent.index + extent.frame_count, end))
    ]


class Copy:
    """A copy of a pool, which Python serves."""

    def __init__(self, raw: bytes, counts: dict[int, int], places: bytes, latest_ns: int) -> None:
        self.pool = Pool.open(MemoryMedium(raw))
        self.holds = OwnHolds()
        for number, count in counts.items():
            self.holds.add(number, count)
        self.fs = FileSystem(self.pool, NoMemmap(), holds=self.holds)
        for number in counts:
            # One without a name stays in memory as long as it is held.
            self.fs.inode(number)
        self.fs.store.times._set_ns = latest_ns
        memory = mmap.mmap(-1, OPEN_PLACE.size_bytes << layouts.OPEN_PLACES_SHIFT)
        memory[: len(places)] = places
        # As if Python had opened what the worker has, too.
        memory[:8] = (_PLACES - 1).to_bytes(8, "little")
        handlers = Handlers(
            self.fs, engine := Engine(self.pool.medium, NoMemmap()),
            Trimmer(self.pool, self.pool.medium, engine, self.fs),
            opens=OpenPlaces(memoryview(memory)),
        )  # fmt: skip
        self.door = WireDoor(handlers, Terms(MAX_WRITE, 64, has_files=True, over_uring=False))

    def ask(self, opcode: Opcode, inode: int, operation: bytes, caller: Caller) -> Said:
        """What Python answers."""
        request = Request(inode, caller, operation)

        async def wait(answer: Coroutine[Any, Any, Answer]) -> Answer:
            return await answer

        try:
            answer = self.door.answer(opcode, request)
            if isinstance(answer, Coroutine):
                answer = trio.run(wait, answer)
        except OSError as error:
            return error.errno or 0, b""
        return 0, bytes(answer or b"")


@contextmanager
def twins(
    directory: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme = Scheme.NONE
) -> Iterator[Twins]:
    """A new, small file system with such a worker."""
    with mapped_pool(directory, scheme, 4 * KIB, 8 * MIB) as pool:
        FileSystem.format(pool)
        shared = share_pool(pool, worker_count=1, has_files=True)
        shared.set_header_word("answered", ALL)
        yield Twins(NativeNames(share_files(pool, shared)), monkeypatch)
        shared.close()
