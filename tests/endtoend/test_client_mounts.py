"""Clients of each kind of mount: read-only, mode `block`, without page structures, and dead."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import (
    FRAME,
    assert_clean,
    free_bytes,
    hears,
    program,
    wait_for_pins,
    write_file,
    write_in_pieces,
    write_scattered,
)
from kit.commands import pmemfs as run_pmemfs
from kit.commands import pmemfs_ok, run_command
from kit.descriptors import open_before, open_descriptors
from kit.mounts import Engine, Mounted, PoolMaker, Session, each_engine, may_pass
from kit.processes import stop, wait_until
from kit.users import NOBODY, as_user
from pmemfs.control.client import ANSWER_TIMEOUT_SECONDS
from pmemfs.pins.registry import REST_SECONDS
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow]

_PROT_NONE = 0
"""Which `mmap` lacks."""
_MOST_MAPPINGS = 1 << 21


def fs_mount(pools: PoolMaker, *options: object, size: str = "64M") -> Mounted:
    return pools.mount(pools.create("fs0", size, "--mode", "fs", *options))


def test_an_array_over_a_device_is_the_device(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "64M"))
    with pmemfs.connect(mounted.mountpoint) as fs:
        whole = fs.map("pmem0", mode="r+")
        assert len(whole) == mounted.device.stat().st_size
        whole[5 * MIB : 5 * MIB + 4] = list(b"data")
        with open(mounted.device, "r+b", buffering=0) as device:
            assert os.pread(device.fileno(), 4, 5 * MIB) == b"data"
            os.pwrite(device.fileno(), b"more", 9 * MIB)
            assert whole[9 * MIB : 9 * MIB + 4].tobytes() == b"more"
            part = fs.map("pmem0", shape=4, offset=9 * MIB)
            done = subprocess.run(
                ["fallocate", "--punch-hole", "-o", str(8 * MIB), "-l", str(4 * MIB),
                 mounted.device], check=False,
            )  # fmt: skip
            assert done.returncode == 0
            assert not whole[8 * MIB : 12 * MIB].any()
            assert not part.any()
            part = fs.map("pmem0", mode="r+", shape=MIB, offset=8 * MIB)
            part[:] = 1
            assert os.pread(device.fileno(), MIB, 8 * MIB) == b"\1" * MIB
        with pytest.raises(pmemfs.NoNewFiles, match=r"mode 'block'.* --mode fs") as refused:
            fs.create("other", 100)
        assert refused.value.errno == errno.EPERM
        assert str(mounted.mountpoint) in str(refused.value)
        del whole, part
        wait_for_pins(fs, 0)
    assert_clean(pools, mounted)


def test_a_sparse_device_has_memory_under_every_array(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "64M", "--sparse"))
    with pmemfs.connect(mounted.mountpoint) as fs:
        whole = fs.map("pmem0", mode="r+")
        assert not whole.any()
        whole[:] = 7
        with open(mounted.device, "rb", buffering=0) as device:
            assert device.read(3 * MIB) == b"\7" * 3 * MIB
        del whole
    assert_clean(pools, mounted)


@pytest.mark.parametrize("mode", ["block", "fs"])
def test_a_client_of_a_read_only_mount_cannot_write(pools: PoolMaker, mode: str) -> None:
    pool = pools.create("pool", "64M", "--mode", mode)
    mounted = pools.mount(pool)
    file = mounted.mountpoint / "pool"
    with open(file, "r+b" if mode == "block" else "wb") as opened:
        opened.write(b"content")
    pools.umount(mounted)
    mounted = pools.mount(pool, "-o", "ro")
    with pmemfs.connect(mounted.mountpoint) as fs:
        with pytest.raises(OSError, match="Read-only") as refused:
            fs.map("pool", mode="r+")
        assert refused.value.errno == errno.EROFS
        array = fs.map("pool", shape=7)
        assert array.tobytes() == b"content"
        private = fs.map("pool", shape=7, mode="c")
        private[:] = 0
        assert array.tobytes() == b"content"
        with pytest.raises(OSError, match="Read-only"):
            fs.create("new", 10)
        # Nor by a way of its own: what it was given is open for reading only.
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert not [line for line in maps if str(pool) in line and " rw-s" in line]
        assert descriptors_of(pool) == [False]
        del array, private


def descriptors_of(pool: Path) -> list[bool]:
    """Whether each descriptor that this process has of a pool can write, sorted."""
    can_write = []
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link) == str(pool):
            flags = int((Path("/proc/self/fdinfo") / link.name).read_text().split()[3], 8)
            can_write.append(flags & os.O_ACCMODE != os.O_RDONLY)
    return sorted(can_write)


@each_engine
def test_a_client_that_reads_gets_no_descriptor_that_can_write(
    pools: PoolMaker, engine: Engine
) -> None:
    mounted = fs_mount(pools)
    content = write_file(mounted.mountpoint / "file", 5)
    with pmemfs.connect(mounted.mountpoint) as fs:
        assert (fs.map("file") == content).all()
        private = fs.map("file", mode="c")
        private[:] = 0
        assert descriptors_of(mounted.pool) == [False]
        with fs.open("file", mode="r+") as mapping:
            mapping.array[0] = content[0] = 3
        assert (fs.map("file") == content).all()
        assert descriptors_of(mounted.pool) == [False, True]
        del private, mapping
        wait_for_pins(fs, 0)
    assert descriptors_of(mounted.pool) == []
    pmemfs_ok("mount", "-o", "remount,ro", mounted.mountpoint)
    with pmemfs.connect(mounted.mountpoint) as fs:
        assert (fs.map("file") == content).all()
        assert descriptors_of(mounted.pool) == [False]


@each_engine
def test_a_descriptor_that_only_reads_keeps_writers_out_and_readers_not(
    pools: PoolMaker, engine: Engine
) -> None:
    mounted = fs_mount(pools)
    content = write_file(mounted.mountpoint / "file", 5)
    with pmemfs.connect(mounted.mountpoint) as fs:
        array = fs.map("file")
        Session.of(mounted).kill()
        run_command("umount", mounted.mountpoint)
    for command in (("mount", mounted.pool, pools.mountpoint("again")),
                    ("check", "--repair", mounted.pool),
                    ("create", "--force", mounted.pool)):  # fmt: skip
        refused = run_pmemfs(*command)
        assert refused.code != 0
        assert f"process {os.getpid()} still has pages of it" in refused.err
    again = pools.mount(mounted.pool, "-o", "ro", at="again")
    assert (array == content).all()
    assert (again.mountpoint / "file").read_bytes() == content.tobytes()
    pools.umount(again)
    del array
    assert_clean(pools, pools.mount(mounted.pool, at="again"))


def test_without_page_structures_nothing_can_be_pinned(pools: PoolMaker) -> None:
    mounted = fs_mount(pools, "--scheme", "none")
    write_file(mounted.mountpoint / "file", 2)
    with pmemfs.connect(mounted.mountpoint) as fs:
        for mode in ("r", "r+", "c"):
            with pytest.raises(pmemfs.NoPageStructures, match=r"'none'.*'on-demand'") as refused:
                fs.map("file", mode=mode)
            assert refused.value.errno == errno.EOPNOTSUPP
        with pytest.raises(pmemfs.NoPageStructures):
            fs.create("new", 100)
        assert sorted(os.listdir(mounted.mountpoint)) == ["file"]
        assert fs.pins() == []
        assert fs.statistics() == (0, 0, 0)


def test_page_structures_are_made_on_demand(pools: PoolMaker) -> None:
    mounted = fs_mount(pools, "--scheme", "on-demand")
    content = write_in_pieces(mounted.mountpoint / "file", 50)
    with pmemfs.connect(mounted.mountpoint) as fs:
        whole = fs.map("file")
        (mounted.mountpoint / "file").unlink()
        write_file(mounted.mountpoint / "other", 50)
        assert (whole == content).all()
        del whole
        wait_for_pins(fs, 0)
    assert_clean(pools, mounted)


def test_a_file_can_be_laid_out_anew_in_one_piece(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    content = write_in_pieces(mounted.mountpoint / "file", 100)
    with pmemfs.connect(mounted.mountpoint) as fs:
        old = fs.map("file")
        with pytest.raises(pmemfs.CannotPin, match="programs have pages of it") as refused:
            fs.map("file", contiguous=True)
        assert refused.value.errno == errno.EBUSY
        del old
        one = fs.map("file", contiguous=True)
        assert (one == content).all()
        with open("/proc/self/maps") as maps:
            start = f"{one.ctypes.data:x}-"
            (line,) = (line for line in maps if line.startswith(start))
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        assert high - low == 100 * FRAME
        del one
        wait_for_pins(fs, 0)
    assert_clean(pools, mounted)


def test_a_file_of_too_many_pieces_is_refused_with_a_remedy(pools: PoolMaker) -> None:
    mounted = fs_mount(pools, size="24M")
    content = write_scattered(mounted.mountpoint / "file", 1500)
    with pmemfs.connect(mounted.mountpoint) as fs:
        with mappings_left(1000):
            with pytest.raises(pmemfs.TooManyMappings, match="contiguous=True") as refused:
                fs.map("file")
            assert refused.value.errno == errno.ENOMEM
            assert isinstance(refused.value, OSError)
            whole = fs.map("file", contiguous=True)
        assert (whole == content).all()
        del whole, refused
        wait_for_pins(fs, 0)


@contextmanager
def mappings_left(count: int) -> Iterator[None]:
    """Meanwhile this process may have only about so many more mappings. The limit stays as it is:
    all processes of the machine have the same one."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > _MOST_MAPPINGS:
        pytest.skip(f"it would take too long to make {limit} mappings")
    with open("/proc/self/maps") as maps:
        taken = limit - count - len(maps.readlines())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    protect = ctypes.CDLL(None).mprotect
    with mmap.mmap(-1, taken * FRAME, flags, mmap.PROT_READ) as memory:
        start = np.frombuffer(memory, "u1").ctypes.data
        # Pages side by side that may not be used alike are no one mapping.
        for at in range(start, start + taken * FRAME, 2 * FRAME):
            assert protect(ctypes.c_void_p(at), ctypes.c_size_t(FRAME), _PROT_NONE) == 0
        yield


def test_at_the_limit_of_open_files_a_sentence_says_what_to_do(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    for number in range(40):
        write_file(mounted.mountpoint / str(number), 1, seed=number)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pmemfs.connect(mounted.mountpoint) as fs:
        arrays = [fs.map("0")]
        open_now = len(open_before())
        # Once where open(2) fails, and once where the pin finds no room.
        for spare in (0, 1, 2, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + spare + 5, before[1]))
            try:
                with pytest.raises(pmemfs.TooManyOpenFiles, match="map several files with one pin"):
                    arrays += map(fs.map, map(str, range(1, 40)))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert all(len(array) == FRAME for array in arrays)
            del arrays[1:]
            assert len(open_descriptors()) <= open_now + 1
        arrays.clear()
        wait_for_pins(fs, 0)


# The end of the daemon


def test_arrays_outlive_a_daemon_that_is_killed(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    content = write_in_pieces(mounted.mountpoint / "file", 20)
    with pmemfs.connect(mounted.mountpoint) as fs:
        mapping = fs.open("file", mode="r+")
        whole = mapping.array
        session = Session.of(mounted)
        session.kill()
        assert (whole == content).all()
        whole[:] = 3
        for call in (lambda: fs.map("file"), lambda: fs.open("file", mode="r+"), fs.pins,
                     mapping.flush, lambda: fs.create("new", 10)):  # fmt: skip
            with pytest.raises(pmemfs.DaemonGone, match="has ended") as gone:
                call()
            assert gone.value.errno == errno.ENOTCONN
            assert str(mounted.mountpoint) in str(gone.value)
        assert (whole == 3).all()
        # The lock is shared with the array, so nobody gives its pages to others.
        run_command("umount", mounted.mountpoint)
        again = run_pmemfs("mount", mounted.pool, pools.mountpoint("again"))
        assert again.code == 32
        assert f"process {os.getpid()} still has pages of it" in again.err
        del whole, gone
        mapping.close()
    pools.mount(mounted.pool, at="again")


def test_umount_names_the_programs_that_still_hold_pages(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    write_file(mounted.mountpoint / "file", 2)
    with (
        program(ARRAY_ALONE, mounted.mountpoint) as first,
        program(ARRAY_ALONE, mounted.mountpoint) as other,
    ):
        assert hears(first) == hears(other) == "mapped"
        done = run_pmemfs("umount", mounted.mountpoint)
        assert done.code == 0
        assert done.out == ""
        pids = ", ".join(map(str, sorted([first.pid, other.pid])))
        held = (
            f"2 processes ({pids}) still hold pages of it; the pool can't be mounted again before"
        )
        assert done.err.startswith(f"pmemfs: warning: {mounted.pool}: {held}")
        again = run_pmemfs("mount", mounted.pool, pools.mountpoint("again"))
        assert again.code == 32
        assert f"{first.pid}" in again.err
        assert "still have pages of it" in again.err
    mounted = pools.mount(mounted.pool)
    done = run_pmemfs("umount", mounted.mountpoint)
    assert (done.code, done.err) == (0, "")


ARRAY_ALONE = """
import sys, pmemfs
with pmemfs.connect(sys.argv[1]) as fs:
    array = fs.map("file")
print("mapped", flush=True)
sys.stdin.read()
"""
"""It has closed everything; only the array is left, and no descriptor of the pool."""


def test_a_daemon_that_takes_long_is_waited_for_until_an_interrupt(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    content = write_file(mounted.mountpoint / "file", 5)
    text = """
import sys
import pmemfs
fs = pmemfs.connect(sys.argv[1])
print(int(fs.map("file")[0]), flush=True)
for _ in range(2):
    sys.stdin.readline()
    try:
        print(int(fs.map("file")[0]), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
    pid = mounted.pid
    with program(text, mounted.mountpoint) as child:
        assert hears(child) == str(content[0])
        stop(pid)
        try:
            tell(child)
            # Longer than a command waits for an answer.
            time.sleep(ANSWER_TIMEOUT_SECONDS + 2)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            assert hears(child) == "interrupted"
            tell(child)
            # That it waits again, the first time has shown how long.
            time.sleep(1)
            assert child.poll() is None
        finally:
            os.kill(pid, signal.SIGCONT)
        assert hears(child) == str(content[0])
    with pmemfs.connect(mounted.mountpoint) as fs:
        wait_for_pins(fs, 0)


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def test_arrays_outlive_an_unmount(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    content = write_in_pieces(mounted.mountpoint / "file", 20)
    fs = pmemfs.connect(mounted.mountpoint)
    whole = fs.map("file")
    pools.umount(mounted)
    assert (whole == content).all()
    with pytest.raises(pmemfs.DaemonGone):
        fs.map(mounted.mountpoint / "file")
    with pytest.raises(pmemfs.DaemonGone):
        fs.pins()
    again = run_pmemfs("mount", mounted.pool, pools.mountpoint("again"))
    assert again.code == 32, "pages that are shown are given to nobody"
    assert f"process {os.getpid()} still has pages of it" in again.err
    fs.close()
    del whole
    assert_clean(pools, pools.mount(mounted.pool, at="again"))


def test_a_connection_with_an_older_mount_is_no_use(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    write_file(mounted.mountpoint / "file", 2)
    with pmemfs.connect(mounted.mountpoint) as fs:
        assert len(fs.map("file")) == 2 * FRAME
        pools.umount(mounted)
        pools.mount(mounted.pool)
        with pytest.raises(pmemfs.DaemonGone):
            fs.map("file")
    with pmemfs.connect(mounted.mountpoint) as fs:
        assert len(fs.map("file")) == 2 * FRAME


def test_no_mount_answers_for_an_older_one_of_the_same_pool(pools: PoolMaker) -> None:
    """A read-only mount leaves the pool's label as it was."""
    pool = pools.create("fs0", "64M", "--mode", "fs")
    mounted = pools.mount(pool, "-o", "ro")
    with pmemfs.connect(mounted.mountpoint) as fs:
        assert fs.pins() == []
        pools.umount(mounted)
        # Its number goes to the next mount, unless another test is faster.
        pools.mount(pool, "-o", "ro")
        with pytest.raises(pmemfs.DaemonGone):
            fs.pins()


def test_a_flush_never_reaches_the_mount_that_took_the_place_of_another(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    write_file(mounted.mountpoint / "file", 2)
    other = pools.create("fs1", "64M", "--mode", "fs")
    with pmemfs.connect(mounted.mountpoint) as fs, fs.open("file", mode="r+") as mapping:
        pools.umount(mounted)
        # The kernel gives the number of a mount, which names its socket, to the next one.
        after = pools.mount(other, at=mounted.mountpoint.name)
        write_file(after.mountpoint / "file", 2)
        with pmemfs.connect(after.mountpoint) as later:
            array = later.map("file", mode="r+")
            assert pmemfs.pin_of(array).number == mapping.pin.number, "the daemon counts from one"
            changed = (after.mountpoint / "file").stat().st_mtime_ns
            with pytest.raises(pmemfs.DaemonGone) as gone:
                mapping.flush()
            assert str(mounted.mountpoint) in str(gone.value)
            assert (after.mountpoint / "file").stat().st_mtime_ns == changed
            del array


def test_a_closed_connection_is_closed_and_its_arrays_are_not(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    content = write_file(mounted.mountpoint / "file", 2)
    with pmemfs.connect(mounted.mountpoint) as fs:
        mapping = fs.open("file", mode="r+")
        assert repr(fs) == f"<Mount {str(mounted.mountpoint)!r}>"
    fs.close()
    for call in (lambda: fs.map("file"), fs.pins, mapping.flush):
        with pytest.raises(pmemfs.Closed, match="closed"):
            call()
    assert (mapping.array == content).all()
    with pmemfs.connect(mounted.mountpoint) as other:
        assert len(other.pins()) == 1
        mapping.close()
        wait_for_pins(other, 0)


# Other users


def test_another_user_is_told_whose_mount_it_is(pools: PoolMaker) -> None:
    may_pass(pools)
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), "-o", "allow_other")

    def try_it() -> str:
        try:
            pmemfs.connect(mounted.mountpoint)
        except pmemfs.NotPermitted as error:
            return str(error)
        return ""

    assert "user 0" in as_user(try_it, NOBODY)


# What dies leaves nothing

HOLDER = """
import os, sys
import pmemfs
fs = pmemfs.connect(sys.argv[1])
held = [fs.map("file", mode="r+"), fs.map("file"), fs.open("other", mode="c")]
new = fs.create("new", 40960)
new.array[:] = 1
print("ready", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(mounted: Mounted) -> Iterator[subprocess.Popen[str]]:
    with program(HOLDER, mounted.mountpoint) as child:
        assert hears(child) == "ready"
        yield child


def test_what_a_killed_client_held_is_free(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    root = mounted.mountpoint
    free = free_bytes(root)
    write_file(root / "file", 100)
    write_file(root / "other", 100)
    with pmemfs.connect(root) as fs:
        with holder(mounted) as child:
            assert {pin.pid for pin in fs.pins()} == {child.pid}
            assert len(fs.pins()) == 4
            child.kill()
            child.wait()
            wait_for_pins(fs, 0)
        (root / "other").unlink()
        assert sorted(os.listdir(root)) == ["file"]
        # The kernel forgets a file after its removal, and long before anything has rested.
        wait_until(
            lambda: free - free_bytes(root) < 200 * FRAME, "`other` is free", REST_SECONDS - 10
        )
        # What it could write to rests, as long as a device may still be writing to it.
        assert free - free_bytes(root) >= 100 * FRAME
        assert (np.frombuffer((root / "file").read_bytes(), "u1") == fs.map("file")).all()
    assert_clean(pools, mounted)


def test_what_a_client_that_ends_in_order_held_is_free_at_once(pools: PoolMaker) -> None:
    mounted = fs_mount(pools)
    root = mounted.mountpoint
    (root / "nothing").touch()
    free = free_bytes(root)
    write_file(root / "file", 100)
    write_file(root / "other", 100)
    with pmemfs.connect(root) as fs, holder(mounted) as child:
        (root / "file").unlink()
        (root / "other").unlink()
        assert free_bytes(root) <= free - 200 * FRAME
        child.communicate("\n")
        assert child.returncode == 0
        wait_for_pins(fs, 0)
        # A frame or two are the directory's, which had names. After a rest all would be free.
        wait_until(lambda: free_bytes(root) >= free - 4 * FRAME, "nothing rests", REST_SECONDS - 10)
