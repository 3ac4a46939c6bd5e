"""A mount namespace in which every user may run pmemfs and mount, as on most machines."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kit.commands import BIN, Result, run_command
from kit.mounts import PoolMaker, may_pass
from kit.processes import end_process, wait_until
from kit.users import AS_NOBODY, NOBODY

Run = Callable[..., Result]
"""Runs a command, word by word."""


@contextmanager
def mount_namespace(pools: PoolMaker, *, shows_our_python: bool = True) -> Iterator[Run]:
    """Run commands as root in a mount namespace that goes with the test, and lets users mount.

    An ordinary user has a home there: `home` in the maker's directory. That users may run the
    Python of these tests can hide root's home from root.
    """
    if shutil.which("fusermount3") is None:
        pytest.skip("there is no fusermount3 here")
    if shows_our_python and hidden_ancestor(BIN.resolve()):
        pytest.skip(f"other users may not pass {hidden_ancestor(BIN.resolve())}")
    may_pass(pools)
    home = pools.directory / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    ready = pools.directory / "ready"
    with ExitStack() as stack:
        with nobody_copies_mounts():
            commands = _preparation(pools.directory, shows_our_python)
            pid = stack.enter_context(new_namespace(commands, ready))

        def run(*words: object) -> Result:
            return run_command("nsenter", "--target", pid, "--mount", "--", *words)

        yield run


@contextmanager
def new_namespace(commands: str, ready: Path) -> Iterator[int]:
    """A process in a mount namespace that begins as a copy of ours and is private, where the shell
    has run these commands. Then the file `ready` is there."""
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c",
         f"{commands}\ntouch {ready}\nexec sleep 600"]
    )  # fmt: skip
    try:
        wait_until(lambda: ready.exists() or holder.poll() is not None, "the namespace is there")
        assert holder.poll() is None
        yield holder.pid
    finally:
        end_process(holder.pid, seconds=0)
        holder.wait()
        ready.unlink(missing_ok=True)


@contextmanager
def nobody_copies_mounts() -> Iterator[int]:
    """Meanwhile no other process that runs tests makes a mount namespace.

    A new one has copies of all mounts. Until it has let go of them, those mounts do not end, and
    commands say that it has them. The result is the descriptor of the lock, for a command that
    unlocks it as soon as that is done. Not to be nested: it would wait for itself.
    """
    # Any file that all processes of a run have will do.
    lock = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        # A child that was forked meanwhile may have a copy of the descriptor.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def let_go_of_others(directory: Path) -> str:
    """Shell commands for a new mount namespace: it lets go of the mounts of all other tests, and of
    what they have mounted on files there.

    Else their copies here would keep those mounts from ending.
    """
    return (
        r"grep -E ' - fuse\.pmemfs |^([^ ]+ ){4}[^ ]*/(pmemfs-test-|pytest-of-)' "
        "/proc/self/mountinfo | cut -d' ' -f5 | "
        f"grep -v '^{directory}/' | while read -r there; do "
        'umount --lazy "$(printf %b "$there")" || :; done'
    )


def as_ordinary_user(run: Run, home: Path) -> Run:
    """Run commands as the ordinary user whose home that is."""

    def run_as_nobody(*words: object) -> Result:
        return run(*AS_NOBODY, "env", f"HOME={home}", f"XDG_RUNTIME_DIR={home}", *words)

    return run_as_nobody


def hidden_ancestor(path: Path) -> Path | None:
    """The first directory on the way to `path` that others may not pass."""
    for parent in reversed(path.parents):
        if not parent.stat().st_mode & 0o001:
            return parent
    return None


def _preparation(directory: Path, shows_our_python: bool) -> str:
    """Shell commands that give a mount namespace what most machines give to every user."""
    commands = ["set -e", let_go_of_others(directory)]
    prefix = Path(sys.base_prefix)
    hidden = hidden_ancestor(prefix)
    if hidden and shows_our_python:
        # An interpreter in root's home.
        commands += [
            f"mkdir {directory}/python",
            f"mount --bind {prefix} {directory}/python",
            f"mount -t tmpfs -o mode=755 none {hidden}",
            f"mkdir -p {prefix}",
            f"mount --bind {directory}/python {prefix}",
            f"umount {directory}/python",
        ]
    if os.stat("/dev/fuse").st_mode & 0o666 != 0o666:
        # A /dev that no udev has looked after.
        commands += [
            f"mkdir {directory}/dev",
            f"mount -t tmpfs -o mode=755 none {directory}/dev",
            f"mknod -m 666 {directory}/dev/fuse c 10 229",
            f"mount --bind {directory}/dev/fuse /dev/fuse",
        ]
    return "\n".join(commands)
