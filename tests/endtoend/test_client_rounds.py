"""Many random rounds: files change under arrays, and clients are killed. Pages never get mixed up.

Every page of a file has the number of the file and of the page in each word, whatever version of
the file it is. So one word tells whose page an array, or a read, has shown.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import FRAME, assert_clean, free_bytes, hears, program, wait_for_pins
from kit.mounts import ENGINES, Engine, Mounted, PoolMaker
from kit.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

WORDS = FRAME // 8
FILES, PAGES = 6, 24
OPERATIONS = {"native-uring": 10_000, "native-fd": 600, "python": 200}
LOOKS = 100

CHANGER = f"""
import os, random, select, sys
import numpy as np
from pmemfs.medium.writeback import punch_hole
FRAME, FILES, PAGES, WORDS = {FRAME}, {FILES}, {PAGES}, {WORDS}
directory, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

def stamped(file, pages):
    words = np.arange(1, pages + 1, dtype="<u8") | file << 32
    return np.repeat(words, WORDS).tobytes()

def check(file, fd):
    words = np.frombuffer(os.pread(fd, PAGES * FRAME, 0), "<u8")
    for at in range(0, len(words), WORDS):
        own = file << 32 | at // WORDS + 1
        alien = words[at : at + WORDS]
        alien = alien[(alien != own) & (alien != 0)]
        assert not len(alien), f"{{file}} page {{at // WORDS}} shows {{int(alien[0]):#x}}"

def change(file):
    path = f"{{directory}}/{{file}}"
    kind = chance.choice(["truncate", "rm", "rename", "rewrite", "rewrite", "punch", "check"])
    if kind == "rm":
        os.unlink(path)
    elif kind == "rename":
        with open(f"{{path}}.new.{{seed}}", "wb", buffering=0) as new:
            new.write(stamped(file, chance.randrange(PAGES)))
        os.rename(f"{{path}}.new.{{seed}}", path)
    elif kind == "truncate":
        os.truncate(path, chance.randrange(PAGES * WORDS) * 8)
    else:
        flags = os.O_RDWR | (os.O_CREAT if kind == "rewrite" else 0)
        fd = os.open(path, flags, 0o600)
        try:
            first = chance.randrange(PAGES)
            count = chance.randrange(1, PAGES - first + 1)
            if kind == "rewrite":
                part = stamped(file, first + count)[first * FRAME :]
                os.pwrite(fd, part, first * FRAME)
            elif kind == "punch":
                punch_hole(fd, first * FRAME, count * FRAME)
            else:
                check(file, fd)
        finally:
            os.close(fd)

# Until it is told that it was watched for long enough, too.
while rounds > 0 or not select.select([sys.stdin], [], [], 0)[0]:
    rounds -= 1
    try:
        change(1 + chance.randrange(FILES))
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != 95: raise  # pyfuse3 has no fallocate
print("done")
"""


class Held:
    """An array over a file from some page on, with what its words may be."""

    def __init__(self, fs: pmemfs.Mount, file: int, first: int, mode: str) -> None:
        self.words = fs.map(str(file), mode=mode, offset=first * FRAME, dtype="<u8")
        index = np.arange(len(self.words), dtype="<u8") // WORDS + np.uint64(first + 1)
        self.own = index | np.uint64(file << 32)
        self.is_writable = mode != "r"

    def check(self) -> None:
        """Nothing but zeroes and the file's own pages is shown."""
        seen = self.words.copy()
        alien = seen[(seen != self.own) & (seen != 0)]
        assert not len(alien), f"a page of another file: {int(alien[0]):#x}"

    def store(self) -> None:
        """What is stored is the file's, or nobody's."""
        if self.is_writable:
            self.words[:] = self.own


def one_round(fs: pmemfs.Mount, held: list[Held], chance: random.Random) -> None:
    """Map another file, look at what is mapped, store into it, let go of some."""
    try:
        first = chance.choice([0, 0, chance.randrange(PAGES)])
        mode = chance.choice(["r", "r", "r+", "c"])
        held.append(Held(fs, 1 + chance.randrange(FILES), first, mode))
    except (FileNotFoundError, pmemfs.BadMapping):
        pass
    for each in chance.sample(held, min(3, len(held))):
        each.store()
        each.check()
    while len(held) > chance.randrange(3, 12):
        held.pop(chance.randrange(len(held))).check()


@pytest.mark.parametrize("engine", ENGINES, indirect=True, ids=str)
@pytest.mark.usefixtures("engine")
def test_an_array_never_shows_a_page_of_another_file(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create("fs0", "16M", "--mode", "fs"))
    root = mounted.mountpoint
    rounds = OPERATIONS[str(engine)] // 2
    free = free_bytes(root)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance, held = random.Random(seed), []
    with (
        pmemfs.connect(root) as fs,
        program(CHANGER, root, seed, rounds) as one,
        program(CHANGER, root, seed + 1, rounds) as two,
    ):
        count = 0
        while one.poll() is None or two.poll() is None:
            one_round(fs, held, chance)
            # Before the files are made there is nothing to look at.
            count += bool(held)
            if count == LOOKS:
                for child in (one, two):
                    assert child.stdin is not None
                    child.stdin.close()
        assert [hears(one), hears(two)] == ["done", "done"]
        assert count >= LOOKS
        for each in held:
            each.check()
        del each
        held.clear()
        wait_for_pins(fs, 0)
    for path in root.iterdir():
        path.unlink()
    # Some frames are the directory's by now.
    wait_until(lambda: free_bytes(root) >= free - 20 * FRAME, "all pages are free again")
    assert_clean(pools, mounted)


KILLS = 200


def live_wildly(root: Path, seed: int) -> None:
    """Map, make, commit and let go, until somebody ends it."""
    chance, held = random.Random(seed), []
    with pmemfs.connect(root) as fs:
        while True:
            if chance.random() < 0.3:
                with fs.create(f"{chance.randrange(4)}", chance.randrange(1, 20 * FRAME)) as new:
                    new.array[:] = 7
                    if chance.random() < 0.7:
                        new.commit()
            else:
                name, mode = chance.choice("0123"), chance.choice(["r", "r+", "c"])
                held.append(fs.map(name, mode=mode))
                if mode != "r":
                    held[-1][:] = 7
            if len(held) > 5 or chance.random() < 0.1:
                held.clear()


def one_kill(root: Path, seed: int) -> int:
    """A client that lives for an instant; its process."""
    child = os.fork()
    if child == 0:
        try:
            live_wildly(root, seed)
        finally:
            os._exit(1)
    time.sleep(random.Random(seed).random() * 0.06)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return child


def look_at_files(root: Path) -> None:
    """A file is whole, whatever instant its maker died in, and so is one that was about to replace
    another."""
    for path in root.iterdir():
        assert path.name in "0123" or path.name.startswith(".pmemfs-new-")
        assert set(path.read_bytes()) == {7}, path


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_a_client_may_be_killed_at_any_instant(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("fs0", "32M", "--mode", "fs"))
    root = mounted.mountpoint
    for name in "0123":
        (root / name).write_bytes(b"\7" * 9 * FRAME)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with pmemfs.connect(root) as fs:
        for number in range(KILLS):
            pid = one_kill(root, seed + number)
            wait_until(lambda pid=pid: all(pin.pid != pid for pin in fs.pins()), "its pins ended")
        look_at_files(root)
    assert_nothing_leaked(pools, mounted)


def assert_nothing_leaked(pools: PoolMaker, mounted: Mounted) -> None:
    """After the next mount, in which nothing rests, only what is there takes room."""
    assert_clean(pools, mounted)
    root = pools.mount(mounted.pool).mountpoint
    files = sum(path.stat().st_blocks * 512 for path in root.iterdir())
    empty = pools.mount(pools.create("fs1", "32M", "--mode", "fs"), at="empty").mountpoint
    # Some frames are the directory's, and those of inodes.
    assert free_bytes(root) + files >= free_bytes(empty) - 30 * FRAME
