"""Where control sockets lie, so that both sides find them even if another user was there first.

A user's daemons keep their sockets in one directory, in which only that user can make or change
anything: /run/pmemfs for root, /run/user/UID/pmemfs or /tmp/pmemfs-UID for other users. Any user
can take the last name first. Then the daemon makes a directory /tmp/pmemfs-UID-XXXXXXXX, and a
command that looks for it takes only directories that belong to UID, which nobody else could have
made.

Invariants:
- a directory is used only if it is a directory and not a symbolic link, belongs to the user, and
  nobody else may write to it. Otherwise a command would talk to a socket that another user put
  there, or linked to;
- nothing is looked at that a FUSE server would have to answer for: it might never answer, and then
  not even SIGKILL would end the process that asked.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pmemfs.errors import NoControlSocket
from pmemfs.mountinfo import Mount, mounts

_ROOTS = "/run/pmemfs"
_SHARED = "/tmp"
_SOCKET_NAME = re.compile(r"\d+:\d+\.sock")
_MOST_SOCKETS = 1000
_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def socket_path(mount: Mount, around: Sequence[Mount] | None = None) -> str:
    """The control socket of a mount, whichever user asks; where it should be if it is nowhere.

    `around` is what is mounted, if the caller has read that already.
    """
    uid, name = mount.owner_uid, f"{mount.device}.sock"
    for directory in private_directories(uid, around):
        if _may_be_there(path := f"{directory}/{name}"):
            return path
    return f"{_first_choices(uid)[-1]}/{name}"


def private_directories(uid: int, around: Sequence[Mount] | None = None) -> Iterator[str]:
    """The directories of a user that may have sockets, the preferred ones first."""
    fuse = _fuse_mountpoints(around)
    for directory in _first_choices(uid):
        if _is_private(directory, uid, fuse):
            yield directory
    if uid:
        yield from _others_in_tmp(uid, fuse)


def socket_owners() -> set[int]:
    """The users whose sockets this user may ask: itself; for root, all who seem to have some."""
    me = os.geteuid()
    if me:
        return {me}
    names = _names_in(os.path.dirname(_session(0)))
    names += [name.split("-")[1] for name in _names_in(_SHARED) if name.startswith("pmemfs-")]
    return {0} | {int(name) for name in names if name.isascii() and name.isdecimal()}


def sockets_of(uid: int, around: Sequence[Mount] | None = None) -> dict[str, str]:
    """The control sockets of a user, by the device of their mounts; at most so many as a user may
    have FUSE mounts."""
    found: dict[str, str] = {}
    for directory in private_directories(uid, around):
        for name in itertools.islice(os.listdir(directory), _MOST_SOCKETS):
            path = f"{directory}/{name}"
            if _SOCKET_NAME.fullmatch(name) and _may_be_there(path):
                found.setdefault(name.removesuffix(".sock"), path)
    return found


def new_socket_path(mount: Mount) -> str:
    """Where the daemon of a mount should listen; the directory is made. Raises NoControlSocket."""
    return f"{_make_directory(mount.owner_uid)}/{mount.device}.sock"


@contextmanager
def opened_socket(path: str | os.PathLike[str], uid: int) -> Iterator[str]:
    """A path to connect to that leads to this very socket, whatever becomes of its name meanwhile.

    Raises PermissionError if the socket or its directory is open to other users, and OSError.
    """
    with contextlib.ExitStack() as opened:
        parent, name = os.path.split(path)
        directory = os.open(parent, _OPEN | os.O_DIRECTORY)
        opened.callback(os.close, directory)
        check_private(parent, os.fstat(directory), uid)
        fd = os.open(name, _OPEN, dir_fd=directory)
        opened.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid:
            raise PermissionError(f"{path} is not a socket of user {uid}")
        # A socket's address has room for 108 bytes: enough for this, not for any path.
        yield f"/proc/self/fd/{fd}"


def check_private(directory: str, status: os.stat_result, uid: int) -> None:
    """Raise PermissionError unless a directory belongs to a user and no other may write to it.

    `status` comes from lstat, so a symbolic link counts as a link, not as its target.
    """
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise PermissionError(f"{directory} does not belong to user {uid} alone")


def _first_choices(uid: int) -> list[str]:
    if uid == 0:
        return [_ROOTS]
    return [f"{_session(uid)}/pmemfs", f"{_SHARED}/pmemfs-{uid}"]


def _session(uid: int) -> str:
    """The directory that pam_systemd makes at a user's login and removes after the logout."""
    return f"/run/user/{uid}"


def _others_in_tmp(uid: int, fuse: Sequence[str]) -> Iterator[str]:
    for name in sorted(_names_in(_SHARED)):
        directory = f"{_SHARED}/{name}"
        if name.startswith(f"pmemfs-{uid}-") and _is_private(directory, uid, fuse):
            yield directory


def _names_in(directory: str) -> list[str]:
    """What is in a directory; nothing if it can't be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _make_directory(uid: int) -> str:
    fuse = _fuse_mountpoints(None)
    why = ""
    for directory in _first_choices(uid):
        parent = os.path.dirname(directory)
        if uid and parent != _SHARED and not _is_private(parent, uid, fuse):
            continue
        try:
            (os.mkdir if uid else os.makedirs)(directory, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            why = f"{directory}: {(error.strerror or str(error)).lower()}"
            continue
        if _is_private(directory, uid, fuse):
            return directory
        why = f"{directory} does not belong to user {uid} alone"
    if uid == 0:
        raise NoControlSocket(why=why)
    # Hardly any daemon needs these, and no command.
    import logging
    import tempfile

    log = logging.getLogger(__name__)
    log.warning("%s: the control socket gets another place", why)
    other = next(_others_in_tmp(uid, fuse), None)
    try:
        return other or tempfile.mkdtemp(prefix=f"pmemfs-{uid}-", dir=_SHARED)
    except OSError as error:
        raise NoControlSocket(why=f"{_SHARED}: {(error.strerror or str(error)).lower()}") from None


def _is_private(directory: str, uid: int, fuse: Sequence[str]) -> bool:
    touched = (directory, os.path.dirname(directory))
    if any(there in touched or there.startswith(f"{directory}/") for there in fuse):
        return False
    try:
        check_private(directory, os.lstat(directory), uid)
    except OSError:
        return False
    return True


def _fuse_mountpoints(around: Sequence[Mount] | None) -> list[str]:
    """The mountpoints at which an ordinary user's process answers every look at them."""
    all_mounts = mounts() if around is None else around
    return [m.mountpoint for m in all_mounts if m.fs_type.startswith("fuse") and m.owner_uid]


def _may_be_there(path: str) -> bool:
    """Whether a socket is there, as far as this user can see."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False
