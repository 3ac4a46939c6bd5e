"""An entry of a ring loses no request, wherever kill -9 strikes; see dataplane/entries.pxi.

A child goes through each step one instruction at a time. Whatever it would leave if it were killed
there is what the next data plane finds.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from kit.stepping import states_of
from pmemfs.dataplane.layouts import ENTRY_ASIDE_BYTES, HandedTo, entries_bytes
from pmemfs.dataplane.native import RingEntry
from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode
from pmemfs.units import KIB

MAX_WRITE = 8 * KIB
NAME = b"user.of-a-name\0"
LONG = bytes(range(1, 251)) * 9
SHORT = b"a reply of an entry"
TOO_LONG_TO_SAVE = b"\1" * (ENTRY_ASIDE_BYTES + 8)

assert len(LONG) > ENTRY_ASIDE_BYTES


class Asked(NamedTuple):
    """A request."""

    opcode: Opcode
    unique: int
    operation: bytes = b"\7" * 40
    payload: bytes = b""

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        length = wire.IN_HEADER.size + len(self.operation) + len(self.payload)
        head = wire.IN_HEADER.pack(length, self.opcode, self.unique, 3, 0, 0, 1, 0)
        return head, self.operation, self.payload

    @property
    def without_payload(self) -> tuple[bytes, bytes, bytes]:
        return self._replace(payload=b"").parts


READ = Asked(Opcode.READ, 100)
WRITE = Asked(Opcode.WRITE, 102, payload=b"written" * 700)
LOOKUP = Asked(Opcode.LOOKUP, 104, b"", b"a name\0")
GETXATTR = Asked(Opcode.GETXATTR, 106, b"\1" * 8, NAME)
READDIR = Asked(Opcode.READDIR, 108)
IOCTL = Asked(Opcode.IOCTL, 110, payload=TOO_LONG_TO_SAVE)


class Left:
    """The memory of an entry, and the entry in it."""

    def __init__(self, content: bytes = b"") -> None:
        self.memory = mmap.mmap(-1, entries_bytes(1, 1, MAX_WRITE))
        self.memory[: len(content)] = content
        self.entry = RingEntry(self.memory, MAX_WRITE)

    def states(self, *actions: Callable[[RingEntry], object]) -> Iterator[Left]:
        """What is left if a process is killed while it does these."""

        def act() -> None:
            for action in actions:
                action(self.entry)

        for content in states_of(self.memory, act):
            yield Left(content)


def holding(asked: Asked) -> Left:
    """An entry that the kernel has filled."""
    left = Left()
    left.entry.deliver(*asked.parts)
    return left


def handed_over(asked: Asked, to: HandedTo = HandedTo.CONTROL) -> Left:
    """An entry whose request somebody else replies to."""
    left = holding(asked)
    left.entry.hand_over(to)
    return left


def test_an_entry_that_had_no_request_is_registered() -> None:
    assert Left().entry.outlook() == "register"


def test_a_request_that_the_kernel_could_not_deliver_is_not_taken_for_the_one_before() -> None:
    left = holding(READ)
    left.entry.serve(b"bytes")
    left.entry.commit()
    before = left.memory[:]
    left.entry.deliver(*WRITE.parts)
    after = left.memory[:]
    # The head is stored last. It stands behind the states.
    at = next(place for place in range(len(after)) if after[place] != before[place])
    assert after[at : at + wire.IN_HEADER.size] == WRITE.parts[0]
    torn = Left(before[: at + wire.IN_HEADER.size] + after[at + wire.IN_HEADER.size :])
    assert torn.entry.outlook() == "fail"


@pytest.mark.parametrize(
    ("asked", "answer"),
    [(READ, LONG), (READ, b"\2" * 8), (WRITE, b"\0" * 8), (LOOKUP, b""), (READDIR, SHORT)],
    ids=lambda value: value.opcode.name if isinstance(value, Asked) else str(len(value)),
)
def test_a_request_that_its_worker_serves_can_be_served_again_until_its_reply_can_be_given(
    asked: Asked, answer: bytes
) -> None:
    found = set()
    for left in holding(asked).states(lambda e: e.serve(answer), RingEntry.commit):
        found.add(outlook := left.entry.outlook())
        if outlook == "serve":
            assert left.entry.request() == asked.parts
        else:
            assert outlook == "commit again"
            assert left.entry.commit() == (asked.unique, 0, answer)
    assert found == {"serve", "commit again"}


def test_an_error_is_given_again_as_it_was() -> None:
    for left in holding(WRITE).states(lambda e: e.serve(b"", error=5), RingEntry.commit):
        if left.entry.outlook() != "serve":
            assert left.entry.commit() == (WRITE.unique, 5, b"")


@pytest.mark.parametrize("to", HandedTo)
def test_only_what_the_control_plane_was_handed_is_handed_over_again(to: HandedTo) -> None:
    expected = "hand over again" if to == HandedTo.CONTROL else "serve"
    for left in holding(WRITE).states(lambda e: e.hand_over(to)):
        assert left.entry.outlook() in ("serve", expected)
        assert left.entry.request() == WRITE.parts
    assert left.entry.outlook() == expected


def test_who_was_handed_an_earlier_request_is_not_waited_for() -> None:
    left = handed_over(LOOKUP)
    left.entry.reply(SHORT)
    for opcode in (Opcode.WRITE, Opcode.READ):
        left.entry.deliver(*Asked(opcode, 300 + opcode).parts)
        assert left.entry.outlook() == "serve"


def check_handed_over(left: Left, asked: Asked, reply: bytes, *, may_lose: bool = False) -> str:
    outlook = left.entry.outlook()
    if outlook == "hand over again":
        again = left.entry.request_again()
        assert again == asked.parts or (may_lose and again == asked.without_payload)
        # And whatever is answered then is what the kernel gets.
        left.entry.reply(reply)
        assert left.entry.outlook() == "commit again"
    else:
        assert outlook == "commit again"
    assert left.entry.commit() == (asked.unique, 0, reply)
    return outlook


@pytest.mark.parametrize(
    ("asked", "reply"),
    [(LOOKUP, SHORT), (WRITE, b"\1" * 8), (GETXATTR, SHORT), (GETXATTR, LONG), (READDIR, LONG),
     (READ, LONG), (LOOKUP, b"")],
    ids=lambda value: value.opcode.name if isinstance(value, Asked) else str(len(value)),
)  # fmt: skip
def test_a_request_is_handed_over_again_whole_until_its_reply_can_be_given(
    asked: Asked, reply: bytes
) -> None:
    lefts = handed_over(asked).states(lambda entry: entry.reply(reply))
    found = {check_handed_over(left, asked, reply) for left in lefts}
    assert found == {"hand over again", "commit again"}


def test_a_payload_that_can_not_be_saved_is_whole_or_left_out() -> None:
    for left in handed_over(IOCTL).states(lambda entry: entry.reply(LONG)):
        check_handed_over(left, IOCTL, LONG, may_lose=True)


@pytest.mark.slow
@pytest.mark.parametrize("reply", [LONG, SHORT, b""], ids=len)
def test_a_second_death_loses_nothing_more(reply: bytes) -> None:
    """The first one strikes while a long reply is put over the payload."""
    first = [
        left
        for left in handed_over(GETXATTR).states(lambda entry: entry.reply(LONG))
        if left.entry.outlook() == "hand over again"
    ]
    # Some of the many that differ by a few bytes of the reply.
    for left in (*first[:3], *first[3 :: len(first) // 4], first[-1]):
        for again in left.states(RingEntry.request_again, lambda entry: entry.reply(reply)):
            check_handed_over(again, GETXATTR, reply)


def test_a_payload_that_was_lost_stays_lost_whatever_dies_then() -> None:
    *_, left = [
        left
        for left in handed_over(IOCTL).states(lambda entry: entry.reply(LONG))
        if left.entry.outlook() == "hand over again"
    ]
    for again in left.states(RingEntry.request_again, lambda entry: entry.reply(SHORT)):
        if again.entry.outlook() == "hand over again":
            assert again.entry.request_again() == IOCTL.without_payload
