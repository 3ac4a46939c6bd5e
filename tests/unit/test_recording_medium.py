"""The model of a power failure is itself tested, against one that is written out here."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmemfs.medium.recording import LINE_BYTES, WORD_BYTES, RecordingMedium

EVERYTHING = 10**6
SIZE = 3 * LINE_BYTES


def blank(**arguments: object) -> RecordingMedium:
    return RecordingMedium(bytes(SIZE), **arguments)  # type: ignore[arg-type]


def states(medium: RecordingMedium) -> set[bytes]:
    images = list(medium.after_power_failure(EVERYTHING))
    assert len(images) == len(set(images)), "an image was given twice"
    return set(images)


def word(medium_image: bytes, at: int) -> bytes:
    return medium_image[at : at + WORD_BYTES]


def test_a_store_that_was_not_flushed_may_be_lost_or_kept() -> None:
    medium = blank()
    medium.store(0, b"12345678")
    assert {word(image, 0) for image in states(medium)} == {bytes(8), b"12345678"}


def test_a_store_that_was_flushed_and_fenced_is_never_lost() -> None:
    medium = blank()
    medium.store(60, b"12345678")
    medium.persist(60, 8)
    assert states(medium) == {bytes(medium.read(0, SIZE))}


def test_a_flush_without_a_fence_proves_nothing() -> None:
    medium = blank()
    medium.store(0, b"12345678")
    medium.flush(0, 8)
    assert len(states(medium)) == 2


def test_a_fence_without_a_flush_proves_nothing() -> None:
    medium = blank()
    medium.store(0, b"12345678")
    medium.fence()
    assert len(states(medium)) == 2


def test_a_flush_covers_only_what_was_stored_before_it() -> None:
    medium = blank()
    medium.store(0, b"1" * 8)
    medium.flush(0, 8)
    medium.store(0, b"2" * 8)
    medium.fence()
    assert {word(image, 0) for image in states(medium)} == {b"1" * 8, b"2" * 8}


def test_an_aligned_word_is_never_torn() -> None:
    medium = blank()
    medium.store(8, b"abcdefgh")
    assert {word(image, 8) for image in states(medium)} == {bytes(8), b"abcdefgh"}


def test_a_store_across_two_words_tears_between_them() -> None:
    medium = blank()
    medium.store(4, b"abcdefgh")
    found = {image[4:12] for image in states(medium)}
    assert found == {bytes(8), b"abcd" + bytes(4), b"abcdefgh"}


def test_of_one_line_only_prefixes_of_the_stores_survive() -> None:
    medium = blank()
    for at in (16, 0, 8):
        medium.store(at, bytes([at + 1]) * 8)
    found = {tuple(at for at in (16, 0, 8) if image[at]) for image in states(medium)}
    assert found == {(), (16,), (16, 0), (16, 0, 8)}


def test_lines_are_independent_of_each_other() -> None:
    medium = blank()
    medium.store(0, b"1")
    medium.store(LINE_BYTES, b"2")
    found = {(image[0], image[LINE_BYTES]) for image in states(medium)}
    assert found == set(itertools.product((0, ord("1")), (0, ord("2"))))


def test_an_ignored_flush_leaves_its_stores_open() -> None:
    for ignored in (0, 1):
        medium = blank(ignored_calls={ignored})
        medium.store(0, b"12345678")
        medium.persist(0, 8)
        assert len(states(medium)) == 2
        assert medium.call_count == 2


def test_a_failure_is_raised_by_the_call_of_its_number_and_all_after() -> None:
    medium = blank(failures={1: OSError(5, "gone")})
    medium.store(0, b"12345678")
    medium.flush(0, 8)
    with pytest.raises(OSError, match="gone"):
        medium.fence()
    assert len(states(medium)) == 2
    with pytest.raises(OSError, match="gone"):
        medium.fence()
    assert len(states(medium)) == 2


def test_each_fence_is_announced_before_it_takes_effect() -> None:
    medium = blank()
    seen: list[int] = []
    medium.at_each_fence = lambda: seen.append(len(states(medium)))
    medium.store(0, b"12345678")
    medium.persist(0, 8)
    medium.store(8, b"12345678")
    medium.persist(8, 8)
    assert seen == [2, 2]


def test_a_flush_of_nothing_covers_nothing() -> None:
    medium = blank()
    medium.store(0, b"12345678")
    medium.persist(1, 0)
    assert len(states(medium)) == 2


operations = st.lists(
    st.tuples(st.just("store"), st.integers(0, SIZE - 1), st.integers(1, 20))
    | st.tuples(st.just("flush"), st.integers(0, SIZE - 1), st.integers(0, 70))
    | st.tuples(st.just("fence"), st.just(0), st.just(0)),
    max_size=12,
)


def brute_force(done: list[tuple[str, int, int]]) -> set[bytes]:
    """All states, from the rules: for each line, any number of its word stores that is not below
    the number which a flush saw before the last fence that came after it."""
    stores: dict[int, list[tuple[int, bytes]]] = {line: [] for line in range(3)}
    flushed = dict.fromkeys(range(3), 0)
    durable = dict.fromkeys(range(3), 0)
    for number, (what, at, length) in enumerate(done, 1):
        end = min(at + length, SIZE)
        if what == "store":
            while at < end:
                word_end = min(end, (at // 8 + 1) * 8)
                stores[at // 64].append((at, bytes([number]) * (word_end - at)))
                at = word_end
        elif what == "flush":
            for line in {byte // 64 for byte in range(at, end)}:
                flushed[line] = len(stores[line])
        else:
            durable = dict(flushed)
    found = set()
    for kept in itertools.product(*(range(durable[n], len(stores[n]) + 1) for n in range(3))):
        image = bytearray(SIZE)
        for line, count in enumerate(kept):
            for at, data in stores[line][:count]:
                image[at : at + len(data)] = data
        found.add(bytes(image))
    return found


def run(medium: RecordingMedium, done: list[tuple[str, int, int]]) -> None:
    for number, (what, at, length) in enumerate(done, 1):
        end = min(at + length, SIZE)
        if what == "store":
            medium.store(at, bytes([number]) * (end - at))
        elif what == "flush":
            medium.flush(at, end - at)
        else:
            medium.fence()


@given(operations)
@example([("store", 0, 20), ("flush", 0, 1), ("store", 60, 8), ("fence", 0, 0), ("store", 0, 1)])
def test_every_state_is_given_exactly_as_brute_force_finds_them(
    done: list[tuple[str, int, int]],
) -> None:
    medium = blank()
    run(medium, done)
    assert states(medium) == brute_force(done)


@given(operations, st.integers(1, 10), st.integers())
def test_a_bounded_choice_gives_nothing_that_is_impossible(
    done: list[tuple[str, int, int]], limit: int, seed: int
) -> None:
    medium = blank()
    run(medium, done)
    possible = brute_force(done)
    images = list(medium.after_power_failure(limit, seed))
    assert len(images) == len(set(images))
    assert set(images) <= possible
    assert bytes(medium.read(0, SIZE)) in images, "everything kept must be among them"
    assert len(images) >= min(2, len(possible))


@given(operations)
def test_a_bounded_choice_has_every_point_of_the_programs_own_order(
    done: list[tuple[str, int, int]],
) -> None:
    bounded = blank()
    run(bounded, done)
    found = set(bounded.after_power_failure(limit=1))
    # What is there after each store since the last fence, were all of them kept in order.
    last_fence = max((n for n, step in enumerate(done, 1) if step[0] == "fence"), default=0)
    in_order = blank()
    run(in_order, done[:last_fence])
    in_flight = len(states(in_order)) > 1
    for number, step in enumerate(done[last_fence:], last_fence + 1):
        if in_flight or step[0] != "store":
            continue
        in_order.store(step[1], bytes([number]) * (min(step[1] + step[2], SIZE) - step[1]))
        assert bytes(in_order.read(0, SIZE)) in found


def test_program_order_forgets_the_stores_that_a_fence_made_durable() -> None:
    medium = RecordingMedium(bytes(SIZE))
    medium.store(0, b"1" * 8)
    medium.store(0, b"2" * 8)
    medium.flush(0, 8)
    medium.store(64, b"3" * 8)
    medium.store(0, b"4" * 8)
    medium.fence()
    order = [(image[0:1], image[64:65]) for image in medium.after_power_failure(limit=1)]
    assert order[:3] == [(b"2", b"\0"), (b"2", b"3"), (b"4", b"3")]


def test_a_store_outside_the_medium_is_a_bug() -> None:
    for at, length in ((-1, 1), (SIZE - 1, 2), (SIZE, 1)):
        with pytest.raises(ValueError, match="outside"):
            blank().store(at, bytes(length))
