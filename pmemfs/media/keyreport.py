"""What is said of the keys of a file system: declared once, for the daemon and the commands."""

from __future__ import annotations

from typing import NamedTuple

from pmemfs.errors import BadSecret

MOST_NAME_BYTES = 64
SALT_BYTES = 16
"""Of what a wrapping has for itself alone."""
_LEAST_KEY_FILE_BYTES = 32
_MOST_SECRET_BYTES = 64 * 1024


class KeyWay(NamedTuple):
    """One way to unlock a key."""

    number: int
    kind: str
    """`passphrase`, `key file`, or `damaged`."""
    created_ns: int
    """When it was added, in ns since 1970; 0 if it is damaged."""
    problem: str = ""
    """Why nothing can be unlocked this way; "" if it is not damaged."""


class KeyReport(NamedTuple):
    """One key."""

    name: str
    """As its users know it; "" if only directories know of it, and no way to unlock it is left."""
    key_id: str
    """Hexadecimal."""
    is_unlocked: bool
    ways: tuple[KeyWay, ...]


class KeyReports(NamedTuple):
    """All keys, in the order in which they were made."""

    keys: tuple[KeyReport, ...]


class Added(NamedTuple):
    """A key, after something was to unlock it."""

    key: KeyReport
    is_new_way: bool
    """Whether this request added the way; otherwise the secret unlocked the key before."""


class Locked(NamedTuple):
    """A key that is locked."""

    name: str
    key_id: str
    was_locked: bool
    """Whether it was locked before."""


def check_secret(secret: bytes, kind: str) -> None:
    """Raise BadSecret for a passphrase or a key file that can't be one. Whoever guesses a key file
    needs no scrypt for each guess, so it has to be long."""
    if not secret:
        raise BadSecret(what=f"this {kind}", why="it is empty")
    if len(secret) > _MOST_SECRET_BYTES:
        raise BadSecret(what=f"this {kind}", why=f"it has more than {_MOST_SECRET_BYTES} bytes")
    if kind == "key file" and len(secret) < _LEAST_KEY_FILE_BYTES:
        raise BadSecret(
            what=f"this {kind}",
            why=f"it has {len(secret)} bytes, and needs {_LEAST_KEY_FILE_BYTES}; "
            "'head -c 64 /dev/urandom' makes a good one",
        )
