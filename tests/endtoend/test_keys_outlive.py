"""Keys outlive the processes of a mount, end with the mount, and get into no file on the way."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs_here, pmemfs_ok
from kit.fs_mounts import create_fs
from kit.keys import SecretMemory, add_key, encrypted, new_key_file, states, told
from kit.killing import BOTH, DAEMON, PLANE, VICTIMS, mount_kept
from kit.mounts import Engine, Mounted, PoolMaker, native_only
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.errors import PmemfsError
from pmemfs.logs import log_file

pytestmark = [pytest.mark.mount, pytest.mark.slow]

CONTENT = b"the plain content of a file, in a line that occurs nowhere else; "
NAME, TARGET, VALUE = "a-very-telling-name-of-a-file", "the-target-of-a-link", b"value-of-an-xattr"
ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "6"))
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def processes(mounted: Mounted) -> dict[str, int]:
    info = mounted.info()
    pids = {DAEMON: info["pid"], PLANE: info["data_plane_pid"]}
    if info["kept"]:
        pids["keeper"] = info["kept"]["keeper_pid"]
    return {name: pid for name, pid in pids.items() if pid}


def kill(mounted: Mounted, victim: str, number: int = signal.SIGKILL) -> None:
    """Kill a process, or both, and wait for the successors."""
    before = processes(mounted)
    dead = {before[name] for name in ((DAEMON, PLANE) if victim == BOTH else (victim,))}
    for pid in dead:
        os.kill(pid, number)

    def is_served() -> bool:
        with suppress(OSError, PmemfsError, AssertionError):
            return not dead & set(processes(mounted).values())
        return False

    wait_until(is_served, "successors serve")


def write_all(directory: Path) -> None:
    """A file that is published, a name, a link and an attribute."""
    path = directory / NAME
    path.write_bytes(CONTENT * 5000)
    with opened(path) as fd:
        for at in range(8):
            os.pwrite(fd, CONTENT, at * len(CONTENT))
        os.fsync(fd)
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
    (directory / "link").symlink_to(TARGET)
    os.setxattr(path, "user.telling", VALUE)
    (directory / "below").mkdir()
    (directory / "below" / NAME).write_bytes(CONTENT)


@native_only
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_asks_nobody_for_a_key_and_an_open_file_goes_on(
    pools: PoolMaker, victim: str
) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    add_key(mounted)
    add_key(mounted, "locked")
    pmemfs_here("lock", mounted.mountpoint, "--key", "locked")
    directory = encrypted(mounted)
    write_all(directory)
    with opened(directory / NAME) as fd:
        for number in range(3):
            assert os.pread(fd, len(CONTENT), len(CONTENT) * number) == CONTENT
            os.pwrite(fd, b"%07d" % number, 4096 * number + 3)
            kill(mounted, victim)
            assert os.pread(fd, 7, 4096 * number + 3) == b"%07d" % number
            assert states(mounted) == {"work": True, "locked": False}
        os.fsync(fd)
    (directory / "new").write_bytes(CONTENT)
    assert (directory / "new").read_bytes() == CONTENT
    assert os.readlink(directory / "link") == TARGET
    assert os.getxattr(directory / NAME, "user.telling") == VALUE
    pmemfs_ok("lock", directory)
    kill(mounted, victim)
    assert states(mounted) == {"work": False, "locked": False}
    pools.umount(mounted)
    assert "no errors" in pmemfs_here("check", mounted.pool)


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no mount end because its processes die so often."""
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000")


@native_only
def test_a_kill_while_a_key_is_locked_or_unlocked_leaves_it_one_or_the_other(
    pools: PoolMaker,
) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    path = add_key(mounted)
    directory = encrypted(mounted)
    for number in range(200):
        (directory / f"file {number}").write_bytes(CONTENT)
    memory, chance = SecretMemory(mounted), random.Random(1)
    asked = {"lock": ("lock", directory), "unlock": ("unlock", directory, "--key-file", path)}
    for number in range(ROUNDS):
        what = ("lock", "unlock")[number % 2]
        words = [BIN / "pmemfs", *map(str, asked[what])]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as asking:
            time.sleep(chance.uniform(0.05, 0.15))
            kill(mounted, chance.choice(VICTIMS))
            said = asking.communicate()[0]
        # Whoever was answered was told the truth; who was not may ask again.
        if asking.returncode:
            pmemfs_ok(*asked[what])
        assert states(mounted) == {"work": what == "unlock"}, said
        names = sorted(os.listdir(directory))
        if what == "lock":
            assert memory.keys() == []
            assert len(names) == 200
            assert "file 7" not in names
        else:
            assert names == sorted(f"file {number}" for number in range(200))
            assert (directory / "file 7").read_bytes() == CONTENT
    memory.close()


@native_only
def test_a_kill_while_a_passphrase_is_changed_answers_as_without_it(pools: PoolMaker) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    told(["phrase 0"], "key", "add", mounted.mountpoint, "--name", "work")
    directory = encrypted(mounted)
    chance = random.Random(2)
    words = [BIN / "pmemfs", "key", "change", mounted.mountpoint, "--name", "work"]
    for number in range(ROUNDS // 3):
        new = f"phrase {number + 1}"
        for old, code in (("a wrong one", 1), (f"phrase {number}", 0), (f"phrase {number}", 1)):
            with subprocess.Popen(
                list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            ) as asking:  # fmt: skip
                assert asking.stdin is not None
                asking.stdin.write(f"{old}\n{new}\n")
                asking.stdin.close()
                time.sleep(chance.uniform(0.3, 2))
                kill(mounted, DAEMON)
                assert asking.stdout is not None
                said = asking.stdout.read()
            assert asking.returncode == code, said
        pmemfs_ok("lock", directory)
        assert told([f"phrase {number}"], "unlock", directory).code == 1
        assert told([new], "unlock", directory).code == 0


@native_only
def test_a_kill_while_a_way_is_added_or_removed_answers_as_without_it(pools: PoolMaker) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    add_key(mounted)
    second = new_key_file(mounted.pool.parent, "second")
    chance = random.Random(3)
    for what, left in (("add", "2 ways"), ("remove", "1 way")) * (ROUNDS // 3):
        words = [BIN / "pmemfs", "key", what, mounted.mountpoint, "--name", "work",
                 "--key-file", second]  # fmt: skip
        with subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as asking:
            time.sleep(chance.uniform(0.1, 0.4))
            kill(mounted, DAEMON)
            assert asking.stdout is not None
            said = asking.stdout.read()
        assert said == f"the key 'work' can be unlocked in {left} now\n"
        assert states(mounted) == {"work": True}


@native_only
def test_an_upgrade_passes_keys_on(pools: PoolMaker) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    add_key(mounted)
    directory = encrypted(mounted)
    write_all(directory)
    before = set(processes(mounted).values())
    with opened(directory / NAME) as fd:
        pmemfs_ok("upgrade", mounted.mountpoint)
        assert not before & set(processes(mounted).values())
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
        os.pwrite(fd, b"upgraded", 5)
    assert states(mounted) == {"work": True}
    for victim in VICTIMS:
        kill(mounted, victim)
        assert (directory / NAME).read_bytes()[5:13] == b"upgraded"
    assert filters(mounted) == {0}


def filters(mounted: Mounted) -> set[int]:
    pids = processes(mounted).values()
    return {int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) for pid in pids}


@native_only
def test_no_successor_has_memory_of_keys_in_a_core_file(pools: PoolMaker) -> None:
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    add_key(mounted)
    for victim in (*VICTIMS, *VICTIMS):
        assert filters(mounted) == {0}
        kill(mounted, victim)
    assert filters(mounted) == {0}


@pytest.fixture
def mounted(engine: Engine, pools: PoolMaker) -> Mounted:
    return pools.mount(create_fs(pools, "fs0", "64M"))


def test_a_lock_and_an_unmount_overwrite_all_keys(pools: PoolMaker, mounted: Mounted) -> None:
    # A machine can't hibernate while there is such memory, so a mount without keys has none.
    assert SecretMemory.descriptors(mounted.pid) == []
    path = add_key(mounted)
    memory = SecretMemory(mounted)
    directory = encrypted(mounted)
    write_all(directory)
    # Of the master, of a file, of names, of values.
    assert len(memory.keys()) >= 4
    pmemfs_here("lock", directory)
    assert memory.keys() == []
    pmemfs_here("unlock", directory, "--key-file", path)
    assert (directory / NAME).read_bytes() == CONTENT * 5000
    assert len(memory.keys()) >= 3
    pools.umount(mounted)
    assert memory.keys() == []
    memory.close()


@contextmanager
def core_files_in(directory: Path) -> Iterator[None]:
    """Meanwhile the kernel writes core files there, named by pid. This is a setting of the whole
    machine, so it is kept for moments only, and by one test at a time."""
    with open("/run/pmemfs-tests-core-pattern", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = CORE_PATTERN.read_text()
        CORE_PATTERN.write_text(f"{directory}/core.%p")
        try:
            yield
        finally:
            CORE_PATTERN.write_text(before)


def needles(memory: SecretMemory) -> dict[str, bytes]:
    """What must be in no file."""
    keys = memory.keys()
    assert len(keys) >= 4
    halves = {f"key {at}": key[:32] for at, key in enumerate(keys)}
    others = {f"other half of key {at}": key[32:] for at, key in enumerate(keys)}
    plain = {"content": CONTENT[:40], "name": NAME.encode(), "target": TARGET.encode()}
    return {**halves, **others, **plain, "value": VALUE}


def assert_without(path: Path, wanted: dict[str, bytes]) -> None:
    raw = path.read_bytes()
    assert raw
    assert [what for what, needle in wanted.items() if needle in raw] == [], path


def test_neither_the_pool_nor_a_log_nor_a_core_file_has_a_key_or_a_plain_byte(
    pools: PoolMaker, mounted: Mounted, engine: Engine, tmp_path: Path
) -> None:
    if not os.access(CORE_PATTERN, os.W_OK):
        pytest.skip("core_pattern can't be set here")
    assert told(["a passphrase to be found"], "key", "add", mounted.mountpoint,
                "--name", "work").code == 0  # fmt: skip
    directory = encrypted(mounted)
    write_all(directory)
    memory = SecretMemory(mounted)
    wanted = {**needles(memory), "passphrase": b"a passphrase to be found"}
    memory.close()
    pids = processes(mounted)
    with opened(directory / NAME) as fd, core_files_in(tmp_path):
        assert os.pread(fd, len(CONTENT), 0) == CONTENT
        for pid in pids.values():
            resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        # The keeper last: without it nobody takes the place of the daemon.
        for pid in pids.values():
            os.kill(pid, signal.SIGABRT)
            wait_until(lambda pid=pid: is_gone(pid), "it has ended, and its core file is written")
    # Another test's process may write one there, too, but has none of these keys.
    all_written = {path.name for path in tmp_path.iterdir()}
    written = all_written & {f"core.{pid}" for pid in pids.values()}
    # The keeper has a descriptor of the keys, and no key.
    assert written == ({f"core.{pids['keeper']}"} if "keeper" in pids else set())
    for name in all_written:
        assert_without(tmp_path / name, wanted)
    assert_without(mounted.pool, wanted)
    assert_without(log_file(str(mounted.pool)), wanted)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_the_search_finds_what_a_core_file_without_protection_has(tmp_path: Path) -> None:
    code = f"kept = {CONTENT!r} * 100; import os; os.abort()"
    with core_files_in(tmp_path):
        limits = (resource.RLIM_INFINITY,) * 2
        with subprocess.Popen(
            ["python3", "-c", code],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, limits),
        ) as process:
            process.wait()
        wait_until(lambda: (tmp_path / f"core.{process.pid}").exists(), "a core file")
    assert CONTENT * 3 in (tmp_path / f"core.{process.pid}").read_bytes()
