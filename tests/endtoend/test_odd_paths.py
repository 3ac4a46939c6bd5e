"""Pools and directories of any bytes: every tool and command finds the mount by either."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_here, pmemfs_ok, refused, run_command
from kit.mounts import Engine, Mounted, PoolMaker, Session, mounts_at

pytestmark = [pytest.mark.mount, pytest.mark.slow]

ODD = [
    "café",
    b"caf\xe9",
    "a b",
    "a\nb",
    "a\tb",
    "a#b",
    "a\\040b",
    "a,b",
    "a\\",
]
"""UTF-8, Latin-1, what mountinfo escapes, an escape of its that is meant, what options are
separated by."""


@pytest.fixture(params=ODD, ids=ascii)
def odd(request: pytest.FixtureRequest) -> str:
    """A name."""
    return os.fsdecode(request.param)


def odd_mount(pools: PoolMaker, odd: str) -> Mounted:
    """A pool of that path, and a directory of that name to mount it on."""
    pool = pools.create(odd, "16M", "--name", "pmem0")
    return Mounted(pool, pools.mountpoint(f"on {odd}"))


def fstab_line(mounted: Mounted) -> bytes:
    """A line of fstab(5), which escapes as mountinfo does."""
    fields = [os.fsencode(path) for path in (mounted.pool, mounted.mountpoint)]
    for byte in b"\\ \t\n#":
        fields = [field.replace(bytes([byte]), b"\\%03o" % byte) for field in fields]
    return b"%s %s pmemfs noauto 0 0\n" % tuple(fields)


@pytest.mark.usefixtures("helper", "engine")
def test_mount_8_mounts_a_pool_of_any_name_once_and_finds_it(
    pools: PoolMaker, tmp_path: Path, odd: str, engine: Engine
) -> None:
    mounted = odd_mount(pools, odd)
    fstab = tmp_path / "fstab"
    options = ",".join(f"{name[2:]}={value}" for name, value in zip(
        engine.options[::2], engine.options[1::2], strict=True))  # fmt: skip
    fstab.write_bytes(fstab_line(mounted).replace(b"noauto", options.encode()))
    for _ in range(2):
        done = run_command("mount", "--all", "--fstab", fstab)
        assert (done.code, done.out, done.err) == (0, "", "")
        assert mounts_at(mounted.mountpoint) == 1
    session = Session.of(mounted)
    found = json.loads(run_command("findmnt", "--json", "--source", mounted.pool).out)
    assert len(found["filesystems"]) == 1
    shown = run_command("df", mounted.mountpoint).out
    assert "xe9" not in shown
    assert "pmem0" in os.listdir(mounted.mountpoint)
    done = run_command("umount", mounted.pool)
    assert (done.code, done.err) == (0, "")
    session.assert_ended()


def test_the_commands_find_a_mount_by_a_pool_or_a_directory_of_any_name(
    pools: PoolMaker, odd: str
) -> None:
    mounted = odd_mount(pools, odd)
    pmemfs_ok("mount", mounted.pool, mounted.mountpoint)
    rows = [row for row in json.loads(pmemfs_ok("list", "--json"))
            if row["mountpoint"] == str(mounted.mountpoint)]  # fmt: skip
    assert [row["pool"] for row in rows] == [str(mounted.pool)]
    for target in (mounted.pool, mounted.mountpoint):
        said = json.loads(pmemfs_ok("info", target, "--json"))
        assert (said["mountpoint"], said["pool"]["path"]) == (
            str(mounted.mountpoint), str(mounted.pool)
        )  # fmt: skip
        pmemfs_ok("info", target)
    other = pools.mountpoint(f"again {odd}")
    pmemfs_ok("mount", mounted.pool, other)
    assert mounts_at(other) == 1
    with (mounted.mountpoint / "pmem0").open("rb"):
        refused(pmemfs("umount", mounted.mountpoint), 32, "busy")
    pmemfs_ok("umount", mounted.pool)
    assert mounts_at(mounted.mountpoint) == mounts_at(other) == 0


def test_a_mount_of_a_directory_of_any_name_that_failed_says_one_sentence(
    pools: PoolMaker, odd: str
) -> None:
    empty = pools.directory / f"no pool {odd}"
    empty.write_bytes(bytes(1 << 20))
    for engine in ("native", "python"):
        refused(pmemfs("mount", "--engine", engine, empty, pools.mountpoint(odd)), 32, "no label")


def test_a_pool_is_found_by_the_bytes_of_its_name_and_by_no_others(pools: PoolMaker) -> None:
    made = [pools.create(os.fsdecode(name), "16M", "--name", "pmem0")
            for name in (b"\xe9", b"\\xe9", b"\xc3\xa9")]  # fmt: skip
    for number, pool in enumerate(made):
        pmemfs_ok("mount", pool, pools.mountpoint(f"of{number}"))
    for number, pool in enumerate(made):
        said = json.loads(pmemfs_here("info", pool, "--json"))
        assert said["pool"]["path"] == str(pool)
        assert said["mountpoints"] == [str(pools.mountpoint(f"of{number}"))]
