"""What an engine counts; a module of its own, because the engines take long to load."""

from __future__ import annotations

from typing import NamedTuple


class EngineStatistics(NamedTuple):
    """What went through an engine since the mount."""

    reads: int
    writes: int
    fsyncs: int
    read_bytes: int
    written_bytes: int
