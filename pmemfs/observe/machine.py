"""What this machine offers to pmemfs, what pmemfs therefore does, and what would be faster.

Invariants:
- looking changes nothing: files of /proc, /sys, /dev and /etc are read or asked for their status,
  and no file is written and no device opened;
- everything is found below `root`, so that a test can make up a machine;
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
    """All findings, in the order in which they matter."""
    process, offer = read_process(root), read_offer(root)
    return [
        *mounting_findings(root, process, offer),
        *request_findings(root, offer),
        *memory_findings(root, process),
    ]


def can_mount(findings: Iterable[Finding]) -> bool:
    """Whether everything that a mount needs is there."""
    return not any(f.is_needed and f.state is State.MISSING for f in findings)
