"""Pools whose file is cut off while they are mounted: one request fails, and the mount lives.

What is cut off is a SIGBUS for whoever touches the mapping, and EFAULT in system calls, as poison
is.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_ok, refused
from kit.mounts import Mounted, PoolMaker, native_only
from kit.posix import opened
from kit.processes import is_running, wait_until
from pmemfs.logs import JOURNAL, log_file
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

FRAME = 4096
CALLERS = 4


def eio(attempt: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Input/output") as caught:
        attempt()
    assert caught.value.errno == errno.EIO


def said_of(mounted: Mounted, pfn: int) -> list[str]:
    """What the log says of a page frame."""
    text = log_file(str(mounted.pool)).read_text()
    return [line for line in text.splitlines() if re.search(rf"page frame {pfn:#x}\b", line)]


def zones(mounted: Mounted) -> dict[str, dict[str, int]]:
    return dict(mounted.info()["pool"]["zones"])


def first_pfn(path: Path) -> int:
    extents = json.loads(pmemfs_ok("extents", path, "--json"))["extents"]
    return min(int(extent["pfn"]) for extent in extents)


@pytest.fixture
def files(pools: PoolMaker) -> Mounted:
    """A file system of one large file and many small ones, mounted anew since they were made."""
    pool = pools.create("bad-memory", "300M", "--scheme", "none", "--mode", "fs")
    log_file(str(pool)).unlink(missing_ok=True)
    # Workers would take frames ahead, so that inodes lie behind data.
    mounted = pools.mount(pool, "-o", "names_memory=0")
    with (mounted.mountpoint / "large").open("wb") as large:
        for _ in range(250):
            large.write(bytes(MIB))
    for number in range(2000):
        (mounted.mountpoint / f"small-{number}").write_bytes(b"%08d" % number * 1125)
    pools.umount(mounted)
    return pools.mount(pool, "-o", "names_memory=0")


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_files_that_were_cut_off_cost_their_readers_and_metadata_the_writers(
    files: Mounted,
) -> None:
    kept, lost = files.mountpoint / "small-0", files.mountpoint / "small-1999"
    content = kept.read_bytes()
    pfn, earlier_pfn = first_pfn(lost), first_pfn(files.mountpoint / "small-100")
    os.truncate(files.pool, pfn * FRAME)
    for _ in range(3):
        eio(lost.read_bytes)
    assert kept.read_bytes() == content
    assert files.info()["fault_count"] == 3
    if not os.path.exists(JOURNAL):
        # Faults of the data plane are logged by the daemon, a second later.
        wait_until(lambda: bool(said_of(files, pfn)), "the log says it")
        [line] = said_of(files, pfn)
        assert f"inode {lost.stat().st_ino} " in line
        assert str(files.pool) in line

    # Inodes that were made later lie behind this one's data.
    os.truncate(files.pool, earlier_pfn * FRAME)
    eio(lambda: [os.stat(files.mountpoint / f"small-{number}") for number in range(1000, 2000)])
    for _ in range(3):
        with pytest.raises(OSError, match="Read-only"):
            (files.mountpoint / "new").touch()
    assert kept.read_bytes() == content
    assert pmemfs("info", files.mountpoint).code == 0
    pid = files.pid
    # What is left can't be made clean, but it can be unmounted.
    assert pmemfs("umount", files.mountpoint).code == 32
    wait_until(lambda: not is_running(pid), "the daemon has ended")
    refused(pmemfs("info", files.pool), 4, "cut off")
    assert pmemfs("check", files.pool).code == 4
    if not os.path.exists(JOURNAL):
        text = log_file(str(files.pool)).read_text()
        assert text.count("nothing is written any more") == 1
        assert "Traceback" not in text


@pytest.mark.usefixtures("engine")
def test_names_change_on_beside_a_file_whose_memory_went_bad(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("bad-beside", "48M", "--scheme", "none", "--mode", "fs"))
    lost, size = mounted.mountpoint / "lost", mounted.pool.stat().st_size
    cut = fill(mounted, lost)
    rounds = threading.Barrier(CALLERS + 1)

    def change(caller: int) -> None:
        directory = mounted.mountpoint / f"of-{caller}"
        directory.mkdir()
        for count in range(200):
            if count == 100:
                rounds.wait()
            content = b"%d" % count * (1 + count % 7 * 500)
            path, name = directory / f"n{count % 9}", directory / f"renamed-{count % 9}"
            path.write_bytes(content)
            path.rename(name)
            assert name.read_bytes() == content
            name.chmod(0o600)
            assert not path.exists()
            if count % 3:
                name.unlink()

    with ThreadPoolExecutor(CALLERS) as callers:
        changes = [callers.submit(change, caller) for caller in range(CALLERS)]
        rounds.wait()
        os.truncate(mounted.pool, cut)
        for _ in range(20):
            eio(lost.read_bytes)
        for changed in changes:
            changed.result()
    assert lost.stat().st_size
    info = mounted.info()
    assert info["fault_count"] >= 20
    assert info["names"] is None or info["names"]["is_on"]
    os.truncate(mounted.pool, size)
    pools.umount(mounted)
    assert pmemfs("check", mounted.pool).code == 0


def fill(mounted: Mounted, path: Path) -> int:
    """Let a file have all that lies behind an offset in the pool, which this returns, and leave
    some room before it."""
    room = mounted.mountpoint / "room"
    room.write_bytes(bytes(12 * MIB))
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    room.unlink()
    zone = zones(mounted)["data"]
    end = (zone["offset_bytes"] + zone["size_bytes"]) // FRAME
    extents = json.loads(pmemfs_ok("extents", path, "--json"))["extents"]
    last = max(extents, key=lambda extent: int(extent["pfn"]))
    assert last["pfn"] + last["length_bytes"] // FRAME == end
    return int(last["pfn"] * FRAME + last["length_bytes"] // 2)


@pytest.mark.usefixtures("engine")
def test_page_structures_that_were_cut_off_cost_whose_pages_they_are(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("bad-pages", "32M"))
    start = zones(mounted)["memmap"]["offset_bytes"]
    page = start + 4 * FRAME
    index = 4 * FRAME // 64
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"kept" * FRAME, 0)
        os.truncate(mounted.pool, page)
        eio(lambda: os.pread(fd, FRAME, index * FRAME))
        eio(lambda: os.pwrite(fd, b"x" * FRAME, index * FRAME))
        # Some of its pages have structures, and let go of them.
        eio(lambda: os.pread(fd, 16 * FRAME, (index - 8) * FRAME))
        eio(lambda: os.pwrite(fd, bytes(16 * FRAME), (index - 8) * FRAME))
        assert os.pread(fd, 4, 0) == b"kept"
        assert mounted.info()["fault_count"] == 4
        refused(pmemfs("pages", mounted.mountpoint), 1, f"page frame {page >> 12:#x}")
        refused(pmemfs("resize", mounted.mountpoint, "--size", "64M"), 1)
        assert mounted.pool.stat().st_size == page
        os.truncate(mounted.pool, 32 * MIB)
        assert len(os.pread(fd, FRAME, index * FRAME)) == FRAME
        os.pwrite(fd, b"x" * FRAME, index * FRAME)
        assert os.pread(fd, 1, index * FRAME) == b"x"
        os.fsync(fd)
    mounted.wait_until_idle()
    assert is_running(mounted.pid)


@pytest.mark.usefixtures("engine")
def test_what_was_cut_off_a_sparse_pool_is_an_error_and_not_zeroes(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("bad-sparse", "32M", "--sparse", "--scheme", "on-demand"))
    end = zones(mounted)["data"]["offset_bytes"] + 8 * MIB
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"kept", 0)
        os.pwrite(fd, b"lost", 16 * MIB)
        os.truncate(mounted.pool, end)
        for at in (16 * MIB, 20 * MIB, 8 * MIB - 4):
            eio(lambda at=at: os.pread(fd, 8, at))  # type: ignore[misc]
            eio(lambda at=at: os.pwrite(fd, b"x" * 8, at))  # type: ignore[misc]
        assert os.pread(fd, 4, 0) == b"kept"
        os.pwrite(fd, b"more", 4 * MIB)
        assert mounted.pool.stat().st_size == end
        assert mounted.info()["fault_count"] == 6
    assert is_running(mounted.pid)


@native_only
def test_who_looks_for_holes_finds_none_where_a_pool_was_cut_off(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("bad-holes", "32M", "--scheme", "on-demand"))
    end = zones(mounted)["data"]["offset_bytes"] + 8 * MIB
    with opened(mounted.device) as fd:
        size = os.fstat(fd).st_size
        for at in range(0, 9 * MIB, MIB):
            os.pwrite(fd, b"x" * MIB, at)
        os.truncate(mounted.pool, end)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == size
        assert os.lseek(fd, 16 * MIB, os.SEEK_DATA) == 16 * MIB
