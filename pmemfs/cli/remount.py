"""Remounting: changing how a pool is mounted, which both the kernel and the daemon have to know.

Invariants:
- a daemon that does not answer is noticed before the kernel is asked, since what the kernel does
  may wait for it; and the kernel is asked by another process, which can be left alone;
- to read-only the kernel goes first, and to writable the daemon does. So whatever happens in
  between, the pool is dirty while anybody may write to it;
- what fails is undone on the side that went first;
- one remount ends before the next one looks at anything.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from pmemfs.cli.find import ask
from pmemfs.control.places import private_directories
from pmemfs.errors import BadUsage, PmemfsError, RemountFailed
from pmemfs.media.label import Mode
from pmemfs.mount.flags import set_flags
from pmemfs.mount.mountpoint import resolve, run_patiently
from pmemfs.mount.options import TRANSPORTS, MountOptions
from pmemfs.mountinfo import Mount, mount_at
from pmemfs.observe.answers import MountStatus, Remounted

_LOOK_SECONDS = 5
_DAEMON_SECONDS = 60
_KERNEL_SECONDS = 60
_ALONE_SECONDS = 150
"""Longer than a remount may wait for the daemon and the kernel together."""
_POLL_SECONDS = 0.02

_PLACE = ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow")
"""Flags that the kernel keeps for each place where something is mounted."""
_SHARED = ("sync", "dirsync")
"""Flags that it keeps of the file system, wherever that is mounted."""


def remount(pool: str | None, mountpoint: str, words: Sequence[str]) -> None:
    """Change how the mount on a directory is mounted, as far as some words of `-o` say.

    What is said by no word stays as it is. Raises PmemfsError, and then nothing has changed.
    """
    with _alone(_require(pool, mountpoint)):
        # Another remount may have changed it since.
        _remount(_require(pool, mountpoint), words)


def _remount(mount: Mount, words: Sequence[str]) -> None:
    status = ask(mount, "info", MountStatus, timeout_seconds=_LOOK_SECONDS)
    now = replace(MountOptions.parse(status.options), read_only=status.read_only)
    if f"transport={status.transport}" in words and status.transport in TRANSPORTS:
        # Whoever asks for what it has asks for no change.
        now = replace(now, transport=status.transport)
    wanted = now.remounted(words)
    for mode in Mode:
        if mode.word == status.pool.mode:
            wanted.check_mode(mode)
    kernel_now = _flags_of(mount)
    kernel = now.changed_as(kernel_now).remounted(words)
    if os.geteuid() != 0:
        _check_owners_wish(mount, kernel_now, kernel)
    opens = now.read_only and not wanted.read_only
    if opens:
        _tell(mount, wanted)
    try:
        _change_kernel(mount, kernel_now, kernel, words)
        if not opens:
            _tell(mount, wanted)
    except PmemfsError:
        with suppress(PmemfsError):
            if opens:
                _tell(mount, now)
            else:
                _change_kernel(mount, kernel, kernel_now, _words_of(kernel_now))
        raise


@contextmanager
def _alone(mount: Mount) -> Iterator[None]:
    """Let no other remount change a mount of the same user meanwhile. Raises RemountFailed.

    Two that change their minds between each other's steps could leave the kernel writable and the
    daemon read-only, though both have succeeded.
    """
    directory = next(private_directories(mount.owner_uid), None)
    if directory is None:
        # Without a socket the daemon can't be asked, and the next step says so.
        yield
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        deadline = time.monotonic() + _ALONE_SECONDS
        while not _locked(fd):
            if time.monotonic() > deadline:
                why = f"another remount has not ended for {_ALONE_SECONDS} s"
                raise RemountFailed(path=mount.mountpoint, why=why)
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_owners_wish(mount: Mount, now: MountOptions, wanted: MountOptions) -> None:
    """Raise RemountFailed where the kernel would have to change what only root may change.

    Times of access are the daemon's business, and a user's kernel flags never tell of them all.
    """
    alike = replace(wanted, strictatime=now.strictatime, nodiratime=now.nodiratime)
    if set(_words_of(alike)) != set(_words_of(now)):
        why = "only root may change the flags that the kernel keeps; unmount it, and mount it again"
        raise RemountFailed(path=mount.mountpoint, why=why)


def _require(pool: str | None, mountpoint: str) -> Mount:
    """The mount on a directory. Raises RemountFailed, BadUsage and Silent."""
    if not mountpoint:
        raise BadUsage(why="a mountpoint has a name")
    mount = mount_at(resolve(mountpoint))
    if mount is None or not mount.is_ours:
        raise RemountFailed(path=mountpoint, why="no pool is mounted there")
    # The name of the pool may be as mountinfo shows it, or lead there.
    names = {mount.source, "none"}
    if pool is not None and pool not in names and os.path.realpath(pool) not in names:
        raise RemountFailed(path=mountpoint, why=f"{mount.source} is mounted there, not {pool}")
    return mount


def _tell(mount: Mount, options: MountOptions) -> None:
    """Let the daemon know. Raises NoAnswer, and RemoteError with its sentence."""
    ask(mount, "remount", Remounted, timeout_seconds=_DAEMON_SECONDS, options=options.as_text())


def _flags_of(mount: Mount) -> MountOptions:
    """What the kernel shows of a mount, as options."""
    place, shared = mount.flags
    words = [word for word in place if word in _PLACE or word == "relatime"]
    if not {"noatime", "relatime"} & set(place):
        words.append("strictatime")
    words += [word for word in shared if word in _SHARED]
    return MountOptions.parse(",".join([*words, "ro" if mount.is_read_only else "rw"]))


def _words_of(options: MountOptions) -> list[str]:
    """All flags that a mount has in the kernel, the absent ones by their opposites."""
    words = ["ro" if options.read_only else "rw"]
    opposites = {"nodiratime": "diratime", "noatime": ""}
    has = {*options.kernel, *(["nodiratime"] if options.nodiratime else [])}
    for word in _PLACE:
        words += filter(None, [word if word in has else opposites.get(word, word[2:])])
    if "noatime" not in has:
        words.append("strictatime" if options.strictatime else "relatime")
    return [
        *words,
        "sync" if "sync" in has else "async",
        *(["dirsync"] if "dirsync" in has else []),
    ]


def _change_kernel(
    mount: Mount, now: MountOptions, wanted: MountOptions, words: Sequence[str]
) -> None:
    """Change the flags of the kernel. Raises RemountFailed."""
    if (now.read_only, "sync" in now.kernel) != (wanted.read_only, "sync" in wanted.kernel):
        _change_file_system(mount, wanted)
    elif os.geteuid() == 0:
        try:
            set_flags(mount.mountpoint, words)
        except OSError as error:
            why = f"the kernel refuses it: {os.strerror(error.errno or 0).lower()}"
            raise RemountFailed(path=mount.mountpoint, why=why) from None


def _change_file_system(mount: Mount, wanted: MountOptions) -> None:
    """Change flags of all places where it is mounted, and others with them. Raises RemountFailed.

    By a mount(8) that calls no helper, and so not us. It may have to wait for the daemon, since the
    kernel writes back first.
    """
    flags = ",".join(["remount", *_words_of(wanted)])
    command = ["mount", "-i", "-o", flags, "--", mount.source, mount.mountpoint]
    said = run_patiently(command, _KERNEL_SECONDS, {**os.environ, "LC_ALL": "C"})
    if said is None:
        why = f"its daemon has not answered the kernel for {_KERNEL_SECONDS} s"
        raise RemountFailed(path=mount.mountpoint, why=why)
    if said:
        why = said[0].removeprefix("mount: ").removeprefix(f"{mount.mountpoint}: ").rstrip(".")
        if "busy" in why:
            why = "files on it are open for writing"
        raise RemountFailed(path=mount.mountpoint, why=why)
