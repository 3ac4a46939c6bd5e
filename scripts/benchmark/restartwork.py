"""A caller of a mount that waits while its processes are started again: ``python restartwork.py
DIRECTORY OPEN_FILES``.

It looks at every file below the directory, so that the kernel and the daemon know all of them, and
opens some. Then it opens, reads, writes and makes files in turn until its standard input ends, and
answers with the calls that took long, as JSON: when each began (monotonic, seconds) and how long it
took.
"""

import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

SLOW_SECONDS = 0.01
BLOCK_BYTES = 4096


def main() -> None:
    """Prepare, say so, and call until told to end."""
    directory, open_files = Path(sys.argv[1]), int(sys.argv[2])
    held = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            os.stat(path)
            if len(held) < open_files:
                held.append(os.open(path, os.O_RDWR))
    busy = os.open(directory / "busy", os.O_RDWR | os.O_CREAT)
    os.pwrite(busy, b"x" * BLOCK_BYTES, 0)
    print("ready", flush=True)
    print(json.dumps(call(directory, busy)))


def call(directory: Path, busy: int) -> list[tuple[float, float]]:
    """Call until told to end; the calls that took long."""
    path, made = directory / "busy", directory / "made"
    calls: list[Callable[[], object]] = [
        lambda: os.close(os.open(path, os.O_RDONLY)),
        lambda: os.pread(busy, BLOCK_BYTES, 0),
        lambda: os.pwrite(busy, b"y" * BLOCK_BYTES, 0),
        lambda: os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
        lambda: os.unlink(made),
    ]
    slow = []
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        for one in calls:
            begin = time.monotonic()
            one()
            if (took := time.monotonic() - begin) > SLOW_SECONDS:
                slow.append((begin, took))
    return slow


if __name__ == "__main__":
    main()
