"""What `pmemfs pages` says after I/O that is known to the page."""

from __future__ import annotations

import os

import pytest

from kit.commands import pmemfs, pmemfs_ok, refused
from kit.mounts import UNKEPT, Mounted, PoolMaker, Session
from kit.posix import opened
from pmemfs.volume.block import INODE

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("engine")]

PAGE = 4096


def assert_counts(mounted: Mounted, **expected: int) -> None:
    """The counts of these names, and no transfer under way."""
    mounted.wait_until_idle()
    counts = mounted.pages()["counts"]
    assert {name: counts[name] for name in expected} == expected, counts
    assert counts["uninitialised"] + counts["clean"] + counts["dirty"] == counts["total"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["pmem", "on-demand"])
def test_counts_follow_every_page_that_was_read_or_written(pools: PoolMaker, scheme: str) -> None:
    mounted = pools.mount(pools.create("pmem0", "64M", "--scheme", scheme))
    total = mounted.device.stat().st_size // PAGE
    assert_counts(mounted, total=total, uninitialised=total, clean=0, dirty=0, referenced=0)
    with opened(mounted.device) as fd:
        os.pwrite(fd, bytes(16 * PAGE), 0)
        # Three bytes across a border are two pages.
        os.pwrite(fd, b"abc", 100 * PAGE - 1)
        os.pread(fd, 8 * PAGE, 1000 * PAGE)
        os.pread(fd, 8 * PAGE, 0)
        assert_counts(mounted, uninitialised=total - 26, dirty=18, clean=8, referenced=26)
        os.fsync(fd)
        assert_counts(mounted, uninitialised=total - 26, dirty=0, clean=26, referenced=26)
        os.pwrite(fd, b"x", 7 * PAGE)
        assert_counts(mounted, dirty=1, clean=25)
        for _ in range(20):
            os.pwrite(fd, b"hammered", 77 * PAGE)
        for _ in range(10):
            os.pread(fd, 5, 78 * PAGE)
    report = mounted.pages(hottest=3)
    assert report["scheme"] == scheme
    assert report["page_size_bytes"] == PAGE
    hottest = report["hottest"]
    assert [page["index"] for page in hottest[:2]] == [77, 78]
    assert (hottest[0]["writes"], hottest[0]["reads"], hottest[0]["dirty"]) == (20, 0, True)
    assert (hottest[1]["writes"], hottest[1]["reads"], hottest[1]["dirty"]) == (0, 10, False)
    assert hottest[0]["mapping"] == INODE
    assert hottest[0]["refcount"] == 0
    first_pfn = mounted.info()["pool"]["zones"]["data"]["offset_bytes"] // PAGE
    assert hottest[0]["pfn"] == first_pfn + 77
    assert len(hottest) == 3
    assert not mounted.pages(hottest=0)["hottest"]
    text = pmemfs_ok("pages", mounted.pool)
    assert "in use" in text
    assert f"{first_pfn + 77:#x}" in text

    # Page structures are not persistent.
    pools.umount(mounted)
    pools.mount(mounted.pool)
    assert_counts(mounted, uninitialised=total, dirty=0, clean=0, referenced=0)
    assert mounted.pages()["hottest"] == []
    # Nor do those beside the first one that is used count again.
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x", 76 * PAGE)
    assert_counts(mounted, uninitialised=total - 1, dirty=1, clean=0, referenced=1)
    assert [page["writes"] for page in mounted.pages()["hottest"]] == [1]


@pytest.mark.quick
def test_a_crash_leaves_no_page_structure_that_counts(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *UNKEPT)
    with opened(mounted.device) as fd:
        os.pwrite(fd, bytes(PAGE), 0)
    Session.of(mounted).kill()
    pools.mount(mounted.pool)
    total = mounted.device.stat().st_size // PAGE
    assert_counts(mounted, uninitialised=total, dirty=0)
    with opened(mounted.device) as fd:
        os.pread(fd, 1, PAGE)
    assert_counts(mounted, uninitialised=total - 1, dirty=0, clean=1)


@pytest.mark.parametrize("scheme", ["pmem", "on-demand"])
@pytest.mark.parametrize(("page_size", "shift"), [("2M", 21), ("1G", 30)])
def test_one_structure_covers_a_huge_page(
    pools: PoolMaker, scheme: str, page_size: str, shift: int
) -> None:
    huge = 1 << shift
    pool = pools.create(
        "pmem0", str(6 * huge), "--sparse", "--page-size", page_size, "--scheme", scheme
    )
    mounted = pools.mount(pool)
    total = mounted.device.stat().st_size // huge
    assert total == 4
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x", 0)
        os.pwrite(fd, b"x", huge - 1)
        os.pwrite(fd, b"xy", 3 * huge - 1)
        assert os.pread(fd, 2, 3 * huge - 1) == b"xy"
    assert_counts(mounted, total=4, uninitialised=1, dirty=3, referenced=3)
    hottest = {page["index"]: page for page in mounted.pages()["hottest"]}
    assert sorted(hottest) == [0, 2, 3]
    assert hottest[0]["writes"] == 2
    assert all(page["pfn"] << 12 & (huge - 1) == 0 for page in hottest.values())


def test_without_page_structures_pages_are_refused_and_the_rest_works(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", "--scheme", "none"))
    refused(pmemfs("pages", mounted.mountpoint), 1, "'none'", "'pmem'", "'on-demand'")
    assert mounted.info()["structures"] == {"pool_bytes": 0, "dram_bytes": 0}
    assert pmemfs("pages", mounted.mountpoint, "--json").out == ""
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"served", 5)
        os.fsync(fd)
        assert os.pread(fd, 6, 5) == b"served"


def test_a_read_only_mount_keeps_its_structures_in_memory(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "ro")
    with opened(mounted.device, os.O_RDONLY) as fd:
        os.pread(fd, 3 * PAGE, 0)
    assert_counts(mounted, referenced=3, clean=3, dirty=0)
    assert mounted.pages()["scheme"] == "on-demand"
    assert mounted.info()["pool"]["scheme"] == "pmem"
