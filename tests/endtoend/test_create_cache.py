"""`pmemfs create --mode cache`: what is made, and that a refusal leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kit.caches import ORIGIN_BYTES, new_origin
from kit.commands import pmemfs, pmemfs_ok
from kit.mounts import PoolMaker
from kit.origins import NbdServer
from kit.sources import loop_device, needs_root
from pmemfs.units import MIB


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", seed=b"o")


def test_a_cache_is_made_and_serves_its_origin(pools: PoolMaker, origin: Path) -> None:
    before = origin.read_bytes()
    path = pools.directory / "pmem0"
    said = pmemfs_ok("create", path, "--size", "16M", "--mode", "cache", "--origin", origin)
    assert f"a cache of {origin} (24MiB)" in said
    # The pool is a file of a tmpfs.
    assert "write-through" in said
    assert origin.read_bytes() == before
    mounted = pools.mount(path)
    assert mounted.device.read_bytes() == before
    pools.umount(mounted)


def test_the_report_says_all_that_was_made(pools: PoolMaker, origin: Path) -> None:
    server = NbdServer("file", origin)
    try:
        said = pmemfs_ok(
            "create", pools.directory / "pmem0", "--size", "16M", "--mode", "cache",
            "--origin", server.text, "--block-size", "16K", "--policy", "write-back",
            "--max-dirty", "20%", "--max-dirty-age", "5m", "--origin-timeout", "7",
            "--read-ahead", "0", "--bypass-sequential", "64M", "--json",
        )  # fmt: skip
    finally:
        server.end()
    cache = json.loads(said)["cache"]
    assert cache["settings"] == {
        "policy": "write-back", "max_dirty_percent": 20, "max_dirty_age_seconds": 300,
        "origin_timeout_seconds": 7, "read_ahead_bytes": 0, "bypass_bytes": 64 * MIB,
    }  # fmt: skip
    assert (cache["block_bytes"], cache["origin_bytes"]) == (16384, ORIGIN_BYTES)
    assert cache["origin"] == server.text
    assert cache["dirty"] == 0


REFUSED = [
    (["--mode", "block", "--origin", "{origin}"], 2, "--origin is for caches"),
    (["--policy", "write-back"], 2, "--policy is for caches"),
    (["--mode", "cache"], 2, "name it by --origin"),
    (["--mode", "cache", "--origin", "{origin}.no"], 1, "no such file"),
    (["--mode", "cache", "--origin", "ftp://host/x"], 2, "nothing here speaks ftp"),
    (["--mode", "cache", "--origin", "{origin}", "--scheme", "none"], 1, "page structures"),
    (["--mode", "cache", "--origin", "{origin}", "--page-size", "2M"], 2, "--block-size"),
    (["--mode", "cache", "--origin", "{origin}", "--block-size", "2K"], 2, "is none of 4K"),
    (["--mode", "cache", "--origin", "{origin}", "--max-dirty", "101%"], 2, "from 1% to 100%"),
    (["--mode", "cache", "--origin", "{origin}", "--max-dirty-age", "soon"], 2, "not a time"),
    (["--mode", "cache", "--origin", "{origin}", "--size", "4M", "--block-size", "64K"], 2,
     "too small for a cache"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "why"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_can_be_no_cache_is_refused(
    shm: Path, origin: Path, words: list[str], code: int, why: str
) -> None:
    path = shm / "pmem0"
    filled = [word.format(origin=origin) for word in words]
    refused = pmemfs("create", path, "--size", "16M", *filled)
    assert refused.code == code, refused.err
    assert why in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not path.exists()


def test_a_pool_is_not_its_own_origin(shm: Path) -> None:
    path = shm / "pmem0"
    pmemfs_ok("create", path, "--size", "16M")
    refused = pmemfs("create", path, "--force", "--mode", "cache", "--origin", path)
    assert refused.code == 1
    assert "it is the pool itself" in refused.err
    assert "mode" in pmemfs_ok("info", path)


def test_a_name_that_a_pool_cannot_keep_is_refused_before_anything_is_touched(
    shm: Path, tmp_path: Path
) -> None:
    path = shm / "pmem0"
    pmemfs_ok("create", path, "--size", "16M", "--mode", "fs")
    before = path.read_bytes()
    deep = tmp_path.joinpath(*["d" * 200] * 5)
    deep.mkdir(parents=True)
    names = {
        deep / ("o" * 200): "symbolic link can be a shorter one",
        tmp_path / "new\nline": "can't be printed",
        tmp_path / os.fsdecode(b"\xff"): "can't be printed",
    }
    for name, why in names.items():
        new_origin(name, MIB)
        refused = pmemfs("create", path, "--force", "--mode", "cache", "--origin", name)
        assert refused.code == 2
        assert why in refused.err
        assert len(refused.err.splitlines()) == 1
    assert path.read_bytes() == before


@needs_root
def test_a_loop_device_over_the_pool_is_not_its_origin(shm: Path) -> None:
    path = shm / "pmem0"
    pmemfs_ok("create", path, "--size", "16M")
    with loop_device(path) as device:
        refused = pmemfs("create", path, "--force", "--mode", "cache", "--origin", device)
    assert refused.code == 1
    assert "behind it is the pool itself" in refused.err


def test_an_origin_that_a_mounted_cache_has_is_refused(pools: PoolMaker, origin: Path) -> None:
    first = pools.directory / "pmem0"
    pmemfs_ok("create", first, "--size", "16M", "--mode", "cache", "--origin", origin)
    pools.mount(first)
    second = pools.directory / "pmem1"
    refused = pmemfs("create", second, "--size", "16M", "--mode", "cache", "--origin", origin)
    assert refused.code == 16
    assert "is in use" in refused.err
    assert not second.exists()
