"""How a stored structure is declared: a dataclass whose fields say what they are on the medium.

    @dataclass(frozen=True)
    class Label:
        sequence: int = stored("<u8", "counts the writes of this label")

From that one list come the numpy dtype, the packed form, the size check and the table in
docs/format.md. Invariants: little-endian, no padding that isn't a named field, and the sum of the
fields is the declared size.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

# numpy takes longer to load than most commands take to run, and only page structures need it.
if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

T = TypeVar("T")

_STRUCT_CODES = {"<u8": "Q", "<u4": "I", "<u2": "H", "u1": "B", "<i8": "q"}


@dataclass(frozen=True, slots=True)
class StoredField:
    """One field of a stored structure, as docs/format.md shows it."""

    name: str
    type: str
    meaning: str
    unit: str
    since: int
    offset_bytes: int
    size_bytes: int


def stored(type_: str, meaning: str, *, unit: str = "", since: int = 1, default: Any = 0) -> Any:
    """Declare a field: its numpy type, what it means, its unit, and its first format version.

    Types are unsigned integers ("<u8", "<u4", "<u2", "u1"), signed ones ("<i8"), bytes ("V16") and
    text ("S64": UTF-8, filled with NULs).
    """
    metadata = {"type": type_, "meaning": meaning, "unit": unit, "since": since}
    return dataclasses.field(default=default, metadata=metadata)


class Layout(Generic[T]):
    """The bytes of a declared structure."""

    def __init__(self, structure: type[T], size_bytes: int) -> None:
        self.structure = structure
        self.size_bytes = size_bytes
        self.fields = _stored_fields(structure)
        self.struct = struct.Struct("<" + "".join(_struct_code(f.type) for f in self.fields))
        if self.struct.size != size_bytes:
            raise TypeError(f"{structure.__name__} is {self.struct.size} bytes, not {size_bytes}")

    @functools.cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The packed numpy dtype."""
        import numpy as np

        return np.dtype([(f.name, f.type) for f in self.fields])

    def offset_of(self, name: str) -> int:
        """The offset of a field in bytes."""
        return next(f.offset_bytes for f in self.fields if f.name == name)

    def head_struct(self, last: str) -> struct.Struct:
        """The packed form of the fields from the first to `last`."""
        names = [f.name for f in self.fields]
        head = self.fields[: names.index(last) + 1]
        return struct.Struct("<" + "".join(_struct_code(f.type) for f in head))

    def pack(self, value: T) -> bytes:
        """The stored form. Raises struct.error for a number that does not fit its field."""
        return self.struct.pack(*(_to_stored(f.type, getattr(value, f.name)) for f in self.fields))

    def unpack(self, buffer: Buffer) -> T:
        """The structure that is stored in a buffer of exactly `size_bytes`, nothing checked.

        Text that is not UTF-8 keeps its bytes as surrogates, for a validation gate to refuse.
        """
        values = self.struct.unpack(buffer)
        named = {f.name: _from_stored(f.type, v) for f, v in zip(self.fields, values, strict=True)}
        return self.structure(**named)


def _stored_fields(structure: type) -> tuple[StoredField, ...]:
    fields = []
    offset_bytes = 0
    for declared in dataclasses.fields(cast(Any, structure)):
        type_ = declared.metadata["type"]
        size_bytes = struct.calcsize("<" + _struct_code(type_))
        fields.append(
            StoredField(
                name=declared.name,
                type=type_,
                meaning=declared.metadata["meaning"],
                unit=declared.metadata["unit"],
                since=declared.metadata["since"],
                offset_bytes=offset_bytes,
                size_bytes=size_bytes,
            )
        )
        offset_bytes += size_bytes
    return tuple(fields)


def _struct_code(type_: str) -> str:
    return f"{int(type_[1:])}s" if type_[0] in "SV" else _STRUCT_CODES[type_]


def _to_stored(type_: str, value: Any) -> Any:
    return value.encode("utf-8", "surrogateescape") if type_[0] == "S" else value


def _from_stored(type_: str, value: Any) -> Any:
    if type_[0] != "S":
        return value
    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
