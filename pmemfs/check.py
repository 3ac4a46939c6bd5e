"""Checking a pool that isn't mounted: everything that is stored, against what it must be.

Nothing is written. What is stored in mode `block` is the label and its copy, and the zones they
describe; page structures are not persistent, and the data is the user's.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmemfs.errors import InvalidPool
from pmemfs.media.label import State
from pmemfs.medium.base import Medium
from pmemfs.pool import LabelReading, Pool, read_labels


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    is_error: bool
    sentence: str


def check_pool(medium: Medium) -> list[Finding]:
    """What was found, in the order in which it was looked at. Raises NotAPool."""
    findings = [_label_finding(reading) for reading in read_labels(medium)]
    try:
        pool = Pool.open(medium)
    except InvalidPool as error:
        return [*findings, Finding("pool", True, str(error))]
    return [*findings, _agreement(pool), *_zone_findings(pool), _state(pool)]


def _label_finding(reading: LabelReading) -> Finding:
    if reading.label is None:
        return Finding(reading.where, True, f"not valid: {reading.problem}")
    return Finding(reading.where, False, f"valid, sequence {reading.label.sequence}")


def _agreement(pool: Pool) -> Finding:
    """Copies may differ by the last write, if that was interrupted, and by nothing else."""
    labels = [reading.label for reading in pool.readings if reading.label]
    what = "label copies"
    if len({label.uuid for label in labels}) > 1:
        return Finding(what, True, "they belong to different pools; the newer one serves")
    if len({label.sequence for label in labels}) > 1:
        return Finding(what, False, "one is older: a label write was interrupted; the newer serves")
    if len(set(labels)) > 1:
        return Finding(what, True, "they have one sequence number and differ")
    if len(labels) == 1:
        return Finding(what, False, "one is left; the next writable mount writes the other anew")
    return Finding(what, False, "agree")


def _zone_findings(pool: Pool) -> list[Finding]:
    zones = pool.zones.in_order()
    return [
        Finding(f"zone {name}", False, f"{zone.size_bytes} bytes at {zone.offset_bytes}")
        for name, zone in zones
    ]


def _state(pool: Pool) -> Finding:
    if pool.label.state == State.CLEAN:
        return Finding("state", False, "clean")
    return Finding("state", False, "not cleanly unmounted; the next mount needs no recovery")


def has_errors(findings: list[Finding]) -> bool:
    """Whether anything is wrong."""
    return any(finding.is_error for finding in findings)
