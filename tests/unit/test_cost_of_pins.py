"""What a pin costs in the daemon and in its client, in calls: time is the machine's.

A program that asks for one pin after another waits for each. The bounds are a tenth above what it
takes: who adds to the path takes something away, or says why it is worth that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kit.pinning import Pinnable, pinnable
from pmemfs.control import Peer
from pmemfs.pins.methods import PinMethods
from pmemfs.units import MIB

TIMES = 20


@pytest.fixture(params=("native", "python"))
def at(request: pytest.FixtureRequest, shm: Path) -> Iterator[Pinnable]:
    with pinnable("fs", request.param, shm / "pool") as made:
        yield made


class Calls:
    """Counts the functions of ours, and of Python's library, that are called meanwhile."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: object, event: str, argument: object) -> None:
        self.count += event == "call"


def test_a_pin_of_one_piece_takes_few_calls(at: Pinnable) -> None:
    methods = PinMethods(at.pins, at.pool, at.pool.medium, at.volume, 1)  # type: ignore[arg-type]
    number, peer = at.make("one", MIB), Peer(os.getpid(), os.geteuid())
    begun, ended = [], []

    async def test() -> None:
        for _ in range(TIMES):
            with Calls() as calls:
                answer = await methods.pin(peer, files=[[number, 0, -1]], paths=["one"])
            begun.append(calls.count)
            os.close(answer.descriptors[0])
            with Calls() as calls:
                assert at.pins.notice_ends()
            ended.append(calls.count)

    trio.run(test)
    assert min(begun) <= 88, begun
    assert min(ended) <= 27, ended
