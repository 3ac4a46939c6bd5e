"""The mapping: locked, never touched where that could kill, and durable when it says so."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from kit.descriptors import open_before, open_descriptors
from kit.sources import loop_device, needs_root, small_tmpfs, sparse_file
from pmemfs.errors import EXIT_BUSY, ReadOnlyMedium, SourceBusy, UnusableSource
from pmemfs.medium import writeback
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import Advice, Before, MappedMedium
from pmemfs.medium.source import SourceKind, identify, make_file
from pmemfs.units import KIB, MIB

CHUNK = 2 * MIB


@pytest.fixture
def reserved(shm: Path) -> Iterator[MappedMedium]:
    """A medium with memory everywhere."""
    make_file(str(shm / "reserved"), 4 * MIB, sparse=False)
    medium = MappedMedium.open(str(shm / "reserved"))
    yield medium
    medium.close()


@pytest.fixture
def sparse(shm: Path) -> Iterator[MappedMedium]:
    """A medium without memory anywhere."""
    medium = MappedMedium.open(str(sparse_file(shm / "sparse", 4 * MIB)))
    yield medium
    medium.close()


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[MappedMedium]:
    """A medium that is an ordinary file."""
    make_file(str(tmp_path / "file"), 4 * CHUNK, sparse=False)
    medium = MappedMedium.open(str(tmp_path / "file"))
    if medium.durability is not Durability.MSYNC:
        medium.close()
        pytest.skip("temporary files are in memory here")
    yield medium
    medium.close()


@contextmanager
def opened(path: str | Path, *, read_only: bool = False) -> Iterator[MappedMedium]:
    """A medium for the length of a `with`."""
    medium = MappedMedium.open(str(path), read_only=read_only)
    try:
        yield medium
    finally:
        medium.close()


def dirty_kib(path: str) -> int:
    """How much of this process's mapping of a file no device has yet, as the kernel says."""
    text = Path("/proc/self/smaps").read_text()
    mapping = text[text.index(f"{path}\n") :]
    of_this_one = mapping[: mapping.index("VmFlags")]
    return sum(map(int, re.findall(r"^(?:Private|Shared)_Dirty:\s+(\d+)", of_this_one, re.M)))


# Locks


def test_a_second_writable_open_is_refused_and_names_the_process(reserved: MappedMedium) -> None:
    with pytest.raises(SourceBusy, match=f"process {os.getpid()} has it open") as caught:
        MappedMedium.open(reserved.name)
    assert (caught.value.errno, caught.value.exit_code) == (errno.EBUSY, EXIT_BUSY)


def test_a_reader_is_refused_beside_a_writer_and_a_writer_beside_a_reader(shm: Path) -> None:
    path = str(sparse_file(shm / "pool", MIB))
    for first, second in ((False, True), (True, False)):
        medium = MappedMedium.open(path, read_only=first)
        with pytest.raises(SourceBusy):
            MappedMedium.open(path, read_only=second)
        medium.close()


def test_readers_share(shm: Path) -> None:
    path = str(sparse_file(shm / "shared", MIB))
    readers = [MappedMedium.open(path, read_only=True) for _ in range(3)]
    for reader in readers:
        reader.close()


def test_the_lock_goes_with_close_even_while_a_view_is_held(shm: Path) -> None:
    path = str(sparse_file(shm / "pool", MIB))
    medium = MappedMedium.open(path)
    held = np.frombuffer(medium.view(0, 4096), np.uint8)
    medium.close()
    MappedMedium.open(path).close()
    assert held[0] == 0


def test_the_lock_goes_with_the_process_that_is_killed(shm: Path) -> None:
    path = str(sparse_file(shm / "pool", MIB))
    program = (
        "import sys, time; from pmemfs.medium.mapped import MappedMedium; "
        "m = MappedMedium.open(sys.argv[1]); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(SourceBusy, match=f"process {child.pid} has it open"):
            MappedMedium.open(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    MappedMedium.open(path).close()


def test_a_successor_goes_on_with_what_was_opened_wherever_its_path_leads_by_now(shm: Path) -> None:
    path = shm / "moved"
    make_file(str(path), MIB, sparse=False)
    with opened(path) as medium:
        fd = os.dup(medium.fileno())
        medium.store(0, b"there")
        medium.keeps_lock = True
    path.rename(shm / "elsewhere")
    make_file(str(path), 2 * MIB, sparse=False)
    before = Before(Durability.VOLATILE, was_reserved=True)
    with closing(MappedMedium.adopt(str(path), fd, before, read_only=False)) as medium:
        assert (medium.name, medium.size_bytes, medium.reserved) == (str(path), MIB, True)
        assert bytes(medium.read(0, 5)) == b"there"
        with pytest.raises(SourceBusy):
            MappedMedium.open(str(shm / "elsewhere"))
    MappedMedium.open(str(shm / "elsewhere")).close()


def test_a_successor_relies_on_what_its_predecessor_found(shm: Path) -> None:
    """Of a pool that was punched nobody can tell how it was, nor which durability a mapping has
    that another process made."""
    path = shm / "punched"
    make_file(str(path), MIB, sparse=False)
    with opened(path) as medium:
        medium.punch_hole(0, 64 * KIB)
        fd = os.dup(medium.fileno())
    before = Before(Durability.CACHE_LINES, was_reserved=True)
    with closing(MappedMedium.adopt(str(path), fd, before, read_only=False)) as medium:
        assert medium.durability is Durability.CACHE_LINES
        assert (medium.reserved, medium.was_reserved) == (False, True)


def test_a_failed_open_leaves_no_lock_and_no_descriptor(shm: Path) -> None:
    path = str(sparse_file(shm / "pool", MIB))
    source = identify(path)
    before = len(open_before())
    with pytest.raises(UnusableSource, match="can't be mapped"):
        MappedMedium(source._replace(size_bytes=MIB * 2))
    assert len(open_descriptors()) == before
    MappedMedium.open(path).close()


# Refusals


def test_what_is_smaller_than_a_frame_is_refused(shm: Path) -> None:
    with pytest.raises(UnusableSource, match="smaller than 4 KiB"):
        MappedMedium.open(str(sparse_file(shm / "small", 4095)))


@pytest.mark.parametrize("path", ["/dev/shm", "/dev/null"])
def test_a_directory_and_another_character_device_are_refused(path: str) -> None:
    with pytest.raises(UnusableSource):
        MappedMedium.open(path)


def test_a_reader_can_not_store(shm: Path) -> None:
    path = sparse_file(shm / "pool", MIB)
    with opened(path, read_only=True) as medium:
        with pytest.raises(ReadOnlyMedium) as caught:
            medium.store(0, b"x")
        assert caught.value.errno == errno.EROFS
        with pytest.raises(TypeError):
            medium.view(0, 1)[0] = 1
    assert path.stat().st_blocks == 0


# Sparse and reserved


def test_reserved_and_sparse_files_are_told_apart(
    reserved: MappedMedium, sparse: MappedMedium
) -> None:
    assert reserved.reserved
    assert not sparse.reserved
    assert not reserved.is_hole(0, MIB)
    assert sparse.is_hole(0, 4 * MIB)


def test_what_was_stored_is_no_hole_and_reads_back(sparse: MappedMedium) -> None:
    sparse.store(MIB + 4095, b"abc")
    assert sparse.is_hole(0, MIB)
    assert not sparse.is_hole(0, MIB + 4096)
    assert not sparse.is_hole(MIB + 4096, 8192)
    assert sparse.is_hole(MIB + 8192, MIB)
    assert bytes(sparse.read(MIB + 4094, 5)) == b"\0abc\0"
    assert bytes(sparse.view(MIB + 4095, 3)) == b"abc"


def test_reading_a_sparse_medium_takes_no_memory(sparse: MappedMedium) -> None:
    assert not any(sparse.read(0, 4 * MIB))
    assert os.stat(sparse.name).st_blocks == 0


def test_reserving_takes_memory_and_keeps_the_content(sparse: MappedMedium) -> None:
    sparse.store(0, b"kept")
    sparse.reserve(0, 64 * KIB)
    assert os.stat(sparse.name).st_blocks * 512 == 64 * KIB
    assert bytes(sparse.view(0, 4)) == b"kept"


@pytest.mark.parametrize("kind", ["reserved", "sparse"])
def test_a_store_is_counted_in_bytes_whatever_the_items(
    kind: str, request: pytest.FixtureRequest
) -> None:
    medium: MappedMedium = request.getfixturevalue(kind)
    medium.store(8, np.arange(4, dtype="<u8"))
    assert bytes(medium.read(0, 48)) == bytes(8) + np.arange(4, dtype="<u8").tobytes() + bytes(8)


def fill(medium: MappedMedium) -> None:
    """Store everywhere, from the start."""
    for offset in range(0, medium.size_bytes, 64 * KIB):
        medium.store(offset, b"x" * 64 * KIB)


@needs_root
def test_a_store_on_a_full_tmpfs_answers_enospc_and_kills_nobody() -> None:
    with small_tmpfs(MIB) as directory:
        path = sparse_file(directory / "pool", 8 * MIB)
        with opened(path) as medium:
            with pytest.raises(OSError, match="No space left") as caught:
                fill(medium)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(OSError, match="No space left"):
                medium.reserve(4 * MIB, 64 * KIB)
            assert bytes(medium.read(0, 4)) == b"xxxx"
            medium.store(0, b"again")


# Durability


def test_memory_that_goes_with_the_power_has_nothing_to_flush(reserved: MappedMedium) -> None:
    assert reserved.durability is Durability.VOLATILE
    reserved.store(0, b"x")
    reserved.persist(0, 1)


def test_a_fence_on_an_ordinary_file_leaves_no_dirty_page(on_disk: MappedMedium) -> None:
    assert on_disk.source.kind is SourceKind.FILE
    on_disk.store(CHUNK - 1, b"xy")
    assert dirty_kib(on_disk.name) >= 8
    on_disk.persist(CHUNK - 1, 2)
    assert dirty_kib(on_disk.name) == 0


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all msyncs, which are still carried out."""
    lengths: list[int] = []
    real = writeback.msync

    def msync(memory: memoryview) -> None:
        lengths.append(len(memory))
        real(memory)

    monkeypatch.setattr(writeback, "msync", msync)
    return lengths


def test_a_fence_syncs_what_was_flushed_since_the_last_one_and_in_few_calls(
    on_disk: MappedMedium, synced: list[int]
) -> None:
    on_disk.flush(0, 1)
    on_disk.flush(CHUNK - 1, 2)
    on_disk.flush(4 * CHUNK - 1, 1)
    on_disk.flush(CHUNK, 0)
    on_disk.fence()
    assert synced == [2 * CHUNK, CHUNK]
    on_disk.fence()
    assert synced == [2 * CHUNK, CHUNK]


def test_after_a_failed_sync_no_fence_says_that_all_is_durable(
    on_disk: MappedMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the kernel does: it reports what was lost once, and the next msync succeeds.
    failures = [OSError(errno.EIO, "msync failed")]

    def msync(memory: memoryview) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(writeback, "msync", msync)
    on_disk.flush(0, 4 * CHUNK)
    for _ in range(3):
        with pytest.raises(OSError, match="msync failed"):
            on_disk.fence()


def test_a_fence_waits_for_another_that_has_taken_the_same_stores(
    on_disk: MappedMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def msync(memory: memoryview) -> None:
        entered.set()
        assert go_on.wait(10)

    monkeypatch.setattr(writeback, "msync", msync)
    on_disk.store(0, b"x")
    on_disk.flush(0, 1)
    first = threading.Thread(target=on_disk.fence)
    second = threading.Thread(target=on_disk.fence)
    first.start()
    assert entered.wait(10)
    second.start()
    second.join(0.1)
    assert second.is_alive(), "it said that the store is durable while the sync was under way"
    # And a flush does not wait for either.
    on_disk.flush(CHUNK, 1)
    go_on.set()
    first.join(10)
    second.join(10)
    assert not second.is_alive()


def test_a_fence_that_waited_for_a_failed_one_fails_too(
    on_disk: MappedMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def msync(memory: memoryview) -> None:
        calls.append(len(memory))
        if len(calls) == 1:
            raise OSError(errno.EIO, "msync failed")

    monkeypatch.setattr(writeback, "msync", msync)
    on_disk.flush(0, 1)
    outcomes: list[str] = []

    def fence() -> None:
        try:
            on_disk.fence()
            outcomes.append("durable")
        except OSError:
            outcomes.append("failed")

    threads = [threading.Thread(target=fence) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert outcomes == ["failed", "failed"]
    assert calls == [CHUNK]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4095, 4097])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 4095])
def test_odd_ranges_can_be_written_back(
    reserved: MappedMedium, on_disk: MappedMedium, start: int, length: int
) -> None:
    for medium in (reserved, on_disk):
        view = medium.view(start, length)
        writeback.flush_lines(view)
        writeback.fence()
        writeback.msync(view)
    writeback.flush_lines(reserved.view(reserved.size_bytes - 1, 1))
    assert re.fullmatch(r"clwb|clflushopt|clflush|dc cvac", writeback.INSTRUCTION)


def test_advice_is_taken_or_not_but_never_fails(reserved: MappedMedium) -> None:
    assert reserved.advise(Advice.POPULATE_WRITE, 4097, 10_000)
    for advice in Advice:
        assert reserved.advise(advice, 0, 2 * MIB) in (True, False)


# Block devices


@needs_root
def test_a_block_device_is_mapped_and_what_is_fenced_is_on_it(tmp_path: Path) -> None:
    disk = sparse_file(tmp_path / "disk", MIB)
    with loop_device(disk, direct_io=False) as device:
        with opened(str(device)) as medium:
            assert medium.durability is Durability.MSYNC
            assert medium.reserved
            medium.store(123, b"on the disk")
            medium.persist(123, 11)
            assert disk.read_bytes()[123:134] == b"on the disk"
        assert disk.read_bytes()[:123] == bytes(123)


@needs_root
def test_a_block_device_has_one_writer_and_none_beside_the_kernel(tmp_path: Path) -> None:
    with loop_device(sparse_file(tmp_path / "disk", 4 * MIB), direct_io=False) as disk:
        device = str(disk)
        with opened(device), pytest.raises(SourceBusy, match="mounted or open"):
            MappedMedium.open(device)
        # As a mount would hold it.
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(SourceBusy):
                MappedMedium.open(device)
        finally:
            os.close(fd)
        MappedMedium.open(device).close()
