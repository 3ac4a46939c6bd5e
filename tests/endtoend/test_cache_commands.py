"""`pmemfs cache`, `pmemfs flush`, and what `info` and `umount` say of caches; mounted and not."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kit.caches import ORIGIN_BYTES, new_origin
from kit.commands import Result, pmemfs, pmemfs_ok
from kit.mounts import Mounted, PoolMaker, Session
from kit.namespaces import nobody_copies_mounts
from kit.origins import NbdServer
from kit.processes import is_running
from kit.sources import loop_device, needs_root
from pmemfs.units import MIB

DATA = b"new" * 10_000
"""8 blocks."""


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return new_origin(tmp_path / "disk/origin", seed=b"o")


@pytest.fixture
def pool(pools: PoolMaker, origin: Path) -> Path:
    path = pools.directory / "pmem0"
    pmemfs_ok("create", path, "--size", "16M", "--mode", "cache", "--origin", origin,
              "--policy", "write-back", "--max-dirty-age", "0")  # fmt: skip
    return path


def asked(*words: object) -> dict[str, Any]:
    return dict(json.loads(pmemfs_ok(*words, "--json")))


def write(mounted: Mounted, data: bytes = DATA, at: int = 0) -> None:
    with mounted.device.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, at) == len(data)


def kill(mounted: Mounted) -> None:
    Session.of(mounted).kill()
    subprocess.run(["umount", "-l", mounted.mountpoint], check=False, capture_output=True)


def umount(mounted: Mounted, *options: str) -> Result:
    """Unmount as a user does. The command neither waits for the daemon nor warns of anything where
    another mount namespace has the mount, as that of another test may for a moment."""
    pid = mounted.pid
    with nobody_copies_mounts():
        ended = pmemfs("umount", *options, mounted.mountpoint)
    assert not is_running(pid)
    return ended


def test_info_tells_hits_misses_and_what_is_dirty(pools: PoolMaker, pool: Path) -> None:
    assert asked("info", pool)["cache"]["dirty"] == 0
    mounted = pools.mount(pool)
    write(mounted)
    with mounted.device.open("rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, 0)
        os.pread(file.fileno(), 4096, 8 * MIB)
    cache = asked("info", mounted.mountpoint)["cache"]
    assert (cache["dirty"], cache["origin"]["state"]) == (8, "present")
    assert cache["read_hits"] >= 1
    assert cache["misses"] >= 1
    said = pmemfs_ok("info", mounted.mountpoint)
    for word in ("origin", "present", "hits", "2 misses (", "32KiB in 8 blocks", "write-back"):
        assert word in said
    hottest = asked("pages", mounted.mountpoint)["hottest"]
    assert {page["owner"]["path"] for page in hottest if page["owner"]} == {"pmem0"}
    pools.umount(mounted)
    said = pmemfs_ok("info", pool)
    assert "32KiB in 8 blocks" in said
    assert asked("info", pool)["cache"]["dirty"] == 8


def test_stat_counts_hits_and_misses_since_the_report_before(pools: PoolMaker, pool: Path) -> None:
    mounted = pools.mount(pool)
    # The daemon answers the first write to a group of blocks, and the data plane the next one.
    for at in (0, 32768):
        write(mounted, b"n" * 32768, at)
    first = asked("stat", mounted.mountpoint)["cache"]
    assert (first["write_hits"], first["misses"], first["dirty_bytes"]) == (16, 0, 65536)
    said = pmemfs_ok("stat", mounted.mountpoint, "--watch", "0.1", "--count", "2", "--json")
    since = [json.loads(line)["cache"] for line in said.splitlines()]
    assert [each["write_hits"] for each in since] == [16, 0]
    assert "64KiB dirty, origin present" in pmemfs_ok("stat", mounted.mountpoint)


def test_flush_completes_the_origin_of_a_mount(pools: PoolMaker, pool: Path, origin: Path) -> None:
    before = origin.read_bytes()
    mounted = pools.mount(pool)
    write(mounted)
    assert asked("flush", mounted.mountpoint) == {"cleaned": 8, "dirty": 0}
    assert origin.read_bytes() == DATA + before[len(DATA) :]
    assert "the origin is complete, and got 0 blocks" in pmemfs_ok("flush", pool)
    pools.umount(mounted)


@pytest.mark.parametrize("is_killed", [False, True], ids=["unmounted", "killed"])
def test_flush_completes_the_origin_of_a_pool(
    pools: PoolMaker, pool: Path, origin: Path, is_killed: bool
) -> None:
    before = origin.read_bytes()
    mounted = pools.mount(pool)
    write(mounted)
    if is_killed:
        kill(mounted)
        assert "not known" in pmemfs_ok("info", pool)
    else:
        pools.umount(mounted)
    assert origin.read_bytes() == before
    assert asked("flush", pool) == {"cleaned": 8, "dirty": 0}
    assert origin.read_bytes() == DATA + before[len(DATA) :]
    assert asked("info", pool)["cache"]["dirty"] == 0
    assert pmemfs("check", pool).code == 0
    assert asked("cache", "verify", pool)["differing"] == 0


def test_flush_says_what_keeps_the_origin_incomplete(
    pools: PoolMaker, pool: Path, origin: Path
) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    pools.umount(mounted)
    # Its own times would change if it were renamed itself.
    moved = origin.parent.with_name("moved")
    os.rename(origin.parent, moved)
    refused = pmemfs("flush", pool)
    assert refused.code == 1
    assert "no such file" in refused.err
    assert asked("info", pool)["cache"]["dirty"] == 8
    os.rename(moved, origin.parent)
    assert asked("flush", pool)["dirty"] == 0


def test_what_a_read_only_policy_keeps_dirty_is_flushed_without_a_mount(
    pools: PoolMaker, pool: Path, origin: Path
) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    pmemfs_ok("cache", "set", mounted.mountpoint, "--policy", "read-only")
    pools.umount(mounted)
    mounted = pools.mount(pool)
    refused = pmemfs("flush", mounted.mountpoint)
    assert refused.code == 1
    assert "unmount the pool, and flush it then" in refused.err
    assert asked("info", mounted.mountpoint)["cache"]["origin"]["write_back_failures"] == 0
    pools.umount(mounted)
    assert asked("flush", pool)["cleaned"] == 8
    assert origin.read_bytes()[: len(DATA)] == DATA


def test_what_is_dirty_is_not_given_to_an_origin_that_was_removed(
    pools: PoolMaker, pool: Path, origin: Path, tmp_path: Path
) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    other = new_origin(tmp_path / "other", seed=b"n")
    other.rename(origin)
    for words in (["flush"], ["umount", "--flush"]):
        refused = pmemfs(*words, mounted.mountpoint)
        assert refused.code != 0
        assert "its file was removed" in refused.err
    pools.umount(mounted)
    exported = asked("cache", "export", pool, tmp_path / "saved")
    assert exported["blocks"] == 8
    assert (tmp_path / "saved").read_bytes()[: len(DATA)] == DATA


def test_umount_warns_of_what_the_origin_lacks_and_with_flush_leaves_it_complete(
    pools: PoolMaker, pool: Path, origin: Path
) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    ended = umount(mounted)
    assert ended.code == 0
    assert f"{origin} lacks 8 blocks" in ended.err
    assert f"'pmemfs flush {pool}'" in ended.err
    assert not origin.read_bytes().startswith(DATA)
    mounted = pools.mount(pool)
    ended = umount(mounted, "--flush")
    assert (ended.code, ended.err) == (0, "")
    assert origin.read_bytes().startswith(DATA)
    assert asked("info", pool)["cache"]["dirty"] == 0


def test_a_cache_keeps_the_size_of_its_pool(pools: PoolMaker, pool: Path) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    pools.umount(mounted)
    for words in (["--size", "32M"], []):
        refused = pmemfs("resize", pool, *words)
        assert refused.code == 1
        assert "a cache keeps the size of its pool" in refused.err
    assert asked("info", pool)["cache"]["dirty"] == 8
    assert pmemfs("check", pool).code == 0


@needs_root
def test_umount_names_the_loop_device_that_uses_the_mount(pools: PoolMaker, pool: Path) -> None:
    mounted = pools.mount(pool)
    with loop_device(mounted.device) as device:
        refused = pmemfs("umount", mounted.mountpoint)
    assert refused.code == 32
    assert f"target is busy: {device} uses it" in refused.err
    assert f"'losetup -d {device}'" in refused.err


def test_settings_are_changed_while_mounted_and_stay(pools: PoolMaker, pool: Path) -> None:
    mounted = pools.mount(pool)
    now = asked("cache", "set", mounted.mountpoint, "--policy", "write-through",
                "--max-dirty", "20%", "--max-dirty-age", "30s")  # fmt: skip
    assert (now["policy"], now["max_dirty_percent"]) == ("write-through", 20)
    assert now["max_dirty_age_seconds"] == 30
    pools.umount(mounted)
    assert asked("cache", "set", pool) == now
    assert asked("cache", "set", pool, "--policy", "write-around")["policy"] == "write-around"
    assert "write-around" in pmemfs_ok("info", pool)
    bad = pmemfs("cache", "set", pool, "--policy", "writeback")
    assert bad.code == 2
    assert "write-back" in bad.err


def test_drop_forgets_what_is_clean_and_first_writes_what_is_dirty(
    pools: PoolMaker, pool: Path, origin: Path
) -> None:
    mounted = pools.mount(pool)
    write(mounted)
    kept = asked("cache", "drop", mounted.mountpoint, "--clean-only", "--range", "0:1M")
    assert kept["kept_dirty"] == 8
    assert asked("cache", "drop", mounted.mountpoint, "--range", "0:16K")["dropped"] == 4
    assert origin.read_bytes().startswith(DATA)
    dropped = asked("cache", "drop", mounted.mountpoint)
    assert dropped["dropped"] >= 4
    assert dropped["kept_dirty"] == 0
    pools.umount(mounted)
    assert asked("cache", "drop", pool)["dropped"] == 0


def test_drop_takes_an_origin_that_was_changed(pools: PoolMaker, pool: Path, origin: Path) -> None:
    mounted = pools.mount(pool)
    assert mounted.device.read_bytes()[:1] == b"o"
    pools.umount(mounted)
    with origin.open("r+b") as file:
        file.write(b"somebody else")
    refused = pmemfs("mount", pool, mounted.mountpoint)
    assert "pmemfs cache drop" in refused.err
    assert asked("cache", "drop", pool)["dropped"] > 0
    mounted = pools.mount(pool)
    with mounted.device.open("rb") as file:
        assert file.read(13) == b"somebody else"
    write(mounted)
    pools.umount(mounted)
    with origin.open("r+b") as file:
        file.write(b"again")
    refused = pmemfs("cache", "drop", pool)
    assert refused.code == 3
    assert "8 blocks that its origin lacks" in refused.err
    assert asked("cache", "drop", pool, "--discard-dirty")["dropped"] >= 8
    assert pools.mount(pool).device.open("rb").read(5) == b"again"


def test_verify_finds_what_differs(pools: PoolMaker, pool: Path, origin: Path) -> None:
    mounted = pools.mount(pool)
    with mounted.device.open("rb", buffering=0) as file:
        for at in (0, 5 * MIB):
            os.pread(file.fileno(), 4096, at)
    same = pmemfs("cache", "verify", mounted.mountpoint)
    assert same.code == 0
    assert "all as the origin has them" in same.out
    with origin.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"somebody else")
    differs = pmemfs("cache", "verify", mounted.mountpoint, "--json")
    assert differs.code == 4
    assert json.loads(differs.out)["first_differing"] == [5 * MIB]
    assert pmemfs("cache", "verify", mounted.mountpoint, "--range", "0:1M").code == 0


def test_export_saves_what_a_lost_origin_lacks(
    pools: PoolMaker, pool: Path, origin: Path, tmp_path: Path
) -> None:
    before = origin.read_bytes()
    mounted = pools.mount(pool)
    write(mounted)
    write(mounted, b"end!" * 1024, ORIGIN_BYTES - 4096)
    mounting = pmemfs("cache", "export", pool, tmp_path)
    assert mounting.code == 16
    kill(mounted)
    backup = tmp_path / "backup"
    backup.write_bytes(before)
    origin.unlink()
    saved = asked("cache", "export", pool, tmp_path)
    assert saved["path"] == str(tmp_path / "pmem0.dirty")
    assert (saved["blocks"], saved["ranges"]) == (9, 2)
    file = tmp_path / "pmem0.dirty"
    assert file.stat().st_size == ORIGIN_BYTES
    assert file.stat().st_blocks * 512 < MIB
    lines = Path(saved["ranges_path"]).read_text().splitlines()
    assert lines == ["0 32768 data", f"{ORIGIN_BYTES - 4096} 4096 data"]
    again = pmemfs("cache", "export", pool, tmp_path)
    assert again.code == 2
    small = tmp_path / "another"
    small.write_bytes(before[: 8 * MIB])
    refused = pmemfs("cache", "export", "--onto", pool, small)
    assert refused.code == 2
    assert f"has {8 * MIB} bytes, and the origin had {ORIGIN_BYTES}" in refused.err
    assert small.read_bytes() == before[: 8 * MIB]
    pmemfs_ok("cache", "export", "--onto", pool, backup)
    wanted = bytearray(before)
    wanted[: len(DATA)] = DATA
    wanted[-4096:] = b"end!" * 1024
    assert backup.read_bytes() == wanted


def test_a_flush_over_nbd_needs_the_server(pools: PoolMaker, origin: Path) -> None:
    server = NbdServer("file", origin)
    try:
        pool = pools.directory / "pmem0"
        pmemfs_ok("create", pool, "--size", "16M", "--mode", "cache", "--origin", server.text,
                  "--policy", "write-back")  # fmt: skip
        mounted = pools.mount(pool)
        write(mounted)
        pools.umount(mounted)
        server.end()
        assert pmemfs("flush", pool).code == 1
        refused = pmemfs("mount", pool, mounted.mountpoint)
        assert refused.code == 32
        assert "is away" in refused.err
        assert "'-o degraded' mounts the pool without it" in refused.err
        server.start()
        assert asked("flush", pool)["dirty"] == 0
    finally:
        server.end()
    assert origin.read_bytes().startswith(DATA)


@pytest.mark.parametrize(
    "words", [["flush"], ["cache", "set"], ["cache", "drop"], ["cache", "verify"]], ids=str
)
def test_pools_of_other_modes_are_no_caches(pools: PoolMaker, words: list[str]) -> None:
    pool = pools.create()
    for target in (pool, pools.mount(pool).mountpoint):
        refused = pmemfs(*words, target)
        assert refused.code == 1
        assert "is a pool of mode block, and caches nothing" in refused.err


BAD = [
    ["cache"],
    ["cache", "pour", "{pool}"],
    ["cache", "drop", "{pool}", "--range", "1G:0"],
    ["cache", "drop", "{pool}", "--range", "here"],
    ["cache", "drop", "{pool}", "--discard-dirty", "--clean-only"],
    ["cache", "export", "--onto", "{pool}", "{pool}"],
    ["cache", "export", "--onto", "{pool}", "/nowhere/at/all"],
]


@pytest.mark.parametrize("words", BAD, ids=str)
def test_bad_usage_of_cache_commands_is_one_sentence(pool: Path, words: list[str]) -> None:
    refused = pmemfs(*(word.format(pool=pool) for word in words))
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1 or words == ["cache"]
