"""A torn or scribbled label: the other copy serves, and `check` says so; both bad: refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kit.commands import Result, pmemfs, pmemfs_ok, refused
from kit.mounts import PoolMaker, Session
from kit.posix import opened
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

SIZE = 16 * MIB
COPIES = {"label": 0, "label copy": SIZE - 4096}


def scribble(pool: Path, offset: int, how: str) -> None:
    with pool.open("r+b") as file:
        file.seek(offset)
        if how == "torn":
            # The second half of a write that never happened.
            file.seek(offset + 64)
            file.write(os.urandom(8))
        elif how == "random":
            file.write(os.urandom(4096))
        else:
            file.write(bytes(4096))


def check(pool: Path) -> Result:
    before = pool.read_bytes()
    result = pmemfs("check", pool)
    assert pool.read_bytes() == before, "check writes nothing"
    return result


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torn", "random", "zero"])
@pytest.mark.parametrize("which", list(COPIES))
def test_one_bad_copy_is_reported_and_does_not_matter(
    pools: PoolMaker, which: str, how: str
) -> None:
    pool = pools.create(size="16M")
    uuid = json.loads(pmemfs_ok("info", pool, "--json"))["pool"]["uuid"]
    scribble(pool, COPIES[which], how)

    checked = check(pool)
    assert checked.code == 4
    bad = [line for line in checked.out.splitlines() if "ERROR" in line]
    assert len(bad) == 1
    assert bad[0].startswith(f"{which} ")
    assert "errors were found" in checked.out

    mounted = pools.mount(pool)
    status = mounted.info()["pool"]
    assert status["uuid"] == uuid
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"data", 0)
    session = Session.of(mounted)
    pools.umount(mounted)
    session.assert_ended()
    assert check(pool).code == 0, "a writable mount writes both copies anew"
    with opened(pools.mount(pool).device) as fd:
        assert os.pread(fd, 4, 0) == b"data"


@pytest.mark.parametrize(
    ("how", "code", "word"), [("torn", 4, "checksum"), ("random", 8, "no label")]
)
def test_two_bad_copies_are_refused(pools: PoolMaker, how: str, code: int, word: str) -> None:
    pool = pools.create(size="16M")
    for offset in COPIES.values():
        scribble(pool, offset, how)
    before = pool.read_bytes()
    for options in ("rw", "ro"):
        refused(pmemfs("mount", pool, pools.mountpoint(), "-o", options), 32, str(pool), word)
    refused(pmemfs("info", pool), 4, word)
    assert pool.read_bytes() == before
    checked = check(pool)
    assert checked.code == code
    assert word in checked.out + checked.err


@pytest.mark.slow
def test_check_of_a_pool_that_is_well_finds_nothing(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    assert check(pool).code == 0
    mounted = pools.mount(pool)
    session = Session.of(mounted)
    refused(pmemfs("check", pool), 8, "in use", str(session.pid))
    session.kill()
    checked = check(pool)
    assert checked.code == 0
    assert "not cleanly unmounted" in checked.out
    pools.umount(pools.mount(pool))
    assert "clean" in check(pool).out


@pytest.mark.slow
def test_check_of_what_is_no_pool_can_not_be_done(shm: Path) -> None:
    (shm / "zeroes").write_bytes(bytes(MIB))
    (shm / "empty").touch()
    for name in ("zeroes", "empty", "missing", "."):
        refused(pmemfs("check", shm / name), 8)
    assert pmemfs("check").code == 2
    # And --json says nothing that is no JSON.
    assert not pmemfs("check", shm / "zeroes", "--json").out


def test_check_of_a_truncated_pool_finds_it(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    os.truncate(pool, 8 * MIB)
    checked = check(pool)
    assert checked.code == 4
    assert "cut off" in checked.out


def test_nobody_is_led_to_make_a_new_pool_where_both_labels_are_lost(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    for offset in COPIES.values():
        scribble(pool, offset, "zero")
    for command, code in ((("info",), 4), (("check",), 8), (("mount", pools.mountpoint()), 32)):
        refused(pmemfs(command[0], pool, *command[1:]), code, "destroys", "both copies")
