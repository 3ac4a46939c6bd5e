"""What can go wrong: one class for each kind of error.

The docstring of a class is its message, with the names of its facts in braces. `errno` is what a
system call through the mount answers, and `exit_code` is what a command ends with. A user sees only
the message; the log has more.

Exit codes: 1 failed, 2 bad usage, 3 refused because something would be lost, 4 the pool is not
valid, 16 in use. `mount` and `umount` answer like mount(8), with 32 for any failure except bad
usage, and `check` answers like fsck(8).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INVALID_POOL = 4
EXIT_CANNOT_CHECK = 8
"""Of `check` only: what fsck(8) calls an operational error."""
EXIT_BUSY = 16
EXIT_MOUNT_FAILED = 32
EXIT_SIGNALLED = 128
"""Plus the number of the signal, as shells do it."""


class PmemfsError(Exception):
    """{why}"""

    errno: int = errno.EIO
    exit_code: int = EXIT_FAILED

    @property
    def kind(self) -> str:
        """What programs know it by: the name of its class, also where a daemon has said it."""
        return type(self).__name__

    def __init__(self, **facts: object) -> None:
        super().__init__(_template(type(self)).format(**facts))
        self.facts = facts

    @classmethod
    def said(cls, sentence: str, number: int = 0) -> Self:
        """This error as another process has said it; `number` is its errno, if it isn't the
        class's."""
        error = cls.__new__(cls)
        super(PmemfsError, error).__init__(sentence)
        error.errno = number or cls.errno
        error.facts = {}
        return error


def _template(kind: type[PmemfsError]) -> str:
    """The message of a class: its own docstring, or that of the class it inherits from.

    inspect.getdoc does the same, but takes longer to load than the rest of this module.
    """
    return " ".join(next(base.__doc__ for base in kind.__mro__ if base.__doc__).split())


def system_error(number: int) -> OSError:
    """The error of a system call: an errno, and what the system says about it."""
    return OSError(number, os.strerror(number))


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have errors name a file: those of calls that take a descriptor name none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def mount_exit_code(error: PmemfsError) -> int:
    """The exit code of mount and umount, as of mount(8): bad usage, a signal, or 32."""
    is_told = error.exit_code == EXIT_USAGE or error.exit_code > EXIT_SIGNALLED
    return error.exit_code if is_told else EXIT_MOUNT_FAILED


def cause_of(error: Exception) -> Exception:
    """The error that a group of errors is about; any other error is its own cause.

    Tasks that run side by side fail in groups, and a group's text names none of its errors. Only
    this function looks into groups. A PmemfsError comes first, then what the system said, because
    other tasks of a group often fail as a consequence.
    """
    leaves = list(_leaves(error))
    for kind in (PmemfsError, OSError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def sentence_of(error: Exception) -> str:
    """An error of any kind, or a group, as one line for a user, without a traceback."""
    cause = cause_of(error)
    if isinstance(cause, PmemfsError):
        return str(cause)
    if isinstance(cause, OSError) and cause.strerror:
        where = f"{os.fsdecode(cause.filename)}: " if cause.filename else ""
        return f"{where}{cause.strerror.lower()}"
    return " ".join(f"{type(cause).__name__}: {cause}".split())


class OutputLost(PmemfsError):
    """standard output cannot be written: {why}"""

    def __init__(self, cause: OSError) -> None:
        super().__init__(why=sentence_of(cause))
        self.errno = cause.errno or errno.EIO
        self.has_no_reader = isinstance(cause, BrokenPipeError)
        """Whether the reader has closed the pipe: it wanted no more, so it needs no sentence."""


# What was asked for


class BadSize(PmemfsError):
    """{text!r} is not a size: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class BadName(PmemfsError):
    """{name!r} cannot name a pool: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class RootOnly(PmemfsError):
    """{what} is for root"""

    errno = errno.EPERM


class BadUsage(PmemfsError):
    """{why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class BadMountOption(PmemfsError):
    """mount option {option!r} is not valid: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class BadGeometry(PmemfsError):
    """{why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


# The source


class NoSuchSource(PmemfsError):
    """{path}: {why}"""

    errno = errno.ENOENT


class Silent(PmemfsError):
    """{path} does not answer: it lies on a mount whose daemon or server is stopped or very slow"""

    errno = errno.ETIMEDOUT


class UnusableSource(PmemfsError):
    """{path} cannot hold a pool: {why}"""

    errno = errno.ENODEV


class SourceBusy(PmemfsError):
    """{path} is in use: {why}"""

    errno = errno.EBUSY
    exit_code = EXIT_BUSY


class NoSpace(PmemfsError):
    """{path}: no room for {wanted}: {why}"""

    errno = errno.ENOSPC


class ReadOnlyMedium(PmemfsError):
    """{path} is open for reading only"""

    errno = errno.EROFS


class MemoryFault(PmemfsError, OSError):
    """page frame {pfn:#x} of {path} can't be touched: the memory is damaged, or the file was cut
    off"""

    errno = errno.EIO
    inode = 0
    """The inode that the page belongs to, if the code that touched it knows."""

    @property
    def path(self) -> str:
        """The pool."""
        return str(self.facts["path"])

    @property
    def pfn(self) -> int:
        """The page frame, counted from the first byte of the pool."""
        pfn = self.facts["pfn"]
        assert isinstance(pfn, int)
        return pfn


# The pool


class HasContent(PmemfsError):
    """{path} already holds {found}; use --force to overwrite it"""

    errno = errno.EEXIST
    exit_code = EXIT_REFUSED


class NotAPool(PmemfsError):
    """{path} has no label of a pool; 'pmemfs create {path}' makes a pool of it and destroys what it
    holds, even a pool that has lost both copies of its label"""

    errno = errno.EINVAL
    exit_code = EXIT_INVALID_POOL


class InvalidLabel(PmemfsError):
    """{why}"""

    errno = errno.EUCLEAN
    exit_code = EXIT_INVALID_POOL


class NewerFormat(InvalidLabel):
    """{why}"""


class InvalidPool(PmemfsError):
    """{path} is not a valid pool: {why}"""

    errno = errno.EUCLEAN
    exit_code = EXIT_INVALID_POOL


class ReadOnlyPool(PmemfsError):
    """{path} can only be mounted read-only, with '-o ro': {why}"""

    errno = errno.EROFS


class DamagedFileSystem(PmemfsError):
    """the file system is damaged: {why}"""

    errno = errno.EUCLEAN
    exit_code = EXIT_INVALID_POOL


class DamagedPiece(PmemfsError, OSError):
    """a compressed piece is damaged: {why}"""

    errno = errno.EIO


class DamagedCache(PmemfsError):
    """the cache is damaged: {why}"""

    errno = errno.EUCLEAN
    exit_code = EXIT_INVALID_POOL


class DamagedSet(DamagedCache, OSError):
    """the cache is damaged: of the tags of set {number}, way {way} is wrong, and may stand for what
    was asked for; 'pmemfs check --repair' says what can be done"""

    errno = errno.EIO


class SetBusy(PmemfsError, OSError):
    """set {number} of the cache is being changed at this moment"""

    errno = errno.EAGAIN


class CannotGrow(PmemfsError):
    """{path} cannot be made larger: {why}"""

    errno = errno.EOPNOTSUPP


class CannotTrim(PmemfsError):
    """{path} gives no memory back: {why}"""

    errno = errno.EOPNOTSUPP


class CannotShrink(PmemfsError):
    """{path} is a pool of {size}, and what lies behind {wanted} would be lost: a pool can only
    grow"""

    errno = errno.EINVAL
    exit_code = EXIT_REFUSED


class NoSizeGiven(PmemfsError):
    """{path} is a file of {size}, all of it in use; give the new size with --size"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


# The origin of a cache


class BadOrigin(PmemfsError):
    """{text!r} is not an origin: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class UnusableOrigin(PmemfsError):
    """{name} cannot be an origin: {why}"""

    errno = errno.ENODEV


class OriginBusy(PmemfsError):
    """{name} is in use: {why}"""

    errno = errno.EBUSY
    exit_code = EXIT_BUSY


class OriginGone(PmemfsError, OSError):
    """{name} is away: {why}"""

    errno = errno.ENOTCONN


class WrongOrigin(PmemfsError):
    """{name} is not what {path} caches: {why}; 'pmemfs cache drop {path}' forgets what it caches,
    and '-o degraded' mounts it without the origin"""

    errno = errno.ESTALE


class BadSetting(PmemfsError):
    """{name} can't be set: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class CannotFlush(PmemfsError):
    """{blocks} could not be given to the origin {name}: {why}"""

    errno = errno.EIO


class NotACache(PmemfsError):
    """{path} is a pool of mode {mode}, and caches nothing: this is for pools of mode cache"""

    errno = errno.EINVAL


class DirtyBlocks(PmemfsError):
    """{path} has {blocks} that its origin lacks, and {why}; 'pmemfs cache export' saves what is
    dirty, and --discard-dirty lets it be lost"""

    errno = errno.EBUSY
    exit_code = EXIT_REFUSED


class CannotVerify(PmemfsError):
    """the cache could not be compared with {name}: {why}"""

    errno = errno.EIO


class OriginFenced(PmemfsError, OSError):
    """{name} belongs to another host now: {why}"""

    errno = errno.ESHUTDOWN


# Pages


class NoPageStructures(PmemfsError):
    """{what} needs page structures, and a pool with the memmap scheme 'none' does not have them;
    'pmem' and 'on-demand' do"""

    errno = errno.EOPNOTSUPP


class CannotPin(PmemfsError, OSError):
    """cannot pin {what}: {why}"""

    errno = errno.EIO

    def __init__(self, number: int, **facts: object) -> None:
        super().__init__(**facts)
        self.errno = number


class CannotMapTransformed(PmemfsError, OSError):
    """cannot map {what}: it is encrypted, and whoever maps a file sees its pages as they lie in the
    pool; copy it to a directory that is not encrypted ('pmemfs copy'), and map the copy"""

    errno = errno.EOPNOTSUPP


class CannotTransform(PmemfsError, OSError):
    """{path} stays as it is: {why}"""

    errno = errno.EIO

    def __init__(self, number: int, **facts: object) -> None:
        super().__init__(**facts)
        self.errno = number
        self.exit_code = EXIT_BUSY if number == errno.EBUSY else EXIT_FAILED


class NoTransformsHere(PmemfsError):
    """{path} is a pool of mode {mode}, which has no files to compress or encrypt: this is for pools
    of mode fs"""

    errno = errno.EOPNOTSUPP


class TooManyPins(PmemfsError):
    """process {pid} may not pin more: {why}; let go of arrays that are not needed, or map several
    files with one pin"""

    errno = errno.EDQUOT


class TooManyPieces(PmemfsError):
    """cannot pin {what}: it lies in more than {most} pieces; contiguous=True lays it out anew, in
    one piece"""

    errno = errno.EFBIG


class TooLong(PmemfsError):
    """a question of {length} bytes is too long, a daemon takes {limit}; name fewer files at once"""

    errno = errno.E2BIG


class TooManyOpenFiles(PmemfsError):
    """this process may have no more than {limit} open files, and each pin needs one; map several
    files with one pin, let go of arrays that are not needed, or raise the limit (ulimit -n)"""

    errno = errno.EMFILE


class NotInPool(PmemfsError):
    """page frame {pfn:#x} is outside the data zone: data is pfn {first:#x} to {last:#x}"""

    errno = errno.EFAULT


class PageReferences(PmemfsError):
    """page frame {pfn:#x}: {why}"""

    errno = errno.EOVERFLOW


class NoPicture(PmemfsError):
    """cannot draw {path}: {why}"""

    errno = errno.EOPNOTSUPP


# Mounts


class BadMountPoint(PmemfsError):
    """cannot mount on {path}: {why}"""

    errno = errno.ENOTDIR


class MountFailed(PmemfsError):
    """cannot mount {pool} on {path}: {why}"""

    errno = errno.EIO


class RemountFailed(PmemfsError):
    """cannot remount {path}: {why}"""

    errno = errno.EBUSY


class UpgradeFailed(PmemfsError):
    """cannot upgrade {path}: {why}"""

    errno = errno.EBUSY


class Interrupted(PmemfsError):
    """interrupted by {name}; nothing is mounted"""

    errno = errno.EINTR

    def __init__(self, number: int) -> None:
        super().__init__(name=signal.Signals(number).name)
        self.exit_code = EXIT_SIGNALLED + number


class DaemonDied(PmemfsError):
    """the daemon ended before the mount was made, with {how}"""

    errno = errno.ENOTCONN


class TransportUnavailable(PmemfsError):
    """transport {transport} can't be used: {why}"""

    errno = errno.ENOTSUP


class DataPlaneFailed(PmemfsError):
    """the data plane failed: {why}"""

    errno = errno.ENOTCONN


class ForeignSharedMemory(PmemfsError):
    """this is no shared memory of a mount that this version of pmemfs knows: {why}"""

    errno = errno.EINVAL


class NotMounted(PmemfsError):
    """{path} is not {what}"""

    errno = errno.EINVAL


class CannotCompare(PmemfsError):
    """cannot compare: {why}"""

    errno = errno.EIO


class CommandFailed(PmemfsError):
    """{command} failed: {why}"""

    errno = errno.EIO


class WorkloadFailed(PmemfsError):
    """{what} failed: {why}"""

    errno = errno.EIO


class CannotTransfer(PmemfsError):
    """cannot read the transfers from {path}: {why}"""

    errno = errno.EINVAL


class NeedsPackage(PmemfsError):
    """{what} needs the package {package}, which is not installed; {remedy}"""

    errno = errno.ENOPKG


class NoExtents(PmemfsError):
    """{path} has no extents to show: {why}"""

    errno = errno.EINVAL


class CannotCopy(PmemfsError):
    """cannot copy {source} to {target}: {why}"""

    errno = errno.EINVAL


class NotDirect(PmemfsError):
    """{path} can't be copied directly: {why}; without --direct it is copied through a buffer"""

    errno = errno.EOPNOTSUPP


class UnmountFailed(PmemfsError):
    """cannot unmount {path}: {why}"""

    errno = errno.EBUSY


class UnmountHangs(UnmountFailed):
    """cannot unmount {path}: its daemon has not answered for {seconds} s; 'pmemfs umount --lazy
    {path}' detaches it"""

    errno = errno.ETIMEDOUT


class NotClean(PmemfsError):
    """{path} is unmounted, but its daemon could not leave the pool clean: not everything may be
    durable; its log says why"""

    errno = errno.EIO


class NoControlSocket(PmemfsError):
    """there is no safe place for a control socket: {why}"""

    errno = errno.EACCES


class NotDurable(PmemfsError):
    """{path} could not be left clean, so not everything may be durable: {why}"""

    errno = errno.EIO


class NotPermitted(PmemfsError):
    """the mount on {path} belongs to user {uid}; only that user and root may give it
    commands of pmemfs or map its pages"""

    errno = errno.EACCES


class NoAnswer(PmemfsError):
    """the daemon of {path} does not answer: {why}"""

    errno = errno.ETIMEDOUT

    @property
    def is_final(self) -> bool:
        """Whether nobody will answer any more: nobody has the socket that is there."""
        return self.facts.get("number") == errno.ECONNREFUSED


# Arrays over pages


class BadMapping(PmemfsError, ValueError):
    """{path} cannot be mapped: {why}"""

    errno = errno.EINVAL


class NoNewFiles(PmemfsError, OSError):
    """the mount on {path} has mode {mode!r}, which is one device and takes no new files; a pool
    that was made with 'pmemfs create --mode fs' does"""

    errno = errno.EPERM


class StillInUse(PmemfsError):
    """{path} is in use by arrays, or views of them, that are alive; drop them first, or close it
    with force=True, and then they show zeroes"""

    errno = errno.EBUSY
    exit_code = EXIT_BUSY


class NotPinned(PmemfsError, ValueError):
    """{what} does not lie over pages of a mount, so no pin holds it"""

    errno = errno.EINVAL


class Closed(PmemfsError, ValueError):
    """{what} is closed"""

    errno = errno.EBADF


class DaemonGone(PmemfsError):
    """the daemon of {path} has ended; arrays go on showing what they show, and for anything else
    mount the pool again and connect anew"""

    errno = errno.ENOTCONN


class TooManyMappings(PmemfsError, OSError):
    """{path} lies in {count} pieces, and this process may have {limit} mappings
    (vm.max_map_count); map it with contiguous=True, which lays the file out anew"""

    errno = errno.ENOMEM


# Keys


class BadSecret(PmemfsError):
    """{what} can't unlock a key: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class BadKeyName(PmemfsError):
    """{name!r} can't name a key: {why}"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class NoSuchKey(PmemfsError):
    """there is no key {name!r}; 'pmemfs key list' shows the keys of a mount, and 'pmemfs key add'
    makes one"""

    errno = errno.ENOKEY


class NoKey(PmemfsError):
    """the key {name!r} is locked; 'pmemfs unlock' unlocks it"""

    errno = errno.ENOKEY


class LostKey(PmemfsError):
    """the pool has nothing any more that unlocks the key {key_id}: what was encrypted with it can't
    be read, unless a copy of the pool has what was removed"""

    errno = errno.ENOKEY


class WrongKey(PmemfsError):
    """the key {name!r} can't be unlocked: {why}"""

    errno = errno.EKEYREJECTED


class KeyInUse(PmemfsError):
    """the key {name!r} can't be locked: {why}"""

    errno = errno.EBUSY
    exit_code = EXIT_BUSY


class LastWay(PmemfsError):
    """the key {name!r} can be unlocked in no other way, so all files that are encrypted with it
    would be lost; --force removes it anyway"""

    errno = errno.EBUSY
    exit_code = EXIT_REFUSED


class NoWayLeft(PmemfsError):
    """nothing unlocks the key {name!r} any more, so all files that are encrypted with it would be
    lost; 'pmemfs key add' lets something unlock it again, and --force locks it anyway"""

    errno = errno.EBUSY
    exit_code = EXIT_REFUSED


class SameSecret(PmemfsError):
    """nothing was changed of the key {name!r}: the new {kind} is the one of before"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class NotEncrypted(PmemfsError):
    """{path} is not encrypted; --key says which key is meant, and 'pmemfs encrypt' encrypts an
    empty directory"""

    errno = errno.ENODATA


class NoSuchWay(PmemfsError):
    """the key {name!r} has no way {way}; 'pmemfs key list' numbers its ways"""

    errno = errno.ENOENT


class WhichWay(PmemfsError):
    """the key {name!r} can be unlocked in {count} ways; --way, --passphrase or --key-file says
    which of them to remove"""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class NoSecretMemory(PmemfsError):
    """there is no memory for keys: {why}"""

    errno = errno.ENOMEM


class CannotStoreKey(PmemfsError):
    """the key can't be stored: {why}"""

    def __init__(self, number: int, **facts: object) -> None:
        super().__init__(**facts)
        self.errno = number


class CannotEncrypt(PmemfsError):
    """{path} can't be encrypted: {why}"""

    def __init__(self, number: int | None, **facts: object) -> None:
        super().__init__(**facts)
        self.errno = number or errno.EINVAL


class NoKeysHere(PmemfsError):
    """{path} is a pool of mode {mode}, which has no files and no keys: this is for pools of mode
    fs"""

    errno = errno.EOPNOTSUPP


# A cache of tensors


class BadKey(PmemfsError, ValueError):
    """{key!r} cannot be the key of an entry: {why}"""

    errno = errno.EINVAL


class BadArray(PmemfsError, TypeError):
    """an array of type {dtype} cannot be an entry: {why}"""

    errno = errno.EINVAL


class BadEntry(PmemfsError, ValueError):
    """{path} is not the entry of a cache: {why}; delete it, or keep it elsewhere"""

    errno = errno.EINVAL


class BadCache(PmemfsError, OSError):
    """{path} cannot be a cache: {why}"""

    errno = errno.ENOTDIR


class CacheFull(PmemfsError, OSError):
    """there is no room for {wanted} in the cache {path}: {why}"""

    errno = errno.ENOSPC
