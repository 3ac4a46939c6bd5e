"""Programs with arrays fork, spawn, exit, collect garbage and have threads: nothing hangs, and no
pin is left."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import FRAME, hears, own_pins, program, wait_for_pins, write_file
from kit.descriptors import open_before, open_descriptors
from kit.mounts import Engine, Mounted, pool_maker
from kit.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@pytest.fixture(scope="module")
def mounted() -> Iterator[Mounted]:
    """One mount for all tests here."""
    # What multiprocessing starts once, and keeps.
    resource_tracker.ensure_running()
    with pool_maker() as pools:
        yield pools.mount(pools.create("fs0", "128M", "--mode", "fs"))


@pytest.fixture
def fs(mounted: Mounted) -> Iterator[pmemfs.Mount]:
    """A connection; a test leaves no pin, and no descriptor."""
    before = len(open_before())
    with pmemfs.connect(mounted.mountpoint) as fs:
        yield fs
        assert fs.statistics() == (0, 0, 0)
        wait_for_pins(fs, 0)
    assert len(open_descriptors()) <= before


@pytest.fixture
def content(mounted: Mounted) -> Iterator[np.ndarray]:
    """What is in `file`."""
    yield write_file(mounted.mountpoint / "file", 64)
    (mounted.mountpoint / "file").unlink()


def in_child(action: object) -> None:
    """Do something in a fork of this process, in bounded time."""
    assert callable(action)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("engine", [Engine("native"), Engine("python")], ids=str)
def test_a_child_that_lets_go_of_a_new_file_leaves_it_to_its_parent(engine: Engine) -> None:
    with pool_maker(engine) as pools:
        root = pools.mount(pools.create("fs1", "32M", "--mode", "fs")).mountpoint
        with pmemfs.connect(root) as fs, fs.create("new", 100) as new:
            new.array[:] = 7
            in_child(new.close)
            new.commit()
        assert (root / "new").read_bytes() == bytes([7]) * 100
        assert os.listdir(root) == ["new"]


def test_a_child_uses_what_it_inherited(fs: pmemfs.Mount, content: np.ndarray) -> None:
    def use(mapping: pmemfs.Mapping, whole: np.ndarray) -> None:
        assert (whole == content).all()
        whole[0] = 255 - content[0]
        mapping.flush()
        assert len(fs.map("file")) == 64 * FRAME
        assert not mapping.pin.stale

    with fs.open("file", mode="r+") as mapping:
        in_child(lambda: use(mapping, mapping.array))
        assert mapping.array[0] == 255 - content[0]


def test_a_pin_lasts_until_parent_and_child_are_gone(fs: pmemfs.Mount, content: np.ndarray) -> None:
    whole = fs.map("file")
    go, wait = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait)
        os.read(go, 1)
        os._exit(int((whole != content).any()))
    os.close(go)
    number = pmemfs.pin_of(whole).number
    del whole
    assert [pin.pin for pin in fs.pins()] == [number]
    os.close(wait)
    assert os.waitpid(child, 0)[1] == 0
    wait_for_pins(fs, 0)


def test_a_child_that_execs_takes_nothing_with_it(fs: pmemfs.Mount, content: np.ndarray) -> None:
    whole = fs.map("file")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        del whole
        wait_for_pins(fs, 0)
    finally:
        child.kill()
        child.wait()


def test_forking_while_other_threads_map_never_hangs(fs: pmemfs.Mount, content: np.ndarray) -> None:
    ended = threading.Event()

    def keep_mapping() -> None:
        while not ended.is_set():
            assert fs.map("file")[0] == content[0]

    def map_once() -> None:
        assert fs.map("file")[0] == content[0]

    threads = [threading.Thread(target=keep_mapping) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            in_child(map_once)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_threads_map_and_let_go_at_once(fs: pmemfs.Mount, content: np.ndarray) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        held: list[np.ndarray] = []
        try:
            for _ in range(150):
                at = int(random.integers(0, 60)) * FRAME
                part = fs.map("file", offset=at, shape=FRAME)
                assert (part == content[at : at + FRAME]).all()
                held.append(part[5:])
                if len(held) > 5:
                    held.pop(int(random.integers(0, 5)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_arrays_in_garbage_cycles_are_collected(fs: pmemfs.Mount, content: np.ndarray) -> None:
    class Ring:
        def __init__(self, held: object) -> None:
            self.held, self.ring = held, self

    for make in (lambda: fs.map("file"), lambda: fs.open("file"), lambda: fs.map("file")[3:],
                 lambda: memoryview(fs.map("file")), lambda: fs.create("new", 100)):  # fmt: skip
        Ring(make())
    array = fs.map("file")
    array.ring = array  # type: ignore[attr-defined]
    del array
    gc.collect()
    wait_for_pins(fs, 0)


def test_a_finalizer_may_map_and_let_go(fs: pmemfs.Mount, content: np.ndarray) -> None:
    done = []

    class Last:
        def __init__(self) -> None:
            self.held, self.ring = fs.map("file"), self

        def __del__(self) -> None:
            done.append(int(fs.map("file")[7] == content[7]))

    for _ in range(20):
        Last()
        # The collector may run within a question that is under way.
        gc.set_threshold(1)
        fs.map("file")
        gc.set_threshold(700, 10, 10)
    gc.collect()
    assert done == [1] * 20


def summed(mapping: pmemfs.Mapping) -> int:
    """What a spawned process makes of a mapping that it was sent."""
    with mapping:
        return int(mapping.array.sum())


def test_a_spawned_process_maps_anew_what_it_is_sent(fs: pmemfs.Mount, content: np.ndarray) -> None:
    context = multiprocessing.get_context("spawn")
    with fs.open("file") as mapping, context.Pool(2) as workers:
        assert workers.map(summed, [mapping] * 4) == [int(content.sum())] * 4
    wait_for_pins(fs, 0)


ENDS = {
    "of the program": "",
    "by sys.exit": "sys.exit()",
    "by an exception": "1 // 0",
    "with threads": "threading.Thread(target=keep, daemon=True).start()",
    "with cycles": "a.ring = b.ring = a",
    "in a child": "os.fork()",
    "within with": "m = fs.map('file', mode='r+'); m.__enter__().array[0] = 1; sys.exit()",
    "after the connection": "fs.close()",
    "at once": "os._exit(0)",
    "by a signal": "signal.raise_signal(signal.SIGTERM)",
}

PROGRAM = """
import os, signal, sys, threading
import pmemfs
fs = pmemfs.connect(sys.argv[1])
class Held: pass
a, b = Held(), Held()
a.array, b.array = fs.map("file"), fs.map("file", mode="r+")[5:]
m = fs.open("file")
new = fs.create("new", 100000)
everything = [fs.map("file") for _ in range(20)]
def keep():
    while True:
        fs.map("file")
{end}
"""


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_an_interpreter_ends_and_leaves_no_pin(
    fs: pmemfs.Mount, content: np.ndarray, mounted: Mounted, end: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM.format(end=end), mounted.mountpoint],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == {"1 // 0": 1, ENDS["by a signal"]: -15}.get(end, 0), done.stderr
    said = [line for line in done.stderr.splitlines() if "Warning" in line and "fork" not in line]
    assert said == []
    wait_for_pins(fs, 0)
    assert os.listdir(mounted.mountpoint) == ["file"]


INTERRUPTED = """
import os, signal, sys
import pmemfs
fs = pmemfs.connect(sys.argv[1])
is_armed = False
def interrupt(number, frame):
    if is_armed:
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
print("ready", flush=True)
for number in range(200):
    try:
        try:
            is_armed = True
            while True:
                fs.map("file", mode=("r", "r+")[number % 2])
                if number % 10 == 0:
                    fs.create("new", 100).close()
        finally:
            is_armed = False
    except KeyboardInterrupt:
        pass
# Python would have the last of them end it.
signal.signal(signal.SIGINT, signal.SIG_IGN)
held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
        and os.path.exists(f"/proc/self/fd/{fd}")]
print([path for path in held if path.startswith(sys.argv[1])])
"""


def test_an_interrupt_leaves_no_file_open(
    fs: pmemfs.Mount, content: np.ndarray, mounted: Mounted
) -> None:
    chance = random.Random(7)
    with program(INTERRUPTED, mounted.mountpoint) as child:
        assert hears(child) == "ready"
        while child.poll() is None:
            time.sleep(chance.random() * 0.004)
            child.send_signal(signal.SIGINT)
        assert hears(child) == "[]"
        assert child.returncode == 0


def test_five_hundred_pins_at_once_are_dropped_at_once(
    fs: pmemfs.Mount, content: np.ndarray
) -> None:
    arrays = [fs.map("file", offset=n % 64 * FRAME) for n in range(500)]
    assert len(own_pins(fs)) == 500
    assert all(array[0] == content[n % 64 * FRAME] for n, array in enumerate(arrays))
    arrays.clear()
    wait_until(lambda: not fs.pins(), "all are gone")


def test_what_python_is_told_of_typing_holds(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nimport pmemfs\n\n"
        "def use(path: str) -> np.ndarray:\n"
        "    with pmemfs.connect(path) as fs:\n"
        "        a = fs.map('file', shape=(3, 4), dtype='f4')\n"
        "        with fs.map('file', mode='r+') as m:\n"
        "            m.array[:] = 0\n"
        "            m.flush()\n"
        "        stale: bool = pmemfs.pin_of(a).stale\n"
        "        assert not stale, fs.pins()[0].pid\n"
        "        return a[1:]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--disallow-any-generics", program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "type-arg" not in line]
    assert not [line for line in lines if "error:" in line], done.stdout
