"""Looks at paths that may never answer: in another process, and for a bounded time.

A process that looks at a mount whose daemon is stopped waits, and once the daemon has the request
not even SIGKILL helps. This holds for every thread, and a process with such a thread can't end. So
a child looks first. It is waited for only so long, and left alone if it does not come back. A path
that has just answered is then looked at as usual.
"""

from __future__ import annotations

import errno
import os
import select
import time

from pmemfs.errors import Silent
from pmemfs.mountinfo import mounts

PATIENCE_SECONDS = 5

_ANSWERED_ELSEWHERE = ("fuse", "nfs", "cifs", "smb", "9p", "ceph")
"""How the types of file systems begin for which another process or machine answers."""
_ERRNOS = {os.strerror(number): number for number in errno.errorcode}


def look(path: str, *, seconds: float, whole: bool = False) -> None:
    """Ask for the attributes of a path, or with `whole` for those of its file system, which are
    never cached.

    Raises OSError as stat(2) does, and TimeoutError.
    """
    # Most commands look at nothing that might not answer.
    import subprocess

    words = ["stat", *(["--file-system"] if whole else ["--dereference"]), "--", path]
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert child.stderr is not None
    with child.stderr as said:
        text = _read(said.fileno(), time.monotonic() + seconds)
    if text is None:
        child.kill()
        raise TimeoutError(errno.ETIMEDOUT, "it does not answer", path)
    if child.wait():
        why = text.decode(errors="replace").strip().rsplit(": ", 1)[-1]
        number = _ERRNOS.get(why, errno.EIO)
        raise OSError(number, os.strerror(number), path)


def check_answers(path: str) -> None:
    """Raise Silent if looking at a path would wait for ever, as far as this can tell."""
    if not any(mount.fs_type.startswith(_ANSWERED_ELSEWHERE) for mount in mounts()):
        return
    try:
        look(path, seconds=PATIENCE_SECONDS, whole=True)
    except TimeoutError:
        raise Silent(path=path) from None
    except (OSError, ValueError):
        # The caller looks next, and gets the same error.
        return


def _read(fd: int, deadline: float) -> bytes | None:
    """All that comes out of a pipe until its end; None if the end does not come in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    text = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        chunk = os.read(fd, 4096)
        if not chunk:
            return text
        text += chunk
