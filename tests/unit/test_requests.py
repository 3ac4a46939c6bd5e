"""What a request may say: every length is checked, and nothing that is said is trusted."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import (
    FALLOCATE,
    FLUSH,
    FSYNC,
    INTERRUPT,
    LSEEK,
    MAX_WRITE,
    READ,
    SYNCFS,
    WRITE,
    InProcess,
    in_process,
    lseek_in,
    read_in,
    write_in,
)
from kit.pages import counts_of
from pmemfs.dataplane.layouts import LATENCY_BUCKETS, Operation, bucket_start_ns
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import SourceKind
from pmemfs.pool import Pool
from pmemfs.units import MIB
from pmemfs.volume.block import INODE

VERDICTS = {"answer", "forward", "sync", "drop"}
ERRNOS = {0, errno.EINVAL, errno.ENXIO, errno.EROFS, errno.ENOSPC, errno.EIO, errno.ENOSYS}


@pytest.fixture(scope="module", params=list(Scheme), ids=lambda scheme: scheme.word)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pool, InProcess]]:
    directory = tmp_path_factory.mktemp("pools")
    with in_process(directory, request.param) as made:
        yield made


opcodes = st.sampled_from([READ, WRITE, FSYNC, FLUSH, INTERRUPT, FALLOCATE, LSEEK, SYNCFS])
numbers = st.sampled_from(
    [0, 1, 4095, 4096, MIB, 14 * MIB, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
) | st.integers(0, (1 << 64) - 1)


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    opcodes | st.integers(0, 70),
    st.binary(max_size=128),
    st.binary(max_size=300),
    st.sampled_from([0, 1, INODE, 3, 1 << 63]),
)
def test_any_bytes_are_answered_or_forwarded_and_reach_nothing_outside_the_data(
    served: tuple[Pool, InProcess], opcode: int, operation: bytes, payload: bytes, inode: int
) -> None:
    pool, engine = served
    label_before = bytes(pool.medium.read(0, 4096))
    verdict, error, data = engine.worker.answer(
        operation, opcode=opcode, inode=inode, payload=payload
    )
    assert verdict in VERDICTS
    assert error in ERRNOS
    assert len(data) <= MAX_WRITE
    assert bytes(pool.medium.read(0, 4096)) == label_before


@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), numbers, st.integers(0, (1 << 32) - 1) | st.integers(0, 9000))
def test_any_offset_and_size_stay_inside_the_volume(
    served: tuple[Pool, InProcess], is_write: bool, offset: int, size: int
) -> None:
    pool, engine = served
    end = pool.zones.data.size_bytes
    if is_write:
        payload = b"w" * min(size, 9000)
        verdict, error, _ = engine.worker.answer(
            write_in(offset, size), opcode=WRITE, inode=INODE, payload=payload
        )
        if size > len(payload):
            assert (verdict, error) == ("answer", errno.EINVAL)
        elif size and offset + size <= end:
            assert (verdict, error) == ("answer", 0)
        else:
            assert verdict == "forward"
        return
    verdict, error, data = engine.worker.answer(read_in(offset, size), opcode=READ, inode=INODE)
    assert verdict == "answer"
    if size > MAX_WRITE:
        assert error == errno.EINVAL
    else:
        assert error == 0
        assert len(data) == max(0, min(size, end - offset))


@pytest.mark.parametrize(
    ("opcode", "operation"),
    [(READ, read_in(0, 10)), (WRITE, write_in(0, 1)), (LSEEK, lseek_in(0, 3))],
)
def test_a_request_that_is_cut_short_is_refused(
    served: tuple[Pool, InProcess], opcode: int, operation: bytes
) -> None:
    _, engine = served
    for length in range(len(operation)):
        verdict, error, data = engine.worker.answer(
            operation[:length], opcode=opcode, inode=INODE, payload=b"x"
        )
        assert (verdict, error, data) == ("answer", errno.EINVAL, b"")


def test_data_and_holes_are_found_as_the_file_system_below_tells(
    served: tuple[Pool, InProcess],
) -> None:
    pool, engine = served
    end = pool.zones.data.size_bytes

    def seek(offset: int, whence: int) -> int:
        verdict, error, data = engine.worker.answer(
            lseek_in(offset, whence), opcode=LSEEK, inode=INODE
        )
        assert verdict == "answer"
        return -error if error else int(struct.unpack("<Q", data)[0])

    engine.punch(0, end)
    assert seek(0, os.SEEK_DATA) == -errno.ENXIO
    assert seek(0, os.SEEK_HOLE) == 0
    engine.write(3 * MIB + 5, b"data")
    assert seek(0, os.SEEK_DATA) == 3 * MIB
    assert seek(3 * MIB, os.SEEK_HOLE) == 3 * MIB + 4096
    assert seek(3 * MIB + 4096, os.SEEK_DATA) == -errno.ENXIO
    assert seek(3 * MIB + 4096, os.SEEK_HOLE) == 3 * MIB + 4096
    engine.write(end - 1, b"x")
    assert seek(4 * MIB, os.SEEK_DATA) == end - 4096
    assert seek(end - 1, os.SEEK_HOLE) == end
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (end, end + 1, 1 << 63, (1 << 64) - 1):
            assert seek(offset, whence) == -errno.ENXIO


def test_what_was_trimmed_reads_as_zeroes_takes_no_memory_and_is_not_dirty(
    served: tuple[Pool, InProcess],
) -> None:
    pool, engine = served
    # Page structures get their memory with the first touch, whichever test runs first.
    engine.write(MIB - 3, b"x" * MIB)
    engine.punch(0, pool.zones.data.size_bytes)
    before = os.stat(pool.medium.name).st_blocks
    engine.write(MIB - 3, b"x" * MIB)
    assert os.stat(pool.medium.name).st_blocks >= before + 2048
    engine.punch(MIB + 10, MIB - 100)
    assert engine.read(MIB - 3, MIB) == b"x" * 13 + bytes(MIB - 100) + b"x" * 77 + b"x" * (
        MIB - 13 - (MIB - 100) - 77
    )
    assert os.stat(pool.medium.name).st_blocks <= before + 8 * 6
    if engine.memmap.has_pages:
        counts = counts_of(engine.memmap)
        assert counts.in_use == 0
        assert counts.dirty <= 3


def test_a_dax_device_gives_nothing_back_but_reads_as_zeroes_and_is_served_on(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process(shm) as (pool, engine):
        medium = pool.medium
        assert isinstance(medium, MappedMedium)
        engine.write(0, b"x" * (4 * MIB))
        device = medium.source._replace(kind=SourceKind.DAX_DEVICE)
        monkeypatch.setattr(medium, "source", device)
        monkeypatch.setattr(medium, "reserved", True)
        before = [engine.shared.presence(chunk) for chunk in range(8)]
        engine.punch(100, 3 * MIB)
        assert engine.read(0, MIB) == b"x" * 100 + bytes(MIB - 100)
        assert engine.read(3 * MIB + 100, 5) == b"xxxxx"
        assert medium.reserved
        assert [engine.shared.presence(chunk) for chunk in range(8)] == before


def test_counters_tell_every_request_from_every_other(served: tuple[Pool, InProcess]) -> None:
    _, engine = served

    def of(operation: Operation) -> tuple[int, int, int, int]:
        found = engine.control.counters()[0].operations[operation]
        assert sum(found.latencies) == found.answered
        return found.answered, found.forwarded, found.failed, found.moved_bytes

    before = {operation: of(operation) for operation in Operation}
    engine.write(0, b"12345")
    engine.read(0, 3)
    engine.worker.answer(read_in(0, MAX_WRITE + 1), opcode=READ, inode=INODE)
    engine.worker.answer(read_in(0, 1), opcode=READ, inode=99)
    engine.worker.answer(bytes(32), opcode=FALLOCATE, inode=INODE)
    engine.worker.answer(bytes(16), opcode=FSYNC, inode=INODE)
    after = {operation: of(operation) for operation in Operation}
    moved = {
        operation: tuple(
            new - old for new, old in zip(after[operation], before[operation], strict=False)
        )
        for operation in Operation
    }
    assert moved[Operation.WRITE] == (1, 0, 0, 5)
    assert moved[Operation.READ] == (2, 1, 1, 3)
    assert moved[Operation.TRIM] == (0, 1, 0, 0)
    assert moved[Operation.FSYNC] == (1, 0, 0, 0)
    assert moved[Operation.OTHER] == (0, 0, 0, 0)


def test_buckets_of_latencies_follow_each_other_without_gaps() -> None:
    starts = [bucket_start_ns(bucket) for bucket in range(LATENCY_BUCKETS)]
    assert starts[:6] == [0, 128, 160, 192, 224, 256]
    assert starts == sorted(set(starts))
    assert starts[-1] > 30 * 10**9
