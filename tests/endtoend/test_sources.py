"""Sources that aren't tmpfs: a file on disk and a block device, durable by msync; and how a mount
is tuned and announced.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import PoolMaker
from kit.namespaces import nobody_copies_mounts
from kit.processes import wait_until
from kit.sources import loop_device, mounted_tmpfs
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = pytest.mark.mount


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    """A path on a real file system."""
    if run_command("stat", "-f", "-c", "%T", tmp_path).out.strip() == "tmpfs":
        pytest.skip("the temporary directory is in memory here")
    return tmp_path / "pool"


def write_and_sync(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, data, offset)
    os.fsync(fd)
    os.close(fd)


def content(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_ordinary_file_serves_with_a_warning_and_fsync_reaches_it(
    pools: PoolMaker, disk_file: Path, sparse: bool
) -> None:
    created = pmemfs("create", disk_file, "--size", "32M", *(["--sparse"] if sparse else []))
    assert created.code == 0
    assert "ordinary file" in created.err
    mounted = pools.mount(disk_file)
    info = mounted.info()
    assert info["pool"]["durability"] == "msync"
    assert info["pool"]["reserved"] is not sparse
    data = os.urandom(3 * MIB)
    write_and_sync(mounted.device, 5000, data)
    assert mounted.pages()["counts"]["dirty"] == 0
    pools.umount(mounted)
    offset = info["pool"]["zones"]["data"]["offset_bytes"] + 5000
    assert content(disk_file, offset, len(data)) == data


def test_fsync_leaves_nothing_of_a_file_on_disk_dirty_in_the_page_cache(
    pools: PoolMaker, disk_file: Path
) -> None:
    assert pmemfs("create", disk_file, "--size", "32M").code == 0
    mounted = pools.mount(disk_file)
    fd = os.open(mounted.device, os.O_RDWR)
    server = int(mounted.info()["data_plane_pid"])

    def dirty_kib() -> int:
        return mapped_kib(server, disk_file, "Shared_Dirty", "Private_Dirty")

    def is_dirty() -> bool:
        os.pwrite(fd, os.urandom(8 * MIB), 0)
        return dirty_kib() >= 8 * 1024

    # The kernel may write it to the disk at any time, such as for another program's sync(2).
    wait_until(is_dirty, "what was written is dirty")
    os.fsync(fd)
    after_kib = dirty_kib()
    os.close(fd)
    # What may stay is the page structures of these 8 MiB, which nobody needs on the disk.
    assert after_kib <= 1024


def test_a_device_that_loses_writes_fails_every_fsync_and_is_not_called_clean(
    pools: PoolMaker, tmp_path: Path
) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=12M") as small:
        backing = small / "backing"
        with open(backing, "wb") as file:
            file.truncate(64 * MIB)
        with loop_device(backing) as device:
            assert pmemfs("create", device).code == 0
            mounted = pools.mount(Path(device), at="lossy")
            volume = mounted.mountpoint / Path(device).name
            fd = os.open(volume, os.O_RDWR)
            for offset in range(0, 32 * MIB, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
            for _ in range(3):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    os.fsync(fd)
            os.close(fd)
            # The command waits for no daemon that goes on for a copy of the mount.
            with nobody_copies_mounts():
                refused(pmemfs("umount", mounted.mountpoint), 32, "could not leave the pool clean")
            assert mount_at(str(mounted.mountpoint)) is None


def test_a_block_device_serves_and_is_not_touched_while_the_kernel_has_it(
    pools: PoolMaker, disk_file: Path
) -> None:
    disk_file.write_bytes(bytes(64 * MIB))
    with loop_device(disk_file) as device:
        refused(pmemfs("create", device, "--size", "1M"), 2, "is a device of 64MiB")
        created = pmemfs("create", device)
        assert created.code == 0
        assert "not persistent memory" in created.err
        mounted = pools.mount(Path(device), at="block")
        volume = mounted.mountpoint / Path(device).name
        data = os.urandom(MIB)
        write_and_sync(volume, MIB, data)
        assert content(volume, MIB, MIB) == data
        refused(pmemfs("mount", device, pools.mountpoint("again"), "-r"), 32, "in use")
        pools.umount(mounted)

        pmemfs_ok("check", device)
        assert run_command("mkfs.ext4", "-q", "-F", device).code == 0
        kernel_mount = pools.mountpoint("kernel")
        assert run_command("mount", device, kernel_mount).code == 0
        refused(pmemfs("create", device, "--force"), 16, "in use", "mounted")


def test_populate_faults_in_the_whole_data_zone_before_the_mount_answers(pools: PoolMaker) -> None:
    pool = pools.create(size="64M")
    plain = pools.mount(pool, at="plain")
    before = mapped_kib(plain.pid, pool, "Rss")
    pools.umount(plain)
    populated = pools.mount(pool, "-o", "populate,huge_pages", at="populated")
    assert before < 32 * 1024
    assert mapped_kib(populated.pid, pool, "Rss") >= 60 * 1024


def mapped_kib(pid: int, pool: Path, *kinds: str) -> int:
    """The sum of these lines of smaps, for a daemon's mappings of its pool."""
    total = 0
    is_of_pool = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_of_pool = line.endswith(f" {pool}")
        elif is_of_pool and line.split(":")[0] in kinds:
            total += int(line.split()[1])
    return total


def test_systemd_is_told_when_the_mount_answers(pools: PoolMaker, tmp_path: Path) -> None:
    pool, mountpoint = pools.create(size="32M"), pools.mountpoint()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        daemon = subprocess.Popen(
            [BIN / "pmemfs", "mount", "--foreground", pool, mountpoint],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.DEVNULL,
        )
        assert notify.recv(100) == b"READY=1"
        assert os.listdir(mountpoint) == [pool.name]
        daemon.terminate()
        assert daemon.wait(30) == 0
    wait_until(lambda: mount_at(str(mountpoint)) is None, "the mount is gone")
