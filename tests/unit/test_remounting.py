"""The daemon's part of a remount, while the kernel's part changes under it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kit.data_plane import shared_files
from pmemfs.engine.growing import Grower
from pmemfs.engine.native import SharedEngine
from pmemfs.errors import RemountFailed
from pmemfs.fuse import remounting
from pmemfs.fuse.remounting import Remounter
from pmemfs.fuse.served import serve_pool
from pmemfs.media.label import State
from pmemfs.mount.options import MountOptions
from pmemfs.mountinfo import Mount


def test_a_kernel_that_becomes_writable_meanwhile_keeps_the_pool_dirty(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_files(shm) as files:
        options = MountOptions()
        engine = SharedEngine(files.pool, files.medium, files.memmap, files.shared)
        served = serve_pool(files.pool, files.medium, files.memmap, engine, options)
        grower = Grower(files.pool, files.medium, files.memmap, engine, trio.lowlevel.checkpoint)
        remounter = Remounter(files.pool, files.medium, served, grower, options)
        files.pool.begin_mount()
        mount = Mount("0:99", "/mnt", "fuse.pmemfs", "/pool", "rw,ro")
        # What mountinfo shows when it is read for the first time, and from then on.
        shown = iter(["rw,ro"])
        monkeypatch.setattr(
            remounting, "places_of", lambda _: [mount._replace(options=next(shown, "rw,rw"))]
        )
        with pytest.raises(RemountFailed, match="the kernel still lets it be written to"):
            trio.run(remounter.remount, MountOptions(read_only=True), mount)
        assert files.pool.label.state == State.DIRTY
        assert not served.volume.read_only
        assert not files.shared.header.read_only
        assert not remounter.options.read_only
