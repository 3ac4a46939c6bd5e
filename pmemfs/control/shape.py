"""Turns JSON, which any program may have written, into the record that it should be.

A record is a named tuple, or a dataclass, which takes longer to load and may check its values. It
is made of records, tuples of one type, dictionaries, texts, integers of 64 bits, finite numbers,
booleans, literals, None. Keys that a record doesn't know are left out, so that an older command can
read what a newer daemon says.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pmemfs.unsaid import Unsaid, UnsaidFloat, UnsaidInt, UnsaidList, UnsaidMapping, UnsaidText

Decoded = TypeVar("Decoded")

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1
_KEY_DIGITS = 20


class Malformed(Exception):
    """A value does not have the shape that it should have; the text says where and why."""


def decode(shape: type[Decoded], value: Any, missing: list[str] | None = None) -> Decoded:
    """The value as a `shape`; unchanged if that is Any. Raises Malformed.

    With `missing`, a record may lack some members: their names are added to that list, and each
    gets a value that says nothing, such as "" or 0, and is `Unsaid`.
    """
    return cast(Decoded, _Decoder(missing).decode(shape, value, "it"))


class _Decoder:
    def __init__(self, missing: list[str] | None) -> None:
        self._missing = missing

    def decode(self, shape: Any, value: Any, where: str) -> Any:
        """The value as a `shape`; `where` names it in the sentence about an error."""
        origin, parts = get_origin(shape), get_args(shape)
        if (members := _members(shape)) is not None:
            return self._record(shape, members, value, where)
        if origin in (types.UnionType, Union):
            return self._one_of(parts, value, where)
        if origin is Literal:
            return _known(value in parts if isinstance(value, str) else False, value, where)
        if origin in (tuple, list):
            _known(isinstance(value, list), value, where)
            return origin(self.decode(parts[0], item, f"an item of {where}") for item in value)
        if origin in (dict, Mapping):
            _known(isinstance(value, dict), value, where)
            return {
                _key(parts[0], key, where): self.decode(parts[1], item, f"an item of {where}")
                for key, item in value.items()
            }
        return _plain(shape, value, where)

    def _record(self, shape: Any, known: dict[str, bool], value: Any, where: str) -> Any:
        _known(isinstance(value, dict), value, where)
        hints = get_type_hints(shape)
        members = {}
        lacking = []
        for name, has_default in known.items():
            place = name if where == "it" else f"{where}.{name}"
            if name in value:
                members[name] = self.decode(hints[name], value[name], place)
            elif not has_default:
                lacking.append(place)
                members[name] = _saying_nothing(hints[name])
        if lacking and (self._missing is None or len(lacking) == len(members)):
            raise Malformed(f"{lacking[0]} is missing")
        if self._missing is not None:
            self._missing += lacking
        try:
            return shape(**members)
        except ValueError as error:
            raise Malformed(f"{where}: {error}") from None

    def _one_of(self, shapes: tuple[Any, ...], value: Any, where: str) -> Any:
        reasons = []
        for shape in shapes:
            try:
                return self.decode(shape, value, where)
            except Malformed as error:
                reasons.append(error)
        raise reasons[0]


def _members(shape: Any) -> dict[str, bool] | None:
    """The members of a record, and whether each has a default; None for any other shape."""
    if hasattr(shape, "_field_defaults"):
        return {name: name in shape._field_defaults for name in shape._fields}
    if not hasattr(shape, "__dataclass_fields__"):
        return None
    # Whoever has made a dataclass has loaded this, and hardly any command waits for one.
    from dataclasses import MISSING, fields

    return {
        field.name: not field.default is field.default_factory is MISSING for field in fields(shape)
    }


_NOTHING: dict[Any, type[Unsaid]] = {
    "text": UnsaidText, str: UnsaidText, bool: UnsaidInt, int: UnsaidInt, float: UnsaidFloat,
    tuple: UnsaidList, list: UnsaidList, dict: UnsaidMapping, Mapping: UnsaidMapping,
}  # fmt: skip


def _saying_nothing(shape: Any) -> Any:
    """A value of this shape that says nothing."""
    origin, parts = get_origin(shape), get_args(shape)
    if (members := _members(shape)) is not None:
        hints = get_type_hints(shape)
        return shape(**{name: _saying_nothing(hints[name]) for name in members})
    if origin in (types.UnionType, Union):
        return None if types.NoneType in parts else _saying_nothing(parts[0])
    if shape is Any:
        return None
    return _NOTHING["text" if origin is Literal else origin or shape]()


def _plain(shape: Any, value: Any, where: str) -> Any:
    if shape is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_known(is_number and _LEAST <= value <= _MOST, value, where))
    if shape is int:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return _known(is_number and _LEAST <= value <= _MOST, value, where)
    if shape in (None, types.NoneType):
        return _known(value is None, value, where)
    return _known(shape is Any or isinstance(value, shape), value, where)


def _key(shape: Any, key: str, where: str) -> Any:
    if shape is str:
        return key
    is_number = key.isascii() and key.isdecimal() and len(key) <= _KEY_DIGITS
    return int(_known(is_number, key, where))


def _known(is_known: bool, value: Any, where: str) -> Any:
    if not is_known:
        raise Malformed(f"{where} is not what it should be")
    return value
