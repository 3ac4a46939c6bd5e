"""The file of mode `block` behaves like a device, and the mount like /dev: system call by call."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit.commands import Result, pmemfs, run_command
from kit.mounts import ENGINES, Mounted, PoolMaker, Session, may_pass, pool_maker
from kit.posix import fails_with, opened, read_all
from kit.users import AS_NOBODY, NOBODY
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

BLKGETSIZE64, FS_IOC_GETFLAGS = 0x80081272, 0x80086601


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def mounted(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mount that the tests of this file share: each leaves it as usable as it was."""
    with pool_maker(request.param) as pools:
        yield pools.mount(pools.create(size="32M"))


def as_nobody(*words: object) -> Result:
    return run_command(*AS_NOBODY, *words)


# The end


@pytest.mark.parametrize("flags", [0, os.O_DIRECT, os.O_DSYNC])
def test_a_write_over_the_end_stores_what_fits_and_then_there_is_no_space(
    mounted: Mounted, flags: int
) -> None:
    size = mounted.device.stat().st_size
    buffer = mmap.mmap(-1, 8192)
    buffer.write(b"x" * 8192)
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"before" * 682 + b"four", size - 8192)
    with opened(mounted.device, os.O_RDWR | flags) as fd:
        assert os.pwritev(fd, [buffer], size - 4096) == 4096
        with pytest.raises(OSError, match="No space") as caught:
            os.pwritev(fd, [buffer], size)
        assert caught.value.errno == errno.ENOSPC
    with opened(mounted.device) as fd:
        assert os.pread(fd, 8192, size - 8192) == b"before" * 682 + b"four" + b"x" * 4096


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_a_read_over_the_end_is_short(mounted: Mounted, flags: int) -> None:
    size = mounted.device.stat().st_size
    buffer = mmap.mmap(-1, 8192)
    with opened(mounted.device, os.O_RDONLY | flags) as fd:
        assert os.preadv(fd, [buffer], size - 4096) == 4096
        assert os.preadv(fd, [buffer], size) == 0
        assert os.preadv(fd, [buffer], size + MIB) == 0


def test_truncation_succeeds_and_changes_nothing(mounted: Mounted) -> None:
    size = mounted.device.stat().st_size
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"kept" * 1024, size - 4096)
    truncations: list[Callable[[], object]] = [
        lambda: os.close(os.open(mounted.device, os.O_WRONLY | os.O_TRUNC)),
        lambda: os.truncate(mounted.device, 0),
        lambda: os.truncate(mounted.device, 4095),
        lambda: os.truncate(mounted.device, size * 2),
        lambda: mounted.device.open("wb").close(),
    ]
    for truncate in truncations:
        truncate()
        assert mounted.device.stat().st_size == size
    with opened(mounted.device) as fd:
        os.ftruncate(fd, 1)
        assert os.fstat(fd).st_size == size
        assert os.lseek(fd, 0, os.SEEK_END) == size
        assert os.pread(fd, 4096, size - 4096) == b"kept" * 1024


def test_appending_has_no_space(mounted: Mounted) -> None:
    with opened(mounted.device, os.O_WRONLY | os.O_APPEND) as fd, pytest.raises(OSError) as caught:  # noqa: PT011
        os.write(fd, b"x")
    assert caught.value.errno == errno.ENOSPC


def test_a_private_mapping_reads_the_device(mounted: Mounted) -> None:
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"mapped", 4096)
        with mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
            assert mapping[4096:4102] == b"mapped"


# The directory


def test_the_mount_holds_one_file_named_after_the_pool(mounted: Mounted) -> None:
    assert os.listdir(mounted.mountpoint) == [mounted.pool.name]
    assert stat.S_ISREG(mounted.device.stat().st_mode)
    assert mounted.device.stat().st_size == mounted.info()["pool"]["zones"]["data"]["size_bytes"]
    assert not (mounted.mountpoint / "other").exists()


def test_nothing_can_be_created_renamed_or_removed(mounted: Mounted) -> None:
    root, device, other = mounted.mountpoint, mounted.device, mounted.mountpoint / "other"
    attempts: dict[str, Callable[[], object]] = {
        "create": lambda: os.open(other, os.O_CREAT | os.O_WRONLY),
        "rename": lambda: device.rename(other),
        "unlink": device.unlink,
        "mkdir": other.mkdir,
        "symlink": lambda: other.symlink_to("target"),
        "link": lambda: os.link(device, other),
        "mknod": lambda: os.mknod(other, stat.S_IFREG | 0o600),
        "mkfifo": lambda: os.mkfifo(other),
    }
    for name, attempt in attempts.items():
        with pytest.raises(PermissionError) as caught:
            attempt()
        assert caught.value.errno == errno.EPERM, name
    assert os.listdir(root) == [device.name]


def test_statfs_tells_the_size_and_the_unit(mounted: Mounted) -> None:
    status = os.statvfs(mounted.mountpoint)
    assert status.f_bsize == status.f_frsize == 4096
    assert status.f_blocks * status.f_frsize == mounted.device.stat().st_size
    assert status.f_bfree == status.f_bavail == status.f_ffree == 0
    assert status.f_files == 2
    assert status.f_namemax == 255


# Attributes


def test_owner_mode_and_times_that_were_set_last_as_long_as_the_mount(
    pools: PoolMaker, engine: str
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    before = mounted.device.stat()
    assert (before.st_uid, before.st_gid, stat.S_IMODE(before.st_mode)) == (0, 0, 0o600)
    mounted.device.chmod(0o640)
    os.chown(mounted.device, 12, 34)
    os.utime(mounted.device, ns=(1_000_000_001, 2_000_000_002))
    # The kernel keeps attributes too. It is asked for those of the server, and not made to forget
    # them by drop_caches, because it would forget the files of all other tests as well.
    said = run_command("stat", "--cached=never", "-c", "%u %g %a %X %.9Y", mounted.device)
    assert said.out.split() == ["12", "34", "640", "1", "2.000000002"]
    pools.umount(mounted)
    after = pools.mount(mounted.pool).device.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (0, 0, before.st_mode)


def test_a_write_changes_the_time_of_modification(mounted: Mounted) -> None:
    os.utime(mounted.device, (1, 1))
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x", 0)
        assert os.fstat(fd).st_mtime > 1_000_000
    assert mounted.device.stat().st_mtime > 1_000_000


def test_owner_and_mode_can_be_given_at_mount(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "uid=12,gid=34,mode=644")
    status = mounted.device.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o644)


def test_without_allow_other_nobody_else_gets_in(pools: PoolMaker) -> None:
    may_pass(pools)
    mounted = pools.mount(pools.create(size="16M"), "-o", "mode=666")
    # The mount refuses, and not the way to it.
    assert as_nobody("ls", mounted.mountpoint.parent).code == 0
    for words in (("ls", mounted.mountpoint), ("head", "-c1", mounted.device)):
        refusal = as_nobody(*words)
        assert refusal.code != 0
        assert "Permission denied" in refusal.err


@pytest.mark.parametrize(
    ("options", "may_read", "may_write"),
    [
        ("mode=600", False, False),
        ("mode=644", True, False),
        ("mode=666", True, True),
        (f"mode=600,uid={NOBODY}", True, True),
        (f"mode=440,gid={NOBODY}", True, False),
    ],
)
def test_with_allow_other_the_mode_of_the_file_decides(
    pools: PoolMaker, options: str, may_read: bool, may_write: bool
) -> None:
    may_pass(pools)
    mounted = pools.mount(pools.create(size="16M"), "-o", f"allow_other,{options}")
    assert as_nobody("ls", mounted.mountpoint).code == 0
    assert (as_nobody("head", "-c1", mounted.device).code == 0) is may_read
    written = as_nobody("dd", "if=/dev/zero", f"of={mounted.device}", "bs=4k", "count=1")
    assert (written.code == 0) is may_write
    if not (may_read and may_write):
        assert as_nobody("chmod", "666", mounted.device).code != 0


# Read-only


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "options"),
    [("pmem", ("-o", "ro")), ("on-demand", ("-r",)), ("none", ("-o", "nosuid,ro,noatime"))],
)
def test_a_read_only_mount_gives_the_data_and_changes_no_byte_of_the_pool(
    pools: PoolMaker, scheme: str, options: tuple[str, ...]
) -> None:
    pool = pools.create("pmem0", "16M", "--scheme", scheme)
    writable = pools.mount(pool)
    with opened(writable.device) as fd:
        os.pwrite(fd, b"data" * 1024, MIB)
    pools.umount(writable)
    before = digest(pool)

    mounted = pools.mount(pool, *options)
    with opened(mounted.device, os.O_RDONLY) as fd:
        assert os.pread(fd, 4096, MIB) == b"data" * 1024
        read_all(fd, os.fstat(fd).st_size, 0)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        with pytest.raises(OSError, match="Read-only") as caught:
            os.open(mounted.device, flags)
        assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError, match="Read-only"):
        mounted.device.chmod(0o777)
    assert mounted.info()["read_only"]
    session = Session.of(mounted)
    pools.umount(mounted)
    session.assert_ended()
    assert digest(pool) == before


@pytest.mark.slow
def test_two_read_only_mounts_of_one_pool_serve_side_by_side(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    one, two = pools.mount(pool, "-o", "ro", at="one"), pools.mount(pool, "-o", "ro", at="two")
    assert one.device.read_bytes() == two.device.read_bytes()
    assert pmemfs("mount", pool, pools.mountpoint("three")).code == 32


# Everything else that programs try


def test_locks_work_as_on_any_file(mounted: Mounted) -> None:
    with opened(mounted.device) as one, opened(mounted.device) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("command", [BLKGETSIZE64, FS_IOC_GETFLAGS])
def test_it_has_no_ioctl_of_a_device_or_of_a_file_system(mounted: Mounted, command: int) -> None:
    for path in (mounted.device, mounted.mountpoint):
        with opened(path, os.O_RDONLY) as fd, fails_with(errno.ENOTTY):
            fcntl.ioctl(fd, command, bytes(8))
