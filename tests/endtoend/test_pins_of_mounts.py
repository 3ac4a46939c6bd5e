"""Pages that programs hold, through real mounts: while their file changes, they die, mounts end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_ok
from kit.killing import processes_of
from kit.mounts import Engine, Mounted, PoolMaker, native_only
from kit.pin_clients import PinClient, pinning_process
from kit.processes import is_running, wait_until
from pmemfs.control.client import RemoteError
from pmemfs.control.places import socket_path
from pmemfs.mountinfo import mount_at
from pmemfs.pins.words import PinWord
from pmemfs.units import KIB, MIB

pytestmark = pytest.mark.usefixtures("engine")

ENGINES = [Engine("native"), Engine("python")]
each_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True, ids=str)


@pytest.fixture
def fs(pools: PoolMaker) -> Mounted:
    return pools.mount(pools.create("pool", "64M", "--mode", "fs"))


@pytest.fixture
def client(fs: Mounted) -> Iterator[PinClient]:
    client = PinClient(fs.mountpoint)
    yield client
    client.close()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def free_blocks(mounted: Mounted) -> int:
    return os.statvfs(mounted.mountpoint).f_bfree


def has_ended(mounted: Mounted, pools: PoolMaker) -> None:
    pid = mounted.pid
    pmemfs_ok("umount", mounted.mountpoint)
    wait_until(lambda: not is_running(pid), "the daemon has ended")


CHANGES = {
    "truncate": lambda path, other: os.truncate(path, 0),
    "rm": lambda path, other: os.unlink(path),
    "rename over": lambda path, other: os.rename(other, path),
    "rewrite": lambda path, other: Path(path).write_bytes(b"z" * MIB),
}


@each_engine
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_changes_at_once_and_a_program_keeps_the_pages_that_it_has(
    fs: Mounted, client: PinClient, change: str
) -> None:
    path, other = write(fs.mountpoint / "f", b"a" * MIB), write(fs.mountpoint / "o", b"o")
    before = free_blocks(fs)
    pin = client.pin(path)
    CHANGES[change](path, other)
    write(fs.mountpoint / "new", b"n" * (8 * MIB))
    assert pin.read(0, MIB) == b"a" * MIB
    place = pin.result["place"]
    wait_until(lambda: bool(client.word(place) & PinWord.STALE), "its pages have left the file")
    os.unlink(fs.mountpoint / "new")
    for name in ("f", "o"):
        (fs.mountpoint / name).unlink(missing_ok=True)
    assert free_blocks(fs) <= before
    pin.end()
    wait_until(lambda: free_blocks(fs) >= before + 256, "its pages are free")
    wait_until(lambda: fs.info()["space"]["busy_frames"] == 0, "no page is busy")


@each_engine
def test_stores_are_in_the_file_and_count_for_its_times(fs: Mounted, client: PinClient) -> None:
    path = write(fs.mountpoint / "f", bytes(64 * KIB))
    os.utime(path, (1, 1))
    pin = client.pin(path, writable=True)
    pin.memory[100:105] = b"hello"
    assert Path(path).read_bytes()[100:105] == b"hello"
    assert os.stat(path).st_mtime == 1
    client.channel.ask("flush", pin=pin.result["pin"])
    assert os.stat(path).st_mtime > 1
    os.utime(path, (1, 1))
    pin.end()
    wait_until(lambda: os.stat(path).st_mtime > 1, "the end of the pin counts as a write")


@each_engine
def test_the_pins_of_a_killed_process_are_gone_and_what_it_could_write_to_rests(
    pools: PoolMaker, fs: Mounted, client: PinClient
) -> None:
    reading, writing = (
        write(fs.mountpoint / "r", b"r" * MIB),
        write(fs.mountpoint / "w", b"w" * MIB),
    )
    before = free_blocks(fs)
    with pinning_process(fs.mountpoint) as process:
        for _ in range(20):
            process.ask("pin", reading)
        process.ask("pin", writing, True)
        (mine,) = {pin["pid"] for pin in client.pins()}
        assert mine == process.pid
        process.kill()
    wait_until(lambda: client.pins() == [], "its pins are gone")
    (resting,) = client.pins(resting=True)
    assert resting["is_resting"]
    assert [file["path"] for file in resting["files"]] == [writing]
    os.unlink(reading)
    wait_until(lambda: free_blocks(fs) >= before + 256, "what it only read is free")
    os.unlink(writing)
    wait_until(lambda: fs.info()["space"]["busy_frames"] == 256, "it has left its file")
    assert free_blocks(fs) < before + 2 * 256, "what it could write to rests"
    client.close()
    has_ended(fs, pools)
    assert pmemfs("check", fs.pool).code == 0
    again = pools.mount(fs.pool)
    assert free_blocks(again) >= before + 2 * 256, "a rest ends with its mount"


@each_engine
def test_a_pin_needs_a_file_of_this_mount_that_is_there(fs: Mounted, client: PinClient) -> None:
    for files, code in (
        ([[99999, 0, -1]], errno.ESTALE), ([[1, 0, -1]], errno.EISDIR), ([], errno.EINVAL),
        ([[1, 0]], errno.EINVAL), ([["x", 0, 1]], errno.EINVAL), ([[4129, -1, 1]], errno.EINVAL),
        ([[1 << 70, 0, 1]], errno.EINVAL), ("what", errno.EINVAL), (7, errno.EINVAL),
    ):  # fmt: skip
        with pytest.raises(RemoteError) as caught:
            client.channel.ask("pin", files=files)
        assert (caught.value.errno, caught.value.kind) == (code, "CannotPin")
    assert client.pins() == []


@native_only
def test_a_writable_pin_of_a_hole_is_refused_where_there_is_no_room(
    fs: Mounted, client: PinClient
) -> None:
    path = write(fs.mountpoint / "f", b"")
    os.truncate(path, 1 << 30)
    before = free_blocks(fs)
    with pytest.raises(RemoteError) as caught:
        client.ask_for_pin(path, writable=True)
    assert caught.value.errno == errno.ENOSPC
    _, fd = client.ask_for_pin(path)
    os.close(fd)
    os.unlink(path)
    wait_until(lambda: free_blocks(fs) >= before, "nothing is lost")


@each_engine
def test_a_pool_without_page_structures_says_which_schemes_have_them(pools: PoolMaker) -> None:
    fs = pools.mount(pools.create("pool", "64M", "--mode", "fs", "--scheme", "none"))
    path = write(fs.mountpoint / "f", b"x")
    with pytest.raises(RemoteError, match=r"a pin needs page structures.*and") as caught:
        PinClient(fs.mountpoint).ask_for_pin(path)
    assert (caught.value.kind, caught.value.errno) == ("NoPageStructures", errno.EOPNOTSUPP)


@each_engine
def test_a_read_only_mount_passes_a_descriptor_that_can_not_write(pools: PoolMaker) -> None:
    pool = pools.create("pool", "64M", "--mode", "fs")
    fs = pools.mount(pool)
    write(fs.mountpoint / "f", b"x" * MIB)
    pools.umount(fs)
    fs = pools.mount(pool, "-o", "ro")
    client, path = PinClient(fs.mountpoint), str(fs.mountpoint / "f")
    pin = client.pin(path)
    assert pin.read(0, 3) == b"xxx"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(client.pool_fds[False], b"y", 0)
    with pytest.raises(RemoteError) as caught:
        client.ask_for_pin(path, writable=True)
    assert caught.value.errno == errno.EROFS
    pin.end()
    client.close()


@each_engine
def test_a_device_shows_everything_in_its_arrays_and_never_faults(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pool", "64M"))
    client = PinClient(mounted.mountpoint)
    pin = client.pin(str(mounted.device), files=[[2, MIB, 4 * MIB]])
    fd = os.open(mounted.device, os.O_RDWR)
    os.pwrite(fd, b"x" * (8 * MIB), 0)
    assert pin.read(0, 4 * MIB) == b"x" * (4 * MIB)
    if pools.engine.name == "native":
        blocks = os.stat(mounted.pool).st_blocks
        for mode in ("--punch-hole", "--zero-range"):
            os.pwrite(fd, b"x" * (8 * MIB), 0)
            subprocess.run(
                ["fallocate", mode, "-o", "0", "-l", str(8 * MIB), str(mounted.device)], check=True
            )
            assert pin.read(0, 4 * MIB) == bytes(4 * MIB)
            assert os.pread(fd, 8 * MIB, 0) == bytes(8 * MIB)
            data = os.open(mounted.pool, os.O_RDONLY)
            (start, end) = pin.result["files"][0]["pieces"][0][1], 4 * MIB
            assert os.lseek(data, start, os.SEEK_HOLE) >= start + end, "it keeps its memory"
            os.close(data)
        assert os.stat(mounted.pool).st_blocks <= blocks
    os.pwrite(fd, b"again", 2 * MIB)
    assert pin.read(MIB, 5) == b"again"
    os.close(fd)
    pin.end()
    client.close()


@each_engine
def test_pages_that_are_mapped_for_writing_keep_a_mount_writable(
    fs: Mounted, client: PinClient
) -> None:
    path = write(fs.mountpoint / "f", b"x" * MIB)
    reading, pin = client.pin(path), client.pin(path, writable=True)
    done = pmemfs("mount", "-o", "remount,ro", fs.mountpoint)
    assert done.code == 32
    assert f"process {os.getpid()} has pages of it mapped for writing" in done.err
    assert not fs.info()["read_only"]
    pin.memory[:3] = b"yes"
    pin.end()
    pmemfs_ok("mount", "-o", "remount,ro", fs.mountpoint)
    with pytest.raises(RemoteError) as caught:
        client.ask_for_pin(path, writable=True)
    assert caught.value.errno == errno.EROFS
    assert reading.read(0, 4) == b"yesx"
    reading.end()


@each_engine
def test_what_was_just_let_go_of_is_in_nobodys_way(fs: Mounted, client: PinClient) -> None:
    path = write(fs.mountpoint / "f", b"x" * (16 * MIB))
    inode = os.stat(path).st_ino
    for compression in ("zstd", "none") * 2:
        for method, words in (("transform-set", {"compression": compression}), ("rewrite", {})):
            client.pin(path).end()
            client.channel.ask(method, inode=inode, **words)


@each_engine
def test_a_mount_ends_while_programs_have_its_pages_and_nobody_gets_these(
    pools: PoolMaker, fs: Mounted
) -> None:
    path = write(fs.mountpoint / "f", b"a" * MIB)
    with pinning_process(fs.mountpoint) as process:
        process.ask("pin", path)
        os.truncate(path, 0)
        has_ended(fs, pools)
        refused = pmemfs("mount", fs.pool, pools.mountpoint("again"))
        assert refused.code == 32
        assert f"process {process.pid} still has pages of it" in refused.err
        assert process.ask("read", 0, 0, 4) == b"aaaa".hex()
        process.kill()
    assert pmemfs("check", fs.pool).code == 0
    again = pools.mount(fs.pool)
    assert again.info()["space"]["busy_frames"] == 0


@each_engine
def test_a_mount_that_ends_lets_go_of_the_pool_if_no_program_has_pages(
    pools: PoolMaker, fs: Mounted
) -> None:
    client = PinClient(fs.mountpoint)
    pin = client.pin(write(fs.mountpoint / "f", b"a" * MIB))
    pin.end()
    wait_until(lambda: client.pins() == [], "it has ended")
    has_ended(fs, pools)
    assert client.word(0) == 1, "an orderly end"
    # The client has the descriptor of the pool still, and with it what was the lock.
    pools.umount(pools.mount(fs.pool))
    client.close()


@native_only
def test_after_the_death_of_a_daemon_the_pages_stay_and_the_pool_is_refused(
    pools: PoolMaker, fs: Mounted
) -> None:
    path = write(fs.mountpoint / "f", b"a" * MIB)
    pid = fs.pid
    with pinning_process(fs.mountpoint) as process:
        process.ask("pin", path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), "the daemon is dead")
        subprocess.run(["umount", "--lazy", fs.mountpoint], check=True)
        # The keeper has started another daemon, which ends as the mount is gone.
        wait_until(lambda: set(processes_of(pools.directory)) == {process.pid}, "all have ended")
        assert process.ask("read", 0, 0, 4) == b"aaaa".hex()
        refused = pmemfs("mount", fs.pool, pools.mountpoint("again"))
        assert refused.code == 32
        assert f"process {process.pid} still has pages of it" in refused.err
        process.kill()
    again = pools.mount(fs.pool)
    assert (again.mountpoint / "f").read_bytes() == b"a" * MIB


STRANGER = """
import array, os, socket, sys
os.setgid(65534); os.setuid(65534)
for request in sys.argv[2:]:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(sys.argv[1])
            connection.sendall(request.encode() + b"\\n")
            got, rights, _, _ = connection.recvmsg(4096, 4096)
        except OSError:
            continue
        assert not rights and not got, (got, rights)
"""


@each_engine
def test_another_user_gets_no_descriptor_whatever_it_sends(fs: Mounted) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    write(fs.mountpoint / "f", b"x")
    mount = mount_at(str(fs.mountpoint))
    assert mount is not None
    path = socket_path(mount)
    inode = os.stat(fs.mountpoint / "f").st_ino
    requests = [
        f'{{"method": "pin", "params": {{"files": [[{inode}, 0, -1]], "wants_pool": true}}}}',
        '{"method": "pins"}', '{"method": "pin", "params": {"peer": [1, 0]}}', "", "x" * 5000,
    ]  # fmt: skip
    # Even where the directory would let it in: what counts is who is at the other end.
    directory = Path(path).parent
    mode = directory.stat().st_mode
    directory.chmod(0o711)
    os.chmod(path, 0o777)
    try:
        subprocess.run([sys.executable, "-c", STRANGER, path, *requests], check=True)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(b'{"method": "pins"}\n')
            assert b"result" in connection.recv(4096), "its owner is answered"
    finally:
        directory.chmod(mode)


@each_engine
def test_sections_on_demand_stay_while_their_pages_are_pinned(pools: PoolMaker) -> None:
    fs = pools.mount(pools.create("pool", "64M", "--mode", "fs", "--scheme", "on-demand"))
    client = PinClient(fs.mountpoint)
    pin = client.pin(write(fs.mountpoint / "f", b"x" * MIB))
    assert fs.pages()["counts"]["in_use"] == 256
    pin.end()
    wait_until(lambda: fs.pages()["counts"]["in_use"] == 0, "nothing is held")
    client.close()


@each_engine
def test_a_pin_lays_a_file_out_anew_if_it_is_asked_to(fs: Mounted, client: PinClient) -> None:
    path = fs.mountpoint / "f"
    with path.open("wb") as file, (fs.mountpoint / "g").open("wb") as other:
        for index in range(600):
            for one in (file, other):
                os.pwrite(one.fileno(), index.to_bytes(4, "little") * 1024, index * 4096)
                os.fsync(one.fileno())
    before = path.read_bytes()
    result, fd = client.ask_for_pin(path, contiguous=True)
    ((offset, _, length),) = result["files"][0]["pieces"]
    assert (offset, length) == (0, 600 * 4096)
    assert path.read_bytes() == before
    os.write(fd, b"d")
    os.close(fd)
