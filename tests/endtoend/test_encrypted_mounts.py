"""Encrypted files on a mount: who serves them, and that nothing of them is lost or laid open."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.commands import pmemfs_ok
from kit.fs_mounts import create_fs, mount_fs
from kit.keys import add_key, encrypted
from kit.killing import VICTIMS, Kills, Load, mount_kept
from kit.mounts import NATIVE, Engine, Mounted, PoolMaker
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.pfn import FRAME_BYTES

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)
SECONDS = float(os.environ.get("PMEMFS_NEIGHBOURS_SECONDS", "3"))
KILLS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
SLOT_COUNT = 1024
"""So many keys of files there is room for at a time."""


@contextmanager
def private(pools: PoolMaker, size: str = "128M") -> Iterator[tuple[Mounted, Path]]:
    """A mount, and an encrypted directory in it."""
    mounted = mount_fs(pools, create_fs(pools, "fs0", size))
    add_key(mounted)
    yield mounted, encrypted(mounted)
    pools.umount(mounted)


def operations(mounted: Mounted) -> dict[str, Any]:
    return dict(json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))["operations"])


def has_counted(mounted: Mounted, name: str) -> bool:
    """Whether an operation was counted at all. A worker counts it after it has answered it or
    handed it over."""
    counts = operations(mounted)[name]
    return bool(counts["native"] + counts["forwarded"])


@native
def test_the_data_plane_serves_an_encrypted_file(pools: PoolMaker) -> None:
    with private(pools) as (mounted, directory), opened(
        directory / "file", os.O_RDWR | os.O_CREAT
    ) as fd:  # fmt: skip
        content = bytearray(os.urandom(1 << 20))
        os.pwrite(fd, content, 0)
        os.pread(fd, 4096, 0)
        for name in ("read", "write"):
            wait_until(lambda name=name: has_counted(mounted, name), f"the {name} was counted")
        before = operations(mounted)

        def more(name: str, by_whom: str) -> int:
            return int(operations(mounted)[name][by_whom] - before[name][by_whom])

        chance = random.Random(1)
        for _ in range(200):
            at, length = chance.randrange(1 << 20), chance.randrange(1, 9000)
            data = os.urandom(min(length, (1 << 20) - at))
            content[at : at + len(data)] = data
            assert os.pwrite(fd, data, at) == len(data)
            assert os.pread(fd, len(data), at) == data
        os.fsync(fd)
        assert os.pread(fd, 1 << 20, 0) == content
        for name, count in (("read", 200), ("write", 200), ("fsync", 1)):
            wait_until(
                lambda name=name, count=count: more(name, "native") >= count,
                f"the data plane has served each {name}",
            )
            assert more(name, "forwarded") == 0


def test_nothing_plain_of_an_encrypted_directory_is_in_the_pool(pools: PoolMaker) -> None:
    secrets = [os.urandom(12).hex() for _ in range(5)]
    name, content, target, label, value = secrets
    with private(pools) as (mounted, directory):
        path = directory / name
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            for at in range(0, 300_000, len(content) * 1000 + 7):
                os.pwrite(fd, content.encode() * 1000, at)
            os.setxattr(fd, f"user.{label}", value.encode())
            os.ftruncate(fd, 1000)
        os.symlink(target, directory / "link")
        path.rename(directory / f"{name}.again")
    image = mounted.pool.read_bytes()
    assert [secret for secret in secrets if secret.encode() in image] == []


def test_more_encrypted_files_than_slots_for_keys_are_open(
    pools: PoolMaker, engine: Engine
) -> None:
    count = SLOT_COUNT + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 500)), hard))
    try:
        with private(pools, "256M") as (_, directory), ExitStack() as stack:
            fds = []
            for number in range(count):
                flags = os.O_RDWR | os.O_CREAT
                fds.append(stack.enter_context(opened(directory / f"file {number}", flags)))
            for turn in range(2):
                for number, fd in enumerate(fds):
                    word = b"%d:%d|" % (turn, number)
                    os.pwrite(fd, word * (8192 // len(word)), 3)
                    assert os.pread(fd, len(word), 3) == word
            for number, fd in enumerate(fds):
                word = b"1:%d|" % number
                assert os.pread(fd, 9000, 3) == word * (8192 // len(word))
            stack.close()
            for number in range(0, count, 50):
                word = b"1:%d|" % number
                expected = bytes(3) + word * (8192 // len(word))
                assert (directory / f"file {number}").read_bytes() == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


NEIGHBOUR = """
import errno, os, random, sys
path, me, count, width, length = sys.argv[1], *map(int, sys.argv[2:6])
fd, chance, mine, wrong, turn = os.open(path, os.O_RDWR), random.Random(me), {}, 0, 0
own = os.open(f"{path}.{me}", os.O_RDWR | os.O_CREAT)
print("ready", flush=True)
os.set_blocking(0, False)
while not wrong:
    try:
        # On a busy machine some have hardly begun when the others are done.
        if os.read(0, 1) == b"" and turn > 10:
            break
    except BlockingIOError:
        pass
    turn += 1
    place = chance.randrange(length // (count * width)) * count + me
    word = bytes([65 + me]) + (turn % (1 << 40)).to_bytes(width - 1, "little")
    try:
        # Whether a write that is cancelled was carried out, nobody is told.
        mine.pop(place, None)
        if turn % 5:
            os.pwrite(fd, word, place * width)
        else:
            # The control plane does this one.
            os.pwrite(own, word, 3)
            assert os.copy_file_range(own, fd, width, 3, place * width) == width
        mine[place] = word
        if turn % 7 == 0:
            os.fsync(fd)
        place = chance.choice(list(mine))
        wrong += os.pread(fd, width, place * width) != mine[place]
    except OSError as error:
        if error.errno != errno.ECANCELED:
            raise
for place, word in mine.items():
    wrong += os.pread(fd, width, place * width) != word
print(turn, wrong, flush=True)
"""
"""A process that writes words of its own between those of others, by way of both planes."""


@pytest.mark.parametrize("width", [7, 16, 30])
def test_writers_of_neighbouring_bytes_lose_nothing(pools: PoolMaker, width: int) -> None:
    with private(pools) as (_, directory), neighbours(directory, width):
        time.sleep(SECONDS)


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_writers_of_neighbouring_bytes_lose_nothing_when_processes_are_killed(
    pools: PoolMaker, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")
    mounted = mount_kept(pools, create_fs(pools, "fs0", "64M"))
    add_key(mounted)
    kills = Kills(mounted, Load(tmp_path))
    with neighbours(encrypted(mounted), 7):
        for _ in range(KILLS):
            kills.kill(victim)
        time.sleep(SECONDS / 4)
    pools.umount(mounted)


@native
def test_a_worker_and_the_daemon_write_into_one_block_and_both_are_there(pools: PoolMaker) -> None:
    with private(pools) as (mounted, directory):
        path = directory / "shared"
        path.write_bytes(bytes(3 * FRAME_BYTES))
        before = operations(mounted)["write"]
        # The last block of the first frame: one ends in it, the other begins in it and goes on into
        # a hole, for which only the daemon finds a frame.
        with writing(path, 4083, 3), writing(path, 4091, 12, punches=True):
            time.sleep(SECONDS * 2 / 3)

            def have_both_written() -> bool:
                after = operations(mounted)["write"]
                return all(after[who] - before[who] > 10 for who in ("native", "forwarded"))

            wait_until(have_both_written, "both have written more than ten times")


@contextmanager
def writing(path: Path, offset: int, width: int, *, punches: bool = False) -> Iterator[None]:
    """While this context lasts, a process writes words into a file, and reads each again."""
    words = map(str, (path, offset, width, int(punches)))
    with subprocess.Popen(
        [sys.executable, "-c", REPEATING, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        yield
        assert writer.communicate(timeout=60)[0] == "0 lost\n"


REPEATING = """
import ctypes, os, select, sys
path, (offset, width, punches) = sys.argv[1], map(int, sys.argv[2:])
fd, fallocate = os.open(path, os.O_RDWR), ctypes.CDLL(None).fallocate
fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long
print("ready", flush=True)
lost = turn = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    turn += 1
    word = turn.to_bytes(width, "little")
    os.pwrite(fd, word, offset)
    lost += os.pread(fd, width, offset) != word
    if punches:
        # FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE.
        assert not fallocate(fd, 3, 4096, 4096)
print(f"{lost} lost", flush=True)
"""


@contextmanager
def neighbours(directory: Path, width: int) -> Iterator[None]:
    """While this context lasts, processes write words of so many bytes into one file, each word
    between two of other processes, and each word is the last that its process has written there."""
    count, length = 4, 4 * width * 4
    assert length > 100, "they meet in a few blocks"
    path = directory / "shared"
    path.write_bytes(bytes(length))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, path, *map(str, (me, count, width, length))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for me in range(count)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"
    yield
    said = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [wrong for _, wrong in said] == ["0"] * count
    assert all(int(turns) > 10 for turns, _ in said)
