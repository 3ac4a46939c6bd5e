"""Deaths at bad moments of a mount that is kept: while it begins, ends, grows or is taken over.

PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of once.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, resize
from kit.killing import BOTH, DAEMON, KEPT, PLANE, VICTIMS, Kills, Load, mount_kept, processes_of
from kit.mounts import NATIVE, Mounted, PoolMaker, Session, abort_connection, begin_end, mounts_at
from kit.processes import is_running, wait_until
from pmemfs.logs import log_file
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "1"))
native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)
uring = pytest.mark.parametrize("engine", NATIVE[:1], indirect=True, ids=str)


def kept(pools: PoolMaker, size: str = "64M") -> Mounted:
    """A mount of mode `fs` that outlives its processes."""
    return mount_kept(pools, pools.create("fs0", size, "--mode", "fs"))


def kept_again(pools: PoolMaker, mounted: Mounted) -> None:
    """The mount of its pool anew, which must be as good as ever."""
    mount_kept(pools, mounted.pool)
    assert mounts_at(mounted.mountpoint) == 1
    (mounted.mountpoint / "new").write_bytes(b"new")
    assert (mounted.mountpoint / "new").read_bytes() == b"new"


def assert_gone(pools: PoolMaker, mounted: Mounted) -> None:
    """Nothing is left of a mount, and its pool has no error."""
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert not is_served(mounted)
    assert_sound(mounted.pool)


def assert_sound(pool: Path) -> None:
    """`pmemfs check` finds nothing."""
    checked = pmemfs("check", pool)
    assert checked.code == 0, f"{checked.out}\n{checked.err}"


def is_served(mounted: Mounted) -> bool:
    """Whether it is mounted and calls on it are answered."""
    with suppress(OSError):
        os.listdir(mounted.mountpoint)
        return mount_at(str(mounted.mountpoint)) is not None
    return False


def end_by_signal(pools: PoolMaker) -> None:
    """Send SIGTERM to whatever is the daemon by now, as somebody does who repeats it."""

    def ask() -> bool:
        found = processes_of(pools.directory)
        for pid, kind in found.items():
            if kind == DAEMON:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        return not found

    wait_until(ask, "all of its processes have ended")


def victim_of(found: dict[int, str], chance: random.Random) -> int | None:
    """One of these processes, if there are any."""
    return chance.choice(sorted(found)) if found else None


@uring
def test_a_kill_while_it_is_mounted_leaves_a_mount_or_nothing(pools: PoolMaker) -> None:
    chance, pool = random.Random(3), pools.create("fs0", "64M", "--mode", "fs")
    mounted = Mounted(pool, pools.mountpoint("of-fs0"))
    command = [str(BIN / "pmemfs"), "mount", str(pool), str(mounted.mountpoint), *KEPT]
    killed = 0

    def others(mounting: subprocess.Popen[str]) -> dict[int, str]:
        """The processes beside the command."""
        return {pid: it for pid, it in processes_of(pools.directory).items() if pid != mounting.pid}

    for _ in range(4 * ROUNDS):
        mounting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        # How soon it starts anybody depends on how busy the machine is.
        wait_until(lambda: others(mounting) or mounting.poll() is not None, "it is under way")  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.5))
        if victim := victim_of(others(mounting), chance):
            killed += 1
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        _, said = mounting.communicate(timeout=60)
        if mounting.returncode == 0:
            wait_until(lambda: is_served(mounted), "it is served")
            (mounted.mountpoint / "file").write_bytes(b"there")
            assert (mounted.mountpoint / "file").read_bytes() == b"there"
            assert pmemfs("umount", mounted.mountpoint).code == 0
        else:
            assert said.startswith("pmemfs: ") or "pmemfs" in said, said
            assert "Traceback" not in said, said
        assert_gone(pools, mounted)
        assert mount_at(str(mounted.mountpoint)) is None
    assert killed


@native
@pytest.mark.parametrize("how", ["umount", "signal", "abort"])
def test_a_kill_while_it_ends_leaves_nothing(pools: PoolMaker, how: str) -> None:
    chance, mounted = random.Random(5), kept(pools)
    for number in range(ROUNDS):
        (mounted.mountpoint / f"file{number}").write_bytes(b"x" * 100_000)
        session, plane = Session.of(mounted), mounted.data_plane_pid
        begin_end(mounted, how)
        time.sleep(chance.uniform(0.0, 0.05))
        with suppress(ProcessLookupError):
            os.kill(chance.choice([session.pid, plane]), signal.SIGKILL)
        wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
        if how == "umount":
            assert not session.is_mounted
        assert_sound(mounted.pool)
        kept_again(pools, mounted)
        for other in range(number + 1):
            assert (mounted.mountpoint / f"file{other}").stat().st_size == 100_000


@native
@pytest.mark.parametrize("how", ["umount", "signal", "abort"])
@pytest.mark.parametrize("victim", [DAEMON, PLANE])
def test_what_ends_a_mount_ends_it_though_a_process_has_just_died(
    pools: PoolMaker, tmp_path: Path, victim: str, how: str
) -> None:
    chance, mounted = random.Random(7), kept(pools)
    for _ in range(ROUNDS):
        (mounted.mountpoint / "new").write_bytes(b"new")
        planes = Kills(mounted, Load(tmp_path)).planes()
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None
        for pid in planes.pids(victim):
            os.kill(pid, signal.SIGKILL)
        time.sleep(chance.choice([0.0, chance.uniform(0.0, 0.4)]))
        if how == "signal":
            end_by_signal(pools)
        elif how == "abort":
            abort_connection(mount)
        else:
            assert pmemfs("umount", mounted.mountpoint).code == 0
        wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
        assert_sound(mounted.pool)
        kept_again(pools, mounted)


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_pool_that_grows_is_sound_after_a_death(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    chance, mounted = random.Random(11), kept(pools)
    kills, size = Kills(mounted, Load(tmp_path)), 64
    (mounted.mountpoint / "file").write_bytes(b"f" * MIB)
    for _ in range(ROUNDS):
        size += 64
        growing = threading.Thread(
            target=pmemfs, args=("resize", mounted.pool, "--size", f"{size}M")
        )
        growing.start()
        kills.kill(victim, wait=chance.choice([0.02, 0.3]))
        growing.join()
        _, new_bytes = resize(mounted.pool, f"{size}M")
        assert new_bytes == size * MIB
        assert (mounted.mountpoint / "file").read_bytes() == b"f" * MIB
    pools.umount(mounted)
    assert_gone(pools, mounted)


@native
def test_a_mount_goes_on_without_its_keeper(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = kept(pools)
    kills = Kills(mounted, Load(tmp_path))
    keeper = mounted.info()["kept"]["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not is_running(keeper), "it is dead")
    (mounted.mountpoint / "file").write_bytes(b"there")
    wait_until(lambda: "keeper" in log_file(str(mounted.pool)).read_text(), "the log tells of it")
    for _ in range(ROUNDS):
        kills.kill(PLANE)
        assert (mounted.mountpoint / "file").read_bytes() == b"there"
    session = Session.of(mounted)
    session.kill()
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert not is_served(mounted)
    kept_again(pools, mounted)
    assert (mounted.mountpoint / "file").read_bytes() == b"there"


@uring
def test_no_caller_waits_for_ever_if_all_die_while_a_data_plane_begins(pools: PoolMaker) -> None:
    mounted = kept(pools)
    session = Session.of(mounted)
    plane = stopped_while_asked(mounted)
    os.kill(plane, signal.SIGKILL)
    session.kill()
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert not is_served(mounted)
    kept_again(pools, mounted)


def stopped_while_asked(mounted: Mounted) -> int:
    """Stop the daemon while a new data plane asks the mount, in processes of its own, which then
    wait for the daemon; the data plane."""
    daemon = mounted.pid
    while True:
        before = set(children_of(daemon))
        os.kill(mounted.data_plane_pid, signal.SIGKILL)
        wait_until(lambda: set(children_of(daemon)) - before, "there is another data plane")  # noqa: B023
        os.kill(daemon, signal.SIGSTOP)
        (plane,) = set(children_of(daemon)) - before
        for _ in range(200):
            if children_of(plane):
                return plane
            time.sleep(0.01)
        # It was stopped before the data plane had what it needs of it.
        os.kill(daemon, signal.SIGCONT)
        wait_until(lambda: mounted.data_plane_pid == plane, "it is served")  # noqa: B023


def children_of(pid: int) -> list[int]:
    """The living children of a process, whichever of its threads has started them."""
    found: list[int] = []
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return [child for child in found if is_running(child)]


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_full_pool_is_served_again(pools: PoolMaker, tmp_path: Path, victim: str) -> None:
    mounted = kept(pools, "16M")
    kills = Kills(mounted, Load(tmp_path))
    count = 0
    with suppress(OSError):
        while True:
            (mounted.mountpoint / f"file{count}").write_bytes(b"x" * 100_000)
            count += 1
    (mounted.mountpoint / f"file{count}").unlink(missing_ok=True)
    with suppress(OSError), (mounted.mountpoint / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(b"y" * 4096)
    for number in range(ROUNDS):
        kills.kill(victim)
        with pytest.raises(OSError, match="No space left"):
            (mounted.mountpoint / "rest").open("ab", buffering=0).write(b"z" * 100_000)
        (mounted.mountpoint / f"file{number}").unlink()
        assert (mounted.mountpoint / f"file{count - 1}").read_bytes() == b"x" * 100_000
        (mounted.mountpoint / f"again{number}").write_bytes(b"w" * 90_000)
        with suppress(OSError), (mounted.mountpoint / "rest").open("ab", buffering=0) as rest:
            while True:
                rest.write(b"y" * 4096)
    pools.umount(mounted)
    assert_gone(pools, mounted)


@native
def test_a_daemon_that_dies_again_and_again_is_given_up(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = kept(pools)
    kills = Kills(mounted, Load(tmp_path))
    for _ in range(5):
        kills.kill(DAEMON, wait=0)
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert not is_served(mounted)
    assert "has died 6 times within a minute" in log_file(str(mounted.pool)).read_text()
    kept_again(pools, mounted)


@native
@pytest.mark.parametrize("victim", [DAEMON, BOTH])
def test_a_successor_that_is_killed_while_it_takes_over_has_a_successor(
    pools: PoolMaker, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")
    chance, mounted = random.Random(13), kept(pools, "128M")
    load = Load(tmp_path, cancels=pools.engine.transport == "uring")
    kills = Kills(mounted, load)
    with load.working():
        load.add_file_system(mounted.mountpoint)
        for _ in range(ROUNDS):
            planes = kills.planes()
            for pid in planes.pids(victim):
                os.kill(pid, signal.SIGKILL)
            for _ in range(2):
                time.sleep(chance.uniform(0.0, 0.3))
                for pid, kind in processes_of(pools.directory).items():
                    if kind == DAEMON or (kind == PLANE and victim == BOTH):
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            kills.planes(lambda now, dead=planes.daemon: now.daemon != dead)  # type: ignore[misc]
    assert load.outcome.wrong == []
    pools.umount(mounted)
    assert_gone(pools, mounted)
