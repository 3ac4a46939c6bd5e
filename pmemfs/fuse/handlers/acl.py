"""POSIX access control lists: their stored form, and what follows from one.

With FUSE_POSIX_ACL the kernel checks permissions by the lists, and the server of the mount keeps
them: it decides what a new file inherits, and how a list and the permission bits of a mode change
together. Invariants:
- a list that `parse` returns is one that the kernel would take: its entries are in the order of
  their tags, with one each for owner, group and others, and a mask if any entry names a user or
  group;
- a list that says no more than a mode is never stored, because the mode says it.

Source: acl(5); include/uapi/linux/posix_acl_xattr.h and fs/posix_acl.c of Linux.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
"""The names of the attributes."""

NOBODY = 0xFFFFFFFF
"""The id of an entry that names no user or group."""

_VERSION = 2
_HEAD = struct.Struct("<I")
# tag, permissions, id
_ENTRY = struct.Struct("<HHI")
_PERMISSIONS = 0o777


class Tag(IntEnum):
    """Whom an entry is about, in the order that entries have in a list."""

    OWNER = 0x01
    USER = 0x02
    GROUP_OF_FILE = 0x04
    GROUP = 0x08
    MASK = 0x10
    OTHERS = 0x20


_NAMING = (Tag.USER, Tag.GROUP)
_CLASSES = (Tag.OWNER, Tag.GROUP_OF_FILE, Tag.OTHERS)
"""The entries that a mode has, too."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What its subject may do: read 4, write 2, execute 1."""

    tag: Tag
    permissions: int
    id: int = NOBODY


Acl = tuple[Entry, ...]


class Inherited(NamedTuple):
    """What a new file gets: a mode, and attributes."""

    mode: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


def parse(raw: bytes) -> Acl:
    """The list in the value of an attribute; () if it has no entries.

    Raises OSError: EOPNOTSUPP for an unknown version, EINVAL for a value that is not a list.
    """
    if len(raw) < _HEAD.size or (len(raw) - _HEAD.size) % _ENTRY.size:
        raise OSError(errno.EINVAL, "an access control list of no possible length")
    if _HEAD.unpack_from(raw)[0] != _VERSION:
        raise OSError(errno.EOPNOTSUPP, "an access control list of an unknown version")
    try:
        acl = tuple(
            Entry(Tag(tag), permissions, number if Tag(tag) in _NAMING else NOBODY)
            for tag, permissions, number in _ENTRY.iter_unpack(raw[_HEAD.size :])
        )
    except ValueError:
        raise OSError(errno.EINVAL, "an unknown tag in an access control list") from None
    _check(acl)
    return acl


def pack(acl: Acl) -> bytes:
    """The value of the attribute for a list."""
    entries = (_ENTRY.pack(entry.tag, entry.permissions, entry.id) for entry in acl)
    return _HEAD.pack(_VERSION) + b"".join(entries)


def mode_of(acl: Acl, mode: int) -> int:
    """A mode with the permissions that a list means for owner, group class and others."""
    shifts = _shifts(acl)
    bits = sum(entry.permissions << shifts[entry.tag] for entry in acl if entry.tag in shifts)
    return (mode & ~_PERMISSIONS) | bits


def says_more_than_a_mode(acl: Acl) -> bool:
    """Whether a list must be stored beside the mode that it means."""
    return any(entry.tag not in _CLASSES for entry in acl)


def with_mode(acl: Acl, mode: int) -> Acl:
    """The list after chmod(2) to a mode."""
    return _changed(acl, mode, lambda permissions, in_mode: in_mode)


def inherit(default: bytes, mode: int) -> Inherited:
    """What an inode gets that is made with `mode` in a directory with this default list.

    A directory gets the default list as well. Its permissions are at most those of `mode`, and the
    umask does not count any more. Raises OSError as `parse`.
    """
    acl = parse(default)
    is_directory = stat.S_ISDIR(mode)
    for_children = ((DEFAULT, default),) if is_directory and acl else ()
    if not acl:
        return Inherited(mode)
    own = _changed(acl, mode, lambda permissions, in_mode: permissions & in_mode)
    xattrs = ((ACCESS, pack(own)),) if says_more_than_a_mode(own) else ()
    return Inherited(mode_of(own, mode), xattrs + for_children)


def _changed(acl: Acl, mode: int, permissions: Callable[[int, int], int]) -> Acl:
    """A list in which each entry that a mode has, too, becomes what `permissions` says."""
    shifts = _shifts(acl)
    return tuple(
        replace(entry, permissions=permissions(entry.permissions, mode >> shifts[entry.tag] & 7))
        if entry.tag in shifts else entry
        for entry in acl
    )  # fmt: skip


def _shifts(acl: Acl) -> dict[Tag, int]:
    """Where in a mode the permissions of entries are. The group's bits are the mask's, if there is
    a mask."""
    has_mask = any(entry.tag == Tag.MASK for entry in acl)
    return {Tag.OWNER: 6, Tag.MASK if has_mask else Tag.GROUP_OF_FILE: 3, Tag.OTHERS: 0}


def _check(acl: Acl) -> None:
    """Raise OSError (EINVAL) for a list that the kernel would not take; an empty one is fine."""
    tags = [entry.tag for entry in acl]
    names_somebody = any(tag in _NAMING for tag in tags)
    for wrong, why in (
        (tags != sorted(tags), "entries out of order"),
        (any(tags.count(tag) != 1 for tag in _CLASSES), "not one entry each for the three classes"),
        (tags.count(Tag.MASK) > 1, "several masks"),
        (
            names_somebody and Tag.MASK not in tags,
            "an entry names a user or group, and there is no mask",
        ),
        (any(entry.permissions & ~7 for entry in acl), "unknown permissions"),
        (
            any(e.tag in _NAMING and e.id == NOBODY for e in acl),
            "an entry for a user or group has no id",
        ),
    ):
        if acl and wrong:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: {why}")
