"""Who may do what in a mounted file system: owners, bits, directories with bits, access lists."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Engine, Mounted
from kit.posix import fails_with, mode_of
from kit.users import NOBODY, OTHER_USER, as_user
from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.acl import Entry, Tag

pytestmark = pytest.mark.mount

GROUP = 12345
needs_acl = pytest.mark.skipif(shutil.which("setfacl") is None, reason="there is no setfacl")


@pytest.fixture
def users(root: Path) -> Path:
    """A directory where everybody may do anything."""
    root.chmod(0o777)
    return root


def with_umask(umask: int, action: Callable[[], object]) -> None:
    before = os.umask(umask)
    try:
        action()
    finally:
        os.umask(before)


def test_the_root_belongs_to_who_made_the_pool(file_system: tuple[Engine, Mounted]) -> None:
    status = file_system[1].mountpoint.stat()
    assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
    assert stat.S_IMODE(status.st_mode) == 0o755


def test_what_a_user_makes_is_the_users(users: Path) -> None:
    path = users / "file"
    as_user(path.touch, gid=GROUP)
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, GROUP)
    as_user((users / "directory").mkdir)
    assert (users / "directory").stat().st_uid == NOBODY


def test_the_mode_decides_who_reads_and_writes(users: Path) -> None:
    path = users / "file"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    with fails_with(errno.EACCES):
        as_user(path.read_bytes)
    path.chmod(0o604)
    assert as_user(path.read_bytes) == b"secret"
    with fails_with(errno.EACCES):
        as_user(lambda: path.write_bytes(b""))
    path.chmod(0o640)
    os.chown(path, 0, GROUP)
    assert as_user(path.read_bytes, groups=(GROUP,)) == b"secret"
    with fails_with(errno.EACCES):
        as_user(path.read_bytes)


def test_the_directory_decides_who_makes_and_removes(users: Path) -> None:
    directory = users / "directory"
    directory.mkdir(0o755)
    (directory / "file").touch(0o666)
    for attempt in (
        (directory / "new").touch, (directory / "file").unlink, (directory / "new").mkdir,
        lambda: (directory / "file").rename(directory / "moved"),
        lambda: os.link(directory / "file", directory / "link"),
    ):  # fmt: skip
        with pytest.raises(PermissionError):
            as_user(attempt)
    directory.chmod(0o700)
    with fails_with(errno.EACCES):
        as_user((directory / "file").stat)


def test_only_the_owner_changes_attributes(users: Path) -> None:
    path = users / "file"
    as_user(path.touch)
    for attempt in (
        lambda: path.chmod(0o777), lambda: os.chown(path, OTHER_USER, -1),
        lambda: os.utime(path, (1, 1)), lambda: os.setxattr(path, "user.x", b"y"),
    ):  # fmt: skip
        with pytest.raises(PermissionError):
            as_user(attempt, uid=OTHER_USER)
    with fails_with(errno.EPERM):
        as_user(lambda: os.chown(path, OTHER_USER, -1))
    as_user(lambda: path.chmod(0o604))
    as_user(lambda: os.chown(path, -1, GROUP), groups=(GROUP,))
    assert (mode_of(path), path.stat().st_gid) == (0o604, GROUP)


def test_in_a_sticky_directory_files_are_their_owners(users: Path) -> None:
    users.chmod(0o1777)
    path = users / "file"
    as_user(path.touch)
    for attempt in (path.unlink, lambda: path.rename(users / "moved")):
        with pytest.raises(PermissionError):
            as_user(attempt, uid=OTHER_USER)
    as_user(path.unlink)
    assert not path.exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o4755, 0o755), (0o2755, 0o755), (0o6777, 0o777), (0o2644, 0o644), (0o755, 0o755)],
)
def test_a_write_by_a_user_takes_privileges_away(users: Path, before: int, after: int) -> None:
    path = users / "program"
    path.write_bytes(bytes(200_000))

    def ready() -> None:
        path.chmod(0o666)
        os.chown(path, 0, 0)
        path.chmod(before | 0o222)
        assert mode_of(path) == before | 0o222

    def write_twice() -> None:
        with path.open("r+b", buffering=0) as file:
            file.write(bytes(100_000))
            file.write(bytes(100_000))

    for attempt in (
        write_twice, lambda: os.truncate(path, 10), lambda: path.open("wb").close(),
    ):  # fmt: skip
        ready()
        as_user(attempt)
        assert mode_of(path) == after | 0o222
    ready()
    write_twice()
    assert mode_of(path) == before | 0o222, "root keeps them"


def test_privileges_given_while_a_file_is_written_to_go_with_the_next_write(users: Path) -> None:
    path = users / "program"
    as_user(path.touch)

    def write() -> None:
        with path.open("r+b", buffering=0) as file:
            for _ in range(5):
                file.write(bytes(100_000))
            os.chmod(path, 0o4755)
            assert mode_of(path) == 0o4755
            file.write(b"x")

    as_user(write)
    assert mode_of(path) == 0o755


def test_who_writes_counts_and_not_who_opened_the_file(
    file_system: tuple[Engine, Mounted], users: Path
) -> None:
    if file_system[0].name == "python":
        pytest.skip("pyfuse3 does not tell who may keep privileges")
    path = users / "program"
    path.write_bytes(bytes(10))
    path.chmod(0o6777)
    os.seteuid(NOBODY)
    try:
        fd = os.open(path, os.O_RDWR)
    finally:
        os.seteuid(0)
    try:
        os.write(fd, b"x")
        assert mode_of(path) == 0o6777, "root keeps them, whoever opened the file"
    finally:
        os.close(fd)
    for flags in (0, os.O_DSYNC):
        path.chmod(0o6777)
        fd = os.open(path, os.O_RDWR | flags)
        try:
            as_user(lambda fd=fd: os.write(fd, b"x"))  # type: ignore[misc]
        finally:
            os.close(fd)
        assert mode_of(path) == 0o777


def test_a_write_takes_capabilities_away(users: Path) -> None:
    path = users / "program"
    # cap_net_raw, permitted and effective, of version 2
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    path.write_bytes(bytes(200_000))
    with path.open("r+b", buffering=0) as file:
        for _ in range(5):
            file.write(bytes(100_000))
        os.setxattr(path, "security.capability", value)
        assert os.getxattr(path, "security.capability") == value
        file.write(b"x")
    assert os.listxattr(path) == []


def test_chown_takes_privileges_away(users: Path) -> None:
    path = users / "program"
    path.touch()
    path.chmod(0o6755)
    os.chown(path, NOBODY, GROUP)
    assert mode_of(path) == 0o755


def test_the_umask_takes_bits_from_what_is_made(users: Path) -> None:
    with_umask(0o027, lambda: (users / "directory").mkdir(0o777))
    with_umask(0o027, lambda: (users / "file").touch(0o666))
    with_umask(0o077, lambda: os.mkfifo(users / "fifo", 0o666))
    assert mode_of(users / "directory") == 0o750
    assert mode_of(users / "file") == 0o640
    assert mode_of(users / "fifo") == 0o600


def test_a_setgid_directory_gives_its_group(users: Path) -> None:
    shared = users / "shared"
    shared.mkdir()
    os.chown(shared, 0, GROUP)
    shared.chmod(0o2777)
    as_user((shared / "file").touch)
    as_user((shared / "directory").mkdir)
    as_user(lambda: (shared / "link").symlink_to("x"))
    for name in ("file", "directory", "link"):
        assert (shared / name).lstat().st_gid == GROUP
    assert mode_of(shared / "directory") & stat.S_ISGID
    assert not mode_of(shared / "file") & stat.S_ISGID


def test_setgid_is_for_members_of_the_group(users: Path) -> None:
    path = users / "file"
    as_user(path.touch)
    os.chown(path, NOBODY, GROUP)
    as_user(lambda: path.chmod(0o2755))
    assert mode_of(path) == 0o755
    as_user(lambda: path.chmod(0o2755), groups=(GROUP,))
    assert mode_of(path) == 0o2755


# Access lists


def a_list(mode: int, *named: Entry, mask: int | None = None) -> acl.Acl:
    """A list: the classes of a mode, and whoever is named."""
    users = [entry for entry in named if entry.tag == Tag.USER]
    groups = [entry for entry in named if entry.tag == Tag.GROUP]
    return (
        Entry(Tag.OWNER, mode >> 6 & 7), *users, Entry(Tag.GROUP_OF_FILE, mode >> 3 & 7), *groups,
        *([] if mask is None else [Entry(Tag.MASK, mask)]), Entry(Tag.OTHERS, mode & 7),
    )  # fmt: skip


def set_list(path: Path, entries: acl.Acl, name: bytes = acl.ACCESS) -> None:
    os.setxattr(path, name, acl.pack(entries))


def list_of(path: Path, name: bytes = acl.ACCESS) -> acl.Acl | None:
    try:
        return acl.parse(os.getxattr(path, name))
    except OSError as error:
        assert error.errno == errno.ENODATA  # noqa: PT017
        return None


THE_USER = Entry(Tag.USER, 6, NOBODY)


def test_who_is_on_the_list_gets_in(users: Path) -> None:
    path = users / "file"
    path.write_bytes(b"for some")
    path.chmod(0o600)
    set_list(path, a_list(0o600, THE_USER, mask=6))
    assert as_user(path.read_bytes) == b"for some"
    as_user(lambda: path.write_bytes(b"changed"))
    with fails_with(errno.EACCES):
        as_user(path.read_bytes, uid=OTHER_USER)
    assert mode_of(path) == 0o660, "the mask is what the mode shows of the group"
    path.chmod(0o600)
    with fails_with(errno.EACCES):
        as_user(path.read_bytes)
    assert list_of(path) == a_list(0o600, THE_USER, mask=0)
    os.removexattr(path, acl.ACCESS)
    assert list_of(path) is None


def test_a_list_that_says_no_more_than_a_mode_becomes_one(users: Path) -> None:
    path = users / "file"
    path.touch(0o600)
    set_list(path, a_list(0o754))
    assert mode_of(path) == 0o754
    assert list_of(path) is None
    assert os.listxattr(path) == []


def test_removing_a_list_that_is_not_there_does_no_harm(users: Path) -> None:
    path = users / "directory"
    path.mkdir()
    os.removexattr(path, acl.ACCESS)
    os.removexattr(path, acl.DEFAULT)
    assert mode_of(path) == 0o755


def test_a_default_list_is_inherited(users: Path) -> None:
    default = a_list(0o750, THE_USER, mask=7)
    set_list(users, default, acl.DEFAULT)
    (users / "file").touch(0o640)
    (users / "directory").mkdir(0o755)
    assert list_of(users / "file") == a_list(0o650, THE_USER, mask=4)
    assert mode_of(users / "file") == 0o640
    assert list_of(users / "directory") == a_list(0o750, THE_USER, mask=5)
    assert list_of(users / "directory", acl.DEFAULT) == default
    assert list_of(users / "file", acl.DEFAULT) is None
    (users / "link").symlink_to("x")
    (users / "directory" / "deep").mkdir(0o700)
    assert list_of(users / "directory" / "deep", acl.DEFAULT) == default


def test_where_a_default_list_is_there_is_no_umask(
    users: Path, file_system: tuple[Engine, Mounted]
) -> None:
    set_list(users, a_list(0o777, THE_USER, mask=7), acl.DEFAULT)
    with_umask(0o077, lambda: (users / "file").touch(0o666))
    # pyfuse3 alone lets the kernel apply the umask, which knows of no default list.
    is_native = file_system[0].name == "native"
    assert mode_of(users / "file") == (0o666 if is_native else 0o600)


def test_only_directories_have_a_default_list(users: Path) -> None:
    (users / "file").touch()
    with fails_with(errno.EACCES):
        set_list(users / "file", a_list(0o777), acl.DEFAULT)


def test_a_list_set_by_who_is_not_in_the_group_takes_setgid_away(users: Path) -> None:
    path = users / "file"
    as_user(path.touch)
    os.chown(path, NOBODY, GROUP)
    path.chmod(0o2755)
    as_user(lambda: set_list(path, a_list(0o755, THE_USER, mask=7)), groups=(GROUP,))
    assert mode_of(path) == 0o2775
    as_user(lambda: set_list(path, a_list(0o755, THE_USER, mask=5)))
    assert mode_of(path) == 0o755


@needs_acl
def test_setfacl_and_getfacl_agree_with_themselves(users: Path) -> None:
    source, target = users / "source", users / "target"
    source.mkdir()
    target.mkdir()
    done = run_command(
        "setfacl", "-m", f"u:{NOBODY}:rwx,g:{GROUP}:r-x,d:u:{OTHER_USER}:rw,d:m::rwx", source
    )
    assert done.code == 0, done.err
    shown = run_command("getfacl", "--absolute-names", "--numeric", "--omit-header", source)
    assert f"user:{NOBODY}:rwx" in shown.out
    assert f"default:user:{OTHER_USER}:rw-" in shown.out
    (users / "list").write_text(shown.out)
    restored = run_command("setfacl", f"--set-file={users / 'list'}", target)
    assert restored.code == 0, restored.err
    again = run_command("getfacl", "--absolute-names", "--numeric", "--omit-header", target)
    assert again.out == shown.out
    assert run_command("setfacl", "-b", target).code == 0
    assert os.listxattr(target) == []
