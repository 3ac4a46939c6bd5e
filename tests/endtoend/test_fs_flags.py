"""The flags of chattr(1) in a mounted file system: what they forbid, as ext4 does."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kit.commands import pmemfs, run_command
from kit.mounts import Engine, PoolMaker
from kit.posix import fails_with, opened
from kit.processes import wait_until
from kit.sources import loop_device
from kit.users import NOBODY, as_user
from pmemfs.clock import coarse_ns
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

GET_FLAGS, SET_FLAGS = 0x80086601, 0x40086602
IMMUTABLE, APPEND_ONLY, NO_DUMP, NO_ACCESS_TIME = 0x10, 0x20, 0x40, 0x80
EXTENTS = 0x80000
"""ext4 shows it of every file; nobody has set it."""
KEEP_SIZE, PUNCH_HOLE, ZERO = 1, 2, 16
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, EXCHANGE, NOREPLACE = -100, 2, 1


def get_flags(path: Path) -> int:
    """What lsattr(1) asks for."""
    with opened(path, os.O_RDONLY) as fd:
        return flags_of(fd) & ~EXTENTS


def set_flags(path: Path, flags: int) -> None:
    """What chattr(1) does in the end."""
    with opened(path, os.O_RDONLY) as fd:
        kept = flags_of(fd) & EXTENTS
        fcntl.ioctl(fd, SET_FLAGS, struct.pack("<i", flags | kept))


def flags_of(fd: int) -> int:
    """All flags."""
    return int(struct.unpack("<i", fcntl.ioctl(fd, GET_FLAGS, bytes(4)))[0])


def call(name: str, *arguments: object) -> None:
    """A function of the C library that answers -1 for an error."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call("fallocate", fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def rename(old: Path, new: Path, flags: int = 0) -> None:
    call("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


@dataclass
class Case:
    """A small tree, one file or directory of which has flags, and files that were open before."""

    root: Path
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        (self.root / "dir" / "sub").mkdir(parents=True)
        for name in ("file", "other", "dir/in"):
            (self.root / name).write_bytes(b"0123456789" * 1000)
        os.setxattr(self.file, "user.old", b"value")
        self.old_fd = self.opened(os.O_RDWR)
        self.old_append_fd = self.opened(os.O_WRONLY | os.O_APPEND)

    @property
    def file(self) -> Path:
        return self.root / "file"

    @property
    def other(self) -> Path:
        return self.root / "other"

    @property
    def directory(self) -> Path:
        return self.root / "dir"

    def opened(self, flags: int, path: Path | None = None) -> int:
        """A file descriptor, which is closed with the case."""
        fd = os.open(path or self.file, flags)
        self.stack.callback(os.close, fd)
        return fd

    def no_more_appending(self) -> None:
        """A descriptor that was opened for appending is made one for writing anywhere."""
        fd = self.opened(os.O_WRONLY | os.O_APPEND)
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"over", 0)

    def map_and_store(self) -> None:
        """A store through a mapping of a file that is open for appending."""
        fd = self.opened(os.O_RDWR | os.O_APPEND)
        with mmap.mmap(fd, 4096) as mapping:
            mapping[:4] = b"over"
            mapping.flush()

    def touch(self, path: Path) -> None:
        os.utime(path)

    def close(self) -> None:
        self.stack.close()
        for path in self.root.glob("**/*"):
            # A pipe would wait for who writes to it.
            if path.name in ("file", "dir", "new") and (path.is_file() or path.is_dir()):
                with suppress(OSError):
                    set_flags(path, 0)


Step = Callable[[Case], object]

ON_FILE: dict[str, Step] = {
    "read": lambda c: c.file.read_bytes(),
    "open to write": lambda c: c.opened(os.O_WRONLY),
    "open to read and write": lambda c: c.opened(os.O_RDWR),
    "open to append": lambda c: c.opened(os.O_WRONLY | os.O_APPEND),
    "open to read and append": lambda c: c.opened(os.O_RDWR | os.O_APPEND),
    "open and empty": lambda c: c.opened(os.O_WRONLY | os.O_TRUNC),
    "open to append and empty": lambda c: c.opened(os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
    "open to read and empty": lambda c: c.opened(os.O_RDONLY | os.O_TRUNC),
    "open or make": lambda c: c.opened(os.O_RDONLY | os.O_CREAT),
    "append": lambda c: os.write(c.opened(os.O_WRONLY | os.O_APPEND), b"more"),
    "append much": lambda c: os.write(c.opened(os.O_WRONLY | os.O_APPEND), bytes(3 * MIB)),
    "append no more": lambda c: c.no_more_appending(),
    "write to what was open": lambda c: os.pwrite(c.old_fd, b"over", 3),
    "write behind the end of what was open": lambda c: os.pwrite(c.old_fd, b"over", 20_000),
    "write much to what was open": lambda c: os.pwrite(c.old_fd, bytes(3 * MIB), 0),
    "append to what was open": lambda c: os.write(c.old_append_fd, b"more"),
    "read what was open": lambda c: os.pread(c.old_fd, 100, 0),
    "sync what was open": lambda c: os.fsync(c.old_fd),
    "make shorter": lambda c: os.truncate(c.file, 5),
    "make longer": lambda c: os.truncate(c.file, 50_000),
    "make what was open shorter": lambda c: os.ftruncate(c.old_fd, 5),
    "make what was open longer": lambda c: os.ftruncate(c.old_fd, 50_000),
    "allocate": lambda c: fallocate(c.old_fd, 0, 0, 50_000),
    "allocate inside": lambda c: fallocate(c.old_fd, 0, 0, 4096),
    "allocate and keep the size": lambda c: fallocate(c.old_fd, KEEP_SIZE, 0, 50_000),
    "punch": lambda c: fallocate(c.old_fd, KEEP_SIZE | PUNCH_HOLE, 0, 4096),
    "zero": lambda c: fallocate(c.old_fd, ZERO, 0, 4096),
    "zero and keep the size": lambda c: fallocate(c.old_fd, ZERO | KEEP_SIZE, 0, 4096),
    "copy into what was open": lambda c: os.copy_file_range(
        c.opened(os.O_RDONLY, c.other), c.old_fd, 100, 50, 3
    ),
    "copy from": lambda c: os.copy_file_range(
        c.opened(os.O_RDONLY), c.opened(os.O_WRONLY, c.other), 100, 50, 3
    ),
    "set permissions": lambda c: c.file.chmod(0o600),
    "set permissions of what was open": lambda c: os.fchmod(c.old_fd, 0o600),
    "set the owner": lambda c: os.chown(c.file, 5, 6),
    "set no owner": lambda c: os.chown(c.file, -1, -1),
    "set times": lambda c: os.utime(c.file, ns=(1, 2)),
    "touch": lambda c: c.touch(c.file),
    "set an attribute": lambda c: os.setxattr(c.file, "user.new", b"value"),
    "remove an attribute": lambda c: os.removexattr(c.file, "user.old"),
    "read an attribute": lambda c: os.getxattr(c.file, "user.old"),
    "set a list": lambda c: os.setxattr(
        c.file, "system.posix_acl_access",
        struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *entry)
            for entry in ((1, 6, 0xFFFFFFFF), (2, 4, 7), (4, 4, 0xFFFFFFFF),
                          (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
        ),
    ),
    "link": lambda c: (c.root / "linked").hardlink_to(c.file),
    "unlink": lambda c: c.file.unlink(),
    "rename": lambda c: rename(c.file, c.root / "new"),
    "rename to another directory": lambda c: rename(c.file, c.directory / "new"),
    "rename over it": lambda c: rename(c.other, c.file),
    "rename over another": lambda c: rename(c.file, c.other),
    "rename to itself": lambda c: rename(c.file, c.file),
    "rename unless there": lambda c: rename(c.file, c.other, NOREPLACE),
    "exchange": lambda c: rename(c.file, c.other, EXCHANGE),
    "exchange with it": lambda c: rename(c.other, c.file, EXCHANGE),
    "set another flag": lambda c: set_flags(c.file, get_flags(c.file) | NO_DUMP | NO_ACCESS_TIME),
    "set the same flags": lambda c: set_flags(c.file, get_flags(c.file)),
    "take all flags away": lambda c: set_flags(c.file, 0),
    "set both": lambda c: set_flags(c.file, IMMUTABLE | APPEND_ONLY),
    "execute": lambda c: c.opened(os.O_PATH),
}  # fmt: skip
ON_DIRECTORY: dict[str, Step] = {
    "list": lambda c: os.listdir(c.directory),
    "make a file": lambda c: c.opened(os.O_RDWR | os.O_CREAT, c.directory / "new"),
    "make what is there": lambda c: c.opened(
        os.O_RDWR | os.O_CREAT | os.O_EXCL, c.directory / "in"
    ),
    "open or make what is there": lambda c: c.opened(os.O_RDWR | os.O_CREAT, c.directory / "in"),
    "make a directory": lambda c: (c.directory / "new").mkdir(),
    "make a directory that is there": lambda c: (c.directory / "sub").mkdir(),
    "make a link": lambda c: (c.directory / "new").symlink_to("there"),
    "make a pipe": lambda c: os.mkfifo(c.directory / "new"),
    "make an unnamed file": lambda c: c.opened(os.O_RDWR | os.O_TMPFILE, c.directory),
    "link into it": lambda c: (c.directory / "new").hardlink_to(c.file),
    "link inside": lambda c: (c.directory / "new").hardlink_to(c.directory / "in"),
    "unlink": lambda c: (c.directory / "in").unlink(),
    "unlink what is not there": lambda c: (c.directory / "none").unlink(),
    "rmdir inside": lambda c: (c.directory / "sub").rmdir(),
    "rmdir": lambda c: c.directory.rmdir(),
    "rename inside": lambda c: rename(c.directory / "in", c.directory / "new"),
    "rename out": lambda c: rename(c.directory / "in", c.root / "new"),
    "rename a directory out": lambda c: rename(c.directory / "sub", c.root / "new"),
    "rename in": lambda c: rename(c.file, c.directory / "new"),
    "rename over what is in": lambda c: rename(c.file, c.directory / "in"),
    "exchange with what is in": lambda c: rename(c.file, c.directory / "in", EXCHANGE),
    "rename it": lambda c: rename(c.directory, c.root / "new"),
    "rename it into itself": lambda c: rename(c.directory, c.directory / "sub" / "new"),
    "exchange it": lambda c: rename(c.directory, c.file, EXCHANGE),
    "write to what is in": lambda c: (c.directory / "in").write_bytes(b"new"),
    "make in what is in": lambda c: (c.directory / "sub" / "new").mkdir(),
    "set permissions": lambda c: c.directory.chmod(0o700),
    "set permissions of what is in": lambda c: (c.directory / "in").chmod(0o600),
    "set the owner": lambda c: os.chown(c.directory, 5, 6),
    "set no owner": lambda c: os.chown(c.directory, -1, -1),
    "set times": lambda c: os.utime(c.directory, ns=(1, 2)),
    "touch": lambda c: c.touch(c.directory),
    "set an attribute": lambda c: os.setxattr(c.directory, "user.new", b"value"),
    "make what inherits": lambda c: ((c.directory / "new").mkdir(), (c.directory / "f").touch()),
}
FLAGS = [IMMUTABLE, APPEND_ONLY, NO_DUMP | NO_ACCESS_TIME]


def outcome(root: Path, name: str, step: Step, flags: int, on: str) -> object:
    """What comes of a step, and what the tree is like after it."""
    case = Case(Path(tempfile.mkdtemp(dir=root)))
    try:
        set_flags(case.root / on, flags)
        try:
            step(case)
            answer = "done"
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        return answer, tree(case.root)
    finally:
        case.close()
        shutil.rmtree(case.root)


def tree(root: Path) -> list[object]:
    """Names below a directory, with what can be compared between file systems."""
    found: list[object] = []
    for path in sorted(root.glob("**/*")):
        status = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        has_flags = path.name in ("file", "dir", "new") and stat.S_IFMT(status.st_mode) in (
            stat.S_IFREG, stat.S_IFDIR,
        )  # fmt: skip
        found.append(
            (
                str(path.relative_to(root)), status.st_mode, status.st_uid, status.st_gid,
                zlib.crc32(path.read_bytes()) if is_file else 0,
                sorted(os.listxattr(path, follow_symlinks=False)),
                get_flags(path) if has_flags else None,
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def ext4() -> Iterator[Path]:
    """An ext4 on a loop device."""
    with tempfile.TemporaryDirectory(prefix="pmemfs-flags-", dir="/dev/shm") as directory:
        image, root = Path(directory) / "image", Path(directory) / "mnt"
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        assert run_command("mkfs.ext4", "-q", image).code == 0
        with loop_device(image) as device:
            done = run_command("mount", "-t", "ext4", device, root)
            if done.code:
                pytest.skip(f"ext4 cannot be mounted here: {done.err}")
            yield root


STEPS = [("file", name, step) for name, step in ON_FILE.items()]
STEPS += [("dir", name, step) for name, step in ON_DIRECTORY.items()]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS, ids=hex)
def test_flags_forbid_what_they_forbid_on_ext4(native_root: Path, ext4: Path, flags: int) -> None:
    differ = {}
    for on, name, step in STEPS:
        ours, theirs = (outcome(root, name, step, flags, on) for root in (native_root, ext4))
        if ours != theirs:
            differ[f"{on}: {name}"] = (ours, theirs)
    shown = [f"{step}: {ours} {theirs}" for step, (ours, theirs) in differ.items()]
    assert not shown, "\n".join(shown)


# How they are set and kept


CHANGES_NOTHING: dict[str, Callable[[Path], object]] = {
    "chown to nobody": lambda path: os.chown(path, -1, -1),
    "chown to the same": lambda path: os.chown(path, 0, 0),
    "chmod to the same": lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode)),
    "the same flags": lambda path: set_flags(path, 0),
    "the same size": lambda path: os.truncate(path, 10),
    "the same size of what is open": lambda path: truncate_open(path, 10),
    "no times": lambda path: utimensat(path, (0, UTIME_OMIT), (0, UTIME_OMIT)),
    "the same attribute": lambda path: os.setxattr(path, "user.old", b"value"),
    "a rename to itself": lambda path: rename(path, path),
    "the empty write": lambda path: append(path, b""),
}
UTIME_OMIT = (1 << 30) - 2


def answer(step: Callable[[], object]) -> str:
    """What comes of a step."""
    try:
        step()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def test_the_kernel_answers_first_that_a_fixed_directory_is_one(
    native_root: Path, ext4: Path
) -> None:
    # The kernel's check of names, which knows no flags of ours, comes before any request to us.
    answers = []
    for root in (native_root, ext4):
        case = Case(Path(tempfile.mkdtemp(dir=root)))
        try:
            set_flags(case.directory, IMMUTABLE)
            set_flags(case.file, IMMUTABLE)
            answers += [answer(case.directory.unlink), answer(case.file.rmdir)]
        finally:
            case.close()
            shutil.rmtree(case.root)
    assert answers == ["EISDIR", "ENOTDIR", "EPERM", "EPERM"]


def truncate_open(path: Path, size: int) -> None:
    with opened(path) as fd:
        os.ftruncate(fd, size)


def append(path: Path, data: bytes) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, data)


def utimensat(path: Path, *times: tuple[int, int]) -> None:
    raw = struct.pack("4q", *times[0], *times[1])
    call("utimensat", AT_FDCWD, os.fsencode(path), raw, 0)


def times_that_change(root: Path, step: Callable[[Path], object]) -> list[str]:
    """Which times of a file are others after a step."""
    path = Path(tempfile.mkdtemp(dir=root)) / "file"
    path.write_bytes(b"0123456789")
    os.setxattr(path, "user.old", b"value")
    before = path.stat()
    wait_until(lambda: coarse_ns() > before.st_ctime_ns, "the clock goes on")
    step(path)
    after = path.stat()
    shutil.rmtree(path.parent)
    return [name for name in ("st_mtime_ns", "st_ctime_ns")
            if getattr(before, name) != getattr(after, name)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES_NOTHING)
def test_what_changes_nothing_changes_the_times_that_it_changes_on_ext4(
    native_root: Path, ext4: Path, name: str
) -> None:
    step = CHANGES_NOTHING[name]
    assert times_that_change(native_root, step) == times_that_change(ext4, step)


def test_the_tools_of_e2fsprogs_show_and_set_them(native_root: Path) -> None:
    path = native_root / "file"
    path.touch()
    assert run_command("chattr", "+iadA", path).code == 0
    assert run_command("lsattr", path).out.split()[0].replace("-", "") == "iadA"
    assert run_command("chattr", "=d", path).code == 0
    assert run_command("lsattr", "-p", path).out.split()[:2] == ["0", "-" * 6 + "d" + "-" * 15]
    for refused in ("+S", "+C"):
        done = run_command("chattr", refused, path)
        assert done.code == 1
        assert "Operation not supported" in done.err
    done = run_command("chattr", "-p", "7", path)
    assert done.code == 1
    assert "Operation not supported" in done.err
    assert get_flags(path) == NO_DUMP


def test_what_is_compressed_is_shown_and_set_and_inherited(native_root: Path) -> None:
    directory, path = native_root / "archive", native_root / "archive" / "file"
    directory.mkdir()
    assert run_command("chattr", "+c", directory).code == 0
    path.write_bytes(b"text" * 10_000)
    assert run_command("lsattr", path).out.split()[0].replace("-", "") == "c"
    assert run_command("chattr", "-c", path).code == 0
    assert run_command("lsattr", path).out.split()[0].replace("-", "") == ""
    assert path.read_bytes() == b"text" * 10_000
    assert run_command("lsattr", "-d", directory).out.split()[0].replace("-", "") == "c"


def test_only_the_owner_sets_flags_and_only_the_capable_those_that_forbid(
    native_root: Path,
) -> None:
    native_root.chmod(0o777)
    path = native_root / "file"
    path.touch()
    path.chmod(0o644)
    with fails_with(errno.EPERM):
        as_user(lambda: set_flags(path, NO_DUMP))
    os.chown(path, NOBODY, NOBODY)
    as_user(lambda: set_flags(path, NO_DUMP | NO_ACCESS_TIME))
    for flag in (IMMUTABLE, APPEND_ONLY):
        with fails_with(errno.EPERM):
            as_user(lambda flag=flag: set_flags(path, flag))
    set_flags(path, IMMUTABLE)
    assert as_user(lambda: get_flags(path)) == IMMUTABLE
    with fails_with(errno.EPERM):
        as_user(lambda: set_flags(path, 0))
    with fails_with(errno.EPERM):
        as_user(path.unlink)
    set_flags(path, 0)
    as_user(path.unlink)


def test_what_is_written_natively_stops_when_the_file_becomes_immutable(
    native_root: Path,
) -> None:
    """Three writers never stop by themselves; after chattr(1) not one byte changes."""
    path = native_root / "file"
    path.write_bytes(bytes(MIB))
    refused = []
    is_over = threading.Event()

    def write(length: int) -> None:
        count = 0
        with opened(path) as fd:
            while not is_over.is_set():
                count += 1
                try:
                    os.pwrite(fd, count.to_bytes(8, "little") * (length // 8), length)
                except OSError as error:
                    refused.append(error.errno)
                    return

    lengths = (4096, 65536, 262144)
    writers = [threading.Thread(target=write, args=(length,)) for length in lengths]
    for writer in writers:
        writer.start()
    try:
        # One that has not opened the file by then could not open it any more.
        wait_until(lambda: all(has_bytes_at(path, length) for length in lengths), "all write")
        set_flags(path, IMMUTABLE)
        first = path.read_bytes()
        wait_until(lambda: len(refused) == 3, "all are refused")
        assert path.read_bytes() == first
        assert refused == [errno.EPERM] * 3
    finally:
        is_over.set()
        for writer in writers:
            writer.join()
        set_flags(path, 0)
    with opened(path) as fd:
        os.pwrite(fd, b"again", 0)
    assert path.read_bytes()[:5] == b"again"


def has_bytes_at(path: Path, offset: int) -> bool:
    """Whether the eight bytes at an offset are not only zeroes."""
    with opened(path, os.O_RDONLY) as fd:
        return any(os.pread(fd, 8, offset))


def test_a_log_that_is_append_only_is_appended_to_by_many(native_root: Path) -> None:
    path = native_root / "log"
    path.touch()
    set_flags(path, APPEND_ONLY)

    def log(who: int) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for count in range(200):
                os.write(fd, b"%d %d\n" % (who, count))

    loggers = [threading.Thread(target=log, args=(who,)) for who in range(4)]
    for logger in loggers:
        logger.start()
    for logger in loggers:
        logger.join()
    lines = path.read_bytes().split(b"\n")[:-1]
    set_flags(path, 0)
    assert sorted(lines) == sorted(b"%d %d" % (who, n) for who in range(4) for n in range(200))


@pytest.mark.parametrize("way", ["no more appending", "mapping"])
def test_who_opens_for_appending_overwrites_nothing(native_root: Path, way: str) -> None:
    """The kernel knows nothing of the flag: it lets a process change its descriptor, and map it."""
    case = Case(native_root)
    set_flags(case.file, APPEND_ONLY)
    before = case.file.read_bytes()
    case.stack.pop_all().close()
    with pytest.raises(OSError, match=r"\[Errno (1|5)\]"):
        case.no_more_appending() if way == "no more appending" else case.map_and_store()
    case.close()
    assert case.file.read_bytes() == before


def test_a_read_leaves_the_time_of_access_of_what_has_the_flag(native_root: Path) -> None:
    moved = {}
    for name, flags in (("usual", 0), ("flagged", NO_ACCESS_TIME)):
        path = native_root / name
        path.write_bytes(b"content")
        os.utime(path, ns=(10**18, 2 * 10**18))
        set_flags(path, flags)
        path.read_bytes()
        (path.parent / "other").touch()
        moved[name] = access_time(path) != 10**18
    assert moved == {"usual": True, "flagged": False}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_new_flag_is_a_change_that_everybody_sees_at_once(native_root: Path, kind: str) -> None:
    path = native_root / kind
    path.mkdir() if kind == "directory" else path.touch()
    before = path.stat()
    wait_until(lambda: coarse_ns() > before.st_ctime_ns, "the clock goes on")
    set_flags(path, NO_DUMP)
    assert path.stat().st_ctime_ns > before.st_ctime_ns
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def access_time(path: Path) -> int:
    """The time of access that the server has."""
    with opened(path, os.O_RDONLY) as fd:
        # What the kernel has cached goes with a change of the inode.
        os.fchmod(fd, 0o600)
        return os.fstat(fd).st_atime_ns


def test_flags_outlast_the_mount_and_count_in_the_reference_too(pools: PoolMaker) -> None:
    pool = pools.create("files", "32M", "--mode", "fs")
    mounted = pools.mount(pool)
    made = {}
    for name, flags in (("fixed", IMMUTABLE), ("log", APPEND_ONLY), ("nodump", NO_DUMP)):
        made[name] = mounted.mountpoint / name
        made[name].write_bytes(b"content")
        set_flags(made[name], flags)
    (mounted.mountpoint / "dir").mkdir()
    set_flags(mounted.mountpoint / "dir", APPEND_ONLY)
    pools.umount(mounted)
    assert pmemfs("check", pool).code == 0
    pools.engine = Engine("python")
    mounted = pools.mount(pool)
    for action in (
        lambda: made["fixed"].write_bytes(b"other"),
        lambda: made["fixed"].chmod(0o600),
        lambda: made["fixed"].unlink(),
        lambda: made["fixed"].rename(made["fixed"].with_name("new")),
        lambda: made["log"].write_bytes(b"other"),
        lambda: os.truncate(made["log"], 0),
        lambda: made["log"].unlink(),
    ):
        with fails_with(errno.EPERM):
            action()
    with made["log"].open("ab") as file:
        file.write(b" and more")
    (mounted.mountpoint / "dir" / "new").touch()
    with fails_with(errno.EPERM):
        (mounted.mountpoint / "dir" / "new").unlink()
    made["nodump"].unlink()
    with fails_with(errno.ENOTTY):
        get_flags(made["fixed"])
    assert made["fixed"].read_bytes() == b"content"
    assert made["log"].read_bytes() == b"content and more"
    pools.umount(mounted)
    assert pmemfs("check", pool).code == 0
    pools.engine = Engine("native")
    mounted = pools.mount(pool)
    assert get_flags(made["fixed"]) == IMMUTABLE
    assert get_flags(made["log"]) == APPEND_ONLY
    assert get_flags(mounted.mountpoint / "dir") == APPEND_ONLY
