"""Both ends of a control socket, each played for the other: methods, liars, and whole reports."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from pmemfs.control.client import call
from pmemfs.control.server import listening, serve
from pmemfs.errors import SourceBusy

Liar = Callable[[socket.socket], None]


async def echo(**params: Any) -> Any:
    return params


async def busy() -> None:
    raise SourceBusy(path="/dev/pmem0", why="it is ours")


async def bug(secret: str = "") -> None:
    raise RuntimeError("a bug")


async def unspeakable() -> Any:
    return {1, 2}


METHODS = {"echo": echo, "busy": busy, "bug": bug, "unspeakable": unspeakable}


def served(path: Path, client: Callable[[Path], Awaitable[None]]) -> None:
    """Run a client against a server on a real socket; then see that the server still answers."""

    async def main() -> None:
        with trio.fail_after(20), listening(path) as (listener, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, listener, lambda: METHODS)
                await client(path)
                assert await in_thread(call, path, "echo", alive=True) == {"alive": True}
                nursery.cancel_scope.cancel()

    trio.run(main)


async def in_thread(function: Callable[..., Any], *words: Any, **params: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: function(*words, **params))


def exchange(path: Path, sent: bytes, *, lines: int = 1) -> list[Any]:
    """Send bytes; the answers, as many as are wanted or until the daemon hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        try:
            connection.sendall(sent)
            with connection.makefile("rb") as answers:
                received = [answers.readline() for _ in range(lines)]
        except (BrokenPipeError, ConnectionResetError):
            return []
    return [json.loads(line) for line in received if line]


@contextmanager
def answering(path: Path, answer: Liar) -> Iterator[None]:
    """Something that listens where a daemon should, and answers each connection in its own way."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)

        def serve_one(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                answer(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve_one, args=listener.accept()[:1]).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def saying(line: bytes) -> Liar:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(line + b"\n")

    return answer


def result(value: object) -> bytes:
    return json.dumps({"result": value}).encode()


STATUS = {
    "pid": 1, "mountpoint": "/mnt", "device": "0:57", "read_only": False, "options": "rw",
    "engine": "native", "transport": "fd", "transport_reason": "it was asked for",
    "data_plane_pid": 2, "effective_scheme": "pmem", "uptime_seconds": 1.5, "fault_count": 0,
    "io": {"reads": 0, "writes": 0, "fsyncs": 0, "read_bytes": 0, "written_bytes": 0},
    "space": None,
    "pool": {
        "path": "/dev/shm/pmem0", "name": "pmem0", "uuid": "00", "kind": "tmpfs file",
        "durability": "nothing", "reserved": True, "mode": "block", "scheme": "pmem",
        "state": "dirty", "format_version": 1, "software": "pmemfs", "size_bytes": 1 << 30,
        "page_size_bytes": 4096, "page_count": 1 << 18, "alignment_bytes": 1 << 21,
        "generation": 7, "mount_count": 1, "created": "now", "mounted": "now",
        "zones": {"data": {"offset_bytes": 0, "size_bytes": 4096}}, "damaged_labels": [],
    },
}  # fmt: skip
COUNTS = {"answered": 1, "forwarded": 0, "failed": 0, "moved_bytes": 1, "total_ns": 1}
SAMPLE = {
    "pid": 1, "engine": "native", "transport": "fd", "seconds": 1.0, "control": {},
    "workers": [{"number": 0, "cpu": None, "sleeps": 0, "spins": 0,
                 "operations": {"read": {**COUNTS, "latencies": {"4": 1}}}}],
}  # fmt: skip
PAGES = {
    "scheme": "pmem", "page_size_bytes": 4096, "generation": 1, "counts": {"total": 1},
    "hottest": [{"pfn": 1, "mapping": 1, "index": 0, "refcount": 0, "dirty": False, "reads": 1,
                 "writes": 1, "last_access_ns": 1}],
}  # fmt: skip
EXTENTS = {
    "inode": 2, "size_bytes": 4096, "is_complete": True,
    "extents": [{"offset_bytes": 0, "pfn": 1, "length_bytes": 4096, "is_aligned": False}],
}  # fmt: skip


WRONG = (None, True, 3, -1, 1 << 64, -(1 << 80), 1e999, "\x1b[2J", [], {}, [[[]]], {"a": {}})


def lies_about(report: Any) -> list[bytes]:
    """Lines of JSON that have something else in one place of the report, or nothing."""
    ways = list(places(report))
    lies = [with_another(report, way, wrong) for way in ways for wrong in WRONG]
    lies += [with_another(report, way, ...) for way in ways if way]
    return [result(lie).replace(b"Infinity", b"1e999") for lie in lies]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*way, key))


def with_another(value: Any, way: tuple[Any, ...], other: Any) -> Any:
    """A copy of a JSON value with something else in one place; nothing, if that is `...`."""
    if not way:
        return other
    changed = value.copy()
    if len(way) == 1 and other is ...:
        del changed[way[0]]
    else:
        changed[way[0]] = with_another(value[way[0]], way[1:], other)
    return changed
