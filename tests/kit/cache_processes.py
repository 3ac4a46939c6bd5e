"""Other processes that use a tensor cache, and do as a test tells them.

Run as `python -m kit.cache_processes DIRECTORY random SEED`, a process puts, gets and deletes at
random until it is killed, and ends with an error if an entry is ever torn.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pmemfs.client.tensorcache import TensorCache
from pmemfs.errors import CacheFull

TESTS = Path(__file__).parents[1]
KEYS = [f"layer{layer}/prefix{prefix}" for layer in range(3) for prefix in range(4)]


def made_up(key: str, seed: int) -> np.ndarray[Any, Any]:
    """An array for a key that shows whether all of it belongs together."""
    words = 2000 + seed % 5 * 7000
    return np.full(words, KEYS.index(key) << 32 | seed, "u8")


def is_whole(key: str, array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is one that `made_up` has made for the key, from end to end."""
    said = int(array[0])
    return said >> 32 == KEYS.index(key) and np.array_equal(array, made_up(key, said & 0xFFFF_FFFF))


@contextmanager
def holding(directory: Path, *keys: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has views of entries, for as long as the context lasts."""
    code = (
        "import sys, pmemfs\n"
        "cache = pmemfs.TensorCache(sys.argv[1])\n"
        "views = [cache.get(key)[1:] for key in sys.argv[2:]]\n"
        "del cache\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "assert all((view[1:] == view[0]).all() for view in views)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory), *keys],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate()
    assert process.returncode == 0


def start_random(directory: Path, seed: int, capacity: int) -> subprocess.Popen[bytes]:
    """A process that does at random what a cache can, until it is killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "kit.cache_processes", str(directory), str(seed), str(capacity)],
        cwd=TESTS,
    )


def do_at_random(cache: TensorCache, seed: int) -> None:
    """Put, get, reserve and delete; what is got must be whole, also later. Never returns."""
    randomly = random.Random(seed)
    kept: list[tuple[str, np.ndarray[Any, Any]]] = []
    while True:
        key = randomly.choice(KEYS)
        match randomly.randrange(8):
            case 0 | 1 | 2:
                try:
                    cache.put(key, made_up(key, randomly.getrandbits(32)))
                except CacheFull:
                    kept.clear()
            case 3:
                cache.delete(key)
            case 4:
                with cache.reserve(key, 5000, "u8") as reserved:
                    reserved.array[:2500] = 1
            case _:
                array = cache.get(key)
                if array is not None:
                    kept = [*kept[-3:], (key, array)]
                assert all(is_whole(*each) for each in kept)


if __name__ == "__main__":
    print("ready", os.getpid(), flush=True)
    do_at_random(TensorCache(sys.argv[1], capacity=int(sys.argv[3])), int(sys.argv[2]))
