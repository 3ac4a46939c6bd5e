"""Keys of a tensor cache as names of files, and back.

A key is any text of UTF-8. Its parts between slashes are directories, and the last part is a file
with the suffix `.safetensors`: "layer0/prefix9" is layer0/prefix9.safetensors. Invariants:
- each key has one name and each name at most one key, so two keys never share a file;
- no part is hidden, `.` or `..`: names that begin with a dot are left to the cache itself;
- no directory has the suffix of entries. Otherwise the keys "a" and "a.safetensors/b" would want a
  file and a directory of one name.

What would break one of these, and what a terminal can't show, is written as a percent sign and two
hexadecimal digits: "%", control characters, a dot at the beginning of a part, and the last dot of a
directory that ends with the suffix. A part without a character is a percent sign alone.
"""

from __future__ import annotations

import re

from pmemfs.errors import BadKey

SUFFIX = ".safetensors"

MOST_KEY_BYTES = 2048
_MOST_PART_BYTES = 255
_EMPTY = "%"
_ODD = re.compile(r"[%\x00-\x1f\x7f]|^\.")
_CODED = re.compile(r"%([0-9A-F]{2})")
_METADATA = "__metadata__"
"""Files of safetensors have this beside their tensors, which therefore can't have the name."""


def name_of(key: str) -> str:
    """The path of an entry's file, from the directory of the cache. Raises BadKey.

    TypeError is for what is no text: programs come with tuples and numbers as keys, as of a dict.
    """
    if not isinstance(key, str):
        raise TypeError(f"the key of an entry is a str, and {key!r} is not")
    try:
        key_bytes = len(key.encode())
    except UnicodeEncodeError:
        raise BadKey(key=key, why="it has characters that UTF-8 can't encode") from None
    if key_bytes > MOST_KEY_BYTES:
        why = f"it has {key_bytes} bytes, and {MOST_KEY_BYTES} are allowed"
        raise BadKey(key=key, why=why)
    if key == _METADATA:
        raise BadKey(key=key, why="files of safetensors use this name for something else")
    *directories, last = map(_part, key.split("/"))
    parts = [_without_suffix(part) for part in directories] + [last + SUFFIX]
    for part in parts:
        part_bytes = len(part.encode())
        if part_bytes > _MOST_PART_BYTES:
            why = f"a part between slashes makes a file name of {part_bytes} bytes, more than 255"
            raise BadKey(key=key, why=why)
    return "/".join(parts)


def key_of(name: str) -> str | None:
    """The key of a path below the directory of the cache; None if it is not an entry's."""
    if not name.endswith(SUFFIX):
        return None
    parts = name[: -len(SUFFIX)].split("/")
    key = "/".join("" if part == _EMPTY else _CODED.sub(_decoded, part) for part in parts)
    try:
        return key if name_of(key) == name else None
    except BadKey:
        return None


def _part(text: str) -> str:
    return _ODD.sub(lambda match: f"%{ord(match[0]):02X}", text) or _EMPTY


def _without_suffix(part: str) -> str:
    if part.endswith(SUFFIX):
        return f"{part[: -len(SUFFIX)]}%2E{SUFFIX[1:]}"
    return part


def _decoded(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))
