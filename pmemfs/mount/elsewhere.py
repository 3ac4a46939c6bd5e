"""Who else has a mount: other mount namespaces, and the processes that use it. As /proc shows them.

A mount ends when nobody has it any more: a mount namespace may hold a copy, made by unshare(1) or a
container, and a process what it has open, after the mount was detached. Asks no mount anything, so
it cannot hang; shows what this user may see, in this pid namespace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from pmemfs.mountinfo import Mount, mounts

_PROC = "/proc"
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_MOST_NAMED = 5
_STATX_INO = 0x100
_STATX_BYTES = 256
_INODE_AT_BYTES = 32
"""Of `stx_ino`."""
_DEVICE_AT_BYTES = 136
"""Of `stx_dev_major`, see struct statx in statx(2); `stx_dev_minor` is behind it."""

_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph")


class Place(NamedTuple):
    """Where a mount appears in another mount namespace."""

    mountpoint: str
    pid: int
    """A process of that namespace."""

    def __str__(self) -> str:
        return f"{self.mountpoint} in the mount namespace of process {self.pid}"


def places_elsewhere(mount: Mount) -> Iterator[Place]:
    """Where a mount appears in other mount namespaces."""
    identity = (mount.device, mount.source)
    seen = {_namespace("self")}
    for process in _processes():
        with suppress(OSError):
            namespace = _namespace(process)
            if namespace in seen:
                continue
            seen.add(namespace)
            for there in mounts(f"{_PROC}/{process}/mountinfo"):
                if (there.device, there.source) == identity:
                    yield Place(there.mountpoint, int(process))


def users_of(mount: Mount) -> list[int]:
    """The processes that have something of a mount open, mapped, or are in it."""
    major, _, minor = mount.device.partition(":")
    mapped = f" {int(major):02x}:{int(minor):02x} "
    # Of these the kernel asks the server whether they are still there.
    remote = tuple(f"{m.mountpoint}/" for m in mounts() if m.fs_type.startswith(_REMOTE))
    return sorted(
        int(process)
        for process in _processes()
        if _is(process, lambda there: _is_open(there, mount.device, remote))
        or _is(process, lambda there: _has_mapped(there, mapped))
    )


def openers_of(mount: Mount, inodes: Collection[int]) -> dict[str, list[int]]:
    """The paths of these inodes that any process has open or mapped, and these processes."""
    major, _, minor = mount.device.partition(":")
    mapped = f"{int(major):02x}:{int(minor):02x}"
    remote = tuple(f"{m.mountpoint}/" for m in mounts() if m.fs_type.startswith(_REMOTE))
    found: dict[str, set[int]] = {}
    for process in _processes():
        with suppress(OSError):
            for fd in os.listdir(f"{_PROC}/{process}/fd"):
                entry = f"{_PROC}/{process}/fd/{fd}"
                if not _may_look(entry, remote):
                    continue
                device, inode = _identity_of(entry)
                if device == mount.device and inode in inodes:
                    found.setdefault(os.readlink(entry), set()).add(int(process))
        with suppress(OSError):
            for path in _mapped_by(process, mapped, inodes):
                found.setdefault(path, set()).add(int(process))
    return {path: sorted(pids) for path, pids in sorted(found.items())}


def named_openers(mount: Mount, inodes: Collection[int]) -> str:
    """Who has these inodes open, as the subject of a sentence; "" if nobody was found."""
    found = openers_of(mount, inodes)
    shown = [
        f"{path}, which {named_processes(pids)} {'has' if len(pids) == 1 else 'have'} open"
        for path, pids in list(found.items())[:_MOST_NAMED]
    ]
    rest = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")


def _mapped_by(process: str, device: str, inodes: Collection[int]) -> Iterator[str]:
    with open(f"{_PROC}/{process}/maps", errors="replace") as maps:
        for line in maps:
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[3] == device and int(words[4]) in inodes:
                yield words[5].rstrip("\n")


def loop_devices_of(mount: Mount) -> list[str]:
    """The loop devices over files of a mount, which the kernel itself has open."""
    found = []
    for name in sorted(os.listdir("/sys/block")):
        # Other devices have no such file.
        with (
            suppress(OSError),
            open(f"/sys/block/{name}/loop/backing_file", errors="replace") as backing,
        ):
            if backing.read().startswith(f"{mount.mountpoint}/"):
                found.append(f"/dev/{name}")
    return found


def named_processes(pids: list[int]) -> str:
    """Some processes, as the subject of a sentence."""
    if len(pids) == 1:
        return f"process {pids[0]}"
    shown = ", ".join(map(str, pids[:5])) + (", …" if len(pids) > 5 else "")
    return f"{len(pids)} processes ({shown})"


def _is(process: str, question: Callable[[str], bool]) -> bool:
    """Whether something is true of a process; not of one that is gone, or is another user's."""
    try:
        return question(process)
    except OSError:
        return False


def _has_mapped(process: str, mapped: str) -> bool:
    with open(f"{_PROC}/{process}/maps", errors="replace") as maps:
        return mapped in maps.read()


def _is_open(process: str, device: str, remote: tuple[str, ...]) -> bool:
    entries = [f"{_PROC}/{process}/cwd", f"{_PROC}/{process}/root"]
    with suppress(OSError):
        entries += [f"{_PROC}/{process}/fd/{fd}" for fd in os.listdir(f"{_PROC}/{process}/fd")]
    return any(_device_of(entry) == device for entry in entries if _may_look(entry, remote))


def _may_look(entry: str, remote: tuple[str, ...]) -> bool:
    """Whether a link of /proc leads to a file that no server has to be asked for."""
    try:
        target = os.readlink(entry)
    except OSError:
        return False
    return target.startswith("/") and not f"{target}/".startswith(remote)


def _device_of(path: str) -> str:
    """The device of what a link of /proc leads to, which is not asked for anything; or ""."""
    return _identity_of(path)[0]


def _identity_of(path: str) -> tuple[str, int]:
    """As `_device_of`, and the inode."""
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc().statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, buffer):
        return "", 0
    major, minor = (
        int.from_bytes(buffer.raw[at : at + 4], "little")
        for at in (_DEVICE_AT_BYTES, _DEVICE_AT_BYTES + 4)
    )
    inode = int.from_bytes(buffer.raw[_INODE_AT_BYTES : _INODE_AT_BYTES + 8], "little")
    return f"{major}:{minor}", inode


@cache
def _libc() -> Any:
    # Most commands meet no mount of another namespace, and those that do ask for each descriptor.
    import ctypes

    return ctypes.CDLL(None)


def _processes() -> Iterator[str]:
    """The numbers of all processes, as /proc names them."""
    return filter(str.isdecimal, os.listdir(_PROC))


def _namespace(process: str) -> tuple[str, str]:
    """What decides which mounts a process sees, and as which."""
    return os.readlink(f"{_PROC}/{process}/ns/mnt"), os.readlink(f"{_PROC}/{process}/root")
