"""What a program sees of an encrypted directory when its key is locked and unlocked: through the
mount, with all that the kernel has kept."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_here, refused, run_command
from kit.fs_mounts import create_fs
from kit.keys import add_key, encrypted
from kit.mounts import ENGINES, Engine, Mounted, pool_maker
from kit.posix import opened

pytestmark = [pytest.mark.mount]

SECRET = b"what nobody else may read " * 1000
NAME = "a telling name"


class Rig:
    """A mount with a key that is unlocked, and a directory of the test's own."""

    def __init__(self, mounted: Mounted, key_file: Path, directory: Path) -> None:
        self.mounted, self.key_file, self.directory = mounted, key_file, directory

    def lock(self) -> None:
        pmemfs_here("lock", self.directory)

    def unlock(self) -> None:
        pmemfs_here("unlock", self.directory, "--key-file", self.key_file)


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def keyed(request: pytest.FixtureRequest) -> Iterator[tuple[Mounted, Path]]:
    engine = request.param
    assert isinstance(engine, Engine)
    with pool_maker(engine) as maker:
        mounted = maker.mount(create_fs(maker, "fs0", "64M"))
        yield mounted, add_key(mounted)


@pytest.fixture
def rig(keyed: tuple[Mounted, Path], request: pytest.FixtureRequest) -> Iterator[Rig]:
    mounted, key_file = keyed
    pmemfs("unlock", mounted.mountpoint, "--key", "work", "--key-file", key_file)
    directory = encrypted(mounted, f"d{abs(hash(request.node.name))}")
    yield Rig(mounted, key_file, directory)
    run_command("rm", "-r", directory)


@contextmanager
def refusing(number: int) -> Iterator[None]:
    with pytest.raises(OSError, match=r".") as raised:
        yield
    assert raised.value.errno == number


def test_names_are_encoded_while_the_key_is_locked_and_in_the_clear_again_afterwards(
    rig: Rig,
) -> None:
    (rig.directory / NAME).write_bytes(SECRET)
    (rig.directory / "below").mkdir()
    (rig.directory / "below" / NAME).write_bytes(b"deep")
    before = {path: path.lstat() for path in sorted(rig.directory.rglob("*"))}
    rig.lock()
    for path in before:
        with refusing(errno.ENOENT):
            path.lstat()
    locked = sorted(rig.directory.rglob("*"))
    assert len(locked) == len(before)
    assert not {path.name for path in locked} & {NAME, "below"}
    inodes = {path.lstat().st_ino: path.lstat().st_size for path in locked}
    assert inodes == {seen.st_ino: seen.st_size for seen in before.values()}
    for path in locked:
        if path.is_file():
            with refusing(errno.ENOKEY):
                path.open("rb")
    rig.unlock()
    for path in locked:
        with refusing(errno.ENOENT):
            path.lstat()
    assert sorted(rig.directory.rglob("*")) == sorted(before)
    assert (rig.directory / NAME).read_bytes() == SECRET
    assert (rig.directory / "below" / NAME).read_bytes() == b"deep"


def test_a_name_that_was_not_there_while_it_was_locked_is_there_when_it_is_unlocked(
    rig: Rig,
) -> None:
    (rig.directory / NAME).write_bytes(SECRET)
    rig.lock()
    (encoded,) = os.listdir(rig.directory)
    assert not (rig.directory / NAME).exists()
    rig.unlock()
    assert (rig.directory / NAME).exists()
    assert not (rig.directory / encoded).exists()
    rig.lock()
    assert (rig.directory / encoded).exists()


def test_an_open_directory_and_one_that_a_process_is_in_show_what_is_true_now(rig: Rig) -> None:
    below = rig.directory / "below"
    below.mkdir()
    for number in range(50):
        (below / f"file {number}").touch()
    code = ("import os, sys\n"
            "for line in sys.stdin: print(len(os.listdir('.')), *sorted(os.listdir('.'))[:1],"
            " os.path.exists('file 7'), flush=True)")  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=below, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as inside, opened(below, os.O_RDONLY | os.O_DIRECTORY) as fd:  # fmt: skip
        assert inside.stdin
        assert inside.stdout

        def asked() -> str:
            inside.stdin.write("\n")
            inside.stdin.flush()
            return inside.stdout.readline()

        assert asked() == "50 file 0 True\n"
        plain = set(os.listdir(fd))
        rig.lock()
        said = asked().split()
        assert (said[0], said[-1]) == ("50", "False")
        assert not plain & set(os.listdir(fd))
        assert os.fstat(fd).st_nlink == 2
        rig.unlock()
        assert asked() == "50 file 0 True\n"
        assert set(os.listdir(fd)) == plain
        inside.stdin.close()


def test_pages_that_the_kernel_has_kept_are_gone_and_are_read_again(rig: Rig) -> None:
    path = rig.directory / "cached"
    path.touch()
    os.setxattr(path, "user.pmemfs.cached", b"1")
    path.write_bytes(SECRET)
    with opened(path) as fd, mmap.mmap(fd, 0) as mapped:
        mapped[:6] = b"Mapped"
    # The kernel drops pages itself if the time of the last change is another one than it knew.
    for _ in range(2):
        os.stat(path)
        with opened(path) as fd, mmap.mmap(fd, 0) as mapped:
            assert mapped[:] == b"Mapped" + SECRET[6:]
            assert all(resident(mapped))
    # It keeps the inode in memory, and with it pages that nothing else has had forgotten.
    with opened(path, os.O_PATH) as anchor:
        rig.lock()
        (encoded,) = rig.directory.iterdir()
        with refusing(errno.ENOKEY):
            encoded.read_bytes()
        with refusing(errno.ENOKEY):
            os.open(f"/proc/self/fd/{anchor}", os.O_RDONLY)
        rig.unlock()
        fd = os.open(f"/proc/self/fd/{anchor}", os.O_RDWR)
    with open(fd, "r+b"), mmap.mmap(fd, 0) as mapped:
        assert not any(resident(mapped))
        assert mapped[:] == b"Mapped" + SECRET[6:]


def resident(mapped: mmap.mmap) -> list[int]:
    """For each page of a mapping, whether it is in the page cache. Source: mincore(2)."""
    import ctypes

    count = -(-len(mapped) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), len(mapped), found)
    return [page & 1 for page in found]


def test_a_link_leads_nowhere_while_its_key_is_locked(rig: Rig) -> None:
    link = rig.directory / "link"
    link.symlink_to("a telling target")
    assert os.readlink(link) == "a telling target"
    rig.lock()
    (encoded,) = rig.directory.iterdir()
    assert encoded.is_symlink()
    assert encoded.lstat().st_size == len("a telling target")
    with refusing(errno.ENOKEY):
        os.readlink(encoded)
    rig.unlock()
    assert os.readlink(link) == "a telling target"


def test_user_attributes_are_hidden_while_the_key_is_locked(rig: Rig) -> None:
    path = rig.directory / NAME
    path.touch()
    os.setxattr(path, "user.telling", b"value")
    rig.lock()
    (encoded,) = rig.directory.iterdir()
    assert "user.telling" not in os.listxattr(encoded)
    with refusing(errno.ENOKEY):
        os.getxattr(encoded, "user.telling")
    with refusing(errno.ENOKEY):
        os.setxattr(encoded, "user.other", b"value")
    rig.unlock()
    assert os.getxattr(path, "user.telling") == b"value"


def test_a_locked_directory_takes_nothing_new_and_can_be_removed(rig: Rig) -> None:
    (rig.directory / "below").mkdir()
    (rig.directory / "below" / NAME).write_bytes(SECRET)
    rig.lock()
    with refusing(errno.ENOKEY):
        (rig.directory / "new").touch()
    with refusing(errno.ENOKEY):
        (rig.directory / "new").mkdir()
    (below,) = rig.directory.iterdir()
    (encoded,) = below.iterdir()
    with refusing(errno.ENOKEY):
        os.truncate(encoded, 0)
    with refusing(errno.ENOKEY):
        encoded.rename(below / "other")
    encoded.unlink()
    below.rmdir()
    assert list(rig.directory.iterdir()) == []


@pytest.mark.parametrize("how", ["open", "mapped", "inherited"])
def test_an_open_file_holds_a_lock_up_and_is_named_with_its_process(rig: Rig, how: str) -> None:
    path = rig.directory / NAME
    path.touch()
    # With the python engine only such a file can be mapped.
    os.setxattr(path, "user.pmemfs.cached", b"1")
    path.write_bytes(SECRET)
    code = {
        "open": "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY)",
        "mapped": "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); "
                  "kept = mmap.mmap(fd, 0); os.close(fd)",
        # Once nobody has the other end of the pipe, the parent has the file no more.
        "inherited": "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); ends = os.pipe()\n"
                     "if os.fork(): os._exit(0)\n"
                     "os.close(ends[1]); os.read(ends[0], 1)",
    }[how]  # fmt: skip
    code += "; " if how != "inherited" else "\n"
    code += "print(os.getpid(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        pid = holder.stdout.readline().strip()
        said = refused(pmemfs("lock", rig.directory), 16, str(path), f"process {pid} has open")
        assert "'work'" in said
        # Nothing has changed for anybody.
        assert path.read_bytes() == SECRET
        assert holder.stdin
        holder.stdin.close()
        holder.stdout.read()
    rig.lock()
    assert not path.exists()


def test_a_file_that_was_just_closed_does_not_hold_a_lock_up(rig: Rig) -> None:
    path = rig.directory / NAME
    for number in range(10):
        path.write_bytes(b"%d" % number)
        rig.lock()
        rig.unlock()
        assert path.read_bytes() == b"%d" % number


def test_files_of_another_key_stay_open_and_readable(rig: Rig, tmp_path: Path) -> None:
    other_file = tmp_path / "other.key"
    other_file.write_bytes(os.urandom(64))
    name = f"other{os.urandom(4).hex()}"
    pmemfs_here("key", "add", rig.mounted.mountpoint, "--name", name, "--key-file", other_file)
    other = encrypted(rig.mounted, name, name)
    (rig.directory / NAME).write_bytes(SECRET)
    (other / NAME).write_bytes(b"other" * 100000)
    with opened(other / NAME) as fd:
        assert os.pread(fd, 5, 5) == b"other"
        rig.lock()
        assert os.pread(fd, 5, 5) == b"other"
        os.pwrite(fd, b"OTHER", 5)
    assert (other / NAME).read_bytes() == b"otherOTHER" + b"other" * 99998
    assert "is locked already" in pmemfs_here("lock", rig.directory)
    pmemfs_here("lock", other)
    run_command("rm", "-r", other)
