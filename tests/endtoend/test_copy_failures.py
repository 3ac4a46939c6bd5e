"""What stands in the way of `pmemfs copy`: it goes round about and says why, or leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_here, refused, run_command
from kit.mounts import UNKEPT, Engine, Mounted, PoolMaker, may_pass, pool_maker
from kit.processes import is_running, stop, wait_until
from kit.users import NOBODY, acting_as
from pmemfs.client.filecopy import Manner, copy_file
from pmemfs.errors import DaemonGone, NoPageStructures, NotDirect, NotPermitted
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

PLAIN, INSISTING = Manner(), Manner(insists_on_pages=True)
INODES_BYTES = 4 * FRAME_BYTES
"""What the table of inodes may have grown by: every now and then a new file needs a frame there,
which stays."""


def mounted_files(pools: PoolMaker, size: str = "192M", *, options: str = "") -> Mounted:
    """A small file system, which other users may use.

    Frames that a killed copy has lost rest for half a minute, so there is room for some of those.
    """
    may_pass(pools)
    mounted = pools.mount(
        pools.create("files", size, "--mode", "fs"), "-o", f"allow_other{options}", *UNKEPT
    )
    mounted.mountpoint.chmod(0o777)
    return mounted


@pytest.fixture(scope="module")
def shared() -> Iterator[Mounted]:
    """A file system for those tests that leave it as it was."""
    with pool_maker(Engine("native")) as pools:
        yield mounted_files(pools)


@pytest.fixture
def files(shared: Mounted) -> Iterator[Mounted]:
    """The same, empty before and after each test."""
    yield shared
    for path in shared.mountpoint.iterdir():
        path.unlink()


@pytest.fixture
def own_files(pools: PoolMaker) -> Mounted:
    """A file system for one test."""
    return mounted_files(pools)


@pytest.fixture
def passable(shm: Path) -> Path:
    """A directory that other users may write to."""
    shm.chmod(0o777)
    return shm


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file on a disk."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(20 * MIB + 99))
    return path


def free_bytes(mounted: Mounted) -> int:
    room = os.statvfs(mounted.mountpoint)
    return room.f_bfree * room.f_frsize


def assert_bounced(source: Path, target: Path, *words: str) -> None:
    """A copy goes through a buffer and says why; it is refused if the user insists on pages."""
    with pytest.raises(NotDirect) as caught:
        copy_file(str(source), str(target), INSISTING)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not target.exists()
    copied = copy_file(str(source), str(target), PLAIN)
    assert copied is not None
    assert copied.path == "bounce"
    for word in words:
        assert word in copied.why
        assert word in str(caught.value)
    assert target.read_bytes() == source.read_bytes()


# The bounce path


def test_a_pool_without_page_structures_takes_a_buffer(
    pools: PoolMaker, source: Path, tmp_path: Path
) -> None:
    mounted = pools.mount(pools.create("none", "64M", "--mode", "fs", "--scheme", "none"))
    inside = mounted.mountpoint / "inside"
    why = str(NoPageStructures(what="a pin"))
    assert_bounced(source, inside, why)
    assert_bounced(inside, tmp_path / "back", why)
    said = refused(pmemfs("copy", "--direct", source, mounted.mountpoint / "x"), 1, why)
    assert "without --direct" in said
    assert os.listdir(mounted.mountpoint) == ["inside"]


@contextmanager
def ramfs(directory: Path) -> Iterator[Path]:
    """A file system without O_DIRECT."""
    directory.mkdir()
    assert run_command("mount", "-t", "ramfs", "ramfs", directory).code == 0
    try:
        yield directory
    finally:
        assert run_command("umount", directory).code == 0


def test_a_file_system_without_direct_io_takes_its_page_cache(
    files: Mounted, source: Path, tmp_path: Path
) -> None:
    with ramfs(tmp_path / "ramfs") as outside:
        (outside / "source").write_bytes(source.read_bytes())
        inside = files.mountpoint / "inside"
        assert_bounced(outside / "source", inside, "no O_DIRECT on ramfs")
        assert_bounced(inside, outside / "back", "no O_DIRECT on ramfs")


def test_another_users_mount_takes_a_buffer(files: Mounted, source: Path, passable: Path) -> None:
    source = Path(shutil.copy(source, passable))
    with acting_as(NOBODY):
        inside = files.mountpoint / "inside"
        why = str(NotPermitted(path=files.mountpoint, uid=0))
        assert_bounced(source, inside, why)
        assert inside.stat().st_uid == NOBODY


def test_who_may_not_write_to_a_file_replaces_it_only_by_force(
    files: Mounted, source: Path, passable: Path
) -> None:
    source = Path(shutil.copy(source, passable))
    inside = files.mountpoint / "inside"
    with acting_as(NOBODY):
        inside.write_bytes(b"old")
        inside.chmod(0o444)
        with pytest.raises(PermissionError) as caught:
            copy_file(str(source), str(inside), PLAIN)
        assert caught.value.filename == str(inside)
        assert inside.read_bytes() == b"old"
        assert copy_file(str(source), str(inside), Manner(is_forced=True))
        assert inside.read_bytes() == source.read_bytes()
        assert inside.stat().st_mode & 0o777 == 0o444


def test_a_read_only_mount_is_a_source_and_no_target(
    pools: PoolMaker, own_files: Mounted, source: Path, tmp_path: Path
) -> None:
    inside = own_files.mountpoint / "inside"
    pmemfs_here("copy", source, inside)
    pools.umount(own_files)
    pools.mount(own_files.pool, "-o", "ro")
    pmemfs_here("copy", "--direct", inside, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    for target in (inside, own_files.mountpoint / "new"):
        refused(pmemfs("copy", source, target), 1, "read-only file system")


# What fails half way


def test_a_full_pool_says_so_and_has_its_room_back(pools: PoolMaker, source: Path) -> None:
    files = mounted_files(pools, "64M")
    old = files.mountpoint / "old"
    old.write_bytes(b"old")
    free = free_bytes(files)
    with source.open("r+b") as file:
        for at in range(0, 80, 10):
            file.seek(at * MIB)
            file.write(os.urandom(10 * MIB))
    for target in (old, files.mountpoint / "new"):
        said = refused(pmemfs("copy", source, target), 1, "no space left on device")
        assert str(target) in said
    assert os.listdir(files.mountpoint) == ["old"]
    assert old.read_bytes() == b"old"
    wait_until(lambda: free_bytes(files) >= free - INODES_BYTES, "the room is free again")


@pytest.mark.parametrize("is_inside", [True, False], ids=["into", "out of"])
def test_a_source_that_shrinks_is_copied_as_far_as_it_goes(
    files: Mounted, source: Path, tmp_path: Path, is_inside: bool
) -> None:
    content = source.read_bytes()
    target = files.mountpoint / "target"
    if not is_inside:
        pmemfs_here("copy", source, files.mountpoint)
        source, target = files.mountpoint / "source", tmp_path / "target"
    with source.open("ab") as file:
        # Beyond what is pinned at a time: what is pinned stays whatever becomes of the file.
        file.truncate(30 * MIB)
        file.seek(200 * MIB)
        file.write(b"end")

    def shrink(done: int, total: int) -> None:
        if source.stat().st_size == total:
            os.truncate(source, 17 * MIB + 5)

    copied = copy_file(str(source), str(target), PLAIN, shrink)
    assert copied is not None
    size_bytes = target.stat().st_size
    assert copied.size_bytes == size_bytes >= 17 * MIB + 5
    assert target.read_bytes()[: 17 * MIB + 5] == content[: 17 * MIB + 5]
    assert size_bytes < 200 * MIB


@pytest.mark.parametrize("options", [",names_memory=0", ""], ids=["content", "inode"])
def test_memory_that_is_gone_is_an_error_and_no_file(
    pools: PoolMaker, source: Path, tmp_path: Path, options: str
) -> None:
    # Workers take frames ahead, so the inode lies behind the data, and is gone, too.
    own_files = mounted_files(pools, options=options)
    inside = own_files.mountpoint / "inside"
    pmemfs_here("copy", source, inside)
    extents = json.loads(pmemfs_here("extents", inside, "--json"))["extents"]
    os.truncate(own_files.pool, int(extents[-1]["pfn"]) * FRAME_BYTES)
    said = refused(pmemfs("copy", inside, tmp_path / "back"), 1, "input/output error")
    assert str(inside) in said
    assert not (tmp_path / "back").exists()


def test_the_daemons_end_is_one_sentence_and_no_file(
    own_files: Mounted, source: Path, tmp_path: Path
) -> None:
    pmemfs_here("copy", source, own_files.mountpoint)
    pid = own_files.pid

    def kill(done: int, total: int) -> None:
        if done < 17 * MIB and is_running(pid):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not os.path.exists(f"/proc/{pid}/exe"), "the daemon is dead")

    inside = own_files.mountpoint / "source"
    with pytest.raises((DaemonGone, OSError)):
        copy_file(str(source), str(inside.with_name("new")), PLAIN, kill)
    said = refused(pmemfs("copy", source, inside), 1)
    assert str(own_files.mountpoint) in said


# Signals


@contextmanager
def stopped_copy(
    source: Path, target: Path, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """A copy that has begun to write, and stands still."""
    for _ in range(20):
        child = subprocess.Popen([BIN / "pmemfs", "copy", source, target], stderr=stderr, text=True)
        try:
            while child.poll() is None and not has_unnamed(child.pid, target.parent):
                pass
            if child.returncode is None:
                stop(child.pid)
            # It may have written all before we saw it, and may not have ended since.
            if child.poll() is None and not target.exists():
                yield child
                return
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        target.unlink()
    pytest.fail("the copy is always over before it is stopped")


def has_unnamed(pid: int, directory: Path) -> bool:
    """Whether a process has a file open that has no name yet."""
    try:
        files = os.listdir(f"/proc/{pid}/fd")
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in files]
    except OSError:
        return False
    return any(link.startswith(f"{directory}/") and "deleted" in link for link in links)


@pytest.mark.parametrize("is_inside", [True, False], ids=["into", "out of"])
def test_a_copy_that_is_killed_leaves_nothing(
    own_files: Mounted, source: Path, tmp_path: Path, is_inside: bool
) -> None:
    target = own_files.mountpoint / "target"
    if not is_inside:
        pmemfs_here("copy", source, own_files.mountpoint)
        (tmp_path / "out").mkdir()
        source, target = own_files.mountpoint / "source", tmp_path / "out/target"
    before = os.listdir(target.parent)
    with stopped_copy(source, target) as child:
        child.kill()
        child.wait()
    assert os.listdir(target.parent) == before
    pmemfs_here("copy", source, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_copy_that_is_interrupted_says_so_and_leaves_nothing(
    files: Mounted, source: Path
) -> None:
    free = free_bytes(files)
    with stopped_copy(source, files.mountpoint / "target") as child:
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGCONT)
        _, said = child.communicate(timeout=60)
        assert (child.returncode, said) == (130, "pmemfs: interrupted\n")
    assert os.listdir(files.mountpoint) == []
    wait_until(lambda: free_bytes(files) >= free - INODES_BYTES, "the room is free again")


# Where people look


def test_on_a_terminal_no_empty_line_stands_before_interrupted(
    files: Mounted, source: Path
) -> None:
    ours, theirs = pty.openpty()
    with stopped_copy(source, files.mountpoint / "target", theirs) as child:
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGCONT)
        assert child.wait(60) == 130
    os.close(theirs)
    shown = shown_on(ours)
    # What stands in the line goes: ^C, if it was the keyboard.
    assert shown.endswith("\r\x1b[Kpmemfs: interrupted\r\n")
    assert "\n\r\n" not in shown
    assert not shown.startswith("\r\n")


def on_a_terminal(*words: object) -> tuple[int, str]:
    """The exit code of a command, and what it shows on a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([str(word) for word in words], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = shown_on(ours)
    return child.wait(), shown


def shown_on(ours: int) -> str:
    """All that a terminal shows until nobody has it open any more."""
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return shown.decode()


def test_a_bar_is_shown_on_a_terminal_alone(files: Mounted, source: Path) -> None:
    code, shown = on_a_terminal(BIN / "pmemfs", "copy", source, files.mountpoint)
    assert (code, "100%" in shown, "copied in" in shown) == (0, True, True)
    code, shown = on_a_terminal(BIN / "pmemfs", "copy", "--quiet", source, files.mountpoint)
    assert (code, shown) == (0, "")
    result = pmemfs("copy", source, files.mountpoint)
    assert (result.code, result.err, "directly" in result.out) == (0, "", True)
