"""Origins of every kind, with a real server behind each, for tests."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.ceph_node import CephNode
from kit.commands import run_command
from kit.processes import stop, wait_until
from kit.sources import loop_device, needs_root, sparse_file
from pmemfs.units import MIB

SIZE_BYTES = 16 * MIB

KINDS = (
    "disk",
    "tmpfs",
    pytest.param("loop", marks=needs_root),
    "nbd-unix",
    "nbd-tcp",
    pytest.param("rbd", marks=[needs_root, pytest.mark.slow]),
)


@dataclass
class Thing:
    """Something that can be an origin, and what others may do to it."""

    text: str
    kind: str
    meddle: Callable[[], None]
    """Another program writes to its first MiB, as far from us as it can be."""
    grow: Callable[[int], None]
    """Make it so large."""
    another: str = ""
    """The text of another thing of that kind."""


class NbdServer:
    """An nbdkit that can be ended and started again."""

    def __init__(self, *words: object, socket_path: Path | None = None) -> None:
        """`words` are those of nbdkit after its options: the plugin and its settings."""
        if shutil.which("nbdkit") is None:
            pytest.skip("nbdkit is not installed; scripts/install-origins --tests installs it")
        self.words = words
        self._path = socket_path
        self._port = 0 if socket_path else _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def text(self) -> str:
        """Its export as an origin."""
        if self._path:
            return f"nbd+unix:///?socket={self._path}"
        return f"nbd://127.0.0.1:{self._port}/"

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def start(self, *more: object) -> None:
        """Start it, and wait until it listens; `more` are options of nbdkit."""
        where = ("--unix", self._path) if self._path else ("-i", "127.0.0.1", "-p", self._port)
        if self._path:
            self._path.unlink(missing_ok=True)
        words = ("nbdkit", "--foreground", "--exit-with-parent", *where, *more, *self.words)
        self._process = subprocess.Popen([str(word) for word in words])
        wait_until(self._listens, "nbdkit listens")

    def stop(self) -> None:
        """Let it hang, until it gets SIGCONT."""
        stop(self.pid)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "nbdkit has ended"
        try:
            if self._path:
                with socket.socket(socket.AF_UNIX) as end:
                    end.connect(str(self._path))
            else:
                socket.create_connection(("127.0.0.1", self._port)).close()
        except OSError:
            return False
        return True


@contextmanager
def thing(kind: str, request: pytest.FixtureRequest) -> Iterator[Thing]:
    """Something of a kind, of SIZE_BYTES, all of it zeroes."""
    with ExitStack() as stack:
        if kind == "rbd":
            node: CephNode = request.getfixturevalue("ceph")
            yield stack.enter_context(_image(node))
            return
        place = "/dev/shm" if kind == "tmpfs" else "/var/tmp"
        directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir=place))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        file = sparse_file(directory / "origin", SIZE_BYTES)
        other = sparse_file(directory / "other", SIZE_BYTES)
        if kind in ("disk", "tmpfs"):
            yield Thing(str(file), kind, lambda: _scribble(file), lambda n: os.truncate(file, n),
                        another=str(other))  # fmt: skip
        elif kind == "loop":
            device = stack.enter_context(loop_device(file))
            beside = stack.enter_context(loop_device(other))
            yield Thing(str(device), kind, lambda: _scribble(device),
                        lambda n: _grow_loop(device, file, n), another=str(beside))  # fmt: skip
        else:
            path = directory / "socket" if kind == "nbd-unix" else None
            server = NbdServer("file", f"file={file}", socket_path=path)
            stack.callback(server.end)
            yield Thing(server.text, kind, lambda: _scribble(file), lambda n: os.truncate(file, n))


@contextmanager
def _image(node: CephNode) -> Iterator[Thing]:
    names = [f"rbd/{uuid.uuid4().hex[:12]}" for _ in range(2)]
    try:
        for name in names:
            node.rbd("create", "--size", f"{SIZE_BYTES // MIB}M", name)
        first, second = (f"rbd:{name}?conf={node.conf}" for name in names)

        def grow(size_bytes: int) -> None:
            node.rbd("resize", "--no-progress", "--size", f"{size_bytes // MIB}M", names[0])

        yield Thing(first, "rbd", lambda: _bench(node, names[0]), grow, another=second)
    finally:
        for name in names:
            run_command("rbd", "-c", node.conf, "rm", "--no-progress", name)


def _bench(node: CephNode, name: str) -> None:
    node.rbd("bench", "--io-type", "write", "--io-size", "4K", "--io-total", "4K", name)


def _scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(512)
        file.write(os.urandom(16))
        file.flush()
        os.fsync(file.fileno())


def _grow_loop(device: Path, file: Path, size_bytes: int) -> None:
    os.truncate(file, size_bytes)
    done = run_command("losetup", "--set-capacity", device)
    assert done.code == 0, done.err


def _free_port() -> int:
    """A port for a server that may be away for a while. It is none of those that the kernel gives
    to programs that want any, as far as there are others."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    others = range(10_000, lowest_given)
    for port in (*random.sample(others, min(len(others), 100)), 0):
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return int(free.getsockname()[1])
    raise OSError("no port is free")


@contextmanager
def named_as(kind: str, origin: Path, *server: object) -> Iterator[str]:
    """What names an origin of a kind, with that file behind it; `server` are the words of an NBD
    server's."""
    with ExitStack() as stack:
        if kind.endswith("nbd"):
            nbd = NbdServer(*(server or ("file", origin)))
            stack.callback(nbd.end)
            yield nbd.text
        elif kind == "device":
            if os.geteuid() != 0:
                pytest.skip("loop devices are root's")
            yield str(stack.enter_context(loop_device(origin)))
        else:
            yield str(origin)
