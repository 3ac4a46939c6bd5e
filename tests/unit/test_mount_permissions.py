"""Who may not mount is told so before fusermount3 is asked, and which command changes that."""

from __future__ import annotations

import os

import pytest

from pmemfs.errors import MountFailed
from pmemfs.mount.making import mount_by_helper
from pmemfs.mount.options import MountOptions


def test_a_user_who_may_not_open_dev_fuse_is_told_what_root_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse here")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/fuse")
    with pytest.raises(MountFailed, match=r"may not open /dev/fuse.*'chmod 666 /dev/fuse'"):
        mount_by_helper("/dev/shm/pool", "/mnt", MountOptions.parse("rw"))
