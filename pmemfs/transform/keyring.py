"""Which keys of a mount are unlocked, and where in secret memory the keys of its files are.

A key of a file is derived from a master key when it is first needed. There are more files than
slots, so the slot of the file that was used least recently is given to another one. Invariants:
- a slot gets another key only when no worker can see a table any more that names the slot.
  Otherwise a worker would store one file's bytes under the key of another file;
- all that counts is in secret memory, which outlives this process. So whoever takes the mount over
  has the same keys in the same slots, and the tables of files go on to count;
- a key that is being locked gives out no slot to a request any more, also while what it has given
  out still counts. Otherwise a request that comes meanwhile would bring back what is being
  forgotten.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pmemfs.errors import system_error
from pmemfs.transform.secrets import FILE, MASTER, SLOT_COUNT, Secrets

NAMES, VALUES = 3, 4
"""Kinds of slots that only the control plane uses."""

_SPARE_SLOTS = 32
"""So many slots are made free ahead of need, because a grace period has to pass before."""
_MOST_WITHDRAWN = 64
"""The slots that may be on their way to be free at once."""
_POLL_SECONDS = 0.0002

_Owner = tuple[int, int, int]
"""What the key in a slot is for: inode, generation, kind."""
_PURPOSES = {
    FILE: b"pmemfs content",
    NAMES: b"pmemfs names",
    VALUES: b"pmemfs values",
}
"""What goes into the derivation of a file's key, before its nonce."""


class Tables(Protocol):
    """Where the data plane is shown which slot a file has."""

    def changed(self, number: int) -> object | None:
        """Withdraw what is shown of an inode; a token for `is_over`, or None if nobody can see
        it."""

    def is_over(self, token: object) -> bool:
        """Whether no worker can see any more what was withdrawn with a token."""


class Transform(Protocol):
    """Of an inode: whose key it has, and what tells its keys from those of others."""

    @property
    def key_id(self) -> bytes:
        """The master key."""

    @property
    def nonce(self) -> bytes:
        """16 random bytes."""


class Sealed(Protocol):
    """An inode that is encrypted."""

    @property
    def number(self) -> int:
        """Its number, which another inode may have had before."""

    @property
    def generation(self) -> int:
        """Tells inodes of one number apart."""

    @property
    def transform(self) -> Transform | None:
        """How it is encrypted."""


class Keyring:
    """The keys of one mount."""

    def __init__(
        self, memory: Callable[[], int], tables: Tables, *, may_have_keys: bool = False
    ) -> None:
        """`memory` gives the descriptor of secret memory, in which an earlier process may have left
        keys.

        Raises OSError, but only if there may be keys: other mounts neither load ciphers nor have
        such memory before the first key.
        """
        self._memory = memory
        self._tables = tables
        self._masters: dict[bytes, int] = {}
        self._slots: dict[_Owner, int] = {}
        """Of files, the least recently used first."""
        self._keys: dict[_Owner, Transform] = {}
        """What a file's key was derived from, as far as this process knows."""
        self._free: list[int] = []
        self._leaving: deque[tuple[int, object]] = deque()
        """Slots that will be free, and the tokens of the tables that named them."""
        self._locking: set[bytes] = set()
        self._secrets: Secrets | None = None
        if may_have_keys:
            self._find_keys()

    @property
    def secrets(self) -> Secrets:
        """The memory that has the keys. Raises OSError, the first time."""
        if self._secrets is None:
            self._find_keys()
        assert self._secrets is not None
        return self._secrets

    def _find_keys(self) -> None:
        self._secrets = secrets = Secrets(self._memory())
        for slot in reversed(range(SLOT_COUNT)):
            kind = secrets.kind(slot)
            if kind == MASTER:
                self._masters[secrets.key_id(slot)] = slot
            elif kind == FILE:
                self._slots[(*secrets.file_of(slot), kind)] = slot
            else:
                # The others are for this process alone, and are derived anew. A slot that is free
                # may have what an earlier process was about to put there, and one that was only
                # tried has a key that may be locked.
                self.give_back(slot)

    @property
    def unlocked(self) -> frozenset[bytes]:
        """The IDs of the keys that are unlocked."""
        return frozenset(self._masters) - self._locking

    @property
    def has_keys(self) -> bool:
        """Whether any key is in secret memory, if only until it is locked."""
        return bool(self._masters)

    def is_unlocked(self, key_id: bytes) -> bool:
        """Whether a key is unlocked."""
        return key_id in self._masters and key_id not in self._locking

    def slot_of(self, key_id: bytes) -> int:
        """The slot of a master key. Raises OSError (ENOKEY) if it is locked."""
        return self._slot_of(key_id, while_locking=False)

    def file_slot(self, inode: Sealed) -> int:
        """The slot of the key of a file's content. Raises OSError (ENOKEY)."""
        return self._slot(inode, FILE)

    def names_slot(self, inode: Sealed, *, while_locking: bool = False) -> int:
        """The slot of the key of a directory's names; if wanted also between `begin_lock` and
        `lock`, which wipes it. Raises OSError (ENOKEY)."""
        return self._slot(inode, NAMES, while_locking=while_locking)

    def values_slot(self, inode: Sealed) -> int:
        """The slot of the key of a link's target and of an inode's extended attributes. Raises
        OSError (ENOKEY)."""
        return self._slot(inode, VALUES)

    def take_master(self) -> int:
        """A free slot, to put a master key there; `keep_master` or `give_back` follows. Raises
        OSError."""
        assert self.secrets
        return self._take()

    def keep_master(self, slot: int) -> bytes:
        """The key in a slot is unlocked from now on; its ID."""
        key_id = self.secrets.key_id(slot)
        if key_id in self._masters:
            self.give_back(slot)
        else:
            self.secrets.keep(slot)
            self._masters[key_id] = slot
        return key_id

    def give_back(self, slot: int) -> None:
        """Wipe a slot that nothing names, and have it free."""
        self.secrets.wipe(slot)
        self._free.append(slot)

    def begin_lock(self, key_id: bytes) -> None:
        """Give out no slot of a key any more; `lock` or `keep_unlocked` follows. Raises OSError
        (ENOKEY)."""
        self.slot_of(key_id)
        self._locking.add(key_id)

    def keep_unlocked(self, key_id: bytes) -> None:
        """Give out slots of a key again, which was not locked after all."""
        self._locking.discard(key_id)

    def lock(self, key_id: bytes) -> None:
        """Wipe a key and all that was derived from it, once no worker can use it any more."""
        for owner in list(self._slots):
            # Of what an earlier process has derived nobody here knows from which key.
            known = self._keys.get(owner)
            if known is None or known.key_id == key_id:
                self._withdraw(owner)
        self._await_graces()
        self.give_back(self._masters.pop(key_id))
        self._locking.discard(key_id)

    def wipe_all(self) -> None:
        """The mount has ended: no key is left."""
        if self._secrets is None:
            return
        self._secrets.wipe_all()
        for known in (self._masters, self._slots, self._keys, self._leaving):
            known.clear()
        self._free = list(reversed(range(SLOT_COUNT)))

    def _slot(self, inode: Sealed, kind: int, *, while_locking: bool = False) -> int:
        transform = inode.transform
        assert transform is not None
        master = self._slot_of(transform.key_id, while_locking=while_locking)
        owner = inode.number, inode.generation, kind
        if self._keys.get(owner, transform) != transform:
            # An operation that failed had made an inode, and the next one has its number and its
            # generation, but not its nonce.
            self._withdraw(owner)
        slot = self._slots.pop(owner, None)
        if slot is None:
            slot = self._take()
            info = _PURPOSES[kind] + transform.nonce
            self.secrets.derive(
                master, slot, info, inode=inode.number, generation=inode.generation, kind=kind
            )
        # At the end, as the one that was used last.
        self._slots[owner] = slot
        self._keys[owner] = transform
        return slot

    def _slot_of(self, key_id: bytes, *, while_locking: bool) -> int:
        slot = self._masters.get(key_id)
        if slot is None or (key_id in self._locking and not while_locking):
            raise system_error(errno.ENOKEY)
        return slot

    def _take(self) -> int:
        self._collect()
        while len(self._free) < _SPARE_SLOTS and len(self._leaving) < _MOST_WITHDRAWN:
            owner = next(iter(self._slots), None)
            if owner is None:
                break
            self._withdraw(owner)
        if not self._free:
            self._await_graces()
        return self._free.pop()

    def _withdraw(self, owner: _Owner) -> None:
        """Take the slot from a file, which gets another one when it needs one."""
        slot = self._slots.pop(owner)
        self._keys.pop(owner, None)
        inode, _, kind = owner
        token = self._tables.changed(inode) if kind == FILE else None
        if token is None:
            self.give_back(slot)
        else:
            self._leaving.append((slot, token))

    def _collect(self) -> None:
        while self._leaving and self._tables.is_over(self._leaving[0][1]):
            self.give_back(self._leaving.popleft()[0])

    def _await_graces(self) -> None:
        """Return when all slots that were withdrawn are free. A worker in a section waits for
        nobody, so this takes no longer than one request."""
        self._collect()
        while self._leaving:
            time.sleep(_POLL_SECONDS)
            self._collect()
