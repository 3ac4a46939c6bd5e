"""Times of access, by the options of the mount, beside those of tmpfs."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from kit.mounts import Engine, PoolMaker
from kit.posix import next_tick, opened
from kit.sources import mounted_tmpfs

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="not root")]

HOUR_NS = 3600 * 10**9
PROGRAM = shutil.which("true") or "/bin/true"


def read(path: Path, flags: int = 0) -> None:
    with opened(path, os.O_RDONLY | flags) as fd:
        os.read(fd, 10)


def read_behind_the_end(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd:
        os.pread(fd, 10, 1 << 30)


def private_mapping(fd: int) -> mmap.mmap:
    """The python engine has no others."""
    return mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def read_mapped(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd, private_mapping(fd) as view:
        assert len(view[:]) == 4096


def copy(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd, opened(path.parent / "target") as target:
        os.copy_file_range(fd, target, 100)


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Nothing happens to a file here."""
    yield


@contextmanager
def served_natively(path: Path) -> Iterator[None]:
    """A file that is read in pieces, so that the data plane comes to serve it."""
    with opened(path, os.O_RDONLY | os.O_NOATIME) as fd:
        for at in range(3):
            os.pread(fd, 100, at)
        yield


Use = Callable[[Path], AbstractContextManager[None]]

ACTIONS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "read": ("file", read),
    "read behind the end": ("file", read_behind_the_end),
    "read without a trace": ("file", lambda path: read(path, os.O_NOATIME)),
    "read a mapping": ("file", read_mapped),
    "copy": ("file", copy),
    "execute": ("file", lambda path: subprocess.run([path], check=True)),
    "look at a file": ("file", lambda path: (path.stat(), os.listxattr(path))),
    "list": ("directory", os.listdir),
    "walk through": ("directory", lambda path: (path / "inside").stat()),
    "look at a directory": ("directory", os.stat),
    "read a link": ("link", os.readlink),
    "follow a link": ("link", os.stat),
    "look at a link": ("link", os.lstat),
}


Found = dict[tuple[str, str], bool]
"""Whether each action, in each state, changes a time of access."""


def made_for(action: str, root: Path) -> Path:
    """What an action is done to, whose times are an hour old."""
    kind, _ = ACTIONS[action]
    path = root / f"{kind} to {action}"
    if kind == "file":
        shutil.copy(PROGRAM, path)
    elif kind == "directory":
        path.mkdir()
        (path / "inside").touch()
    else:
        path.symlink_to(root / "target")
    earlier_ns = time.time_ns() - HOUR_NS
    os.utime(path, ns=(earlier_ns, earlier_ns), follow_symlinks=False)
    return path


def tables(roots: list[Path], use: Use, *, has_copies: bool) -> list[Found]:
    """What each action does: once after a change, once again, and once after another change.

    Everything waits for the clock at the same time.
    """
    found: list[Found] = [{} for _ in roots]
    with ExitStack() as in_use_meanwhile:
        paths: list[tuple[Found, str, Path]] = []
        for root, here in zip(roots, found, strict=True):
            root.mkdir()
            (root / "target").write_bytes(b"")
            for action in ACTIONS:
                if action != "copy" or has_copies:
                    paths.append((here, action, made_for(action, root)))
        next_tick()
        for _, action, path in paths:
            if ACTIONS[action][0] == "file":
                in_use_meanwhile.enter_context(use(path))
        for state in ("after a change", "again", "after chmod"):
            if state == "after chmod":
                for _, action, path in paths:
                    if ACTIONS[action][0] != "link":
                        path.chmod(0o700)
                next_tick()
            for here, action, path in paths:
                before = path.lstat().st_atime_ns
                ACTIONS[action][1](path)
                here[action, state] = path.lstat().st_atime_ns != before
            next_tick()
    return found


@pytest.mark.parametrize(
    "options",
    ["relatime", "strictatime", "noatime", "nodiratime", "strictatime,nodiratime"],
)
def test_times_of_access_are_as_the_mount_says(
    pools: PoolMaker, engine: Engine, options: str
) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool, "-o", options)
    uses: dict[str, Use] = {"new": in_use, "served natively": served_natively}
    with mounted_tmpfs(pools.directory / "tmpfs", options) as reference:
        for how, use in uses.items():
            places = [directory / how for directory in (reference, mounted.mountpoint)]
            wanted, found = tables(places, use, has_copies=engine.name == "native")
            different = {key: value for key, value in wanted.items() if found[key] != value}
            assert different == {}, how
    is_due = options != "noatime"
    assert wanted["read", "after a change"] == is_due
    assert wanted["read", "again"] == ("strictatime" in options)


def test_a_time_of_access_stays_over_a_remount(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    paths = [mounted.mountpoint / name for name in ("file", "directory", "link")]
    paths[0].write_bytes(bytes(100_000))
    paths[1].mkdir()
    paths[2].symlink_to("file")
    for path in paths:
        os.utime(path, ns=(1, 2), follow_symlinks=False)
    next_tick()
    with served_natively(paths[0]):
        read(paths[0])
    os.listdir(paths[1])
    paths[2].readlink()
    before = [path.lstat().st_atime_ns for path in paths]
    assert min(before) > HOUR_NS
    pools.umount(mounted)
    pools.mount(mounted.pool)
    assert [path.lstat().st_atime_ns for path in paths] == before
    os.utime(paths[0], ns=(5, 6))
    assert paths[0].stat().st_atime_ns == 5
    pools.umount(mounted)
    pools.mount(mounted.pool)
    assert paths[0].stat().st_atime_ns == 5


def test_a_mount_that_is_read_only_notes_no_access(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    path = mounted.mountpoint / "file"
    path.write_bytes(b"content")
    pools.umount(mounted)
    content = mounted.pool.read_bytes()
    pools.mount(mounted.pool, "-o", "ro,strictatime")
    before = path.stat().st_atime_ns
    with served_natively(path):
        read(path)
        os.listdir(mounted.mountpoint)
        assert path.stat().st_atime_ns == before
    pools.umount(mounted)
    assert mounted.pool.read_bytes() == content
