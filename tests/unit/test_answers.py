"""The ring of answers: what a daemon leaves there is what the next one finds."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmemfs.dataplane import answers as module
from pmemfs.dataplane.answers import (
    AREA_BYTES,
    COUNT,
    DECISION_BYTES,
    MOST_BYTES,
    RECORD_BYTES,
    Answers,
)
from pmemfs.dataplane.answers import AnswerState as State
from pmemfs.errors import ForeignSharedMemory

START = 4096


class Ring:
    """Memory with a ring that begins somewhere in it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("answers")
        os.ftruncate(self.fd, START + AREA_BYTES)
        self.memory = memoryview(mmap.mmap(self.fd, START + AREA_BYTES))
        self.pool: dict[int, int] = {}

    def open(self) -> Answers:
        return Answers(self.fd, self.memory, START)

    def load(self, offset: int) -> int:
        return self.pool.get(offset, 0)


@contextmanager
def new_ring() -> Iterator[Ring]:
    ring = Ring()
    try:
        yield ring
    finally:
        os.close(ring.fd)


@pytest.fixture
def ring() -> Iterator[Ring]:
    with new_ring() as made:
        yield made


def test_answers_and_errors_are_found_again_as_they_were(ring: Ring) -> None:
    answers = ring.open()
    answers.record(8, 1, b"x" * MOST_BYTES)
    answers.record(10, 2, b"", 17)
    for found in (answers, ring.open()):
        first, second = found.find(8), found.find(10)
        assert first.answer[: first.length] == b"x" * MOST_BYTES
        assert (first.state, first.error, first.opcode) == (State.ANSWERED, 0, 1)
        assert (second.state, second.error, second.length) == (State.ANSWERED, 17, 0)
        assert 12 not in found.places


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["answer", "decide", "die"]), st.integers(0, 5)), max_size=60
    )
)
def test_what_was_carried_out_and_what_was_answered_is_told_apart(
    steps: list[tuple[str, int]],
) -> None:
    with new_ring() as ring:
        answers = ring.open()
        carried_out: dict[int, int] = {}
        answered: set[int] = set()
        number = 0
        for what, kind in steps:
            if what == "decide":
                number += 2
                answers.decide(number, 3, 8 * number, 77)
                ring.pool[8 * number] = 77
                carried_out[number] = kind
            elif what == "answer":
                older = [n for n, other in carried_out.items() if other == kind]
                number += 0 if older else 2
                answers.record(older[0] if older else number, 3, b"done")
                answered.add(older[0] if older else number)
                if older:
                    del carried_out[older[0]]
            else:
                answers = ring.open()
                found = answers.settle(ring.load)
                assert {record.number: record.offset for record in found} == {
                    number: 8 * number for number in carried_out
                }
                assert set(answers.places) == answered | set(carried_out)


def test_an_operation_that_decided_in_vain_has_no_record(ring: Ring) -> None:
    answers = ring.open()
    answers.decide(8, 3, 4096, 5)
    ring.pool[4096] = 5
    answers.decide(10, 3, 4096, 6)
    found = ring.open()
    assert [record.number for record in found.settle(ring.load)] == [8]
    assert 10 not in found.places
    # What was found out stays so, though the word goes on.
    again = ring.open()
    assert [record.number for record in again.settle(lambda _: 0)] == [8]
    again.record(8, 3, b"")
    assert ring.open().settle(lambda _: 0) == []


def test_the_oldest_records_go_but_never_those_of_requests_under_way(ring: Ring) -> None:
    answers = ring.open()
    answers.decide(1, 3, 0, 9)
    answers.decide(2, 3, 8, 9)
    for number in range(3, 3 * COUNT):
        if number == COUNT + 7:
            answers = ring.open()
            answers.settle(lambda _: 9)
        answers.record(number, 1, b"")
    kept = set(ring.open().places)
    assert kept == {1, 2, *range(3 * COUNT - (COUNT - 2), 3 * COUNT)}
    newest = [record.number for record in answers.newest()]
    assert newest[:2] == [3 * COUNT - 1, 3 * COUNT - 2]
    answers.record(2, 3, b"late")
    again = ring.open()
    assert [record.number for record in again.settle(lambda _: 0)] == [1]
    late = again.find(2)
    assert late.answer[: late.length] == b"late"


STORES = 16


@pytest.mark.parametrize("step", range(STORES))
def test_a_daemon_that_dies_between_any_two_stores_leaves_a_trace_of_what_it_did(
    ring: Ring, step: int
) -> None:
    answers = ring.open()
    for number in range(COUNT):
        answers.record(number + 10, 1, b"a" * MOST_BYTES)
    answers.decide(2, 3, 0, 9)
    ring.pool[0] = 9
    # The next to decide makes a record of it, and its answer takes that away again.
    left = step

    class Dying:
        """Words and packed numbers: each store of them counts."""

        def __init__(self, of: object) -> None:
            self.of = of

        def __getitem__(self, at: int) -> int:
            return self.of[at]

        def __setitem__(self, at: int, value: int) -> None:
            dies()
            self.of[at] = value

        def pack_into(self, memory: memoryview, at: int, *values: object) -> None:
            dies()
            # Some of it is stored before it dies.
            memory[at + 40 : at + 60] = b"b" * 20
            dies()
            self.of.pack_into(memory, at, *values)

    def dies() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    has_died = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_REST", Dying(module._REST))
        answers._words = Dying(answers._words)
        try:
            answers.decide(4, 3, 8, 9)
            answers.record(2, 3, b"done")
        except KeyboardInterrupt:
            has_died = True
    assert has_died == (step < STORES - 1)
    found = ring.open()
    carried_out = {record.number for record in found.settle(ring.load)}
    answered = found.find(2)
    assert (answered.state == State.CARRIED_OUT) == (2 in carried_out)
    if answered.state == State.ANSWERED:
        assert answered.answer[: answered.length] == b"done"
    # Its word has another value, so it was not carried out.
    assert 4 not in found.places
    for record in found.newest():
        if record.number >= 10:
            assert record.answer[: record.length] == b"a" * MOST_BYTES
    assert len(found.places) >= COUNT - 2


def test_memory_of_others_is_refused_with_a_sentence(ring: Ring) -> None:
    answers = ring.open()
    answers.record(8, 1, b"")
    assert [record.number for record in answers.newest()] == [8]
    ring.memory[START + DECISION_BYTES + 16] = 7
    with pytest.raises(ForeignSharedMemory, match="request 8"):
        ring.open().newest()


def test_a_ring_that_was_never_used_takes_no_memory(ring: Ring) -> None:
    answers = ring.open()
    assert os.fstat(ring.fd).st_blocks == 0
    answers.record(8, 1, b"")
    assert os.fstat(ring.fd).st_blocks * 512 < 64 * RECORD_BYTES
