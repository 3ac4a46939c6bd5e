"""Attributes of files in a mounted file system: times, extended attributes, room."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Engine, Mounted, PoolMaker
from kit.posix import fails_with, next_tick
from kit.processes import wait_until
from kit.users import as_user

pytestmark = pytest.mark.mount

MIB = 1 << 20
SECOND_NS = 10**9
AT_FDCWD = -100
AT_STATX_FORCE_SYNC = 0x2000
STATX_BASIC_STATS = 0x7FF


def times_changed(path: Path, action: Callable[[], object]) -> set[str]:
    """Which times of a file an action changes."""

    def times() -> dict[str, int]:
        status = path.lstat()
        return {"mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}

    before = times()
    next_tick()
    action()
    after = times()
    assert all(after[name] >= before[name] for name in after)
    return {name for name in after if after[name] != before[name]}


def test_each_operation_changes_the_times_that_it_should(root: Path) -> None:
    path, both = root / "file", {"mtime", "ctime"}
    path.write_bytes(b"x" * 10)

    def overwrite() -> None:
        with path.open("r+b", buffering=0) as file:
            file.write(b"y")

    assert times_changed(path, overwrite) == both
    assert times_changed(path, lambda: os.truncate(path, 5)) == both
    assert times_changed(path, lambda: path.chmod(0o600)) == {"ctime"}
    assert times_changed(path, lambda: os.chown(path, 1, 1)) == {"ctime"}
    assert times_changed(path, lambda: (root / "link").hardlink_to(path)) == {"ctime"}
    assert times_changed(path, (root / "link").unlink) == {"ctime"}
    assert times_changed(path, lambda: os.setxattr(path, "user.x", b"y")) == {"ctime"}
    assert times_changed(path, path.read_bytes) == set()
    assert times_changed(root, (root / "new").touch) == both
    assert times_changed(root, (root / "new").unlink) == both
    assert times_changed(root, lambda: os.listdir(root)) == set()


def status_from_the_server(path: Path) -> tuple[int, int]:
    """The link count and the time of the last change, past all that the kernel remembers.

    Source: statx(2), AT_STATX_FORCE_SYNC.
    """
    found = ctypes.create_string_buffer(256)
    call = ctypes.CDLL(None, use_errno=True).statx
    if call(AT_FDCWD, os.fsencode(path), AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, found):
        raise OSError(ctypes.get_errno(), "statx", path)
    (nlink,) = struct.unpack_from("<I", found, 16)
    seconds, nanoseconds = struct.unpack_from("<qI", found, 96)
    return nlink, seconds * SECOND_NS + nanoseconds


@pytest.mark.slow
def test_everybody_sees_a_directory_as_it_is_while_it_changes(root: Path) -> None:
    begun = done = looks = 0
    has_looked = threading.Event()

    def change() -> None:
        nonlocal begun, done
        while done < 300 or not has_looked.is_set():
            begun += 1
            (root / f"d{begun}").mkdir()
            done += 1
            (root / "file").touch()
            (root / "file").rename(root / "other")
            (root / "other").unlink()

    first, last_ns = status_from_the_server(root)
    changing = threading.Thread(target=change)
    changing.start()
    try:
        while changing.is_alive():
            least = done
            nlink, changed_ns = status_from_the_server(root)
            assert least <= nlink - first <= begun
            assert changed_ns >= last_ns
            last_ns = changed_ns
            looks += 1
            if looks > 10:
                has_looked.set()
    finally:
        has_looked.set()
        changing.join()
    assert status_from_the_server(root)[0] == first + done
    assert done >= 300
    assert looks > 10


def test_times_are_kept_to_the_nanosecond(root: Path) -> None:
    path = root / "file"
    path.touch()
    for atime, mtime in ((1, 2), (1_234_567_890_123_456_789, 987_654_321), (0, 0),
                         (-1, -1_500_000_000), (2**33 * SECOND_NS + 1, 5)):  # fmt: skip
        os.utime(path, ns=(atime, mtime))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (atime, mtime)
    before = time.time_ns()
    os.utime(path)
    assert abs(path.stat().st_mtime_ns - before) < 60 * SECOND_NS
    link = root / "link"
    link.symlink_to(path)
    os.utime(link, ns=(5, 6), follow_symlinks=False)
    assert (link.lstat().st_atime_ns, link.lstat().st_mtime_ns) == (5, 6)


def test_reading_a_file_that_has_changed_is_noted(root: Path) -> None:
    path = root / "file"
    path.write_bytes(b"to be read")
    os.utime(path, ns=(SECOND_NS, 2 * SECOND_NS))
    # In one tick, nobody can tell whether it was read after it had changed.
    next_tick()
    path.read_bytes()
    assert path.stat().st_atime_ns > 2 * SECOND_NS
    noted = path.stat().st_atime_ns
    path.read_bytes()
    assert path.stat().st_atime_ns == noted, "once is enough, as relatime has it"


def test_a_user_may_read_without_a_trace(root: Path) -> None:
    path = root / "file"
    path.write_bytes(b"to be read")
    os.utime(path, ns=(SECOND_NS, 2 * SECOND_NS))
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.read(fd, 10)
    os.close(fd)
    assert path.stat().st_atime_ns == SECOND_NS


def test_the_time_of_birth_is_known_and_stays(native_root: Path) -> None:
    before = time.time()
    path = native_root / "file"
    path.touch()

    def birth() -> float:
        done = run_command("stat", "--format=%.9W", path)
        assert done.code == 0, done.err
        return float(done.out)

    first = birth()
    assert before - 1 <= first <= time.time() + 1
    os.utime(path, (1, 1))
    path.chmod(0o700)
    path.rename(native_root / "moved")
    path = native_root / "moved"
    assert birth() == first


# Extended attributes


def test_extended_attributes_are_set_listed_and_removed(root: Path) -> None:
    for path in (root / "file", root / "directory"):
        path.mkdir() if path.name == "directory" else path.touch()
        assert os.listxattr(path) == []
        values = {"user.empty": b"", "user.binary": bytes(range(256)), "trusted.t": b"t",
                  "security.other": b"s", "user." + "n" * 250: b"long name"}  # fmt: skip
        for name, value in values.items():
            os.setxattr(path, name, value)
        assert set(os.listxattr(path)) == set(values)
        assert {name: os.getxattr(path, name) for name in values} == values
        os.setxattr(path, "user.empty", b"not any more")
        assert os.getxattr(path, "user.empty") == b"not any more"
        for name in values:
            os.removexattr(path, name)
        assert os.listxattr(path) == []


def test_creating_and_replacing_an_attribute_mean_it(root: Path) -> None:
    path = root / "file"
    path.touch()
    with fails_with(errno.ENODATA):
        os.getxattr(path, "user.x")
    with fails_with(errno.ENODATA):
        os.removexattr(path, "user.x")
    with fails_with(errno.ENODATA):
        os.setxattr(path, "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
    with fails_with(errno.EEXIST):
        os.setxattr(path, "user.x", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.x", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.x") == b"3"


def test_to_create_and_replace_at_once_means_what_it_means_elsewhere(
    root: Path, file_system: tuple[Engine, Mounted], tmp_path: Path
) -> None:
    engine, _ = file_system
    both = os.XATTR_CREATE | os.XATTR_REPLACE
    found = []
    for directory in (root, tmp_path):
        path = directory / "file"
        path.touch()
        os.setxattr(path, "user.there", b"1")
        errors = []
        for name in ("user.there", "user.missing"):
            try:
                os.setxattr(path, name, b"2", both)
            except OSError as error:
                errors.append(error.errno)
            else:
                errors.append(0)
        found.append(errors)
    ours, theirs = found
    assert theirs == [errno.EEXIST, errno.ENODATA]
    # pyfuse3 asks whether the attribute is there, and says nothing of the flags.
    assert ours == (theirs if engine.name == "native" else [errno.EEXIST, 0])


def test_attributes_of_no_known_kind_are_refused(root: Path) -> None:
    path = root / "file"
    path.touch()
    for name in ("other.x", "system.x", "user", "x"):
        with fails_with(errno.EOPNOTSUPP):
            os.setxattr(path, name, b"x")


def test_values_up_to_the_kernels_limit(root: Path) -> None:
    path = root / "file"
    path.touch()
    largest = os.urandom(65536)
    try:
        os.setxattr(path, "user.large", largest)
    except OSError as error:
        assert error.errno in (errno.E2BIG, errno.ENOSPC)  # noqa: PT017
        largest = largest[:4096]
        os.setxattr(path, "user.large", largest)
    assert os.getxattr(path, "user.large") == largest


def test_an_ordinary_user_does_not_see_trusted_attributes(root: Path) -> None:
    path = root / "file"
    path.touch(0o666)
    os.setxattr(path, "trusted.x", b"1")
    os.setxattr(path, "user.x", b"1")
    assert as_user(lambda: os.listxattr(path)) == ["user.x"]
    with fails_with(errno.ENODATA):
        as_user(lambda: os.getxattr(path, "trusted.x"))


# Room


@pytest.mark.usefixtures("engine")
def test_room_is_counted_as_it_is_used(pools: PoolMaker) -> None:
    # A mount of its own: what another test has removed would come back while this one counts.
    mountpoint = pools.mount(pools.create("files", "256M", "--mode", "fs")).mountpoint
    before = os.statvfs(mountpoint)
    assert before.f_bsize == before.f_frsize == 4096
    assert before.f_namemax == 255
    assert 200 * MIB < before.f_blocks * 4096 < 256 * MIB
    path = mountpoint / "file"
    path.write_bytes(bytes(10 * MIB))

    def used_bytes() -> int:
        return (before.f_bfree - os.statvfs(mountpoint).f_bfree) * 4096

    # What was mapped ahead goes back when the file is released, for which close(2) does not wait.
    wait_until(lambda: used_bytes() < 11 * MIB, "what was not needed is free")
    assert used_bytes() >= 10 * MIB
    assert 10 * MIB <= path.stat().st_blocks * 512 < 11 * MIB
    done = subprocess.run(["du", "-s", "--block-size=1M", path], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.split()[0] in ("10", "11")
    path.unlink()
    wait_until(lambda: used_bytes() <= 16 * 4096, "its room comes back")


def test_df_shows_the_mount(file_system: tuple[Engine, Mounted]) -> None:
    done = run_command("df", "--output=size,used,avail,target", "-k", file_system[1].mountpoint)
    assert done.code == 0, done.err
    size, used, available, target = done.out.splitlines()[1].split()
    assert int(used) + int(available) <= int(size)
    assert target == str(file_system[1].mountpoint)


@pytest.mark.usefixtures("engine")
def test_a_full_file_system_says_so_and_works_again_once_there_is_room(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("small", "24M", "--mode", "fs"))
    path = mounted.mountpoint / "file"
    written = 0
    with path.open("wb", buffering=0) as file, fails_with(errno.ENOSPC):
        while True:
            written += file.write(bytes(MIB))
    assert written >= 8 * MIB
    assert path.stat().st_size == written
    path.unlink()

    def is_written() -> bool:
        try:
            path.write_bytes(b"y" * (4 * MIB))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            return False
        return True

    wait_until(is_written, "there is room again")
    assert path.read_bytes() == b"y" * (4 * MIB)


@pytest.mark.parametrize("command", [0x5401, 0x80081272], ids=["TCGETS", "BLKGETSIZE64"])
def test_an_ioctl_of_another_kind_of_file_is_refused(root: Path, command: int) -> None:
    (root / "file").touch()
    for path in (root, root / "file"):
        fd = os.open(path, os.O_RDONLY)
        try:
            with fails_with(errno.ENOTTY):
                fcntl.ioctl(fd, command, bytes(64))
        finally:
            os.close(fd)
