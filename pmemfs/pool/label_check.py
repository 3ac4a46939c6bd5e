"""Checks what is stored in every mode: the label, its copy, and the zones that they describe."""

from __future__ import annotations

from dataclasses import dataclass

from pmemfs.media.label import Mode, State
from pmemfs.pool.labels import LabelReading
from pmemfs.pool.pool import Pool


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked, and what was found."""

    what: str
    is_error: bool
    sentence: str
    inode: int | None = None
    path: str | None = None
    remedy: str | None = None
    """What a repair would do about it."""


def label_finding(reading: LabelReading) -> Finding:
    if reading.label is None:
        return Finding(reading.where, True, f"not valid: {reading.problem}")
    return Finding(reading.where, False, f"valid, sequence {reading.label.sequence}")


def agreement(pool: Pool) -> Finding:
    """Compare the copies. They may differ by the last write, if it was interrupted; else equal."""
    labels = [reading.label for reading in pool.readings if reading.label]
    what = "label copies"
    if len({label.uuid for label in labels}) > 1:
        return Finding(what, True, "they belong to different pools; the newer one serves")
    if len({label.sequence for label in labels}) > 1:
        why = "one copy is older: a write was interrupted; the newer copy serves"
        return Finding(what, False, why)
    if len(set(labels)) > 1:
        return Finding(what, True, "they have the same sequence number but differ")
    if len(labels) == 1:
        why = "only one copy is valid; the next writable mount rewrites the other"
        return Finding(what, False, why)
    return Finding(what, False, "agree")


def zone_findings(pool: Pool) -> list[Finding]:
    zones = pool.zones.in_order()
    return [
        Finding(f"zone {name}", False, f"{zone.size_bytes} bytes at {zone.offset_bytes}")
        for name, zone in zones
    ]


def state_finding(pool: Pool) -> Finding:
    if pool.label.state == State.CLEAN:
        return Finding("state", False, "clean")
    recovery = "no recovery" if pool.label.mode != Mode.FS else "no check"
    return Finding("state", False, f"not cleanly unmounted; the next mount needs {recovery}")


def has_errors(findings: list[Finding]) -> bool:
    """Whether anything is wrong."""
    return any(finding.is_error for finding in findings)
