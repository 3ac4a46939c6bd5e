"""kill -9 of the daemon in the middle of writing: everything acknowledged is there afterwards."""

from __future__ import annotations

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import fio, pmemfs_ok
from kit.mounts import UNKEPT, PoolMaker, Session, mounts_at
from kit.posix import opened
from kit.processes import wait_until
from kit.records import WRITERS, Writer, writing

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = 7


def test_what_was_acknowledged_survives_kill_9_of_the_daemon(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="40M"))
    writers = [Writer(name) for name in range(WRITERS)]
    chance = random.Random(5)
    acknowledged = 0
    for _ in range(ROUNDS):
        session = Session.of(mounted)
        with writing(writers, mounted.device):
            wait_until(lambda: all(w.count or w.error for w in writers), "all writers write")
            time.sleep(chance.uniform(0.0, 0.3))
            session.kill()
        acknowledged += sum(writer.count for writer in writers)
        assert session.is_mounted, "the dead mount is what the next one has to replace"
        pools.mount(mounted.pool)
        assert mounts_at(mounted.mountpoint) == 1
        with opened(mounted.device) as fd:
            for writer in writers:
                writer.check(fd)
    assert acknowledged > ROUNDS * WRITERS
    pools.umount(mounted)
    pools.mount(mounted.pool)
    for writer in writers:
        writer.under_way = None
        with opened(mounted.device) as fd:
            writer.check(fd)


@pytest.mark.parametrize("ioengine", ["libaio"])
def test_fio_finds_after_kill_9_what_was_acknowledged_to_it(
    pools: PoolMaker, tmp_path: Path, ioengine: str
) -> None:
    mounted = pools.mount(pools.create(size="96M"), *UNKEPT)
    session = Session.of(mounted)
    # One request at a time, and slowly: fio writes down what was acknowledged while it goes on, and
    # where it is held up in between, its list of what was under way does not fit its count.
    job = ("--verify=crc32c", f"--ioengine={ioengine}", "--iodepth=1", "--rw=randwrite",
           "--bs=4k", "--size=64m")  # fmt: skip
    trigger = tmp_path / "trigger"
    words = (*job, "--do_verify=0", "--verify_state_save=1", "--rate_iops=1000",
             f"--trigger-file={trigger}", f"--trigger=kill -9 {session.pid}")  # fmt: skip
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(fio, tmp_path, mounted.device, *words)
        # After a time that is fixed it may have written next to nothing yet.
        wait_until(lambda: mounted.info()["io"]["writes"] > 200, "fio writes")
        trigger.touch()
        running.result()
    wait_until(lambda: not (Path("/proc") / str(session.pid) / "exe").exists(), "it is dead")
    assert list(tmp_path.glob("*verify.state")), "fio saved what was acknowledged"
    pools.mount(mounted.pool)
    assert mounts_at(mounted.mountpoint) == 1
    done = fio(
        tmp_path, mounted.device, *job, "--verify_only", "--verify_state_load=1",
        "--verify_fatal=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    io = mounted.info()["io"]
    assert io["writes"] == 0
    assert io["reads"] > 100


def test_a_dead_mount_is_replaced_though_files_of_it_are_open(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    old = os.open(mounted.device, os.O_RDWR)
    try:
        os.pwrite(old, b"acknowledged", 0)
        session.kill()
        pools.mount(mounted.pool)
        with opened(mounted.device, os.O_RDWR) as new:
            assert os.pread(new, 12, 0) == b"acknowledged"
        with pytest.raises(OSError, match=r"Transport endpoint|Software caused"):
            os.pread(old, 1, 0)
    finally:
        with suppress(OSError):
            os.close(old)
    listed = [mount["pid"] for mount in json.loads(pmemfs_ok("list", "--json"))
              if mount["mountpoint"] == str(mounted.mountpoint)]  # fmt: skip
    assert listed == [mounted.pid]
