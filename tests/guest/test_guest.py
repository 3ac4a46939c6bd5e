"""pmemfs on real persistent memory: /dev/pmem0, DAX files and /dev/dax0.0 of a QEMU guest."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.commands import Result, run_command

# Beside others that compute, an emulated machine takes three times as long, whatever its priority.
pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
INSIDE = ROOT / "tests/guest/inside"
EXIT_SKIPPED = 77
EXIT_KILLED = 137


def guest(*words: object, mode: str, options: tuple[object, ...] = ()) -> Result:
    """Run a script of `inside` in a guest whose NVDIMM is in `mode`."""
    result = run_command(
        ROOT / "scripts/guest", "run", "--mode", mode, *options, "--", *words, timeout=800
    )
    if result.code == EXIT_SKIPPED:
        pytest.skip(result.err.strip())
    return result


@pytest.fixture
def nvdimm() -> Iterator[Path]:
    """The memory of an NVDIMM, which outlives the guest."""
    with tempfile.TemporaryDirectory(prefix="pmemfs-guest-", dir="/dev/shm") as directory:
        yield Path(directory) / "nvdimm"


def test_a_pool_on_dev_pmem0_and_on_dax_files_serves_fio_and_dd() -> None:
    result = guest("sh", INSIDE / "fsdax.sh", mode="fsdax")
    assert result.code == 0, result.out + result.err


def test_a_pool_on_a_dax_device_serves_fio_and_dd() -> None:
    result = guest("sh", INSIDE / "devdax.sh", mode="devdax")
    assert result.code == 0, result.out + result.err


@pytest.mark.parametrize(
    ("mode", "source"), [("fsdax", "/dev/pmem0"), ("fsdax", "ext4"), ("devdax", "/dev/dax0.0")]
)
def test_killing_the_machine_loses_nothing_that_was_fsynced(
    mode: str, source: str, nvdimm: Path
) -> None:
    script = INSIDE / "power.sh"
    kept = ("--nvdimm", nvdimm)
    kill = ("--kill-after-line", "durable 191")
    killed = guest("sh", script, "before", source, mode=mode, options=(*kept, *kill))
    assert killed.code == EXIT_KILLED, killed.out + killed.err
    last_durable = re.findall(r"^durable (\d+)$", killed.out, re.MULTILINE)[-1]
    recovered = guest("sh", script, "after", source, last_durable, mode=mode, options=kept)
    assert recovered.code == 0, recovered.out + recovered.err
    assert "blocks hold what was durable" in recovered.out
