"""A file system from its making to its end: created, mounted, killed, looked at, mounted again."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import Engine, PoolMaker, Session, native_only
from kit.posix import fails_with, names, opened, pattern
from kit.processes import wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """All that is below a directory, as far as it outlasts a mount."""
    found = {}
    for directory, _, files in os.walk(top):
        for name in (".", *files):
            path = Path(directory) / name
            status = path.lstat()
            content = path.readlink() if path.is_symlink() else (
                path.read_bytes() if path.is_file() else None)  # fmt: skip
            found[str(path.relative_to(top))] = (
                status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size,
                status.st_mtime_ns, status.st_ctime_ns, status.st_ino, content,
                {x: os.getxattr(path, x, follow_symlinks=False)
                 for x in os.listxattr(path, follow_symlinks=False)},
            )  # fmt: skip
    return found


def populate(top: Path) -> None:
    (top / "a" / "b" / "c").mkdir(parents=True)
    (top / "a" / "small").write_bytes(b"small")
    (top / "a" / "b" / "large").write_bytes(pattern(3 * MIB + 17))
    (top / "link").symlink_to("a/small")
    (top / "a" / "b" / "hard").hardlink_to(top / "a" / "small")
    os.setxattr(top / "a", "user.note", b"kept")
    os.setxattr(top / "a" / "b" / "large", "user.large", os.urandom(3000))
    for number in range(200):
        (top / "a" / "b" / "c" / f"file {number}").write_bytes(pattern(number * 31))
    for number in range(0, 200, 3):
        (top / "a" / "b" / "c" / f"file {number}").unlink()
    os.chown(top / "a" / "small", 12, 34)
    os.utime(top / "a", ns=(123, 456))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    "scheme", [pytest.param("pmem", marks=pytest.mark.quick), "on-demand", "none"]
)
def test_everything_is_there_after_remounting(pools: PoolMaker, scheme: str) -> None:
    pool = pools.create("files", "64M", "--mode", "fs", "--scheme", scheme)
    mounted = pools.mount(pool)
    populate(mounted.mountpoint)
    before = tree(mounted.mountpoint)
    assert len(before) > 100
    pools.umount(mounted)
    assert json.loads(pmemfs_ok("info", pool, "--json"))["pool"]["state"] == "clean"
    again = pools.mount(pool)
    assert tree(again.mountpoint) == before
    pools.umount(again)


@pytest.mark.quick
def test_an_engine_reads_what_another_wrote(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    before = None
    for name in ("native", "python", "native"):
        pools.engine = Engine(name)
        mounted = pools.mount(pool)
        if before is None:
            populate(mounted.mountpoint)
            before = tree(mounted.mountpoint)
        assert tree(mounted.mountpoint) == before
        pools.umount(mounted)


@pytest.mark.usefixtures("engine")
def test_a_read_only_mount_shows_everything_and_changes_nothing(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool)
    populate(mounted.mountpoint)
    before = tree(mounted.mountpoint)
    pools.umount(mounted)
    image = pool.read_bytes()
    top = pools.mount(pool, "-o", "ro").mountpoint
    assert tree(top) == before
    for attempt in (
        (top / "new").touch, (top / "new").mkdir, (top / "link").unlink,
        lambda: (top / "link").rename(top / "x"), lambda: (top / "a").chmod(0),
        lambda: os.setxattr(top / "a", "user.x", b""), lambda: os.truncate(top / "a/small", 0),
        lambda: (top / "a/small").open("r+b"), lambda: os.utime(top / "a"),
    ):  # fmt: skip
        with fails_with(errno.EROFS):
            attempt()
    assert run_command("umount", top).code == 0
    assert pool.read_bytes() == image


@pytest.mark.usefixtures("engine")
def test_cached_files_are_the_same_files(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool, "-o", "cached")
    assert "cached" in mounted.info()["options"].split(",")
    populate(mounted.mountpoint)
    path = mounted.mountpoint / "a" / "b" / "large"
    expected = bytearray(pattern(3 * MIB + 17))
    chance = random.Random(1)
    with path.open("r+b", buffering=0) as file:
        for _ in range(200):
            offset, length = chance.randrange(len(expected)), int(100_000 ** chance.random())
            if chance.random() < 0.5:
                data = chance.randbytes(min(length, len(expected) - offset))
                os.pwrite(file.fileno(), data, offset)
                expected[offset : offset + len(data)] = data
            else:
                assert os.pread(file.fileno(), length, offset) == expected[offset : offset + length]
        with path.open("rb", buffering=0) as reader:
            os.ftruncate(file.fileno(), 1000)
            assert reader.read() == expected[:1000]
            os.pwrite(file.fileno(), b"more", 5000)
            assert os.pread(reader.fileno(), 10_000, 0) == (expected[:1000] + bytes(4000) + b"more")
    before = tree(mounted.mountpoint)
    pools.umount(mounted)
    assert tree(pools.mount(pool).mountpoint) == before


@pytest.mark.usefixtures("engine")
def test_cached_reads_come_back_without_asking(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"), "-o", "cached")
    path = mounted.mountpoint / "file"
    path.write_bytes(pattern(MIB))
    # Else the kernel may forget the file, and with it the pages, when it wants memory back.
    with opened(path, os.O_PATH):
        assert path.read_bytes() == pattern(MIB)
        # A worker counts a request after it has answered it.
        wait_until(lambda: mounted.info()["io"]["read_bytes"] >= MIB, "the first read was counted")
        before = mounted.info()["io"]["reads"]
        for _ in range(5):
            assert path.read_bytes() == pattern(MIB)
        assert mounted.info()["io"]["reads"] == before


# Crashes


def work(
    top: Path, answered: dict[str, bytes], under_way: set[str], done: list[str], seed: int
) -> None:
    """Make, replace and remove files until the mount ends; note what was answered."""
    chance = random.Random(seed)
    try:
        while True:
            name = f"{seed % 10}-{chance.randrange(20)}"
            under_way.add(name)
            data = chance.randbytes(int(200_000 ** chance.random()))
            if name in answered and chance.random() < 0.3:
                (top / name).unlink()
                del answered[name]
            else:
                (top / f".{name}").write_bytes(data)
                (top / f".{name}").rename(top / name)
                answered[name] = data
            under_way.discard(name)
            done.append(name)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO,
                               errno.ECANCELED):  # fmt: skip
            raise


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_after_kill_everything_that_was_answered_is_there(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    expected: dict[str, bytes] = {}
    for round_number in range(5):
        mounted = pools.mount(pool)
        session = Session.of(mounted)
        top = mounted.mountpoint
        assert {name: (top / name).read_bytes() for name in names(top)} == expected
        answered = dict(expected)
        under_way: set[str] = set()
        done: list[str] = []

        threads = [
            threading.Thread(
                target=work,
                args=(top, answered, under_way, done, round_number * 10 + n),
                daemon=True,
            )
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda done=done: len(done) > 20, "some files were made in this round")
        session.kill()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert session.pool_state() == "dirty"
        # Before it's mounted again, the test mounts it itself and clears what was under way.
        again = pools.mount(pool)
        there = {name: (again.mountpoint / name).read_bytes() for name in names(again.mountpoint)}
        for name, data in answered.items():
            if name not in under_way:
                assert there.get(name) == data, name
        for name in there:
            if name in under_way or name.startswith("."):
                (again.mountpoint / name).unlink()
            else:
                assert name in answered
        expected = {name: data for name, data in answered.items() if name not in under_way}
        pools.umount(again)


@native_only
def test_what_the_data_plane_appended_survives_its_end(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool)
    session = Session.of(mounted)
    path = mounted.mountpoint / "log"
    data = b""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in range(500):
        part = pattern(1000 + number, number)
        assert os.write(fd, part) == len(part)
        data += part
    operations = json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))["operations"]
    assert operations["write"]["native"] > 400
    session.kill()
    os.close(fd)
    again = pools.mount(pool)
    assert (again.mountpoint / "log").read_bytes() == data


@pytest.mark.usefixtures("engine")
def test_an_unlinked_open_file_is_gone_after_a_crash_and_its_room_back(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool)
    session = Session.of(mounted)
    free = os.statvfs(mounted.mountpoint).f_bfree
    file = (mounted.mountpoint / "file").open("wb", buffering=0)
    file.write(bytes(16 * MIB))
    (mounted.mountpoint / "file").unlink()
    session.kill()
    with suppress(OSError):
        file.close()
    again = pools.mount(pool)
    assert names(again.mountpoint) == set()
    wait_until(
        lambda: os.statvfs(again.mountpoint).f_bfree >= free - 64, "its room comes back"
    )  # fmt: skip


# What a user is told


def test_create_says_what_it_made(pools: PoolMaker) -> None:
    path = pools.directory / "pool"
    said = pmemfs_ok("create", path, "--size", "64M", "--mode", "fs")
    assert "a file system" in said
    info = json.loads(pmemfs_ok("info", path, "--json"))
    assert info["pool"]["mode"] == "fs"
    said = pmemfs_ok("create", path, "--mode", "block", "--force")
    assert "a block device" in said


def test_a_pool_too_small_for_a_file_system_is_refused_and_nothing_is_left(
    pools: PoolMaker,
) -> None:
    path = pools.directory / "tiny"
    result = pmemfs("create", path, "--size", "32K", "--mode", "fs", "--align", "4K",
                    "--scheme", "none")  # fmt: skip
    if result.code:
        assert "Traceback" not in result.err
        assert not path.exists()


def test_a_damaged_file_system_is_refused_with_a_sentence(pools: PoolMaker) -> None:
    path = pools.create("files", "64M", "--mode", "fs")
    zone = json.loads(pmemfs_ok("info", path, "--json"))["pool"]["zones"]["data"]
    with path.open("r+b") as file:
        file.seek(zone["offset_bytes"] + 2 * 4096)
        file.write(b"\xff" * 64)
    result = pmemfs("mount", path, pools.mountpoint())
    refused(result, 32, "damaged")


@pytest.mark.usefixtures("engine")
def test_info_and_stat_count_in_mode_fs(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    path = mounted.mountpoint / "file"
    with path.open("w+b", buffering=0) as file:
        for _ in range(4):
            file.write(bytes(100_000))
        os.fsync(file.fileno())
        os.fsync(file.fileno())
        file.seek(0)
        while file.read(100_000):
            pass
    wanted = {"writes": 4, "written_bytes": 400_000, "read_bytes": 400_000, "fsyncs": 2}
    # A worker counts a request after it has answered it.
    wait_until(lambda: mounted.info()["io"].items() >= wanted.items(), f"it says {wanted}")
    status = mounted.info()
    assert status["space"]["total_frames"] > status["space"]["free_frames"] > 0
    shown = pmemfs_ok("info", mounted.mountpoint)
    assert "free " in shown
    assert "of it in one piece" in shown
    assert "write" in pmemfs_ok("stat", mounted.mountpoint)


@pytest.mark.usefixtures("engine")
def test_extents_shows_where_a_file_is(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool)
    path = mounted.mountpoint / "file"
    data = pattern(5 * MIB)
    with path.open("wb", buffering=0) as file:
        file.write(data[:MIB])
        os.ftruncate(file.fileno(), 8 * MIB)
        os.pwrite(file.fileno(), data[MIB : 5 * MIB], 4 * MIB)
    report = json.loads(pmemfs_ok("extents", path, "--json"))
    assert report["inode"] == path.stat().st_ino
    assert report["size_bytes"] == 8 * MIB
    expected = path.read_bytes()
    covered = 0
    with pool.open("rb") as raw:
        for extent in report["extents"]:
            raw.seek(extent["pfn"] * 4096)
            start = extent["offset_bytes"]
            length = min(extent["length_bytes"], 8 * MIB - start)
            assert raw.read(length) == expected[start : start + length]
            covered += length
            numbers = (start, extent["pfn"] * 4096, extent["length_bytes"])
            assert extent["is_aligned"] == all(number % (2 * MIB) == 0 for number in numbers)
    assert covered >= 5 * MIB
    shown = pmemfs_ok("extents", path)
    assert shown.splitlines()[0].split() == ["OFFSET", "PFN", "LENGTH", "SIZE", "ALIGNED"]
    (mounted.mountpoint / "empty").touch()
    assert "0 extents" in pmemfs_ok("extents", mounted.mountpoint / "empty")


def test_extents_says_why_it_has_nothing_to_show(pools: PoolMaker, tmp_path: Path) -> None:
    files = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    device = pools.mount(pools.create("device", "16M"))
    (tmp_path / "elsewhere").touch()
    refused(pmemfs("extents", tmp_path / "elsewhere"), 1, "not in a pmemfs mount")
    refused(pmemfs("extents", tmp_path / "missing"), 1, "no such file")
    refused(pmemfs("extents", files.mountpoint), 1, "not a regular file")
    refused(pmemfs("extents", device.device), 1, "a device, not files")


def test_two_file_systems_at_once_do_not_know_each_other(pools: PoolMaker) -> None:
    first = pools.mount(pools.create("first", "32M", "--mode", "fs"))
    second = pools.mount(pools.create("second", "32M", "--mode", "fs"))
    (first.mountpoint / "file").write_bytes(b"first")
    (second.mountpoint / "file").write_bytes(b"second")
    assert (first.mountpoint / "file").read_bytes() == b"first"
    with fails_with(errno.EXDEV):
        (first.mountpoint / "file").rename(second.mountpoint / "moved")
