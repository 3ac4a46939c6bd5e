"""From what a user names, a mountpoint or a pool, to the daemon that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pmemfs.cli.output import note, warn
from pmemfs.control.places import socket_owners, socket_path, sockets_of
from pmemfs.errors import NoAnswer, NotMounted, NotPermitted, PmemfsError
from pmemfs.mount.elsewhere import Place, places_elsewhere
from pmemfs.mount.mountpoint import believed_owners, mounts_of_pool, resolve
from pmemfs.mountinfo import FUSE_TYPE, Mount, mount_at, mount_of_device, mounts
from pmemfs.reach import check_answers

# Where nothing is mounted, nobody is asked, and nobody waits for what asks.
if TYPE_CHECKING:
    from pmemfs.observe.answers import MountStatus

_MANY_TIMEOUT_SECONDS = 5
_MANY_LIMIT_BYTES = 256 * 1024
"""For what is asked of all daemons: any user may have a thousand mounts that answer at length."""

DETACHED = "detached, still in use"

_NOT_MOUNTED = "mounted; 'pmemfs mount' does that, and 'pmemfs list' shows what is"

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
        raise NotMounted(path="''", what="a pmemfs mount: a pool or a mountpoint has a name")
    resolved = resolve(target)
    at = mount_at(resolved)
    if at and at.is_ours:
        note(f"{target}: the pool {at.source} is mounted there")
        return at
    if at:
        check_answers(resolved)
    mount = next(iter(mounts_of_pool(resolved)), None)
    where = f"it is mounted on {mount.mountpoint}" if mount else "no mount of pmemfs has it"
    note(f"{target}: {where}")
    return mount


def require_mount(target: str) -> Mount:
    """As `find_mount`. Raises NotMounted."""
    mount = find_mount(target)
    if mount is not None:
        return mount
    if not os.path.exists(target):
        what = "a pmemfs mount: no such path"
    elif os.path.isdir(target):
        what = "a pmemfs mount; 'pmemfs list' shows those that there are"
    elif (around := mount_of_device(os.stat(target).st_dev)) and around.is_ours:
        what = f"a mount, but a file of the one on {around.mountpoint}; name that"
    else:
        hidden = find_hidden(target)
        what = f"mounted here any more: it is {hidden.sentence}" if hidden else _NOT_MOUNTED
    raise NotMounted(path=target, what=what)


class Hidden(NamedTuple):
    """A mount that is on no directory of this mount namespace, and that a daemon still serves."""

    mount: Mount
    status: MountStatus
    place: Place | None
    """Where it is in another mount namespace, as far as that can be seen from here."""

    @property
    def sentence(self) -> str:
        """What became of it, behind "it is"."""
        if self.place:
            return f"on {self.place}"
        if not self.status.is_detached:
            return f"on {self.status.mountpoint} in another mount namespace"
        return DETACHED


def hidden_mounts() -> Iterator[Hidden]:
    """What is detached and still used, or is mounted in another mount namespace: no mountinfo that
    we have names it, but its daemon answers."""
    around = mounts()
    named = {mount.device for mount in around}
    found = [
        Mount(device, "", FUSE_TYPE, "", f"user_id={uid}")
        for uid in sorted(socket_owners())
        for device in sorted(sockets_of(uid, around))
        if device not in named
    ]
    for mount, status in zip(found, statuses(found), strict=True):
        # Sockets of daemons that were killed stay.
        if not isinstance(status, PmemfsError):
            known = mount._replace(source=status.pool.path)
            yield Hidden(known, status, next(places_elsewhere(known), None))


def find_hidden(pool: str) -> Hidden | None:
    """The mount of a pool that no mountinfo here names; None if there is none, or if only another
    user says so, who is not the owner of the pool."""
    path = os.path.realpath(pool)
    owners = believed_owners(path)
    return next(
        (h for h in hidden_mounts() if h.status.pool.path == path and h.mount.owner_uid in owners),
        None,
    )


def ask(
    mount: Mount,
    method: str,
    shape: type[Report],
    *,
    timeout_seconds: float | None = None,
    **params: Any,
) -> Report:
    """Ask the daemon of a mount. Raises NoAnswer, NotPermitted, and RemoteError with the daemon's
    sentence."""
    limits = {} if timeout_seconds is None else {"timeout_seconds": timeout_seconds}
    (answer,) = _ask_all([mount], method, shape, params, **limits)
    if isinstance(answer, NoAnswer):
        # The mountpoint for the socket, which means nothing to a user.
        why = _end_of(mount) if answer.is_final else answer.facts["why"]
        raise NoAnswer(**{**answer.facts, "path": mount.mountpoint, "why": why})
    if isinstance(answer, PmemfsError):
        raise answer
    return answer


def _end_of(mount: Mount) -> str:
    """What is to be said of a mount whose daemon has died, and has no successor."""
    from pmemfs.logs import log_of

    return (
        f"it has died, and no other takes its place; {log_of(mount.source, mount.owner_uid)} says "
        f"why, and 'pmemfs umount {mount.mountpoint}' removes the mount"
    )


def statuses(asked: Sequence[Mount]) -> list[MountStatus | PmemfsError]:
    """Ask the daemons of many mounts at once; for each its status, or why there is none."""
    if not asked:
        return []
    from pmemfs.observe.answers import MountStatus

    return _ask_all(
        asked, "info", MountStatus, {},
        timeout_seconds=_MANY_TIMEOUT_SECONDS, limit_bytes=_MANY_LIMIT_BYTES,
    )  # fmt: skip


def _ask_all(
    asked: Sequence[Mount], method: str, shape: type[Report], params: Mapping[str, Any],
    **limits: Any,
) -> list[Report | PmemfsError]:  # fmt: skip
    from pmemfs.control.client import Question, call_all
    from pmemfs.control.shape import decode

    around = mounts()
    permitted = [mount for mount in asked if may_ask(mount)]
    questions = [Question(socket_path(m, around), m.owner_uid, method, params) for m in permitted]
    for mount, question in zip(permitted, questions, strict=True):
        note(f"{mount.mountpoint or mount.device}: asking its daemon at {question.path}")

    def warn_about(position: int, sentence: str) -> None:
        warn(f"{permitted[position].mountpoint}: the daemon answers, but {sentence}")

    answers = iter(call_all(questions, partial(decode, shape), warn=warn_about, **limits))
    return [
        next(answers) if may_ask(mount)
        else NotPermitted(path=mount.mountpoint, uid=mount.owner_uid)
        for mount in asked
    ]  # fmt: skip


def may_ask(mount: Mount) -> bool:
    """Whether the daemon of a mount answers this user. It hangs up on others without a word."""
    return os.geteuid() in (0, mount.owner_uid)
