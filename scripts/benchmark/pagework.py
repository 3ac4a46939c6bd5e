"""The work of the part `pages`, as a process of its own: prints JSON, seconds by name of a side.

    pagework.py arrays FILE POOL EXTENTS ROUNDS   a mapped file, and a bare mapping of its frames
    pagework.py pins MOUNT COUNT               COUNT pins at once, and a mount that works meanwhile
    pagework.py stores FILE LIMITS ROUNDS      np.memmap, with its limits and the kernel's
    pagework.py first MOUNT PLAIN COUNT        entries of a TensorCache, beside files of safetensors
    pagework.py again MOUNT PLAIN COUNT        the same that are mapped already, beside lmdb

Sides take turns within a round, and each does the work once before it is timed.
"""

import ctypes
import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import pmemfs

ENTRY_BYTES = 1 << 20
GATHERED = 20_000
PIN_ROUNDS = 25
PINS_OF_ROUND = 40
OPERATIONS = 3000
STORED_BYTES = 256 << 20
# of a FUSE mount, before pmemfs changes them
KERNEL_LIMITS = {"strict_limit": "1", "max_ratio": "1"}
ECHO = Path(__file__).with_name("echoserver.py")
SHM = "/dev/shm"

Work = Callable[[], object]


def timed(work: Work) -> float:
    """Seconds."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def by_turns(sides: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in each round; whoever began a round ends the next."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for work in sides.values():
        work()
    for _ in range(rounds):
        for name in order:
            seconds[name].append(timed(sides[name]))
        order.reverse()
    return seconds


def arrays(file: str, pool: str, said: str, rounds: str) -> dict[str, Any]:
    """Sum, copies in and out, and gathers: over `Mount.map`, and over a mapping by mmap(2) alone of
    the same memory."""
    mounted = Path(file)
    with pmemfs.connect(mounted.parent) as fs, fs.open(mounted.name, mode="r+") as mapping:
        pages = mapping.array
        bare = mapped_bare(pool, json.loads(said), len(pages))
        memory = np.empty(len(pages), np.uint8)
        pages[-1], bare[0] = 7, 9
        if (pages[0], bare[-1]) != (9, 7):
            raise SystemExit("the two sides do not map the same memory")
        at = np.random.default_rng(0).integers(0, len(bare) // 4096, GATHERED)
        found = {}
        for name, work in (
            ("sum", lambda array: array.view(np.uint64).sum()),
            ("copy-out", lambda array: np.copyto(memory, array)),
            ("copy-in", lambda array: np.copyto(array, memory)),
            ("gather", lambda array: array.reshape(-1, 4096)[at].sum()),
        ):
            sides = {
                "pages": lambda work=work: work(pages),
                "plain": lambda work=work: work(bare),
            }
            found[name] = by_turns(sides, int(rounds))
        return found


def mapped_bare(pool: str, extents: list[tuple[int, int, int]], length: int) -> np.ndarray:
    """Extents of a pool (offset in the array, in the pool, length) side by side, as mmap(2) has
    them. They stay mapped."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    size, number = ctypes.c_size_t, ctypes.c_int
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    anywhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = call(None, length, 0, anywhere, -1, 0)  # PROT_NONE
    fd = os.open(pool, os.O_RDWR)
    both, fixed = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10  # MAP_FIXED
    for at, place, extent_bytes in extents:
        used = min(extent_bytes, length - at)
        if used > 0 and call(start + at, used, both, fixed, fd, place) != start + at:
            raise OSError(ctypes.get_errno(), "mmap failed")
    os.close(fd)
    return np.frombuffer((ctypes.c_ubyte * length).from_address(start), np.uint8)


def pins(mounted: str, count: str) -> dict[str, Any]:
    """One pin again and again; and operations of the mount with and without many pins."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = Path(mounted)
    names = [f"pinned-{number}" for number in range(int(count))]
    for name in names:
        (folder / name).write_bytes(bytes(4096))
    (folder / "one").write_bytes(bytes(ENTRY_BYTES))
    (folder / "other").write_bytes(bytes(65536))

    def operations() -> None:
        for _ in range(OPERATIONS):
            fd = os.open(folder / "other", os.O_RDWR | os.O_DIRECT)
            os.pread(fd, 4096, 0)
            os.close(fd)

    with pmemfs.connect(folder) as fs:
        single = single_pins(fs)
        seconds: dict[str, list[float]] = {"pinned": [], "free": []}
        operations()
        for _ in range(5):
            seconds["free"].append(timed(operations))
            with ExitStack() as held:
                for name in names:
                    held.enter_context(fs.open(name))
                seconds["pinned"].append(timed(operations))
    return {"single": single, "operations": seconds}


def single_pins(fs: pmemfs.Mount) -> dict[str, list[float]]:
    """Medians of rounds: one pin after another, and one bare answer with a descriptor after another
    of `echoserver`."""

    def pin() -> None:
        array = fs.map("one")
        del array

    with echoing() as echo:
        sides = {"pages": pin, "echo": echo}
        medians: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(PIN_ROUNDS):
            for name in sorted(sides, reverse=bool(round_number % 2)):
                sides[name]()
                some = [timed(sides[name]) for _ in range(PINS_OF_ROUND)]
                medians[name].append(median(some))
        return medians


@contextmanager
def echoing() -> Iterator[Work]:
    """Asks a server that does nothing but answer, and closes the descriptor that comes."""
    with tempfile.TemporaryDirectory(dir=SHM) as folder, ExitStack() as opened:
        path = str(Path(folder) / "socket")
        server = subprocess.Popen(
            [sys.executable, str(ECHO), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        opened.enter_context(server)
        opened.callback(server.terminate)
        assert server.stdout is not None
        server.stdout.readline()
        connection = opened.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(path)

        def ask() -> None:
            connection.send(bytes(160))
            _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
            os.close(descriptors[0])

        yield ask


def stores(file: str, limits: str, rounds: str) -> dict[str, Any]:
    """All of a file stored to anew through a new np.memmap, and made durable."""

    def work() -> None:
        mapped = np.memmap(file, np.uint8, mode="r+")
        mapped[:] = next(values)
        mapped.flush()

    Path(file).write_bytes(bytes(STORED_BYTES))
    values = iter(range(256))
    ours = {name: Path(limits, name).read_text() for name in KERNEL_LIMITS}
    seconds: dict[str, list[float]] = {"ours": [], "kernel": []}
    try:
        for round_number in range(int(rounds)):
            for side in sorted(seconds, reverse=bool(round_number % 2)):
                set_limits(limits, ours if side == "ours" else KERNEL_LIMITS)
                seconds[side].append(timed(work))
    finally:
        set_limits(limits, ours)
    return {"stores": seconds}


def set_limits(folder: str, values: Mapping[str, str]) -> None:
    """Set the limits of dirty pages of a mount."""
    for name, value in values.items():
        Path(folder, name).write_text(value)


def first(mounted: str, plain: str, count: str) -> dict[str, Any]:
    """Entries that this process has not mapped yet."""
    from safetensors.numpy import load_file, save_file

    names = [f"entry-{number}" for number in range(int(count))]
    data = np.arange(ENTRY_BYTES // 4, dtype=np.float32)
    filler = pmemfs.TensorCache(Path(mounted) / "cache", capacity=1 << 30)
    for name in names:
        filler.put(name, data)
        save_file({"it": data}, Path(plain) / name)
    cache = pmemfs.TensorCache(Path(mounted) / "cache", capacity=1 << 30)
    seconds: dict[str, list[float]] = {"pages": [], "safetensors": []}
    kept = []
    for name in names:
        seconds["pages"].append(timed(lambda name=name: kept.append(cache.get(name))))
        seconds["safetensors"].append(timed(lambda name=name: load_file(Path(plain) / name)))
    assert all(array is not None for array in kept)
    return {"first": seconds}


def again(mounted: str, plain: str, count: str) -> dict[str, Any]:
    """Entries that this process has mapped."""
    import lmdb

    data = np.arange(ENTRY_BYTES // 4, dtype=np.float32)
    names = [f"again-{number}" for number in range(int(count))]
    cache = pmemfs.TensorCache(Path(mounted) / "cache", capacity=1 << 30)
    for name in names:
        cache.put(name, data)
    kept = [cache.get(name) for name in names]
    environment = lmdb.open(str(Path(plain) / "lmdb"), map_size=1 << 30)
    keys = [name.encode() for name in names]
    with environment.begin(write=True) as writing:
        for key in keys:
            writing.put(key, data.tobytes())

    def get_of_lmdb() -> None:
        for key in keys:
            with environment.begin(buffers=True) as reading:
                np.frombuffer(reading.get(key), np.float32)

    def get_of_cache() -> None:
        for name in names:
            cache.get(name)

    assert all(array is not None for array in kept)
    found = by_turns({"pages": get_of_cache, "lmdb": get_of_lmdb}, 50)
    return {"again": {side: [each / len(names) for each in seconds]
                      for side, seconds in found.items()}}  # fmt: skip


if __name__ == "__main__":
    works = {"arrays": arrays, "pins": pins, "stores": stores, "first": first, "again": again}
    work = works[sys.argv[1]]
    json.dump(work(*sys.argv[2:]), sys.stdout)
