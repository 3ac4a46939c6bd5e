"""The python engine's mount: pyfuse3 on /dev/fuse, with everything in this process.

Only this module and `pyfuse3door` load pyfuse3, so a native mount does without it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from pmemfs.engine.base import Engine
from pmemfs.fuse import wire
from pmemfs.fuse.pyfuse3door import Pyfuse3Door
from pmemfs.fuse.remounting import Remounter
from pmemfs.fuse.served import serve_pool
from pmemfs.fuse.session import Session, new_keys
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.mount.making import detach_mount, mount_by_helper
from pmemfs.mount.options import MountOptions
from pmemfs.mountinfo import Mount
from pmemfs.pool import Pool
from pmemfs.pool.pool import random_word

_MAX_BACKGROUND = 1024
"""The kernel's default, 12, would hold back deeper asynchronous direct I/O."""
_MISSES = 256
"""So many requests may wait for the origin of a cache at once."""
_ENDS = (errno.ENODEV, errno.ECONNABORTED, errno.EIO)
"""What libfuse's read returns when the mount is gone, because it was unmounted or aborted."""

_LIBFUSE = ctypes.CDLL(pyfuse3.__file__)
_IGNORED = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def silence_libfuse() -> None:
    """Let libfuse write no lines of its own, such as "short read on fuse device" at the end.

    A failure while pyfuse3 is serving raises, and is logged here.
    """
    _LIBFUSE.fuse_set_log_func(_IGNORED)


class PythonSession(Session):
    """pyfuse3 on /dev/fuse."""

    transport = "pyfuse3"
    transport_reason = "transport pyfuse3; it is the python engine's"

    def __init__(self, pool: Pool, medium: MappedMedium, options: MountOptions) -> None:
        self._medium = medium
        self._identity = random_word()
        self.memmap = open_memmap(pool)
        engine = Engine(medium, self.memmap)
        self.keys = new_keys(pool)
        self.served = serve_pool(pool, medium, self.memmap, engine, options, keys=self.keys)
        notifier = self.served.handlers.notifier
        notifier.tell = _tell
        notifier.forget_inode, notifier.forget_name = _forget_inode, _forget_name
        notifier.doubt_names = self._doubt_names
        self._door = Pyfuse3Door(self.served.handlers)
        self.grower = self._grower(pool, medium)
        self.remounter = Remounter(pool, medium, self.served, self.grower, options)

    def make_mount(self, mountpoint: str, options: MountOptions) -> None:
        fuse_fd, self.mount = mount_by_helper(self._medium.name, mountpoint, options)
        self._fuse_fd = fuse_fd
        # libfuse could mount as well, but pyfuse3 passes it only ASCII names of pools.
        pyfuse3.init(self._door, f"/dev/fd/{fuse_fd}", set())
        _allow_deep_queues(self.mount)

    @property
    def mount_identity(self) -> int:
        return self._identity

    async def serve(self, on_ready: Callable[[Mount], None]) -> None:
        silence_libfuse()
        on_ready(self.mount)
        # If no answer has to wait for anything, one task gives all answers: switching tasks would
        # cost a tenth of each. In mode `fs`, long reads of inodes are waited for, too, but so
        # seldom that not all answers should pay for it.
        task_count = 64 if self._medium.durability is Durability.MSYNC else 1
        if self.served.cache is not None:
            # Misses wait for the origin, and hits must not wait for misses.
            task_count = _MISSES
        try:
            await pyfuse3.main(min_tasks=min(2, task_count), max_tasks=task_count)
        except* OSError as group:
            # An abort of the connection ends the mount, as unmounting does.
            _, others = group.split(_ends_a_mount)
            if others:
                raise others from None

    async def _doubt_names(self) -> None:
        # libfuse has no call for this notice.
        notice = wire.OUT_HEADER.pack(wire.OUT_HEADER.size, wire.NOTIFY_INC_EPOCH, 0)
        with suppress(OSError):
            await trio.to_thread.run_sync(os.write, self._fuse_fd, notice)

    def terminate(self) -> None:
        pyfuse3.terminate()

    def end(self) -> None:
        # libfuse would unmount whatever is on that directory by now.
        detach_mount(self.mount)
        pyfuse3.close(unmount=False)


def _tell(ino: int) -> None:
    # If the kernel does not have the inode, it has nothing to forget.
    with suppress(OSError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=True)


async def _forget_inode(ino: int) -> None:
    with suppress(OSError):
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, pyfuse3.InodeT(ino))


async def _forget_name(parent: int, name: bytes) -> None:
    # In a thread, because the kernel waits for a request that has the directory, and this process
    # has to answer that meanwhile.
    with suppress(OSError):
        await trio.to_thread.run_sync(
            pyfuse3.invalidate_entry, pyfuse3.InodeT(parent), pyfuse3.FileNameT(name)
        )


def _ends_a_mount(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _ENDS


def _allow_deep_queues(mount: Mount) -> None:
    """Raise the connection's limits of requests under way, if this user may."""
    connection = Path("/sys/fs/fuse/connections") / str(mount.minor)
    for name in ("max_background", "congestion_threshold"):
        try:
            (connection / name).write_text(str(_MAX_BACKGROUND))
        except OSError:
            return
