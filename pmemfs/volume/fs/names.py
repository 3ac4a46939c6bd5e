"""Names: what makes, links, renames and removes inodes.

Every operation is one transaction on the directories and inodes that it concerns. Invariant:
- an entry is followed only if its inode is not a directory, or is a directory whose own record
  (PARENT) says that it lies here. So a walk down from the root meets each directory once. Without
  this a pool could contain a directory in itself: a kernel that is told of one hangs its caller,
  and a program that walks the tree never ends.
"""

from __future__ import annotations

import errno
import stat
from functools import partial

from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.inode import ROOT
from pmemfs.media.log import NAME_MAX_BYTES, TARGET_MAX_BYTES, InodeFlags
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.base import NewInode, StoredListing
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.entries import Entry
from pmemfs.volume.fs.inode import (
    DIRECTORY_TYPE,
    FIXED,
    IMMUTABLE,
    TYPES,
    Inode,
    State,
    is_name,
    value_slots,
)
from pmemfs.volume.fs.properties import inherited
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.transaction import Transaction
from pmemfs.volume.fs.xattrs import check_xattr

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
LINK_MAX = 0x7FFF_FFFF
_INHERITED = int(InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME)
"""Flags that a new inode gets from its directory, as on ext4 and tmpfs."""


class Names:
    """What can be done to names."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._inode = store.inode
        self._pinned = store.ground.pinned
        self._sealing = store.sealing

    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name. Raises OSError: ENOENT, ENOTDIR, ENAMETOOLONG."""
        return self._named(parent, name)[2].number

    def names(self, number: int) -> list[bytes]:
        """The names of all entries, in the order in which they were added. Raises OSError
        (ENOTDIR)."""
        return self._sealing.shown_names(self._directory(number))

    def listing(self, number: int) -> list[bytes]:
        """As they are stored. To decrypt the names of a large directory takes seconds, so `listed`
        does that, one by one. Raises OSError (ENOTDIR)."""
        return list(self._directory(number).entries)

    def listed(
        self, number: int, key: bytes, *, follows: bool = False
    ) -> tuple[bytes, int, int] | None:
        """As of `Volume`. Raises OSError."""
        directory = self._directory(number)
        entry = directory.entries.get(key)
        if entry is None:
            return None
        if follows:
            self._follow(directory, key)
        if directory.transform is not None:
            key = self._sealing.shown_name(directory, key)
        return key, *entry

    def stored_listing(self, number: int) -> StoredListing | None:
        """As of `Volume`: no listing while what is stored is not what counts, because the journal
        is still to be carried out, or is not to be believed. Raises OSError."""
        ground, counts = self._store.ground, self._store.hold_words
        if counts is None or ground.damage or ground.table.pending_words:
            return None
        directory, medium = self._directory(number), ground.medium
        if directory.transform is not None:
            return None
        first_pfn, frame_count = ground.geometry
        zone = medium.view(first_pfn << PAGE_SHIFT, frame_count << PAGE_SHIFT)
        return StoredListing(
            directory.entries.words, zone, first_pfn, medium.sparse_fd, counts,
            self._store.note_words, self._store.hold, medium.has_faulted,
        )  # fmt: skip

    def has_entry(self, number: int, name: bytes) -> int | None:
        """The inode that a name leads to now. Raises OSError: ENOENT in a locked directory."""
        directory = self._directory(number)
        if directory.transform is not None:
            name = self._sealing.stored_name(directory, name)
        if name in directory.entries:
            return self._follow(directory, name).number
        if directory.transform is not None and self._sealing.is_locked(directory):
            # The kernel must not remember this: once the key is unlocked the name may be there.
            raise system_error(errno.ENOENT)
        return None

    def parent(self, number: int) -> int:
        """The directory above a directory."""
        return self._directory(number).parent

    def make(self, parent: int, name: bytes, new: NewInode) -> int:
        """Make an inode with a name. Raises OSError: EEXIST, ENOENT, ENAMETOOLONG, ENOSPC."""
        directory, name = self._place_for_new(parent, name)
        now_ns = self._store.times.now_ns()
        with self._store.change(decides=Decides.NAMES) as change:
            inode = self._new_inode(change, new, now_ns, directory, link_count=1)
            entry = Entry(inode.number, inode.type)
            change.append(directory, media.pack_entry(name, entry.inode, entry.type, now_ns))

            def apply() -> None:
                self._store.keep(inode)
                self._add(directory, name, entry, now_ns)

            change.then(apply)
        return inode.number

    def make_unnamed(self, parent: int, new: NewInode) -> int:
        """Make an inode without a name, as O_TMPFILE does; a caller who wants to keep it holds it.

        Raises OSError: EPERM if the directory is immutable, ENOKEY if it is locked, ENOSPC.
        """
        directory = self._directory(parent)
        self._store.refuse(directory, IMMUTABLE)
        if directory.transform is not None:
            self._sealing.refuse_locked(directory)
        with self._store.change(decides=Decides.NAMES) as change:
            inode = self._new_inode(
                change, new, self._store.times.now_ns(), directory, link_count=0
            )
            change.then(lambda: self._store.keep(inode))
        return inode.number

    def link(self, number: int, parent: int, name: bytes) -> None:
        """Give an inode another name. Raises OSError: EPERM, EMLINK, EXDEV, and as `make`."""
        inode = self._inode(number)
        directory, name = self._place_for_new(parent, name)
        self._store.refuse(inode, FIXED)
        if directory.transform is not None:
            self._sealing.refuse_foreign(directory, inode)
        if inode.is_directory:
            raise system_error(errno.EPERM)
        if inode.state.link_count >= LINK_MAX:
            raise system_error(errno.EMLINK)
        now_ns = self._store.times.now_ns()
        state = self._linked(inode, 1, now_ns)
        entry = Entry(number, inode.type)
        with self._store.change(decides=Decides.NAMES) as change:
            change.append(directory, media.pack_entry(name, number, entry.type, now_ns))
            change.append(inode, state.pack())

            def apply() -> None:
                inode.set_state(state)
                self._add(directory, name, entry, now_ns)

            change.then(apply)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove the name of anything but a directory. Raises OSError: ENOENT, EISDIR, EPERM."""
        directory, name, inode = self._named(parent, name)
        self._refuse_removal(directory, inode)
        if inode.is_directory:
            raise system_error(errno.EISDIR)
        self._remove_name(directory, name, inode)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory. Raises OSError: ENOENT, ENOTDIR, ENOTEMPTY, EPERM."""
        directory, name, inode = self._named(parent, name)
        self._refuse_removal(directory, inode)
        if not inode.is_directory:
            raise system_error(errno.ENOTDIR)
        if inode.entries:
            raise system_error(errno.ENOTEMPTY)
        self._remove_name(directory, name, inode)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0,
        whiteout: NewInode | None = None,
    ) -> None:  # fmt: skip
        """Do as renameat2(2) does, with NOREPLACE or EXCHANGE. Raises OSError.

        `whiteout` is the inode that WHITEOUT leaves at the old name. It is given with that flag and
        never without.
        """
        replaces = not flags & RENAME_NOREPLACE
        flags &= ~RENAME_NOREPLACE
        has_known_flags = flags in (0, RENAME_WHITEOUT) or (flags == RENAME_EXCHANGE and replaces)
        if not has_known_flags or bool(flags & RENAME_WHITEOUT) != (whiteout is not None):
            raise system_error(errno.EINVAL)
        source, name, inode = self._named(parent, name)
        target = self._directory(new_parent)
        if len(new_name) > NAME_MAX_BYTES:
            raise system_error(errno.ENAMETOOLONG)
        is_possible = is_name(new_name)
        if source.transform is not None:
            self._sealing.refuse_locked(source)
        if target.transform is not None:
            new_name = self._sealing.new_name(target, new_name)
            self._sealing.refuse_foreign(target, inode)
        self._refuse_circle(inode, target)
        there = target.entries.get(new_name)
        if flags == RENAME_EXCHANGE:
            if there is None:
                raise system_error(errno.ENOENT)
            other = self._follow(target, new_name)
            self._refuse_circle(other, source)
            if source.transform is not None:
                self._sealing.refuse_foreign(source, other)
            if inode is other:
                return
            self._refuse_removal(source, inode)
            self._refuse_removal(target, other)
            self._exchange(source, name, inode, target, new_name, other)
            return
        if there is None and not (is_possible and target.state.link_count):
            raise system_error(errno.ENOENT)
        if there is not None and not replaces:
            raise system_error(errno.EEXIST)
        # Two names of one inode: rename(2) does nothing.
        if there is not None and there.inode == inode.number:
            return
        victim = self._follow(target, new_name) if there is not None else None
        self._refuse_removal(source, inode)
        if victim is None:
            self._store.refuse(target, IMMUTABLE)
        else:
            self._refuse_removal(target, victim)
            _check_replaced(inode, victim)
        self._move(source, name, inode, target, new_name, victim, whiteout)

    # What these have in common

    def _new_inode(
        self, change: Transaction, new: NewInode, now_ns: int, directory: Inode, *, link_count: int
    ) -> Inode:
        """A new inode in a transaction, with its slot written."""
        if stat.S_IFMT(new.mode) not in TYPES:
            raise system_error(errno.EINVAL)
        for name, value in new.xattrs:
            check_xattr(name, value)
        if len(new.target) > TARGET_MAX_BYTES:
            raise system_error(errno.ENAMETOOLONG)
        if stat.S_ISLNK(new.mode) != bool(new.target) or b"\0" in new.target:
            raise system_error(errno.ENOENT if stat.S_ISLNK(new.mode) else errno.EINVAL)
        state = State(
            mode=new.mode & 0o177777, link_count=link_count, uid=new.uid, gid=new.gid,
            size_bytes=0, accessed_ns=now_ns, modified_ns=now_ns, changed_ns=now_ns,
            device=new.rdev & 0xFFFFFFFF, epoch=0,
            flags=directory.state.flags & _INHERITED,
        )  # fmt: skip
        inode = change.create(now_ns, state)
        if directory.transform is not None:
            inode.set_transform(inherited(directory))
        if stat.S_ISDIR(new.mode):
            inode.parent = directory.number
            inode.live_slots += 1
        if new.target:
            inode.target = new.target
            if inode.transform is not None:
                inode.target = self._sealing.sealed_target(inode, new.target)
            inode.live_slots += value_slots(b"", inode.target)
        for name, value in new.xattrs:
            inode.set_xattr(*self._sealing.sealed_xattr(inode, name, value))
        change.fill_slot(inode)
        return inode

    def _remove_name(self, directory: Inode, name: bytes, inode: Inode) -> None:
        # Urgent, so that a full pool can be emptied.
        now_ns = self._store.times.now_ns()
        with self._store.change(urgent=True, decides=Decides.NAMES) as change:
            change.append(directory, media.pack_entry(name, inode.number, 0, now_ns))
            state = self._drop_link(change, inode, now_ns)

            def apply() -> None:
                directory.remove_entry(name)
                self._touch(directory, now_ns)
                inode.set_state(state)

            change.announce(partial(self._pinned.renamed, inode.number))
            change.then(apply)

    def _drop_link(self, change: Transaction, inode: Inode, now_ns: int) -> State:
        """Take one name from an inode; with its last name it is freed, unless somebody holds it."""
        state = self._linked(inode, -1, now_ns)
        if state.link_count == 0 and not self._store.is_held(inode.number):
            change.remove(inode)
        else:
            change.append(inode, state.pack())

        def count() -> None:
            self._store.removal_count += 1

        change.then(count)
        return state

    def _move(
        self, source: Inode, name: bytes, inode: Inode, target: Inode, new_name: bytes,
        victim: Inode | None, whiteout: NewInode | None,
    ) -> None:  # fmt: skip
        now_ns = self._store.times.now_ns()
        entry = Entry(inode.number, inode.type)
        # A transaction that makes an inode is not urgent: see `Housekeeping.take_frames`.
        with self._store.change(urgent=whiteout is None, decides=Decides.NAMES) as change:
            left = (
                self._new_inode(change, whiteout, now_ns, source, link_count=1)
                if whiteout
                else None
            )
            # The order of records within a transaction does not matter to a crash: the journal
            # makes all of them count, or none.
            change.append(target, media.pack_entry(new_name, entry.inode, entry.type, now_ns))
            change.append(source, _pack_left(name, entry, left, now_ns))
            state = self._moved(change, inode, source, target, now_ns)
            if victim is not None:
                change.announce(partial(self._pinned.renamed, victim.number))
            victim_state = self._drop_link(change, victim, now_ns) if victim else None

            def apply() -> None:
                self._add(target, new_name, entry, now_ns)
                if left is not None:
                    self._store.keep(left)
                    self._add(source, name, Entry(left.number, left.type), now_ns)
                else:
                    source.remove_entry(name)
                    self._touch(source, now_ns)
                self._set_moved(inode, state, target)
                if victim is not None and victim_state is not None:
                    victim.set_state(victim_state)

            change.then(apply)

    def _exchange(
        self, source: Inode, name: bytes, inode: Inode, target: Inode, new_name: bytes, other: Inode
    ) -> None:
        now_ns = self._store.times.now_ns()
        entry, other_entry = Entry(inode.number, inode.type), Entry(other.number, other.type)
        with self._store.change(urgent=True, decides=Decides.NAMES) as change:
            change.append(target, media.pack_entry(new_name, entry.inode, entry.type, now_ns))
            change.append(source, media.pack_entry(name, other.number, other.type, now_ns))
            state = self._moved(change, inode, source, target, now_ns)
            other_state = self._moved(change, other, target, source, now_ns)

            def apply() -> None:
                self._add(target, new_name, entry, now_ns)
                self._add(source, name, other_entry, now_ns)
                self._set_moved(inode, state, target)
                self._set_moved(other, other_state, source)

            change.then(apply)

    def _moved(
        self, change: Transaction, inode: Inode, source: Inode, target: Inode, now_ns: int
    ) -> State:
        # PARENT changes in the same transaction as the entry; otherwise a crash could leave a
        # directory that no entry may lead to (see the invariant above).
        if inode.is_directory and source is not target:
            change.append(inode, media.pack_parent(target.number))
        state = self._linked(inode, 0, now_ns)
        change.append(inode, state.pack())
        pinned = self._pinned
        change.announce(
            pinned.all_renamed if inode.is_directory else partial(pinned.renamed, inode.number)
        )
        return state

    def _set_moved(self, inode: Inode, state: State, target: Inode) -> None:
        inode.set_state(state)
        if inode.is_directory:
            inode.parent = target.number

    def _linked(self, inode: Inode, more: int, now_ns: int) -> State:
        state = self._store.state_of(inode)
        if state.link_count + more < 0:
            why = f"inode {inode.number}: a name leads to it, but it counts no names"
            raise self._store.found_damage(why)
        state.link_count += more
        state.changed_ns = now_ns
        return state

    def _add(self, directory: Inode, name: bytes, entry: Entry, now_ns: int) -> None:
        directory.add_entry(name, *entry)
        self._touch(directory, now_ns)

    def _touch(self, directory: Inode, now_ns: int) -> None:
        directory.state.modified_ns = directory.state.changed_ns = now_ns

    def _directory(self, number: int) -> Inode:
        inode = self._inode(number)
        if inode.state.mode >> 12 != DIRECTORY_TYPE:
            raise system_error(errno.ENOTDIR)
        if inode.transform is not None:
            self._store.refuse_unserved(inode)
        return inode

    def _place_for_new(self, parent: int, name: bytes) -> tuple[Inode, bytes]:
        """A directory that can get an entry of this name, and as what the name is stored there."""
        directory = self._directory(parent)
        if len(name) > NAME_MAX_BYTES:
            raise system_error(errno.ENAMETOOLONG)
        stored = name
        if directory.transform is not None:
            stored = self._sealing.new_name(directory, name)
        if stored in directory.entries or name in (b".", b".."):
            raise system_error(errno.EEXIST)
        if not is_name(name):
            raise system_error(errno.EINVAL)
        if directory.state.link_count == 0:
            raise system_error(errno.ENOENT)
        self._store.refuse(directory, IMMUTABLE)
        return directory, stored

    def _named(self, parent: int, name: bytes) -> tuple[Inode, bytes, Inode]:
        """A directory, as what a name is stored there, and the inode that it leads to."""
        directory = self._directory(parent)
        if len(name) > NAME_MAX_BYTES:
            raise system_error(errno.ENAMETOOLONG)
        if directory.transform is not None:
            name = self._sealing.stored_name(directory, name)
        if name not in directory.entries:
            raise system_error(errno.ENOENT)
        return directory, name, self._follow(directory, name)

    def _follow(self, directory: Inode, name: bytes) -> Inode:
        """The inode that an entry leads to. Raises OSError (EIO) if it must not lead there."""
        inode = self._inode(directory.entries[name].inode)
        is_elsewhere = inode.number == ROOT or inode.parent != directory.number
        if inode.is_directory and is_elsewhere:
            why = f"its entry {name!r} leads to directory {inode.number}, which is not in it"
            raise self._store.found_damage(f"inode {directory.number}: {why}")
        return inode

    def _refuse_removal(self, directory: Inode, inode: Inode) -> None:
        """Raise OSError (EPERM) if flags forbid that this name is removed or replaced."""
        self._store.refuse(directory, FIXED)
        self._store.refuse(inode, FIXED)

    def _refuse_circle(self, inode: Inode, directory: Inode) -> None:
        """Raise OSError (EINVAL) if a directory would come to lie in itself."""
        if not inode.is_directory:
            return
        # The walk goes up to the root, which is its own parent. `seen` also ends it in a pool whose
        # records PARENT go in a circle.
        seen = set()
        while directory.number not in seen:
            if directory is inode:
                raise system_error(errno.EINVAL)
            seen.add(directory.number)
            directory = self._directory(directory.parent)


def _pack_left(name: bytes, moved: Entry, left: Inode | None, now_ns: int) -> bytes:
    """What a directory records of a name from which an inode was moved away."""
    if left is not None:
        return media.pack_entry(name, left.number, left.type, now_ns)
    return media.pack_entry(name, moved.inode, 0, now_ns)


def _check_replaced(inode: Inode, victim: Inode) -> None:
    """Raise OSError if rename(2) may not put this inode in the place of that one."""
    if inode.is_directory and not victim.is_directory:
        raise system_error(errno.ENOTDIR)
    if victim.is_directory and not inode.is_directory:
        raise system_error(errno.EISDIR)
    if victim.entries:
        raise system_error(errno.ENOTEMPTY)
