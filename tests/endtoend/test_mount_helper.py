"""mount(8) and fstab, through the helper that they look for in /sbin."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Mounted, PoolMaker, Session, mounts_at

pytestmark = pytest.mark.mount

HELPER = Path("/sbin/mount.pmemfs")


@pytest.fixture(autouse=True)
def _with_helper(helper: None) -> None:
    """All tests here need it."""


@pytest.mark.quick
def test_mount_8_mounts_by_type(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    mounted = Mounted(pool, pools.mountpoint())
    done = run_command("mount", "-t", "pmemfs", "-o", "mode=640", pool, mounted.mountpoint)
    assert done.code == 0, done.err
    assert mounted.device.stat().st_mode & 0o777 == 0o640
    session = Session.of(mounted)
    assert run_command("umount", mounted.mountpoint).code == 0
    session.assert_ended()


def test_mount_8_read_only(pools: PoolMaker) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    done = run_command("mount", "-r", "-t", "pmemfs", mounted.pool, mounted.mountpoint)
    assert done.code == 0, done.err
    assert mounted.info()["read_only"]


@pytest.mark.parametrize(
    "options",
    [
        "defaults",
        "noauto,mode=640,nosuid,noatime",
        "nofail,_netdev,x-systemd.automount,x-systemd.device-timeout=10,comment=x",
        "ro,users,relatime",
    ],
)
def test_a_line_of_fstab_mounts(pools: PoolMaker, tmp_path: Path, options: str) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{mounted.pool} {mounted.mountpoint} pmemfs {options} 0 0\n")
    done = run_command("mount", "--fstab", fstab, mounted.mountpoint)
    assert done.code == 0, done.err
    status = mounted.info()
    assert status["read_only"] is options.startswith("ro")
    if "mode=640" in options:
        assert mounted.device.stat().st_mode & 0o777 == 0o640
        assert "nosuid" in status["options"]
    assert run_command("umount", mounted.mountpoint).code == 0


def test_a_line_of_fstab_names_engine_and_transport(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    fstab = tmp_path / "fstab"
    for options, engine, transport in (
        ("engine=python", "python", "pyfuse3"),
        ("transport=fd", "native", "fd"),
    ):
        fstab.write_text(f"{mounted.pool} {mounted.mountpoint} pmemfs {options} 0 0\n")
        for _ in range(2):
            # The second time it is there already, with the same options.
            done = run_command("mount", "--fstab", fstab, "--all")
            assert done.code == 0, done.err
        status = mounted.info()
        assert (status["engine"], status["transport"]) == (engine, transport)
        # With its daemon, which a copy in the mount namespace of another test keeps for a moment.
        pools.umount(mounted)


def test_nofail_is_a_word_like_others(pools: PoolMaker) -> None:
    mountpoint = pools.mountpoint()
    missing = pools.directory / "missing"
    words = ("-o", "nofail", missing, mountpoint)
    done = run_command(HELPER, missing, mountpoint, "-o", "nofail")
    assert done.code == 0, done.err
    assert mounts_at(mountpoint) == 0
    assert run_command("mount", "-t", "pmemfs", *words).code == 0


def test_exit_codes_are_those_of_mount_8(pools: PoolMaker) -> None:
    pool, mountpoint = pools.create(size="16M"), pools.mountpoint()
    missing = pools.directory / "missing"
    for code, words in (
        (1, ("-o", "nonsense", pool, mountpoint)),
        (1, ("-o", "mode=99", pool, mountpoint)),
        (32, (missing, mountpoint)),
        (32, (pool, missing)),
    ):
        # The helper by itself, and what mount(8) makes of it.
        options = [word for word in words if word in ("-o", "nonsense", "mode=99")]
        direct = run_command(HELPER, *(word for word in words if word not in options), *options)
        assert direct.code == code, (words, direct)
        assert len(direct.err.splitlines()) == 1
        through = run_command("mount", "-t", "pmemfs", *words)
        assert through.code == (code if missing != words[-1] else through.code) != 0
        assert "Traceback" not in through.err
    assert run_command(HELPER).code == 1
    assert run_command(HELPER, pool).code == 1
    assert mounts_at(mountpoint) == 0


def test_a_fake_mount_checks_the_options_and_mounts_nothing(pools: PoolMaker) -> None:
    pool, mountpoint = pools.create(size="16M"), pools.mountpoint()
    assert run_command("mount", "-f", "-t", "pmemfs", pool, mountpoint).code == 0
    assert run_command("mount", "-f", "-t", "pmemfs", "-o", "mode=99", pool, mountpoint).code == 1
    assert mounts_at(mountpoint) == 0


def line_of(mountpoint: Path) -> str:
    """The line of a mount in /proc/mounts."""
    lines = Path("/proc/mounts").read_text().splitlines()
    shown = str(mountpoint).replace(" ", "\\040")
    return next(line for line in lines if f" {shown} fuse.pmemfs " in line)


@pytest.mark.parametrize("options", ["", "allow_other,noatime,nosuid,nodev", "ro"])
def test_a_line_of_proc_mounts_is_a_line_of_fstab(
    pools: PoolMaker, tmp_path: Path, options: str
) -> None:
    pool = pools.create("a pool", "16M")
    mounted = pools.mount(pool, "-o", options)
    line = line_of(mounted.mountpoint)
    assert "user_id=0" in line
    pools.umount(mounted)
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{line}\n")
    for _ in range(2):
        done = run_command("mount", "--fstab", fstab, "--all")
        assert (done.code, done.err) == (0, "")
        assert mounts_at(mounted.mountpoint) == 1
    assert line_of(mounted.mountpoint) == line
    session = Session.of(mounted)
    assert run_command("umount", mounted.mountpoint).code == 0
    session.assert_ended()


def test_mount_8_mounts_by_the_type_that_the_kernel_shows(pools: PoolMaker) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    options = "mode=640,rootmode=40000,fd=3,user_id=7,group_id=7,max_read=131072,blksize=4096"
    done = run_command("mount", "-t", "fuse.pmemfs", "-o", options, mounted.pool,
                       mounted.mountpoint)  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert (mounted.device.stat().st_uid, mounted.device.stat().st_mode & 0o777) == (0, 0o640)
    assert run_command("umount", mounted.mountpoint).code == 0
