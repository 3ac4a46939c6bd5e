"""What one look at the machine finds: a state, what was seen, and what pmemfs therefore does.

Invariants:
- a finding that can be improved by one command carries that command, exactly as a shell takes it;
- only a setting that is gone after the next boot, and that weakens nothing, is a `Setting`.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmemfs.mount.transport import process_status
from pmemfs.mountinfo import Mount, mounts

CAP_SYS_ADMIN = 21


class State(enum.StrEnum):
    """How good what was found is."""

    OK = "ok"
    COULD_BE_FASTER = "could be faster"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value for a file of /proc/sys or /sys, which lasts until the next boot."""

    path: str
    """Below the root, without a leading slash."""
    value: str

    @property
    def command(self) -> str:
        """What a shell would do it with."""
        if self.path.startswith("proc/sys/"):
            name = self.path.removeprefix("proc/sys/").replace("/", ".")
            return f"sysctl -w {name}={self.value}"
        return f"echo {self.value} > /{self.path}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    therefore: str
    """What pmemfs does because of it, or can't do."""
    command: str | None = None
    """What would improve it, where one command would."""
    is_needed: bool = False
    """Whether pmemfs can't mount without it, so that missing means failed."""
    setting: Setting | None = None
    """The same as `command`, where pmemfs may do it for root."""

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self) | {"setting": None if self.setting is None else self.setting.command}


@dataclass(frozen=True, slots=True)
class Process:
    """Who asks, since much of what a machine offers depends on that."""

    uid: int
    groups: frozenset[int]
    may_mount: bool
    """Whether it has CAP_SYS_ADMIN."""
    may_gain_rights: bool
    """Whether set-user-ID programs have their effect (no_new_privs is not set)."""

    @property
    def is_root(self) -> bool:
        """Whether it is root."""
        return self.uid == 0


def read_process(root: Path) -> Process:
    """This process, as /proc/self/status below `root` has it; nobody where it says nothing."""
    status = process_status(root)
    ids = [int(word) for word in status.get("Uid", [])[1:2] if word.isdecimal()]
    words = (*status.get("Gid", [])[1:2], *status.get("Groups", []))
    capabilities = "".join(status.get("CapEff", [])[:1])
    return Process(
        uid=ids[0] if ids else 65534,
        groups=frozenset(int(word) for word in words if word.isdecimal()),
        may_mount=_has_capability(capabilities, CAP_SYS_ADMIN),
        may_gain_rights=status.get("NoNewPrivs") != ["1"],
    )


def mounts_below(root: Path) -> list[Mount]:
    """The mounts that /proc/self/mountinfo below `root` lists; none where it can't be read."""
    try:
        return mounts(root / "proc/self/mountinfo")
    except OSError:
        return []


def _has_capability(mask: str, number: int) -> bool:
    try:
        return bool(int(mask, 16) >> number & 1)
    except ValueError:
        return False
