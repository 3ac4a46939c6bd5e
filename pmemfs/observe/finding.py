"""What one look at the machine finds: a state, what was seen, and what pmemfs therefore does.

Invariants:
- a finding that one command can improve carries that command, exactly as a shell takes it;
- only what the next boot undoes, and what makes nothing less safe, is a `Setting`, because
  `doctor --fix` applies settings without asking.
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
    """How good a finding is."""

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
        """The command that sets it."""
        if self.path.startswith("proc/sys/"):
            name = self.path.removeprefix("proc/sys/").replace("/", ".")
            return f"sysctl -w {name}={self.value}"
        return f"echo {self.value} > /{self.path}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what came of it."""

    name: str
    state: State
    found: str
    therefore: str
    """What pmemfs does because of it, or can't do."""
    command: str | None = None
    """The command that would improve it, if one command would."""
    is_needed: bool = False
    """Whether pmemfs can't mount without it."""
    setting: Setting | None = None
    """The same as `command`, if pmemfs may do it for root."""

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self) | {"setting": None if self.setting is None else self.setting.command}


@dataclass(frozen=True, slots=True)
class Process:
    """The process that asks, because much of what a machine offers depends on it."""

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
    """This process, as /proc/self/status below `root` says; the user nobody if it says nothing."""
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
    """The mounts that /proc/self/mountinfo below `root` lists; [] if it can't be read."""
    try:
        return mounts(str(root / "proc/self/mountinfo"))
    except OSError:
        return []


def _has_capability(mask: str, number: int) -> bool:
    try:
        return bool(int(mask, 16) >> number & 1)
    except ValueError:
        return False
