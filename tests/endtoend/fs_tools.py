"""What the end-to-end tests of mode `fs` share: errors by number, other users, patterns."""

from __future__ import annotations

import errno
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

USER = 65534
OTHER_USER = 65533


@contextmanager
def fails_with(number: int) -> Iterator[None]:
    """What is inside must fail with this errno."""
    try:
        yield
    except OSError as error:
        assert error.errno == number, error  # noqa: PT017
    else:
        pytest.fail(f"no {errno.errorcode[number]}")


def as_user(action: Callable[[], T], uid: int = USER, gid: int | None = None,
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


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return path.lstat().st_mode & 0o7777


def names(path: Path) -> set[str]:
    """What a directory lists."""
    return set(os.listdir(path))


def pattern(length: int, start: int = 0) -> bytes:
    """Bytes of which each says where it is."""
    return b"".join((start + at).to_bytes(8, "little") for at in range(0, length + 8, 8))[:length]
