"""What takes set-user-ID and set-group-ID away, and from whom, beside ext4."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Engine, PoolMaker, may_pass
from kit.posix import mode_of, opened
from kit.users import NOBODY, OTHER_USER, as_user

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="not root")]

GROUP = 12345
CAP_FSETID = 4
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)

MODES = [0o777, 0o2777, 0o2767, 0o2666, 0o4777, 0o4666, 0o6777, 0o6767, 0o6666]
"""Everybody may write; set-group-ID with and without execution by the group."""


def write(path: Path) -> None:
    with opened(path) as fd:
        os.pwrite(fd, b"x", 0)


def write_much(path: Path) -> None:
    with opened(path) as fd:
        for _ in range(3):
            os.pwrite(fd, bytes(100_000), 0)


def store_mapped(path: Path) -> None:
    with opened(path) as fd, mmap.mmap(fd, 4096) as view:
        view[:] = b"m" * 4096
        view.flush()


def truncate_open(path: Path) -> None:
    with opened(path) as fd:
        os.ftruncate(fd, 10)


def allocate(path: Path) -> None:
    with opened(path) as fd:
        os.posix_fallocate(fd, 0, 100_000)


def copy(path: Path) -> None:
    with opened(path) as fd, opened(path.parent / "source", os.O_RDONLY) as source:
        os.copy_file_range(source, fd, 100)


ACTIONS: dict[str, Callable[[Path], object]] = {
    "write": write,
    "write much": write_much,
    "mapped": store_mapped,
    "truncate": lambda path: os.truncate(path, 10),
    "ftruncate": truncate_open,
    "same size": lambda path: os.truncate(path, 4096),
    "O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "chown to nobody": lambda path: os.chown(path, -1, -1),
    "chown to the group": lambda path: os.chown(path, -1, GROUP),
    "chown to the user": lambda path: os.chown(path, NOBODY, -1),
    "chgrp to one's own": lambda path: os.chown(path, -1, os.getegid()),
    "chmod": lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode)),
}
NATIVE_ACTIONS = {"allocate": allocate, "copy": copy}


def without_fsetid(action: Callable[[], object]) -> object:
    """Let a root who has not this capability do something, in a process that ends with it."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    all_but = (1 << 40) - 1 & ~(1 << CAP_FSETID)
    low, high = all_but & 0xFFFFFFFF, all_but >> 32
    _libc.capset(header, struct.pack("<6I", low, low, 0, high, high, 0))
    return action()


WHO: dict[str, Callable[[Callable[[], object]], object]] = {
    "owner": lambda action: as_user(action, NOBODY, 1000),
    "owner in the group": lambda action: as_user(action, NOBODY, 1000, groups=(GROUP,)),
    "owner whose group it is": lambda action: as_user(action, NOBODY, GROUP),
    "member": lambda action: as_user(action, OTHER_USER, groups=(7, GROUP, 8)),
    "other": lambda action: as_user(action, OTHER_USER),
    "root": lambda action: as_user(action, 0),
    "root in the group, without CAP_FSETID": lambda action: as_user(
        lambda: without_fsetid(action), 0, GROUP
    ),
    "root without CAP_FSETID": lambda action: as_user(lambda: without_fsetid(action), 0),
}


def table(directory: Path, who: str, actions: dict[str, Callable[[Path], object]]) -> dict[
    tuple[str, str], str
]:  # fmt: skip
    """The mode after each action, or the error, by the action and the mode before."""
    (directory / "source").write_bytes(b"s" * 4096)
    (directory / "source").chmod(0o666)
    paths = {
        (name, f"{mode:o}"): directory / f"{name}-{mode:o}" for name in actions for mode in MODES
    }
    for (_, mode), path in paths.items():
        path.write_bytes(bytes(4096))
        os.chown(path, NOBODY, GROUP)
        path.chmod(int(mode, 8))

    def attempt() -> dict[tuple[str, str], str]:
        errors = {}
        for (name, mode), path in paths.items():
            try:
                actions[name](path)
            except OSError as error:
                errors[name, mode] = error.strerror
        return errors

    errors = WHO[who](attempt)
    assert isinstance(errors, dict)
    found = {key: errors.get(key, f"{mode_of(path):o}") for key, path in paths.items()}
    for path in [*paths.values(), directory / "source"]:
        path.unlink()
    return found


@contextmanager
def ext4(place: Path) -> Iterator[Path]:
    image, directory = place / "ext4", place / "ext4-mounted"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    directory.mkdir()
    assert run_command("mkfs.ext4", "-q", "-F", image).code == 0
    done = run_command("mount", "-o", "loop", image, directory)
    assert done.code == 0, done.err
    try:
        directory.chmod(0o777)
        yield directory
    finally:
        run_command("umount", directory)


def is_not_told(who: str, action: str) -> bool:
    """A chown(2) that names nobody, by who may not, comes as a request that asks for nothing."""
    return action == "chown to nobody" and who in ("member", "other")


@pytest.mark.parametrize("options", ["allow_other", "allow_other,cached"])
def test_privileges_go_as_on_ext4(pools: PoolMaker, engine: Engine, options: str) -> None:
    may_pass(pools)
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"), "-o", options)
    mounted.mountpoint.chmod(0o777)
    is_native = engine.name == "native"
    actions = {**ACTIONS, **(NATIVE_ACTIONS if is_native else {})}
    different = []
    with ext4(pools.directory) as reference:
        for who in WHO:
            wanted = table(reference, who, actions)
            found = table(mounted.mountpoint, who, actions)
            different += [
                f"{who}, {action} of {mode}: {found[action, mode]}, ext4 {after}"
                for (action, mode), after in wanted.items()
                if found[action, mode] != after and not is_not_told(who, action)
            ]
    if not is_native:
        # pyfuse3 tells of a write neither who writes nor whether it comes from a mapping.
        different = [
            line for line in different if "mapped" not in line and "CAP_FSETID" not in line
        ]
    assert different == []
