"""Neither plane waits for the other to take what it sends, however much is under way.

Of a file with set-user-ID every read and write goes to the daemon. A burst from one CPU fills both
directions of the socket that the worker of that CPU shares with the daemon.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

from kit import burst
from kit.commands import BIN, run_command
from kit.mounts import NATIVE_ONLY, Mounted, PoolMaker
from pmemfs.control.starter import KEEP
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, *NATIVE_ONLY]


def unpublished_file(pools: PoolMaker, prefix: Sequence[object]) -> Mounted:
    """A mount, made with `prefix` before the command, with a file `f` that is never published."""
    pool = pools.create("pmem0", "128M", "--mode", "fs")
    mounted = Mounted(pool, pools.mountpoint())
    done = run_command(
        *prefix, BIN / "pmemfs", "mount", *pools.engine.options, pool, mounted.mountpoint
    )
    assert done.code == 0, done.err
    file = mounted.mountpoint / "f"
    file.write_bytes(bytes(burst.REQUESTS * MIB))
    file.chmod(0o4755)
    return mounted


BUFFERS: dict[str, tuple[object, ...]] = {
    "large-buffers": (),
    "default-buffers": ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"),
}


@pytest.mark.parametrize("buffers", BUFFERS)
def test_a_burst_of_any_size_is_answered(pools: PoolMaker, buffers: str) -> None:
    mounted = unpublished_file(pools, BUFFERS[buffers])
    for length in (4096, 64 * 1024, 128 * 1024, MIB):
        # A process of its own, since one that hangs in the kernel ends with the mount only.
        done = run_command(
            sys.executable, burst.__file__, mounted.mountpoint / "f", length, 10, timeout=100
        )
        assert done.code == 0, done.err
    assert mounted.info()["pid"]


LIAR = """
from pmemfs.daemons import mountd
from pmemfs.fuse.handlers.directories import DirectoryHandlers, Listed

told = DirectoryHandlers.listing

def listing(self, handle, start, take, **wishes):
    if start == 0:
        attributes = self._volume.attributes(1)._replace(ino=1, generation=1)
        take(Listed(b"loop", 1, 4, 1, attributes))
    else:
        told(self, handle, start, take, **wishes)

DirectoryHandlers.listing = listing
mountd.main()
"""


def test_what_the_kernel_forgets_at_once_holds_nobody_up(pools: PoolMaker) -> None:
    # An entry that leads to the root: the kernel refuses it, and forgets it by a request like any
    # other, whose end the reader of the directory waits for.
    pool = pools.create("pmem0", "32M", "--mode", "fs")
    mounted = Mounted(pool, pools.mountpoint())
    pools.mount(pool, at=mounted.mountpoint.name)
    pools.umount(mounted)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon = subprocess.Popen(
        [sys.executable, "-c", LIAR, str(pool), str(mounted.mountpoint),
         "-o", f"engine={pools.engine.name},transport={pools.engine.transport},names_memory=0",
         "--starter-fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    with ours:
        assert b"ready" in ours.recv(4096)
        ours.send(KEEP)
    done = run_command("ls", "-l", mounted.mountpoint, timeout=60)
    assert "loop" in done.out
    assert done.code != 0, "what it leads to can't be looked at"
    assert run_command("stat", mounted.mountpoint, timeout=60).code == 0
    pools.umount(mounted)
    assert daemon.wait(60) == 0
