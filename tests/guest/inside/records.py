"""Records of 4 KiB at random places of a device, in an order that a seed fixes.

records.py write DEVICE: writes until it is killed; after each fsync says `durable N`, the number of
the last record before it. Half of the records are stored through an array over the pages, and made
durable by its flush. records.py verify DEVICE N: every record up to N must be there, unless a later
one of the sequence took its place.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator

BLOCK_BYTES = 4096
BLOCKS = 2048
RECORDS_PER_FSYNC = 16


def places() -> Iterator[tuple[int, int]]:
    """(number, block) of every record."""
    rng = random.Random(2015)
    return ((number, rng.randrange(BLOCKS)) for number in itertools.count())


def record(number: int) -> bytes:
    """The content of a record: its number, all over the block."""
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def write(device: str) -> None:
    """Write until killed."""
    # To load numpy takes seconds here, and verifying does without it.
    import numpy as np

    import pmemfs

    fd = os.open(device, os.O_RDWR)
    array = pmemfs.connect(device).map(device, mode="r+", shape=(BLOCKS, BLOCK_BYTES))
    for number, block in places():
        is_stored = number // RECORDS_PER_FSYNC % 2 == 1
        if is_stored:
            array[block] = np.frombuffer(record(number), "u1")
        else:
            os.pwrite(fd, record(number), block * BLOCK_BYTES)
        if number % RECORDS_PER_FSYNC == RECORDS_PER_FSYNC - 1:
            if is_stored:
                array.flush()
            else:
                os.fsync(fd)
            print(f"durable {number}", flush=True)


def verify(device: str, last_durable: int) -> None:
    """Raise SystemExit where a durable record is lost."""
    fd = os.open(device, os.O_RDONLY)
    newest: dict[int, int] = {}
    # What was written after the last fsync that was heard of may be there or not.
    allowed: dict[int, set[int]] = {}
    for number, block in itertools.islice(places(), last_durable + 4096):
        if number <= last_durable:
            newest[block] = number
            allowed[block] = {number}
        else:
            allowed.setdefault(block, set()).add(number)
    for block in newest:
        content = os.pread(fd, BLOCK_BYTES, block * BLOCK_BYTES)
        # A store of 8 bytes is whole, a block need not be: each word is of an allowed record.
        words = {content[at : at + 8] for at in range(0, BLOCK_BYTES, 8)}
        numbers = {int.from_bytes(word, "little") for word in words}
        if not numbers <= allowed[block]:
            sys.exit(f"block {block} holds {numbers}, and only {allowed[block]} may be there")
    print(f"{len(newest)} blocks hold what was durable")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        verify(sys.argv[2], int(sys.argv[3]))
