"""Bad memory under each part of a pool: what it costs, and what goes on working."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import mmap
import os
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from kit.data_plane import READ, WRITE, InProcess, PythonEngine, read_in, write_in
from kit.pages import counts_of, hottest_of
from kit.poison import Poisoner, address_of, in_child, mapping_of, poisoner
from pmemfs.cli.check import check
from pmemfs.cli.commands import run
from pmemfs.cli.info import info
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.errors import MemoryFault
from pmemfs.fuse.failures import errno_of
from pmemfs.media.filesystem import HEAD_FRAME, JOURNAL_FRAME
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.media.log import pack_entry
from pmemfs.media.zones import Zone
from pmemfs.medium import faultlog
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import make_file
from pmemfs.memmap import Access, Memmap, open_memmap
from pmemfs.memmap.records import RecordMemmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.compaction import LogWriter
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.onefile import INODE

POOL_BYTES = 32 * MIB
_MAP_FIXED = 0x10
PER_FRAME = FRAME_BYTES // 64
"""Page structures in a frame."""


@contextmanager
def reserved_pool(directory: Path, scheme: Scheme, mode: Mode = Mode.BLOCK) -> Iterator[Pool]:
    """A pool with memory everywhere, mounted as far as its label says."""
    path = str(directory / "reserved")
    make_file(path, POOL_BYTES, sparse=False)
    medium = MappedMedium.open(path)
    try:
        pool = Pool.create(medium, PoolSpec(name="reserved", scheme=scheme, mode=mode))
        if mode == Mode.FS:
            FileSystem.format(pool)
        pool.begin_mount()
        yield pool
    finally:
        medium.close()


def poison(poisoner: Poisoner, pool: Pool, offset_bytes: int) -> None:
    poisoner.poison(address_of(pool.medium.view(offset_bytes, FRAME_BYTES)))


# Page structures


def own_memmap(pool: Pool) -> Memmap:
    return open_memmap(pool)


def shared_memmap(pool: Pool) -> Memmap:
    assert isinstance(pool.medium, MappedMedium)
    shared = share_pool(pool, worker_count=1)
    return share_memmap(pool, pool.medium, shared)


FIRST, COUNT = PER_FRAME - 4, 8
"""Pages whose structures lie in two frames, of which the second is the bad one."""


def clean_them(memmap: Memmap, first: int) -> None:
    memmap.clean(first, COUNT)
    # The scheme of one process has nothing to clean.
    memmap.page(first + COUNT - 1)


USES: dict[str, Callable[[Memmap, int], object]] = {
    "get": lambda memmap, first: memmap.get_page(first + COUNT - 1, Access.READ, 2, 0),
    "get many": lambda memmap, first: memmap.get_pages(first, COUNT, Access.WRITE, 2, 0),
    "put": lambda memmap, first: memmap.put_page(first + COUNT - 1),
    "put many": lambda memmap, first: memmap.put_pages(first, COUNT),
    "are referenced": lambda memmap, first: memmap.are_referenced(first, COUNT),
    "clean": clean_them,
    "page": lambda memmap, first: memmap.page(first + COUNT - 1),
    "counts": lambda memmap, first: counts_of(memmap),
    "hottest": lambda memmap, first: hottest_of(memmap, 3),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("opened", [own_memmap, shared_memmap])
def test_a_bad_page_structure_is_an_error_and_leaves_no_reference_on_others(
    shm: Path, opened: Callable[[Pool], Memmap], use: str
) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM) as pool, poisoner() as poisons:
            memmap = opened(pool)
            assert isinstance(memmap, RecordMemmap)
            first = int(pool.first_data_pfn) + FIRST
            bad = pool.zones.memmap.offset_bytes + FRAME_BYTES
            # As a request leaves them, and "put" finds them.
            memmap.get_pages(first, COUNT, Access.READ, 2, 0)
            if not use.startswith("put"):
                memmap.put_pages(first, COUNT)
            poison(poisons, pool, bad)
            with pytest.raises(MemoryFault, match=f"{bad >> 12:#x}"):
                USES[use](memmap, first)
            held = [memmap.page(first + page) for page in range(PER_FRAME - FIRST)]
            if use != "put":
                assert [page and page.refcount for page in held] == [0] * len(held)
            assert counts_of(memmap).total > 0, "the fault was told, and is over"

    assert in_child(child) == 0


@pytest.mark.parametrize("opened", [own_memmap, shared_memmap])
def test_structures_that_move_out_of_bad_memory_end_in_an_error(
    shm: Path, opened: Callable[[Pool], Memmap]
) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM) as pool, poisoner() as poisons:
            memmap = opened(pool)
            memmap.get_pages(int(pool.first_data_pfn), PER_FRAME, Access.READ)
            memmap.put_pages(int(pool.first_data_pfn), PER_FRAME)
            zone = pool.zones.memmap
            poison(poisons, pool, zone.offset_bytes)
            # To another place: where nothing has to move, nothing needs to be touched.
            target = Zone(zone.offset_bytes + FRAME_BYTES, zone.size_bytes)
            with pytest.raises(MemoryFault):
                memmap.move(pool.page_geometry, target, [(zone.offset_bytes, zone.end_bytes)])
            counts_of(memmap)

    assert in_child(child) == 0


# Labels, and the commands that read pools which nobody has mounted


@pytest.mark.parametrize("copy", ["label", "label copy"])
def test_a_copy_of_the_label_that_cannot_be_read_is_damaged_and_the_other_serves(
    shm: Path, copy: str
) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.NONE) as pool, poisoner() as poisons:
            zone = pool.zones.label if copy == "label" else pool.zones.label_copy
            poison(poisons, pool, zone.offset_bytes)
            opened = Pool.open(pool.medium)
            assert [reading.where for reading in opened.damaged_copies] == [copy]
            assert "can't be touched" in str(opened.damaged_copies[0].problem)
            assert opened.label.uuid == pool.label.uuid
            poison(poisons, pool, zone.offset_bytes)
            with pytest.raises(MemoryFault):
                pool.end_mount()

    assert in_child(child) == 0


def cut_when_opened(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    """Let whatever is opened next be cut off as soon as it is mapped. (Poison needs a mapping that
    may be written to.)"""
    real = MappedMedium.__init__

    def opening(medium: MappedMedium, *arguments: object, **options: object) -> None:
        real(medium, *arguments, **options)  # type: ignore[arg-type]
        os.truncate(medium.name, size_bytes)

    monkeypatch.setattr(MappedMedium, "__init__", opening)


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--repair"], ["--json"]], ids=str)
def test_check_says_that_it_cannot_check_bad_metadata(
    shm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    with reserved_pool(shm, Scheme.PMEM, Mode.FS) as pool:
        pool.end_mount()
        bad = pool.zones.data.offset_bytes + HEAD_FRAME * FRAME_BYTES
    cut_when_opened(monkeypatch, bad)
    assert in_child(lambda: check_answers(8, check, str(shm / "reserved"), *words)) == 0
    said = (
        f"page frame {bad >> 12:#x} of {shm}/reserved can't be touched: the memory is damaged, or "
        "the file was cut off"
    )
    (line,) = capfd.readouterr().err.splitlines()
    if "--json" in words:
        assert json.loads(line)["message"] == said
    else:
        assert line == f"pmemfs: {said}"


@pytest.mark.parametrize(("is_left", "code"), [(True, 0), (False, 4)])
def test_info_says_which_labels_cannot_be_read(
    shm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_left: bool,
    code: int,
) -> None:
    with reserved_pool(shm, Scheme.PMEM, Mode.FS) as pool:
        copy = pool.zones.label_copy.offset_bytes
    cut_when_opened(monkeypatch, copy if is_left else 0)
    assert in_child(lambda: check_answers(code, info, str(shm / "reserved"))) == 0
    said = capfd.readouterr()
    assert "can't be touched" in (said.out if is_left else said.err)
    assert len(said.err.splitlines()) == (0 if is_left else 1)


def check_answers(code: int, command: click.Command, *words: str) -> None:
    assert run(command, list(words)) == code


# The file system


@contextmanager
def bad_filesystem(directory: Path) -> Iterator[tuple[FileSystem, Poisoner, Pool]]:
    """A file system of 16 files, whose inodes nobody has in memory."""
    with reserved_pool(directory, Scheme.NONE, Mode.FS) as pool, poisoner() as poisons:
        fs = FileSystem(pool, open_memmap(pool))
        for number in range(16):
            ino = fs.make(ROOT, b"file %d" % number, NewInode(stat.S_IFREG | 0o644, 0, 0))
            fs.write(ino, 0, b"kept" * FRAME_BYTES)
        yield FileSystem(pool, open_memmap(pool)), poisons, pool


def test_bad_memory_in_a_file_costs_its_readers_and_writers(shm: Path) -> None:
    def child() -> None:
        with bad_filesystem(shm) as (fs, poisons, pool):
            ino, other = fs.lookup(ROOT, b"file 0"), fs.lookup(ROOT, b"file 1")
            [extent, *_] = fs.extents(ino)
            for attempt in (
                lambda: fs.read(ino, 0, 64),
                lambda: fs.write(ino, 8, b"x"),
                lambda: fs.copy(ino, 0, other, 0, 64),
                lambda: fs.zero(ino, 0, 64, keep_size=True),
            ):
                poison(poisons, pool, extent.pfn * FRAME_BYTES)
                with pytest.raises(MemoryFault, match=f"{extent.pfn:#x}"):
                    attempt()
                assert not fs.read_only
            assert fs.write(other, 0, b"more") == 4
            assert fs.read(other, 0, 8) == b"morekept"

    assert in_child(child) == 0


def test_a_log_that_meets_bad_memory_while_it_is_written_gives_all_its_frames_back(
    shm: Path,
) -> None:
    def child() -> None:
        with bad_filesystem(shm) as (fs, poisons, pool):
            inode, before = fs.inode(ROOT), fs.room().free_frames
            writer = LogWriter(fs.store.ground, inode)
            poison(poisons, pool, writer._frames[0])

            def fill() -> None:
                for number in range(FRAME_BYTES):
                    writer.add(pack_entry(b"name %d" % number, ROOT, 4, 0))

            with pytest.raises(MemoryFault):
                fill()
            writer.abandon()
            assert fs.room().free_frames == before

    assert in_child(child) == 0


WRITES_METADATA: dict[str, Callable[[FileSystem, int], object]] = {
    "a look": lambda fs, ino: fs.attributes(ino),
    "a read": lambda fs, ino: fs.read(ino, 0, 4),
    "a write": lambda fs, ino: fs.write(ino, 0, b"x"),
    "a change": lambda fs, ino: fs.unlink(ROOT, b"file 12"),
}


@pytest.mark.parametrize("is_in_memory", [False, True])
@pytest.mark.parametrize("use", WRITES_METADATA)
def test_bad_memory_in_metadata_makes_the_file_system_read_only(
    shm: Path, use: str, is_in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def child() -> None:
        with bad_filesystem(shm) as (fs, poisons, pool):
            ino = fs.lookup(ROOT, b"file 12")
            slot = fs.store.table.slot_offset(ino)
            if is_in_memory:
                fs.read(ino, 0, 4)
            poison(poisons, pool, slot & -FRAME_BYTES)
            with pytest.raises(MemoryFault, match=f"{slot >> 12:#x}"):
                WRITES_METADATA[use](fs, ino)
            assert fs.read_only
            assert f"{slot >> 12:#x}" in fs.damage
            with pytest.raises(OSError, match="Read-only"):
                fs.make(ROOT, b"new", NewInode(stat.S_IFREG | 0o644, 0, 0))
            assert fs.read(fs.lookup(ROOT, b"file 0"), 0, 4) == b"kept"
            fs.end()
            assert FileSystem(pool, open_memmap(pool)).store.ground.may_have_leaks, (
                "it is not clean"
            )
        assert [record.getMessage() for record in caplog.records] == [
            f"{fs.damage}; nothing is written any more"
        ]

    caplog.set_level(logging.ERROR)
    assert in_child(child) == 0


def test_a_journal_in_bad_memory_commits_nothing(shm: Path) -> None:
    def child() -> None:
        with bad_filesystem(shm) as (fs, poisons, pool):
            fs.make(ROOT, b"before", NewInode(stat.S_IFREG | 0o644, 0, 0))
            poison(poisons, pool, fs.geometry.offset_of(JOURNAL_FRAME))
            with pytest.raises(MemoryFault):
                fs.make(ROOT, b"after", NewInode(stat.S_IFREG | 0o644, 0, 0))
            assert fs.read_only
            again = FileSystem(pool, open_memmap(pool))
            assert set(again.inode(ROOT).entries) == {b"before"} | {
                b"file %d" % number for number in range(16)
            }

    assert in_child(child) == 0


def test_frames_whose_page_structures_cannot_be_read_stay_busy(shm: Path) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM, Mode.FS) as pool, poisoner() as poisons:
            fs = FileSystem(pool, open_memmap(pool))
            ino = fs.make(ROOT, b"file", NewInode(stat.S_IFREG | 0o644, 0, 0))
            fs.write(ino, 0, bytes(FRAME_BYTES))
            [extent, *_] = fs.extents(ino)
            page = extent.pfn - int(pool.first_data_pfn)
            zone = pool.zones.memmap
            poison(poisons, pool, zone.offset_bytes + (page * 64 & -FRAME_BYTES))
            free = fs.room().free_frames
            fs.unlink(ROOT, b"file")
            assert fs.store.busy.frame_count > 0
            assert fs.room().free_frames == free
            assert not fs.read_only
            # The page can be touched again, as poison is of a page table.
            fs.tidy()
            assert fs.store.busy.frame_count == 0

    assert in_child(child) == 0


# The engines


def test_the_python_engine_answers_eio_and_goes_on(
    shm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM) as pool, poisoner() as poisons:
            memmap = open_memmap(pool)
            engine = PythonEngine(pool.medium, memmap, BlockVolume(pool, memmap))
            engine.write(0, b"kept" * FRAME_BYTES)
            bad = pool.zones.data.offset_bytes + 2 * FRAME_BYTES
            for attempt in (
                lambda: engine.read(0, 4 * FRAME_BYTES),
                lambda: engine.write(FRAME_BYTES, bytes(2 * FRAME_BYTES)),
            ):
                poison(poisons, pool, bad)
                with pytest.raises(MemoryFault) as caught:
                    attempt()
                assert errno_of(caught.value, "attempt") == errno.EIO
            assert bytes(engine.read(0, 4)) == b"kept"
            assert counts_of(memmap).in_use == 0
            assert engine.fault_count == 2
        said = [record.getMessage() for record in caplog.records]
        assert said == [
            f"{shm}/reserved: page frame {bad >> 12:#x} could not be touched; a request to inode "
            f"{INODE} was answered with EIO"
        ]

    caplog.set_level(logging.ERROR)
    faultlog._said.clear()
    assert in_child(child) == 0


def start_of_worker(pool: Pool) -> int:
    """Where a worker has the pool mapped, which maps the pool's reach."""
    return mapping_of(pool.medium.name, longest=True)


@pytest.mark.parametrize("points", [False, True], ids=["copies", "points"])
@pytest.mark.parametrize("where", ["data", "page structures"])
def test_a_worker_answers_eio_and_drops_all_references(shm: Path, where: str, points: bool) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM) as pool, poisoner() as poisons:
            assert isinstance(pool.medium, MappedMedium)
            engine = InProcess(pool, pool.medium, points=points)
            start = FIRST * FRAME_BYTES
            engine.write(start, b"kept" * (COUNT * FRAME_BYTES // 4))
            mapped_at = start_of_worker(pool)
            bad = pool.zones.memmap.offset_bytes + FRAME_BYTES
            if where == "data":
                bad = pool.zones.data.offset_bytes + start + 2 * FRAME_BYTES
            for attempt in (
                lambda: engine.read(start, COUNT * FRAME_BYTES),
                lambda: engine.write(start, bytes(COUNT * FRAME_BYTES)),
            ):
                if points and where == "data":
                    # It is the kernel that touches what a reply points at.
                    break
                poisons.poison(mapped_at + bad)
                with pytest.raises(OSError, match="refused") as caught:
                    attempt()
                assert caught.value.errno == errno.EIO
                # Poison is of a page table; the next touch is to be one of the pool.
                remap(pool, mapped_at, bad)
            assert engine.read(0, 1) == b"\0"
            assert counts_of(engine.memmap).in_use == 0

    assert in_child(child) == 0


def remap(pool: Pool, mapped_at: int, offset_bytes: int) -> None:
    """Map a page of a worker anew."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    assert isinstance(pool.medium, MappedMedium)
    at = ctypes.c_void_p(mapped_at + offset_bytes)
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    found = libc.mmap(at, ctypes.c_size_t(FRAME_BYTES), protection, flags, pool.medium.fileno(),
                      ctypes.c_long(offset_bytes))  # fmt: skip
    assert found == at.value


def test_structures_that_go_bad_under_a_reply_do_not_end_the_worker(shm: Path) -> None:
    """A reply of the transport fd points into the pool, and its pages are put back behind it."""

    def child() -> None:
        with reserved_pool(shm, Scheme.PMEM) as pool, poisoner() as poisons:
            assert isinstance(pool.medium, MappedMedium)
            medium = pool.medium
            engine = InProcess(pool, medium, points=True)
            offset = pool.zones.data.offset_bytes
            # Read before, so that the structure is there; and then a hole, so that whoever copies
            # the reply has to wait.
            engine.read(0, FRAME_BYTES)
            punch(medium, offset)
            page = start_of_worker(pool) + offset
            poisons.watch(page)
            helper = os.fork()
            if helper == 0:
                poisons.wait_for_touch()
                os.truncate(medium.name, pool.zones.memmap.offset_bytes)
                poisons.fill(page)
                os._exit(0)
            assert engine.read(0, FRAME_BYTES) == bytes(FRAME_BYTES)
            assert os.waitpid(helper, 0)[1] == 0
            with pytest.raises(OSError, match="refused"):
                engine.read(0, FRAME_BYTES)

    assert in_child(child) == 0


def punch(medium: MappedMedium, offset_bytes: int) -> None:
    """A hole that nobody expects there."""
    medium.punch_hole(offset_bytes, FRAME_BYTES)
    medium.reserved = True


# A signal that tells of damage which nobody has touched: see sigaction(2)

BUS_MCEERR_AO = 5
SI_USER = 0


def send_sigbus(code: int) -> None:
    """Queue a SIGBUS with a si_code to this process, as only its main thread may: it is delivered
    to whichever thread does not block it, first of all to the main one."""
    libc = ctypes.CDLL(None, use_errno=True)
    info = struct.pack("iiii", signal.SIGBUS, 0, code, 0).ljust(128, b"\0")
    number = {"x86_64": 129, "aarch64": 138}[os.uname().machine]
    assert libc.syscall(number, os.getpid(), signal.SIGBUS, info) == 0, ctypes.get_errno()


def test_news_of_damage_fail_no_request_that_is_under_way(shm: Path) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.NONE) as pool, poisoner() as poisons:
            assert isinstance(pool.medium, MappedMedium)
            engine = InProcess(pool, pool.medium)
            offset = pool.zones.data.offset_bytes
            punch(pool.medium, offset)
            page = start_of_worker(pool) + offset
            poisons.watch(page)
            answers = []

            def read() -> None:
                answers.append(engine.worker.answer(read_in(0, 16), opcode=READ, inode=INODE))

            thread = threading.Thread(target=read)
            thread.start()
            # The worker stands at an instruction that touches the pool.
            poisons.wait_for_touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
            send_sigbus(BUS_MCEERR_AO)
            # It was interrupted by the signal, and has come back to it.
            poisons.wait_for_touch()
            poisons.fill(page)
            thread.join()
            assert answers == [("answer", 0, bytes(16))]

    assert in_child(child) == 0


def test_after_news_of_damage_a_fault_is_still_an_error(shm: Path) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.NONE) as pool:
            assert isinstance(pool.medium, MappedMedium)
            engine = InProcess(pool, pool.medium)
            send_sigbus(BUS_MCEERR_AO)
            bad = POOL_BYTES - 4 * MIB
            os.truncate(pool.medium.name, bad)
            at = bad - pool.zones.data.offset_bytes
            for request, opcode, payload in (
                (read_in(at, 16), READ, b""),
                (write_in(at, 16), WRITE, bytes(16)),
            ):
                answer = engine.worker.answer(request, opcode=opcode, inode=INODE, payload=payload)
                assert answer[:2] == ("answer", errno.EIO)
                send_sigbus(BUS_MCEERR_AO)
            with pytest.raises(MemoryFault):
                pool.medium.read(bad, 1)

    assert in_child(child) == 0


def test_a_signal_that_somebody_sends_is_no_fault_of_a_request(shm: Path) -> None:
    def child() -> None:
        with reserved_pool(shm, Scheme.NONE) as pool:
            assert isinstance(pool.medium, MappedMedium)
            InProcess(pool, pool.medium)
            send_sigbus(SI_USER)

    assert in_child(child) == signal.SIGBUS
