"""Other caches before the same origin, each in its fastest reasonable settings."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmark import backing, host
from benchmark.cacheplaces import OriginPlace, nbd_server
from benchmark.cells import KIB, MIB
from benchmark.errors import SubjectUnavailable
from benchmark.peers import INSTALL, START_SECONDS

# what is read again and again, small enough for each cache
WARM_BYTES = 2 * MIB
S3_BYTES = 256 * MIB
FILE = "origin"

Peer = Callable[[OriginPlace], contextlib.AbstractContextManager[Path]]


@contextlib.contextmanager
def nbdfuse(origin: OriginPlace) -> Iterator[Path]:
    """nbdfuse on nbdkit with its cache filter, whose file lies in /dev/shm."""
    backing.require_fuse()
    backing.require_program("nbdfuse", INSTALL)
    backing.require_program("nbdkit", INSTALL)
    words = ["--filter=cache", "nbd", f"uri={origin.text}", "cache=writeback",
             "cache-on-read=true", "cache-min-block-size=4K"]  # fmt: skip
    with nbd_server(words, host.SHM) as (_uri, socket), _mounted() as mountpoint:
        path, ready = mountpoint / FILE, mountpoint.with_name("pid")
        command = ["nbdfuse", "--connections", "4", "--pidfile", str(ready), str(path)]
        with _server([*command, "--unix", str(socket)], mountpoint, ready):
            yield path


@contextlib.contextmanager
def qsd(origin: OriginPlace) -> Iterator[Path]:
    """qemu-storage-daemon's FUSE export of the origin; it caches nothing."""
    backing.require_fuse()
    backing.require_program("qemu-storage-daemon", INSTALL)
    if "fuse" not in backing.checked(["qemu-storage-daemon", "--help"]):
        raise SubjectUnavailable("this qemu-storage-daemon was built without FUSE exports")
    socket = origin.text.partition("socket=")[2]
    with _mounted() as folder:
        path, ready = folder / FILE, folder.with_name("pid")
        path.touch()
        server = f"driver=nbd,node-name=nbd,server.type=unix,server.path={socket}"
        export = f"type=fuse,id=export,node-name=nbd,mountpoint={path},writable=on"
        words = ["--blockdev", server, "--export", export]
        command = ["qemu-storage-daemon", "--pidfile", str(ready), *words]
        try:
            with _server(command, path, ready):
                yield path
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def s3backer(_origin: OriginPlace) -> Iterator[Path]:
    """s3backer with its block cache. Its buckets can only be S3's or, for tests, a folder."""
    backing.require_fuse()
    backing.require_program("s3backer", INSTALL)
    with (
        tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as bucket,
        _mounted() as mountpoint,
    ):
        settings = ["--test", "-f", f"--size={S3_BYTES}", "--blockSize=4k", f"--filename={FILE}",
                    f"--blockCacheSize={S3_BYTES // (4 * KIB)}"]  # fmt: skip
        path = mountpoint / FILE
        with _server(["s3backer", *settings, bucket, str(mountpoint)], mountpoint, path):
            yield path


PEERS: dict[str, Peer] = {"nbdfuse": nbdfuse, "qsd": qsd, "s3backer": s3backer}


@contextlib.contextmanager
def _mounted() -> Iterator[Path]:
    """An empty folder to mount on, in another one."""
    with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as folder:
        mountpoint = Path(folder) / "mnt"
        mountpoint.mkdir()
        yield mountpoint


@contextlib.contextmanager
def _server(command: list[str], mountpoint: Path, ready: Path) -> Iterator[None]:
    """A program that mounts, until this ends; ``ready`` holds something once it serves."""
    server = host.Server(command)
    try:
        server.await_ready(lambda: host.holds_something(ready), START_SECONDS)
        yield
    finally:
        try:
            backing.unmount(mountpoint)
            server.await_end(backing.END_SECONDS if host.is_mounted(mountpoint) else 1.0)
        finally:
            server.stop()
