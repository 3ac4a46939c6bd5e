"""The commands in README and the documents run as they stand there, one after the other.

A block that is marked `sh` is to be run, and `bash` with root and a cluster of Ceph; `text` marks
what takes minutes, needs hardware that few have, or changes the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.ceph_node import CephNode
from kit.commands import BIN
from kit.documents import DOCUMENTS, ROOT, blocks, name_of
from kit.mounts import PoolMaker
from kit.namespaces import Run, let_go_of_others, nobody_copies_mounts
from kit.sources import needs_root

pytestmark = [pytest.mark.mount, pytest.mark.slow]

RUNNABLE = [path for path in DOCUMENTS if blocks(path, "sh")]


def run_as_written(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a reader would, with a /dev/shm of its own.

    All its processes, daemons as well, and its mounts end with it.
    """
    with nobody_copies_mounts() as lock:
        # A script takes long. Meanwhile its copies of the mounts of other tests would keep those
        # from ending. They lie below /dev/shm, so they go before it is hidden.
        own = (
            f"{let_go_of_others(home)}\nflock --unlock {lock}\n"
            "mount -t tmpfs -o size=2G none /dev/shm"
        )
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-ec", f"{own}\n{script}"],
            cwd=ROOT, env={**os.environ, "HOME": str(home), **environment}, capture_output=True,
            text=True, timeout=200, check=False, pass_fds=[lock],
        )  # fmt: skip


def test_readme_has_commands_to_run() -> None:
    assert ROOT / "README.md" in RUNNABLE


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_the_commands_of_a_document_run_as_they_stand_there(path: Path, tmp_path: Path) -> None:
    script = "\n".join(blocks(path, "sh"))
    if "nbdkit " in script and shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed; scripts/install-origins --tests installs it")
    done = run_as_written(script, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@needs_root
def test_the_commands_for_a_cluster_run_as_they_stand_there(ceph: CephNode, tmp_path: Path) -> None:
    script = "\n".join(blocks(ROOT / "docs/tutorial-cache.md", "bash"))
    begin = blocks(ROOT / "docs/tutorial-cache.md", "sh")[0]
    # The loop device would outlive everything else.
    begin += "trap '[ -z \"${loop:-}\" ] || losetup -d $loop || true' EXIT\n"
    done = run_as_written(begin + script, tmp_path, CEPH_CONF=str(ceph.conf))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "There is 1 exclusive lock on this image." in done.stdout
    assert "Watchers: none" in done.stdout


def test_the_commands_of_readme_need_no_root(pools: PoolMaker, user: Run) -> None:
    pool, mountpoint = Path("/dev/shm/pmem0"), pools.directory / "home/mnt"
    if pool.exists():
        pytest.skip(f"{pool} is somebody's")
    script = "\n".join(blocks(ROOT / "README.md", "sh"))
    try:
        done = user("env", "-C", ROOT, "bash", "-ec", script)
        assert done.code == 0, done.out[-2000:] + done.err[-2000:]
        assert not pool.exists()
    finally:
        if pool.exists():
            user(BIN / "pmemfs", "umount", "--lazy", mountpoint)
            pool.unlink()
