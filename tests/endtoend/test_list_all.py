"""`pmemfs list --all`: pools that nobody has mounted, found by their labels."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused
from kit.mounts import UNKEPT, PoolMaker, Session
from kit.namespaces import nobody_copies_mounts
from kit.pools import some_label
from pmemfs.media.label import FORMAT_VERSION, pack
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow]


_UNLOCK, _NUMBER = 0x4004_5431, 0x8004_5430
"""TIOCSPTLCK and TIOCGPTN of the other end of a terminal. Source: asm-generic/ioctls.h."""


def states_in(directory: Path, *options: str) -> dict[str, tuple[str, str]]:
    """The pools in a directory, each with where it is mounted and its state."""
    rows = json.loads(pmemfs_ok("list", "--dir", directory, "--json", *options))
    return {row["pool"].removeprefix(f"{directory}/"): (row["mountpoint"], row["state"])
            for row in rows if Path(row["pool"]).parent == directory}  # fmt: skip


def test_pools_are_found_mounted_or_not_and_nothing_is_written(pools: PoolMaker) -> None:
    clean, files = pools.create("clean", "16M"), pools.create("files", "16M", "--mode", "fs")
    mounted = pools.mount(pools.create("mounted", "16M"))
    before = {path: path.read_bytes() for path in (clean, files)}
    found = states_in(pools.directory)
    assert found == {
        "clean": ("", "clean"), "files": ("", "clean"),
        "mounted": (str(mounted.mountpoint), "mounted"),
    }  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before
    rows = json.loads(pmemfs_ok("list", "--dir", pools.directory, "--json"))
    (row,) = (row for row in rows if row["pool"] == str(files))
    said = json.loads(pmemfs_ok("info", files, "--json"))["pool"]
    assert (row["uuid"], row["mode"], row["size_bytes"]) == (said["uuid"], "fs", 16 * MIB)
    assert str(clean) not in pmemfs_ok("list")


def test_a_pool_whose_daemon_died_is_dirty_and_one_that_is_in_use_disturbs_nobody(
    pools: PoolMaker,
) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M"), *UNKEPT)
    Session.of(mounted).kill()
    with nobody_copies_mounts():
        pmemfs_ok("umount", mounted.mountpoint)
    assert states_in(pools.directory) == {"pmem0": ("", "dirty")}


def test_odd_files_are_left_out_and_block_nobody(pools: PoolMaker) -> None:
    odd = pools.directory / "odd"
    odd.mkdir()
    os.mkfifo(odd / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(odd / "socket"))
    (odd / "empty").touch()
    (odd / "text").write_text("no pool")
    (odd / "nowhere").symlink_to(odd / "none")
    (odd / "circle").symlink_to(odd / "circle")
    (odd / "directory").mkdir()
    with (odd / "huge").open("wb") as huge:
        huge.truncate((1 << 62) + (1 << 61))
    os.mknod(odd / "null", 0o20600, os.makedev(1, 3))
    (odd / "linked").symlink_to(pools.create("pmem0", "16M"))
    said = pmemfs("list", "--dir", odd, "-v", timeout=60)
    assert said.code == 0
    for name in ("pipe", "socket", "empty", "text", "nowhere", "circle", "huge", "null"):
        assert len([line for line in said.err.splitlines() if f"{odd}/{name}:" in line]) == 1, name
    assert "linked" not in said.err
    assert "Errno" not in said.err
    assert f"{pools.directory}/pmem0" in said.out
    assert states_in(odd) == {}
    refused(pmemfs("list", "--dir", odd / "none"), 1, str(odd / "none"), "no such")
    refused(pmemfs("list", "--dir", odd / "text"), 1, str(odd / "text"), "not a directory")


def test_a_device_that_is_no_memory_is_not_even_opened(pools: PoolMaker) -> None:
    """A watchdog would begin to count. A terminal tells its other end that it was opened."""
    with closing(os.fdopen(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), "rb")) as terminal:
        fcntl.ioctl(terminal, _UNLOCK, struct.pack("i", 0))
        (number,) = struct.unpack("i", fcntl.ioctl(terminal, _NUMBER, bytes(4)))
        (pools.directory / "linked").symlink_to(f"/dev/pts/{number}")
        said = pmemfs("list", "--dir", pools.directory, "-v")
        assert f"{pools.directory}/linked cannot hold a pool: it is a character device" in said.err
        hears = select.poll()
        hears.register(terminal)
        assert not [event for _, event in hears.poll(0) if event & select.POLLHUP]


def test_a_label_that_is_damaged_or_too_new_is_named(pools: PoolMaker) -> None:
    for name in ("damaged", "half", "newer"):
        pools.create(name, "16M")
    end = 16 * MIB - 4096
    for name, places in (("damaged", (40, end + 40)), ("half", (40,))):
        with (pools.directory / name).open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(b"scribble")
    with (pools.directory / "newer").open("r+b") as file:
        file.write(pack(some_label(format_version=FORMAT_VERSION + 1)))
    found = states_in(pools.directory)
    assert found["half"] == ("", "clean")
    assert "format" in found["newer"][1]
    assert "checksum" in found["damaged"][1]


def shown_on_a_terminal(columns: int | str, *words: object) -> list[str]:
    """What a command prints on a terminal of that width."""
    ours, theirs = pty.openpty()
    # Read meanwhile: a terminal takes some KiB, and mounts of other tests are listed, too.
    with (
        os.fdopen(ours, "rb", buffering=0) as reader,
        subprocess.Popen([BIN / "pmemfs", *map(str, words)], stdout=theirs,
                         env={**os.environ, "COLUMNS": str(columns)}) as process,
    ):  # fmt: skip
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = reader.read(65536)
            except OSError:
                break
            said += chunk or b""
            if not chunk:
                break
    assert process.returncode == 0
    return said.decode().splitlines()


def test_a_narrow_terminal_shows_fewer_columns(pools: PoolMaker) -> None:
    pools.create("a", "16M")
    lines = shown_on_a_terminal(75, "list", "--dir", pools.directory)
    # Mounts of other tests are shown, too, and may have paths that must be broken.
    assert "POOL" in lines[0]
    assert all(len(line) <= 75 for line in lines)
    assert "ENGINE" not in lines[0]
    assert "ENGINE" in shown_on_a_terminal(400, "list", "--dir", pools.directory)[0]


@pytest.mark.parametrize("columns", ["0", "1", "-1", "abc", "٣", "9" * 5000])
def test_no_width_of_a_terminal_is_a_mistake(pools: PoolMaker, columns: str) -> None:
    pool = pools.create("a", "16M")
    lines = shown_on_a_terminal(columns, "list", "--dir", pools.directory)
    assert str(pool) in "".join(lines).replace(" ", "")
    # What is no width is none: a terminal without a size, like this one, gets whole lines.
    if columns != "1":
        assert any(str(pool) in line and "clean" in line for line in lines)


def test_check_of_a_mountpoint_says_that_it_is_mounted(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    for words in (("check",), ("check", "--repair")):
        refused(
            pmemfs(*words, mounted.mountpoint), 8, f"mounted on {mounted.mountpoint}", "unmount"
        )


def test_info_of_files_shows_no_mode_of_a_device(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "16M", "--mode", "fs"))
    assert "mode=" not in pmemfs_ok("info", mounted.mountpoint)
    assert "mode=" not in mounted.info()["options"]
