"""What the part `cache` works on: origins behind servers and in files, and mounts of caches.

Invariants: all of it lies in a folder of its own, and goes when the stack that it was entered into
is closed, whatever happens.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import backing, fio, host
from benchmark.cells import MIB
from benchmark.errors import SubjectFailed, SubjectUnavailable
from benchmark.pmemfsmount import VOLUME, PmemfsMount
from benchmark.stage import Interrupts
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.mountinfo import mount_at

INSTALL = "run scripts/install-origins --tests"
START_SECONDS = 30.0
# nbdkit answers so many requests of one connection at a time
THREADS = 64
FRAME_STRUCTURE_SHARE = 24
CEPH_IMAGE_BYTES = 256 * MIB
SETTINGS = ("--policy", "write-back", "--max-dirty", "90%", "--max-dirty-age", "0",
            "--read-ahead", "0", "--bypass-sequential", "0")  # fmt: skip


@dataclass(frozen=True)
class OriginPlace:
    """An origin: how pmemfs names it, and how fio works on it without us."""

    text: str
    size_bytes: int
    engine: tuple[str, ...] = field(default=())
    path: Path = Path()

    def target(self, size_bytes: int | None = None) -> fio.Target:
        """What fio opens."""
        return fio.Target(self.path, size_bytes or self.size_bytes, True, self.engine)


@contextlib.contextmanager
def nbdkit(size_bytes: int, *settings: str) -> Iterator[OriginPlace]:
    """nbdkit's memory, which is sparse, behind a socket; `settings` are of its delay filter."""
    backing.require_program("nbdkit", INSTALL)
    filters = ["--filter=delay"] if settings else []
    words = [*filters, "memory", str(size_bytes), *settings]
    with nbd_server(words) as (uri, _socket):
        yield OriginPlace(uri, size_bytes, ("--ioengine=nbd", f"--uri={uri}"))


@contextlib.contextmanager
def nbd_server(words: Sequence[str], scratch: Path = host.SHM) -> Iterator[tuple[str, Path]]:
    """nbdkit with these words: its URI and its socket. Its filters' files lie in ``scratch``."""
    folder = backing.make_folder()
    socket, ready = folder / "socket", folder / "pid"
    where = ["--unix", str(socket), "--pidfile", str(ready), "--threads", str(THREADS)]
    serve = ["env", f"TMPDIR={scratch}", "nbdkit", "--foreground", "--exit-with-parent"]
    server = host.Server([*serve, *where, *words])
    try:
        server.await_ready(lambda: host.holds_something(ready), START_SECONDS)
        yield f"nbd+unix:///?socket={socket}", socket
    finally:
        server.stop()
        for path in (socket, ready):
            path.unlink(missing_ok=True)
        folder.rmdir()


@contextlib.contextmanager
def disk_file(size_bytes: int) -> Iterator[OriginPlace]:
    """A file on a disk, written to its end."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix=backing.PREFIX) as folder:
        path = Path(folder) / "origin"
        backing.write_new(path, size_bytes)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        engine = "io_uring" if host.io_uring_allowed() else "libaio"
        words = (f"--ioengine={engine}", f"--filename={path}")
        yield OriginPlace(str(path), size_bytes, words, path)


@contextlib.contextmanager
def ceph_image() -> Iterator[OriginPlace]:
    """An image in a one-node Ceph, which the tests' kit starts; it takes about ten seconds."""
    from benchmark.ceph import image  # the kit is there in a clone only

    with image(CEPH_IMAGE_BYTES) as (text, words):
        yield OriginPlace(text, CEPH_IMAGE_BYTES, words)


class CacheMount(PmemfsMount):
    """A pool of mode cache."""

    def __init__(self, name: str) -> None:
        super().__init__(name, mode="cache")

    @property
    def path(self) -> Path:
        """The one file of it."""
        return self.mountpoint / VOLUME

    def target(self, size_bytes: int) -> fio.Target:
        """Its first bytes for fio."""
        return fio.Target(self.path, size_bytes, True)

    def figures(self) -> dict[str, Any]:
        """What the daemon counts."""
        return self._ask("cache-info")

    def info(self) -> dict[str, Any]:
        """What the daemon says of the mount. To start a command for it takes longer than a mount's
        own work."""
        return self._ask("info")

    def _ask(self, method: str) -> dict[str, Any]:
        mount = mount_at(str(self.mountpoint))
        if mount is None:
            raise SubjectFailed(f"{self.mountpoint} is not mounted")
        return dict(call(socket_path(mount), method))


def pool_bytes_for(cached_bytes: int) -> int:
    """How large a pool must be to cache so many bytes: page structures, tags, and alignment."""
    return (cached_bytes + cached_bytes // FRAME_STRUCTURE_SHARE) // MIB * MIB + 8 * MIB


@contextlib.contextmanager
def made_cache(
    name: str, origin: OriginPlace, pool_bytes: int, interrupts: Interrupts, is_sparse: bool = False
) -> Iterator[CacheMount]:
    """A cache that was made, and is not mounted yet."""
    if not is_sparse and pool_bytes > host.shm_free_bytes():
        raise SubjectUnavailable(f"{host.SHM} can't take {pool_bytes // MIB} MiB")
    made = CacheMount(name)
    try:
        made.create(pool_bytes, is_sparse, ("--origin", origin.text, *SETTINGS))
        yield made
    finally:
        interrupts.disarm()
        made.remove()


@contextlib.contextmanager
def mounted_cache(
    name: str, origin: OriginPlace, pool_bytes: int, interrupts: Interrupts
) -> Iterator[CacheMount]:
    """A cache that is mounted."""
    with made_cache(name, origin, pool_bytes, interrupts) as made:
        made.mount()
        yield made


class CacheSubject:
    """A cache with room for all of its origin, as something to measure with the part `io`."""

    name = "cache"
    description = "pmemfs, mode cache, write-back, before nbdkit's memory"
    direct = True

    def __init__(self, origin: OriginPlace) -> None:
        self.notes: list[str] = []
        self._origin = origin
        self._made = CacheMount(self.name)

    @property
    def path(self) -> Path:
        """The cache's file."""
        return self._made.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Three times what is offered, so that hardly any set is full of it."""
        return pool_bytes_for(3 * size_bytes)

    def setup(self, size_bytes: int) -> None:
        """Make and mount it."""
        settings = ("--origin", self._origin.text, *SETTINGS)
        self._made.create(self.memory_bytes(size_bytes), settings=settings)
        self._made.mount()
        self.notes.append(self._made.served)

    def teardown(self) -> None:
        """Unmount and remove it."""
        self._made.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """Both processes."""
        return self._made.daemon_pids()

    def private_bytes(self) -> int | None:
        """Of both processes, without the pool."""
        return self._made.private_bytes()
