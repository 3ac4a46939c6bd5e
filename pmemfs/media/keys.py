"""A master key, wrapped: as it is stored, it can be unwrapped with a passphrase or a key file only.

Wrapped keys are values of extended attributes of the root directory, under names of the namespace
`pmemfs.`, which is shown to nobody. One key may be wrapped several times, once for each passphrase
or key file that unlocks it. Invariants:
- the master key itself is stored nowhere;
- what the wrapping authenticates covers every other field. Without this, who can write to the pool
  could make an unlock fast to guess for, or let a name stand for another key;
- what unwrapping costs is bounded, since a pool may come from anybody.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from pmemfs.media.layout import Layout, stored, structure

if TYPE_CHECKING:
    from typing_extensions import Buffer

RESERVED_XATTRS = b"pmemfs."
"""The namespace of extended attributes that is the file system's own."""
_PREFIX = RESERVED_XATTRS + b"key."
KEY_ID_BYTES = 16
WRAPPED_VERSION = 1
MOST_SCRYPT_BYTES = 1 << 30
"""The most memory that unwrapping takes: 128 * r * 2^log2_n bytes."""
MOST_SCRYPT_TURNS = 16


class WrappedKind(IntEnum):
    """What unwraps a key."""

    PASSPHRASE = 1
    """The key-encryption key is scrypt of the passphrase."""
    KEY_FILE = 2
    """The key-encryption key is HKDF-SHA512 of the file's bytes."""


@structure
class WrappedKey:
    """A wrapped master key."""

    version: int = stored("u1", "1", since=4, default=WRAPPED_VERSION)
    kind: int = stored("u1", "1 passphrase, 2 key file", since=4)
    log2_n: int = stored("u1", "scrypt's N as a power of 2; 0 for a key file", since=4)
    r: int = stored("u1", "scrypt's r; 0 for a key file", since=4)
    p: int = stored("u1", "scrypt's p; 0 for a key file", since=4)
    reserved: bytes = stored("V3", "zero", since=4, default=bytes(3))
    created_ns: int = stored("<i8", "when it was wrapped", unit="ns since 1970", since=4)
    key_id: bytes = stored("V16", "of the key: the start of HKDF-SHA512 of it", since=4,
                           default=bytes(KEY_ID_BYTES))  # fmt: skip
    name: str = stored("S64", "of the key, as its users know it", since=4, default="")
    salt: bytes = stored("V16", "of scrypt or HKDF", since=4, default=bytes(16))
    wrapped: bytes = stored("V80", "AES-256-SIV of the master key (64 bytes), which authenticates "
                            "all fields before it, too", since=4, default=bytes(80))  # fmt: skip


WRAPPED_KEY = Layout(WrappedKey, 192)
AUTHENTICATED_BYTES = WRAPPED_KEY.offset_of("wrapped")
"""The bytes of a wrapped key that the wrapping authenticates."""


def key_attribute(key_id: bytes, way: int) -> bytes:
    """The name of the attribute that has a key, wrapped in one of several ways."""
    return _PREFIX + key_id.hex().encode() + b".%d" % way


def read_key_attribute(name: bytes) -> tuple[bytes, int] | None:
    """The key's ID and the way, as the name of an attribute says; None for another name."""
    digits, dot, way = name.removeprefix(_PREFIX).partition(b".")
    if not name.startswith(_PREFIX) or not dot or not way.isdigit() or len(way) > 4:
        return None
    try:
        key_id = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return None
    return (key_id, int(way)) if key_attribute(key_id, int(way)) == name else None


def why_wrong(name: bytes, value: Buffer) -> str:
    """Why an attribute of this name and value is no wrapped key; "" if it is one. In this order:

    1. the name is not that of a wrapped key
    2. the length is another one
    3. the version is not known
    4. the kind is not known
    5. the key's ID is not that of the name, or zero
    6. unwrapping would cost too much, or nothing
    7. the key's name is empty, or is not UTF-8
    """
    named = read_key_attribute(name)
    raw = bytes(value)
    if named is None or len(named[0]) != KEY_ID_BYTES:
        return "its name is not that of a wrapped key"
    if len(raw) != WRAPPED_KEY.size_bytes:
        return f"it has {len(raw)} bytes, not {WRAPPED_KEY.size_bytes}"
    key = WRAPPED_KEY.unpack(raw)
    is_passphrase = key.kind == WrappedKind.PASSPHRASE
    for is_wrong, why in (
        (key.version != WRAPPED_VERSION, f"its version, {key.version}, is not known"),
        (key.kind not in tuple(WrappedKind), f"its kind, {key.kind}, is not known"),
        (key.key_id != named[0] or not any(key.key_id), "it is of another key"),
        (is_passphrase and not _is_affordable(key), "its cost is not possible"),
        (not is_passphrase and any((key.log2_n, key.r, key.p)), "a key file has no cost"),
        (not key.name or not _is_utf8(key.name), "its key has no proper name"),
    ):
        if is_wrong:
            return why
    return ""


def _is_affordable(key: WrappedKey) -> bool:
    if not 0 < key.p <= MOST_SCRYPT_TURNS or not key.r or not 0 < key.log2_n < 64:
        return False
    return 128 * key.r << key.log2_n <= MOST_SCRYPT_BYTES


def _is_utf8(text: str) -> bool:
    # `unpack` keeps other bytes as surrogates.
    return not any(0xDC80 <= ord(letter) <= 0xDCFF for letter in text)
