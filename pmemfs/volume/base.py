"""What a mode serves: lookups, attributes, names and content, in the terms of the FUSE handlers.

A volume knows nothing of the kernel's bytes or of open files. A mode refuses what it can't do with
the errno of the defaults here, and nowhere else; after ENOSYS the kernel asks no more. Invariants:
- a method that answers at once awaits nothing, so it is one step to all other tasks;
- a method that may have to wait, for workers of a data plane or for a device, answers with a
  coroutine, and its type says so;
- an inode that is held lives on, with or without a name, until it was dropped as often.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, Union

from pmemfs.errors import system_error
from pmemfs.media.log import InodeFlags
from pmemfs.volume.pinned import PinnedFrames

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")
Later = Union[T, Coroutine[Any, Any, T]]  # noqa: UP007
"""An answer, or a coroutine that gives it."""


class Attributes(NamedTuple):
    """What stat(2) tells of an inode. Blocks have 512 bytes; times are in ns since 1970."""

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    block_count: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    birth_ns: int
    flags: int
    """`InodeFlags`."""


class Heritage(NamedTuple):
    """What a new inode takes over from its directory."""

    mode: int
    gid: int
    xattrs: Mapping[bytes, bytes]


class NewInode(NamedTuple):
    """What a new inode is made of; its mode says of which type it is."""

    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class StoredListing(NamedTuple):
    """A directory's entries, and where what they lead to is stored: enough to list it with
    attributes without any object of an inode."""

    words: dict[bytes, int]
    """For each name its inode and the type of that, as `volume.fs.entries` has them. They may
    change with the next operation."""
    memory: memoryview
    """The data zone. Ask `has_faulted` after each use: what was read of bad memory is zeroes."""
    first_pfn: int
    """Of the data zone."""
    sparse_fd: int
    """As `Medium.sparse_fd`."""
    counts: memoryview
    """How often each inode is held, a word for each number."""
    note_words: Callable[[], memoryview | None]
    """As `Holds.note_words`, for whoever raises `counts`."""
    hold: Callable[[int], None]
    """Holds one inode once more."""
    has_faulted: Callable[[], bool]


class Room(NamedTuple):
    """How much room there is, and how many files, if the mode counts them."""

    total_frames: int
    free_frames: int
    reserved_frames: int = 0
    """Free frames that only operations which delete may take."""
    file_count: int = 0


HOLE, NOT_PLAIN = -1, -2
"""Offsets in the pool that are none."""
Piece = tuple[int, int, int]
"""Whole frames of a range of a file that lie side by side in the pool, or a hole: the offset in
bytes from the start of the range (negative where its first frame begins before it), the offset in
the pool (HOLE for a hole, NOT_PLAIN for data that lies there compressed), and the length."""


class Volume(Protocol):
    """What a mode serves. All methods raise OSError, and PmemfsError if memory fails.

    A mode that lacks something inherits the refusal from here. A mode that is made of parts, as a
    file system is, has all of these methods.
    """

    pinned: PinnedFrames
    """What is held of it by programs that have its pages mapped."""

    @property
    def has_files(self) -> bool:
        """Whether inodes have extended attributes, access control lists, flags of chattr(1)."""
        return False

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written: never on this mount, or no more since damage was met."""
        return False

    # Names

    @abstractmethod
    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name; ENOENT if it does not exist."""

    @abstractmethod
    def names(self, number: int) -> list[bytes]:
        """The name of every entry of a directory, without the dots."""

    def listing(self, number: int) -> list[bytes]:
        """For each entry of a directory, without the dots, what `listed` takes."""
        return self.names(number)

    @abstractmethod
    def listed(
        self, number: int, key: bytes, *, follows: bool = False
    ) -> tuple[bytes, int, int] | None:
        """An entry, if it is there still: its name, its inode and the type of that (DT_*). The
        inode is read only if the entry is to be followed."""

    def stored_listing(self, number: int) -> StoredListing | None:
        """A directory whose entries may be listed from what is stored; None if only `listed` and
        `attributes` can tell what it has."""
        return None

    @abstractmethod
    def has_entry(self, number: int, name: bytes) -> int | None:
        """The inode that a name leads to now; that inode is read. None if there is no such name,
        or ENOENT if there may be one later, though nobody makes it."""

    @abstractmethod
    def parent(self, number: int) -> int:
        """The directory above a directory."""

    def make(self, parent: int, name: bytes, new: NewInode) -> int:
        """Make an inode with a name."""
        raise system_error(errno.EPERM)

    def make_unnamed(self, parent: int, new: NewInode) -> int:
        """Make an inode without a name; a caller who wants to keep it holds it."""
        raise system_error(errno.EOPNOTSUPP)

    def link(self, number: int, parent: int, name: bytes) -> None:
        """Give an inode another name."""
        raise system_error(errno.EPERM)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove the name of anything but a directory."""
        raise system_error(errno.EPERM)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        raise system_error(errno.EPERM)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0,
        whiteout: NewInode | None = None,
    ) -> None:  # fmt: skip
        """Do as renameat2(2) does; `whiteout` is what WHITEOUT leaves at the old name."""
        raise system_error(errno.EPERM)

    def target(self, number: int) -> bytes:
        """The path that a symbolic link leads to."""
        raise system_error(errno.EINVAL)

    def hold(self, number: int, count: int = 1) -> None:
        """Let an inode live on until it was dropped as often."""
        return

    def drop(self, number: int, count: int = 1) -> None:
        """Undo as many calls of `hold`."""
        return

    def will_drop(self, number: int) -> None:
        """The request under way undoes one `hold`, and no other. If this process dies before the
        request has an answer, its handle is closed and that hold is gone."""
        return

    # Attributes

    @abstractmethod
    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode; ESTALE if it does not exist."""

    def heritage(self, number: int) -> Heritage:
        """What a new inode takes over from this directory; ESTALE if it does not exist."""
        attributes = self.attributes(number)
        return Heritage(attributes.mode, attributes.gid, {})

    @abstractmethod
    def set_attributes(
        self, number: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, size_bytes: int | None = None, atime_ns: int | None = None,
        mtime_ns: int | None = None, ctime_ns: int | None = None, is_touch: bool = False,
    ) -> None:  # fmt: skip
        """Change what is given. `is_touch`: the times are the present, which writers may set."""

    def note_read(self, number: int) -> bool:
        """A program has read an inode; whether its time of access has changed."""
        return False

    def set_flags(self, number: int, flags: InodeFlags) -> object | None:
        """Set the flags of chattr(1); a token: until it is over, a worker may still write."""
        raise system_error(errno.ENOTTY)

    def is_over(self, token: object) -> bool:
        """Whether all workers have noticed what was changed when the token was given."""
        return True

    def find_xattr(self, number: int, name: bytes) -> bytes | None:
        """The value of an extended attribute; None if it is not set."""
        return None

    def list_xattrs(self, number: int) -> list[bytes]:
        """The names of all extended attributes."""
        raise system_error(errno.ENOSYS)

    def set_xattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, as setxattr(2) does."""
        raise system_error(errno.ENOSYS)

    def remove_xattr(self, number: int, name: bytes) -> None:
        """Remove an extended attribute."""
        raise system_error(errno.ENOSYS)

    @abstractmethod
    def set_xattrs_and_mode(
        self, number: int, changes: dict[bytes, bytes | None], mode: int | None
    ) -> None:
        """Set and (None) remove extended attributes, and set permission bits, in one step."""

    # Content

    @abstractmethod
    def check_open(self, number: int, flags: int) -> None:
        """Refuse to open an inode with these flags of open(2)."""

    @abstractmethod
    def read(self, number: int, offset_bytes: int, length_bytes: int) -> Later[bytes | memoryview]:
        """The bytes of a range, as far as the file has them."""

    @abstractmethod
    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> Later[int]:
        """Store bytes; how many. Nobody changes `data` before it is stored. `may_overwrite` is true
        for a handle that is older than the append-only flag of its file."""

    @abstractmethod
    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> Later[int]:  # fmt: skip
        """Copy a range as far as the source has it; how many bytes."""

    def seek(self, number: int, offset_bytes: int, *, for_data: bool) -> int:
        """Where data (or a hole) comes next. After ENOSYS the kernel takes everything for data."""
        raise system_error(errno.ENOSYS)

    def has_hole(self, number: int, offset_bytes: int, length_bytes: int) -> bool:
        """Whether a part of a range is not mapped."""
        return False

    def allocate(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> Later[None]:
        """Reserve room for a range."""
        raise system_error(errno.EOPNOTSUPP)

    def punch(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Make a range read as zeroes, and give its room back."""
        raise system_error(errno.EOPNOTSUPP)

    def zero(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> Later[None]:
        """Make a range read as zeroes, and keep its room."""
        raise system_error(errno.EOPNOTSUPP)

    def collapse(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Take a range out of the middle of a file."""
        raise system_error(errno.EOPNOTSUPP)

    def insert(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Insert a hole into the middle of a file."""
        raise system_error(errno.EOPNOTSUPP)

    @abstractmethod
    def pieces(self, number: int, offset_bytes: int, length_bytes: int, most: int) -> list[Piece]:
        """Where the frames of a range lie in the pool: the first pieces, so many at most."""

    def is_encrypted(self, number: int) -> bool:
        """Whether a file's pages have other bytes than its readers get, all of them, for ever."""
        return False

    def make_plain(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Let what is compressed in a range of a file lie as plain bytes in frames of its own."""
        return None

    def lay_out(self, number: int) -> Later[None]:
        """Let a file lie in as few runs of frames as there can be."""
        return None

    @abstractmethod
    def note_stores(self, number: int) -> None:
        """A program has stored into pages of a file by itself: note it as a write."""

    def write_back(self, number: int) -> Later[None]:
        """Begin to make an inode durable; the caller completes it with a fence."""
        return None

    @property
    def never_closed(self) -> Collection[int]:
        """The inodes that may need `write_back` also while no program has them open."""
        return ()

    def may_have_ahead(self, number: int) -> bool:
        """Whether a file may have got frames behind its size since it was last closed."""
        return False

    def trim_ahead(self, number: int) -> bool:
        """Give back what was allocated behind the end of a file that is not open any more; whether
        anything was."""
        return False

    # The whole

    @abstractmethod
    def room(self) -> Room:
        """How much room there is. It takes long unless `look_on` has nothing more to do."""

    def look_on(self) -> bool:
        """Look at some of what `room` has to know; whether there is more."""
        return False

    @property
    def may_find_room(self) -> bool:
        """Whether frames may be taken that nobody owns, because a daemon has died."""
        return False

    def search_on(self) -> bool:
        """Look for such frames for some ms, and free them; whether there is more to look at."""
        return False

    def read_on(self, number: int) -> bool:
        """Read on in an inode that takes long to read; whether there is more."""
        return False

    def grow(self) -> None:
        """The pool's zones have become larger."""
        return

    def tidy(self) -> bool:
        """Called every second or so while the volume is served; whether to call `go_on` soon."""
        return False

    def go_on(self) -> bool:
        """Called until it says that there is no more to do."""
        return False

    def stop_writing(self) -> None:
        """Write nothing any more until `resume_writing`. No file is open for writing.

        Everything that was written becomes durable with the next fence.
        """
        raise system_error(errno.EOPNOTSUPP)

    def settle(self) -> bool:
        """Called after `stop_writing` until it says that there is no more to wait for."""
        return False

    def leave_clean(self) -> None:
        """Called after `settle` and a fence: leave the pool as `end` would leave it."""
        return

    def resume_writing(self) -> None:
        """The opposite of `stop_writing`."""
        raise system_error(errno.EOPNOTSUPP)

    def has_unnamed(self) -> bool:
        """Whether anybody holds an inode that has no name, so it is freed with the last hold."""
        return False

    def end(self) -> None:
        """Called when nothing is served any more, before the pool is marked clean."""
        return


async def looked_at(volume: Volume) -> None:
    """Look at all that `Volume.room` has to know, with other tasks in between.

    A volume of terabytes has ten thousands of bitmaps.
    """
    # Who makes a pool needs no trio, which takes long to load.
    import trio

    while volume.look_on():
        await trio.lowlevel.checkpoint()
