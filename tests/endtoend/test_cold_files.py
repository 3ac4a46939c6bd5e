"""Mounted files that are compressed when they are cold, or at once: what users and programs see."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import pmemfs as client
from kit.commands import pmemfs, pmemfs_ok
from kit.compressible import PIECE, text
from kit.fs_fsx import Run
from kit.fs_mounts import FsMount, create_fs, mount_fs
from kit.mounts import UNKEPT, Mounted, PoolMaker, each_engine, native_only
from kit.processes import is_running, wait_until
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.errors import PmemfsError
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount, pytest.mark.slow]

DATA = text(20 * PIECE + 5 * 4096 + 777)
COLD_SECONDS = 300
"""Enough for what compresses in the background, to which a busy machine leaves very little."""


def report(path: Path) -> dict[str, object]:
    return dict(json.loads(pmemfs_ok("get", path, "--json")))


def compressed(path: Path) -> int:
    """How many bytes of a file lie compressed."""
    packed = report(path)["packed_bytes"]
    assert isinstance(packed, int)
    return packed


@contextmanager
def rewriting(mountpoint: Path) -> Iterator[threading.Lock]:
    """Meanwhile all files are compressed all the time, whoever writes to them. The lock is held
    while the mount is looked at."""
    has_ended, saved, lock = threading.Event(), 0, threading.Lock()

    def run() -> None:
        nonlocal saved
        while not has_ended.is_set():
            with suppress(OSError, PmemfsError):
                found = mount_at(str(mountpoint))
                with lock:
                    inodes = [path.stat().st_ino for path in mountpoint.iterdir()]
                for inode in inodes if found else ():
                    socket = socket_path(found)
                    call(socket, "transform-set", inode=inode, compression="lz4")
                    done = call(socket, "rewrite", inode=inode)
                    saved += done["before_bytes"] - done["after_bytes"]
            time.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lock
        # On a busy machine all of it may have been broken off so far.
        wait_until(lambda: saved > 0, "something was compressed")
    finally:
        has_ended.set()
        thread.join()


@each_engine
@pytest.mark.parametrize("scheme", ["pmem", "on-demand"])
def test_what_nobody_touches_is_compressed_and_what_is_read_often_is_plain_again(
    pools: PoolMaker, scheme: str
) -> None:
    pool = pools.create("fs0", "64M", "--mode", "fs", "--scheme", scheme)
    mounted = mount_fs(pools, pool, "-o", "cold_seconds=1")
    archive = mounted.mountpoint / "archive"
    archive.mkdir()
    pmemfs_ok("set", archive, "compression=zstd")
    (archive / "file").write_bytes(DATA)
    wait_until(
        lambda: compressed(archive / "file") > 20 * PIECE, "the file is compressed", COLD_SECONDS
    )
    assert (archive / "file").stat().st_blocks * 512 < len(DATA) // 2
    assert (archive / "file").read_bytes() == DATA
    pools.umount(mounted)
    pmemfs_ok("check", pool)
    mounted = mount_fs(pools, pool)
    assert (archive / "file").read_bytes() == DATA
    assert compressed(archive / "file") > 20 * PIECE

    def is_plain() -> bool:
        with open(archive / "file", "rb") as file:
            assert os.pread(file.fileno(), 100, 2 * PIECE) == DATA[2 * PIECE : 2 * PIECE + 100]
        return compressed(archive / "file") <= 20 * PIECE

    wait_until(is_plain, "what is read again and again is plain", COLD_SECONDS)
    assert (archive / "file").read_bytes() == DATA


@each_engine
@pytest.mark.parametrize("scheme", ["pmem", "on-demand", "none"])
def test_rewrite_compresses_at_once_and_makes_plain_again(pools: PoolMaker, scheme: str) -> None:
    pool = pools.create("fs0", "64M", "--mode", "fs", "--scheme", scheme)
    mounted = mount_fs(pools, pool)
    path = mounted.mountpoint / "file"
    path.write_bytes(DATA)
    with open(path, "r+b") as file:
        pmemfs_ok("set", path, "compression=zstd:9")
        assert report(path)["compression"] == "zstd:9"
        assert compressed(path) == 0
        pmemfs_ok("rewrite", path)
        assert compressed(path) > 20 * PIECE
        assert os.pread(file.fileno(), len(DATA), 0) == DATA
        os.pwrite(file.fileno(), b"changed", PIECE)
        assert os.pread(file.fileno(), 7, PIECE) == b"changed"
        os.pwrite(file.fileno(), DATA[PIECE : PIECE + 7], PIECE)
    pmemfs_ok("set", path, "compression=none")
    pmemfs_ok("rewrite", mounted.mountpoint)
    assert compressed(path) == 0
    assert path.read_bytes() == DATA
    pools.umount(mounted)
    pmemfs_ok("check", pool)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_file_that_is_compressed_all_the_time_is_what_was_written_to_it(
    pools: PoolMaker, seed: int
) -> None:
    with FsMount.made(pools, size="64M") as mount:
        with rewriting(mount.directory):
            Run(mount.directory, mount.restart, mount.renew).explore(seed, 600)
        mount.check()


@pytest.mark.usefixtures("engine")
def test_so_is_one_whose_processes_are_killed(pools: PoolMaker) -> None:
    with FsMount.made(pools, size="64M") as mount:
        with rewriting(mount.directory) as lock:

            def restart(how: str) -> None:
                with lock:
                    mount.restart(how)

            Run(mount.directory, restart, mount.renew).explore(5, 200, restarts=0.03)
        mount.check()


def has_ended(pid: int) -> bool:
    return not is_running(pid)


@native_only
@pytest.mark.parametrize("victim", ["daemon", "data plane"])
def test_compressing_goes_on_when_a_process_of_the_mount_is_killed(
    pools: PoolMaker, victim: str
) -> None:
    mounted = mount_fs(pools, create_fs(pools, "fs0", "128M"))
    path = mounted.mountpoint / "file"
    data = text(8 << 20)
    path.write_bytes(data)
    wanted = hashlib.sha256(data).digest()
    with rewriting(mounted.mountpoint):
        for _ in range(4):
            time.sleep(0.2)
            pid = mounted.pid if victim == "daemon" else mounted.data_plane_pid
            os.kill(pid, signal.SIGKILL)
            assert hashlib.sha256(path.read_bytes()).digest() == wanted
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), data[5 * PIECE : 6 * PIECE], 5 * PIECE)
            wait_until(partial(has_ended, pid), "it has ended")
    assert hashlib.sha256(path.read_bytes()).digest() == wanted
    pools.umount(mounted)
    pmemfs_ok("check", mounted.pool)


def packers(mounted: Mounted) -> list[int]:
    """The processes that compress for a daemon."""
    found = []
    children = Path(f"/proc/{mounted.pid}/task/{mounted.pid}/children").read_text().split()
    for pid in map(int, children):
        with suppress(OSError):
            if b"packerd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@native_only
def test_the_process_that_compresses_may_die_and_ends_with_the_mount(pools: PoolMaker) -> None:
    mounted = mount_fs(pools, create_fs(pools, "fs0", "64M"), "-o", "cold_seconds=1", *UNKEPT)
    path = mounted.mountpoint / "file"
    path.touch()
    assert packers(mounted) == []
    pmemfs_ok("set", path, "compression=zstd")
    path.write_bytes(DATA)
    wait_until(lambda: bool(packers(mounted)), "there is such a process", COLD_SECONDS)
    (pid,) = packers(mounted)
    wait_until(lambda: compressed(path) > 0, "something is compressed", COLD_SECONDS)
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert os.getsid(pid) == pid
    autogroup = Path(f"/proc/{pid}/autogroup")
    assert not autogroup.exists() or autogroup.read_text().endswith("nice 19\n")
    os.kill(pid, signal.SIGKILL)
    (mounted.mountpoint / "other").touch()
    pmemfs_ok("set", mounted.mountpoint / "other", "compression=lz4")
    (mounted.mountpoint / "other").write_bytes(DATA)
    wait_until(
        lambda: compressed(mounted.mountpoint / "other") > 0, "another one goes on", COLD_SECONDS
    )
    (other,) = packers(mounted)
    assert other != pid
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(other), "it has ended with its daemon")


@native_only
def test_what_a_program_has_as_an_array_is_not_compressed(pools: PoolMaker) -> None:
    mounted = mount_fs(pools, create_fs(pools, "fs0", "64M"), "-o", "cold_seconds=1")
    path = mounted.mountpoint / "file"
    path.write_bytes(DATA)
    pmemfs_ok("set", path, "compression=zstd")
    with client.connect(mounted.mountpoint) as mount:
        array = mount.map(path, mode="r+")
        for words in (["set", path, "compression=lz4"], ["rewrite", path]):
            refused = pmemfs(*words)
            assert refused.code != 0
            assert f"pid {os.getpid()}" in refused.err
        time.sleep(4)
        assert compressed(path) == 0
        array[PIECE] = 7
        del array
    wait_until(
        lambda: compressed(path) > 20 * PIECE, "it is compressed when it is let go", COLD_SECONDS
    )
    assert path.read_bytes()[PIECE] == 7
    with client.connect(mounted.mountpoint) as mount:
        array = mount.map(path, mode="r")
        assert bytes(array[:PIECE]) == DATA[:PIECE]
        assert compressed(path) == 0


@each_engine
def test_a_damaged_piece_is_an_error_for_its_bytes_alone(pools: PoolMaker) -> None:
    mounted = mount_fs(pools, create_fs(pools, "fs0", "64M"))
    path = mounted.mountpoint / "file"
    path.write_bytes(DATA)
    pmemfs_ok("set", path, "compression=zstd")
    pmemfs_ok("rewrite", path)
    pools.umount(mounted)
    raw = bytearray(mounted.pool.read_bytes())
    at = raw.rindex(b"\x28\xb5\x2f\xfd")
    raw[at + 100] ^= 0xFF
    mounted.pool.write_bytes(raw)
    checked = pmemfs("check", mounted.pool)
    assert checked.code != 0
    assert "piece" in checked.out + checked.err
    mounted = mount_fs(pools, mounted.pool)
    failed = []
    with open(path, "rb") as file:
        for position in range(0, len(DATA), PIECE):
            try:
                found = os.pread(file.fileno(), PIECE, position)
                assert found == DATA[position : position + PIECE]
            except OSError as error:
                failed.append(error.errno)
    assert failed == [errno.EIO]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compression=zst"], "did you mean"),
        (["compressoin=zstd"], "did you mean"),
        (["compression=zstd:40"], "which has 1 to 22"),
        (["compression=lz4:x"], "not a level"),
        (["compression"], "compression=zstd"),
    ],
)
def test_what_can_not_be_set_is_refused_with_a_sentence(
    pools: PoolMaker, words: list[str], said: str
) -> None:
    mounted = mount_fs(pools, create_fs(pools, "fs0", "64M"))
    (mounted.mountpoint / "file").touch()
    refused = pmemfs("set", mounted.mountpoint / "file", *words)
    assert refused.code == 2
    assert said in refused.err
    assert report(mounted.mountpoint / "file")["compression"] == "none"
