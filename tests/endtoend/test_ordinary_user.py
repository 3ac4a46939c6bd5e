"""An ordinary user, with fusermount3: a pool of one's own, mounted and used without root."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import BIN, Result, refused
from kit.mounts import PoolMaker
from kit.namespaces import Run
from kit.processes import is_running
from kit.users import NOBODY
from pmemfs.control.places import private_directories

pytestmark = pytest.mark.mount


def succeed(result: Result) -> str:
    assert result.code == 0, result
    return result.out


@pytest.mark.slow
def test_a_user_makes_mounts_uses_and_unmounts_a_pool(pools: PoolMaker, user: Run) -> None:
    pmemfs = BIN / "pmemfs"
    home = pools.directory / "home"
    pool, mountpoint = home / "pmem0", home / "mnt"
    succeed(user("mkdir", mountpoint))
    succeed(user(pmemfs, "create", pool, "--size", "16M"))
    assert pool.stat().st_uid == NOBODY
    succeed(user(pmemfs, "mount", pool, mountpoint))

    device = mountpoint / "pmem0"
    assert succeed(user("stat", "-c", "%u %g %a", device)).split() == ["65534", "65534", "600"]
    random = home / "random"
    random.write_bytes(os.urandom(1 << 20))
    os.chown(random, NOBODY, NOBODY)
    succeed(user("dd", f"if={random}", f"of={device}", "bs=64k", "conv=notrunc,fsync"))
    succeed(user("cmp", f"--bytes={1 << 20}", random, device))

    status = json.loads(succeed(user(pmemfs, "info", mountpoint, "--json")))
    assert status["io"]["written_bytes"] == 1 << 20
    assert json.loads(succeed(user(pmemfs, "pages", pool, "--json")))["counts"]["referenced"] == 256
    assert status["pid"] in [
        mount.get("pid") for mount in json.loads(succeed(user(pmemfs, "list", "--json")))
    ]
    # Another test's mounts of this user have theirs there, too.
    sockets = Path(next(private_directories(NOBODY)))
    socket = sockets / f"{status['device']}.sock"
    made_ns = socket.stat().st_mtime_ns
    assert sockets.stat().st_mode & 0o077 == 0

    # Nobody but root can make it appear elsewhere, too.
    succeed(user("mkdir", home / "other"))
    again = user(pmemfs, "mount", pool, home / "other")
    refused(again, 32, str(mountpoint), "root may run 'mount --bind")

    succeed(user(pmemfs, "umount", mountpoint))
    with suppress(FileNotFoundError):
        # The next mount may have got the number.
        assert socket.stat().st_mtime_ns != made_ns
    assert not is_running(status["pid"])
    assert succeed(user("ls", mountpoint)) == ""
    assert succeed(user(pmemfs, "check", pool))
    info = json.loads(succeed(user(pmemfs, "info", pool, "--json")))
    assert info["pool"]["state"] == "clean"


@pytest.mark.slow
def test_a_user_has_encrypted_directories_and_keys_that_outlive_a_daemon(
    pools: PoolMaker, user: Run
) -> None:
    pmemfs = BIN / "pmemfs"
    home = pools.directory / "home"
    pool, mountpoint, key_file = home / "fs0", home / "mnt", home / "key"
    key_file.write_bytes(os.urandom(64))
    os.chown(key_file, NOBODY, NOBODY)
    succeed(user("mkdir", mountpoint))
    succeed(user(pmemfs, "create", pool, "--size", "32M", "--mode", "fs"))
    succeed(user(pmemfs, "mount", pool, mountpoint, "-o", "keeper"))
    unlocking = ("--key-file", key_file)
    succeed(user(pmemfs, "key", "add", mountpoint, "--name", "work", *unlocking))
    directory, copy = mountpoint / "private", mountpoint / "private" / "copy"
    succeed(user("mkdir", directory))
    succeed(user(pmemfs, "encrypt", directory, "--key", "work"))
    succeed(user("cp", key_file, copy))
    status = json.loads(succeed(user(pmemfs, "info", mountpoint, "--json")))
    for whose in ("pid", "data_plane_pid"):
        os.kill(status[whose], signal.SIGKILL)
    succeed(user("cmp", key_file, copy))
    succeed(user(pmemfs, "lock", directory))
    assert user("cmp", key_file, copy).code != 0
    succeed(user(pmemfs, "unlock", directory, *unlocking))
    succeed(user("cmp", key_file, copy))
    refused(user(pmemfs, "lock", mountpoint), 1, "is not encrypted")
    succeed(user(pmemfs, "umount", mountpoint))
    info = json.loads(succeed(user(pmemfs, "info", pool, "--json")))
    assert info["pool"]["state"] == "clean"


@pytest.mark.slow
def test_a_user_may_not_do_what_is_for_root(pools: PoolMaker, user: Run) -> None:
    pmemfs = BIN / "pmemfs"
    home = pools.directory / "home"
    mountpoint = home / "mnt"
    succeed(user("mkdir", mountpoint))
    roots = pools.create("roots", "16M")
    roots.chmod(0o600)
    refused(user(pmemfs, "mount", roots, mountpoint), 32, "permission denied")
    refused(user(pmemfs, "check", roots), 8, "permission denied")

    succeed(user(pmemfs, "create", home / "pmem0", "--size", "16M"))
    elsewhere = pools.mountpoint("roots")
    refused(user(pmemfs, "mount", home / "pmem0", elsewhere), 32, str(elsewhere))
    if "user_allow_other" not in Path("/etc/fuse.conf").read_text().split("\n"):
        refused(
            user(pmemfs, "mount", home / "pmem0", mountpoint, "-o", "allow_other"),
            32,
            "user_allow_other",
        )
    assert "clean" in succeed(user(pmemfs, "info", home / "pmem0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "squat", ["mkdir {0}", "touch {0}", "ln -s /dev/shm {0}"], ids=["directory", "file", "link"]
)
def test_a_user_whose_place_for_sockets_is_taken_has_another(
    pools: PoolMaker, inside: Run, user: Run, squat: str
) -> None:
    pmemfs = BIN / "pmemfs"
    home = pools.directory / "home"
    pool, mountpoint = home / "pmem0", home / "mnt"
    taken = f"/tmp/pmemfs-{NOBODY}"
    succeed(inside("mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/tmp"))
    succeed(inside(*squat.format(taken).split()))
    succeed(user("mkdir", mountpoint))
    succeed(user(pmemfs, "create", pool, "--size", "16M"))
    succeed(user(pmemfs, "mount", pool, mountpoint))
    try:
        status = json.loads(succeed(user(pmemfs, "info", mountpoint, "--json")))
        (row,) = (
            row
            for row in json.loads(succeed(inside(pmemfs, "list", "--json")))
            if row["mountpoint"] == str(mountpoint)
        )
        # Root, too, finds it there, and whose it is.
        assert (row["pid"], row["owner_uid"]) == (status["pid"], NOBODY)
        assert succeed(user("find", "/tmp", "-name", "*.sock")).startswith(f"{taken}-")
        assert json.loads(succeed(inside(pmemfs, "info", pool, "--json")))["pid"] == status["pid"]
    finally:
        succeed(user(pmemfs, "umount", mountpoint))
    assert not is_running(status["pid"])
    assert succeed(user("find", "/tmp", "-name", "*.sock")) == ""
    (path,) = (home / ".local/state/pmemfs").glob("pmem0-*.log")
    log = path.read_text()
    assert f"{taken} does not belong to user {NOBODY} alone: the control socket gets" in log
    assert "Traceback" not in log
