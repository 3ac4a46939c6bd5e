"""File systems with encrypted directories, and keys for them."""

from __future__ import annotations

import os
from typing import Self

from pmemfs.transform.keyring import Keyring
from pmemfs.transform.reference import ReferenceCipher
from pmemfs.transform.secrets import SLOT_COUNT, create_secrets
from pmemfs.volume.fs.publication import NoTables, Tables
from pmemfs.volume.fs.sealing import Sealing


class Keys:
    """A secret memory with one master key, which is unlocked."""

    def __init__(self, tables: Tables | None = None) -> None:
        self.fd = create_secrets()
        self.keyring = Keyring(lambda: self.fd, tables or NoTables())
        self.key_id = self.make()
        self.native = Sealing(self.keyring)
        """As of the native engine's daemon."""
        self.python = Sealing(self.keyring, lambda: ReferenceCipher(self.fd, SLOT_COUNT))
        """As of the python engine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make(self) -> bytes:
        """Another key; its ID."""
        slot = self.keyring.take_master()
        self.keyring.secrets.generate(slot)
        return self.keyring.keep_master(slot)

    def lock(self) -> None:
        """Give out nothing of the key, until `unlock`."""
        self.keyring.begin_lock(self.key_id)

    def unlock(self) -> None:
        self.keyring.keep_unlocked(self.key_id)

    def close(self) -> None:
        self.keyring.wipe_all()
        os.close(self.fd)
