"""`pmemfs resize`: pools that grow while they are used, and right after whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import BIN, fio, pmemfs, pmemfs_ok, refused, resize, run_command
from kit.device_oracle import Oracle
from kit.ext4 import assert_sound
from kit.mounts import PoolMaker, Session
from kit.posix import opened
from kit.processes import is_running, wait_until
from kit.sources import loop_device, mounted_tmpfs
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

KINDS = [
    (),
    ("--sparse",),
    ("--scheme", "on-demand"),
    ("--scheme", "none", "--sparse"),
    ("--page-size", "2M"),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "".join(kind) or "plain")


def is_zero(path: Path, start: int) -> bool:
    """Whether nothing but zeroes is from an offset to the end."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while data := file.read(MIB):
            if data != bytes(len(data)):
                return False
    return True


@pytest.mark.parametrize("kind", [(), ("--sparse",), ("--page-size", "2M")])
def test_fio_verifies_what_it_writes_while_the_pool_grows(
    pools: PoolMaker, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("pmem0", "48M", *kind))
    command = ["fio", "--name=v", f"--filename={mounted.device}", "--direct=1", "--rw=randrw",
               "--bs=4k", "--size=32m", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c",
               "--verify_fatal=1", "--verify_backlog=200", "--time_based", "--runtime=300",
               # Else a pass begins while requests of the last one are under way at its blocks.
               "--serialize_overlap=1"]  # fmt: skip
    sizes = [mounted.device.stat().st_size]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    def served_more() -> None:
        so_far = mounted.info()["io"]["writes"]
        wait_until(lambda: mounted.info()["io"]["writes"] > so_far, "fio goes on")

    try:
        for size in ("50M", "52M", "110M"):
            served_more()
            resize(mounted.mountpoint, size)
            sizes.append(mounted.device.stat().st_size)
            assert is_zero(mounted.device, sizes[-2])
        served_more()
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert "err= 0" in said, said
    assert sizes == sorted(set(sizes))
    done = fio(tmp_path, mounted.device, "--rw=write", "--bs=64k", "--size=96m",
               "--verify=crc32c", "--verify_fatal=1")  # fmt: skip
    assert done.code == 0, done.err
    assert mounted.info()["pool"]["size_bytes"] == 110 * MIB
    pools.umount(mounted)
    assert "no errors" in pmemfs_ok("check", mounted.pool)
    assert pools.mount(mounted.pool).device.stat().st_size == sizes[-1]


@kinds
def test_random_io_on_all_of_a_device_that_grows_reads_as_a_file_would(
    pools: PoolMaker, kind: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", *kind))
    oracle = Oracle(mounted.device, 7)
    with opened(mounted.device) as held:
        for size in (17, 24, 25, 60):
            oracle.exercise(100)
            resize(mounted.mountpoint, f"{size}M")
            # Through a descriptor of before, and at once.
            grown = os.fstat(held).st_size
            assert grown > oracle.size_bytes
            assert os.pread(held, 8192, oracle.size_bytes) == bytes(
                min(8192, grown - oracle.size_bytes)
            )
            assert os.pwrite(held, b"end", grown - 3) == 3
            oracle.expected += bytes(grown - oracle.size_bytes - 3) + b"end"
            oracle.size_bytes = grown
            oracle.compare()
    oracle.exercise(100)
    pools.umount(mounted)
    pools.mount(mounted.pool)
    oracle.compare()


@pytest.mark.parametrize("kind", [(), ("--sparse",), ("--scheme", "on-demand")])
def test_what_was_counted_of_a_page_is_kept(pools: PoolMaker, kind: tuple[str, ...]) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", *kind))
    with opened(mounted.device) as fd:
        for _ in range(9):
            os.pwrite(fd, b"x" * 4096, 5 * MIB)
        os.pread(fd, 4096, 0)
        os.pwrite(fd, b"x", mounted.device.stat().st_size - 1)
    mounted.wait_until_idle()
    before = mounted.pages()
    for size in ("16400K", "17M", "200M"):
        resize(mounted.mountpoint, size)
        after = mounted.pages()
        assert after["hottest"] == before["hottest"]
        counts = after["counts"]
        assert counts.pop("total") > before["counts"]["total"]
        assert counts["dirty"] == before["counts"]["dirty"]
        assert counts["referenced"] == before["counts"]["referenced"] >= 2
    assert after["hottest"][0]["writes"] == 9


def test_kill_9_right_after_leaves_the_larger_pool_with_all_that_was_written(
    pools: PoolMaker,
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    content = b""
    for size in (17, 40, 41):
        mounted.device.write_bytes(content + b"x" * MIB)
        content += b"x" * MIB
        resize(mounted.mountpoint, f"{size}M")
        Session.of(mounted).kill()
        mounted = pools.mount(mounted.pool)
        assert mounted.info()["pool"]["size_bytes"] == size * MIB
        assert mounted.info()["pool"]["damaged_labels"] == []
        with mounted.device.open("rb") as file:
            assert file.read(len(content)) == content
        assert is_zero(mounted.device, len(content))


def test_kill_9_in_the_middle_leaves_one_size_or_the_other_and_growing_works_again(
    pools: PoolMaker,
) -> None:
    pool = pools.create(size="64M")
    mounted = pools.mount(pool)
    data = random.Random(3).randbytes(48 * MIB)
    with opened(mounted.device) as fd:
        for offset in range(0, len(data), MIB):
            os.pwrite(fd, data[offset : offset + MIB], offset)
    size, chance = 64, random.Random(11)
    for _ in range(4):
        session = Session.of(mounted)
        asked = subprocess.Popen(
            [BIN / "pmemfs", "resize", mounted.mountpoint, "--size", f"{size + 65}M"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while is_running(asked.pid) and pool.stat().st_size == size * MIB:
            pass
        time.sleep(chance.choice((0, 0.001, 0.005, 0.02)))
        session.kill()
        asked.wait(timeout=30)
        mounted = pools.mount(pool)
        found = mounted.info()["pool"]["size_bytes"] // MIB
        assert found in (size, size + 65)
        with mounted.device.open("rb") as file:
            assert file.read(len(data)) == data
        assert is_zero(mounted.device, len(data))
        size += 65
        resize(mounted.mountpoint, f"{size}M")
    pools.umount(mounted)
    assert "no errors" in pmemfs_ok("check", pool)


def test_a_loop_device_and_ext4_on_it_grow_with_the_pool(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "64M"))
    inside = pools.mountpoint("ext4")
    with loop_device(mounted.device) as loop:
        assert run_command("mkfs.ext4", "-q", loop).code == 0
        for size in ("96M", "300M"):
            assert run_command("mount", loop, inside).code == 0
            try:
                (inside / size).write_bytes(b"before" * 100_000)
                resize(mounted.mountpoint, size)
                assert run_command("losetup", "--set-capacity", loop).code == 0
                with opened(loop, os.O_RDONLY) as fd:
                    assert os.lseek(fd, 0, os.SEEK_END) == mounted.device.stat().st_size
            finally:
                assert run_command("umount", inside).code == 0
            assert_sound(loop, "-p")
            assert run_command("resize2fs", loop).code == 0
        assert run_command("mount", loop, inside).code == 0
        try:
            (inside / "large").write_bytes(b"after!" * 30_000_000)
            assert (inside / "96M").read_bytes() == b"before" * 100_000
        finally:
            assert run_command("umount", inside).code == 0
        assert_sound(loop)


def test_the_pool_on_a_device_takes_what_the_device_has_grown_by(
    pools: PoolMaker, tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(b"\xa5" * 32 * MIB)
    attached = run_command("losetup", "--find", "--show", backing)
    if attached.code:
        pytest.skip("no loop device here")
    device = Path(attached.out.strip())
    mounted = None
    try:
        pmemfs_ok("create", device, "--name", device.name, "--force")
        mounted = pools.mount(device)
        oracle = Oracle(mounted.device, 5)
        oracle.exercise(50)
        assert "nothing to do" in pmemfs_ok("resize", device)
        with backing.open("ab") as file:
            file.write(b"\xa5" * 32 * MIB)
        assert run_command("losetup", "--set-capacity", device).code == 0
        refused(pmemfs("resize", device, "--size", "80M"), 2, "is a device of 64MiB")
        pmemfs_ok("resize", device)
        assert is_zero(mounted.device, oracle.size_bytes)
        oracle = Oracle(mounted.device, 6)
        assert oracle.size_bytes > 60 * MIB
        oracle.exercise(50)
        oracle.compare()
        pools.umount(mounted)
        mounted = None
        assert "no errors" in pmemfs_ok("check", device)
    finally:
        if mounted:
            run_command("umount", "--lazy", mounted.mountpoint)
        run_command("losetup", "--detach", device)


def test_without_room_the_mount_goes_on_and_the_file_has_its_old_size(pools: PoolMaker) -> None:
    with mounted_tmpfs(pools.directory / "small", "size=40M") as directory:
        pool = directory / "pmem0"
        pmemfs_ok("create", pool, "--size", "16M")
        mounted = pools.mount(pool)
        mounted.device.write_bytes(b"kept")
        refused(pmemfs("resize", mounted.mountpoint, "--size", "1G"), 1, "no room for 1GiB")
        assert pool.stat().st_size == 16 * MIB
        assert resize(pool, "32M") == (16 * MIB, 32 * MIB)
        with mounted.device.open("rb") as file:
            assert file.read(5) == b"kept\0"
        pools.umount(mounted)


def test_what_is_refused_and_what_is_nothing_to_do(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    mounted = pools.mount(pool)
    for target in (pool, mounted.mountpoint):
        refused(pmemfs("resize", target, "--size", "8M"), 3, "8MiB would be lost", "only grow")
        refused(pmemfs("resize", target), 2, "new size with --size")
        refused(pmemfs("resize", target, "--size", "many"), 2, "is not a size")
        said = pmemfs_ok("resize", target, "--size", "16M")
        assert said == "pool 'pmem0' has 16MiB already: nothing to do\n"
    said = pmemfs_ok("resize", pool, "--size", "20M")
    assert said == "pool 'pmem0' has 20MiB now, and had 16MiB\n"
    pools.umount(mounted)
    refused(pmemfs("resize", mounted.mountpoint, "--size", "1G"), 1, "is not a pmemfs mount")
    mounted = pools.mount(pool, "-o", "ro")
    refused(pmemfs("resize", pool, "--size", "24M"), 1, "mounted read-only")
    pools.umount(mounted)
    assert pool.stat().st_size == 20 * MIB
    with opened(pool) as fd, opened(pool):
        os.truncate(fd, 24 * MIB)
    # Somebody has made the file larger: all of it is taken.
    assert "24MiB now" in pmemfs_ok("resize", pool)


@pytest.mark.parametrize("kind", [(), ("--sparse", "--scheme", "on-demand")])
def test_a_file_system_grows_while_files_are_written(
    pools: PoolMaker, kind: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("files", "32M", "--mode", "fs", *kind))
    contents = {}
    for size in (32, 33, 64, 200, 400):
        resize(mounted.mountpoint, f"{size}M")
        name = mounted.mountpoint / f"file-{size}"
        contents[name] = random.Random(size).randbytes(size * MIB // 4)
        name.write_bytes(contents[name])
        status = os.statvfs(mounted.mountpoint)
        assert status.f_blocks * status.f_frsize > size * MIB * 9 // 10
    assert all(name.read_bytes() == content for name, content in contents.items())
    with (mounted.mountpoint / "rest").open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(MIB))
    assert (mounted.mountpoint / "rest").stat().st_size > 180 * MIB
    pools.umount(mounted)
    assert "no errors" in pmemfs_ok("check", mounted.pool)
    resize(mounted.pool, "500M")
    mounted = pools.mount(mounted.pool)
    (mounted.mountpoint / "more").write_bytes(bytes(80 * MIB))
    assert all(name.read_bytes() == content for name, content in contents.items())
    pools.umount(mounted)
    assert "no errors" in pmemfs_ok("check", mounted.pool)
