"""A Ceph cluster of one monitor and one OSD, on loopback, for all tests that run together.

Processes that run tests share it: the first that needs it starts it, which takes ten seconds, and
the last one ends it. A node that a killed run has left is ended by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kit.commands import run_command
from kit.processes import end_process, is_running, wait_until

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "rados", "rbd")
_TRIES = 5
_ANSWER_SECONDS = 20
WATCH_SECONDS = 8
"""After so long a client that died without a word is forgotten; 30 s in other clusters."""

# Grace, interval, timeout and tick: a cluster whose OSD was killed answers soon after it is back.
_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
ms bind ipv4 = true
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
mon warn on pool no redundancy = false
mon data avail crit = 0
osd crush chooseleaf type = 0
osd client watch timeout = {watch}
osd heartbeat grace = 2
paxos propose interval = 0.05
objecter timeout = 2
objecter tick interval = 0.5
run dir = {directory}/run
log file = /dev/null
admin socket = {directory}/run/$name.$pid.asok
pid file = {directory}/run/$name.pid
mon data = {directory}/mon
osd data = {directory}/osd
osd objectstore = {store}
memstore device bytes = 1073741824
osd memory target = 939524096
bluestore block size = 2147483648
[client]
rbd default features = 61
rbd mtime update interval = 1
"""


class CephNode:
    """A running node with the pool `rbd`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf = directory / "ceph.conf"

    def rbd(self, *words: object) -> str:
        """What a command of the `rbd` program says."""
        return self._run("rbd", "-c", self.conf, *words)

    def ceph(self, *words: object) -> str:
        """What a command of the `ceph` program says."""
        return self._run("ceph", "-c", self.conf, "--connect-timeout", 20, *words)

    def pid(self, name: str) -> int:
        """The process of `osd.0` or `mon.a`."""
        return int((self.directory / "run" / f"{name}.pid").read_text())

    def kill_osd(self) -> None:
        """End the OSD as a crash does; what it has answered is stored."""
        pid = self.pid("osd.0")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "the OSD is dead")

    def start_osd(self) -> None:
        """Start the OSD again, and wait until it answers."""
        self._start_osd()
        self.wait_for_answers()

    def wait_for_answers(self) -> None:
        """Wait until all placement groups answer, after the OSD was away.

        One that waits for a lease of the time before may do so for ever. It begins anew if the OSD
        is said to be down.
        """
        for _ in range(_TRIES):
            with suppress(subprocess.TimeoutExpired):
                # Hundreds of objects, which lie in all of them, and are removed.
                done = run_command("rados", "-c", self.conf, "-p", "rbd", "bench", 1, "write",
                                   "-b", 4096, timeout=_ANSWER_SECONDS)  # fmt: skip
                if done.code == 0:
                    return
            self.ceph("osd", "down", 0)
        raise AssertionError("the OSD does not answer")

    def _start_osd(self) -> None:
        self._run("ceph-osd", "-i", 0, "-c", self.conf, "--osd-data", self.directory / "osd")

    def start(self, store: str) -> None:
        """Make a new cluster. `store` is `memstore`, which forgets, or `bluestore`."""
        for name in ("mon", "osd", "run"):
            (self.directory / name).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fsid, conf = uuid.uuid4(), self.conf
        text = _CONF.format(fsid=fsid, port=port, directory=self.directory, store=store,
                            watch=WATCH_SECONDS)  # fmt: skip
        conf.write_text(text)
        mon = ("ceph-mon", "-i", "a", "-c", conf, "--mon-data", self.directory / "mon",
               "--public-addr", f"v2:127.0.0.1:{port}")  # fmt: skip
        self._run(*mon, "--mkfs", "--fsid", fsid)
        self._run(*mon)
        self.ceph("osd", "create")
        self.ceph("osd", "crush", "add", "osd.0", 1, "root=default", "host=localhost")
        osd = self.directory / "osd"
        self._run("ceph-osd", "-i", 0, "-c", conf, "--mkfs", "--osd-data", osd)
        self._start_osd()
        self.ceph("osd", "pool", "create", "rbd", 8, 8)
        self.rbd("pool", "init", "rbd")

    def end(self) -> None:
        """End all processes of it and remove what it has stored."""
        for name in ("osd.0", "mon.a"):
            with suppress(OSError, ValueError):
                pid = self.pid(name)
                if str(self.directory).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL)
                    end_process(pid)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, *words: object) -> str:
        done = run_command(*words)
        assert done.code == 0, f"{words}: {done.err}"
        return done.out


@dataclass
class Image:
    """An image of its own for one test."""

    node: CephNode
    spec: str

    @property
    def text(self) -> str:
        """It as an origin."""
        return f"rbd:{self.spec}?conf={self.node.conf}"

    @property
    def text_of_another(self) -> str:
        """It as an origin of somebody else, who has another name in the cluster."""
        return f"rbd:{self.spec}?id=other&conf={self.node.conf}"

    def rbd(self, *words: object) -> str:
        """What the `rbd` program says of it."""
        return self.node.rbd(*words, self.spec)

    def exported(self, path: Path) -> Path:
        """All of its bytes, as everybody but us sees them."""
        self.node.rbd("export", "--no-progress", self.spec, path)
        return path


def missing_programs() -> list[str]:
    """What scripts/install-origins --tests would install, and is not there."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


@contextmanager
def shared_node() -> Iterator[CephNode]:
    """The node that all processes of a test run share."""
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    base = Path(tempfile.gettempdir()) / f"pmemfs-ceph-{os.geteuid()}-{name}"
    node = CephNode(base)
    gate_fd = os.open(f"{base}.gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    users_fd = os.open(f"{base}.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _locked(gate_fd):
            with suppress(BlockingIOError):
                fcntl.flock(users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Nobody uses one, so what is there is left from a run that was killed.
                node.end()
                # An OSD that is killed by a test has to have its content afterwards.
                node.start("bluestore")
            fcntl.flock(users_fd, fcntl.LOCK_SH)
        try:
            yield node
        finally:
            with _locked(gate_fd), suppress(BlockingIOError):
                fcntl.flock(users_fd, fcntl.LOCK_UN)
                fcntl.flock(users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                node.end()
    finally:
        os.close(users_fd)
        os.close(gate_fd)


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
