"""Files that hold one array, as the safetensors package writes and reads them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.client.tensorfile import as_stored, header_of, read_header, type_name
from pmemfs.errors import BadArray, BadEntry

OF_NUMPY = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
OF_ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (7,), (2, 3, 5)]


def file_of(name: str, array: np.ndarray[Any, Any]) -> bytes:
    return header_of(name, array.dtype, array.shape) + array.tobytes()


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_tensor(**changed: Any) -> dict[str, Any]:
    return {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changed}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("code", OF_NUMPY)
def test_the_safetensors_package_reads_what_is_written(code: str, shape: tuple[int, ...]) -> None:
    package = pytest.importorskip("safetensors.numpy")
    array = np.arange(np.prod(shape, dtype=int)).astype(code).reshape(shape)
    content = file_of("a/é", array)
    (found,) = package.load(content).items()
    assert found[0] == "a/é"
    assert found[1].dtype == array.dtype
    np.testing.assert_array_equal(found[1], array)
    header = read_header(memoryview(content), "p")
    assert header == (array.dtype, shape, 4096)


@pytest.mark.parametrize("name", OF_ML_DTYPES)
def test_types_of_ml_dtypes_are_named_as_the_safetensors_package_names_them(name: str) -> None:
    types = pytest.importorskip("ml_dtypes")
    package = pytest.importorskip("safetensors.numpy")
    array = np.arange(6).astype(getattr(types, name)).reshape(2, 3)
    written = package.save({"x": array})
    header = read_header(memoryview(written), "p")
    assert (header.dtype, header.shape) == (array.dtype, (2, 3))
    assert type_name(array.dtype) == json.loads(written[8:].split(b"}")[0] + b"}}")["x"]["dtype"]


@given(st.text(st.characters(codec="utf-8"), max_size=3000), st.sampled_from(SHAPES))
def test_an_array_begins_at_a_page_whatever_its_name_is(name: str, shape: tuple[int, ...]) -> None:
    content = file_of(name, np.zeros(shape, "f4"))
    header = read_header(memoryview(content), "p")
    assert header.offset_bytes % 4096 == 0
    assert header.offset_bytes + np.zeros(shape, "f4").nbytes == len(content)


@pytest.mark.parametrize("code", [">f4", ">i8", ">c8", "=f4"])
def test_values_are_stored_little_endian(code: str) -> None:
    assert as_stored(np.dtype(code)) == np.dtype(code).newbyteorder("<")


@pytest.mark.parametrize("code", ["c16", "S3", "U3", "M8[s]", "O", "V4", "f4,i4"])
def test_a_type_without_a_name_is_refused_with_a_sentence(code: str) -> None:
    with pytest.raises(BadArray, match="the safetensors format has no name for this type"):
        type_name(np.dtype(code))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no header that fits"),
        (b"\x01\0\0", "no header that fits"),
        (b"\xff" * 8 + b"{}", "no header that fits"),
        ((3 << 20).to_bytes(8, "little") + b" " * (3 << 20), "no header that fits"),
        (raw_file(b"{'x': 1}"), "not JSON"),
        (raw_file(b"\xff\xfe"), "not JSON"),
        (raw_file(b"[" * 100_000 + b"}"), "not JSON"),
        (raw_file([]), "not JSON"),
        (raw_file({}), "0 tensors"),
        (raw_file({"__metadata__": {"a": "b"}}), "0 tensors"),
        (raw_file(one_tensor() | {"y": one_tensor()["x"]}, b"1234"), "2 tensors"),
        (raw_file({"x": [1]}), "does not say what a tensor is"),
        (raw_file(one_tensor(shape=[-4])), "does not say what a tensor is"),
        (raw_file(one_tensor(shape=[4.0]), b"1234"), "does not say what a tensor is"),
        (raw_file(one_tensor(shape=[True] * 4), b"1234"), "does not say what a tensor is"),
        (raw_file(one_tensor(data_offsets=[1, 5]), b"12345"), "does not say what a tensor is"),
        (raw_file(one_tensor(data_offsets=[0])), "does not say what a tensor is"),
        (raw_file(one_tensor(dtype=4)), "does not say what a tensor is"),
        (raw_file(one_tensor(dtype="X9"), b"1234"), "X9, which numpy does not know"),
        (raw_file(one_tensor(shape=[1 << 62]), b"1234"), "not as long as"),
        (raw_file(one_tensor(), b"123"), "not as long as"),
        (raw_file(one_tensor(), b"12345"), "not as long as"),
    ],
)
def test_a_file_that_is_no_entry_is_refused_with_a_sentence(content: bytes, why: str) -> None:
    with pytest.raises(BadEntry, match=why):
        read_header(memoryview(content), "p")


def test_metadata_and_little_padding_are_no_obstacle() -> None:
    content = raw_file({"__metadata__": {"format": "pt"}} | one_tensor(), b"1234")
    header = read_header(memoryview(content), "p")
    assert bytes(content[header.offset_bytes :]) == b"1234"


@given(st.binary(max_size=200) | st.binary(max_size=100).map(raw_file))
def test_any_bytes_are_an_entry_or_are_refused(content: bytes) -> None:
    try:
        header = read_header(memoryview(content), "p")
    except BadEntry:
        return
    assert header.offset_bytes <= len(content)
