"""Content that is compressed as users' content is, and how zstd does on it by itself.

Invariant: content repeats itself only beyond 128 KiB, so that pieces of that size are as hard to
compress as those of a file that never does.
"""

import io
import json
import os
import random
import sqlite3
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from benchmark import backing, host
from benchmark.cells import KIB, MIB

PIECE_BYTES = 128 * KIB
FRAME_BYTES = 4 * KIB
LEVEL = 1
_UNIQUE_BYTES = 16 * MIB
_ROWS_AT_ONCE = 10_000
_WORDS = ("request", "session", "cache", "timeout", "user", "upload", "index", "retry", "queue")


def source_files() -> list[Path]:
    """The sources of Python's standard library, in one order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return sorted(found)


def content(name: str, size_bytes: int) -> Iterator[bytes]:
    """A corpus of `transformcells.CORPORA`, of about this size, in parts."""
    if name == "database":
        yield from _database(size_bytes)
        return
    unique = (_tar if name == "tar" else _logs)(min(size_bytes, _UNIQUE_BYTES))
    for start in range(0, size_bytes, len(unique)):
        yield unique[: size_bytes - start]


def _tar(size_bytes: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in source_files():
            tar.add(path, arcname=path.name)
            if packed.tell() > size_bytes:
                break
    return packed.getvalue()[:size_bytes]


def _logs(size_bytes: int) -> bytes:
    chance = random.Random(1)
    lines: list[bytes] = []
    written, now = 0, 1_700_000_000.0
    while written < size_bytes:
        now += chance.expovariate(50)
        line = {
            "time": round(now, 6),
            "level": chance.choice(("info", "info", "info", "warning", "error")),
            "host": f"node{chance.randrange(64):02}",
            "id": f"{chance.getrandbits(64):016x}",
            "took_ms": round(chance.lognormvariate(2, 1), 3),
            "path": f"/api/{chance.choice(_WORDS)}/{chance.randrange(100_000)}",
            "message": " ".join(chance.choices(_WORDS, k=chance.randrange(3, 9))),
        }
        lines.append(json.dumps(line).encode() + b"\n")
        written += len(lines[-1])
    return b"".join(lines)[:size_bytes]


def _database(size_bytes: int) -> Iterator[bytes]:
    chance = random.Random(2)
    with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as folder:
        path = Path(folder) / "database"
        database = sqlite3.connect(path)
        database.execute("pragma journal_mode = off")
        database.execute("create table orders (id integer primary key, customer text, "
                         "product text, price real, made integer, note text)")  # fmt: skip
        while path.stat().st_size < size_bytes:
            rows = [
                (f"customer-{chance.randrange(50_000):06}", chance.choice(_WORDS),
                 round(chance.lognormvariate(3, 1), 2), 1_700_000_000 + chance.randrange(10**7),
                 " ".join(chance.choices(_WORDS, k=chance.randrange(0, 12))))
                for _ in range(_ROWS_AT_ONCE)
            ]  # fmt: skip
            database.executemany("insert into orders (customer, product, price, made, note) "
                                 "values (?, ?, ?, ?, ?)", rows)  # fmt: skip
            database.commit()
        database.close()
        with path.open("rb") as file:
            while part := file.read(MIB):
                yield part


def pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces."""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def compressed(path: Path) -> list[bytes]:
    """What zstd makes of each piece of a file."""
    packer = zstandard.ZstdCompressor(level=LEVEL)
    return [packer.compress(piece) for piece in pieces(path)]


def stored_bytes(path: Path) -> int:
    """What a file takes where it lies."""
    return os.stat(path).st_blocks * 512
