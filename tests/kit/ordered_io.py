"""Many requests in flight at a device, never two at one block: so each read has one right answer.

fio starts a pass over its blocks while the last one's requests are still under way, unless
`serialize_overlap` is set. A block that it then finds torn proves nothing, because what a read
sees beside a write of the same block is undefined. Here a block has one request at a time.

Every block holds zeroes, or its number and how often it was written, in each of its words. Run as
a program it hammers one device until its input ends, and prints one line of JSON; so for an hour:

    sleep 3600 | .venv/bin/python tests/kit/ordered_io.py DEVICE SEED [--trims]
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4096
MOST_BLOCKS = 64
_WORDS = BLOCK_BYTES // 8
_PUNCH_HOLE_KEEP_SIZE = 3

_libc = ctypes.CDLL(None, use_errno=True)


def content(first: int, versions: np.ndarray) -> np.ndarray:
    """The words of blocks from `first` on; a block of version 0 is zero."""
    numbers = np.arange(first, first + len(versions), dtype=np.uint64)
    key = (numbers << np.uint64(40)) | (versions.astype(np.uint64) << np.uint64(10))
    words = key[:, None] | np.arange(_WORDS, dtype=np.uint64)[None, :]
    words[versions == 0] = 0
    return words


def describe(first: int, found: np.ndarray, right: np.ndarray) -> str:
    """What is wrong with the first block that is."""
    block, word = (int(at[0]) for at in np.nonzero(found != right))
    wrong = np.nonzero(found[block] != right[block])[0]
    return (
        f"block {first + block}: word {word} is {int(found[block, word]):#x} and must be "
        f"{int(right[block, word]):#x}; {len(wrong)} words up to {int(wrong[-1])} are wrong"
    )


@dataclass
class Blocks:
    """What must be in each block, and which blocks have a request under way."""

    versions: np.ndarray
    busy: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, first: int, count: int) -> bool:
        """Whether no block of the range has a request; from now on they all have."""
        wanted = range(first, first + count)
        with self.lock:
            if not self.busy.isdisjoint(wanted):
                return False
            self.busy.update(wanted)
            return True

    def release(self, first: int, count: int) -> None:
        """The request has been answered."""
        with self.lock:
            self.busy.difference_update(range(first, first + count))

    def grow(self, count: int) -> None:
        """The device is larger; what is new is zero."""
        with self.lock:
            more = np.zeros(max(0, count - len(self.versions)), np.uint32)
            self.versions = np.concatenate([self.versions, more])


class OrderedIo:
    """Threads at work on one device whose content is known to be zero."""

    def __init__(self, path: Path, seed: int, *, trims: bool) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.blocks = Blocks(np.zeros(self._block_count(), np.uint32))
        self.seed = seed
        self.trims = trims
        self.is_over = False
        self.tally: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, wait: Callable[[], object], thread_count: int = 8) -> None:
        """Hammer while `wait` lasts, then read all of it once more."""
        threads = [
            threading.Thread(target=self._work, args=(number,)) for number in range(thread_count)
        ]
        for thread in threads:
            thread.start()
        wait()
        self.is_over = True
        for thread in threads:
            thread.join()
        buffer = memoryview(mmap.mmap(-1, MOST_BLOCKS * BLOCK_BYTES))
        self.blocks.grow(self._block_count())
        for first in range(0, len(self.blocks.versions), MOST_BLOCKS):
            self._read(buffer, first, min(MOST_BLOCKS, len(self.blocks.versions) - first))

    def _work(self, number: int) -> None:
        chance = random.Random(self.seed * 100 + number)
        buffer = memoryview(mmap.mmap(-1, MOST_BLOCKS * BLOCK_BYTES))
        try:
            while not self.is_over and not self.wrong:
                self._step(chance, buffer)
        except OSError as error:
            self.wrong.append(f"thread {number}: {error}")

    def _step(self, chance: random.Random, buffer: memoryview) -> None:
        if chance.random() < 0.01:
            self.blocks.grow(self._block_count())
        count = int(MOST_BLOCKS ** chance.random())
        # A small part of the device, so that blocks are met again while others are near them.
        block_count = len(self.blocks.versions)
        first = chance.randrange(block_count - count)
        if chance.random() < 0.7:
            first = first * 512 // block_count
        if not self.blocks.take(first, count):
            return
        try:
            kind = chance.random()
            if kind < 0.45:
                self._write(buffer, first, count)
            elif kind < 0.9 or not self.trims:
                self._read(buffer, first, count)
            else:
                self._trim(first, count)
        finally:
            self.blocks.release(first, count)

    def _write(self, buffer: memoryview, first: int, count: int) -> None:
        versions = self.blocks.versions[first : first + count] + 1
        buffer[: count * BLOCK_BYTES] = content(first, versions).tobytes()
        written = os.pwrite(self.fd, buffer[: count * BLOCK_BYTES], first * BLOCK_BYTES)
        if written != count * BLOCK_BYTES:
            self.wrong.append(f"{written} bytes written at block {first}, not {count} blocks")
        self._note("writes", first, versions)

    def _read(self, buffer: memoryview, first: int, count: int) -> None:
        length = os.preadv(self.fd, [buffer[: count * BLOCK_BYTES]], first * BLOCK_BYTES)
        found = np.frombuffer(buffer[:length], np.uint64).reshape(-1, _WORDS)
        right = content(first, self.blocks.versions[first : first + count])
        if len(found) != count:
            self.wrong.append(f"{length} bytes read at block {first}, not {count} blocks")
        elif (found != right).any():
            self.wrong.append(describe(first, found, right))
        self.tally["reads"] += 1

    def _trim(self, first: int, count: int) -> None:
        at, length = ctypes.c_int64(first * BLOCK_BYTES), ctypes.c_int64(count * BLOCK_BYTES)
        if _libc.fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, at, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._note("trims", first, np.zeros(count, np.uint32))

    def _note(self, kind: str, first: int, versions: np.ndarray) -> None:
        # Under the lock, because growing replaces the array.
        with self.blocks.lock:
            self.blocks.versions[first : first + len(versions)] = versions
        self.tally[kind] += 1

    def _block_count(self) -> int:
        return os.fstat(self.fd).st_size // BLOCK_BYTES


def main(path: str, seed: str, *options: str) -> int:
    """Hammer the device at `path` until standard input ends."""
    work = OrderedIo(Path(path), int(seed), trims="--trims" in options)
    work.run(sys.stdin.read)
    print(json.dumps({"tally": work.tally, "wrong": work.wrong}))
    return bool(work.wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
