"""Options of mount(8), by what comes of them: flags in mountinfo, what happens, or a sentence."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from kit.commands import BIN, Result, pmemfs, pmemfs_here, pmemfs_ok, refused, run_command
from kit.mounts import Engine, Mounted, PoolMaker, mounts_at
from kit.namespaces import Run
from kit.posix import opened
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="not root")]

FUSE = {"nosuid", "nodev"}
"""What a mount of FUSE has unless somebody asks for other flags."""
KEPT = {"nosuid", "nodev", "noexec", "noatime", "relatime", "nodiratime", "nosymfollow", "ro",
        "sync", "dirsync", "lazytime", "mand"}  # fmt: skip
"""Flags that mountinfo may show."""

FLAGS: list[tuple[str, set[str]]] = [
    ("", {"relatime"}),
    ("defaults", {"relatime"}),
    ("noexec", {"noexec", "relatime"}),
    ("noexec,exec", {"relatime"}),
    ("noatime", {"noatime"}),
    ("noatime,relatime", {"relatime"}),
    ("strictatime", set()),
    ("strictatime,noatime", {"noatime"}),
    ("strictatime,nostrictatime", {"relatime"}),
    ("nodiratime", {"nodiratime", "relatime"}),
    ("nodiratime,diratime", {"relatime"}),
    ("nosymfollow", {"nosymfollow", "relatime"}),
    ("nosymfollow,symfollow", {"relatime"}),
    ("sync", {"sync", "relatime"}),
    ("sync,async", {"relatime"}),
    ("dirsync", {"dirsync", "relatime"}),
    ("ro", {"ro", "relatime"}),
    ("ro,rw", {"relatime"}),
    ("ro,strictatime,nosymfollow", {"ro", "nosymfollow"}),
    ("lazytime,iversion,silent,loud,mand,nomand,nolazytime,noiversion", {"relatime"}),
    ("auto,noauto,nofail,_netdev,nouser,x-a.b=c,X-d,comment=e", {"relatime"}),
    ("context=system_u:object_r:tmp_t:s0,rootcontext=x", {"relatime"}),
    ("nosuid,nodev", {"nosuid", "nodev", "relatime"}),
]
"""Options, and the flags that mountinfo shows then, but for those of `FUSE` where none is said."""


def shown(mountpoint: Path) -> set[str]:
    """The flags that mountinfo shows."""
    mount = mount_at(str(mountpoint))
    assert mount is not None
    return set(mount.options.split(",")) & KEPT


def flags_of(
    pools: PoolMaker, rows: Iterable[str], mount: Callable[..., Result]
) -> dict[str, set[str]]:
    """What mountinfo shows of pools that are mounted with one list of options after the other."""
    found = {}
    for number, options in enumerate(rows):
        # Another pool each time, since another test's mount namespace may have a copy of the mount.
        mounted = Mounted(pools.create(f"pmem{number}", "8M"), pools.mountpoint())
        words = ("-o", options) if options else ()
        done = mount(*words, mounted.pool, mounted.mountpoint)
        assert (done.code, done.err) == (0, ""), options
        found[options] = shown(mounted.mountpoint)
        pmemfs_here("umount", mounted.mountpoint)
        mounted.pool.unlink()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("served_by", ["native", "python"])
def test_flags_are_what_was_asked_for(pools: PoolMaker, served_by: str) -> None:
    wanted = {options: flags | FUSE for options, flags in FLAGS}
    wanted |= {
        "suid": {"nodev", "relatime"},
        "dev": {"nosuid", "relatime"},
        "suid,dev,exec": {"relatime"},
        "suid,nosuid": {"nosuid", "nodev", "relatime"},
    }
    mount = partial(pmemfs, "mount", "--engine", served_by)
    assert flags_of(pools, wanted, mount) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("fs_type", ["pmemfs", "fuse.pmemfs"])
def test_mount_8_takes_set_user_id_and_devices_for_granted(
    pools: PoolMaker, helper: None, fs_type: str
) -> None:
    # Both are one program: each row by one of the two names.
    rows = FLAGS[::2] if fs_type == "pmemfs" else FLAGS[1::2]
    wanted = dict(rows) | {
        "suid,dev": {"relatime"},
        "user": {"nosuid", "nodev", "noexec", "relatime"},
        "users,exec": {"nosuid", "nodev", "relatime"},
        "owner": {"nosuid", "nodev", "relatime"},
        "group,suid": {"nodev", "relatime"},
    }
    assert flags_of(pools, wanted, partial(run_command, "mount", "-t", fs_type)) == wanted


@pytest.mark.parametrize(
    ("words", "read_only"),
    [
        (("-r", "-o", "rw"), False),
        (("-o", "rw", "-r"), True),
        (("-ro", "rw"), False),
        (("-o", "ro", "--read-only", "-o", "rw,noatime"), False),
        (("-o", "rw", "-o", "ro"), True),
        (("-r",), True),
    ],
)
def test_of_read_only_and_writable_the_last_one_wins(
    pools: PoolMaker, words: tuple[str, ...], read_only: bool
) -> None:
    mounted = pools.mount(pools.create(size="16M"), *words)
    assert ("ro" in shown(mounted.mountpoint)) is read_only
    assert mounted.info()["read_only"] is read_only


@pytest.fixture
def files(pools: PoolMaker, engine: Engine) -> Mounted:
    """A pool with a link, a program of root's with set-user-ID, and a device."""
    mounted = pools.mount(pools.create("pmem0", "32M", "--mode", "fs"))
    top = mounted.mountpoint
    (top / "file").write_bytes(b"x" * 5000)
    (top / "link").symlink_to("file")
    shutil.copy(shutil.which("id") or "/usr/bin/id", top / "id")
    (top / "id").chmod(0o4755)
    os.mknod(top / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    (top / "zero").chmod(0o666)
    top.chmod(0o755)
    pools.umount(mounted)
    return mounted


def test_flags_do_what_they_say(pools: PoolMaker, files: Mounted) -> None:
    top = files.mountpoint
    for remounts in (False, True):
        if remounts:
            pools.mount(files.pool, "-o", "allow_other")
        for options, follows, executes, is_root, has_devices in (
            ("allow_other,nosuid,nodev", True, True, False, False),
            ("allow_other,suid,dev,nosymfollow", False, True, True, True),
            ("allow_other,noexec,nosuid,dev", True, False, False, True),
        ):
            if remounts:
                pmemfs_ok("mount", "-o", f"remount,exec,symfollow,{options}", top)
            else:
                pools.mount(files.pool, "-o", options)
            assert os.readlink(top / "link") == "file"
            assert (_error(top / "link") == 0) is follows
            done = run_command("setpriv", "--reuid=65534", "--clear-groups", top / "id", "-u")
            assert (done.code == 0) is executes, done
            assert (done.out.strip() == "0") is is_root
            assert (_error(top / "zero") == 0) is has_devices
            if not remounts:
                pools.umount(files)
    pools.umount(files)


def _error(path: Path) -> int:
    """What open(2) answers; 0: it opens."""
    try:
        path.open("rb").close()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("mode", ["block", "fs"])
def test_with_sync_a_write_is_durable_when_it_is_answered(
    pools: PoolMaker, engine: Engine, tmp_path: Path, mode: str
) -> None:
    """On a disk, where only msync(2) makes a write durable."""
    pool = tmp_path / "pmem0"
    pmemfs_ok("create", pool, "--size", "16M", "--mode", mode)
    mounted = pools.mount(pool, "-o", "sync")
    try:
        for options, dirty in (("sync", False), ("async", True), ("sync", False)):
            pmemfs_ok("mount", "-o", f"remount,{options}", mounted.mountpoint)
            with opened(mounted.device, os.O_RDWR | os.O_CREAT) as fd:
                for at in range(20):
                    assert os.pwrite(fd, b"x" * 4096, 4096 * at) == 4096
                counts = mounted.pages()["counts"]
                assert (counts["dirty"] > 0) is dirty, (options, counts)
    finally:
        pools.umount(mounted)


@pytest.mark.parametrize(
    ("option", "mode"),
    [("uid=1", "fs"), ("gid=0", "fs"), ("mode=600", "fs"), ("cached", "block")],
)
def test_options_of_the_other_mode_are_refused_before_anything_is_mounted(
    pools: PoolMaker, helper: None, option: str, mode: str
) -> None:
    pool, mountpoint = pools.create("pmem0", "16M", "--mode", mode), pools.mountpoint()
    before = pool.read_bytes()
    name = option.partition("=")[0]
    done = pmemfs("mount", "-o", f"noatime,{option}", pool, mountpoint)
    refused(done, 2, repr(name), f"mode {mode}")
    through = run_command("mount", "-t", "pmemfs", "-o", f"noatime,{option}", pool, mountpoint)
    refused(through, 1, repr(name), f"mode {mode}")
    assert mounts_at(mountpoint) == 0
    assert pool.read_bytes() == before


def test_each_place_of_a_mount_honours_what_was_asked_for_it(
    pools: PoolMaker, helper: None
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    second, third = pools.mountpoint("second"), pools.mountpoint("third")
    done = run_command("mount", "-t", "pmemfs", mounted.pool, second)
    assert (done.code, done.err) == (0, "")
    pmemfs_ok("mount", mounted.pool, third)
    assert shown(mounted.mountpoint) & FUSE == FUSE
    assert shown(second) & FUSE == set()
    assert shown(third) & FUSE == FUSE


@pytest.mark.slow
def test_who_is_not_root_is_told_what_only_root_may_ask_for(pools: PoolMaker, user: Run) -> None:
    home, program = pools.directory / "home", BIN / "pmemfs"
    pool, mountpoint = home / "pmem0", home / "mnt"
    assert user("mkdir", mountpoint).code == 0
    assert user(program, "create", pool, "--size", "16M", "--mode", "fs").code == 0
    for option in ("suid", "dev", "nosymfollow"):
        refused(user(program, "mount", "-o", f"noexec,{option}", pool, mountpoint), 32,
                f"only root may ask for {option}")  # fmt: skip
    options = "noexec,noatime,sync,lazytime,silent,nosuid,nodev,nodiratime,x-foo,symfollow"
    done = user(program, "mount", "-o", options, pool, mountpoint)
    assert done.code == 0, done
    lines = user("cat", "/proc/self/mountinfo").out.splitlines()
    (line,) = [line for line in lines if f" {mountpoint} " in line]
    assert " rw,nosuid,nodev,noexec,noatime " in line
    assert user(program, "umount", mountpoint).code == 0
