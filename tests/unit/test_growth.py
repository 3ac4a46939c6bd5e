"""Growing a pool that nobody has mounted: what it refuses, what it leaves, what it reads as."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.pools import SCHEMES, content, make_older
from kit.sources import loop_device, needs_root, small_tmpfs, sparse_file
from pmemfs.errors import (
    EXIT_REFUSED,
    EXIT_USAGE,
    BadGeometry,
    CannotGrow,
    CannotShrink,
    NoSizeGiven,
    NoSpace,
)
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import make_file
from pmemfs.pool import Pool, PoolSpec
from pmemfs.pool.growth import grow_unmounted
from pmemfs.units import GIB, KIB, MIB

SIZE = 8 * MIB


@contextmanager
def pool_at(path: Path) -> Iterator[Pool]:
    medium = MappedMedium.open(str(path))
    try:
        yield Pool.open(medium)
    finally:
        medium.close()


def make_pool(
    path: Path, scheme: Scheme = Scheme.PMEM, page_bytes: int = 4 * KIB, size_bytes: int = SIZE
) -> bytes:
    """A pool, all of whose data zone holds something; that."""
    make_file(str(path), size_bytes, sparse=False)
    medium = MappedMedium.open(str(path))
    try:
        # What becomes data later held something before there was a pool.
        medium.store(0, b"\xa5" * size_bytes)
        pool = Pool.create(medium, PoolSpec("grows", page_bytes, 2 * MIB, scheme))
        data = os.urandom(pool.zones.data.size_bytes)
        medium.store(pool.zones.data.offset_bytes, data)
        return data
    finally:
        medium.close()


def data_of(path: Path) -> bytes:
    with pool_at(path) as pool:
        zone = pool.zones.data
        return bytes(pool.medium.read(zone.offset_bytes, zone.size_bytes))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page_bytes", [4 * KIB, 2 * MIB])
def test_a_pool_that_grew_holds_what_it_held_and_zeroes_behind(
    shm: Path, scheme: Scheme, page_bytes: int
) -> None:
    path = shm / "pool"
    data = make_pool(path, scheme, page_bytes, size_bytes=SIZE - 12 * KIB)
    size_bytes = SIZE
    # By less than the page structures take, by one frame, and by much.
    for more in (4 * KIB, 16 * KIB, 64 * KIB, 2 * MIB + 4 * KIB, 40 * MIB):
        size_bytes += more
        grown = grow_unmounted(str(path), size_bytes + 100)
        assert grown.new_bytes == size_bytes == path.stat().st_size
        found = data_of(path)
        assert found.startswith(data)
        assert found[len(data) :].strip(b"\0") == b""
        data += os.urandom(len(found) - len(data))
        with pool_at(path) as pool:
            assert pool.damaged_copies == []
            assert pool.medium.reserved, "there is memory behind what was added"
            pool.medium.store(pool.zones.data.offset_bytes, data)
            # As a mount leaves them.
            zone = pool.zones.memmap
            pool.medium.store(zone.offset_bytes, b"\x5a" * zone.size_bytes)
    assert len(data) > 40 * MIB


def test_a_sparse_pool_stays_sparse(shm: Path) -> None:
    path = sparse_file(shm / "pool", 64 * MIB)
    with_pool(path)
    grow_unmounted(str(path), 16 * GIB)
    assert path.stat().st_size == 16 * GIB
    assert path.stat().st_blocks * 512 < MIB


def with_pool(path: Path) -> None:
    medium = MappedMedium.open(str(path))
    Pool.create(medium, PoolSpec("grows"))
    medium.close()


def test_the_generation_is_none_that_an_owner_of_the_new_memory_could_have_known(
    shm: Path,
) -> None:
    path = shm / "pool"
    make_pool(path)
    with pool_at(path) as pool:
        before = pool.label.generation
    grow_unmounted(str(path), 2 * SIZE)
    with pool_at(path) as pool:
        assert abs(pool.label.generation - before) > 1 << 32


def test_a_longer_file_is_taken_without_a_size(shm: Path) -> None:
    path = shm / "pool"
    data = make_pool(path)
    with path.open("ab") as file:
        file.write(b"whatever" * 8192)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE + MIB)
    assert grow_unmounted(str(path), None).new_bytes == SIZE + MIB
    found = data_of(path)
    assert found.startswith(data)
    assert found[len(data) :].strip(b"\0") == b"", "what somebody left behind the pool is cleared"


def test_what_cannot_be_is_refused_in_a_sentence_and_touches_nothing(shm: Path) -> None:
    path = shm / "pool"
    make_pool(path)
    image = path.read_bytes()
    with pytest.raises(CannotShrink, match="8MiB, and what lies behind 7MiB would be lost") as lost:
        grow_unmounted(str(path), 7 * MIB)
    assert lost.value.exit_code == EXIT_REFUSED
    with pytest.raises(NoSizeGiven, match="new size with --size") as unsaid:
        grow_unmounted(str(path), None)
    assert unsaid.value.exit_code == EXIT_USAGE
    grown = grow_unmounted(str(path), SIZE + 17)
    assert (grown.old_bytes, grown.new_bytes) == (SIZE, SIZE)
    assert path.read_bytes() == image
    with path.open("ab") as file:
        file.write(bytes(MIB))
    with pytest.raises(BadGeometry, match="has 9MiB; --size can make it larger, not smaller"):
        grow_unmounted(str(path), SIZE + 64 * KIB)


def test_a_pool_of_the_first_programs_works_and_grows_only_where_nothing_is_in_front(
    shm: Path,
) -> None:
    for scheme in SCHEMES:
        path = shm / scheme.word
        make_pool(path, scheme)
        medium = MappedMedium.open(str(path))
        make_older(medium)
        medium.close()
        with pool_at(path) as pool:
            pool.begin_mount()
            pool.end_mount()
            assert pool.label.incompatible_features == 0
        if scheme is Scheme.PMEM:
            image = path.read_bytes()
            with pytest.raises(CannotGrow, match="lie in front of the data, as"):
                grow_unmounted(str(path), 2 * SIZE)
            assert path.read_bytes() == image
        else:
            assert grow_unmounted(str(path), 2 * SIZE).new_bytes == 2 * SIZE


@needs_root
def test_without_room_the_pool_and_its_file_stay_as_they_were() -> None:
    with small_tmpfs(12 * MIB) as directory:
        path = directory / "pool"
        data = make_pool(path)
        for _ in range(2):
            with pytest.raises(NoSpace, match="no room for 64MiB"):
                grow_unmounted(str(path), 64 * MIB)
            assert path.stat().st_size == SIZE
            assert data_of(path) == data
        assert grow_unmounted(str(path), 10 * MIB).new_bytes == 10 * MIB


@pytest.mark.parametrize("call", range(10))
def test_a_step_that_fails_leaves_the_pool_and_its_file_as_they_were(
    shm: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    path = shm / "pool"
    data = make_pool(path)
    calls = 0
    real = MappedMedium.persist

    def persist(medium: MappedMedium, offset_bytes: int, length_bytes: int) -> None:
        nonlocal calls
        if calls == call:
            calls += 1
            raise OSError(errno.EIO, "gone")
        calls += 1
        real(medium, offset_bytes, length_bytes)

    monkeypatch.setattr(MappedMedium, "persist", persist)
    try:
        grow_unmounted(str(path), 2 * SIZE)
    except OSError:
        monkeypatch.undo()
        assert path.stat().st_size == SIZE
        assert data_of(path) == data
    else:
        assert calls <= call
    monkeypatch.undo()
    assert grow_unmounted(str(path), 3 * SIZE).new_bytes == 3 * SIZE
    assert data_of(path)[: len(data)] == data


def test_a_copy_that_serves_alone_is_not_lost_when_the_medium_grows(shm: Path) -> None:
    path = shm / "pool"
    data = make_pool(path)
    with path.open("r+b") as file:
        file.write(b"\xa5" * 4096)
    grow_unmounted(str(path), 2 * SIZE)
    assert data_of(path)[: len(data)] == data
    with pool_at(path) as pool:
        assert pool.damaged_copies == []


@needs_root
def test_a_device_that_has_grown_is_taken_whole_and_reads_as_zeroes(tmp_path: Path) -> None:
    backing = sparse_file(tmp_path / "disk", 16 * MIB)
    with loop_device(backing, direct_io=False) as disk:
        with_pool(disk)
        device = str(disk)
        with pytest.raises(BadGeometry, match="is a device of 16MiB"):
            grow_unmounted(device, 24 * MIB)
        assert grow_unmounted(device, None).new_bytes == 16 * MIB
        with backing.open("r+b") as file:
            file.seek(16 * MIB)
            file.write(b"\xa5" * 8 * MIB)
        os.system(f"losetup --set-capacity {device}")
        assert grow_unmounted(device, None).new_bytes == 24 * MIB
        assert data_of(disk).strip(b"\0") == b""


def test_a_label_that_a_growth_left_behind_loses_against_the_pool(shm: Path) -> None:
    path = shm / "pool"
    make_pool(path)
    with pool_at(path) as pool:
        image = content(pool.medium)
        stray = pool.grown_label(2 * SIZE, 7)
    with path.open("ab") as file:
        file.truncate(2 * SIZE)
    with pool_at(path) as pool:
        pool.announce(stray)
    # The next mount, whose label in front is torn at the end.
    with pool_at(path) as pool:
        assert pool.label.pool_size_bytes == SIZE
        pool.begin_mount()
        assert pool.label.sequence > stray.sequence
        pool.medium.store(512, b"\xa5" * 512)
    with pool_at(path) as pool:
        assert pool.label.pool_size_bytes == SIZE
        assert pool.zones.data.end_bytes <= len(image)
