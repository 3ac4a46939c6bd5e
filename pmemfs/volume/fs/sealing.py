"""What is encrypted beside the content of files: names, targets of links, and user attributes.

An encrypted directory has names in its log that were made of the plain ones with AES-SIV and a key
of its own. The same name always makes the same stored name, so it is found without trying. While
the key is locked, a directory shows its stored names as text: they can be listed, looked at and
removed, and nothing can be made. Invariants:
- in memory, too, an inode has what is stored: `entries`, `target` and `xattrs` never hold a plain
  byte of an encrypted inode. So locking a key leaves nothing behind here;
- whoever takes a name from a caller, or shows one, asks here. A stored name that got out would be
  no name at all, because it may hold any byte;
- attributes that are not the user's stay plain, because access is decided by them.
"""

from __future__ import annotations

import binascii
import errno
from typing import TYPE_CHECKING

from pmemfs.errors import system_error
from pmemfs.media.transform import TAG_BYTES
from pmemfs.volume.fs.inode import Inode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pmemfs.transform.keyring import Keyring
    from pmemfs.volume.fs.encryptedio import Cipher
    from pmemfs.volume.fs.livelines import PageLocks

_USER = b"user."
SEALED_XATTR = b"\x01"
"""How a stored name of a user attribute begins. No name of another namespace does."""
_WHOLE_BYTES = 180
"""A stored name up to this length is shown whole; text of a longer one would be no name."""
_PART_BYTES = 149
_DIGEST_BYTES = 32
_LEAST_TEXT_BYTES = 23
"""No text of a stored name is shorter, because that has a tag and a letter at least."""
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


class Sealing:
    """Seals and opens, with the keys of a keyring. Without one, everything is locked."""

    def __init__(
        self, keyring: Keyring | None = None, cipher: Callable[[], Cipher] | None = None,
        locks: PageLocks | None = None,
    ) -> None:  # fmt: skip
        """`cipher` makes what encrypts the content of files, in place of the native one; `locks`
        are those of pages that a data plane stores into, too."""
        self._keyring = keyring
        self._make_cipher = cipher
        self._cipher: Cipher | None = None
        self.locks = locks

    # Keys

    def is_locked(self, inode: Inode) -> bool:
        """Whether an inode is encrypted with a key that is not unlocked."""
        transform = inode.transform
        if transform is None or not inode.is_encrypted:
            return False
        return self._keyring is None or not self._keyring.is_unlocked(transform.key_id)

    def refuse_locked(self, inode: Inode) -> None:
        """Raise OSError (ENOKEY) if an inode is locked."""
        if self.is_locked(inode):
            raise system_error(errno.ENOKEY)

    def content_key(self, inode: Inode) -> tuple[Cipher, int]:
        """The cipher of a file's content, and the slot of its key. Raises OSError (ENOKEY)."""
        keyring = self._unlocked()
        slot = keyring.file_slot(inode)
        if self._cipher is None:
            self._cipher = self._make_cipher() if self._make_cipher else keyring.secrets
        return self._cipher, slot

    def refuse_foreign(self, directory: Inode, inode: Inode) -> None:
        """Raise OSError (EXDEV) if an inode may not get a name in a directory, because that is
        encrypted and the inode is not, or with another key."""
        if not directory.is_encrypted:
            return
        assert directory.transform is not None
        if not inode.is_encrypted or inode.transform is None:
            raise system_error(errno.EXDEV)
        if inode.transform.key_id != directory.transform.key_id:
            raise system_error(errno.EXDEV)

    # Names

    def stored_name(self, directory: Inode, name: bytes) -> bytes:
        """As what a name of an entry stands in a directory, if it does. Raises OSError."""
        if not directory.is_encrypted:
            return name
        if self.is_locked(directory):
            return _decoded(name, directory)
        keyring = self._unlocked()
        slot = keyring.names_slot(directory)
        stored = keyring.secrets.siv_encrypt(slot, b"", name)
        if stored not in directory.entries and len(name) >= _LEAST_TEXT_BYTES:
            raw = _decoded(name, directory)
            if raw in directory.entries and keyring.secrets.siv_decrypt(slot, b"", raw) is None:
                # As it is shown, so that it can be removed.
                return raw
        return stored

    def new_name(self, directory: Inode, name: bytes) -> bytes:
        """As what a new name will stand in a directory. Raises OSError (ENOKEY)."""
        if not directory.is_encrypted:
            return name
        self.refuse_locked(directory)
        return self.stored_name(directory, name)

    def shown_names(self, directory: Inode) -> list[bytes]:
        """All names of a directory, as its users see them now. Raises OSError."""
        if not directory.is_encrypted:
            return list(directory.entries)
        if self.is_locked(directory):
            return [encoded(stored) for stored in directory.entries]
        keyring = self._unlocked()
        decrypt, slot = keyring.secrets.siv_decrypt, keyring.names_slot(directory)
        return [decrypt(slot, b"", stored) or encoded(stored) for stored in directory.entries]

    def shown_name(self, directory: Inode, stored: bytes) -> bytes:
        """A name, as its users see it now. Raises OSError."""
        if not directory.is_encrypted:
            return stored
        if self.is_locked(directory):
            return encoded(stored)
        keyring = self._unlocked()
        plain = keyring.secrets.siv_decrypt(keyring.names_slot(directory), b"", stored)
        return plain or encoded(stored)

    def plain_name(self, directory: Inode, stored: bytes) -> bytes:
        """A name in the clear, also while the key is being locked: who asks has the kernel forget
        it, and shows it to nobody else. Raises OSError."""
        keyring = self._unlocked()
        slot = keyring.names_slot(directory, while_locking=True)
        return keyring.secrets.siv_decrypt(slot, b"", stored) or encoded(stored)

    # Targets of links

    def sealed_target(self, link: Inode, target: bytes) -> bytes:
        """The target of a new link as it is stored. Raises OSError (ENOKEY)."""
        if not link.is_encrypted:
            return target
        keyring = self._unlocked()
        return keyring.secrets.siv_encrypt(keyring.values_slot(link), b"", target)

    def plain_target(self, link: Inode) -> bytes:
        """The path that a link leads to. Raises OSError: ENOKEY, EIO if no such key has made it."""
        if not link.is_encrypted:
            return link.target
        return self._opened(link, b"", link.target)

    def target_bytes(self, link: Inode) -> int:
        """The length of the path that a link leads to, which is known without the key."""
        return len(link.target) - TAG_BYTES if link.is_encrypted else len(link.target)

    # Extended attributes

    def stored_xattr(self, inode: Inode, name: bytes) -> bytes:
        """As what an attribute of this name is stored. Raises OSError (ENOKEY)."""
        if not inode.is_encrypted or not name.startswith(_USER):
            return name
        keyring = self._unlocked()
        slot = keyring.values_slot(inode)
        return SEALED_XATTR + keyring.secrets.siv_encrypt(slot, SEALED_XATTR, name)

    def sealed_xattr(self, inode: Inode, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        """The name and the value of an attribute as they are stored. Raises OSError (ENOKEY)."""
        stored = self.stored_xattr(inode, name)
        if not stored.startswith(SEALED_XATTR):
            return name, value
        # With the name, so that no value can be given to another attribute.
        keyring = self._unlocked()
        return stored, keyring.secrets.siv_encrypt(keyring.values_slot(inode), stored, value)

    def plain_value(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of an attribute; None if it is not set. Raises OSError: ENOKEY, EIO."""
        stored = self.stored_xattr(inode, name)
        value = inode.xattrs.get(stored)
        if value is None or not stored.startswith(SEALED_XATTR):
            return value
        return self._opened(inode, stored, value)

    def xattr_names(self, inode: Inode) -> list[bytes]:
        """The names of all attributes; without those of the user while the key is locked."""
        if not inode.is_encrypted:
            return list(inode.xattrs)
        plain = [name for name in inode.xattrs if not name.startswith(SEALED_XATTR)]
        if len(plain) == len(inode.xattrs) or self.is_locked(inode):
            return plain
        sealed = (name for name in inode.xattrs if name.startswith(SEALED_XATTR))
        return plain + [self._opened(inode, SEALED_XATTR, name[1:]) for name in sealed]

    def plain_xattrs(self, inode: Inode) -> Mapping[bytes, bytes]:
        """All attributes; without those of the user while the key is locked. Raises OSError."""
        if not inode.is_encrypted or not inode.xattrs:
            return inode.xattrs
        values = ((name, self.plain_value(inode, name)) for name in self.xattr_names(inode))
        return {name: value for name, value in values if value is not None}

    def _opened(self, inode: Inode, label: bytes, sealed: bytes) -> bytes:
        keyring = self._unlocked()
        slot = keyring.values_slot(inode)
        plain = keyring.secrets.siv_decrypt(slot, label, sealed)
        if plain is None:
            raise OSError(errno.EIO, "a value was not encrypted with the key of its inode")
        return plain

    def _unlocked(self) -> Keyring:
        if self._keyring is None:
            raise system_error(errno.ENOKEY)
        return self._keyring


def encoded(stored: bytes) -> bytes:
    """A stored name as text, for who has no key: all of it, or its start and a digest."""
    if len(stored) > _WHOLE_BYTES:
        stored = stored[:_PART_BYTES] + _digest(stored)
    return _text_of(stored)


def _decoded(name: bytes, directory: Inode) -> bytes:
    """The stored name that a text stands for; one that no entry has if it stands for none."""
    text = name.translate(_FROM_URL)
    try:
        raw = binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
    except binascii.Error:
        return b""
    if _text_of(raw) != name:
        # Of several texts that decode alike only one is shown, and only that one is a name.
        return b""
    if len(raw) != _PART_BYTES + _DIGEST_BYTES:
        return raw
    # Many names may be as long, and this one is asked for seldom.
    starts = (stored for stored in directory.entries if stored.startswith(raw[:_PART_BYTES]))
    return next((stored for stored in starts if encoded(stored) == name), b"")


def _text_of(raw: bytes) -> bytes:
    text = binascii.b2a_base64(raw, newline=False)
    return text.translate(_TO_URL).rstrip(b"=")


def _digest(stored: bytes) -> bytes:
    # Imported here, because most mounts never need it.
    import hashlib

    return hashlib.sha256(stored).digest()
