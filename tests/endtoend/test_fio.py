"""fio with verification: what was written is what is read, by every way that fio knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.commands import fio
from kit.device_oracle import Oracle
from kit.mounts import Mounted, PoolMaker

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


def verified(mounted: Mounted, directory: Path, *words: object) -> list[dict[str, Any]]:
    """Run fio on the device with crc32c in every block; its reports of the jobs."""
    output = directory / "fio.json"
    done = fio(
        directory, mounted.device, "--verify=crc32c", "--verify_fatal=1",
        "--output-format=json", f"--output={output}", *words,
    )  # fmt: skip
    assert done.code == 0, done.err
    # Notes may stand before the report.
    report = output.read_text()
    jobs: list[dict[str, Any]] = json.loads(report[report.index("{\n") :])["jobs"]
    for job in jobs:
        assert job["error"] == 0
        assert job["write"]["io_bytes"] > 0
        assert job["read"]["io_bytes"] >= job["write"]["io_bytes"]
    return jobs


@pytest.mark.parametrize("ioengine", ["psync", "libaio", "io_uring"])
def test_four_jobs_read_back_what_they_wrote(
    pools: PoolMaker, tmp_path: Path, ioengine: str
) -> None:
    mounted = pools.mount(pools.create(size="128M"))
    jobs = verified(
        mounted, tmp_path, f"--ioengine={ioengine}", "--rw=randwrite", "--bs=4k", "--size=6m",
        "--iodepth=32", "--numjobs=4", "--offset_increment=20m",
    )  # fmt: skip
    assert len(jobs) == 4
    assert mounted.pages()["counts"]["referenced"] == 4 * 6 * 256
    mounted.wait_until_idle()


@pytest.mark.parametrize("ioengine", ["libaio", "io_uring"])
def test_requests_of_mixed_sizes_verify_32_deep(
    pools: PoolMaker, tmp_path: Path, ioengine: str
) -> None:
    mounted = pools.mount(pools.create(size="64M"))
    verified(
        mounted, tmp_path, f"--ioengine={ioengine}", "--rw=randwrite", "--bsrange=4k-1m",
        "--size=48m", "--iodepth=32",
    )  # fmt: skip


@pytest.mark.parametrize("direct", [0, 1])
def test_sequential_writes_with_fsync_verify(pools: PoolMaker, tmp_path: Path, direct: int) -> None:
    mounted = pools.mount(pools.create(size="64M"))
    verified(
        mounted, tmp_path, "--ioengine=psync", "--rw=write", "--bs=1m", "--size=48m",
        f"--direct={direct}", "--fsync=8",
    )  # fmt: skip
    assert mounted.info()["io"]["fsyncs"] >= 5


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--sparse",),
        ("--scheme", "on-demand"),
        ("--scheme", "none"),
        ("--page-size", "2M"),
    ],
    ids=lambda options: "-".join(options).replace("--", "") or "default",
)
def test_any_offset_and_length_reads_what_was_written_and_survives_a_remount(
    pools: PoolMaker, options: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("pmem0", "24M", *options))
    oracle = Oracle(mounted.device, seed=1)
    oracle.exercise(400)
    oracle.compare()
    pools.umount(mounted)
    pools.mount(mounted.pool)
    oracle.compare()
