"""Transfers between pages and a file: the right bytes, under references, by system calls alone."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.pools import mapped_pool
from pmemfs.bio.bio_vec import BioVec, total_bytes
from pmemfs.bio.kmap import KmapRegistry, Mapping
from pmemfs.bio.transfer import held, open_direct, read_into_pages, write_from_pages
from pmemfs.errors import NoPageStructures, NotInPool, PageReferences
from pmemfs.media.label import Scheme
from pmemfs.media.page import COUNTER_MAX
from pmemfs.medium.base import ByteRange, Medium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap import Access, Memmap, open_memmap
from pmemfs.memmap.on_demand import OnDemandMemmap
from pmemfs.pfn import FRAME_BYTES, PageGeometry, Pfn, pfn_to_pfn_t
from pmemfs.pool import Pool
from pmemfs.units import MIB

FRAMES = 16
GEOMETRY = PageGeometry(Pfn(1), FRAMES, order=0, memmap_offset_bytes=64)
PATTERN = bytes(range(256)) * (FRAMES * FRAME_BYTES // 256)


class Watched(RecordingMedium):
    """A medium that looks whether the pages of every move are referenced."""

    memmap: OnDemandMemmap
    moves = 0
    flushed: list[tuple[int, int]]

    def _look(self, ranges: Sequence[ByteRange]) -> None:
        self.moves += 1
        for start, length in ranges:
            for pfn in range(start // FRAME_BYTES, (start + length - 1) // FRAME_BYTES + 1):
                page = self.memmap.page(pfn)
                assert page is not None
                assert page.refcount > 0

    def store_from_file(self, ranges: Sequence[ByteRange], fd: int, file_offset: int) -> int:
        self._look(ranges)
        return super().store_from_file(ranges, fd, file_offset)

    def load_to_file(self, ranges: Sequence[ByteRange], fd: int, file_offset: int) -> int:
        self._look(ranges)
        return super().load_to_file(ranges, fd, file_offset)


class Sides:
    """Sixteen frames with page structures, a registry, and a file on the other side."""

    def __init__(self, path: Path) -> None:
        self.memmap = OnDemandMemmap(GEOMETRY, 7)
        self.medium = Watched(bytes((FRAMES + 1) * FRAME_BYTES))
        self.medium.memmap = self.memmap
        self.kmap = KmapRegistry()
        self.kmap.register(Mapping(0, FRAMES + 1, self.medium, 0))
        path.write_bytes(PATTERN)
        self.fd = os.open(path, os.O_RDWR)

    def read(self, vecs: Sequence[BioVec], at: int = 0) -> int:
        return read_into_pages(self.kmap, self.memmap, vecs, self.fd, at)

    def write(self, vecs: Sequence[BioVec], at: int = 0) -> int:
        return write_from_pages(self.kmap, self.memmap, vecs, self.fd, at)

    def content(self, vecs: Sequence[BioVec]) -> bytes:
        return b"".join(bytes(self.kmap.kmap(vec)) for vec in vecs)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[Sides]:
    made = Sides(tmp_path / "other")
    yield made
    os.close(made.fd)


def vec(frame: int, length: int = FRAME_BYTES, offset: int = 0) -> BioVec:
    return BioVec(pfn_to_pfn_t(frame), length, offset)


vecs_apart = st.lists(st.integers(1, FRAMES), unique=True, min_size=1, max_size=8).flatmap(
    lambda frames: st.tuples(
        *(
            st.tuples(st.integers(0, 4095), st.integers(1, 4096)).map(
                lambda part, frame=frame: vec(frame, min(part[1], 4096 - part[0]), part[0])
            )
            for frame in frames
        )
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(vecs=vecs_apart, at=st.integers(0, 70_000))
def test_a_list_is_filled_in_its_order_and_short_only_at_the_files_end(
    sides: Sides, vecs: tuple[BioVec, ...], at: int
) -> None:
    moved = sides.read(vecs, at)
    assert moved == max(0, min(total_bytes(vecs), len(PATTERN) - at))
    assert sides.content(vecs)[:moved] == PATTERN[at : at + moved]
    assert sides.memmap.counts().in_use == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(vecs=vecs_apart, at=st.integers(0, 70_000))
def test_a_list_is_written_in_its_order(sides: Sides, vecs: tuple[BioVec, ...], at: int) -> None:
    sides.medium.store(FRAME_BYTES, PATTERN[::-1])
    assert sides.write(vecs, at) == total_bytes(vecs)
    assert os.pread(sides.fd, total_bytes(vecs), at) == sides.content(vecs)
    assert sides.memmap.counts().in_use == 0


def test_pages_are_referenced_while_bytes_move_and_not_afterwards(sides: Sides) -> None:
    sides.read([vec(3), vec(5, 100, 4000)])
    sides.write([vec(3)])
    assert sides.medium.moves >= 2
    assert sides.memmap.counts().in_use == 0
    page = sides.memmap.page(3)
    assert page is not None
    assert (page.reads, page.writes, page.refcount) == (1, 1, 0)
    assert sides.memmap.is_dirty(page)


def test_what_came_in_is_flushed_so_that_a_fence_makes_it_durable(sides: Sides) -> None:
    sides.read([vec(2), vec(9, 10_000, 7)])
    sides.medium.fence()
    (only,) = sides.medium.after_power_failure()
    assert only == bytes(sides.medium.read(0, sides.medium.size_bytes))
    assert only[2 * FRAME_BYTES : 3 * FRAME_BYTES] == PATTERN[:FRAME_BYTES]


def test_references_are_dropped_when_the_other_side_fails(sides: Sides) -> None:
    for move in (read_into_pages, write_from_pages):
        with pytest.raises(OSError, match="Bad file descriptor"):
            move(sides.kmap, sides.memmap, [vec(1), vec(2)], 1 << 20, 0)
        assert sides.memmap.counts().in_use == 0
    sides.memmap.get_page(1)
    with pytest.raises(OSError, match="Invalid argument"):
        sides.read([vec(1)], -1)
    page = sides.memmap.page(1)
    assert page is not None
    assert page.refcount == 1, "somebody else's reference is not ours to drop"


def test_references_are_all_or_none(sides: Sides) -> None:
    sides.memmap.get_page(4)
    sides.memmap._slices(3, 1)[0]["refcount"] = COUNTER_MAX
    for bad, error in ((vec(4), PageReferences), (vec(FRAMES + 1), NotInPool)):
        with (
            pytest.raises(error),
            held(sides.memmap, [vec(1), vec(2), bad], Access.READ),
        ):
            pytest.fail("it was entered without all references")
        assert sides.memmap.counts().in_use == 1


def test_frames_that_nobody_maps_are_refused_and_nothing_is_held(sides: Sides) -> None:
    with pytest.raises(NotInPool):
        read_into_pages(KmapRegistry(), sides.memmap, [vec(1)], sides.fd, 0)
    assert sides.memmap.counts().in_use == 0


def test_a_list_longer_than_one_system_call_takes_moves_whole(sides: Sides) -> None:
    count = os.sysconf("SC_IOV_MAX") * 2 + 5
    vecs = [vec(1 + n % FRAMES, 16, 16 * (n // FRAMES)) for n in range(count)]
    assert sides.read(vecs, 3) == 16 * count
    assert sides.content(vecs) == PATTERN[3 : 3 + 16 * count]
    assert sides.medium.moves == 3
    os.ftruncate(sides.fd, 0)
    assert sides.write(vecs) == 16 * count
    assert os.pread(sides.fd, 16 * count, 0) == sides.content(vecs)


def test_a_list_over_two_media_moves_whole(sides: Sides) -> None:
    other = Watched(bytes(4 * FRAME_BYTES))
    # Its frames have no structures of their own here, so nothing is there to look at.
    other._look = lambda ranges: None  # type: ignore[method-assign]
    sides.memmap = OnDemandMemmap(PageGeometry(Pfn(1), 200, 0, 64), 7)
    sides.medium.memmap = sides.memmap
    sides.kmap.register(Mapping(100, 4, other, 0))
    vecs = [vec(2), vec(100), vec(3), vec(102, 8192)]
    assert sides.read(vecs) == 5 * FRAME_BYTES
    assert bytes(other.read(0, FRAME_BYTES)) == PATTERN[FRAME_BYTES : 2 * FRAME_BYTES]
    assert sides.content(vecs) == PATTERN[: 5 * FRAME_BYTES]


# Through real mappings


def sides_of(pool: Pool) -> tuple[KmapRegistry, Memmap]:
    kmap = KmapRegistry()
    kmap.register(
        Mapping(pool.first_data_pfn, pool.data_pfn_count, pool.medium, pool.zones.data.offset_bytes)
    )
    return kmap, open_memmap(pool)


def descriptors(directory: Path, content: bytes) -> Iterator[int]:
    path = directory / "other-side"
    path.write_bytes(content)
    fd = open_direct(str(path), os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("scheme", [Scheme.PMEM, Scheme.ON_DEMAND])
@pytest.mark.parametrize("page_size_bytes", [4096, 2 * MIB])
@pytest.mark.parametrize("where", ["in memory", "on disk with O_DIRECT"])
def test_pages_and_a_real_file_exchange_bytes_without_a_copy_in_between(
    scheme: Scheme, page_size_bytes: int, where: str, shm: Path, tmp_path: Path
) -> None:
    content = os.urandom(10 * FRAME_BYTES) + b"the end, not aligned"
    directory = shm if where == "in memory" else tmp_path
    with mapped_pool(shm, scheme, page_size_bytes, 16 * MIB) as pool:
        kmap, memmap = sides_of(pool)
        first = int(pool.first_data_pfn)
        for fd in descriptors(directory, content):
            vecs = [
                BioVec(memmap.pfn_t(first), 4 * FRAME_BYTES, 0),
                vec(first + 20, 8 * FRAME_BYTES),
            ]
            assert read_into_pages(kmap, memmap, vecs, fd, 0) == len(content)
            got = b"".join(bytes(kmap.kmap(v, memmap.geometry)) for v in vecs)
            assert got == content.ljust(12 * FRAME_BYTES, b"\0")
            assert write_from_pages(kmap, memmap, vecs[::-1], fd, FRAME_BYTES) == len(got)
        assert (directory / "other-side").read_bytes()[FRAME_BYTES:] == (
            got[4 * FRAME_BYTES :] + got[: 4 * FRAME_BYTES]
        )
        assert memmap.counts().in_use == 0
        assert memmap.counts().dirty >= 1


def test_direct_io_is_taken_where_the_file_system_has_it(tmp_path: Path) -> None:
    for fd in descriptors(tmp_path, bytes(8192)):
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT


def test_other_failures_to_open_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_direct(str(tmp_path / "missing"), os.O_RDONLY)


def test_without_page_structures_no_transfer_can_hold_its_pages(shm: Path, tmp_path: Path) -> None:
    with mapped_pool(shm, Scheme.NONE, 4096, 16 * MIB) as pool:
        kmap, memmap = sides_of(pool)
        vecs = [BioVec(memmap.pfn_t(pool.first_data_pfn), FRAME_BYTES, 0)]
        for fd in descriptors(tmp_path, PATTERN):
            for move in (read_into_pages, write_from_pages):
                with pytest.raises(NoPageStructures, match="'pmem' and 'on-demand'") as caught:
                    move(kmap, memmap, vecs, fd, 0)
                assert caught.value.errno == errno.EOPNOTSUPP
        medium: Medium = pool.medium
        assert medium.is_hole(pool.zones.data.offset_bytes, FRAME_BYTES)
