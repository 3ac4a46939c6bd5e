"""A pool: what is served when a copy of the label is torn, scribbled, newer or cut off."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.pools import SMALL_BYTES, MemoryMedium, content, copies, small_pool, small_spec
from pmemfs.errors import (
    BadGeometry,
    BadName,
    InvalidLabel,
    InvalidPool,
    NotAPool,
    ReadOnlyPool,
)
from pmemfs.media.label import Label, Scheme, State, pack
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB

SCRIBBLE = b"\xa5" * LABEL_BYTES


def image_of(first: bytes, second: bytes) -> bytes:
    return first + bytes(SMALL_BYTES - 2 * LABEL_BYTES) + second


def opened(first: Label | bytes, second: Label | bytes) -> Pool:
    raw = [copy if isinstance(copy, bytes) else pack(copy) for copy in (first, second)]
    return Pool.open(MemoryMedium(image_of(*raw)))


@pytest.fixture
def label() -> Label:
    return replace(small_pool().label, checksum=0)


@pytest.fixture
def newer(label: Label) -> Label:
    return replace(label, sequence=label.sequence + 1, mount_count=7)


def test_a_new_pool_opens_as_what_it_was_made(label: Label) -> None:
    spec = PoolSpec("tensors", 4 * KIB, 8 * KIB, Scheme.ON_DEMAND)
    pool = Pool.create(MemoryMedium(bytes(SMALL_BYTES)), spec)
    again = Pool.open(MemoryMedium(content(pool.medium)))
    assert again.label == pool.label
    assert (again.label.name, again.scheme) == ("tensors", Scheme.ON_DEMAND)
    assert again.label.alignment_bytes == 8 * KIB
    assert again.label.state == State.CLEAN
    assert again.label.mount_count == 0
    assert again.damaged_copies == []
    assert again.first_data_pfn == again.zones.data.offset_bytes // 4096
    assert again.data_pfn_count == again.page_geometry.pfn_count


@given(st.binary(min_size=64, max_size=64))
def test_create_and_a_mount_touch_nothing_but_the_two_labels(pattern: bytes) -> None:
    image = pattern * (SMALL_BYTES // 64)
    pool = Pool.create(MemoryMedium(image), small_spec())
    pool.begin_mount()
    pool.end_mount()
    inside = slice(LABEL_BYTES, -LABEL_BYTES)
    assert content(pool.medium)[inside] == image[inside]


def test_two_pools_never_look_alike() -> None:
    assert small_pool().label.uuid != small_pool().label.uuid
    assert small_pool().label.generation != small_pool().label.generation


def test_a_mount_counts_itself_and_is_dirty_until_it_ends() -> None:
    pool = small_pool()
    before = pool.label
    pool.begin_mount()
    during = Pool.open(MemoryMedium(content(pool.medium))).label
    assert (during.state, during.mount_count) == (State.DIRTY, before.mount_count + 1)
    assert during.generation == before.generation + 1
    assert during.mounted_ns >= before.created_ns > 0
    pool.end_mount()
    after = Pool.open(MemoryMedium(content(pool.medium))).label
    assert (after.state, after.generation) == (State.CLEAN, during.generation)
    assert copies(content(pool.medium)) == (after, after)


def test_the_generation_goes_around_zero() -> None:
    pool = small_pool()
    pool.label = replace(pool.label, generation=(1 << 64) - 1)
    pool.begin_mount()
    assert pool.label.generation == 1


def test_the_newer_copy_serves(label: Label, newer: Label) -> None:
    assert opened(label, newer).label.mount_count == 7
    assert opened(newer, label).label.mount_count == 7


@pytest.mark.parametrize("torn_at", [18, 24, 32, 64, 128])
def test_a_torn_label_write_keeps_the_older_copy(label: Label, newer: Label, torn_at: int) -> None:
    torn = pack(newer)[:torn_at] + pack(label)[torn_at:]
    assert torn not in (pack(label), pack(newer))
    for first, second, where in ((torn, pack(label), "label"), (pack(label), torn, "label copy")):
        pool = opened(first, second)
        assert pool.label.sequence == label.sequence
        assert [copy.where for copy in pool.damaged_copies] == [where]
        assert "checksum" in str(pool.damaged_copies[0].problem)


@pytest.mark.parametrize("scribbled", [0, 1])
def test_a_scribbled_copy_is_served_by_the_other_and_healed_by_a_mount(
    label: Label, scribbled: int
) -> None:
    raw = [pack(label), pack(label)]
    raw[scribbled] = SCRIBBLE
    pool = opened(*raw)
    assert len(pool.damaged_copies) == 1
    pool.begin_mount()
    assert pool.damaged_copies == []
    first, second = copies(content(pool.medium))
    assert first == second == pool.label


def test_both_copies_bad_with_magic_left_is_an_invalid_pool(label: Label) -> None:
    bad = bytearray(pack(label))
    bad[100] ^= 1
    with pytest.raises(InvalidPool, match=r"label: its checksum is wrong; label copy: ") as caught:
        opened(bytes(bad), SCRIBBLE)
    assert caught.value.errno == errno.EUCLEAN
    with pytest.raises(InvalidPool):
        opened(SCRIBBLE, bytes(bad))


@pytest.mark.parametrize("image", [bytes(SMALL_BYTES), b"\xff" * SMALL_BYTES, bytes(4096)])
def test_no_magic_anywhere_is_no_pool_and_says_what_would_make_one(image: bytes) -> None:
    with pytest.raises(
        NotAPool, match=r"'pmemfs create recording medium' .* destroys what it holds"
    ):
        Pool.open(MemoryMedium(image))


@pytest.mark.parametrize("position", [0, 1])
def test_a_newer_format_is_refused_even_beside_an_older_valid_copy(
    label: Label, newer: Label, position: int
) -> None:
    for unknown in (
        replace(newer, format_version=2),
        replace(newer, incompatible_features=1 << 63),
    ):
        both = [label, label]
        both[position] = unknown
        with pytest.raises(InvalidPool, match="this program"):
            opened(*both)


def test_a_newer_format_with_a_wrong_checksum_is_only_damage(label: Label) -> None:
    damaged = bytearray(pack(replace(label, format_version=2)))
    damaged[-1] ^= 1
    assert opened(bytes(damaged), label).label.sequence == label.sequence


@pytest.mark.parametrize("left_bytes", [SMALL_BYTES - 4096, 8192, 4096])
def test_a_truncated_pool_is_refused_with_both_sizes(left_bytes: int) -> None:
    image = content(small_pool().medium)[:left_bytes]
    with pytest.raises(InvalidPool, match=rf"cut off: {left_bytes // 1024}KiB are left of 64KiB"):
        Pool.open(MemoryMedium(image))


def test_a_pool_on_a_medium_that_grew_keeps_its_own_end() -> None:
    image = content(small_pool().medium)
    pool = Pool.open(MemoryMedium(image + bytes(MIB)))
    pool.begin_mount()
    pool.end_mount()
    grown = content(pool.medium)
    assert copies(grown[:SMALL_BYTES]) == (pool.label, pool.label)
    assert not any(grown[SMALL_BYTES:])


def test_unknown_read_only_features_refuse_a_writable_medium_only(label: Label) -> None:
    label = replace(label, readonly_features=1)
    with pytest.raises(ReadOnlyPool):
        opened(label, label)
    medium = MemoryMedium(image_of(pack(label), pack(label)))
    medium.read_only = True
    assert Pool.open(medium).label.readonly_features == 1


def test_create_over_a_pool_outlives_whichever_old_copy_a_crash_leaves() -> None:
    old = small_pool()
    for _ in range(3):
        old.begin_mount()
    image = content(old.medium)
    new = Pool.create(MemoryMedium(image), small_spec(name="new"))
    written = content(new.medium)
    for first, last in ((image, written), (written, image)):
        mixed = MemoryMedium(first[:-LABEL_BYTES] + last[-LABEL_BYTES:])
        assert Pool.open(mixed).label.name == "new"


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (PoolSpec("a/b", alignment_bytes=4096), BadName),
        (PoolSpec("", alignment_bytes=4096), BadName),
        (PoolSpec("x", alignment_bytes=2 * MIB), BadGeometry),
        (PoolSpec("x", page_size_bytes=8192, alignment_bytes=8192), BadGeometry),
    ],
)
def test_a_refused_create_touches_nothing(spec: PoolSpec, error: type[Exception]) -> None:
    image = content(small_pool().medium)
    medium = MemoryMedium(image)
    with pytest.raises(error):
        Pool.create(medium, spec)
    assert content(medium) == image


def test_a_label_that_could_not_be_read_back_is_not_written(label: Label) -> None:
    last = replace(label, sequence=1 << 62)
    pool = opened(last, last)
    image = content(pool.medium)
    with pytest.raises(InvalidLabel, match="sequence"):
        pool.begin_mount()
    assert content(pool.medium) == image


def test_a_torn_label_on_a_medium_that_has_grown_still_leads_to_its_copy() -> None:
    image = bytearray(content(small_pool(size_bytes=32 * KIB).medium) + bytes(32 * KIB))
    image[512:LABEL_BYTES] = SCRIBBLE[512:]
    pool = Pool.open(MemoryMedium(bytes(image)))
    assert pool.label.pool_size_bytes == 32 * KIB
    assert [reading.where for reading in pool.damaged_copies] == ["label"]
    pool.begin_mount()
    assert pool.damaged_copies == []
