"""`pmemfs umount`: unmount, and come back when the pool is clean."""

from __future__ import annotations

import contextlib
import os
import time

import click

from pmemfs.cli.find import ask, may_ask, require_mount
from pmemfs.cli.mount import reporting_mount_failure
from pmemfs.cli.options import reporting
from pmemfs.cli.output import note, print_json, say, warn
from pmemfs.cli.paths import ANY_PATH
from pmemfs.control.client import daemon_pidfd
from pmemfs.control.places import socket_path
from pmemfs.errors import (
    NoAnswer,
    NotClean,
    NotPermitted,
    PmemfsError,
    SourceBusy,
    UnmountFailed,
    UnmountHangs,
)
from pmemfs.media.label import State
from pmemfs.medium.holders import DELETED, holders_of
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.elsewhere import (
    loop_devices_of,
    named_processes,
    places_elsewhere,
    users_of,
)
from pmemfs.mount.mountpoint import places_of, resolve, unmount
from pmemfs.mount.processes import has_ended
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus
from pmemfs.pool import Pool
from pmemfs.text import counted

_TIMEOUT_SECONDS = 60
_MOMENT_SECONDS = 0.3
"""A daemon that nobody keeps has mostly ended by then."""
_PATIENCE_SECONDS = 5
_ASK_SECONDS = 2


@click.command()
@click.argument("target", metavar="{MOUNTPOINT|POOL}", type=ANY_PATH)
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
@click.option("--flush", is_flag=True, help="Of a cache: give its origin all that is dirty first.")
@reporting
def umount(target: str, lazy: bool, flush: bool, as_json: bool) -> int:
    """Unmount MOUNTPOINT, or POOL wherever it is mounted.

    A pool that is mounted on several directories stays on the others if one of them is unmounted.
    umount(8) and fusermount3 -u unmount as well, but 'pmemfs umount' also waits until the daemon
    has ended, and fails if the daemon did not leave the pool clean. It looks at the pool of the
    caller's own mounts only: root opens no file that another user's daemon names. If another
    mount namespace still has the mount, or a process uses what was detached, the daemon goes on:
    the command says who has it, and does not wait. Programs that still hold pages of the pool keep
    it from being mounted again; the command warns of them.

    A cache keeps its blocks, those as well that its origin lacks, of which the command warns. With
    --flush the origin is complete afterwards; if that fails, the cache stays mounted.

    Exit codes: 0 unmounted, 2 bad usage, 32 anything else.
    """

    def attempt() -> int:
        mount = require_mount(target)
        if not may_ask(mount):
            # fusermount3 says something else.
            raise NotPermitted(path=mount.mountpoint, uid=mount.owner_uid)
        # A pool is unmounted wherever it appears; a mountpoint, as it is told.
        is_mountpoint = mount.mountpoint == resolve(target)
        places = [mount] if is_mountpoint else places_of(mount)
        if flush:
            _flush(mount, target)
        with contextlib.closing(_Daemon.of(mount)) as daemon:
            _unmount_all(places, lazy=lazy)
            goes_on = daemon.who_uses_it(_MOMENT_SECONDS) if lazy else daemon.wait(target)
            _warn_of(daemon.holders(), mount.source)
            _warn_of_lack(daemon.origin_lacks(), mount.source)
        if as_json:
            unmounted = [place.mountpoint for place in places]
            print_json({"pool": mount.source, "unmounted": unmounted, "goes_on": goes_on or None})
        elif goes_on:
            say(goes_on)
        return 0

    return reporting_mount_failure(attempt)


def _flush(mount: Mount, target: str) -> None:
    """Let the origin of a cache be complete. Raises NotACache, and as `ask`."""
    from pmemfs.cli.cache_asking import ask_showing_dirty, require_cache
    from pmemfs.media.cachereport import Flushed

    require_cache(target)
    ask_showing_dirty(mount, "cache-flush", Flushed, target)


def _unmount_all(places: list[Mount], *, lazy: bool = False) -> None:
    for place in reversed(places):
        note(f"{place.source}: unmounting it from {place.mountpoint}")
        try:
            unmount(place.mountpoint, lazy=lazy)
        except UnmountHangs:
            # It lacks an answer, so its users are not the reason; umount(8) would be among them.
            raise
        except UnmountFailed as error:
            who = _who_keeps(place)
            if not who:
                raise
            why = f"{error.facts['why']}: {who}, or detach it with 'pmemfs umount --lazy'"
            raise UnmountFailed(path=place.mountpoint, why=why) from None


def _who_keeps(place: Mount) -> str:
    """Who uses a mount, and what to do about it; empty where nobody is seen."""
    # This command may have been started in the mount, and ends before anybody reads this.
    users = [pid for pid in users_of(place) if pid != os.getpid()]
    if users:
        return f"{named_processes(users)} {_use(users)} it; close it there"
    if loops := loop_devices_of(place):
        use = "uses" if len(loops) == 1 else "use"
        return (f"{' and '.join(loops)} {use} it; unmount what is on it and run "
                f"'losetup -d {' '.join(loops)}'")  # fmt: skip
    return ""


def _use(pids: list[int]) -> str:
    return "uses" if len(pids) == 1 else "use"


def _warn_of(holders: list[int], pool: str) -> None:
    """Say who still has arrays over a pool, which keep it from being mounted."""
    if holders:
        who = f"{named_processes(holders)} still {'holds' if len(holders) == 1 else 'hold'}"
        warn(f"{pool}: {who} pages of it; the pool can't be mounted again before these are free")


def _warn_of_lack(lack: str, pool: str) -> None:
    """Say that an origin is not to be used by itself."""
    if lack:
        warn(f"{pool}: {lack}; don't use the origin without the pool before 'pmemfs flush {pool}'")


class _Daemon:
    """The daemon of a mount, as it is known before the mount ends."""

    def __init__(
        self, mount: Mount, pidfd: int | None, status: MountStatus | None, pool_fd: int | None
    ) -> None:
        self._mount = mount
        self._pidfd = pidfd
        self._status = status
        self._pool_fd = pool_fd

    @classmethod
    def of(cls, mount: Mount) -> _Daemon:
        """What the daemon says of itself; as little as can be said where none answers."""
        pidfd = daemon_pidfd(socket_path(mount), owner_uid=mount.owner_uid)
        if pidfd is None:
            return cls(mount, None, None, None)
        try:
            status = ask(mount, "info", MountStatus, timeout_seconds=_PATIENCE_SECONDS)
        except PmemfsError:
            return cls(mount, pidfd, None, None)
        # Root opens nothing that another user's daemon names.
        is_ours = mount.owner_uid == os.geteuid()
        return cls(mount, pidfd, status, _opened_pool(status) if is_ours else None)

    def close(self) -> None:
        """Let go of the daemon, and of the pool: a deleted file has its memory until then."""
        for fd in (self._pidfd, self._pool_fd):
            if fd is not None:
                os.close(fd)

    def wait(self, target: str) -> str:
        """Return when it has ended, or soon where others still have the mount: who they are.

        A new mount namespace has copies of all mounts, and may let go of them in a moment.

        Raises NoAnswer, and NotClean.
        """
        if self._pidfd is None:
            return ""
        note(f"{self._mount.source}: waiting for its daemon to end")
        began = time.monotonic()
        while not has_ended(self._pidfd, _MOMENT_SECONDS):
            seconds = time.monotonic() - began
            # What nobody is seen to have may still have to notice that it is to end.
            is_used = bool(users_of(self._mount)) or seconds > _PATIENCE_SECONDS
            if self._is_elsewhere() or (is_used and self._is_serving()):
                return self.who_uses_it(0)
            if seconds > _TIMEOUT_SECONDS:
                raise NoAnswer(path=target, why=f"it has not ended after {_TIMEOUT_SECONDS} s")
        if self._pool_fd is not None and not _is_clean(f"/proc/self/fd/{self._pool_fd}"):
            raise NotClean(path=target)
        return ""

    def holders(self) -> list[int]:
        """The processes that hold pages of the pool, which nobody serves any more."""
        status = self._status
        if self._pidfd is None or status is None or not (status.pins and status.pins.pin_count):
            return []
        if not has_ended(self._pidfd, 0):
            return []
        # The file may have another name by now.
        own = f"/proc/self/fd/{self._pool_fd}"
        path = status.pool.path if self._pool_fd is None else os.readlink(own)
        return holders_of(path.removesuffix(DELETED))

    def origin_lacks(self) -> str:
        """What only the pool of a cache has, when nobody serves it any more; empty if nothing."""
        if self._status is None or self._status.pool.mode != "cache" or self._pool_fd is None:
            return ""
        if self._pidfd is None or not has_ended(self._pidfd, 0):
            return ""
        # No other pool waits for this to be loaded.
        from pmemfs.volume.cache.heads import StoredHead

        # A pool that is mounted again already is its new mount's business.
        with contextlib.suppress(PmemfsError, OSError):
            own = f"/proc/self/fd/{self._pool_fd}"
            with contextlib.closing(MappedMedium.open(own, read_only=True)) as medium:
                head = StoredHead.open(Pool.open(medium)).head
            if not head.is_settled:
                return f"its origin {head.origin} may lack blocks"
            if head.dirty_blocks:
                blocks = counted(head.dirty_blocks, "block", "blocks")
                return f"its origin {head.origin} lacks {blocks}"
        return ""

    def who_uses_it(self, seconds: float) -> str:
        """Why it goes on, unless it ends within some seconds; empty if it does, or nobody knows."""
        if self._pidfd is None or has_ended(self._pidfd, seconds):
            return ""
        pool, places = self._mount.source, [place.mountpoint for place in places_of(self._mount)]
        if places:
            return f"{pool} is still mounted on {' and '.join(places)}"
        place = next(places_elsewhere(self._mount), None)
        if place:
            return f"{pool} is still mounted on {place}, and its daemon goes on until that ends"
        users = users_of(self._mount)
        if users:
            whose = f"{named_processes(users)} still {_use(users)} it"
            return f"{pool}: {whose}, and its daemon goes on until nobody does"
        if self._is_serving():
            return (f"{pool} is still used by something that can't be seen from here, such as a "
                    "container, and its daemon goes on until nothing does")  # fmt: skip
        return ""

    def _is_elsewhere(self) -> bool:
        """Whether the mount goes on, in this mount namespace or in another one."""
        return bool(places_of(self._mount)) or any(places_elsewhere(self._mount))

    def _is_serving(self) -> bool:
        """Whether it still answers: one that ends does not, however long that takes."""
        if self._status is None:
            return False
        with contextlib.suppress(PmemfsError):
            now = ask(self._mount, "info", MountStatus, timeout_seconds=_ASK_SECONDS)
            # Its socket may be that of another mount by now, which has got the same number.
            return (now.pid, now.pool.uuid) == (self._status.pid, self._status.pool.uuid)
        return False


def _opened_pool(status: MountStatus) -> int | None:
    """The pool of a mount that may write to it, open; None where it can't, or can't be opened.

    By the daemon's own descriptor, because the file may have another name by now, or none.
    """
    if status.read_only:
        return None
    paths = [status.pool.path]
    if status.pid and status.pool_fd is not None:
        # The kernel shows nobody but root what a process has that has keys.
        paths.insert(0, f"/proc/{status.pid}/fd/{status.pool_fd}")
    for path in paths:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _is_clean(pool_path: str) -> bool:
    """Whether a pool was left clean, or is mounted again already."""
    try:
        medium = MappedMedium.open(pool_path, read_only=True)
    except SourceBusy:
        return True
    try:
        return Pool.open(medium).label.state == State.CLEAN
    finally:
        medium.close()
