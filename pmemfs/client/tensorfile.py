"""Files of the safetensors format that hold one array, so that the array can be mapped.

Such a file begins with the length of its header in 8 bytes, little-endian. The header is JSON: for
each tensor its type, its shape, and where behind the header its bytes begin and end. Invariants:
- what is written here begins at a whole page of 4 KiB, because spaces end the header. So the array
  is aligned for whatever computes with it;
- what is read was checked in one place, `read_header`. A header that lies would show bytes outside
  of the file otherwise.
Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np

from pmemfs.client.elements import of_ml_dtypes
from pmemfs.errors import BadArray, BadEntry
from pmemfs.pfn import FRAME_BYTES

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MOST_HEADER_BYTES = 1 << 20

_OF_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_OF_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in _OF_NUMPY.items()}


class TensorHeader(NamedTuple):
    """Where in a file its array lies, and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset_bytes: int


def as_stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the same values in a file, which are little-endian. Raises BadArray."""
    name = type_name(dtype)
    return np.dtype(_OF_NUMPY[name]) if name in _OF_NUMPY else dtype


def type_name(dtype: np.dtype[Any]) -> str:
    """What safetensors calls a type of elements. Raises BadArray if it has no name for it."""
    name = _NAMES.get(dtype.newbyteorder("="))
    if name is None:
        name = next((one for one, other in _OF_ML_DTYPES.items() if other == dtype.name), None)
    if name is None:
        raise BadArray(dtype=dtype, why="the safetensors format has no name for this type")
    return name


def header_of(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of an array, up to a whole page. Raises BadArray."""
    said = {
        "dtype": type_name(dtype),
        "shape": shape,
        "data_offsets": (0, math.prod(shape) * dtype.itemsize),
    }
    text = json.dumps({name: said}, ensure_ascii=False, separators=(",", ":")).encode()
    padding = -(_LENGTH_BYTES + len(text)) % FRAME_BYTES
    length = len(text) + padding
    return length.to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def read_header(file: memoryview, path: str) -> TensorHeader:
    """Where the array of a file lies; `path` is for the sentence of an error.

    Raises BadEntry, in this order: the header doesn't fit into the file, or is longer than 1 MiB;
    it is not JSON; it doesn't describe exactly one tensor; a type, a shape or offsets are missing
    or of the wrong kind; the type is unknown here; the tensor is not as long as type and shape say,
    or the file is longer or shorter than that. Raises NeedsPackage for a type of ml_dtypes where
    that is missing.
    """
    length = int.from_bytes(file[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(file) < _LENGTH_BYTES or length > _MOST_HEADER_BYTES or start > len(file):
        raise BadEntry(path=path, why="it has no header that fits into it")
    try:
        header = bytes(file[_LENGTH_BYTES:start])
        # Thousands of spaces behind it take longer than all of the JSON.
        said = json.loads(header[: header.rfind(b"}") + 1])
    except (ValueError, RecursionError):
        raise BadEntry(path=path, why="its header is not JSON") from None
    tensors = [name for name in said if name != _METADATA] if isinstance(said, dict) else []
    if len(tensors) != 1:
        why = f"it has {len(tensors)} tensors, and an entry has one"
        raise BadEntry(path=path, why=why)
    match said[tensors[0]]:
        case {"dtype": str(name), "shape": list(shape), "data_offsets": [0, int(end)]} if all(
            type(each) is int and each >= 0 for each in shape
        ):
            dtype = _dtype_of(name, path)
        case _:
            raise BadEntry(path=path, why="its header does not say what a tensor is")
    if dtype is None:
        why = f"its elements are of type {name}, which numpy does not know"
        raise BadEntry(path=path, why=why)
    if end != math.prod(shape) * dtype.itemsize or start + end != len(file):
        raise BadEntry(path=path, why="it is not as long as its header says")
    return TensorHeader(dtype, tuple(shape), start)


def _dtype_of(name: str, path: str) -> np.dtype[Any] | None:
    """The type that safetensors calls so; None if it is unknown here. Raises NeedsPackage."""
    if name in _OF_NUMPY:
        return np.dtype(_OF_NUMPY[name])
    if name in _OF_ML_DTYPES:
        return of_ml_dtypes(_OF_ML_DTYPES[name], f"{path}, with elements of type {name},")
    return None
