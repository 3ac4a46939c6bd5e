"""A mount command that fails leaves nothing, whatever made it fail; one that succeeds says 0."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import BIN, Result, pmemfs, refused, run_command
from kit.mounts import EACH_ENGINE, Mounted, PoolMaker, mounts_at
from kit.processes import is_running, wait_until
from pmemfs.errors import PmemfsError
from pmemfs.logs import JOURNAL, log_file
from pmemfs.media.inode import INLINE_OFFSET, ROOT
from pmemfs.media.label import LAYOUT, State, validate
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.mountinfo import mount_at
from pmemfs.pool import Pool
from pmemfs.units import MIB
from pmemfs.volume.fs.filesystem import FileSystem

pytestmark = [pytest.mark.mount, pytest.mark.slow, *EACH_ENGINE]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INSTANTS = 9


def command(mounted: Mounted, pools: PoolMaker, *options: object) -> list[str]:
    """The words of `pmemfs mount`."""
    words = ["mount", mounted.pool, mounted.mountpoint, *pools.engine.options, *options]
    return [str(BIN / "pmemfs"), *map(str, words)]


def daemons_of(pool: Path) -> list[int]:
    """Other processes that have a pool open, and daemons that are about to."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # Unlike its command, it leads a session of its own.
            is_daemon = os.fsencode(pool) in words and os.getsid(pid := int(entry.name)) == pid
            # What is no more than a zombie waits for whoever started this test.
            if is_running(int(entry.name)) and (is_daemon or has_open(entry, pool)):
                found.append(int(entry.name))
    return found


def has_open(process: Path, file: Path) -> bool:
    """Whether a process has a file open."""
    for fd in (process / "fd").iterdir():
        with suppress(OSError):
            if fd.readlink() == file:
                return True
    return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and not yet seen end."""
    with suppress(OSError):
        text = " ".join(
            (task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()
        )
        return [int(word) for word in text.split()]
    return []


def data_planes_of(pool: Path) -> list[int]:
    """The data plane of a mount that is made, as soon as it is a process of its own."""
    found = []
    for child in (child for pid in daemons_of(pool) for child in children_of(pid)):
        with suppress(OSError):
            if b"/daemons/planed.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def state_of(pool: Path) -> State:
    with pool.open("rb") as file:
        return State(validate(file.read(LAYOUT.size_bytes)).state)


def assert_nothing_is_left(mounted: Mounted, state: State = State.CLEAN) -> None:
    """No mount, no daemon, no data plane, and the pool as it was."""
    # What has been told nothing yet ends by itself as soon as it has loaded.
    wait_until(lambda: daemons_of(mounted.pool) == [], "no process is left")
    assert mounts_at(mounted.mountpoint) == 0
    assert state_of(mounted.pool) == state


def assert_it_is_mounted(mounted: Mounted) -> None:
    """A whole mount, which is taken away."""
    assert mounts_at(mounted.mountpoint) == 1
    assert os.listdir(mounted.mountpoint) == [mounted.pool.name]
    assert pmemfs("umount", mounted.mountpoint).code == 0
    assert_nothing_is_left(mounted)


def is_kept(mounted: Mounted) -> bool:
    """Whether its daemon knows that the mount is to stay. Then it lets go of its standard error,
    which its command reads until then."""
    with suppress(OSError, PmemfsError, AssertionError):
        return os.readlink(f"/proc/{mounted.pid}/fd/2") == os.devnull
    return False


def taken_log(mounted: Mounted) -> str:
    """What the daemons of a pool have logged, which is gone afterwards."""
    if os.path.exists(JOURNAL):
        pytest.skip("the log is in the journal")
    path = log_file(str(mounted.pool))
    text = path.read_text()
    path.unlink()
    return text


def prepared(pools: PoolMaker, *options: object, name: str = "pmem0") -> Mounted:
    """A pool to mount."""
    pool = pools.create(name, "16M", *options)
    return Mounted(pool, pools.mountpoint())


def interrupted(
    mounted: Mounted, pools: PoolMaker, number: int, wait: Callable[[], object]
) -> Result:
    """Start a mount, wait, and send the command a signal."""
    with subprocess.Popen(
        command(mounted, pools), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait()
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    return Result(process.returncode, out, err)


def instants(mounted: Mounted, pools: PoolMaker) -> list[Callable[[], object]]:
    """Ways to wait for an instant of a mount: by what can be seen, and by a part of its time."""
    began = time.monotonic()
    assert run_command(*command(mounted, pools)).code == 0
    seconds = time.monotonic() - began
    assert_it_is_mounted(mounted)

    def until(what: Callable[[], object]) -> Callable[[], None]:
        return lambda: wait_until(lambda: bool(what()), "the mount gets there")

    def after(part: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds * part)

    seen = [
        until(lambda: daemons_of(mounted.pool)),
        until(lambda: mount_at(str(mounted.mountpoint))),
    ]
    if pools.engine.name == "native":
        seen.append(until(lambda: data_planes_of(mounted.pool)))
    return [*seen * 2, *(after(1.2 * n / INSTANTS) for n in range(1, INSTANTS + 1))]


def test_a_signal_at_any_instant_of_a_mount_leaves_nothing_or_a_mount(pools: PoolMaker) -> None:
    mounted = prepared(pools)
    failures = 0
    for wait, number in zip(instants(mounted, pools), itertools.cycle(SIGNALS), strict=False):
        result = interrupted(mounted, pools, number, wait)
        if result.code == 0:
            assert_it_is_mounted(mounted)
            continue
        failures += 1
        assert_nothing_is_left(mounted)
        if "Fatal Python error: init_" in result.err:
            # Before any line of ours ran: the interpreter itself says what ^C broke off.
            assert result.err.rstrip().endswith("KeyboardInterrupt")
            assert (result.code, number) == (1, signal.SIGINT)
            continue
        # Early on, a signal that ends any program ends this one.
        assert result.code in (128 + number, -number), result
        if result.code > 0:
            # click ends the line that a terminal shows ^C on; before click, nothing is said.
            assert not result.err or result.err.strip().startswith("pmemfs: interrupted"), result
            assert len(result.err.strip().splitlines()) <= 1
    assert failures >= 2


def test_a_command_that_is_killed_leaves_nothing_or_a_mount(pools: PoolMaker) -> None:
    mounted = prepared(pools)
    for wait in instants(mounted, pools):
        interrupted(mounted, pools, signal.SIGKILL, wait)
        # It may be there already, and not be kept.
        wait_until(
            lambda: not daemons_of(mounted.pool) or is_kept(mounted), "it is gone or it stays"
        )
        if daemons_of(mounted.pool):
            assert_it_is_mounted(mounted)
        assert_nothing_is_left(mounted)


def test_a_daemon_that_is_killed_while_it_mounts_leaves_no_dead_mount(pools: PoolMaker) -> None:
    mounted = prepared(pools)
    with subprocess.Popen(
        command(mounted, pools), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: mount_at(str(mounted.mountpoint)) is not None, "it is mounted")
        # Once the daemon is dead, its data plane is nobody's child, and ends by itself.
        planes = data_planes_of(mounted.pool)
        for pid in daemons_of(mounted.pool):
            if pid not in planes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    if process.returncode:
        refused(Result(process.returncode, out, err), 32, "daemon", "SIGKILL")
        assert daemons_of(mounted.pool) == []
        assert mounts_at(mounted.mountpoint) == 0
    pools.mount(mounted.pool)


def test_a_data_plane_that_dies_while_it_mounts_is_one_sentence(pools: PoolMaker) -> None:
    if pools.engine.name != "native":
        pytest.skip("there is no other process")
    # A name that no other test logs under.
    mounted = prepared(pools, name=pools.directory.name)
    # The command looks at the mount for as long as this takes, and does not keep it before.
    slow = pools.directory / "stat"
    slow.write_text(
        '#!/bin/sh\n[ "$1" = --dereference ] && exec sleep 30\nexec /usr/bin/stat "$@"\n'
    )
    slow.chmod(0o755)
    with subprocess.Popen(
        command(mounted, pools), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{pools.directory}:{os.environ['PATH']}"},
    ) as process:  # fmt: skip
        wait_until(lambda: bool(data_planes_of(mounted.pool)), "there is a data plane")
        for pid in data_planes_of(mounted.pool):
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    refused(Result(process.returncode, out, err), 32, "the data plane failed", "SIGKILL")
    assert_nothing_is_left(mounted)
    log = taken_log(mounted)
    assert "the data plane failed: it was ended by signal SIGKILL" in log
    assert "Exceptions from" not in log


def test_a_mount_whose_root_does_not_answer_is_taken_away_again(pools: PoolMaker) -> None:
    mounted = prepared(pools, "--mode", "fs")
    medium = MappedMedium.open(str(mounted.pool))
    pool = Pool.open(medium)
    fs = FileSystem(pool, open_memmap(pool))
    at = fs.store.table.slot_offset(ROOT)
    fs.end()
    medium.close()
    before = mounted.pool.read_bytes()
    for offset in range(at + INLINE_OFFSET, at + INLINE_OFFSET + 64, 24):
        with mounted.pool.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([before[offset] ^ 1]))
        result = run_command(*command(mounted, pools))
        if result.code == 0:
            assert_it_is_mounted(mounted)
        else:
            refused(result, 32, str(mounted.pool))
            assert_nothing_is_left(mounted)
        mounted.pool.write_bytes(before)


CLOSED = [
    " ".join(words)
    for count in range(4)
    for words in itertools.combinations(("<&-", ">&-", "2>&-"), count)
]


@pytest.mark.parametrize("closed", CLOSED)
def test_a_command_whose_standard_files_are_closed_mounts_and_returns(
    pools: PoolMaker, closed: str
) -> None:
    mounted = prepared(pools)
    words = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    result = run_command(*words, *command(mounted, pools), timeout=60)
    assert result.code == 0, result
    for pid in daemons_of(mounted.pool):
        for fd in range(2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}").startswith(("/dev/null", "/memfd"))
    assert_it_is_mounted(mounted)
    result = run_command(*words, *command(mounted, pools, "-o", "mode=9"), timeout=60)
    assert result.code == 2
    # A sentence about what went wrong goes nowhere if there is no standard error.
    assert result.out == ""
    assert bool(result.err) == ("2>&-" not in closed)
    mounted.pool.write_bytes(bytes(MIB))
    assert run_command(*words, *command(mounted, pools), timeout=60).code == 32
    assert daemons_of(mounted.pool) == []


def test_a_daemon_holds_nothing_that_its_command_was_given(pools: PoolMaker) -> None:
    mounted = prepared(pools)
    reader, writer = os.pipe()
    with subprocess.Popen(
        command(mounted, pools), stdout=writer, stderr=writer, pass_fds=[writer]
    ) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as output:
            # At the end of the file nobody has the other end any more.
            assert output.read() == b""
        assert process.wait() == 0
    assert_it_is_mounted(mounted)


def test_a_daemon_is_its_command_forked(pools: PoolMaker) -> None:
    # What both load is loaded once, and the daemon loads the rest beside its command.
    mounted = prepared(pools)
    words = command(mounted, pools)
    assert run_command(*words).code == 0
    told = Path(f"/proc/{mounted.info()['pid']}/cmdline").read_bytes().split(b"\0")
    assert told[1:-1] == [os.fsencode(word) for word in words]
    assert_it_is_mounted(mounted)
