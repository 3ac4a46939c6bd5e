"""What a repair can do to a file system that has errors and is not mounted, one function each.

Invariants:
- each is atomic, or leaves after a power failure what the next check finds again: bits of bitmaps
  are set before anything relies on them, and all else goes through transactions;
- none of them decides whether it should be done: that is up to `repair`.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from pmemfs.clock import coarse_ns
from pmemfs.media import log as media
from pmemfs.media.filesystem import (
    CHUNK_FRAMES,
    CHUNK_LINE_BYTES,
    GROUP_CHUNKS,
    HEAD,
    HEAD_FRAME,
    Head,
    pack_head,
)
from pmemfs.media.inode import HEAD as INODE_HEAD
from pmemfs.media.inode import (
    HEAD_WORD_AT,
    ROOT,
    TAIL_WORD_AT,
)
from pmemfs.media.inode import pack_head as pack_inode_head
from pmemfs.media.transform import TransformState, pack_piece
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.units import MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.entries import Entry
from pmemfs.volume.fs.extents import MappedExtent, Run
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.ground import empty_journal, geometry_of
from pmemfs.volume.fs.inode import DIRECTORY_TYPE, Inode, State, is_name
from pmemfs.volume.fs.log import Log
from pmemfs.volume.fs.masks import FrameSet
from pmemfs.volume.fs.properties import inherited
from pmemfs.volume.fs.reading import read_log, readable_part
from pmemfs.volume.fs.xattrs import is_xattr

_LOST_AND_FOUND = b"lost+found"


class Mending:
    """The remedies for a file system that has errors. All raise OSError."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._medium = pool.medium
        self._mounted: FileSystem | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can be written any more."""
        return self._mounted is not None and self._mounted.read_only

    @property
    def _fs(self) -> FileSystem:
        """The file system. Opening it carries out the journal."""
        if self._mounted is None:
            self._mounted = FileSystem(self._pool, NoMemmap())
            # An immutable file may be what has to be mended.
            self._mounted.store.ground.obeys_flags = False
        return self._mounted

    def _inode(self, number: int) -> Inode:
        """An inode, even one that a mount would refuse. Raises OSError, DamagedFileSystem."""
        store = self._fs.store
        inode = store.cached(number) or read_log(self._medium, store.table, number)
        if inode is None:
            raise OSError(errno.ESTALE, f"inode {number} is free")
        store.keep(inode)
        return inode

    # What works when the file system can't be opened

    def write_head(self) -> None:
        """Write the head anew."""
        at = geometry_of(self._pool).offset_of(HEAD_FRAME)
        # What the old head said of compression is lost, and a mount that looks in vain is no harm.
        head = Head(uuid=self._pool.label.uuid, has_compressed=1)
        self._medium.store(at, pack_head(head))
        self._medium.persist(at, HEAD.size_bytes)

    def empty_journal(self) -> None:
        """Empty the journal, whatever it says."""
        empty_journal(self._medium, geometry_of(self._pool))

    def finish_journal(self) -> None:
        """Carry out what the journal says."""
        assert self._fs is not None, "opening it has done that"

    # Bitmaps

    def mark_used(self, frames: FrameSet) -> None:
        """Mark frames as used."""
        geometry = self._fs.geometry
        for chunk, mask in frames.chunks():
            group, line = divmod(chunk, GROUP_CHUNKS)
            at = (geometry.group_pfn(group) << PAGE_SHIFT) + line * CHUNK_LINE_BYTES
            before = int.from_bytes(self._medium.read(at, CHUNK_LINE_BYTES), "little")
            self._medium.store(at, (before | mask).to_bytes(CHUNK_LINE_BYTES, "little"))
            self._medium.flush(at, CHUNK_LINE_BYTES)
        self._medium.fence()
        # The allocator of the open file system has read the old bitmaps.
        self._mounted = None

    def mark_inodes(self, pfn: int, *, is_marked: bool) -> None:
        """Say whether a frame holds inodes."""
        self._fs.store.table.mark_frame(pfn, is_marked=is_marked)
        self._medium.fence()
        self._mounted = None

    def clear_marks(self, group: int, bits: int) -> None:
        """Clear bits of the inode bitmap of a group."""
        at = (self._fs.geometry.group_pfn(group) + 1) << PAGE_SHIFT
        marked = int.from_bytes(self._medium.read(at, FRAME_BYTES), "little") & ~bits
        self._medium.store(at, marked.to_bytes(FRAME_BYTES, "little"))
        self._medium.persist(at, FRAME_BYTES)

    def free_frames(self, frames: FrameSet) -> None:
        """Free frames that nobody owns."""
        fs = self._fs
        fs.store.begin_writing()
        for chunk, mask in frames.chunks():
            first = fs.geometry.first_pfn + chunk * CHUNK_FRAMES
            fs.store.allocator.free(frames.meeting([Run(first, mask.bit_length())]))
        self._medium.fence()

    # Frames with several owners

    def move_log(self, number: int, shared: set[int]) -> None:
        """Write a log anew, without giving back those of its frames that others own, too."""
        # What the transaction does not know of, it does not free.
        inode = self._inode(number)
        inode.log.frames = [frame for frame in inode.log.frames if frame not in shared]
        with self._fs.store.change() as change:
            change.compact(inode)

    def copy_frames(self, number: int, extents: list[MappedExtent]) -> None:
        """Give a file copies of some of its frames, so that it shares them no more."""
        inode = self._inode(number)
        # A transaction for each extent, so a power failure leaves some of the frames shared, which
        # the next check finds. The file's bytes are the same before and after.
        for index, pfn, count in extents:
            with self._fs.store.change(urgent=True) as change:
                at = 0
                for run in change.allocate(count):
                    self._copy(pfn + at, run)
                    record = media.pack_extent(index + at, *run)
                    change.append(inode, record)
                    change.then(_mapper(inode, MappedExtent(index + at, *run)))
                    at += run.frame_count

    def copy_piece(self, number: int, index: int) -> None:
        """Give a file a copy of a compressed piece, whose frames it shares."""
        inode, fs = self._inode(number), self._fs
        piece = inode.pieces[index]
        fs.store.begin_writing()
        run = fs.store.allocator.allocate_run(piece.stored_frames)
        moved = piece._replace(pfn=run.pfn)
        with fs.store.change(urgent=True) as change:
            change.adopt(run)
            self._copy(piece.pfn, run)
            change.append(inode, pack_piece(index, moved))
            change.then(lambda: inode.set_piece(index, moved))

    def _copy(self, pfn: int, target: Run) -> None:
        length = target.frame_count << PAGE_SHIFT
        for start in range(0, length, MIB):
            part = self._medium.read((pfn << PAGE_SHIFT) + start, min(MIB, length - start))
            at = (target.pfn << PAGE_SHIFT) + start
            self._medium.store(at, bytes(part))
            self._medium.flush(at, len(part))

    # Names

    def remove_entry(self, directory: int, name: bytes) -> None:
        """Let a name lead nowhere."""
        inode = self._inode(directory)
        entry, now_ns = inode.entries[name], coarse_ns()
        with self._fs.store.change(urgent=True) as change:
            change.append(inode, media.pack_entry(name, entry.inode, 0, now_ns))
            change.then(lambda: inode.remove_entry(name))

    def retype_entry(self, directory: int, name: bytes, type_: int) -> None:
        """Correct the type that an entry gives."""
        inode = self._inode(directory)
        entry = Entry(inode.entries[name].inode, type_)
        with self._fs.store.change(urgent=True) as change:
            change.append(inode, media.pack_entry(name, *entry, coarse_ns()))
            change.then(lambda: inode.add_entry(name, *entry))

    def keep_one_name(self, number: int, home: int, directories: list[int]) -> None:
        """Remove all names of a directory except one name in its home."""
        kept = next(iter(self._names_in(home, number)))
        for directory in directories:
            for name in self._names_in(directory, number):
                if (directory, name) != (home, kept):
                    self.remove_entry(directory, name)

    def reconnect(self, number: int, homes: list[int]) -> None:
        """Move an inode to lost+found; `homes` are the directories that have names for it."""
        fs = self._fs
        inode = self._inode(number)
        place = self._inode(self._lost_and_found())
        now_ns = coarse_ns()
        for directory in homes:
            for name in self._names_in(directory, number)[1:]:
                self.remove_entry(directory, name)
        name, entry = self._free_name(place, number), Entry(number, inode.type)
        state = fs.store.state_of(inode).replaced(changed_ns=now_ns)
        if inode.is_directory or not state.link_count:
            state.link_count = 1
        with fs.store.change(urgent=True) as change:
            for directory in homes:
                for old in self._names_in(directory, number):
                    holder = self._inode(directory)
                    change.append(holder, media.pack_entry(old, number, 0, now_ns))
                    change.then(_remover(holder, old))
            change.append(place, media.pack_entry(name, *entry, now_ns))
            if inode.is_directory:
                change.append(inode, media.pack_parent(place.number))
            change.append(inode, state.pack())

            def apply() -> None:
                place.add_entry(name, *entry)
                inode.state = state
                if inode.is_directory:
                    inode.parent = place.number

            change.then(apply)

    def _lost_and_found(self) -> int:
        """The directory lost+found, which is made if there is none."""
        fs = self._fs
        for more in range(1000):
            name = _LOST_AND_FOUND + (b".%d" % more if more else b"")
            entry = self._inode(ROOT).entries.get(name)
            if entry is None:
                return fs.make(ROOT, name, NewInode(stat.S_IFDIR | 0o700, 0, 0))
            if entry.type == DIRECTORY_TYPE and self._takes_plain_names(entry.inode):
                return entry.inode
        raise OSError(errno.EEXIST, "every name for lost+found is taken")

    def _takes_plain_names(self, number: int) -> bool:
        """Whether a directory of the root can get names without a key."""
        inode = self._inode(number)
        return inode.parent == ROOT and not (inode.is_encrypted or inode.unknown_id)

    @staticmethod
    def _free_name(place: Inode, number: int) -> bytes:
        name, more = b"#%d" % number, 0
        while name in place.entries:
            more += 1
            name = b"#%d.%d" % (number, more)
        return name

    def _names_in(self, directory: int, number: int) -> list[bytes]:
        entries = self._inode(directory).entries
        return [name for name, entry in entries.items() if entry.inode == number]

    # Inodes

    def set_parent(self, number: int, parent: int) -> None:
        """Correct in which directory a directory says that it lies."""
        inode = self._inode(number)
        with self._fs.store.change(urgent=True) as change:
            change.append(inode, media.pack_parent(parent))
            change.then(lambda: setattr(inode, "parent", parent))

    def set_link_count(self, number: int, count: int) -> None:
        """Correct how many names an inode counts."""
        inode = self._inode(number)
        state = self._fs.store.state_of(inode).replaced(link_count=count)
        with self._fs.store.change(urgent=True) as change:
            change.append(inode, state.pack())
            change.then(lambda: setattr(inode, "state", state))

    def set_size(self, number: int, size_bytes: int) -> None:
        """Give a file a size that covers all its frames."""
        inode = read_log(self._medium, self._fs.store.table, number)
        assert inode is not None, "its log was read"
        self._fs.store.set_live_size(inode, size_bytes)
        self._medium.fence()

    def drop_piece(self, number: int, index: int) -> None:
        """Turn a compressed piece into a hole."""
        inode, fs = self._inode(number), self._fs
        with fs.store.change(urgent=True) as change:
            fs.frames.unmap(change, inode, index, inode.pieces[index].frame_count)

    def remove_attribute(self, number: int, name: bytes) -> None:
        """Remove an extended attribute."""
        inode = self._inode(number)
        with self._fs.store.change(urgent=True) as change:
            change.append(inode, media.pack_xattr_removed(name))
            change.then(lambda: inode.set_xattr(name, None))

    def free_damaged(self, number: int) -> None:
        """Free the slot of an inode that can't be read; the search for leaks finds its frames."""
        # A stub has no frames, so nothing is freed that another file may own.
        inode = self._stub(number)
        with self._fs.store.change(urgent=True) as change:
            change.remove(inode)

    def free_unnamed(self, number: int) -> None:
        """Free an inode that no name leads to."""
        self._fs.store.remove(self._inode(number))

    def trim(self, numbers: list[int]) -> None:
        """Free the frames behind the sizes of files."""
        for number in numbers:
            self._inode(number)
            self._fs.trim_ahead(number)
            self._fs.store.housekeeping.drop_idle(0)

    def rebuild_directory(self, number: int, lacks_name: Callable[[int, int], bool]) -> None:
        """Write the log of a directory anew, with what can still be read of it.

        It keeps those names that lead to an inode without another name. The search for leaks finds
        the old log's frames.
        """
        fs = self._fs
        rest = readable_part(self._medium, fs.store.table, number)
        if rest is None:
            self._write_inode_head(number)
        inode = self._stub(number)
        now_ns = coarse_ns()
        mode, uid, gid = (0o755 if number == ROOT else 0o700), 0, 0
        if rest is not None and rest.is_directory:
            mode, uid, gid = rest.state.mode & 0o7777, rest.state.uid, rest.state.gid
        inode.state = State(stat.S_IFDIR | mode, 1, uid, gid, 0, now_ns, now_ns, now_ns, 0, 0, 0)
        inode.parent = ROOT if number == ROOT or rest is None else rest.parent or ROOT
        inode.set_transform(self._transform_of(number, rest, inode.parent))
        has_plain_names = not (inode.is_encrypted or inode.unknown_id)
        if rest is not None:
            for name, value in rest.xattrs.items():
                if not has_plain_names or is_xattr(name, value):
                    inode.set_xattr(name, value)
            for name, entry in rest.entries.items():
                if lacks_name(*entry) and (not has_plain_names or is_name(name)):
                    inode.add_entry(name, *entry)
        with fs.store.change(urgent=True) as change:
            change.compact(inode)

    def _transform_of(self, number: int, rest: Inode | None, parent: int) -> TransformState | None:
        """The transformation of a directory that is rebuilt of the rest of it."""
        if rest is not None and rest.transform is not None:
            # The root is never encrypted, whatever this pool says.
            return None if number == ROOT and rest.is_encrypted else rest.transform
        # If nothing is left of an encrypted one, it still takes over that of the one above.
        # Otherwise what is made in it from now on would be stored in the clear.
        above = readable_part(self._medium, self._fs.store.table, parent)
        return inherited(above) if above is not None and above.is_encrypted else None

    def _stub(self, number: int) -> Inode:
        """An inode of which nothing is known except the words that a transaction changes."""
        slot = self._fs.store.table.slot_offset(number)
        raw = bytes(self._medium.read(slot, INODE_HEAD.size_bytes))
        head = INODE_HEAD.unpack(raw)
        return Inode(number, slot, head.generation, head.birth_ns, Log(head.head, head.tail))

    def _write_inode_head(self, number: int) -> None:
        """Write the constant part of an inode's head anew, and leave the words of its log alone."""
        slot = self._fs.store.table.slot_offset(number)
        raw = bytes(self._medium.read(slot, INODE_HEAD.size_bytes))
        head = int.from_bytes(raw[HEAD_WORD_AT : HEAD_WORD_AT + 8], "little")
        tail = int.from_bytes(raw[TAIL_WORD_AT : TAIL_WORD_AT + 8], "little")
        self._medium.store(slot, pack_inode_head(number, 1, coarse_ns(), head, tail))
        self._medium.persist(slot, INODE_HEAD.size_bytes)


def _mapper(inode: Inode, extent: MappedExtent) -> Callable[[], object]:
    return lambda: inode.map(*extent)


def _remover(directory: Inode, name: bytes) -> Callable[[], object]:
    return lambda: directory.remove_entry(name)
