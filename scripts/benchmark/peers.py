"""Other programs that offer memory through FUSE, each in its fastest reasonable settings.

Their settings were chosen by measuring on 2 CPUs; what each is started with stands in its
description. qemu-storage-daemon comes in two settings, for one is faster at reads and the other at
writes.
"""

import contextlib
from pathlib import Path

from benchmark import backing, host
from benchmark.cells import MIB
from benchmark.errors import SubjectUnavailable

START_SECONDS = 30.0
INSTALL = "run scripts/install-peers"
FILE_NAME = "bench"


class Peer:
    """What peers have in common: a folder of their own in /dev/shm and programs that stay."""

    name: str
    description: str

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.direct = True
        self._folder: Path | None = None
        self._servers: list[host.Server] = []

    def memory_bytes(self, size_bytes: int) -> int:
        """The bytes offered; whether a server or /dev/shm holds them, they are memory."""
        return size_bytes

    def daemon_pids(self) -> tuple[int, ...]:
        """All of its programs."""
        return tuple(server.pid for server in self._servers)

    def private_bytes(self) -> int | None:
        """Not of interest: it may hold the bytes offered."""
        return None

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _start(self, command: list[str], pid_file: Path) -> None:
        server = host.Server(command)
        self._servers.append(server)
        server.await_ready(lambda: host.holds_something(pid_file), START_SECONDS)

    def _stop(self) -> None:
        """Stop the programs, the last first."""
        while self._servers:
            self._servers[-1].stop()
            self._servers.pop()

    def _look_at(self, path: Path) -> None:
        self.direct = backing.opens_direct(path)
        if not self.direct:
            self.notes.append("O_DIRECT refused: measured with direct=0, through the page cache")

    def _remove_files(self, *names: str) -> None:
        if self._folder is not None:
            for name in names:
                (self._folder / name).unlink(missing_ok=True)
            self._folder.rmdir()
            self._folder = None


class Nbdfuse(Peer):
    """nbdfuse with nbdkit's memory plugin behind it, through a Unix socket.

    Only a server of its own, not a child of nbdfuse's, can be had several connections to.
    """

    name = "nbdfuse"
    description = "nbdfuse on nbdkit's memory plugin, 4 connections, allocator=malloc"

    @property
    def path(self) -> Path:
        """The file that nbdfuse shows."""
        return self._mountpoint / FILE_NAME

    @property
    def _mountpoint(self) -> Path:
        return self._file("mnt")

    def setup(self, size_bytes: int) -> None:
        """Start nbdkit, then nbdfuse."""
        backing.require_fuse()
        backing.require_program("nbdfuse", INSTALL)
        backing.require_program("nbdkit", INSTALL)
        self._folder = backing.make_folder()
        socket, ready = str(self._file("socket")), self._file("nbdkit.pid")
        serve = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", socket]
        memory = ["memory", f"{size_bytes // MIB}M", "allocator=malloc"]
        self._start([*serve, "--pidfile", str(ready), *memory], ready)
        self._mountpoint.mkdir()
        ready = self._file("nbdfuse.pid")
        show = ["nbdfuse", "--connections", "4", "--pidfile", str(ready)]
        self._start([*show, str(self.path), "--unix", socket], ready)
        self._look_at(self.path)

    def teardown(self) -> None:
        """Unmount, end both programs, and remove their folder."""
        if self._folder is None:
            return
        try:
            backing.unmount(self._mountpoint)
        finally:
            if len(self._servers) > 1:
                self._servers[-1].await_end(backing.END_SECONDS)
            self._stop()
        with contextlib.suppress(FileNotFoundError):
            self._mountpoint.rmdir()
        self._remove_files("socket", "nbdkit.pid", "nbdfuse.pid")


class Qsd(Peer):
    """qemu-storage-daemon's FUSE export of a file in /dev/shm, with a setting of its own I/O."""

    def __init__(self, name: str, setting: str) -> None:
        super().__init__()
        self.name = name
        self.description = f"qemu-storage-daemon's FUSE export of a file in /dev/shm, {setting}"
        self._setting = setting
        self._image = backing.MemoryFile(name)

    @property
    def path(self) -> Path:
        """The file that the export is mounted on."""
        return self._file(FILE_NAME)

    def setup(self, size_bytes: int) -> None:
        """Allocate the file and export it."""
        backing.require_fuse()
        backing.require_program("qemu-storage-daemon", INSTALL)
        if "fuse" not in backing.checked(["qemu-storage-daemon", "--help"]):
            raise SubjectUnavailable("this qemu-storage-daemon was built without FUSE exports")
        if "aio=io_uring" in self._setting and not host.io_uring_allowed():
            raise SubjectUnavailable("this kernel has io_uring switched off for programs")
        self._image.create(size_bytes)
        if "cache.direct=on" in self._setting and not backing.opens_direct(self._image.path):
            raise SubjectUnavailable("this kernel's tmpfs refuses O_DIRECT")
        self._folder = backing.make_folder()
        self.path.touch()
        ready = self._file("qsd.pid")
        file = f"driver=file,node-name=file,filename={self._image.path},{self._setting}"
        export = f"type=fuse,id=export,node-name=raw,mountpoint={self.path},writable=on"
        command = ["qemu-storage-daemon", "--pidfile", str(ready), "--blockdev", file]
        command += ["--blockdev", "driver=raw,node-name=raw,file=file", "--export", export]
        self._start(command, ready)
        self._look_at(self.path)

    def teardown(self) -> None:
        """End the daemon, which unmounts, and remove its files."""
        try:
            self._stop()
            if self._folder is not None:
                backing.unmount(self.path)
                self._remove_files(FILE_NAME, "qsd.pid")
        finally:
            self._image.remove()
