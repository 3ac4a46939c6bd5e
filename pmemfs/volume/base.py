"""What a mode serves: lookups, attributes, names, content, in the terms of the FUSE handlers.

A volume knows nothing of the kernel's bytes or of open files. What a mode can't do, it refuses with
the errno that stands here, in the defaults, and nowhere else; ENOSYS makes the kernel ask no more.
Invariants:
- a method that answers at once is one step to everybody else: it awaits nothing in its middle;
- one that answers with a coroutine has to wait (for workers of a data plane, for a device), and
  says so in its type;
- an inode with a hold lasts, with or without a name, until it is dropped as often.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, Union

from pmemfs.errors import system_error
from pmemfs.media.log import InodeFlags

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")
Later = Union[T, Coroutine[Any, Any, T]]  # noqa: UP007
"""An answer, or what has to be awaited for it."""


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
    """What of a directory counts for what is made in it."""

    mode: int
    gid: int
    xattrs: Mapping[bytes, bytes]


class NewInode(NamedTuple):
    """What an inode is made with; its mode says of which type it is."""

    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class Room(NamedTuple):
    """How much room there is, and how many files, where somebody counts them."""

    total_frames: int
    free_frames: int
    reserved_frames: int = 0
    """Of the free ones, those that only what deletes may take."""
    file_count: int = 0


class Volume(Protocol):
    """What a mode serves. All methods raise OSError, and PmemfsError where memory fails.

    A mode that lacks something inherits from this, and so refuses it; one that is made of parts,
    as a file system is, has all of it.
    """

    @property
    def has_files(self) -> bool:
        """Whether inodes have extended attributes, access control lists, flags of chattr(1)."""
        return False

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written, or nothing any more."""
        return False

    # Names

    @abstractmethod
    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name; ENOENT where there is none."""

    @abstractmethod
    def names(self, number: int) -> list[bytes]:
        """The name of every entry of a directory but the dots."""

    @abstractmethod
    def find_entry(self, number: int, name: bytes) -> tuple[int, int] | None:
        """The inode of a name and its type (DT_*), without a look at the inode."""

    @abstractmethod
    def has_entry(self, number: int, name: bytes) -> int | None:
        """The inode that a name leads to now, which has been looked at."""

    @abstractmethod
    def parent(self, number: int) -> int:
        """The directory above a directory."""

    def make(self, parent: int, name: bytes, new: NewInode) -> int:
        """Make an inode with a name."""
        raise system_error(errno.EPERM)

    def make_unnamed(self, parent: int, new: NewInode) -> int:
        """Make an inode without a name; whoever wants it must hold it."""
        raise system_error(errno.EOPNOTSUPP)

    def link(self, number: int, parent: int, name: bytes) -> None:
        """Give an inode another name."""
        raise system_error(errno.EPERM)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name that is not of a directory."""
        raise system_error(errno.EPERM)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        raise system_error(errno.EPERM)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0,
        whiteout: NewInode | None = None,
    ) -> None:  # fmt: skip
        """As renameat2(2); `whiteout` is what WHITEOUT leaves at the old name."""
        raise system_error(errno.EPERM)

    def target(self, number: int) -> bytes:
        """Where a symbolic link leads."""
        raise system_error(errno.EINVAL)

    def hold(self, number: int, count: int = 1) -> None:
        """Let an inode last until it is dropped as often."""
        return

    def drop(self, number: int, count: int = 1) -> None:
        """The opposite of `hold`."""
        return

    # Attributes

    @abstractmethod
    def attributes(self, number: int) -> Attributes:
        """What an inode is like; ESTALE where there is none."""

    def heritage(self, number: int) -> Heritage:
        """What of a directory counts for what is made in it; ESTALE where there is none."""
        attributes = self.attributes(number)
        return Heritage(attributes.mode, attributes.gid, {})

    @abstractmethod
    def set_attributes(
        self, number: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, size_bytes: int | None = None, atime_ns: int | None = None,
        mtime_ns: int | None = None, ctime_ns: int | None = None, is_touch: bool = False,
    ) -> None:  # fmt: skip
        """Change what is given. `is_touch`: the times are now, which who may write may set."""

    def note_read(self, number: int) -> bool:
        """Somebody has read an inode; whether its time of access has changed."""
        return False

    def set_flags(self, number: int, flags: InodeFlags) -> object | None:
        """Set those of chattr(1); a token for `is_over`, until which somebody may still write."""
        raise system_error(errno.ENOTTY)

    def is_over(self, token: object) -> bool:
        """Whether nobody acts any more by what was so before a token was given."""
        return True

    def find_xattr(self, number: int, name: bytes) -> bytes | None:
        """The value of an extended attribute; None where there is none."""
        return None

    def list_xattrs(self, number: int) -> list[bytes]:
        """The names of all extended attributes."""
        raise system_error(errno.ENOSYS)

    def set_xattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, as setxattr(2)."""
        raise system_error(errno.ENOSYS)

    def remove_xattr(self, number: int, name: bytes) -> None:
        """Remove an extended attribute."""
        raise system_error(errno.ENOSYS)

    @abstractmethod
    def set_xattrs_and_mode(
        self, number: int, changes: dict[bytes, bytes | None], mode: int | None
    ) -> None:
        """Set and (None) remove extended attributes, and permission bits with them, all in one."""

    # Content

    @abstractmethod
    def check_open(self, number: int, flags: int) -> None:
        """Refuse to open an inode with these flags of open(2)."""

    @abstractmethod
    def read(self, number: int, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        """The bytes of a range, as far as the file has them."""

    @abstractmethod
    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> int:
        """Store bytes; how many. `may_overwrite`: the handle is older than its file is
        append-only."""

    @abstractmethod
    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> int:  # fmt: skip
        """Copy a range as far as the source has it; how much."""

    def seek(self, number: int, offset_bytes: int, *, for_data: bool) -> int:
        """Where data, or a hole, is next. With ENOSYS the kernel takes all for data."""
        raise system_error(errno.ENOSYS)

    def has_hole(self, number: int, offset_bytes: int, length_bytes: int) -> bool:
        """Whether a range has a part that nothing is mapped to."""
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
        """Take a range out of the middle."""
        raise system_error(errno.EOPNOTSUPP)

    def insert(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Put a hole into the middle."""
        raise system_error(errno.EOPNOTSUPP)

    def write_back(self, number: int) -> None:
        """Begin to make an inode durable: what follows is a fence, which makes it so."""
        return

    def may_have_ahead(self, number: int) -> bool:
        """Whether a file may have got frames behind its size since it was last closed."""
        return False

    def trim_ahead(self, number: int) -> None:
        """Give back what was allocated behind the end of a file, which nobody writes any more."""
        return

    # The whole

    @abstractmethod
    def room(self) -> Room:
        """How much room there is."""

    def read_on(self, number: int) -> bool:
        """Read an inode that takes long to read a part on; whether there is more."""
        return False

    def grow(self) -> None:
        """The pool's zones have become larger."""
        return

    def tidy(self) -> bool:
        """To be called every second or so while it is served; whether to `go_on` soon."""
        return False

    def go_on(self) -> bool:
        """To be called until it says that there is no more."""
        return False

    def end(self) -> None:
        """To be called when nobody is served any more, before the pool is clean."""
        return
