"""From what a user names, a mountpoint or a pool, to the daemon that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from pmemfs.control.client import ANSWER_TIMEOUT_SECONDS, Question, call_all
from pmemfs.control.places import socket_path
from pmemfs.control.shape import decode
from pmemfs.errors import NoAnswer, NotMounted, PmemfsError
from pmemfs.fuse.mountpoint import mounts_of_pool, resolve
from pmemfs.mountinfo import Mount, mount_at, mounts
from pmemfs.reach import check_answers

_MANY_TIMEOUT_SECONDS = 5
_MANY_LIMIT_BYTES = 256 * 1024
"""For what is asked of all daemons: any user may have a thousand mounts that answer at length."""

Report = TypeVar("Report")


def our_mounts() -> Iterator[Mount]:
    """Every mount of pmemfs, alive or dead."""
    return (mount for mount in mounts() if mount.is_ours)


def find_mount(target: str) -> Mount | None:
    """The mount on a mountpoint, or of a pool; None where there is none.

    Raises NotMounted for an empty word, and Silent.
    """
    if not target:
        # As a path it would be the current directory: most likely a variable that is not set.
        raise NotMounted(path="''", why=": a pool or a mountpoint has a name")
    resolved = resolve(target)
    at = mount_at(resolved)
    if at and at.is_ours:
        return at
    if at:
        check_answers(resolved)
    return next(iter(mounts_of_pool(resolved)), None)


def require_mount(target: str) -> Mount:
    """As `find_mount`. Raises NotMounted."""
    mount = find_mount(target)
    if mount is None:
        raise NotMounted(path=target, why="" if os.path.exists(target) else ": no such path")
    return mount


def ask(
    mount: Mount,
    method: str,
    shape: type[Report],
    *,
    timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    **params: Any,
) -> Report:
    """Ask the daemon of a mount. Raises NoAnswer, and RemoteError with the daemon's sentence."""
    question = Question(socket_path(mount), mount.owner_uid, method, params)
    (answer,) = call_all([question], partial(decode, shape), timeout_seconds=timeout_seconds)
    if isinstance(answer, PmemfsError):
        raise _about(mount, answer)
    return answer


def ask_all(asked: Sequence[Mount], method: str, shape: type[Report]) -> list[Report | PmemfsError]:
    """Ask the daemons of many mounts at once; for each its report, or why there is none."""
    around = mounts()
    questions = [Question(socket_path(m, around), m.owner_uid, method, {}) for m in asked]
    return call_all(
        questions,
        partial(decode, shape),
        timeout_seconds=_MANY_TIMEOUT_SECONDS,
        limit_bytes=_MANY_LIMIT_BYTES,
    )


def _about(mount: Mount, error: PmemfsError) -> PmemfsError:
    """The error, with the mountpoint for the socket, which means nothing to a user."""
    is_silent = isinstance(error, NoAnswer)
    return NoAnswer(path=mount.mountpoint, why=error.facts["why"]) if is_silent else error
