"""Files and block devices that fail or stand still behind a cache, as disks and their cables do.

Where the kernel has no device-mapper, nbdkit does what its targets `error` and `suspend` would: the
file is that of an nbdfuse, and the device is a loop device over it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, new_origin
from kit.commands import pmemfs_ok, run_command
from kit.mounts import NATIVE, Engine, Mounted, PoolMaker, Session, begin_end
from kit.origins import NbdServer
from kit.posix import opened
from kit.processes import is_running, wait_until
from kit.sources import loop_device, needs_root
from pmemfs.logs import log_file
from pmemfs.units import MIB

pytestmark = [
    pytest.mark.mount, pytest.mark.slow, needs_root, pytest.mark.usefixtures("engine"),
]  # fmt: skip

SIZE_BYTES = 24 * MIB
KNOWN = 0
"""A block that every cache here has, clean; the others are missing at first."""


class Faulty:
    """A thing that can be an origin, over a file; it can be made to fail or to stand still."""

    def __init__(self, path: Path, server: NbdServer, errors: Path) -> None:
        self.path = path
        self._server = server
        self._errors = errors

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever it is asked meanwhile, it answers with an error."""
        self._errors.touch()
        try:
            yield
        finally:
            self._errors.unlink()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """It answers nothing meanwhile."""
        self._server.stop()
        try:
            yield
        finally:
            os.kill(self._server.pid, signal.SIGCONT)


@contextmanager
def faulty(kind: str, file: Path) -> Iterator[Faulty]:
    """A file or device over a file."""
    if shutil.which("nbdfuse") is None:
        pytest.skip("nbdfuse is not installed; scripts/install-origins --tests installs it")
    errors, path = file.with_name("errors"), file.with_name("over-nbd")
    with ExitStack() as stack:
        server = NbdServer(
            "--filter=error", "file", file, "error-rate=100%", "error=EIO", f"error-file={errors}"
        )
        stack.callback(server.end)
        path.touch()
        fuse = subprocess.Popen(["nbdfuse", path, server.text], stderr=subprocess.DEVNULL)
        stack.callback(fuse.kill)
        wait_until(lambda: path.stat().st_size > 0, "nbdfuse has mounted")
        stack.callback(run_command, "umount", "--lazy", path)
        if kind == "device":
            path = stack.enter_context(loop_device(path))
        yield Faulty(path, server, errors)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", SIZE_BYTES, seed=b"o")


@pytest.fixture
def origin(kind: str, file: Path) -> Iterator[Faulty]:
    with faulty(kind, file) as found:
        yield found


KINDS = pytest.mark.parametrize(
    ("engine", "kind"),
    [pytest.param(NATIVE[0], "device", id="native-device"),
     pytest.param(Engine("python"), "file", id="python-file")],
    indirect=["engine"],
)  # fmt: skip


def mounted_cache(pools: PoolMaker, origin: Faulty, **fields: int) -> Mounted:
    """A cache with a block that it knows, and one that is dirty."""
    # `origin` has to come before `pools` in every test: it ends after the mounts do.
    settings = {"origin_timeout_seconds": 1, "read_ahead_bytes": 0, "max_dirty_age_seconds": 1}
    mounted = pools.mount(cache_of(pools, origin.path, **{**settings, **fields}))
    with opened(mounted.device) as fd:
        os.pread(fd, 4096, KNOWN)
    return mounted


def write_blocks(fd: int, blocks: range) -> None:
    """Write some blocks, one by one."""
    for block in blocks:
        assert os.pwrite(fd, b"new." * 1024, block * 4096) == 4096


def expect_hits_and_writes(mounted: Mounted, file: Path) -> None:
    """What the cache has is read and written, and what it lacks is EIO."""
    with opened(mounted.device) as fd:
        assert os.pread(fd, 16, KNOWN) == file.read_bytes()[:16]
        write_blocks(fd, range(100, 164))
        os.fsync(fd)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 4096, 20 * MIB)
        assert os.pread(fd, 4096, 100 * 4096) == b"new." * 1024


def expect_all_flushed(pools: PoolMaker, mounted: Mounted, file: Path) -> None:
    # From here on the origin may be slow.
    ask(mounted, "cache-set", origin_timeout_seconds=60)
    wait_until(lambda: ask(mounted, "cache-info")["dirty"] == 0, "all was written back")
    wanted = mounted.device.read_bytes()
    assert ask(mounted, "cache-info")["origin"]["state"] == "present"
    pools.umount(mounted)
    assert file.read_bytes() == wanted
    assert wanted[100 * 4096 : 164 * 4096] == b"new." * 1024 * 64


@KINDS
def test_what_fails_keeps_hits_and_dirty_blocks_and_is_written_to_when_it_is_back(
    origin: Faulty, pools: PoolMaker, file: Path
) -> None:
    # A late answer would count as an origin that is away, not as one that fails.
    mounted = mounted_cache(pools, origin, origin_timeout_seconds=60)
    with origin.failing():
        expect_hits_and_writes(mounted, file)
        wait_until(lambda: ask(mounted, "cache-info")["origin"]["write_back_failures"] > 1,
                   "it was tried again")  # fmt: skip
        report = ask(mounted, "cache-info")
        assert report["dirty"] == 64
        assert report["origin"]["state"] == "failing"
        assert "FAILING: input/output error" in pmemfs_ok("info", mounted.mountpoint)
        log = log_file(str(mounted.pool)).read_text()
        assert f"the origin {origin.path} is failing" in log
        assert "dirty blocks could not be written to the origin" in log
    expect_all_flushed(pools, mounted, file)


@KINDS
def test_what_stands_still_keeps_hits_and_dirty_blocks_and_nobody_waits_for_ever(
    origin: Faulty, pools: PoolMaker, file: Path
) -> None:
    mounted = mounted_cache(pools, origin, max_dirty_percent=100)
    with origin.standing_still():
        expect_hits_and_writes(mounted, file)
        wait_until(lambda: ask(mounted, "cache-info")["origin"]["state"] == "away", "it is away")
        assert "AWAY" in pmemfs_ok("info", mounted.mountpoint)
        # More than there is room for.
        with opened(mounted.device) as fd, pytest.raises(OSError, match="Input/output error"):
            write_blocks(fd, range(1000, 6000))
        ask(mounted, "cache-set", policy="write-through")
        with opened(mounted.device) as fd, pytest.raises(OSError, match="Input/output error"):
            os.pwrite(fd, b"new." * 1024, 0)
        ask(mounted, "cache-set", policy="write-back")
    expect_all_flushed(pools, mounted, file)


@pytest.mark.parametrize("engine", [NATIVE[0]], indirect=True, ids=str)
@pytest.mark.parametrize("kind", ["device"])
def test_writers_are_killed_while_their_origin_stands_still(
    origin: Faulty, pools: PoolMaker
) -> None:
    mounted = mounted_cache(pools, origin, max_dirty_percent=100, origin_timeout_seconds=600)
    with origin.standing_still():
        words = ["dd", "if=/dev/zero", f"of={mounted.device}", "bs=4k", "oflag=direct",
                 "conv=notrunc", "status=none"]  # fmt: skip
        writer = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        wait_until(lambda: ask(mounted, "cache-info")["full_set_waits"] > 0, "the writer waits")
        writer.kill()
        assert writer.wait(timeout=60) == -signal.SIGKILL
    pools.umount(mounted)


@KINDS
@pytest.mark.parametrize("how", ["umount", "SIGTERM", "abort"])
def test_a_mount_ends_though_its_origin_stands_still(
    origin: Faulty, pools: PoolMaker, file: Path, kind: str, how: str
) -> None:
    mounted = mounted_cache(pools, origin)
    session = Session.of(mounted)
    with origin.standing_still():
        expect_hits_and_writes(mounted, file)
        begin_end(mounted, how)
        wait_until(lambda: has_ended(session.pid), "the daemon has ended")
        log = log_file(str(mounted.pool)).read_text()
        assert f"the origin {origin.path} hangs" in log
    wait_until(lambda: not is_running(session.pid), "its last thread has ended")
    subprocess.run(["umount", "-l", mounted.mountpoint], check=False, capture_output=True)
    mounted = pools.mount(mounted.pool)
    with opened(mounted.device) as fd:
        assert os.pread(fd, 4096, 100 * 4096) == b"new." * 1024
    expect_all_flushed(pools, mounted, file)


def has_ended(pid: int) -> bool:
    """Whether a process is over, but for threads that the kernel holds up."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"
