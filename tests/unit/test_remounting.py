"""The daemon's part of a remount, while the kernel's part changes under it."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path

import pytest
import trio

from kit.data_plane import shared_files
from kit.fs_tree import FILE
from pmemfs.engine.growing import Grower
from pmemfs.engine.native import SharedEngine
from pmemfs.errors import RemountFailed
from pmemfs.fuse import remounting
from pmemfs.fuse.remounting import Remounter
from pmemfs.fuse.served import serve_pool, share_damage
from pmemfs.media.inode import ROOT
from pmemfs.media.label import State
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import make_file
from pmemfs.mount.options import MountOptions
from pmemfs.mountinfo import Mount
from pmemfs.units import MIB


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


def test_a_successor_writes_nothing_where_damage_was_met(shm: Path) -> None:
    with shared_files(shm) as files:
        share_damage(files.fs, files.engine())
        files.fs.make(ROOT, b"before", FILE)
        files.fs.store.become_read_only("a record is damaged")
        found = files.again()
        share_damage(found.fs, found.engine())
        assert "damage was met" in found.fs.damage
        with pytest.raises(OSError, match="Read-only"):
            found.fs.make(ROOT, b"after", FILE)


def test_a_successor_calls_nothing_durable_after_a_write_was_lost(shm: Path) -> None:
    with shared_files(shm) as files:
        SharedEngine(files.pool, files.medium, files.memmap, files.shared)
        files.medium.lose(OSError(errno.ENOSPC, "no space left"))
        assert files.shared.header_word("lost_errno") == errno.ENOSPC
        make_file(files.medium.name + ".other", MIB, sparse=False)
        with closing(MappedMedium.open(files.medium.name + ".other")) as medium:
            engine = SharedEngine(files.pool, medium, files.memmap, files.shared)
            with pytest.raises(OSError, match="an earlier msync failed") as caught:
                trio.run(engine.make_durable)
            assert caught.value.errno == errno.ENOSPC
            medium.durability = Durability.MSYNC
            with pytest.raises(OSError, match="an earlier msync failed"):
                medium.fence()
