"""Mounting a pool that is mounted already: the same mount appears on another directory too.

As with a block device that mount(8) mounts a second time. A bind mount does it, which the kernel
grants root only; unmounting either leaves the other. There is one daemon with one set of options,
so whoever asks for others is refused, as the kernel refuses ro beside rw.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from pmemfs.cli.find import ask
from pmemfs.control.launch import NotedSignals, Wanted
from pmemfs.errors import MountFailed, PmemfsError, UnmountFailed
from pmemfs.mount.flags import set_flags
from pmemfs.mount.mountpoint import detach, mounts_of_pool, places_of
from pmemfs.mount.options import ENGINES, TRANSPORTS, MountOptions
from pmemfs.mountinfo import Mount, mount_at
from pmemfs.observe.answers import MountStatus
from pmemfs.reach import look

_TIMEOUT_SECONDS = 5
_LOOK_SECONDS = 60
_DEFAULTS = frozenset(
    ("suid", "dev", "nosuid", "nodev", "exec", "atime", "async", "diratime", "symfollow")
)
"""What a mount does anyway, and what each place has for itself."""
_OF_KEEPING = ("keeper", "no_keeper", "no_standby", "hang_timeout=")


@dataclass(frozen=True, slots=True)
class Living:
    """A mount whose daemon answers."""

    mount: Mount
    status: MountStatus


def find_living(pool: str) -> Living | None:
    """A mount of all of a pool; None where there is none, or its daemon doesn't answer."""
    for mount in mounts_of_pool(pool):
        is_whole = mount.root == "/" and mount_at(mount.mountpoint) == mount
        with suppress(PmemfsError):
            if is_whole:
                status = ask(mount, "info", MountStatus, timeout_seconds=_TIMEOUT_SECONDS)
                return Living(mount, status)
    return None


def mount_again(first: Living, wanted: Wanted, signals: NotedSignals) -> None:
    """Let a mount appear where it is wanted, too. Raises MountFailed and Interrupted."""
    there, here = first.mount.mountpoint, wanted.mountpoint
    bind = f"'mount --bind {there} {here}'"

    def refuse(why: str) -> MountFailed:
        return MountFailed(pool=wanted.pool, path=here, why=why)

    if os.geteuid() != 0 or first.mount.owner_uid != 0:
        pid = first.status.pid
        by = f" by process {pid}" if pid else ""
        raise refuse(f"it is in use: mounted on {there}{by}; root may run {bind}")
    differences = _differences(first.status, wanted)
    if differences:
        raise refuse(f"it is in use: mounted on {there} with other options ({differences}); ask "
                     f"for the same, or run {bind}")  # fmt: skip
    if (other := mount_at(here)) and other.is_ours:
        # Made since it was looked at: by another command that mounts the same at the same time.
        raise refuse(f"{other.source} is mounted there")
    done = subprocess.run(["mount", "--bind", "--", there, here], capture_output=True, check=False)
    try:
        signals.check()
        if done.returncode:
            raise refuse(" ".join(os.fsdecode(done.stderr).split()) or f"{bind} failed")
        set_flags(here, ["nosuid", "nodev", *wanted.options.kernel])
        bound = mount_at(here)
        if bound and bound.device != first.mount.device:
            # What was below it: whoever writes there would write to another file system.
            detach(here)
            raise refuse(f"it was unmounted from {there} meanwhile")
        signals.wait_for(lambda: look(here, seconds=_LOOK_SECONDS))
        signals.ignore()
    except BaseException as error:
        if any(place.mountpoint == here for place in places_of(first.mount)):
            with suppress(UnmountFailed):
                detach(here)
        if isinstance(error, OSError):
            why = f"the mount does not answer: {(error.strerror or str(error)).lower()}"
            raise refuse(why) from None
        raise


def _differences(status: MountStatus, wanted: Wanted) -> str:
    """What is there and what is wanted, as far as they differ; empty: they don't."""
    there = _words(MountOptions.parse(status.options))
    here = _words(wanted.options)
    # What was not asked for may be as it is.
    for asked, found, default in (
        (wanted.options.engine, status.engine, ENGINES[0]),
        (wanted.options.transport, status.transport, TRANSPORTS[0]),
    ):
        if asked not in (found, default):
            there, here = there | {found}, here | {asked}
    if _of_keeping(here) <= there:
        there, here = there - _of_keeping(there), here - _of_keeping(here)
    if there == here:
        return ""
    return f"{_shown(there - here)} there, {_shown(here - there)} here"


def _words(options: MountOptions) -> frozenset[str]:
    words = frozenset(options.as_text().split(",")) - _DEFAULTS
    # Those two are compared by what has come of them.
    words = frozenset(w for w in words if not w.startswith(("engine=", "transport=")))
    return words if options.read_only else words | {"rw"}


def _of_keeping(words: frozenset[str]) -> frozenset[str]:
    """Which of these say how the mount outlives its processes."""
    return frozenset(word for word in words if word.startswith(_OF_KEEPING))


def _shown(words: frozenset[str]) -> str:
    return ",".join(sorted(words)) or "none"
