"""Every engine over every scheme while its pool grows, and when growing fails half-way."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from kit.data_plane import READ, InProcess, PythonEngine, read_in
from kit.pages import counts_of
from kit.pools import SCHEMES, make_older
from kit.sources import needs_root, small_tmpfs, sparse_file
from pmemfs.dataplane.layouts import Presence
from pmemfs.engine.growing import Grower
from pmemfs.errors import CannotGrow, CannotShrink, NoSpace
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import make_file
from pmemfs.memmap import Memmap, open_memmap
from pmemfs.memmap.base import Access
from pmemfs.pool import Pool, PoolSpec
from pmemfs.pool.growth import Grown
from pmemfs.units import GIB, KIB, MIB, TIB
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.onefile import INODE

ENGINES = ("python", "native")
COMBINATIONS = [
    (engine, scheme, page_bytes, kind)
    for engine in ENGINES
    for scheme in SCHEMES
    for page_bytes in (4 * KIB, 2 * MIB)
    for kind in ("reserved", "sparse")
]


@dataclass
class Mount:
    """What a session puts together, without a kernel."""

    path: Path
    medium: MappedMedium
    pool: Pool
    memmap: Memmap
    engine: PythonEngine | InProcess
    volume: BlockVolume

    def __post_init__(self) -> None:
        self.control = self.engine.control if isinstance(self.engine, InProcess) else self.engine
        self.grower = Grower(self.pool, self.medium, self.memmap, self.control, self._show)

    async def _show(self) -> None:
        self.control.note_size()
        self.volume.grow()

    def grow(self, size_bytes: int) -> Grown:
        """To that size, waiting for it."""
        return trio.run(self.grower.grow, size_bytes)

    def fill(self, start: int, byte: int) -> None:
        """Write each frame from an offset to the end with what says which one it is."""
        for offset in range(start, self.volume.size_bytes, MIB):
            length = min(MIB, self.volume.size_bytes - offset)
            assert self.engine.write(offset, self.expected(offset, length, byte)) == length

    def expected(self, offset: int, length: int, byte: int) -> bytes:
        """What `fill` has written."""
        frames = range(offset // 4096, (offset + length) // 4096)
        return b"".join(bytes([byte]) * 4088 + frame.to_bytes(8, "little") for frame in frames)

    def assert_filled(self, end: int, byte: int) -> None:
        """All is as `fill` has left it up to an end, and zero behind that."""
        for offset in range(0, self.volume.size_bytes, MIB):
            length = min(MIB, self.volume.size_bytes - offset)
            wanted = self.expected(offset, max(0, min(length, end - offset)), byte)
            found = bytes(self.engine.read(offset, length))
            assert found == wanted + bytes(length - len(wanted)), f"at {offset}"

    def reads_and_writes(self) -> list[tuple[int, int, int]]:
        """For each page, what was counted, and whose it is."""
        geometry = self.memmap.geometry
        assert geometry is not None
        pages = (self.memmap.page(geometry.page_to_pfn(page))
                 for page in range(geometry.page_count))  # fmt: skip
        return [(page.reads, page.writes, page.index) if page else (0, 0, 0) for page in pages]


def made(
    path: Path, engine: str, scheme: Scheme, page_bytes: int, kind: str, size_bytes: int
) -> Mount:
    make_file(str(path), size_bytes, sparse=kind == "sparse")
    medium = MappedMedium.open(str(path))
    if kind == "reserved":
        medium.store(0, b"\xa5" * size_bytes)
    Pool.create(medium, PoolSpec("grows", page_bytes, 2 * MIB, scheme))
    return mounted(path, medium, engine)


def mounted(path: Path, medium: MappedMedium, engine_name: str) -> Mount:
    pool = Pool.open(medium)
    pool.begin_mount()
    if engine_name == "python":
        memmap = open_memmap(pool)
        volume = BlockVolume(pool, memmap)
        return Mount(path, medium, pool, memmap, PythonEngine(medium, memmap, volume), volume)
    engine = InProcess(pool, medium)
    return Mount(path, medium, pool, engine.memmap, engine, engine.volume)


@pytest.fixture(params=COMBINATIONS, ids=lambda p: f"{p[0]}-{p[1].word}-{p[2] // KIB}K-{p[3]}")
def mount(request: pytest.FixtureRequest, shm: Path) -> Iterator[Mount]:
    made_one = made(shm / "pool", *request.param, size_bytes=12 * MIB)
    yield made_one
    made_one.medium.close()


def test_a_mount_that_grows_keeps_data_and_pages_and_serves_zeroes_behind(mount: Mount) -> None:
    mount.fill(0, 1)
    size_bytes, has_pages = 12 * MIB, mount.memmap.has_pages
    first_pfn = int(mount.pool.first_data_pfn)
    if has_pages:
        mount.memmap.get_page(first_pfn, Access.PIN)
    # By less than the page structures take, so that the zones overlap; by one frame; by much.
    for more in (4 * KIB, 8 * KIB, 64 * KIB, 4 * MIB, 41 * MIB + 4 * KIB):
        size_bytes += more
        before_bytes = mount.volume.size_bytes
        before = mount.reads_and_writes() if has_pages else []
        dirty = counts_of(mount.memmap).dirty if has_pages else 0
        assert mount.grow(size_bytes).new_bytes == size_bytes
        if has_pages:
            after = mount.reads_and_writes()
            assert after[: len(before)] == before
            assert set(after[len(before) :]) <= {(0, 0, 0)}
            assert counts_of(mount.memmap).dirty == dirty
            assert counts_of(mount.memmap).in_use == 1
        mount.assert_filled(before_bytes, 1)
        mount.fill(before_bytes, 1)
        # As another process finds it that comes after a crash now.
        image = MappedMedium.open(str(copy_of(mount.path)))
        assert Pool.open(image).label == mount.pool.label
        image.close()
    assert mount.volume.size_bytes > 50 * MIB
    if has_pages:
        mount.memmap.put_page(first_pfn)
        assert counts_of(mount.memmap).in_use == 0


def copy_of(path: Path) -> Path:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    return copy


def fail_persist(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Let the persist with this number fail; the list counts them."""
    calls: list[int] = []
    real = MappedMedium.persist

    def persist(medium: MappedMedium, offset_bytes: int, length_bytes: int) -> None:
        calls.append(offset_bytes)
        if len(calls) == call + 1:
            raise OSError(errno.EIO, "gone")
        real(medium, offset_bytes, length_bytes)

    monkeypatch.setattr(MappedMedium, "persist", persist)
    return calls


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("more", [8 * KIB, 12 * MIB])
@pytest.mark.parametrize("kind", ["reserved", "sparse"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_fails_is_undone_with_all_before_it(
    shm: Path, monkeypatch: pytest.MonkeyPatch, engine: str, kind: str, more: int, call: int
) -> None:
    mount = made(shm / "pool", engine, Scheme.PMEM, 4 * KIB, kind, 12 * MIB)
    mount.fill(0, 1)
    before, zones = mount.reads_and_writes(), mount.pool.zones
    calls = fail_persist(monkeypatch, call)
    failure: OSError | None = None
    try:
        mount.grow(12 * MIB + more)
    except OSError as error:
        failure = error
    if failure:
        assert failure.errno == errno.EIO
        assert mount.path.stat().st_size == mount.medium.size_bytes == 12 * MIB
        assert mount.pool.zones == zones
        assert mount.reads_and_writes() == before
        mount.assert_filled(zones.data.size_bytes, 1)
    else:
        assert len(calls) <= call
    monkeypatch.undo()
    size_bytes = 12 * MIB + 2 * more
    assert mount.grow(size_bytes).new_bytes == size_bytes
    mount.fill(zones.data.size_bytes, 1)
    mount.assert_filled(mount.volume.size_bytes, 1)
    mount.pool.end_mount()
    mount.medium.close()
    again = MappedMedium.open(str(mount.path))
    assert Pool.open(again).damaged_copies == []
    again.close()


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_without_room_a_mount_goes_on_as_it_was(engine: str) -> None:
    with small_tmpfs(20 * MIB) as directory:
        mount = made(directory / "pool", engine, Scheme.PMEM, 4 * KIB, "reserved", 12 * MIB)
        mount.fill(0, 1)
        with pytest.raises(NoSpace, match="no room for 64MiB"):
            mount.grow(64 * MIB)
        assert mount.path.stat().st_size == 12 * MIB
        mount.assert_filled(mount.volume.size_bytes, 1)
        assert mount.grow(16 * MIB).old_bytes == 12 * MIB
        mount.medium.close()


def take_all_memory(path: Path) -> None:
    """Fill the file system of a file with it."""
    with path.open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sparse_pool_without_memory_for_its_structures_goes_on_as_it_was(engine: str) -> None:
    with small_tmpfs(14 * MIB) as directory:
        mount = made(directory / "pool", engine, Scheme.PMEM, 4 * KIB, "sparse", 11 * MIB)
        mount.fill(0, 1)
        # Nothing is left for structures elsewhere.
        take_all_memory(directory / "rest")
        before = mount.reads_and_writes()
        with pytest.raises(NoSpace, match="no room for 1GiB") as caught:
            mount.grow(GIB)
        assert caught.value.errno == errno.ENOSPC
        assert mount.path.stat().st_size == 11 * MIB
        assert mount.reads_and_writes() == before
        mount.assert_filled(mount.volume.size_bytes, 1)
        (directory / "rest").unlink()
        assert mount.grow(GIB).new_bytes == GIB
        assert mount.engine.write(0, mount.expected(0, MIB, 2)) == MIB
        assert bytes(mount.engine.read(0, MIB)) == mount.expected(0, MIB, 2)
        mount.medium.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_is_refused_in_a_sentence(shm: Path, engine: str) -> None:
    mount = made(shm / "pool", engine, Scheme.ON_DEMAND, 4 * KIB, "sparse", 12 * MIB)
    with pytest.raises(CannotShrink):
        mount.grow(8 * MIB)
    assert mount.grow(12 * MIB).new_bytes == 12 * MIB
    if engine == "native":
        with pytest.raises(CannotGrow, match="at most; unmount it and resize again"):
            mount.grow(2 * TIB)
        assert mount.grow(TIB).new_bytes == TIB
        assert mount.engine.write(mount.volume.size_bytes - 4096, b"e" * 4096) == 4096
        assert bytes(mount.engine.read(mount.volume.size_bytes - 10, 20)) == b"e" * 10
    mount.medium.close()
    medium = MappedMedium.open(str(shm / "pool"), read_only=True)
    mount.medium = medium
    mount.__post_init__()
    with pytest.raises(CannotGrow, match="read-only"):
        mount.grow(24 * MIB)
    medium.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pool_of_the_first_programs_is_served_and_says_why_it_cannot_grow(
    shm: Path, engine: str
) -> None:
    path = sparse_file(shm / "pool", 12 * MIB)
    medium = MappedMedium.open(str(path))
    Pool.create(medium, PoolSpec("old"))
    make_older(medium)
    mount = mounted(path, medium, engine)
    assert mount.pool.zones.memmap.offset_bytes == 4096
    mount.fill(0, 1)
    with pytest.raises(CannotGrow, match="in front of the data"):
        mount.grow(24 * MIB)
    mount.assert_filled(mount.volume.size_bytes, 1)
    assert path.stat().st_size == 12 * MIB
    medium.close()


def test_a_chunk_that_lost_the_memory_behind_the_data_is_not_taken_for_whole(shm: Path) -> None:
    mount = made(shm / "pool", "native", Scheme.PMEM, 4 * KIB, "sparse", 12 * MIB)
    assert isinstance(mount.engine, InProcess)
    mount.fill(0, 1)
    os.posix_fallocate(mount.medium.fileno(), 0, 12 * MIB)
    last = mount.pool.zones.data.end_bytes >> 21
    mount.engine.shared.set_presence(last, Presence.WHOLE)
    mount.grow(24 * MIB)
    assert mount.engine.shared.presence(last) is not Presence.WHOLE
    mount.medium.close()


def test_a_worker_waits_outside_of_its_section_until_the_pause_is_over(shm: Path) -> None:
    mount = made(shm / "pool", "native", Scheme.PMEM, 4 * KIB, "reserved", 12 * MIB)
    engine = mount.engine
    assert isinstance(engine, InProcess)
    mount.fill(0, 1)
    answers: list[tuple[str, int, bytes]] = []
    before = engine.shared.slot_word(0, "section")
    grace = engine.shared.pause()
    assert engine.shared.is_over(grace)
    thread = threading.Thread(
        target=lambda: answers.append(
            engine.worker.answer(read_in(0, 4096), opcode=READ, inode=INODE)
        ),
        daemon=True,
    )
    thread.start()
    deadline = time.monotonic() + 20
    # It has begun a section, and ended it again.
    while engine.shared.slot_word(0, "section") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.shared.slot_word(0, "section") == before + 2
    assert answers == []
    engine.shared.resume()
    thread.join(timeout=20)
    assert answers == [("answer", 0, mount.expected(0, 4096, 1))]
    mount.medium.close()
