"""What a client's connection decides: who may read a file, and what a daemon's errors are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kit.users import NOBODY, acting_as
from pmemfs import errors
from pmemfs.client.connection import _as_named, _may_read
from pmemfs.control.client import RemoteError
from pmemfs.medium.addresses import known_of


def may_read(path: Path) -> bool:
    fd = os.open(path, os.O_PATH)
    try:
        _, _, mode, uid = known_of(fd)
        return _may_read(fd, mode, uid)
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
@pytest.mark.parametrize("owner", [0, NOBODY])
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o040, 0o004, 0o044, 0o200])
def test_who_may_read_is_what_the_kernel_says(shm: Path, owner: int, mode: int) -> None:
    shm.chmod(0o755)
    path = shm / "file"
    path.touch()
    os.chown(path, owner, 0)
    path.chmod(mode)
    assert may_read(path), "root may"
    with acting_as(NOBODY):
        try:
            os.close(os.open(path, os.O_RDONLY))
            expected = True
        except PermissionError:
            expected = False
        assert may_read(path) == expected


def test_an_error_of_the_daemon_is_the_class_that_it_names() -> None:
    said = _as_named(RemoteError("cannot pin f: no room", 1, "CannotPin", errno.ENOSPC))
    assert type(said) is errors.CannotPin
    assert (said.errno, str(said)) == (errno.ENOSPC, "cannot pin f: no room")
    assert isinstance(said, OSError)
    for kind in ("", "NoSuchClass", "Self", "os", "EXIT_FAILED", "Iterator"):
        error = RemoteError("it failed", 1, kind)
        assert _as_named(error) is error
