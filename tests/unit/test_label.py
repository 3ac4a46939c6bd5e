"""The label: what is packed is valid, and each refusal comes in its documented order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.pools import older_label, some_label
from pmemfs.errors import EXIT_INVALID_POOL, BadName, InvalidLabel, NewerFormat
from pmemfs.media.label import (
    LAYOUT,
    Incompatible,
    Label,
    Mode,
    Scheme,
    State,
    check_name,
    checksum,
    has_magic,
    pack,
    validate,
)
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES, PAGE_SIZES_BYTES, compute_zones
from pmemfs.units import GIB

names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=63)


def is_name(name: str) -> bool:
    return name.isprintable() and name not in (".", "..") and len(name.encode()) < 64


@st.composite
def labels(draw: st.DrawFn) -> Label:
    """Any label that a program may have written."""
    page_size_bytes = draw(st.sampled_from(PAGE_SIZES_BYTES))
    alignment_bytes = page_size_bytes << draw(st.integers(0, 4))
    scheme = draw(st.sampled_from(Scheme))
    pool_size_bytes = draw(st.integers(alignment_bytes * 3 + 4096, 1 << 50)) & -4096
    features = draw(st.sampled_from([0, Incompatible.MEMMAP_BEHIND_DATA]))
    zones = compute_zones(
        pool_size_bytes,
        page_size_bytes=page_size_bytes,
        alignment_bytes=alignment_bytes,
        memmap_in_pool=scheme is Scheme.PMEM,
        memmap_behind_data=bool(features),
    )
    u64 = st.integers(0, (1 << 64) - 1)
    return Label(
        sequence=draw(st.integers(0, 1 << 62)),
        uuid=draw(st.binary(min_size=16, max_size=16)),
        incompatible_features=features,
        readonly_features=draw(u64),
        compatible_features=draw(u64),
        pool_size_bytes=pool_size_bytes,
        alignment_bytes=alignment_bytes,
        page_size_bytes=page_size_bytes,
        scheme=scheme,
        mode=Mode.BLOCK,
        state=draw(st.sampled_from(State)),
        memmap_offset_bytes=zones.memmap.offset_bytes,
        memmap_size_bytes=zones.memmap.size_bytes,
        data_offset_bytes=zones.data.offset_bytes,
        data_size_bytes=zones.data.size_bytes,
        generation=draw(st.integers(1, (1 << 64) - 1)),
        mount_count=draw(st.integers(0, 1 << 62)),
        created_ns=draw(u64),
        mounted_ns=draw(u64),
        name=draw(names.filter(is_name)),
        software=draw(st.text("abc 0.1", max_size=32)),
    )


@given(labels())
def test_a_packed_label_validates_and_reads_back_equal(label: Label) -> None:
    raw = pack(label)
    assert len(raw) == LABEL_BYTES
    assert validate(raw) == replace(label, checksum=checksum(raw))
    assert validate(bytearray(raw)).zones == label.zones


@given(labels(), st.integers(0, 8 * LABEL_BYTES - 1))
def test_one_flipped_bit_anywhere_is_found(label: Label, bit: int) -> None:
    raw = bytearray(pack(label))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidLabel, match=r"checksum|magic"):
        validate(raw)


def sentence(text: str) -> str:
    """A pattern in which parentheses stand for themselves."""
    return text.replace("(", r"\(").replace(")", r"\)")


@dataclass(frozen=True)
class Refusal:
    """One entry of the gate's list: what breaks the label so, and what the sentence says."""

    step: str
    break_it: Callable[[Label], Label]
    says: str
    kind: type[InvalidLabel] = InvalidLabel


def setting(**changes: object) -> Callable[[Label], Label]:
    return lambda label: replace(label, **changes)  # type: ignore[arg-type]


REFUSALS = [
    Refusal("1 magic", setting(magic=b"another thing..."), "does not start with the magic"),
    Refusal("2 checksum", setting(), "its checksum is wrong"),
    Refusal("3 version 0", setting(format_version=0), "its format version is 0"),
    Refusal("3 newer", setting(format_version=2), "its format is 2, and this", NewerFormat),
    Refusal("4 feature", setting(incompatible_features=8), "features that .* (0x8)", NewerFormat),
    Refusal("5 structure", setting(page_structure_bytes=128), "structures are 128 bytes, not 64"),
    Refusal("6 scheme", setting(scheme=4), "its memmap scheme is 4"),
    Refusal("6 mode", setting(mode=0), "its mode is 0"),
    Refusal("6 state", setting(state=3), "its state is 3"),
    Refusal("7 generation", setting(generation=0), "its generation is 0"),
    Refusal("7 sequence", setting(sequence=(1 << 62) + 1), "its sequence is 4611686018427387905"),
    Refusal("7 mounts", setting(mount_count=1 << 63), "its mount count is 9223372036854775808"),
    Refusal("8 geometry", setting(page_size_bytes=8192), "impossible: a page of 8KiB"),
    Refusal("9 zones", setting(data_offset_bytes=0), "do not follow from its geometry"),
    Refusal("10 name", setting(name="../x"), "its name is bad: .* contains a slash"),
]


def broken(label: Label, refusals: list[Refusal]) -> bytes:
    for refusal in refusals:
        label = refusal.break_it(label)
    raw = bytearray(pack(label))
    if any(refusal.step == "2 checksum" for refusal in refusals):
        raw[LAYOUT.offset_of("checksum")] ^= 1
    return bytes(raw)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.step)
def test_each_refusal_has_its_own_sentence(refusal: Refusal) -> None:
    with pytest.raises(InvalidLabel, match=sentence(refusal.says)) as caught:
        validate(broken(some_label(), [refusal]))
    assert type(caught.value) is refusal.kind
    assert caught.value.exit_code == EXIT_INVALID_POOL


@pytest.mark.parametrize("position", range(len(REFUSALS)), ids=[r.step for r in REFUSALS])
def test_of_several_refusals_the_first_in_the_documented_order_is_given(position: int) -> None:
    first = REFUSALS[position]
    # Those of one step can exclude each other, as they break the same field; the first decides.
    later = [r for r in REFUSALS[position + 1 :] if r.step[:2] != first.step[:2]]
    with pytest.raises(InvalidLabel, match=sentence(first.says)):
        validate(broken(some_label(), [*later, first]))


@pytest.mark.parametrize("scheme", Scheme)
def test_a_pool_of_an_older_program_has_its_page_structures_in_front(scheme: Scheme) -> None:
    label = older_label(some_label(scheme))
    assert validate(pack(label)).zones == label.zones
    assert label.incompatible_features == 0
    assert label.zones.memmap.offset_bytes == LABEL_BYTES
    assert label.zones.data.offset_bytes >= label.zones.memmap.end_bytes


def test_the_feature_of_the_order_of_zones_is_not_to_be_ignored() -> None:
    label = some_label()
    for changed in (
        replace(label, incompatible_features=0),
        replace(older_label(label), incompatible_features=Incompatible.MEMMAP_BEHIND_DATA),
    ):
        with pytest.raises(InvalidLabel, match="do not follow"):
            validate(pack(changed))


def test_unknown_compatible_features_are_no_matter() -> None:
    label = validate(pack(some_label(compatible_features=1 << 63)))
    assert not label.needs_read_only


def test_unknown_read_only_features_forbid_writing_only() -> None:
    assert validate(pack(some_label(readonly_features=1))).needs_read_only


def test_reserved_bytes_are_kept_as_found() -> None:
    label = some_label(reserved=b"\x07" * 3832)
    assert pack(validate(pack(label)))[-3832:] == b"\x07" * 3832


def test_the_magic_is_told_even_of_a_label_that_is_not_valid() -> None:
    raw = pack(some_label())
    assert has_magic(raw[:16] + bytes(4080))
    assert not has_magic(bytes(1) + raw[1:])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        (".", "directory"),
        ("..", "directory"),
        ("a/b", "slash"),
        ("a\nb", "printed"),
        ("a\x1b[2J", "printed"),
        ("a\0b", "printed"),
        ("\udc80", "printed"),
        ("x" * 64, "63 bytes"),
        ("é" * 32, "63 bytes"),
    ],
)
def test_what_cannot_be_a_file_name_cannot_name_a_pool(name: str, why: str) -> None:
    with pytest.raises(BadName, match=why):
        check_name(name)


@pytest.mark.parametrize("name", ["pmem0", "x" * 63, "é" * 31, "a b", "…", ".hidden"])
def test_other_names_are_allowed(name: str) -> None:
    check_name(name)
    assert validate(pack(some_label(name=name))).name == name


def test_a_label_of_the_largest_file_validates_at_once() -> None:
    zones = compute_zones(
        (1 << 63) - 4096,
        page_size_bytes=GIB,
        alignment_bytes=GIB,
        memmap_in_pool=True,
        memmap_behind_data=True,
    )
    assert zones.label_copy.end_bytes == (1 << 63) - 4096
