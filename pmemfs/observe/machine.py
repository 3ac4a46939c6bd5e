"""What this machine offers to pmemfs, what pmemfs will therefore do, and what would be faster.

Invariants:
- looking changes nothing: files of /proc, /sys, /dev and /etc are read or asked for their status,
  none is written and no device is opened;
- everything is found below `root`, so that a machine can be made up for a test;
- a file that is missing, unreadable or nonsensical gives a finding, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pmemfs.mount.transport import read_offer
from pmemfs.observe.finding import Finding, State, read_process
from pmemfs.observe.memory import memory_findings
from pmemfs.observe.mounting import mounting_findings
from pmemfs.observe.requests import request_findings


def examine(root: Path = Path("/")) -> list[Finding]:
    """Everything that is looked at, in the order in which it matters."""
    process, offer = read_process(root), read_offer(root)
    return [
        *mounting_findings(root, process, offer),
        *request_findings(root, offer),
        *memory_findings(root, process),
    ]


def can_mount(findings: Iterable[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return not any(f.is_needed and f.state is State.MISSING for f in findings)
