"""Whatever a daemon needs to go on is derived by the next one from the memory that it leaves.

The first daemon is an object here that is not used any more; the second one is made over the same
memory, by the constructors that a fresh mount uses.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import (
    READ,
    InProcess,
    SharedFiles,
    Tables,
    extent,
    read_in,
    shared_files,
    some_tables,
)
from kit.doors import WireWay
from kit.pools import mapped_pool
from pmemfs.dataplane import layouts
from pmemfs.dataplane.arena import Arena
from pmemfs.dataplane.held import PLACE_BYTES, OpenPlaces
from pmemfs.dataplane.layouts import HandleKind
from pmemfs.dataplane.native import load_word, store_word
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.native import PublishedDevice, SharedEngine
from pmemfs.errors import ForeignSharedMemory
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.mount.options import MountOptions
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.onefile import INODE

INODES = st.integers(1, 30)
SOME = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def again(shared: SharedMemory) -> SharedMemory:
    return SharedMemory(os.dup(shared.fd))


@pytest.fixture
def tables(shm: Path) -> Iterator[Tables]:
    with some_tables(shm, has_files=True) as made:
        yield made


def set_section(shared: SharedMemory, worker: int, value: int) -> None:
    at = shared.areas.slots + worker * layouts.SLOT_BYTES
    store_word(shared.memory, at + layouts.SLOT_HEAD.offset_of("section"), value)


# Tables


@SOME
@given(
    st.lists(
        st.tuples(st.sampled_from(["publish", "withdraw", "attributes", "neither"]), INODES,
                  st.integers(0, 300)),
        max_size=60,
    )
)  # fmt: skip
def test_published_tables_and_their_memory_are_found_again(
    tables: Tables, steps: list[tuple[str, int, int]]
) -> None:
    first, shared = int(tables.pool.first_data_pfn), again(tables.shared)
    for step, inode, count in steps:
        if step == "publish":
            extents = [extent(2 * n, first + n, 1) for n in range(count)]
            shared.publish(inode, count * 2 * FRAME_BYTES, extents)
        elif step == "withdraw" and shared.is_published(inode):
            shared.withdraw(inode)
        elif step == "attributes":
            shared.publish_attributes(inode, bytes(104))
        elif step == "neither":
            shared.withdraw_attributes(inode)
    found = again(shared)
    assert found.published() == shared.published()
    assert found.published_attributes() == shared.published_attributes()
    assert found.table_bytes == shared.table_bytes
    assert found._arena.taken == shared._arena.taken
    assert found.areas == shared.areas
    assert found.header == shared.header
    for inode in range(1, 31):
        assert found.is_published(inode) == shared.is_published(inode)
        assert found.rivals(inode) == shared.rivals(inode)
        if found.is_published(inode):
            found.withdraw(inode)
        found.withdraw_attributes(inode)
    assert found.table_bytes == 0
    shared.close()
    found.close()


def test_what_a_worker_may_still_see_is_left_alone_until_its_section_ends(tables: Tables) -> None:
    whole = [extent(0, int(tables.pool.first_data_pfn), 1)]
    tables.shared.publish(7, FRAME_BYTES, whole)
    set_section(tables.shared, 1, 1)
    found = again(tables.shared)
    with pytest.raises(OSError, match="full") as caught:
        found.publish(8, FRAME_BYTES, whole)
    assert caught.value.errno == errno.ENOSPC
    assert tables.worker().answer(read_in(0, 1), opcode=READ, inode=7)[0] == "answer"
    set_section(tables.shared, 1, 2)
    found.publish(8, FRAME_BYTES, whole)
    assert [table.inode for table in found.published()] == [7, 8]


def test_an_entry_that_was_half_given_out_is_free_again(tables: Tables) -> None:
    tables.shared.publish(7, FRAME_BYTES, [])
    entry = tables.shared._entries[7]
    store_word(tables.shared.memory, entry + layouts.INODE_ENTRY.offset_of("table"), 0)
    found = again(tables.shared)
    assert found.published() == []
    assert load_word(found.memory, entry) == 0
    found.publish(7, FRAME_BYTES, [])
    assert tables.worker().answer(read_in(0, 1), opcode=READ, inode=7)[0] == "answer"


def test_attributes_that_were_half_written_are_published_no_more(tables: Tables) -> None:
    tables.shared.publish_attributes(7, bytes(104))
    place = tables.shared.areas.attributes + layouts.attributes_place_of(7) * 128
    store_word(tables.shared.memory, place, load_word(tables.shared.memory, place) + 1)
    found = again(tables.shared)
    assert found.published_attributes() == {}
    assert load_word(found.memory, place) % 2 == 0
    found.publish_attributes(7, bytes(104))
    assert 7 in found.published_attributes().values()


def test_memory_of_others_is_refused_with_a_sentence(tables: Tables) -> None:
    with pytest.raises(ForeignSharedMemory, match="too short"):
        SharedMemory(os.memfd_create("short"))
    store_word(tables.shared.memory, layouts.HEADER.offset_of("signature"), 1)
    with pytest.raises(ForeignSharedMemory, match="another version"):
        again(tables.shared)


def test_a_worker_refuses_memory_of_another_version(shm: Path) -> None:
    with some_tables(shm) as tables:
        tables.shared.set_header_word("signature", layouts.SIGNATURE ^ 1)
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            tables.worker()


@pytest.mark.parametrize(
    ("name", "value"),
    [("memmap_place", 7), ("page_order", 1 << 40), ("section_shift", 64), ("worker_count", 1 << 60),
     ("pool_bytes", 1 << 60), ("inode_numbers", 1 << 40)],
)  # fmt: skip
def test_a_header_that_is_not_possible_is_refused_by_name(
    tables: Tables, name: str, value: int
) -> None:
    store_word(tables.shared.memory, layouts.HEADER.offset_of(name), value)
    with pytest.raises(ForeignSharedMemory, match=name):
        again(tables.shared)


def test_options_of_any_length_that_is_taken_are_found_again(tables: Tables) -> None:
    text = MountOptions.parse('context="' + "c" * 3900 + '"').as_text()
    tables.shared.note_options(text)
    assert again(tables.shared).options == text


def test_open_files_that_are_not_possible_are_refused(tables: Tables) -> None:
    opens = tables.shared.opens
    OpenPlaces(opens).take(7, 1, 0, 0, 0, 0)
    with pytest.raises(ForeignSharedMemory, match="kind 7"):
        list(OpenPlaces(opens))
    store_word(opens, 0, 1 << 63)
    with pytest.raises(ForeignSharedMemory, match="never used"):
        OpenPlaces(opens)


@pytest.mark.parametrize(
    "taken",
    [{4096: 64, 4097: 64}, {4096 + 64: 128}, {4096: 65, 4096 + 64: 64}, {4096 + 64 * KIB: 1}],
)
def test_an_arena_is_not_made_of_what_none_can_have_given_out(taken: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="given out"):
        Arena(4096, 64 * KIB, taken)


# Open files


@SOME
@given(st.lists(st.integers(1, 50) | st.integers(-50, -1), max_size=200))
def test_open_places_are_found_again_and_no_handle_comes_twice(steps: list[int]) -> None:
    memory = memoryview(bytearray(16 * PLACE_BYTES))
    places, opened, ever = OpenPlaces(memory), {}, set()
    for step in steps:
        if step > 0:
            kind = HandleKind.DIRECTORY if step % 3 else HandleKind.FILE
            if len(opened) == 15:
                with pytest.raises(OSError, match="Too many open files in system"):
                    places.take(kind, step, 0, 0, 0, 0)
                continue
            handle = places.take(kind, step, os.O_RDWR | step << 8, step, step + 1, step + 2)
            assert handle not in ever
            ever.add(handle)
            opened[handle] = (step, kind, os.O_RDWR | step << 8, step, step + 1, step + 2)
        elif opened:
            handle = sorted(opened)[-step % len(opened)]
            places.give_back(handle)
            del opened[handle]
        if step % 5 == 0:
            places = OpenPlaces(memory)
    assert opened == {
        place.handle: (place.inode, place.kind, place.flags, place.uid, place.gid, place.pid)
        for place in OpenPlaces(memory)
    }


def test_a_daemon_that_dies_while_it_takes_a_new_place_leaves_a_free_one() -> None:
    memory = memoryview(bytearray(16 * PLACE_BYTES))
    OpenPlaces(memory).take(HandleKind.FILE, 7, 0, 0, 0, 0)
    # It has said that another place is used, and not filled it.
    store_word(memory, 0, 2)
    found = OpenPlaces(memory)
    assert [place.inode for place in found] == [7]
    handle = found.take(HandleKind.FILE, 8, 0, 0, 0, 0)
    assert handle == 2
    assert {place.handle: place.inode for place in OpenPlaces(memory)} == {1: 7, 2: 8}


def test_no_file_is_made_or_left_open_where_there_is_no_place_for_it(shm: Path) -> None:
    with shared_files(shm) as files:
        memory = memoryview(bytearray(3 * PLACE_BYTES))
        handlers, door = files.door()
        handlers.files._places = handlers.directories._places = OpenPlaces(memory)
        way = WireWay(door)
        _, made = way.create(ROOT, b"a", 0o600, os.O_RDWR)
        way.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0))
        held = dict(files.shared.lookup_counts.counts())
        ino = files.fs.lookup(ROOT, b"a")
        for ask in (
            lambda: way.create(ROOT, b"b", 0o600, os.O_RDWR),
            lambda: way.open(ino, os.O_RDONLY),
            lambda: way.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0)),
        ):
            with pytest.raises(OSError, match="Too many open files") as caught:
                ask()
            assert caught.value.errno == errno.ENFILE
        assert files.fs.names(ROOT) == [b"a"]
        assert dict(files.shared.lookup_counts.counts()) == held
        way.release(made)
        way.create(ROOT, b"b", 0o600, os.O_RDWR)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "opendir", "closedir", "lookup", "forget", "write",
                         "read", "fsync", "unlink", "getattr"]),
        st.integers(0, 9),
    ),
    max_size=60,
)  # fmt: skip


class Kernel:
    """Asks through the wire door, and remembers what the kernel would."""

    def __init__(self, files: SharedFiles) -> None:
        self.handlers, self.door = files.door()
        self.way = WireWay(self.door)
        self.fs = files.fs
        self.inodes = [files.fs.make(ROOT, b"%d" % n, FILE) for n in range(10)]
        self.looked_up = dict.fromkeys(self.inodes, 0)
        self.opened: list[tuple[int, int, int]] = []
        self.directories: list[int] = []

    def step(self, what: str, number: int) -> None:
        ino = self.inodes[number]
        if what == "lookup" and self.fs.has_entry(ROOT, b"%d" % number):
            self.way.lookup(ROOT, b"%d" % number)
            self.looked_up[ino] += 1
        elif what == "forget" and self.looked_up[ino]:
            self.way.forget(ino, self.looked_up[ino])
            self.looked_up[ino] = 0
        elif what == "open" and self.looked_up[ino]:
            flags = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND)[number % 3]
            self.opened.append((self.way.open(ino, flags), ino, flags))
        elif what == "opendir":
            self.directories.append(
                wire.OPEN_OUT.unpack(self.way.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0)))[0]
            )
        elif what == "closedir" and self.directories:
            self.way.ask(
                Opcode.RELEASEDIR, ROOT, wire.RELEASE_IN.pack(self.directories.pop(), 0, 0, 0)
            )
        elif what == "getattr" and self.looked_up[ino]:
            self.way.getattr(ino)
        elif what == "unlink" and self.fs.has_entry(ROOT, b"%d" % number):
            self.way.unlink(ROOT, b"%d" % number)
        elif self.opened and what in ("close", "write", "read", "fsync"):
            at = number % len(self.opened)
            handle, _, _ = self.opened[at]
            if what == "close":
                self.way.release(self.opened.pop(at)[0])
            elif what == "write":
                self.way.write(handle, number * FRAME_BYTES, b"x" * FRAME_BYTES)
            elif what == "read":
                self.way.read(handle, 0, 10)
            else:
                self.way.fsync(handle)


FILE = NewInode(stat.S_IFREG | 0o600, 0, 0)


@SOME
@given(STEPS)
def test_open_files_lookups_and_publications_are_found_again(
    shm: Path, steps: list[tuple[str, int]]
) -> None:
    with shared_files(shm) as files:
        kernel = Kernel(files)
        for what, number in steps:
            kernel.step(what, number)
        held = dict(files.shared.lookup_counts.counts())
        expected = {ino: count for ino, count in kernel.looked_up.items() if count}
        for _, ino, _ in kernel.opened:
            expected[ino] = expected.get(ino, 0) + 1
        assert held == expected
        found = files.again()
        handlers, door = found.door()
        old, new = kernel.handlers, handlers
        assert new.files._handles == old.files._handles
        assert {ino: opens.count for ino, opens in new.files._opens.items()} == {
            ino: opens.count for ino, opens in old.files._opens.items()
        }
        assert all(
            new.files._opens[ino].was_writable for ino, o in old.files._opens.items()
            if o.was_writable
        )  # fmt: skip
        assert new.directories._open.keys() == old.directories._open.keys()
        assert dict(found.shared.lookup_counts.counts()) == held
        assert found.shared.published() == files.shared.published()
        assert found.tables.attributes._wanted.items() <= files.tables.attributes._wanted.items()
        for ino in kernel.inodes:
            assert found.tables.is_published(ino) == files.tables.is_published(ino)
            assert found.fs.store.is_held(ino) == files.fs.store.is_held(ino)
        # And it goes on to the end with them.
        while found.fs.tidy() or found.fs.go_on():
            pass
        way = WireWay(door)
        for handle, ino, flags in kernel.opened:
            if flags != os.O_WRONLY:
                way.read(handle, 0, 10)
            way.release(handle)
            assert found.tables.is_published(ino) <= (ino in new.files._opens)
        for ino, count in kernel.looked_up.items():
            if count:
                way.forget(ino, count)
        assert dict(found.shared.lookup_counts.counts()) == {}
        assert list(OpenPlaces(found.shared.opens)) == [
            place for place in OpenPlaces(found.shared.opens) if place.kind == HandleKind.DIRECTORY
        ]
        assert found.shared.published() == []
        found.shared.close()


def test_an_open_file_without_a_name_lasts_until_it_is_closed(shm: Path) -> None:
    with shared_files(shm) as files:
        way = WireWay(files.door()[1])
        _, handle = way.create(ROOT, b"gone", 0o600, os.O_RDWR)
        way.write(handle, 0, b"still here")
        ino = files.fs.lookup(ROOT, b"gone")
        way.unlink(ROOT, b"gone")
        found = files.again()
        _, door = found.door()
        while found.fs.tidy() or found.fs.go_on():
            pass
        way = WireWay(door)
        assert bytes(way.read(handle, 0, 99)) == b"still here"
        way.release(handle)
        way.forget(ino, 1)
        with pytest.raises(OSError, match="no such inode"):
            found.fs.attributes(ino)


def test_leaked_frames_that_a_pin_holds_wait_until_it_lets_go(shm: Path) -> None:
    with shared_files(shm, Scheme.PMEM) as files:
        number = files.fs.make(ROOT, b"f", FILE)
        files.fs.write(number, 0, bytes(64 * KIB))
        (run,) = files.fs.extents(number)
        files.memmap.get_pages(run.pfn, run.frame_count)
        files.fs.unlink(ROOT, b"f")
        # The daemon dies, and nothing but the bitmaps says that anybody may have the frames.
        found = files.again()
        while found.fs.tidy() or found.fs.go_on():
            pass
        busy = found.fs.store.busy
        assert busy.frame_count == run.frame_count
        files.memmap.put_pages(run.pfn, run.frame_count)
        while found.fs.tidy():
            pass
        assert busy.frame_count == 0


def test_what_another_daemon_published_is_kept_true(shm: Path) -> None:
    with shared_files(shm) as files:
        way = WireWay(files.door()[1])
        _, handle = way.create(ROOT, b"f", 0o600, os.O_RDWR)
        ino = files.fs.lookup(ROOT, b"f")
        way.write(handle, 0, bytes(64 * KIB))
        way.getattr(ROOT)
        way.getattr(ino)
        assert files.shared.is_published(ino)
        found = files.again()
        way = WireWay(found.door()[1])
        # One small write would not have published it, but what is published must follow.
        way.write(handle, 64 * KIB, b"end")
        assert found.worker().answer(read_in(64 * KIB, 9), opcode=READ, inode=ino)[2] == b"end"
        found.fs.make(ROOT, b"g", FILE)
        assert not files.shared.published_attributes().get(layouts.attributes_place_of(ROOT))
        way.release(handle)
        assert not found.shared.is_published(ino)


def test_frames_wait_for_those_who_saw_what_another_daemon_published(shm: Path) -> None:
    with shared_files(shm) as files:
        way = WireWay(files.door()[1])
        _, handle = way.create(ROOT, b"f", 0o600, os.O_RDWR)
        way.write(handle, 0, bytes(64 * KIB))
        ino = files.fs.lookup(ROOT, b"f")
        set_section(files.shared, 0, 1)
        # Withdrawn by who is dead now, while a worker looks at it.
        files.tables.withdraw(ino)
        found = files.again()
        token = found.tables.changed(ino)
        assert token is not None
        assert not found.tables.is_over(token)
        set_section(files.shared, 0, 2)
        assert found.tables.is_over(token)
        assert found.tables.changed(ino) is None


# The whole


def test_what_init_agreed_on_is_known_without_another_init(shm: Path) -> None:
    with shared_files(shm) as files:
        door = files.door()[1]
        assert files.shared.agreement.minor == 0
        low, high = 0xFFFFFFFF, 0xFFFFFFFF & ~(wire.OVER_IO_URING >> 32)
        way = WireWay(door)
        way.ask(Opcode.INIT, 0, wire.INIT_IN.pack(7, 38, 65536, low, high))
        found = files.again()
        agreement = found.shared.agreement
        assert agreement == files.shared.agreement
        assert (agreement.minor, agreement.max_readahead) == (38, 65536)
        assert agreement.flags & wire.SETXATTR_EXT
        # A request whose form depends on it.
        value = wire.SETXATTR_IN.pack(1, 0, 0) + b"user.a\0v"
        way = WireWay(found.door()[1])
        way.ask(Opcode.SETXATTR, ROOT, value)
        assert way.getxattr(ROOT, b"user.a") == b"v"


def test_how_a_mount_was_asked_for_is_found_again(tables: Tables) -> None:
    tables.shared.note_options("ro,mode=640")
    assert again(tables.shared).options == "ro,mode=640"
    # As after a remount.
    tables.shared.note_options("rw")
    assert again(tables.shared).options == "rw"


@contextmanager
def device(shm: Path) -> Iterator[InProcess]:
    with mapped_pool(shm, Scheme.NONE, 4 * KIB, 16 * MIB) as pool:
        yield InProcess(pool, pool.medium)


def test_what_was_set_of_a_device_lasts_as_long_as_its_mount(shm: Path) -> None:
    with device(shm) as first:
        assert first.volume.attributes(INODE).mode == stat.S_IFREG | 0o600
        first.volume.set_attributes(INODE, mode=0o640, uid=5, gid=6, mtime_ns=-1)
        first.volume.set_attributes(ROOT, atime_ns=17)
        shared = again(first.shared)
        engine = SharedEngine(first.volume._pool, first.volume._medium, first.memmap, shared)
        second = BlockVolume(
            first.volume._pool, first.memmap, onlookers=PublishedDevice(engine, engine._mapped)
        )
        for number in (ROOT, INODE):
            assert second.attributes(number) == first.volume.attributes(number)
        assert second.attributes(INODE).mode == stat.S_IFREG | 0o640
        assert [table.inode for table in shared.published()] == [INODE]
