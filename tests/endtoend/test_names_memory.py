"""`-o names_memory`, by what the mount then says of it."""

from __future__ import annotations

import json

import pytest

from kit.commands import pmemfs, pmemfs_ok, refused
from kit.mounts import Mounted, PoolMaker, native_only

pytestmark = pytest.mark.mount


def said_of_names(mounted: Mounted) -> str:
    """What `pmemfs info` says of names."""
    lines = pmemfs_ok("info", mounted.mountpoint).splitlines()
    (line,) = [line for line in lines if line.startswith("names ")]
    return line.removeprefix("names").strip()


def remounted(mounted: Mounted, value: str) -> None:
    pmemfs_ok("mount", "-o", f"remount,names_memory={value}", mounted.mountpoint)


@native_only
def test_info_says_who_serves_names_and_by_how_much_memory(pools: PoolMaker) -> None:
    pool = pools.create("files", "32M", "--mode", "fs")
    mounted = pools.mount(pool, "-o", "names_memory=0K")
    (mounted.mountpoint / "file").touch()
    assert said_of_names(mounted) == "all served by the daemon, as names_memory=0 says"
    remounted(mounted, "2M")
    (mounted.mountpoint / "another").touch()
    assert " of 2MiB; " in said_of_names(mounted)
    remounted(mounted, "0")
    assert said_of_names(mounted) == "all served by the daemon, as names_memory=0 says"


@native_only
def test_what_takes_too_much_memory_is_left_to_the_daemon_and_counted(pools: PoolMaker) -> None:
    pool = pools.create("files", "32M", "--mode", "fs")
    mounted = pools.mount(pool, "-o", "names_memory=64K")
    directory = mounted.mountpoint / "many"
    directory.mkdir()
    for number in range(2000):
        (directory / f"a file with a number: {number}").touch()
    assert len(list(directory.iterdir())) == 2000
    status = json.loads(pmemfs_ok("info", mounted.mountpoint, "--json"))
    short = status["names"]["handed_over_short"]
    assert short > 0
    assert f", and {short} because this memory is too little" in said_of_names(mounted)
    told = pmemfs_ok("stat", mounted.mountpoint, "--prometheus")
    (line,) = [line for line in told.splitlines() if 'reason="memory"' in line]
    assert line.startswith("pmemfs_names_handed_over_requests_total{")
    assert float(line.split()[-1]) == short
    remounted(mounted, "1M")
    (directory / "one more").touch()
    assert f", and {short} because" in said_of_names(mounted)


@native_only
def test_memory_of_no_use_is_refused_and_a_mount_stays_as_it_is(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "32M", "--mode", "fs"))
    said = refused(
        pmemfs("mount", "-o", "remount,names_memory=1K", mounted.mountpoint), 2, "64KiB at least"
    )
    assert "names_memory=1" in said
    assert " of 64MiB; " in said_of_names(mounted)


@native_only
def test_the_python_engine_has_no_use_for_it(pools: PoolMaker) -> None:
    pool = pools.create("files", "32M", "--mode", "fs")
    refused(
        pmemfs("mount", "-o", "engine=python,names_memory=1M", pool, pools.directory), 2,
        "only the native engine",
    )  # fmt: skip
