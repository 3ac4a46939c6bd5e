"""mmap(MAP_SHARED) of the device by another program, coherent with direct I/O after msync."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.mounts import Engine, Mounted, PoolMaker, native_only
from kit.posix import opened
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("engine")]

CACHED = "user.pmemfs.cached"
PAGE = 4096
PAGES = 4096

OTHER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 2 << 20)
    assert mapped[5000:5009] == b"by write\\0", mapped[5000:5009]
    mapped[1 << 20 : (1 << 20) + 6] = b"mapped"
    mapped.flush()
"""


@native_only
def test_what_one_program_maps_another_reads(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"by write\0", 5000)
        done = subprocess.run(
            [sys.executable, "-c", OTHER, str(mounted.device)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert os.pread(fd, 8, (1 << 20) - 1) == b"\0mapped\0"
    # msync is an fsync too.
    counts = mounted.pages()["counts"]
    assert counts["clean"] >= 2
    pools.umount(mounted)
    pools.mount(mounted.pool)
    with opened(mounted.device) as fd:
        assert os.pread(fd, 6, 1 << 20) == b"mapped"


@native_only
def test_two_mappings_share_what_they_hold(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as first, opened(mounted.device) as second:
        one, other = mmap.mmap(first, MIB), mmap.mmap(second, MIB)
        for page in range(0, MIB, 4096):
            one[page : page + 4] = page.to_bytes(4, "little")
        assert all(
            other[page : page + 4] == page.to_bytes(4, "little") for page in range(0, MIB, 4096)
        )
        one.flush()
        assert os.pread(first, 4, 4096 * 7) == (4096 * 7).to_bytes(4, "little")
        one.close()
        other.close()


@native_only
def test_a_private_mapping_keeps_its_changes_to_itself(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"theirs", 0)
        mapped = mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE)
        mapped[:6] = b"secret"
        assert os.pread(fd, 6, 0) == b"theirs"
        mapped.close()


def lost(file: Path, *, same_pages: bool, rounds: int) -> int:
    """How many of a process's stores through a mapping and of another's writes to other bytes are
    lost: both of them in each page, or one in the even pages and one in the odd ones."""
    stored, written = range(PAGES), range(PAGES)
    if not same_pages:
        stored, written = stored[::2], written[1::2]
    return sum(_lost_once(file, stored, written) for _ in range(rounds))


def _lost_once(file: Path, stored: range, written: range) -> int:
    with opened(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, PAGES * PAGE)
        mapped = mmap.mmap(fd, PAGES * PAGE)
        # Another process, since threads of one Python take turns.
        storing = os.fork()
        if storing == 0:
            for page in stored:
                mapped[page * PAGE + 1024] = 1
            os._exit(0)
        for page in written:
            assert os.pwrite(fd, b"\2", page * PAGE + 2048) == 1
        assert os.waitpid(storing, 0)[1] == 0
        mapped.flush()
        mapped.close()
        data = os.pread(fd, PAGES * PAGE, 0)
    return sum(data[page * PAGE + 1024] != 1 for page in stored) + sum(
        data[page * PAGE + 2048] != 2 for page in written
    )


@pytest.fixture
def files(pools: PoolMaker) -> Mounted:
    return pools.mount(pools.create("files", "64M", "--mode", "fs"))


def test_of_a_cached_file_neither_a_store_nor_a_write_to_one_page_is_lost(files: Mounted) -> None:
    directory = files.mountpoint / "cached"
    directory.mkdir()
    os.setxattr(directory, CACHED, b"1")
    assert lost(directory / "file", same_pages=True, rounds=5) == 0
    (directory / "below").mkdir()
    for made in ("file", "below"):
        assert os.getxattr(directory / made, CACHED) == b"1"


def test_of_a_mount_with_cached_neither_is_lost(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"), "-o", "cached")
    assert lost(mounted.mountpoint / "file", same_pages=True, rounds=3) == 0


@native_only
def test_stores_and_writes_to_different_pages_never_harm_each_other(files: Mounted) -> None:
    assert lost(files.mountpoint / "file", same_pages=False, rounds=3) == 0


@native_only
def test_one_after_the_other_a_store_and_a_write_to_one_page_are_both_kept(files: Mounted) -> None:
    with opened(files.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 100 * PAGE)
        mapped = mmap.mmap(fd, 100 * PAGE)
        for page in range(100):
            at = page * PAGE
            mapped[at : at + 5] = b"store"
            assert os.pread(fd, 5, at) == b"store"
            os.pwrite(fd, b"write", at + 5)
            assert mapped[at : at + 10] == b"storewrite"
            mapped[at + 10 : at + 15] = b"again"
            assert os.pread(fd, 15, at) == b"storewriteagain"
        mapped.close()


def test_a_file_is_not_cached_after_all_when_it_says_so(files: Mounted, engine: Engine) -> None:
    file = files.mountpoint / "file"
    file.touch()
    os.setxattr(file, CACHED, b"1")
    with opened(file) as fd:
        os.pwrite(fd, bytes(PAGE), 0)
        mmap.mmap(fd, PAGE).close()
    os.setxattr(file, CACHED, b"0")
    with opened(file) as fd:
        if engine.name == "native":
            mmap.mmap(fd, PAGE).close()
            return
        # What pyfuse3 can't ask the kernel for; so this tells that the file is not cached.
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(fd, PAGE)


@pytest.mark.parametrize("value", [b"", b"2", b"yes", b"no", b"1\n", b"\0"])
def test_an_attribute_that_says_neither_yes_nor_no_is_refused(files: Mounted, value: bytes) -> None:
    os.setxattr(files.mountpoint, CACHED, b"1")
    with pytest.raises(OSError, match="Invalid argument"):
        os.setxattr(files.mountpoint, CACHED, value)
    assert os.getxattr(files.mountpoint, CACHED) == b"1"
    os.setxattr(files.mountpoint, "user.other", value)


def test_stores_through_mappings_of_roots_mounts_are_not_held_up(files: Mounted) -> None:
    mount = mount_at(str(files.mountpoint))
    assert mount is not None
    limits = Path("/sys/class/bdi") / mount.device
    assert (limits / "strict_limit").read_text() == "0\n"
    assert (limits / "max_ratio").read_text() == "100\n"
