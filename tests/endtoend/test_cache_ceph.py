"""Mode cache before an image of Ceph: what it leaves in the cluster, other hosts, failing OSDs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, make_cache
from kit.ceph_node import WATCH_SECONDS, CephNode, Image
from kit.commands import fio, pmemfs, pmemfs_ok, refused, run_command
from kit.ext4 import assert_is_on_ext4, make_tree, needs_ext4, put_on_ext4
from kit.mounts import UNKEPT, Mounted, PoolMaker, Session
from kit.posix import opened
from kit.processes import is_running, stop, stopped, wait_until
from kit.records import WRITERS, Writer, writing
from kit.sources import needs_root
from pmemfs.media.cache import Policy
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, needs_root]

IMAGE_MIB = 32
IMAGE_BYTES = IMAGE_MIB * MIB


@pytest.fixture
def image(ceph: CephNode) -> Iterator[Image]:
    image = Image(ceph, f"rbd/{uuid.uuid4().hex[:12]}")
    ceph.rbd("create", "--size", f"{IMAGE_MIB}M", image.spec)
    yield image
    run_command("rbd", "-c", ceph.conf, "rm", "--no-progress", image.spec)


def kill_both(mounted: Mounted) -> None:
    """End the daemon and the data plane as a crash of the host would, and take the mount away."""
    session, plane = Session.of(mounted), mounted.data_plane_pid
    # Or the daemon starts another data plane.
    stop(session.pid)
    os.kill(plane, signal.SIGKILL)
    session.kill()
    wait_until(lambda: not is_running(plane), "the data plane is dead")
    run_command("umount", "-l", mounted.mountpoint)


def kill_both_in_time(mounted: Mounted) -> bool:
    """Kill them; whether the cluster knows the client for long enough still that a command meets
    it."""
    began = time.monotonic()
    kill_both(mounted)
    return time.monotonic() < began + WATCH_SECONDS / 2


def write(mounted: Mounted, data: bytes, at: int = 0) -> None:
    with opened(mounted.device) as fd:
        assert os.pwrite(fd, data, at) == len(data)


def read(mounted: Mounted, length: int, at: int = 0) -> bytes:
    with opened(mounted.device) as fd:
        return os.pread(fd, length, at)


# What is left in the cluster


@needs_ext4
@pytest.mark.parametrize("end", ["unmounted and flushed", "killed and flushed", "umount --flush"])
def test_ext4_on_an_image_is_whole_without_us(
    pools: PoolMaker, image: Image, tmp_path: Path, end: str
) -> None:
    mounted = pools.mount(cache_of(pools, image.text, max_dirty_percent=60))
    tree = make_tree(tmp_path / "tree")
    put_on_ext4(mounted.device, tree)
    assert ask(mounted, "cache-info")["dirty"] > 0
    if end == "umount --flush":
        pmemfs_ok("umount", "--flush", mounted.mountpoint)
    else:
        waits = False
        if end == "killed and flushed":
            waits = kill_both_in_time(mounted)
        else:
            pools.umount(mounted)
        said = pmemfs("flush", mounted.pool)
        assert said.code == 0, said.err
        assert "the origin is complete" in said.out
        if waits or end != "killed and flushed":
            assert ("no answer from client" in said.err) == waits
    # A daemon may go on for a moment where the mount namespace of another test has the mount.
    wait_until(lambda: "Watchers: none" in image.rbd("status"), "nobody has the image open")
    assert_is_on_ext4(image.exported(tmp_path / "exported"), tree)


# Other hosts


def test_a_second_host_waits_for_the_death_of_the_first_and_shuts_it_out(
    pools: PoolMaker, image: Image
) -> None:
    first, second = cache_of(pools, image.text), pools.directory / "pmem1"
    make_cache(second, image.text_of_another, pool_bytes=8 * MIB)
    at = pools.mountpoint("second")
    mounted = pools.mount(first)
    write(mounted, b"first" * 2000)
    locks = image.rbd("lock", "ls")
    assert "1 exclusive lock" in locks
    assert locks.split("client.")[1].split()[0] in image.rbd("status")
    refused(pmemfs("mount", second, at), 32, f"{image.text_of_another} is in use: client",
            f"has it open; 'rbd status {image.spec}' shows it")  # fmt: skip

    waits = kill_both_in_time(mounted)
    done = pmemfs("mount", second, at)
    assert done.code == 0, done.err
    assert (f"which had {image.text_of_another} open; waiting up to" in done.err) or not waits
    write(Mounted(second, at), b"second" * 2000)
    pmemfs_ok("umount", "--flush", at)
    wait_until(lambda: "Watchers: none" in image.rbd("status"), "nobody has the image open")

    # What the first one has is older now, though it was killed, so that it could note nothing.
    at = mounted.mountpoint
    what_to_do = "has written to it since", f"'pmemfs cache drop {first}' forgets"
    refused(pmemfs("mount", first, at), 32, *what_to_do)
    refused(pmemfs("flush", first), 1, *what_to_do)
    pmemfs_ok("cache", "drop", "--discard-dirty", first)
    mounted = pools.mount(first)
    assert read(mounted, 12_000) == b"second" * 2000
    write(mounted, b"more")
    kill_both(mounted)
    assert read(pools.mount(first), 4) == b"more"


def test_an_image_that_another_program_wrote_to_is_refused(pools: PoolMaker, image: Image) -> None:
    pool = cache_of(pools, image.text)
    at = pools.mountpoint()
    for is_killed in (False, True):
        mounted = pools.mount(pool)
        write(mounted, b"ours")
        ask(mounted, "cache-flush")
        if is_killed:
            kill_both(mounted)
        else:
            pools.umount(mounted)
        write_as_another_program(image)
        refused(pmemfs("mount", pool, at), 32, "has written to it since", "pmemfs cache drop")
        pmemfs_ok("cache", "drop", "--discard-dirty", pool)


def write_as_another_program(image: Image) -> None:
    """Write until the cluster has noted the time of it, which it does once a second here."""
    before = image.rbd("info")

    def is_noted() -> bool:
        image.rbd("bench", "--io-type", "write", "--io-size", "4K", "--io-total", "4K")
        return image.rbd("info") != before

    wait_until(is_noted, "the image has another time")


# The cluster fails: these are alone, because other tests have images in the same cluster.


@pytest.mark.alone
def test_fio_goes_on_while_the_osd_is_dead_and_finds_all_when_it_is_back(
    pools: PoolMaker, image: Image, tmp_path: Path
) -> None:
    # The library asks no OSD about what was never written.
    image.rbd("bench", "--io-type", "write", "--io-size", "1M", "--io-total", f"{IMAGE_MIB}M")
    mounted = pools.mount(
        cache_of(pools, image.text, max_dirty_percent=90, max_dirty_age_seconds=2,
                 origin_timeout_seconds=2)
    )  # fmt: skip
    known = read(mounted, 4096, 20 * MIB)
    with fio_of(tmp_path, mounted, "--size=4m", "--io_size=96m") as within:
        wait_until(lambda: ask(mounted, "cache-info")["write_hits"] > 100, "fio writes")
        image.node.kill_osd()
        try:
            assert read(mounted, 4096, 20 * MIB) == known
            write(mounted, b"kept" * 1024, 20 * MIB)
            with pytest.raises(OSError, match="Input/output error"):
                read(mounted, 4096, 24 * MIB)
            assert within.wait(200) == 0, within.stdout.read()
            wait_until(lambda: ask(mounted, "cache-info")["origin"]["state"] == "away", "it says")
            assert "AWAY" in pmemfs_ok("info", mounted.mountpoint)
            assert ask(mounted, "cache-info")["dirty"] > 0
            ask(mounted, "cache-set", origin_timeout_seconds=600)
            beyond = fio_of(tmp_path, mounted, "--size=12m", "--offset=4m")
            with beyond as beyond:
                image.node.start_osd()
                assert beyond.wait(200) == 0, beyond.stdout.read()
        finally:
            if not is_running(image.node.pid("osd.0")):
                image.node.start_osd()
    wait_until(lambda: ask(mounted, "cache-flush")["dirty"] == 0, "the image has all")
    assert ask(mounted, "cache-info")["origin"]["state"] == "present"
    assert ask(mounted, "cache-verify")["differing"] == 0
    whole = mounted.device.read_bytes()
    assert whole[20 * MIB :].startswith(b"kept" * 1024)
    pools.umount(mounted)
    assert image.exported(tmp_path / "exported").read_bytes() == whole


@pytest.mark.alone
def test_a_cluster_that_stands_still_keeps_neither_writers_nor_commands(
    pools: PoolMaker, image: Image, tmp_path: Path
) -> None:
    mounted = pools.mount(
        cache_of(pools, image.text, policy=Policy.WRITE_THROUGH, origin_timeout_seconds=600)
    )
    write(mounted, b"before" * 1000)
    ask(mounted, "cache-flush")
    session = Session.of(mounted)
    with stopped(image.node.pid("osd.0")):
        words = ["dd", "if=/dev/zero", f"of={mounted.device}", "bs=4k", "count=1", "seek=9",
                 "oflag=direct", "conv=notrunc", "status=none"]  # fmt: skip
        writer = subprocess.Popen(words)
        waits_in = Path(f"/proc/{writer.pid}/wchan")
        wait_until(lambda: waits_in.read_text() == "request_wait_answer", "the writer waits")
        writer.kill()
        assert writer.wait(60) == -signal.SIGKILL
        ask(mounted, "cache-set", origin_timeout_seconds=1)
        with pytest.raises(OSError, match="Input/output error"):
            write(mounted, b"during" * 1000, MIB)
        refused(pmemfs("flush", mounted.mountpoint), 1, "could not be given to the origin",
                "took longer than 1 s")  # fmt: skip
        refused(pmemfs("cache", "verify", mounted.mountpoint), 1, "could not be compared with",
                "took longer than 1 s")  # fmt: skip
        refused(pmemfs("umount", mounted.mountpoint), 32, "could not leave the pool clean")
        wait_until(lambda: not is_running(session.pid), "the daemon has ended")
        assert session.pool_state() == "dirty"
    image.node.wait_for_answers()
    pmemfs_ok("flush", mounted.pool)
    exported = image.exported(tmp_path / "exported").read_bytes()
    assert exported.startswith(b"before" * 1000)


@contextmanager
def fio_of(
    directory: Path, mounted: Mounted, *words: object, verify: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A fio that writes at random, 32 deep, and reads all of it back in the end."""
    command = [
        "fio", "--name=v", f"--filename={mounted.device}", "--direct=1", "--rw=randwrite",
        "--bs=4k", "--ioengine=libaio", "--iodepth=32", "--thread", "--verify=crc32c",
        "--verify_fatal=1", f"--do_verify={int(verify)}", *map(str, words),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


ROUNDS = 3
JOBS = ("--numjobs=4", "--size=2m", "--offset_increment=2m", "--offset=8m")


def test_what_was_acknowledged_survives_kill_9_before_an_image(
    pools: PoolMaker, image: Image, tmp_path: Path
) -> None:
    mounted = pools.mount(cache_of(pools, image.text, max_dirty_percent=30), *UNKEPT)
    writers = [Writer(name) for name in range(WRITERS)]
    with fio_of(tmp_path, mounted, *JOBS) as filling:
        assert filling.wait(200) == 0, filling.stdout.read()
    for number in range(ROUNDS):
        session, plane = Session.of(mounted), mounted.data_plane_pid
        with fio_of(tmp_path, mounted, *JOBS, f"--randseed={number}", "--time_based",
                    "--runtime=100", verify=False), writing(writers, mounted.device):  # fmt: skip
            wait_until(lambda: all(w.count or w.error for w in writers), "all writers write")
            time.sleep(0.3)
            if number % 2 == 0:
                os.kill(plane, signal.SIGKILL)
                wait_until(lambda pid=session.pid: not is_running(pid), "the daemon has ended")  # type: ignore[misc]
            else:
                session.kill()
        run_command("umount", "-l", mounted.mountpoint)
        pools.mount(mounted.pool, *UNKEPT)
        with opened(mounted.device) as fd:
            for writer in writers:
                writer.check(fd)
        # Each block that fio wrote is whole, whichever of its writes it is.
        done = fio(tmp_path, mounted.device, "--rw=read", "--bs=4k", "--offset=8m", "--size=8m",
                   "--verify=crc32c", "--verify_fatal=1")  # fmt: skip
        assert done.code == 0, done.out
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    pools.umount(mounted)
    assert image.exported(tmp_path / "exported").read_bytes() == wanted
