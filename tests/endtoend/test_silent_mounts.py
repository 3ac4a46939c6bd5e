"""Commands beside a mount whose daemon is stopped: each ends by itself, with one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.commands import BIN, Result, pmemfs, refused
from kit.mounts import EACH_ENGINE, Mounted, PoolMaker, mounts_at
from kit.processes import stopped
from pmemfs.cli.umount import _unmount_all
from pmemfs.errors import UnmountHangs
from pmemfs.mount import mountpoint

pytestmark = [pytest.mark.mount, pytest.mark.slow, *EACH_ENGINE]

PATIENCE_SECONDS = 100
"""A command that waits for the mount waits until this test lets the daemon go on."""


@pytest.fixture
def silent(pools: PoolMaker) -> Iterator[Mounted]:
    """A mount with a file, none of whose processes runs."""
    mounted = pools.mount(pools.create("pmem0", "64M", "--mode", "fs"))
    (mounted.mountpoint / "below").mkdir()
    (mounted.mountpoint / "file").write_bytes(bytes(4096))
    with stopped(*(pid for pid in (mounted.pid, mounted.info()["data_plane_pid"]) if pid)):
        yield mounted


def all_of(*commands: tuple[object, ...]) -> list[Result]:
    """Run commands side by side."""
    running = [
        subprocess.Popen([BIN / "pmemfs", *map(str, words)], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for words in commands
    ]  # fmt: skip
    results = []
    for process in running:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        results.append(Result(process.returncode, out, err))
    return results


def test_no_command_waits_for_a_path_on_a_mount_that_does_not_answer(
    pools: PoolMaker, silent: Mounted
) -> None:
    other = pools.directory / "other"
    there = silent.mountpoint
    place = pools.mountpoint("place")
    done = all_of(
        ("create", there / "new", "--size", "16M"),
        ("check", there / "file"),
        ("info", there / "file"),
        ("extents", there / "file"),
        ("resize", there / "file", "--size", "16M"),
        ("mount", there / "file", place),
        ("mount", silent.pool, there / "below"),
        ("umount", there / "below"),
        ("trim", there / "below"),
    )
    for result, code in zip(done, (1, 8, 1, 1, 1, 32, 32, 32, 1), strict=True):
        refused(result, code, "does not answer", str(there))
    assert not other.exists()
    assert mounts_at(place) == 0


def test_a_stopped_mount_is_still_a_mount(pools: PoolMaker, silent: Mounted) -> None:
    before = mounts_at(silent.mountpoint)
    again, listed = all_of(("mount", silent.pool, silent.mountpoint), ("list",))
    refused(again, 32, "is mounted there")
    assert listed.code == 0
    assert mounts_at(silent.mountpoint) == before


def test_a_stopped_mount_can_be_detached(pools: PoolMaker, silent: Mounted) -> None:
    (done,) = all_of(("umount", "--lazy", silent.mountpoint))
    assert (done.code, done.err) == (0, "")
    assert mounts_at(silent.mountpoint) == 0


def test_an_unmount_that_waits_in_vain_says_so_and_blames_no_process(
    silent: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "_UNMOUNT_SECONDS", 1)
    mount = mountpoint.mount_at(str(silent.mountpoint))
    assert mount
    with pytest.raises(UnmountHangs) as caught:
        _unmount_all([mount])
    assert str(caught.value) == (
        f"cannot unmount {silent.mountpoint}: its daemon has not answered for 1 s; "
        f"'pmemfs umount --lazy {silent.mountpoint}' detaches it"
    )


@pytest.mark.parametrize("needed", [Path(sys.prefix), Path(os.__file__).parent])
def test_a_mount_hides_nothing_that_its_daemon_needs(pools: PoolMaker, needed: Path) -> None:
    pool = pools.create(size="16M")
    for place in (needed, needed.parent):
        refused(pmemfs("mount", pool, place), 32, "would hide", "daemon needs")
        assert mounts_at(place) == 0
