"""A device and what must be in it."""

from __future__ import annotations

import os
import random
from pathlib import Path

from kit.posix import opened, read_all
from pmemfs.units import MIB


class Oracle:
    """A device and what must be in it: the same reads and writes go to both."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.random = random.Random(seed)
        with opened(path, os.O_RDONLY) as fd:
            self.expected = bytearray(read_all(fd, self.size_bytes, 0))

    def exercise(self, steps: int, largest: int = MIB) -> None:
        """Read and write at any offset, with any length up to `largest`, mostly small ones."""
        with opened(self.path) as fd:
            for _ in range(steps):
                length = int(largest ** self.random.random())
                offset = self.random.randrange(self.size_bytes - length)
                if self.random.random() < 0.5:
                    data = self.random.randbytes(length)
                    assert os.pwrite(fd, data, offset) == length
                    self.expected[offset : offset + length] = data
                else:
                    assert os.pread(fd, length, offset) == self.expected[offset : offset + length]

    def compare(self) -> None:
        """All of the device is as it must be."""
        with opened(self.path, os.O_RDONLY) as fd:
            assert read_all(fd, self.size_bytes, 0) == self.expected
