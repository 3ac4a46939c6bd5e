"""gocryptfs on a folder in /dev/shm: encrypted files through FUSE, as users have them today."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmark import backing, host
from benchmark.peers import INSTALL, START_SECONDS


@contextlib.contextmanager
def mounted() -> Iterator[Path]:
    """The directory where it is mounted; AES-256-GCM, as it chooses by itself."""
    backing.require_fuse()
    backing.require_program("gocryptfs", INSTALL)
    with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as folder:
        stored, mountpoint, password = (Path(folder) / name for name in ("stored", "mnt", "word"))
        stored.mkdir()
        mountpoint.mkdir()
        password.write_text(secrets.token_hex(16) + "\n")
        words = ["gocryptfs", "-q", "-passfile", str(password)]
        backing.checked([*words, "-init", "-scryptn", "10", str(stored)])
        server = host.Server([*words, "-fg", "-nosyslog", str(stored), str(mountpoint)])
        try:
            server.await_ready(lambda: host.is_mounted(mountpoint), START_SECONDS)
            yield mountpoint
        finally:
            try:
                backing.unmount(mountpoint)
                server.await_end(backing.END_SECONDS)
            finally:
                server.stop()
