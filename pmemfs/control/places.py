"""Where control sockets lie: found by both sides, though others may have been there before.

A user's daemons keep their sockets in one directory, in which nobody else can make or change
anything: /run/pmemfs for root, /run/user/UID/pmemfs or /tmp/pmemfs-UID for others. Anybody can take
the last name before its owner does. Then the daemon makes a directory /tmp/pmemfs-UID-XXXXXXXX, and
whoever looks for it takes only directories that belong to that user: nobody else could have made
one.

Invariants:
- a directory is used only if it is a directory, no symbolic link, belongs to the user, and nobody
  else may write to it. Without that, a command would talk to whatever socket somebody else put
  there, or linked to;
- nothing is looked at that a FUSE server would have to answer for: it might never answer, and then
  not even SIGKILL would end who asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pmemfs.errors import NoControlSocket
from pmemfs.mountinfo import Mount, mounts

log = logging.getLogger(__name__)

_ROOTS = Path("/run/pmemfs")
_SHARED = Path("/tmp")
_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def socket_path(mount: Mount, around: Sequence[Mount] | None = None) -> Path:
    """The control socket of a mount, whoever asks; where it should be, if it is nowhere.

    `around` is what is mounted, for whoever has read that.
    """
    uid, name = mount.owner_uid, f"{mount.device}.sock"
    for directory in private_directories(uid, around):
        if _may_be_there(directory / name):
            return directory / name
    return _first_choices(uid)[-1] / name


def private_directories(uid: int, around: Sequence[Mount] | None = None) -> Iterator[Path]:
    """The directories of a user that sockets may be in, those first that are preferred."""
    fuse = _fuse_mountpoints(around)
    for directory in _first_choices(uid):
        if _is_private(directory, uid, fuse):
            yield directory
    if uid:
        yield from _others_in_tmp(uid, fuse)


def new_socket_path(mount: Mount) -> Path:
    """Where the daemon of a mount should listen; makes the directory. Raises NoControlSocket."""
    return _make_directory(mount.owner_uid) / f"{mount.device}.sock"


@contextmanager
def opened_socket(path: Path, uid: int) -> Iterator[str]:
    """A path to connect to: of this very socket, whatever becomes of its name meanwhile.

    Raises PermissionError where the socket or its directory is not that user's alone, and OSError.
    """
    with contextlib.ExitStack() as opened:
        directory = os.open(path.parent, _OPEN | os.O_DIRECTORY)
        opened.callback(os.close, directory)
        check_private(path.parent, os.fstat(directory), uid)
        fd = os.open(path.name, _OPEN, dir_fd=directory)
        opened.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid:
            raise PermissionError(f"{path} is not a socket of user {uid}")
        # Unlike the path, this also has room for any directory: a socket's address has 108 bytes.
        yield f"/proc/self/fd/{fd}"


def check_private(directory: Path, status: os.stat_result, uid: int) -> None:
    """Raise PermissionError unless a directory is a user's own and closed to the others' writing.

    `status` is that of lstat: a symbolic link is none.
    """
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise PermissionError(f"{directory} does not belong to user {uid} alone")


def _first_choices(uid: int) -> list[Path]:
    if uid == 0:
        return [_ROOTS]
    return [_session(uid) / "pmemfs", _SHARED / f"pmemfs-{uid}"]


def _session(uid: int) -> Path:
    """What pam_systemd makes for a user who logs in, and takes away when the user has gone."""
    return Path(f"/run/user/{uid}")


def _others_in_tmp(uid: int, fuse: Sequence[str]) -> Iterator[Path]:
    for name in sorted(os.listdir(_SHARED)) if _SHARED.is_dir() else []:
        if name.startswith(f"pmemfs-{uid}-") and _is_private(_SHARED / name, uid, fuse):
            yield _SHARED / name


def _make_directory(uid: int) -> Path:
    fuse = _fuse_mountpoints(None)
    why = ""
    for directory in _first_choices(uid):
        if uid and directory.parent != _SHARED and not _is_private(directory.parent, uid, fuse):
            continue
        try:
            directory.mkdir(mode=0o700, parents=not uid, exist_ok=True)
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
    log.warning("%s: the control socket gets another place", why)
    other = next(_others_in_tmp(uid, fuse), None)
    try:
        return other or Path(tempfile.mkdtemp(prefix=f"pmemfs-{uid}-", dir=_SHARED))
    except OSError as error:
        raise NoControlSocket(why=f"{_SHARED}: {(error.strerror or str(error)).lower()}") from None


def _is_private(directory: Path, uid: int, fuse: Sequence[str]) -> bool:
    touched = (str(directory), str(directory.parent))
    if any(there in touched or there.startswith(f"{directory}/") for there in fuse):
        return False
    try:
        check_private(directory, os.lstat(directory), uid)
    except OSError:
        return False
    return True


def _fuse_mountpoints(around: Sequence[Mount] | None) -> list[str]:
    """Where a process of an ordinary user answers whoever looks."""
    all_mounts = mounts() if around is None else around
    return [m.mountpoint for m in all_mounts if m.fs_type.startswith("fuse") and m.owner_uid]


def _may_be_there(path: Path) -> bool:
    """Whether a socket is there, as far as we may look."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except PermissionError:
        return True
    except OSError:
        return False
