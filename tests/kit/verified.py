"""fio verify over the death of what it writes to: 4 jobs, 32 deep, a checksum in every block.

fio's own record of what was acknowledged to it fits only one request at a time, so here it is taken
from fio's log of answers.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.commands import fio
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.units import MIB

JOBS, DEPTH = 4, 32
BLOCK_BYTES = 4096
JOB_BYTES, STEP_BYTES = 4 * MIB, 6 * MIB
_TIMEOUT_SECONDS = 300


class VerifiedBlocks:
    """The blocks of a device that fio writes, again and again, and verifies."""

    def __init__(self, device: Path, directory: Path, *, rate: int = 1500) -> None:
        """`directory` is for fio's files; each job writes at most `rate` blocks a second."""
        self.device = device
        self._directory = directory
        self._rate = rate
        self._words = [
            "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio", f"--iodepth={DEPTH}",
            f"--size={JOB_BYTES}", f"--numjobs={JOBS}", f"--verify_interval={BLOCK_BYTES}",
            f"--offset_increment={STEP_BYTES}",
        ]  # fmt: skip
        self._round = 0
        self._before: dict[int, bytes] = {}
        self.acknowledged: set[int] = set()
        """The offsets of the blocks that were answered in the last round."""

    def fill(self) -> None:
        """Write every block once."""
        words = [*self._words, "--rw=write", "--bs=64k", "--do_verify=0"]
        done = fio(self._directory, self.device, *words, timeout=_TIMEOUT_SECONDS)
        assert done.code == 0, done.err
        self._before = self._load()

    @contextmanager
    def writing(self) -> Iterator[subprocess.Popen[bytes]]:
        """fio writes all blocks anew meanwhile. It is waited for, whatever happens to its device.

        Some blocks are acknowledged before this begins.
        """
        self._round += 1
        for log in self._logs():
            log.unlink()
        words = [
            "fio", "--name=v", f"--filename={self.device}", "--direct=1", *self._words,
            "--rw=randwrite", f"--bs={BLOCK_BYTES}", "--do_verify=0", f"--randseed={self._round}",
            "--log_offset=1", "--write_lat_log=round", f"--rate_iops={self._rate}",
            "--output=fio.out",
        ]  # fmt: skip
        running = subprocess.Popen(words, cwd=self._directory, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: self._has_begun() or running.poll() is not None, "fio writes")
            yield running
        finally:
            running.wait(timeout=_TIMEOUT_SECONDS)
        self.acknowledged = {
            int(line.split(",")[4]) for log in self._logs() for line in log.read_text().splitlines()
        }

    def check(self) -> None:
        """Every block is whole, old or new, and those that were acknowledged are new."""
        words = [*self._words, "--rw=read", "--bs=64k"]
        done = fio(self._directory, self.device, *words, timeout=_TIMEOUT_SECONDS)
        assert done.code == 0, done.err
        now = self._load()
        lost = [at for at in sorted(self.acknowledged) if now[at] == self._before[at]]
        assert not lost, f"{len(lost)} of {len(self.acknowledged)} are lost: {lost[:8]}"
        self._before = now

    def _load(self) -> dict[int, bytes]:
        """Every block."""
        found = {}
        with opened(self.device) as fd:
            for job in range(JOBS):
                start = job * STEP_BYTES
                data = os.pread(fd, JOB_BYTES, start)
                assert len(data) == JOB_BYTES
                for at in range(0, JOB_BYTES, BLOCK_BYTES):
                    found[start + at] = data[at : at + BLOCK_BYTES]
        return found

    def _has_begun(self) -> bool:
        """Whether blocks have changed. The log is written when fio ends."""
        with opened(self.device) as fd:
            return any(
                os.pread(fd, BLOCK_BYTES, at) != self._before[at]
                for at in range(0, JOB_BYTES, 16 * BLOCK_BYTES)
            )

    def _logs(self) -> list[Path]:
        return list(self._directory.glob("round_clat.*.log"))
