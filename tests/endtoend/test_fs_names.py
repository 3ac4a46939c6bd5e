"""Names in a mounted file system: what is made, linked, renamed, removed and listed."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from kit.posix import fails_with, mode_of, names

pytestmark = pytest.mark.mount

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def rename(old: Path, new: Path, flags: int) -> None:
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_what_is_made_is_there_with_its_kind(root: Path) -> None:
    (root / "file").write_bytes(b"content")
    (root / "directory").mkdir()
    (root / "link").symlink_to("a target that need not be")
    os.mkfifo(root / "fifo", 0o600)
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    kinds = {entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
             for entry in os.scandir(root)}  # fmt: skip
    assert kinds == {
        "file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK,
        "fifo": stat.S_IFIFO, "device": stat.S_IFCHR, "socket": stat.S_IFSOCK,
    }  # fmt: skip
    assert (root / "link").readlink() == Path("a target that need not be")
    assert (root / "device").stat().st_rdev == os.makedev(300, 70000)
    for name in ("file", "link", "fifo", "device", "socket"):
        (root / name).unlink()
    (root / "directory").rmdir()
    assert names(root) == set()


def test_a_name_that_was_missed_before_is_found_once_it_is_there(root: Path) -> None:
    path = root / "later"
    for _ in range(3):
        with fails_with(errno.ENOENT):
            path.stat()
    path.write_bytes(b"now")
    assert path.read_bytes() == b"now"
    path.unlink()
    with fails_with(errno.ENOENT):
        path.stat()


@pytest.mark.parametrize(
    "name", ["x" * 255, "ü" * 127, "with space", "\\", "\udcff\udcfe", "-", "…"]
)
def test_any_name_of_up_to_255_bytes_will_do(root: Path, name: str) -> None:
    (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    assert names(root) == {name}
    assert (root / name).read_bytes() == os.fsencode(name)


def test_a_longer_name_is_refused_by_each_operation(root: Path) -> None:
    path, there = root / ("x" * 256), root / "there"
    there.touch()
    for attempt in (
        path.touch, path.mkdir, path.stat, path.unlink,
        lambda: path.symlink_to("x"), lambda: path.hardlink_to(there),
        lambda: there.rename(path), lambda: os.mkfifo(path),
    ):  # fmt: skip
        with fails_with(errno.ENAMETOOLONG):
            attempt()
    assert names(root) == {"there"}


def test_hard_links_are_one_file(root: Path) -> None:
    first, second = root / "first", root / "directory" / "second"
    second.parent.mkdir()
    first.write_bytes(b"one")
    second.hardlink_to(first)
    assert first.stat().st_nlink == second.stat().st_nlink == 2
    assert first.samefile(second)
    second.write_bytes(b"other")
    assert first.read_bytes() == b"other"
    with fails_with(errno.EEXIST):
        second.hardlink_to(first)
    first.unlink()
    assert second.stat().st_nlink == 1
    assert second.read_bytes() == b"other"
    with fails_with(errno.EPERM):
        os.link(second.parent, root / "directory link")


def test_the_links_of_a_directory_count_its_directories(root: Path) -> None:
    parent = root / "parent"
    parent.mkdir()
    (parent / "file").touch()
    assert parent.stat().st_nlink == 2
    (parent / "child").mkdir()
    assert parent.stat().st_nlink == 3
    (parent / "child").rename(root / "moved")
    assert parent.stat().st_nlink == 2
    (root / "moved").rename(parent / "back")
    assert parent.stat().st_nlink == 3
    (parent / "back").rmdir()
    assert parent.stat().st_nlink == 2


def test_a_directory_with_something_in_it_is_not_removed(root: Path) -> None:
    full = root / "full"
    full.mkdir()
    (full / "file").touch()
    (root / "other").mkdir()
    with fails_with(errno.ENOTEMPTY):
        full.rmdir()
    with fails_with(errno.ENOTEMPTY):
        (root / "other").rename(full)
    with fails_with(errno.EISDIR):
        full.unlink()
    with fails_with(errno.ENOTDIR):
        (full / "file").rmdir()
    with fails_with(errno.ENOTDIR):
        (full / "file" / "below").stat()
    assert names(full) == {"file"}


def test_rename_replaces_what_is_there(root: Path) -> None:
    (root / "old").write_bytes(b"old")
    (root / "new").write_bytes(b"new")
    with (root / "new").open("rb") as replaced:
        (root / "old").rename(root / "new")
        assert os.fstat(replaced.fileno()).st_nlink == 0
        assert replaced.read() == b"new"
    assert names(root) == {"new"}
    assert (root / "new").read_bytes() == b"old"
    (root / "directory").mkdir()
    with fails_with(errno.EISDIR):
        (root / "new").rename(root / "directory")
    with fails_with(errno.ENOTDIR):
        (root / "directory").rename(root / "new")
    (root / "empty").mkdir()
    (root / "directory").rename(root / "empty")
    assert names(root) == {"new", "empty"}


def test_rename_without_replacing(root: Path) -> None:
    (root / "old").write_bytes(b"old")
    (root / "there").write_bytes(b"there")
    with fails_with(errno.EEXIST):
        rename(root / "old", root / "there", RENAME_NOREPLACE)
    rename(root / "old", root / "free", RENAME_NOREPLACE)
    assert names(root) == {"free", "there"}


def test_rename_exchanges_files_and_directories_alike(root: Path) -> None:
    (root / "file").write_bytes(b"file")
    (root / "a" / "directory").mkdir(parents=True)
    (root / "a" / "directory" / "inside").touch()
    rename(root / "file", root / "a" / "directory", RENAME_EXCHANGE)
    assert (root / "a" / "directory").read_bytes() == b"file"
    assert names(root / "file") == {"inside"}
    assert (root / "a").stat().st_nlink == 2
    assert (root / "file" / "..").samefile(root)
    with fails_with(errno.ENOENT):
        rename(root / "file", root / "missing", RENAME_EXCHANGE)


def test_rename_leaves_a_whiteout(root: Path) -> None:
    (root / "old").write_bytes(b"old")
    (root / "there").write_bytes(b"there")
    (root / "directory").mkdir()
    with fails_with(errno.EEXIST):
        rename(root / "old", root / "there", RENAME_WHITEOUT | RENAME_NOREPLACE)
    rename(root / "old", root / "there", RENAME_WHITEOUT)
    rename(root / "there", root / "free", RENAME_WHITEOUT | RENAME_NOREPLACE)
    rename(root / "directory", root / "moved", RENAME_WHITEOUT)
    assert names(root) == {"old", "there", "free", "directory", "moved"}
    assert (root / "free").read_bytes() == b"old"
    for name in ("old", "there", "directory"):
        status = (root / name).lstat()
        assert (status.st_mode, status.st_rdev, status.st_nlink) == (stat.S_IFCHR, 0, 1)
    assert root.stat().st_nlink == 3
    # A whiteout is a file like others: it can be renamed and replaced.
    rename(root / "old", root / "there", RENAME_WHITEOUT)
    (root / "free").rename(root / "old")
    assert names(root) == {"old", "there", "directory", "moved"}
    assert (root / "old").read_bytes() == b"old"


def test_other_kinds_of_rename_are_refused(root: Path) -> None:
    (root / "old").touch()
    (root / "there").touch()
    for flags in (RENAME_EXCHANGE | RENAME_WHITEOUT, RENAME_EXCHANGE | RENAME_NOREPLACE, 8):
        with fails_with(errno.EINVAL):
            rename(root / "old", root / "there", flags)
    assert names(root) == {"old", "there"}


def test_a_directory_does_not_move_into_itself(root: Path) -> None:
    (root / "a" / "b" / "c").mkdir(parents=True)
    with fails_with(errno.EINVAL):
        (root / "a").rename(root / "a" / "b" / "c" / "a")
    assert (root / "a" / "b" / "c").is_dir()


def test_rename_onto_another_link_of_the_same_file_changes_nothing(root: Path) -> None:
    (root / "one").write_bytes(b"1")
    (root / "two").hardlink_to(root / "one")
    os.rename(root / "one", root / "two")
    assert names(root) == {"one", "two"}


def test_an_unlinked_file_lasts_until_it_is_closed(root: Path) -> None:
    with (root / "file").open("w+b") as file:
        (root / "file").unlink()
        assert names(root) == set()
        file.write(b"still here" * 10000)
        file.seek(0)
        assert file.read() == b"still here" * 10000
        assert os.fstat(file.fileno()).st_nlink == 0


def test_in_a_removed_directory_nothing_can_be_made(root: Path) -> None:
    (root / "gone").mkdir()
    fd = os.open(root / "gone", os.O_RDONLY)
    try:
        (root / "gone").rmdir()
        with fails_with(errno.ENOENT):
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        with fails_with(errno.ENOENT):
            os.mkdir("new", dir_fd=fd)
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


@pytest.mark.slow
def test_a_large_directory_is_listed_whole(root: Path) -> None:
    expected = {f"file {number:05}" for number in range(3000)}
    for name in expected:
        (root / name).touch()
    assert names(root) == expected
    for name in list(expected)[::2]:
        (root / name).unlink()
        expected.discard(name)
    assert names(root) == expected


@pytest.mark.slow
def test_a_listing_survives_changes(root: Path) -> None:
    stable = {f"stable {number}" for number in range(500)}
    for name in stable:
        (root / name).touch()
    for number in range(500):
        (root / f"removed {number}").touch()
    listed = []
    with os.scandir(root) as entries:
        for count, entry in enumerate(entries):
            listed.append(entry.name)
            if count == 10:
                for number in range(500):
                    (root / f"removed {number}").unlink()
                    (root / f"added {number}").touch()
    assert len(listed) == len(set(listed)), "nothing is listed twice"
    assert stable <= set(listed)
    assert len([name for name in listed if name.startswith("removed")]) < 500
    assert names(root) == stable | {f"added {number}" for number in range(500)}


def test_rewinding_lists_what_is_there_now(root: Path) -> None:
    (root / "before").touch()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(fd) == ["before"]
        (root / "after").touch()
        assert set(os.listdir(fd)) == {"before", "after"}
    finally:
        os.close(fd)


def test_the_dots_lead_where_they_should(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    assert os.stat(root / "a" / "b" / "..").st_ino == (root / "a").stat().st_ino
    assert os.stat(root / "a" / ".").st_ino == (root / "a").stat().st_ino
    top = root.parent
    assert top.stat().st_ino == 1


def test_creating_exclusively_and_opening_what_is_missing(root: Path) -> None:
    path = root / "file"
    with fails_with(errno.ENOENT):
        os.open(path, os.O_RDWR)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
    assert mode_of(path) == 0o640
    with fails_with(errno.EEXIST):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with fails_with(errno.EISDIR):
        os.open(root, os.O_WRONLY)
    (root / "loop").symlink_to("loop")
    with fails_with(errno.ELOOP):
        (root / "loop").open("rb")


def test_a_file_is_found_by_its_handle_and_a_handle_of_nothing_does_no_harm(root: Path) -> None:
    path, gone = root / "file", root / "gone"
    path.write_bytes(b"found")
    # Never opened, or the kernel would hold the inode until it has sent RELEASE.
    os.mknod(gone, stat.S_IFREG | 0o600)
    fd = os.open(root, os.O_RDONLY)

    class Handle(ctypes.Structure):
        _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("raw", ctypes.c_ubyte * 128))

    def handle_of(path: Path) -> Handle:
        handle, mount_id = Handle(size=128), ctypes.c_int()
        assert not _libc.name_to_handle_at(
            _AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount_id), 0
        )
        return handle

    def content(handle: Handle) -> bytes:
        found = _libc.open_by_handle_at(fd, ctypes.byref(handle), os.O_RDONLY)
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            return os.read(found, 100)
        finally:
            os.close(found)

    try:
        assert content(handle_of(path)) == b"found"
        stale = handle_of(gone)
        gone.unlink()
        made_up = handle_of(path)
        made_up.raw[2] ^= 0xFF
        for handle in (stale, made_up):
            with fails_with(errno.ESTALE):
                content(handle)
        path.write_bytes(b"and nothing is read-only")
    finally:
        os.close(fd)


def test_symbolic_links_of_any_length_that_the_kernel_takes(root: Path) -> None:
    for length in (1, 59, 60, 255, 4000, 4094):
        (root / f"{length}").symlink_to("t" * length)
        assert os.readlink(root / f"{length}") == "t" * length
        assert os.lstat(root / f"{length}").st_size == length
