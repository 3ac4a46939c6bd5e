"""What a mount takes over from whoever calls for it: no code, no directory, no limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.commands import BIN, Result, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import EACH_ENGINE, Mounted, PoolMaker
from kit.processes import wait_until
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount, pytest.mark.slow, *EACH_ENGINE]

ROOT = Path(__file__).parents[2]
MODULES = ("trio", "json", "numpy", "pyfuse3", "pmemfs", "resource", "click", "signal")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory of somebody else, full of modules that tell when they are loaded."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'w')\n")
    return tmp_path


def in_directory(directory: Path, *words: object, **environment: str) -> Result:
    """Run a command in a directory, with more in its environment."""
    done = subprocess.run(
        [str(word) for word in words], cwd=directory, capture_output=True, text=True,
        env={**os.environ, **environment}, timeout=60, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def test_no_code_of_the_current_directory_is_run(pools: PoolMaker, trap: Path) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    words = ("mount", mounted.pool, mounted.mountpoint, *pools.engine.options)
    assert in_directory(trap, BIN / "pmemfs", *words).code == 0
    pools.umount(mounted)
    with subprocess.Popen([BIN / "pmemfs", *words, "--foreground"], cwd=trap) as daemon:
        wait_until(mounted.device.exists, "it answers")
        # Nor is the directory kept busy.
        pids = [daemon.pid, mounted.info()["data_plane_pid"] or daemon.pid]
        assert {os.readlink(f"/proc/{pid}/cwd") for pid in pids} == {"/"}
        pools.umount(mounted)
    assert not (trap / "caught").exists()


def test_a_daemon_takes_no_code_from_beside_the_program(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    # Where Python looks first for what a program loads; trio is the daemon's alone.
    program = tmp_path / "pmemfs"
    program.write_text((BIN / "pmemfs").read_text())
    program.chmod(0o755)
    (tmp_path / "trio.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'w')\n")
    done = run_command(program, "mount", mounted.pool, mounted.mountpoint, *pools.engine.options)
    assert done.code == 0, done.err
    pools.umount(mounted)
    assert not (tmp_path / "caught").exists()


def test_what_is_installed_takes_no_code_from_the_environment_either(
    pools: PoolMaker, trap: Path
) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    installed = trap / "mount.pmemfs"
    installed.write_text((ROOT / "scripts/installed").read_text())
    installed.chmod(0o755)
    (trap / "venv").symlink_to(BIN.parent)
    paths = {"PYTHONPATH": f":{trap}", "PYTHONSTARTUP": str(trap / "json.py")}
    done = in_directory(trap, installed, mounted.pool, mounted.mountpoint, **paths)
    assert done.code == 0, done.err
    pools.umount(mounted)
    assert not (trap / "caught").exists()
    # The trap works.
    in_directory(trap, BIN / "pmemfs", "--version", **paths)
    assert (trap / "caught").exists()


def test_paths_from_the_current_directory_are_understood(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    mounted = Mounted(pool, pools.mountpoint())
    (pools.directory / "link").symlink_to(pool.name)
    for name in (pool.name, f"./{pool.name}", "link"):
        done = in_directory(pools.directory, BIN / "pmemfs", "mount", name, "mounts/mnt",
                            *pools.engine.options)  # fmt: skip
        assert done.code == 0, done.err
        assert mounted.info()["pool"]["path"] == str(pool)
        done = in_directory(pools.directory / "mounts", BIN / "pmemfs", "umount", "mnt")
        assert done.code == 0, done.err


CAP_SYS_RESOURCE = 24

LIMITED = {
    "-f": 1, "-v": 400_000, "-d": 200_000, "-n": 12, "-u": 20, "-l": 0, "-m": 1000, "-s": 200,
    "-t": 60,
}  # fmt: skip
"""In the units of ulimit; enough for the command, and for no daemon."""


def limited(flag: str, *words: object, how: str = "") -> Result:
    """Run a command under a limit of a shell; with `-S`, one that everybody may raise."""
    limit = f"ulimit {how} {flag} {LIMITED[flag]}"
    return run_command("bash", "-c", f'{limit} && exec "$@"', "bash", *words)


FORGETS_CHILDREN = (
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_who_wants_to_know_nothing_of_children_is_told_of_mounts_all_the_same(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    (tmp_path / "no pool").write_bytes(bytes(1 << 20))
    mount = (sys.executable, "-c", FORGETS_CHILDREN, BIN / "pmemfs", "mount",
             *pools.engine.options)  # fmt: skip
    refused(run_command(*mount, tmp_path / "nothing", mounted.mountpoint), 32, "no such")
    refused(
        run_command(*mount, tmp_path / "no pool", mounted.mountpoint), 32, "has no label of a pool"
    )
    misused = run_command(*mount, mounted.pool)
    assert misused.code == 2
    assert "Traceback" not in misused.err
    assert mount_at(str(mounted.mountpoint)) is None
    assert run_command(*mount, mounted.pool, mounted.mountpoint) == Result(0, "", "")
    pools.umount(mounted)


def may_raise_limits() -> bool:
    """Whether this root has CAP_SYS_RESOURCE, as in some containers it has not."""
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    return bool(effective >> CAP_SYS_RESOURCE & 1)


@pytest.mark.parametrize("flag", LIMITED)
def test_a_mount_is_made_whatever_limits_the_shell_has(pools: PoolMaker, flag: str) -> None:
    mounted = Mounted(pools.create("pmem0", "16M", "--mode", "fs"), pools.mountpoint())
    done = limited(flag, BIN / "pmemfs", "mount", mounted.pool, mounted.mountpoint,
                   *pools.engine.options, how="" if may_raise_limits() else "-S")  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    (mounted.mountpoint / "file").write_bytes(bytes(4 << 20))
    pmemfs_ok("resize", mounted.pool, "--size", "32M")
    pools.umount(mounted)
    assert pmemfs("check", mounted.pool).code == 0


MAY_NOT_RAISE = ("setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource")


@pytest.mark.parametrize("flag", ["-f", "-v", "-n"])
def test_where_a_limit_can_not_be_raised_one_sentence_names_it(pools: PoolMaker, flag: str) -> None:
    mounted = Mounted(pools.create("pmem0", "16M", "--mode", "fs"), pools.mountpoint())
    done = limited(flag, *MAY_NOT_RAISE, BIN / "pmemfs", "mount", mounted.pool,
                   mounted.mountpoint, *pools.engine.options)  # fmt: skip
    if done.code == 0:
        # The python engine needs less; and with few addresses a mount only grows less far.
        assert pools.engine.name == "python" or flag == "-v"
        pools.umount(mounted)
        return
    refused(done, 32, "may not raise", f"ulimit {flag}")
    assert mount_at(str(mounted.mountpoint)) is None


def test_with_few_addresses_a_mount_grows_less_far(pools: PoolMaker) -> None:
    mounted = Mounted(pools.create("pmem0", "16M", "--mode", "fs"), pools.mountpoint())
    done = run_command(
        "bash", "-c", 'ulimit -v 2000000 && exec "$@"', "bash", *MAY_NOT_RAISE,
        BIN / "pmemfs", "mount", mounted.pool, mounted.mountpoint, *pools.engine.options,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    pmemfs_ok("resize", mounted.pool, "--size", "64M")
    if pools.engine.name == "native":
        # What the kernel grants the python engine depends on what else it has mapped.
        refused(pmemfs("resize", mounted.pool, "--size", "1G"), 1, "244.14MiB at most")
    pools.umount(mounted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "fs"])
def test_a_mount_that_runs_out_of_descriptors_leaves_a_clean_pool_clean(
    pools: PoolMaker, mode: str
) -> None:
    mounted = Mounted(pools.create("pmem0", "16M", "--mode", mode), pools.mountpoint())
    for count in range(18, 48, 6):
        done = run_command(
            "bash", "-c", f'ulimit -n {count} && exec "$@"', "bash", *MAY_NOT_RAISE,
            BIN / "pmemfs", "mount", mounted.pool, mounted.mountpoint, *pools.engine.options,
        )  # fmt: skip
        if done.code == 0:
            pools.umount(mounted)
        else:
            refused(done, 32, "may not raise", f"ulimit -n: {count}")
        assert mount_at(str(mounted.mountpoint)) is None
        checked = pmemfs("check", mounted.pool)
        assert (checked.code, "not unmounted" in checked.out) == (0, False), checked
        assert json.loads(pmemfs_ok("info", mounted.pool, "--json"))["pool"]["state"] == "clean"


def test_a_limit_that_ends_a_mount_later_is_warned_of(pools: PoolMaker) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    done = limited("-t", *MAY_NOT_RAISE, BIN / "pmemfs", "mount", mounted.pool,
                   mounted.mountpoint, *pools.engine.options)  # fmt: skip
    assert done.code == 0
    assert "warning" in done.err
    assert "ulimit -t: 60" in done.err
    pools.umount(mounted)
