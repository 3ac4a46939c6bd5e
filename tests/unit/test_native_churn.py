"""A worker that makes, writes, closes and removes files for long leaves nothing behind."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import pytest

from kit.data_plane import ALL, MAX_WRITE, share_files, shared_files
from kit.native_names import HANDLES, NativeNames, create_in
from kit.pools import mapped_pool
from pmemfs.dataplane import layouts
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.native import Responder, store_word
from pmemfs.engine.sharing import share_pool
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.filesystem import FIRST_INODES_FRAME
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.units import KIB, MIB
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem

ONE_DAEMON = threading.Lock()
ENTRY_BYTES = wire.ENTRY_OUT.size + wire.ATTR.size


class Churn:
    """One file after the other, served by whoever can."""

    def __init__(self, native: NativeNames, worker: Responder | None = None) -> None:
        self.native = native
        self.worker = worker or native.worker
        self.first_name = 0
        self.handed_over = 0
        self.served = 0

    def serve(self, opcode: Opcode, inode: int, operation: bytes, payload: bytes = b"") -> bytes:
        verdict, error, data = self.worker.answer(
            operation, opcode=opcode, inode=inode, payload=payload
        )
        if verdict == "forward":
            self.handed_over += 1
            with ONE_DAEMON:
                error, data = self.native.ask_here(opcode, inode, operation + payload)
                self.native.names.take()
                self.native.refill()
                self.native.names.free()
        else:
            self.served += 1
        assert error == 0, (opcode, error)
        return data

    def cycle(self, at: int, *, is_open: bool) -> None:
        """Make a file, write it, close it before or after its name goes, and forget it."""
        name = b"%d" % (self.first_name + at % 100)
        data = name[-1:] * (at % 9000 + 1)
        made = self.serve(Opcode.CREATE, ROOT, create_in(name, flags=os.O_RDWR))
        (number,) = struct.unpack_from("<Q", made)
        (handle,) = struct.unpack_from("<Q", made, ENTRY_BYTES)
        head = wire.WRITE_IN.pack(handle, 0, len(data), 0, 0, 0)
        self.serve(Opcode.WRITE, number, head, data)
        head = wire.READ_IN.pack(handle, 0, 9000, 0, 0, 0)
        assert self.serve(Opcode.READ, number, head) == data
        release = wire.RELEASE_IN.pack(handle, 0, 0, 0)
        if not is_open:
            self.serve(Opcode.RELEASE, number, release)
        self.serve(Opcode.UNLINK, ROOT, name + b"\0")
        self.serve(Opcode.FORGET, number, wire.FORGET_IN.pack(1))
        if is_open:
            self.serve(Opcode.RELEASE, number, release)


def assert_nothing_is_left(native: NativeNames) -> None:
    """No handle, hold, name or frame."""
    fs = native.fs
    native.catch_up()
    while native.names.orphans.count:
        for number in native.names.orphans.pop(64):
            fs.store.free_orphan(number)
    assert list(OpenPlaces(native.files.shared.opens)) == []
    assert not list(native.files.shared.lookup_counts.counts())
    native.names.is_on = False
    assert [name for name, _ in fs.inode(ROOT).entries.items()] == []
    assert native.reserves.drain()
    # Slots of orphans wait until no worker sees their inodes.
    fs.store.housekeeping.collect_slots()
    fs.store.housekeeping.drop_inode_frames(kept_slots=0)
    # What the first group keeps for itself, the root's frame, and the frames of the root's log.
    room, log_frames = fs.room(), len(fs.inode(ROOT).log.frames)
    assert room.total_frames - room.free_frames == FIRST_INODES_FRAME + 1 + log_frames
    fs.end()
    assert check_filesystem(native.files.pool).problems == []


@pytest.mark.parametrize(
    "cycles", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_many_files_that_come_and_go_leave_nothing(shm: Path, cycles: int) -> None:
    with shared_files(shm) as files:
        # So many places count as used, so Python may adopt what a worker has opened there.
        struct.pack_into("<Q", files.shared.opens, 0, 2 * HANDLES)
        native = NativeNames(files)
        churn = Churn(native)
        for at in range(cycles):
            churn.cycle(at, is_open=at % 3 == 0)
        # Only full logs of the directory are Python's.
        assert churn.handed_over < churn.served // 20
        assert native.names.orphans.count == 0
        assert_nothing_is_left(native)


def test_workers_that_compete_leave_nothing_either(shm: Path) -> None:
    with mapped_pool(shm, Scheme.PMEM, 4 * KIB, 32 * MIB) as pool:
        FileSystem.format(pool)
        shared = share_pool(pool, worker_count=2, has_files=True)
        shared.set_header_word("answered", ALL)
        struct.pack_into("<Q", shared.opens, 0, 2 * HANDLES)
        files = share_files(pool, shared)
        native = NativeNames(files)
        failures: list[BaseException] = []

        def run(number: int) -> None:
            # Or the control plane takes the lock from it as from a dead one.
            slot = shared.areas.slots + number * layouts.SLOT_BYTES
            at = slot + layouts.SLOT_HEAD.offset_of("thread_id")
            store_word(shared.memory, at, threading.get_native_id())
            worker = Responder(
                shared.fd, files.medium.fileno(), files.medium.map_flags, MAX_WRITE, number=number
            )
            churn = Churn(native, worker)
            churn.first_name = 1000 * number
            try:
                for turn in range(1500):
                    churn.cycle(turn, is_open=turn % 3 == 0)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert_nothing_is_left(native)
        shared.close()
