"""Acting as another user than root."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


NOBODY = 65534
OTHER_USER = 65533
AS_NOBODY = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--")


def as_user(action: Callable[[], T], uid: int = NOBODY, gid: int | None = None,
            groups: tuple[int, ...] = ()) -> T:  # fmt: skip
    """What something answers in a process of another user; its exceptions are raised here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(uid if gid is None else gid)
            os.setuid(uid)
            answer: object = action()
        except BaseException as error:
            traceback.print_exc()
            answer = error
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    answer = pickle.loads(said)
    if isinstance(answer, BaseException):
        raise answer
    return answer


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Make calls as another user, without groups; needs root."""
    if not uid:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
