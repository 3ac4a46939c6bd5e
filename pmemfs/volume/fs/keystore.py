"""The wrapped keys of a file system, as attributes of its root directory.

Invariants:
- each change is one transaction. So a key can be unlocked as before or as after, also after a power
  failure in between;
- to add, change or remove a way to unlock a key touches no file that is encrypted with it, because
  the master key stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from pmemfs.clock import coarse_ns
from pmemfs.media.inode import ROOT
from pmemfs.media.keyreport import SALT_BYTES, KeyReport, KeyWay
from pmemfs.media.keys import (
    AUTHENTICATED_BYTES,
    WRAPPED_KEY,
    WrappedKey,
    WrappedKind,
    key_attribute,
    read_key_attribute,
    why_wrong,
)
from pmemfs.pool import Pool
from pmemfs.transform.secrets import Secrets
from pmemfs.volume.fs.ground import stored_table
from pmemfs.volume.fs.reading import read_xattrs
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.xattrs import Xattrs

SCRYPT_LOG2_N, SCRYPT_R, SCRYPT_P = 17, 8, 1
"""128 MiB and some tenths of a second for each guess of a passphrase. Source: OWASP, Password
Storage Cheat Sheet."""


WORDS = {
    WrappedKind.PASSPHRASE: "passphrase",
    WrappedKind.KEY_FILE: "key file",
}
"""What each kind is called, in requests and in answers."""


class Secret(NamedTuple):
    """What a user unlocks a key with. Invariant: it is never logged, nor in a sentence."""

    kind: WrappedKind
    text: bytes

    def __repr__(self) -> str:
        return f"Secret({self.kind.name})"


class Way(NamedTuple):
    """One way to unlock a key, as it is stored."""

    key_id: bytes
    number: int
    wrapped: WrappedKey | None
    problem: str
    """Why `wrapped` is None."""

    @property
    def attribute(self) -> bytes:
        """The name of the attribute that has it."""
        return key_attribute(self.key_id, self.number)

    @property
    def created_ns(self) -> int:
        """When it was added, in ns since 1970; 0 if it is damaged."""
        return self.wrapped.created_ns if self.wrapped else 0

    def is_unlocked_by(self, secret: Secret, secrets: Secrets, slot: int) -> bool:
        """Whether a secret unlocks the key this way; then the key is in the slot. Takes long, and
        touches nothing but secret memory."""
        key = self.wrapped
        return (
            key is not None
            and key.kind == secret.kind
            and secrets.unwrap(
                slot, secret.text, key.salt, key.log2_n, key.r, key.p, key.wrapped,
                WRAPPED_KEY.pack(key)[:AUTHENTICATED_BYTES],
            )
            and secrets.key_id(slot) == self.key_id
        )  # fmt: skip


def wrapped(
    name: str, key_id: bytes, secret: Secret, secrets: Secrets, slot: int, salt: bytes = b""
) -> bytes:
    """The key in a slot, wrapped, as it is stored. Takes long, and touches nothing but secret
    memory. `salt` is random, and of this wrapping alone; without it, one is made. Raises
    OSError."""
    is_passphrase = secret.kind is WrappedKind.PASSPHRASE
    log2_n, r, p = (SCRYPT_LOG2_N, SCRYPT_R, SCRYPT_P) if is_passphrase else (0, 0, 0)
    key = WrappedKey(
        kind=secret.kind, log2_n=log2_n, r=r, p=p, created_ns=coarse_ns(), key_id=key_id, name=name,
        salt=salt or os.urandom(SALT_BYTES),
    )  # fmt: skip
    head = WRAPPED_KEY.pack(key)[:AUTHENTICATED_BYTES]
    return head + secrets.wrap(slot, secret.text, key.salt, log2_n, r, p, head)


class KeyStore:
    """The wrapped keys of one file system."""

    def __init__(self, store: Store, xattrs: Xattrs) -> None:
        self._store = store
        self._xattrs = xattrs

    def ways(self) -> list[Way]:
        """As `ways_in`."""
        return ways_in(self._store.inode(ROOT).xattrs)

    def of_key(self, key_id: bytes) -> list[Way]:
        """The ways to unlock a key."""
        return [way for way in self.ways() if way.key_id == key_id]

    def key_ids(self) -> list[bytes]:
        """The keys that any way unlocks, the oldest first."""
        return list(dict.fromkeys(way.key_id for way in self.ways()))

    def named(self, name: str) -> bytes | None:
        """The ID of the key of a name; None if there is none."""
        return next((w.key_id for w in self.ways() if w.wrapped and w.wrapped.name == name), None)

    def add(self, key_id: bytes, value: bytes) -> int:
        """Store one more way; its number. Raises OSError."""
        used = {way.number for way in self.of_key(key_id)}
        number = next(n for n in range(1, len(used) + 2) if n not in used)
        self._change({key_attribute(key_id, number): value})
        return number

    def replace(self, ways: Sequence[Way], value: bytes) -> None:
        """Store another way in place of one or more, under the number of the first. Raises
        OSError."""
        first, *others = ways
        self._change({first.attribute: value, **{way.attribute: None for way in others}})

    def remove(self, ways: Iterable[Way]) -> None:
        """Remove some ways at once. Raises OSError."""
        self._change({way.attribute: None for way in ways})

    def _change(self, changes: dict[bytes, bytes | None]) -> None:
        self._xattrs.set_xattrs_and_mode(ROOT, changes, None)


def ways_in(xattrs: Mapping[bytes, bytes]) -> list[Way]:
    """All ways to unlock any key that attributes of the root have, damaged ones too; those of one
    key are side by side, and the oldest key comes first."""
    found: dict[bytes, list[Way]] = {}
    for name, value in xattrs.items():
        named = read_key_attribute(name)
        if named is None:
            continue
        problem = why_wrong(name, value)
        key = None if problem else WRAPPED_KEY.unpack(value)
        found.setdefault(named[0], []).append(Way(*named, key, problem))
    keys = sorted(found.values(), key=_oldest)
    return [way for ways in keys for way in sorted(ways, key=lambda way: way.number)]


def stored_keys(pool: Pool) -> tuple[KeyReport, ...]:
    """All keys of a pool that is not mounted, which are locked. Writes nothing. Raises
    DamagedFileSystem."""
    table = stored_table(pool)
    ways = ways_in(read_xattrs(pool.medium, table, ROOT))
    keys = groupby(ways, key=lambda way: way.key_id)
    return tuple(key_report(key_id, list(of_key), is_unlocked=False) for key_id, of_key in keys)


def key_report(
    key_id: bytes, ways: Sequence[Way], *, is_unlocked: bool, name: str = ""
) -> KeyReport:
    """What is said of a key that these ways unlock. `name` is for one whose ways don't say it."""
    return KeyReport(
        name=name_of(ways) or name,
        key_id=key_id.hex(),
        is_unlocked=is_unlocked,
        ways=tuple(
            KeyWay(way.number, WORDS[WrappedKind(way.wrapped.kind)], way.created_ns)
            if way.wrapped
            else KeyWay(way.number, "damaged", 0, way.problem)
            for way in ways
        ),
    )


def name_of(ways: Sequence[Way]) -> str:
    """The name of the key that these ways unlock; "" if none of them says it."""
    return next((way.wrapped.name for way in ways if way.wrapped), "")


def _oldest(ways: list[Way]) -> int:
    return min((way.created_ns for way in ways if way.wrapped), default=0)
