"""Root's commands, and what other users make of their mounts: a lie costs its own row alone."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.control_socket import (
    PAGES,
    SAMPLE,
    STATUS,
    answering,
    lies_about,
    result,
    saying,
)
from kit.mounts import Engine, PoolMaker
from kit.processes import stopped
from kit.users import AS_NOBODY, acting_as
from pmemfs.cli.commands import pmemfs as group
from pmemfs.cli.commands import run
from pmemfs.control.places import new_socket_path, private_directories, socket_path
from pmemfs.errors import NoControlSocket
from pmemfs.mountinfo import Mount, mount_at

pytestmark = pytest.mark.mount

UID = 60_000 + os.getpid() % 5000
"""A user that nobody is, another one in each process of the suite."""

LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def claimed(mountpoint: Path, source: str, uid: int, *, options: str = "") -> Iterator[Mount]:
    """A real FUSE mount of a user that says that it is pmemfs, and behind which nobody answers."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        data = f"fd={fd},rootmode=40000,user_id={uid},group_id={uid}{options}"
        words = [os.fsencode(word) for word in (source, mountpoint, "fuse.pmemfs")]
        done = LIBC.mount(*words, ctypes.c_ulong(0), data.encode())
        assert done == 0, os.strerror(ctypes.get_errno())
        mount = mount_at(str(mountpoint))
        assert mount is not None
        assert (mount.owner_uid, mount.is_ours) == (uid, True)
        yield mount
    finally:
        os.close(fd)
        run_command("umount", "--lazy", mountpoint)


@contextmanager
def daemon(path: Path, uid: int, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a user that listens on a socket; the program answers `connection`."""
    lines = [
        "import os, socket, sys, time",
        "listener = socket.socket(socket.AF_UNIX)",
        f"listener.bind({str(path)!r})",
        "listener.listen(16)",
        "sys.stdout.write('.'); sys.stdout.flush()",
        "while True:",
        "    connection = listener.accept()[0]",
        "    try:",
        f"        connection.recv(65536); {program}",
        "    except OSError:",
        "        pass",
        "    connection.close()",
    ]
    process = subprocess.Popen(
        ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--",
         "/usr/bin/env", "python3", "-c", "\n".join(lines)],
        stdout=subprocess.PIPE, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.read(1) == b"."
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """The directory in /tmp of a user that nobody is."""
    directory = Path(f"/tmp/pmemfs-{UID}")
    directory.mkdir(mode=0o700)
    os.chown(directory, UID, UID)
    try:
        yield directory
    finally:
        run_command("rm", "-rf", directory)


def sayer(answer: bytes) -> str:
    """The program of a daemon that says just that."""
    return f"connection.sendall({answer!r} + bytes([10]))"


NASTY = "\x1b[2J\nforged /dev/shm/forged /mnt 0 1GiB pmem native 7 mounted\r\u202e"


def status(**changes: object) -> bytes:
    changed = {**STATUS, "pool": {**STATUS["pool"], "path": NASTY, "name": NASTY}}  # type: ignore[dict-item]
    return result({**changed, **changes})


def listed() -> dict[str, dict[str, object]]:
    return {entry["mountpoint"]: entry for entry in json.loads(pmemfs_ok("list", "--json"))}


@pytest.mark.slow
def test_each_liar_costs_one_row_of_roots_list(pools: PoolMaker, place: Path) -> None:
    alive = pools.mount(pools.create("alive", "16M"))
    lies = {
        "json": sayer(b"{"),
        "deep": sayer(b'{"result": ' + b"[" * 100_000),
        "keys": sayer(b'{"result": {}}'),
        "shape": sayer(status(pool=None)),
        "bytes": "[(connection.sendall(b' '), time.sleep(1)) for _ in range(1000)]",
        "endless": "[connection.sendall(b'x' * 1000000) for _ in range(1200)]",
        "silent": "time.sleep(1000)",
        "nasty": sayer(status()),
        "failed": sayer(json.dumps({"error": {"message": NASTY, "exit_code": 0}}).encode()),
    }
    with ExitStack() as stack:
        mounts = {}
        for name, program in lies.items():
            mountpoint = pools.directory / f"{name}\x1b[31m\n"
            mount = stack.enter_context(claimed(mountpoint, f"{NASTY}{name}", UID))
            stack.enter_context(daemon(place / f"{mount.device}.sock", UID, program))
            mounts[name] = mount
        rows = listed()
        assert rows[str(alive.mountpoint)]["pid"] == alive.pid
        for name, mount in mounts.items():
            row = rows[mount.mountpoint]
            assert row["owner_uid"] == UID
            assert row["state"] == ("mounted" if name == "nasty" else "no answer"), name
        # Its own word about its process, 1, doesn't count.
        assert rows[mounts["nasty"].mountpoint]["pid"] != 1
        shown = pmemfs_ok("list").rstrip("\n").split("\n")
        assert all(line.isprintable() for line in shown)
        ours = [line for line in shown if str(pools.directory) in line]
        assert len(ours) == len(lies) + 1
        assert not any(line.startswith("forged") for line in shown)
        for name, mount in mounts.items():
            if name not in ("bytes", "silent"):
                done = pmemfs("info", mount.mountpoint)
                assert done.code == (0 if name == "nasty" else 1), (name, done)
                assert all(
                    line.isprintable() for line in (done.out + done.err).rstrip("\n").split("\n")
                )
                if done.code:
                    refused(done, 1)
        for mount in mounts.values():
            run_command("umount", "--lazy", mount.mountpoint)


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_a_line_of_a_gigabyte_takes_no_memory_of_roots_commands(
    pools: PoolMaker, place: Path
) -> None:
    program = "[connection.sendall(b'x' * 1000000) for _ in range(1200)]"
    with (
        claimed(pools.directory / "endless", "/dev/shm/x", UID) as mount,
        daemon(place / f"{mount.device}.sock", UID, program),
    ):
        for words in (["list"], ["info", mount.mountpoint], ["stat", mount.mountpoint]):
            # Through a small process: what a process took before its exec counts as its own.
            said = run_command(sys.executable, "-c", MEASURE, BIN / "pmemfs", *words)
            assert int(said.out) < 120_000, words


@pytest.mark.parametrize(
    ("words", "report"),
    [(["info"], STATUS), (["stat", "--per-cpu", "--latency"], SAMPLE), (["pages"], PAGES)],
    ids=["info", "stat", "pages"],
)
def test_no_lie_makes_a_traceback_of_a_command(
    pools: PoolMaker, words: list[str], report: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lies = lies_about(report)
    current = [b""]
    with claimed(pools.directory / "liar", "/dev/shm/x", 0) as mount:
        path = Path(socket_path(mount))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            with answering(path, lambda connection: saying(current[0])(connection)):
                for lie in lies:
                    current[0] = lie
                    for more in ([], ["--json"]):
                        code = run(group, [*words, mount.mountpoint, *more])
                        shown = capsys.readouterr()
                        assert code in (0, 1), lie
                        said = '{"error": "NoAnswer"' if more else "pmemfs: the daemon of "
                        assert (code == 1) == shown.err.startswith(said), lie
                        assert all(line.isprintable() for line in shown.out.split("\n"))
        finally:
            path.unlink(missing_ok=True)


@pytest.mark.slow
def test_stopped_daemons_are_rows_without_an_answer(pools: PoolMaker) -> None:
    alive = pools.mount(pools.create("alive", "16M"))
    silent = [pools.mount(pools.create(name, "16M")) for name in ("one", "two")]
    pids = [mounted.pid for mounted in silent]
    with stopped(*pids):
        rows = listed()
        assert rows[str(alive.mountpoint)]["state"] == "mounted"
        for mounted in silent:
            assert rows[str(mounted.mountpoint)]["state"] == "no answer"
    assert listed()[str(silent[0].mountpoint)]["pid"] == pids[0]


def test_a_pool_is_not_looked_for_in_a_mount_that_only_claims_its_name(
    pools: PoolMaker, place: Path
) -> None:
    pool = pools.create("roots", "16M")
    with (
        claimed(pools.directory / "claim", str(pool), UID) as mount,
        daemon(place / f"{mount.device}.sock", UID, sayer(status(engine="python"))),
    ):
        assert json.loads(pmemfs_ok("info", pool, "--json"))["pool"]["name"] == "roots"
        refused(pmemfs("umount", pool), 32, "is not mounted")
        refused(pmemfs("stat", pool), 1, "is not mounted")
        assert "24MiB now" in pmemfs_ok("resize", pool, "--size", "24M")
        mounted = pools.mount(pool)
        assert mounted.info()["engine"] == "native"
        assert json.loads(pmemfs_ok("info", pool, "--json"))["pool"]["name"] == "roots"
        pmemfs_ok("umount", pool)
        # The owner of a pool's file is believed.
        os.chown(pool, UID, UID)
        assert json.loads(pmemfs_ok("info", pool, "--json"))["engine"] == "python"


def test_root_opens_nothing_that_another_users_daemon_names(pools: PoolMaker, place: Path) -> None:
    named = {**STATUS["pool"], "path": "/nowhere/at/all"}  # type: ignore[dict-item]
    with (
        claimed(pools.directory / "claim", "/nowhere/at/all", UID) as mount,
        daemon(place / f"{mount.device}.sock", UID, sayer(status(pool=named))) as process,
    ):
        threading.Timer(3, process.kill).start()
        done = pmemfs("umount", mount.mountpoint)
        assert (done.code, done.err) == (0, "")


# A place that somebody else has taken


def squatters(path: Path) -> Iterator[str]:
    """The ways to take a path before its owner does, one after the other."""
    path.write_text("")
    yield "a file"
    path.unlink()
    path.symlink_to("/dev/shm")
    yield "a link"
    path.unlink()
    path.mkdir(mode=0o777)
    yield "a directory of somebody else"
    os.chown(path, UID, UID)
    path.chmod(0o777)
    yield "one that all may write to"
    path.rmdir()


def test_a_taken_place_gives_way_to_another_that_both_sides_find(
    caplog: pytest.LogCaptureFixture,
) -> None:
    squatted = Path(f"/tmp/pmemfs-{UID}")
    mount = Mount("0:4095", "/mnt", "fuse.pmemfs", "/dev/shm/x", f"rw,user_id={UID},group_id={UID}")
    places = set()
    theirs = Path(f"/tmp/pmemfs-{UID}-theirs")
    theirs.mkdir(mode=0o700)
    try:
        for what in squatters(squatted):
            with acting_as(UID), socket.socket(socket.AF_UNIX) as listener:
                path = Path(new_socket_path(mount))
                assert path.parent not in (squatted, theirs), what
                assert path.parent.stat().st_mode & 0o777 == 0o700
                listener.bind(str(path))
                assert socket_path(mount) == str(path)
            assert socket_path(mount) == str(path)
            assert f"{squatted}" in caplog.text
            path.unlink()
            places.add(path.parent)
        assert len(places) == 1, "the place is used again"
        assert not any(record.exc_info for record in caplog.records)
        # Where the name is free, it is what it has always been.
        with acting_as(UID):
            assert Path(new_socket_path(mount)).parent == squatted
    finally:
        for directory in (squatted, theirs, *places):
            run_command("rm", "-rf", directory)


def test_who_may_not_ask_a_daemon_is_told_that(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    command = [str(BIN / "pmemfs")]
    rows = json.loads(run_command(*AS_NOBODY, *command, "list", "--json").out)
    states = {row["mountpoint"]: row["state"] for row in rows}
    assert states[str(mounted.mountpoint)] == "no permission"
    for name in ("info", "stat", "pages"):
        done = run_command(*AS_NOBODY, *command, name, mounted.mountpoint)
        refused(done, 1, "belongs to user 0", str(mounted.mountpoint), "only that user")
    for target in (mounted.mountpoint, mounted.pool):
        done = run_command(*AS_NOBODY, *command, "umount", target)
        refused(done, 32, "belongs to user 0", str(mounted.mountpoint), "only that user")


def test_a_place_behind_somebodys_fuse_server_is_not_looked_at(place: Path) -> None:
    """Nobody would ever answer: a look at it ends with the mount, which is what takes the time."""
    other = UID + 5000
    with claimed(place, "/dev/shm/x", other, options=",allow_other") as mount:
        assert str(place) not in list(private_directories(UID))
        rows = listed()
        assert rows[mount.mountpoint]["state"] == "no answer"


def test_roots_place_is_in_no_other(monkeypatch: pytest.MonkeyPatch, shm: Path) -> None:
    mount = Mount("0:4095", "/mnt", "fuse.pmemfs", "/dev/shm/x", "rw,user_id=0,group_id=0")
    assert new_socket_path(mount) == "/run/pmemfs/0:4095.sock"
    monkeypatch.setattr("pmemfs.control.places._ROOTS", str(shm / "taken"))
    (shm / "taken").symlink_to("/tmp")
    with pytest.raises(NoControlSocket, match="belong to user 0 alone"):
        new_socket_path(mount)
