"""What only files and block devices do: who holds them, how they are carried, and after a kill."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from kit.commands import run_command
from kit.mounts import PoolMaker
from kit.processes import stopped, wait_until
from kit.sources import loop_device, mounted_tmpfs, needs_root, sparse_file
from pmemfs.errors import OriginBusy, UnusableOrigin
from pmemfs.origin.base import Left
from pmemfs.origin.carriers import ThreadCarrier
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.origin.opening import open_origin
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache.life import await_transfers

PAGE = 4 * KIB


@pytest.fixture
def memory() -> memoryview:
    """Pages that are aligned as those of a pool are."""
    return memoryview(mmap.mmap(-1, MIB))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sparse_file(tmp_path / "origin", 16 * MIB)


async def held(text: str) -> None:
    """Take the right to write, and give it back."""
    origin = await open_origin(text)
    try:
        await origin.fence()
    finally:
        await origin.close()


@pytest.mark.parametrize("word", ["io_uring", "threads"])
def test_both_ways_to_carry_a_transfer_out_do_the_same(
    file: Path, memory: memoryview, word: str
) -> None:
    async def main() -> None:
        carrier = ThreadCarrier() if word == "threads" else None
        origin = await FileOrigin.open(FileName(str(file)), carrier=carrier)
        assert origin.carried_by == word
        data = os.urandom(64 * PAGE)
        memory[: 64 * PAGE] = data
        views = [memory[page * PAGE : (page + 1) * PAGE] for page in range(64)]
        async with trio.open_nursery() as nursery:
            for page, view in enumerate(views):
                nursery.start_soon(origin.write, page * PAGE, [view])
        await origin.flush()
        await origin.read(0, views[::-1])
        assert b"".join(views[::-1]) == data
        with pytest.raises(OSError, match=r"\w") as caught:
            await origin.read(16 * MIB, views)
        assert caught.value.errno == errno.EIO
        await origin.close()

    trio.run(main)


FORBIDDEN = """
import ctypes, mmap, struct, sys, trio
# Answer io_uring_setup with EPERM, as containers do: if (number == 425) EPERM else allow.
words = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *word) for word in words)
kept = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(kept)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
from pmemfs.origin.opening import open_origin
async def main():
    origin = await open_origin(sys.argv[1])
    with memoryview(mmap.mmap(-1, 8192)) as memory:
        memory[:4096] = b"x" * 4096
        await origin.write(0, [memory[:4096]])
        await origin.flush()
        await origin.read(0, [memory[4096:]])
        assert memory[4096:] == memory[:4096]
    await origin.close()
    print(origin.carried_by)
trio.run(main)
"""


def test_where_the_kernel_forbids_rings_threads_carry(file: Path) -> None:
    done = run_command(sys.executable, "-c", FORBIDDEN, file)
    assert (done.code, done.out) == (0, "threads\n"), done.err


def test_a_file_that_was_cut_off_fails_and_does_not_hang(file: Path, memory: memoryview) -> None:
    async def main() -> None:
        origin = await open_origin(str(file))
        os.truncate(file, 8 * MIB)
        with pytest.raises(OSError, match=r"\w") as caught:
            await origin.read(8 * MIB - PAGE, [memory[: 2 * PAGE]])
        assert caught.value.errno == errno.EIO
        assert await origin.resize_seen() == 8 * MIB
        with pytest.raises(OSError, match=r"\w") as caught:
            await origin.write(8 * MIB, [memory[:PAGE]])
        assert caught.value.errno == errno.EINVAL
        await origin.close()

    trio.run(main)
    assert file.stat().st_size == 8 * MIB


@needs_root
def test_a_full_file_system_is_no_space(tmp_path: Path, memory: memoryview) -> None:
    async def main(path: Path) -> None:
        origin = await open_origin(str(path))
        for start in range(0, 2 * MIB, MIB):
            await origin.write(start, [memory])
        with pytest.raises(OSError, match=r"\w") as caught:
            await origin.write(4 * MIB, [memory])
        assert caught.value.errno == errno.ENOSPC
        # This file system can't make zeroes that have room, so they are written.
        with pytest.raises(OSError, match=r"\w") as caught:
            await origin.write_zeroes(4 * MIB, MIB, may_trim=False)
        assert caught.value.errno == errno.ENOSPC
        await origin.close()

    with mounted_tmpfs(tmp_path / "small", "size=2M") as directory:
        trio.run(main, sparse_file(directory / "origin", 16 * MIB))


@pytest.mark.parametrize(
    ("size_bytes", "why"),
    [(0, "it is empty"), (1000, "size of 1000 bytes"), (16 * MIB + 1, "size of 16777217 bytes")],
)
def test_a_size_of_no_whole_sectors_is_refused(tmp_path: Path, size_bytes: int, why: str) -> None:
    path = sparse_file(tmp_path / "odd", size_bytes)
    with pytest.raises(UnusableOrigin, match=why):
        trio.run(open_origin, str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "neither a file nor a block device"),
        (tmp_path / "none", "no such file"),
        (Path("/dev/null"), "neither a file nor a block device"),
    ):
        with pytest.raises(UnusableOrigin, match=why) as caught:
            trio.run(open_origin, str(path))
        assert str(path) in str(caught.value)


@needs_root
def test_a_device_that_is_mounted_or_held_is_refused_and_says_where(tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "image", 16 * MIB)
    place = tmp_path / "place"
    place.mkdir()
    with loop_device(image) as device:
        assert run_command("mkfs.ext4", "-q", device).code == 0
        assert run_command("mount", device, place).code == 0
        with pytest.raises(OriginBusy, match=f"mounted on {place}"):
            trio.run(held, str(device))
        assert run_command("umount", place).code == 0
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        with pytest.raises(OriginBusy, match="is in use"):
            trio.run(held, str(device))
        os.close(fd)
        trio.run(held, str(device))


@needs_root
def test_who_takes_over_from_a_dead_process_has_its_device_all_the_time(file: Path) -> None:
    with loop_device(file) as device:

        async def hold() -> int:
            origin = await open_origin(str(device))
            await origin.fence()
            (fd,) = origin.left().fds
            kept = os.dup(fd)
            await origin.close()
            return kept

        async def take_over(fd: int) -> None:
            origin = await open_origin(str(device), left=Left([fd]))
            await origin.fence()
            await origin.close()

        kept = trio.run(hold)
        with pytest.raises(OriginBusy):
            trio.run(held, str(device))
        trio.run(take_over, kept)
        os.close(kept)
        trio.run(held, str(device))


@needs_root
def test_a_file_behind_a_loop_device_is_refused_with_its_name(file: Path) -> None:
    with loop_device(file) as device, pytest.raises(OriginBusy, match=f"^{file}.*{device}"):
        trio.run(held, str(file))
    trio.run(held, str(file))


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_a_file_that_another_program_has_locked_is_refused(file: Path, kind: str) -> None:
    """qemu locks with fcntl(2), others with flock(2)."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'r+b'); "
    code += "fcntl.flock(f, 2)" if kind == "flock" else "fcntl.lockf(f, 2, 1, 100)"
    code += "; print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(OriginBusy, match=f"process {other.pid} has it open"):
            trio.run(held, str(file))
        other.kill()
    trio.run(held, str(file))


READING = """
import fcntl, mmap, os, sys, trio, trio.testing
from pmemfs.origin.opening import open_origin
async def main():
    pool = os.open(sys.argv[2], os.O_RDWR)
    fcntl.flock(pool, fcntl.LOCK_EX)
    memory = memoryview(mmap.mmap(pool, 4096))
    origin = await open_origin(sys.argv[1], read_only=True)
    origin.hold(pool, int(sys.argv[3]))
    print(origin.carried_by, flush=True)
    sys.stdin.readline()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(origin.read, 0, [memory])
        await trio.testing.wait_all_tasks_blocked()
        print("under way", flush=True)
trio.run(main)
"""


@needs_root
def test_the_pools_lock_outlives_a_killed_process_as_long_as_its_transfers(
    pools: PoolMaker, shm: Path
) -> None:
    pool = sparse_file(shm / "pool", PAGE)
    behind = pools.mount(pools.create("behind", "32M"))
    behind.device.write_bytes(b"o" * PAGE)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(behind.device))
        next_owner = stack.enter_context(pool.open("r+b"))
        seen, held = os.pipe()
        stack.callback(os.close, seen)
        words = [sys.executable, "-c", READING, str(device), str(pool), str(held)]
        reader = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  pass_fds=[held])  # fmt: skip
        os.close(held)
        stack.callback(reader.kill)
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"io_uring\n"
        with stopped(behind.pid, behind.data_plane_pid):
            reader.stdin.write(b"\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == b"under way\n"
            reader.kill()
            reader.wait()
            assert not is_free(next_owner.fileno())
            assert not select.select([seen], [], [], 0)[0]
            assert pool.read_bytes() == bytes(PAGE)
        # Only now the read is over.
        await_transfers(os.dup(seen))
        assert pool.read_bytes() == b"o" * PAGE
        wait_until(lambda: is_free(next_owner.fileno()), "the lock is free")
        assert pool.read_bytes() == b"o" * PAGE


def is_free(fd: int) -> bool:
    """Whether nobody else has the lock of a pool."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_server_of_fuse_never_holds_up_the_whole_process(pools: PoolMaker) -> None:
    slow = pools.mount(pools.create("slow", "32M"))

    async def main() -> None:
        origin = await FileOrigin.open(FileName(str(slow.device)))
        assert origin.carried_by == "threads"
        with memoryview(mmap.mmap(-1, PAGE)) as memory:
            async with trio.open_nursery() as nursery:
                with stopped(slow.pid, slow.data_plane_pid):
                    nursery.start_soon(origin.read, 0, [memory])
                    await trio.sleep(0.1)
        await origin.close()

    trio.run(main)


@needs_root
def test_a_device_that_was_set_read_only_is_opened_for_reading_only(tmp_path: Path) -> None:
    with loop_device(sparse_file(tmp_path / "file", MIB)) as device:

        async def look() -> None:
            with pytest.raises(UnusableOrigin, match="the device is read-only"):
                await open_origin(str(device))
            origin = await open_origin(str(device), read_only=True)
            await origin.close()

        assert run_command("blockdev", "--setro", device).code == 0
        try:
            trio.run(look)
        finally:
            # The next that gets this loop device would have it read-only.
            run_command("blockdev", "--setrw", device)


class FailingOnce(ThreadCarrier):
    """Its first sync fails, as that of a disk which loses its cable for a while."""

    has_failed = False

    async def sync(self, fd: int) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise OSError(errno.EIO, "the disk was away")
        await super().sync(fd)


def test_a_flush_succeeds_again_for_those_who_know_what_was_lost(file: Path) -> None:
    async def main() -> None:
        origin = await FileOrigin.open(FileName(str(file)), carrier=FailingOnce())
        losses = origin.losses
        with pytest.raises(OSError, match="was away"):
            await origin.flush(losses)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                await origin.flush(losses)
            with pytest.raises(OSError, match="Input/output error"):
                await origin.flush()
        await origin.flush(origin.losses)
        await origin.close()

    trio.run(main)
