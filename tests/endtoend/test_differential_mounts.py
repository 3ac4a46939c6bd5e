"""One mount of each engine, given the same by system calls: nothing tells them apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.fs_mounts import FsMount
from kit.fs_rig import PYTHON_LACKS, Rig
from kit.mounts import ENGINES, NATIVE, Engine, Mounted, pool_maker
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SIZE_BYTES = 16 * MIB


@pytest.fixture(scope="module", params=["pmem", "on-demand", "none"])
def mounts(request: pytest.FixtureRequest) -> Iterator[list[Mounted]]:
    with ExitStack() as stack:
        made = []
        for engine in ENGINES:
            pools = stack.enter_context(pool_maker(engine))
            pool = pools.create("pmem0", str(SIZE_BYTES), "--scheme", request.param)
            made.append(pools.mount(pool))
        yield made


offsets = st.integers(0, SIZE_BYTES + 5000) | st.sampled_from(
    [0, 1, 4095, 4096, 2 * MIB - 1, 14 * MIB - 4096, 14 * MIB, SIZE_BYTES, 1 << 40, (1 << 63) - 9]
)
lengths = st.integers(1, 9000) | st.sampled_from([1, 4096, 65536, 512 * 1024])
calls = st.one_of(
    st.tuples(st.just("pread"), lengths, offsets),
    st.tuples(st.just("pwrite"), st.builds(lambda n, b: bytes([b]) * n, lengths, st.integers(0, 255)), offsets),  # noqa: E501
    st.tuples(st.just("fsync")),
    st.tuples(st.just("fdatasync")),
    st.tuples(st.just("lseek"), offsets, st.sampled_from([os.SEEK_SET, os.SEEK_END])),
    st.tuples(st.just("truncate"), offsets),
)  # fmt: skip


def outcome(fd: int, call: tuple[Any, ...]) -> object:
    name, *arguments = call
    try:
        return getattr(os, name)(fd, *arguments)
    except OSError as error:
        return error.errno


def traces(mounted: Mounted) -> object:
    """What can be seen of a mount beside its bytes, without what differs between any two."""
    info = mounted.info()
    io = {name: count for name, count in info["io"].items() if name != "fsyncs"}
    if info["pool"]["scheme"] == "none":
        return io
    pages = mounted.pages(hottest=50)
    for page in pages["hottest"]:
        page.pop("last_access_ns")
    return io, pages["counts"], pages["hottest"]


def test_the_same_calls_have_the_same_outcomes_and_leave_the_same_traces(
    mounts: list[Mounted],
) -> None:
    with ExitStack() as stack:
        fds = [stack.enter_context(opened(mounted.device)) for mounted in mounts]

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(calls, max_size=12))
        def run(sequence: list[tuple[Any, ...]]) -> None:
            for call in sequence:
                outcomes = [outcome(fd, call) for fd in fds]
                assert outcomes.count(outcomes[0]) == len(outcomes), call[0]

        run()
        for fd in fds:
            # As each daemon does by itself now and then: what is dirty would differ by that.
            os.fsync(fd)

    def all_traces() -> list[object]:
        return [traces(mounted) for mounted in mounts]

    # A worker counts a request after it has answered it.
    wait_until(lambda: len(set(map(repr, all_traces()))) == 1, "all have left the same traces")
    contents = [mounted.device.read_bytes() for mounted in mounts]
    assert contents.count(contents[0]) == len(contents)


@pytest.mark.parametrize("native", NATIVE, ids=str)
def test_the_same_steps_on_files_have_the_same_results(native: Engine) -> None:
    # The umask is none, because pyfuse3 can't leave it to the daemon.
    before = os.umask(0)
    try:
        with (
            pool_maker(Engine("python")) as pools,
            pool_maker(native) as others,
            FsMount.made(pools, size="96M") as mount,
            FsMount.made(others, size="96M") as reference,
        ):
            both = Rig(mount, reference.directory, PYTHON_LACKS)
            for seed in range(100, 108):
                both.explore(seed, 100)
            mount.check()
            reference.check()
    finally:
        os.umask(before)
