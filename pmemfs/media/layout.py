"""How a stored structure is declared: a class whose fields say what they are on the medium.

    @structure
    class Label:
        sequence: int = stored("<u8", "counts the writes of this label")

The numpy dtype, the packed form, the size check and the table in docs/format.md all come from this
one list, so none of them can differ from the others. Invariants: numbers are little-endian, padding
is always a named field, and the fields add up to the declared size.
"""

from __future__ import annotations

import functools
import struct
from collections import namedtuple
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast, dataclass_transform

# numpy takes longer to load than most commands take to run, and only page structures need it.
if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

T = TypeVar("T")

_STRUCT_CODES = {"<u8": "Q", "<u4": "I", "<u2": "H", "u1": "B", "<i8": "q", "i1": "b"}


class StoredField(NamedTuple):
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

    Types are unsigned integers ("<u8", "<u4", "<u2", "u1"), signed ones ("<i8", "i1"), bytes
    ("V16") and text ("S64": UTF-8, filled with NULs).
    """
    return _Declared(type_, meaning, unit, since, default)


class _Declared:
    """A field of a structure, until `structure` has taken it."""

    def __init__(self, type_: str, meaning: str, unit: str, since: int, default: Any) -> None:
        self.type = type_
        self.meaning = meaning
        self.unit = unit
        self.since = since
        self.default = default


_DECLARED: dict[type, dict[str, _Declared]] = {}
"""The declared fields of each structure."""


@dataclass_transform(frozen_default=True)
def structure(declaration: type[T]) -> type[T]:
    """Make a class of stored fields a structure, whose values hold these fields in order.

    It looks like a frozen dataclass, but is made as a named tuple. To make a dataclass, Python
    writes and compiles the code of six methods; for all stored structures together that took a
    tenth of the time in which a mount starts.
    """
    namespace = dict(vars(declaration))
    names = [name for name, value in namespace.items() if isinstance(value, _Declared)]
    declared = {name: namespace.pop(name) for name in names}
    defaults = [field.default for field in declared.values()]
    base = namedtuple(declaration.__name__, names, defaults=defaults)  # type: ignore[misc]
    for name in ("__dict__", "__weakref__"):
        namespace.pop(name, None)
    made = type(declaration.__name__, (base,), {**namespace, "__slots__": ()})
    _DECLARED[made] = declared
    return cast("type[T]", made)


def replace(value: T, **changes: Any) -> T:
    """A structure with other values in some fields, as dataclasses.replace does it."""
    return cast(T, cast(Any, value)._replace(**changes))


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

    def room_of(self, name: str) -> int:
        """The size of a field in bytes."""
        return next(f.size_bytes for f in self.fields if f.name == name)

    def head_struct(self, last: str) -> struct.Struct:
        """The packed form of the fields from the first to `last`."""
        names = [f.name for f in self.fields]
        head = self.fields[: names.index(last) + 1]
        return struct.Struct("<" + "".join(_struct_code(f.type) for f in head))

    def pack(self, value: T) -> bytes:
        """The stored form. Raises struct.error for a number or a text that does not fit its
        field."""
        return self.struct.pack(*(_to_stored(f, getattr(value, f.name)) for f in self.fields))

    def unpack(self, buffer: Buffer) -> T:
        """The structure that is stored in a buffer of exactly `size_bytes`. Nothing is checked.

        Text that is not UTF-8 keeps its bytes as surrogates, so that a validation can refuse it.
        """
        values = self.struct.unpack(buffer)
        return self.structure(
            *(_from_stored(f.type, v) for f, v in zip(self.fields, values, strict=True))
        )


def _stored_fields(structure: type) -> tuple[StoredField, ...]:
    fields = []
    offset_bytes = 0
    for name, declared in _DECLARED[structure].items():
        size_bytes = struct.calcsize("<" + _struct_code(declared.type))
        fields.append(
            StoredField(
                name=name,
                type=declared.type,
                meaning=declared.meaning,
                unit=declared.unit,
                since=declared.since,
                offset_bytes=offset_bytes,
                size_bytes=size_bytes,
            )
        )
        offset_bytes += size_bytes
    return tuple(fields)


def _struct_code(type_: str) -> str:
    return f"{int(type_[1:])}s" if type_[0] in "SV" else _STRUCT_CODES[type_]


def _to_stored(field: StoredField, value: Any) -> Any:
    if field.type[0] != "S":
        return value
    raw = value.encode("utf-8", "surrogateescape")
    if len(raw) > field.size_bytes:
        # `struct` would cut it off.
        raise struct.error(f"{field.name} has {len(raw)} bytes, and room for {field.size_bytes}")
    return raw


def _from_stored(type_: str, value: Any) -> Any:
    if type_[0] != "S":
        return value
    return value.rstrip(b"\0").decode("utf-8", "surrogateescape")
