"""Programs that have pages of a mount mapped go on when its processes are killed.

PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pmemfs
from kit.clients import FRAME, assert_clean, free_bytes, hears, program, wait_for_pins, write_file
from kit.commands import BIN
from kit.commands import pmemfs as run_pmemfs
from kit.killing import DAEMON, VICTIMS, Kills, Load, mount_kept
from kit.mounts import NATIVE, Mounted, PoolMaker
from kit.processes import stop, wait_until
from pmemfs.logs import log_file
from pmemfs.medium.writeback import punch_hole

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "2"))
FRAMES = 300
native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)
victims = pytest.mark.parametrize("victim", VICTIMS)


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keeper gives up, however often a test kills."""
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")


def assert_ends_clean(pools: PoolMaker, mounted: Mounted) -> None:
    """Unmount, and look for errors; if there are any, show the log."""
    try:
        assert_clean(pools, mounted)
    except AssertionError as error:
        error.add_note(log_file(str(mounted.pool)).read_text()[-8000:])
        raise


def fill(mountpoint: Path, pattern: int) -> None:
    """Fill all that is free with a pattern, and remove that again."""
    path = mountpoint / "filling"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes([pattern]) * (1 << 20))
        except OSError:
            pass
    path.unlink()


@native
@victims
def test_pages_that_are_mapped_are_given_to_nobody(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    # Before: what is removed is free a moment later.
    free = free_bytes(root)
    fill(root, 0)
    with pmemfs.connect(root) as fs:
        content = write_file(root / "file", FRAMES)
        array = fs.map("file")
        (root / "file").unlink()
        for number in range(ROUNDS):
            kills.kill(victim)
            (pin,) = fs.pins()
            assert (pin.pid, pin.is_stale, pin.page_count) == (os.getpid(), True, FRAMES)
            fill(root, number)
            assert (array == content).all()
            assert pmemfs.pin_of(array).stale
            assert pmemfs.pin_of(array).renamed
        del array
        wait_for_pins(fs, 0)
        # The first look at a directory after a death may give it a frame.
        wait_until(lambda: free_bytes(root) >= free - 8 * FRAME, "its pages are free again")
    assert_ends_clean(pools, mounted)


@native
@victims
def test_stores_go_to_the_file_before_and_after_a_death(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    with pmemfs.connect(root) as fs:
        content = write_file(root / "file", FRAMES)
        with fs.open("file", mode="r+") as mapping:
            array = mapping.array
            for number in range(ROUNDS):
                array[number * FRAME] = content[number * FRAME] = number
                kills.kill(victim)
                array[number * FRAME + 1] = content[number * FRAME + 1] = number + 1
                mapping.flush()
                assert not mapping.pin.stale
                assert not mapping.pin.renamed
                assert (root / "file").read_bytes() == content.tobytes()
                # The connection goes on as well.
                assert (fs.map("file") == content).all()
                assert [pin.is_stale for pin in fs.pins() if pin.writable] == [False]
            os.truncate(root / "file", FRAME)
            assert mapping.pin.stale
            del array
        wait_for_pins(fs, 0)
    assert_ends_clean(pools, mounted)


@native
@victims
def test_a_range_of_a_device_is_zeroed_in_place_after_a_death(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    mounted = mount_kept(pools, pools.create("dev0", "32M"))
    kills, device = Kills(mounted, Load(tmp_path)), mounted.device
    with pmemfs.connect(mounted.mountpoint) as fs, device.open("r+b", buffering=0) as file:
        array = fs.map(device.name, mode="r+", shape=FRAMES * FRAME)
        for number in range(ROUNDS):
            array[:] = number + 1
            kills.kill(victim)
            assert (array == number + 1).all()
            punch_hole(file.fileno(), 0, FRAME * FRAMES // 2)
            assert not array[: FRAME * FRAMES // 2].any()
            array[:FRAME] = 7
            assert os.pread(file.fileno(), FRAME, 0) == bytes([7]) * FRAME
            assert os.pread(file.fileno(), 1, FRAME * FRAMES - 1) == bytes([number + 1])
        del array
        wait_for_pins(fs, 0)
    assert_ends_clean(pools, mounted)


HOLDER = """
import sys
import pmemfs
fs = pmemfs.connect(sys.argv[1])
arrays = [fs.map(name, mode=sys.argv[2]) for name in sys.argv[3:]]
print("mapped", flush=True)
sys.stdin.readline()
if sys.argv[2] == "r":
    assert all((array == array[0]).all() for array in arrays)
del arrays
print("gone", flush=True)
"""


@native
@victims
def test_pins_end_with_their_clients_whenever_these_end(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    for name in ("one", "two"):
        (root / name).write_bytes(bytes([5]) * 10 * FRAME)
    with pmemfs.connect(root) as fs:
        for _ in range(ROUNDS):
            with (
                program(HOLDER, root, "r", "one", "two") as first,
                program(HOLDER, root, "r", "one") as second,
                program(HOLDER, root, "r+", "two") as third,
            ):
                assert [hears(each) for each in (first, second, third)] == ["mapped"] * 3
                assert len(fs.pins()) == 4
                kills.kill(victim)
                assert len(fs.pins()) == 4
                # It is killed while nobody notices.
                planes = kills.planes()
                stop(planes.daemon)
                second.kill()
                second.wait()
                os.kill(planes.daemon, signal.SIGKILL)
                kills.planes(lambda now, before=planes: now.daemon != before.daemon)
                wait_for_pins(fs, 3)
                assert first.stdin is not None
                first.stdin.write("\n")
                first.stdin.flush()
                assert hears(first) == "gone"
                wait_for_pins(fs, 1)
                third.kill()
                wait_for_pins(fs, 0)
    assert run_pmemfs("pages", root, "--pins").code == 0
    assert_ends_clean(pools, mounted)


@native
def test_commands_and_questions_wait_for_the_next_daemon(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    content = write_file(root / "file", FRAMES)
    with pmemfs.connect(root) as fs:
        for _ in range(ROUNDS):
            before = kills.planes()
            os.kill(before.daemon, signal.SIGKILL)
            assert (fs.map("file") == content).all()
            after = mounted.info()["pid"]
            assert after != before.daemon
            os.kill(after, signal.SIGKILL)
            said = run_pmemfs("pages", root, "--pins")
            assert said.code == 0, said.err
        wait_for_pins(fs, 0)
    assert_ends_clean(pools, mounted)


CACHING = """
import sys
import numpy as np
import pmemfs
cache, number, kept = pmemfs.TensorCache(sys.argv[1], capacity="8MiB"), 0, []
print("begun", flush=True)
def value(number): return np.full(3000, number, "i4")
for number in range(1 << 30):
    try:
        cache.put(f"key {number % 40}", value(number))
        found = cache.get(f"key {number % 40}")
        assert found is not None and (found == number).all()
        for back in (1, 17, 39):
            if number > 40:
                other = cache.get(f"key {(number - back) % 40}")
                assert other is None or (other == number - back).all()
                kept = [*kept[-20:], (other, number - back)]
        assert all(array is None or (array == number).all() for array, number in kept)
    except OSError as error:
        # What the kernel was handing to a ring that died.
        if not (sys.argv[2] == "cancels" and error.errno == 125):
            raise
    if number % 10 == 0:
        print(number, flush=True)
"""


@native
@victims
def test_a_cache_of_tensors_goes_on(pools: PoolMaker, tmp_path: Path, victim: str) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills = Kills(mounted, Load(tmp_path))
    cancels = pools.engine.transport == "uring" and victim != DAEMON
    with program(CACHING, mounted.mountpoint / "c", "cancels" if cancels else "") as cache:
        assert hears(cache) == "begun"
        for _ in range(ROUNDS):
            kills.kill(victim)
            for _ in range(4):
                assert hears(cache).isdecimal(), "the program has failed"
    with pmemfs.connect(mounted.mountpoint) as fs:
        wait_for_pins(fs, 0)
    assert_ends_clean(pools, mounted)


CHURNING = """
import errno, os, random, sys, threading
import pmemfs
root, cancels, is_over = sys.argv[1], sys.argv[2] == "cancels", threading.Event()
wrong, rounds = [], [0]

def calling(call, *words):
    while True:
        try:
            return call(*words)
        except OSError as error:
            # What the kernel was handing to a ring that died, it may be done all the same.
            if not (cancels and error.errno == errno.ECANCELED):
                raise

def removed(path):
    try:
        calling(os.unlink, path)
    except FileNotFoundError:
        if not cancels:
            raise

def written(path, pattern, frames):
    fd = -1
    try:
        fd = calling(os.open, path, os.O_CREAT | os.O_RDWR, 0o600)
        calling(os.pwrite, fd, bytes([pattern]) * frames * 4096, 0)
        return True
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    finally:
        if fd >= 0:
            os.close(fd)

def check(array, pattern):
    if not (array == pattern).all():
        wrong.append(f"a page of {pattern} says {set(array.tolist()) - {pattern}}")

def churn(number):
    chance, kept = random.Random(number), []
    while not is_over.is_set() and not wrong:
        path, pattern, frames = f"{root}/{number}", chance.randrange(256), chance.randrange(1, 40)
        if written(path, pattern, frames):
            for mode in chance.choice((["r"], ["r+"], ["r", "r+"])):
                array = fs.map(path, mode=mode)
                check(array, pattern)
                kept.append((array, pattern))
        if os.path.exists(path):
            removed(path)
        for array, pattern in kept:
            check(array, pattern)
        while len(kept) > 12:
            kept.pop(chance.randrange(len(kept)))
        rounds[0] += 1

def fill():
    chance = random.Random(0)
    while not is_over.is_set() and not wrong:
        for number in range(40):
            written(f"{root}/filling{number}", chance.randrange(256), 250)
        for name in os.listdir(root):
            if name.startswith("filling"):
                removed(f"{root}/{name}")

def guarded(work, *words):
    try:
        work(*words)
    except BaseException as error:
        wrong.append(repr(error))

with pmemfs.connect(root) as fs:
    threads = [threading.Thread(target=guarded, args=(churn, number)) for number in range(3)]
    threads.append(threading.Thread(target=guarded, args=(fill,)))
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    sys.stdin.readline()
    is_over.set()
    for thread in threads:
        thread.join()
print(rounds[0], wrong, flush=True)
"""


def settled_count(directory: Path) -> int:
    """How many descriptors a process has, once it has taken all that was sent to it."""
    counts: list[int] = []
    while len(counts) < 5 or len(set(counts[-5:])) > 1:
        counts.append(len(os.listdir(directory)))
        time.sleep(0.1)
    return counts[-1]


@native
@victims
def test_pins_that_come_and_go_meanwhile_keep_their_pages(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "32M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    keeper = Path(f"/proc/{mounted.info()['kept']['keeper_pid']}/fd")
    with pmemfs.connect(root) as fs:
        fs.pins()
        kept_before = settled_count(keeper)
        cancels = pools.engine.transport == "uring" and victim != DAEMON
        with program(CHURNING, root, "cancels" if cancels else "") as churning:
            assert hears(churning) == "begun"
            for _ in range(ROUNDS):
                kills.kill(victim)
            assert churning.stdin is not None
            churning.stdin.write("\n")
            churning.stdin.flush()
            rounds, _, wrong = hears(churning).partition(" ")
            assert wrong == "[]"
            assert int(rounds) > 0
        wait_for_pins(fs, 0)
        # The memory of the words stays, and what a successor needs besides may have come late.
        wait_until(lambda: len(os.listdir(keeper)) <= kept_before + 8, "the keeper has no pins")
    assert_ends_clean(pools, mounted)


@native
def test_copies_and_watches_go_on(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "64M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint
    content = write_file(tmp_path / "source", 2000)
    # What is cancelled by the death of a ring fails, with a sentence.
    victims = (DAEMON,) if pools.engine.transport == "uring" else VICTIMS
    watch = [BIN / "pmemfs", "stat", root, "--watch", "0.1", "--json"]
    with ThreadPoolExecutor(1) as thread, subprocess.Popen(watch, stdout=subprocess.PIPE) as stat:
        assert stat.stdout is not None
        for number in range(ROUNDS):
            killing = thread.submit(kills.kill, victims[number % len(victims)])
            while not killing.done():
                for words in (
                    (tmp_path / "source", root / "copy"),
                    (root / "copy", tmp_path / "b"),
                ):
                    said = run_pmemfs("copy", "--force", *words)
                    assert said.code == 0, said.err
                assert (tmp_path / "b").read_bytes() == content.tobytes()
            killing.result()
            for _ in range(3):
                assert json.loads(stat.stdout.readline())
        assert stat.poll() is None
        stat.send_signal(signal.SIGINT)
    with pmemfs.connect(root) as fs:
        wait_for_pins(fs, 0)
    assert_ends_clean(pools, mounted)
