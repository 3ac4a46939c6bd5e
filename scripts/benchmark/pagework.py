"""The work of the part `pages`, as a process of its own: prints JSON, seconds by name of a side.

    pagework.py arrays MOUNT PLAIN ROUNDS      a file as large and with the same bytes, in both
    pagework.py pins MOUNT COUNT               COUNT pins at once, and a mount that works meanwhile
    pagework.py first MOUNT PLAIN COUNT        entries of a TensorCache, beside files of safetensors
    pagework.py again MOUNT PLAIN COUNT        the same that are mapped already, beside lmdb

Sides take turns within a round, and each does the work once before it is timed.
"""

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import pmemfs

ENTRY_BYTES = 1 << 20
GATHERED = 20_000
REPEATS = 2000
OPERATIONS = 3000

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


def arrays(mounted: str, plain: str, rounds: str) -> dict[str, Any]:
    """Sum, copies in and out, and gathers: over `Mount.map`, and over mmap of a file of tmpfs."""
    fd = os.open(plain, os.O_RDWR)
    beside = np.frombuffer(mmap.mmap(fd, 0), np.uint8)
    pool_file = Path(mounted)
    with pmemfs.connect(pool_file.parent) as fs, fs.open(pool_file.name, mode="r+") as mapping:
        pages, memory = mapping.array, np.empty(len(beside), np.uint8)
        assert pages.shape == beside.shape
        at = np.random.default_rng(0).integers(0, len(beside) // 4096, GATHERED)
        found = {}
        for name, work in (
            ("sum", lambda array: array.view(np.uint64).sum()),
            ("copy-out", lambda array: np.copyto(memory, array)),
            ("copy-in", lambda array: np.copyto(array, memory)),
            ("gather", lambda array: array.reshape(-1, 4096)[at].sum()),
        ):
            sides = {
                "pages": lambda work=work: work(pages),
                "plain": lambda work=work: work(beside),
            }
            found[name] = by_turns(sides, int(rounds))
        return found


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
        single = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            array = fs.map("one")
            del array
            single.append(time.perf_counter() - begin)
        seconds: dict[str, list[float]] = {"pinned": [], "free": []}
        operations()
        for _ in range(5):
            seconds["free"].append(timed(operations))
            with ExitStack() as held:
                for name in names:
                    held.enter_context(fs.open(name))
                seconds["pinned"].append(timed(operations))
    return {"single": {"pages": [median(single)]}, "operations": seconds}


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
    work = {"arrays": arrays, "pins": pins, "first": first, "again": again}[sys.argv[1]]
    json.dump(work(*sys.argv[2:]), sys.stdout)
