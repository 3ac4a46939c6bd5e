"""/proc/self/mountinfo: what is mounted where. Asks no file system anything, so it cannot hang.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Collection
from typing import NamedTuple

FUSE_TYPE = "fuse.pmemfs"
DIRTY_PAGE_LIMITS = "/sys/class/bdi/{device}"
"""How much of the page cache may be dirty through a mount. Source:
Documentation/ABI/testing/sysfs-class-bdi of the kernel."""

_USER_ID = re.compile(r"(?:^|,)user_id=(\d+)")
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One line of mountinfo."""

    device: str
    """major:minor, as in stat's st_dev."""
    mountpoint: str
    fs_type: str
    source: str
    options: str
    root: str = "/"
    """The directory of the file system that is mounted there: not all of it by a bind mount."""

    @property
    def minor(self) -> int:
        """The minor device number, which names the connection of a FUSE mount."""
        return int(self.device.partition(":")[2])

    @property
    def number(self) -> int:
        """The device number, as stat's st_dev."""
        major, _, minor = self.device.partition(":")
        return os.makedev(int(major), int(minor))

    @property
    def owner_uid(self) -> int:
        """The user whose FUSE mount it is; 0 where none is said."""
        match = _USER_ID.search(self.options)
        return int(match[1]) if match else 0

    @property
    def flags(self) -> tuple[list[str], list[str]]:
        """What the kernel keeps of this place alone, and of the file system wherever it is."""
        words = self.options.split(",")
        # Each begins with "ro" or "rw".
        second = next((at for at in range(1, len(words)) if words[at] in ("ro", "rw")), len(words))
        return words[:second], words[second:]

    @property
    def is_read_only(self) -> bool:
        """Whether the kernel lets nobody write to the file system, wherever it is mounted."""
        return "ro" in self.flags[1]

    @property
    def is_ours(self) -> bool:
        """Whether it is a mount of pmemfs, alive or dead."""
        return self.fs_type == FUSE_TYPE


class MountChanges:
    """Tells whether something was mounted, unmounted or remounted in this mount namespace.

    Source: proc_pid_mounts(5): the file is readable for poll(2) with an error after each change.
    """

    def __init__(self) -> None:
        self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115
        self._changes = select.poll()
        self._changes.register(self._file, select.POLLPRI)

    def are_there(self) -> bool:
        """Whether there were changes since the last call."""
        return bool(self._changes.poll(0))


def mounts(path: str = "/proc/self/mountinfo") -> list[Mount]:
    """All mounts of this mount namespace; of two on one directory, the later covers the earlier.

    `path` is for a mountinfo elsewhere.
    """
    # The kernel escapes line feeds, but not what else splitlines takes for the end of a line.
    with open(path, "rb") as file:
        return [_parse(line) for line in file.read().split(b"\n") if line]


def mount_at(path: str) -> Mount | None:
    """The mount whose mountpoint is exactly `path` (absolute, no symbolic links)."""
    return next((m for m in reversed(mounts()) if m.mountpoint == path), None)


def mounts_of(source: str, owners: Collection[int]) -> list[Mount]:
    """Mounts of ours of the pool at an absolute path, that one of these users has made."""
    return [m for m in mounts() if m.is_ours and m.source == source and m.owner_uid in owners]


def mount_of_device(st_dev: int) -> Mount | None:
    """A mount of the file system with that device number."""
    device = f"{os.major(st_dev)}:{os.minor(st_dev)}"
    return next((m for m in mounts() if m.device == device), None)


def _parse(line: bytes) -> Mount:
    before, _, after = line.partition(b" - ")
    fields = [_unescape(field) for field in before.split(b" ")]
    fs_type, source, *super_options = map(_unescape, after.split(b" "))
    return Mount(
        device=fields[2],
        mountpoint=fields[4],
        fs_type=fs_type,
        source=source,
        options=",".join([fields[5], *super_options]),
        root=fields[3],
    )


def _unescape(raw: bytes) -> str:
    """A field as a path: of any bytes, whatever text they are."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), raw))
