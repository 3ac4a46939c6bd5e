"""Taking a mount over from a daemon that has died: what it has left, and the order in which another
daemon makes it its own.

    left_by(connection)      the descriptors, as the keeper hands them over
    Left.medium              the pool, still locked
    Left.stop_workers        no worker of the data plane is in a section, and none begins one
    SharedEngine.renew       in a new generation of page structures nobody holds a page
    ...                      the volume opens: its journal first, its search for leaks later;
                             pins are taken anew
    let_workers_go_on        the data plane serves again what the tables prove
    ...                      requests that were handed to the dead daemon come again

Invariants:
- until workers go on, nothing is freed or given out. Otherwise a page could get another owner that
  a client has pinned, or that a worker is just reading;
- each step may be the last one: then the next daemon begins with the first step again, and finds no
  less than this one has found.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from typing import NamedTuple

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.fuse.joint import Joint
from pmemfs.fuse.keeping import Deaths, Keeper, Stored, joined, stored
from pmemfs.fuse.planes import PlaneProcess, PlaneSettings, Sockets
from pmemfs.fuse.served import Keys
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import Before, MappedMedium
from pmemfs.mount.mountpoint import places_of
from pmemfs.mount.options import MountOptions
from pmemfs.mount.transport import Choice
from pmemfs.mountinfo import FUSE_TYPE, Mount
from pmemfs.origin.base import Left as OriginLeft

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 10
_POLL_SECONDS = 0.0002


class Left(NamedTuple):
    """What a daemon that has died has left of its mount."""

    keeper: Keeper
    deaths: Deaths
    """Of daemons, that no daemon has noted yet."""
    shared: SharedMemory
    pool_fd: int
    fuse_fd: int
    sockets: Sockets
    entries_fd: int
    """The memory of the rings; -1: there are none."""
    plane: PlaneProcess
    """The data plane, which may have died as well."""
    transport_reason: str
    keys: Keys | None
    """The secret memory; None: there is none, because there were no keys."""
    others: dict[str, Stored]
    """What the keeper has besides."""

    @property
    def joint(self) -> Joint:
        """What joins the planes."""
        settings = PlaneSettings.of(self.shared)
        choice = Choice("uring" if settings.queue_count else "fd", self.transport_reason)
        return Joint(self.shared, self.sockets, settings, choice)

    def options(self, first: MountOptions) -> MountOptions:
        """The options of the mount as of its last remount; it was first mounted with `first`."""
        return first.changed_as(MountOptions.parse(self.shared.options))

    @property
    def origin(self) -> OriginLeft | None:
        """What there is of the origin of a cache."""
        kept = self.others.get("origin")
        return kept and OriginLeft(kept.fds, kept.data)

    @property
    def listener(self) -> tuple[int, int, str]:
        """The control socket, a descriptor of its name, and its path."""
        path, (fd, name_fd) = self.others["listener"]
        return fd, name_fd, os.fsdecode(path)

    def medium(self, path: str) -> MappedMedium:
        """The pool, whose path is this one, as far as anybody knows. Raises UnusableSource."""
        header = self.shared.header
        before = Before(list(Durability)[header.durability], was_reserved=bool(header.reserved))
        access = fcntl.fcntl(self.pool_fd, fcntl.F_GETFL) & os.O_ACCMODE
        return MappedMedium.adopt(path, self.pool_fd, before, read_only=access == os.O_RDONLY)

    def mount(self, mountpoint: str, source: str) -> Mount:
        """The mount. If it is nowhere any more, because it was detached while files were open, this
        is how it was."""
        number = self.shared.header_word("device")
        gone = Mount(f"{os.major(number)}:{os.minor(number)}", mountpoint, FUSE_TYPE, source, "")
        # The kernel gives the number of an ended mount to the next one, which has another pool.
        return next(iter(places_of(gone)), gone)

    def stop_workers(self, name: str) -> None:
        """Return when no worker is in a section; none begins one before `resume`.

        A data plane that does not come to that ends here. `name` is what the log calls the pool.
        """
        shared = self.shared
        if "transfers" in self.others:
            # Until these are over, their pages are held by what the dead daemon has counted.
            # Only a cache needs this.
            from pmemfs.volume.cache.life import await_transfers

            await_transfers(self.others["transfers"].fds[0])
        shared.forget_control()
        grace = shared.pause()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not shared.is_over(grace) and not self.plane.has_ended():
            if time.monotonic() > deadline:
                log.error("%s: the data plane (pid %d) does not end a request within %d s, and "
                          "is killed", name, self.plane.pid, _PATIENCE_SECONDS)  # fmt: skip
                self.plane.kill()
                self.plane.status()
            time.sleep(_POLL_SECONDS)
        if self.plane.has_ended():
            shared.forget_workers()
        shared.free_control_locks()
        shared.take_back_holds()


def inherited(fd: int, *, foreground: bool) -> dict[str, Stored]:
    """All that the keeper at the other end of a socket has. Raises OSError.

    In the `foreground` this process gets the standard error of the first daemon, to log there.
    """
    connection = socket.socket(fileno=fd)
    items = stored(connection)
    items["connection"] = Stored(b"", [connection.detach()])
    if foreground and "log" in items:
        os.dup2(items["log"].fds[0], 2)
    return items


def left_by(items: dict[str, Stored]) -> Left:
    """What `inherited` is of a mount. Raises ForeignSharedMemory if another version of pmemfs has
    left it."""
    connection = socket.socket(fileno=items.pop("connection").fds[0])
    keeper, deaths = joined(connection, items.pop("keeper"))
    plane = items.pop("plane")
    keys = items.pop("keys", None)
    if "standby" in items:
        # It waits for the end of whoever has this, and is still there only during an upgrade.
        for fd in items.pop("standby").fds:
            os.close(fd)
    return Left(
        keeper, deaths,
        shared=SharedMemory(*items.pop("shared").fds),
        pool_fd=items.pop("pool").fds[0],
        fuse_fd=items.pop("fuse").fds[0],
        sockets=Sockets.of(items.pop("sockets").fds),
        entries_fd=items.pop("entries").fds[0] if "entries" in items else -1,
        plane=PlaneProcess(int(plane.data), plane.fds[0]),
        transport_reason=items.pop("transport").data.decode(),
        keys=keys and Keys(keys.fds[0]),
        others=items,
    )  # fmt: skip
