"""pmemfs on real persistent memory: /dev/pmem0, DAX files and /dev/dax0.0 of QEMU guests.

Each source has a machine of its own, which boots twice: pmemfs is used as a user does, also by
programs that map pages, then the machine is killed while records are written; the second boot looks
for them. The machines run side by side, more machines than processors, so each has one processor: a
second one would often have to wait for the first, which is elsewhere.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.commands import Result, run_command

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
INSIDE = ROOT / "tests/guest/inside"
EXIT_SKIPPED = 77
EXIT_KILLED = 137
BOOT_SECONDS = 800


@dataclass(frozen=True)
class Machine:
    """What a machine is for: how its NVDIMM is used, and what is done before it is killed."""

    source: str
    mode: str
    script: str

    def __str__(self) -> str:
        return f"{self.mode}-{self.source}"


MACHINES = [
    Machine("ext4", "fsdax", "daxfiles.sh"),
    Machine("/dev/pmem0", "fsdax", "fsdax.sh"),
    Machine("/dev/dax0.0", "devdax", "devdax.sh"),
]
"""`ext4` stands for a file there, with DAX."""

DONE = "the script has ended well"


@dataclass(frozen=True)
class Boots:
    """What a machine said, from boot to kill, and after that; the second boot needs a kill."""

    killed: Result
    recovered: Result | None


def boot(machine: Machine, nvdimm: Path, commands: str, *options: object) -> Result:
    """Boot a machine and run commands of a shell, in the folder of the scripts."""
    result = run_command(
        ROOT / "scripts/guest", "run", "--mode", machine.mode, "--nvdimm", nvdimm, "--cpus", 1,
        "--timeout", BOOT_SECONDS, *options, "--", "sh", "-ec", commands,
        timeout=BOOT_SECONDS + 60,
    )  # fmt: skip
    if result.code == EXIT_SKIPPED:
        pytest.skip(result.err.strip())
    return result


def run_machine(machine: Machine, nvdimm: Path) -> Boots:
    """Both boots of a machine."""
    power = shlex.join(["sh", str(INSIDE / "power.sh")])
    before = f"sh {shlex.quote(str(INSIDE / machine.script))}\necho {shlex.quote(DONE)}"
    before += f"\nexec {power} before {machine.source}"
    killed = boot(machine, nvdimm, before, "--kill-after-line", "durable 191")
    if killed.code != EXIT_KILLED:
        return Boots(killed, None)
    last_durable = re.findall(r"^durable (\d+)$", killed.out, re.MULTILINE)[-1]
    return Boots(killed, boot(machine, nvdimm, f"{power} after {machine.source} {last_durable}"))


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[Machine, Future[Boots]]]:
    """All machines, running."""
    with (
        tempfile.TemporaryDirectory(prefix="pmemfs-guest-", dir="/dev/shm") as directory,
        ThreadPoolExecutor(len(MACHINES)) as threads,
    ):
        yield {
            machine: threads.submit(run_machine, machine, Path(directory) / f"nvdimm{number}")
            for number, machine in enumerate(MACHINES)
        }


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_pools_on_persistent_memory_serve_fio_dd_arrays_and_copies(
    machine: Machine, machines: dict[Machine, Future[Boots]]
) -> None:
    boots = machines[machine].result()
    assert f"{DONE}\n" in boots.killed.out, boots.killed.out + boots.killed.err


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_killing_the_machine_loses_nothing_that_was_fsynced(
    machine: Machine, machines: dict[Machine, Future[Boots]]
) -> None:
    boots = machines[machine].result()
    assert boots.recovered is not None, boots.killed.out + boots.killed.err
    assert boots.recovered.code == 0, boots.recovered.out + boots.recovered.err
    assert "blocks hold what was durable" in boots.recovered.out
