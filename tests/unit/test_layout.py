"""Declared structures: their fields add up to what is stored."""

from __future__ import annotations

import struct

import pytest

from pmemfs.media import label, page
from pmemfs.media.layout import Layout, replace, stored, structure


@structure
class Sample:
    count: int = stored("<u4", "a number", unit="things")
    short: int = stored("<u2", "another")
    byte: int = stored("u1", "and another")
    text: str = stored("S8", "words", default="")
    blob: bytes = stored("V3", "bytes", since=2, default=bytes(3))


def test_a_structure_of_another_size_than_declared_is_refused() -> None:
    Layout(Sample, 18)
    with pytest.raises(TypeError, match="Sample is 18 bytes, not 20"):
        Layout(Sample, 20)


def test_a_text_without_room_is_not_cut_off() -> None:
    layout = Layout(Sample, 18)
    sample = Sample(count=1, short=2, byte=3, text="ä" * layout.room_of("text"))
    with pytest.raises(struct.error, match="text has 16 bytes, and room for 8"):
        layout.pack(sample)
    fits = replace(sample, text="ä" * 4)
    assert layout.unpack(layout.pack(fits)) == fits


@pytest.mark.parametrize("layout", [label.LAYOUT, page.LAYOUT, Layout(Sample, 18)])
def test_fields_follow_each_other_without_a_gap(layout: Layout[object]) -> None:
    end = 0
    for field in layout.fields:
        assert field.offset_bytes == end
        assert field.meaning
        end += field.size_bytes
    assert end == layout.size_bytes == layout.dtype.itemsize == layout.struct.size


@pytest.mark.parametrize("layout", [label.LAYOUT, page.LAYOUT, Layout(Sample, 18)])
def test_numpy_and_struct_see_each_field_at_the_same_place(layout: Layout[object]) -> None:
    offsets = {name: layout.dtype.fields[name][1] for name in layout.dtype.names or ()}
    assert offsets == {field.name: field.offset_bytes for field in layout.fields}
    assert layout.offset_of(layout.fields[-1].name) == layout.fields[-1].offset_bytes
    assert layout.head_struct(layout.fields[1].name).size == layout.fields[2].offset_bytes


def test_numbers_are_little_endian_and_text_is_filled_with_nul() -> None:
    raw = Layout(Sample, 18).pack(Sample(count=1, short=2, byte=3, text="é", blob=b"abc"))
    assert raw == b"\x01\0\0\0" + b"\x02\0" + b"\x03" + b"\xc3\xa9" + bytes(6) + b"abc"


def test_text_that_is_not_utf8_keeps_its_bytes() -> None:
    layout = Layout(Sample, 18)
    raw = bytearray(layout.pack(Sample(text="abc")))
    raw[7:9] = b"\xff\xfe"
    assert layout.pack(layout.unpack(raw)) == raw
