"""`pmemfs pages --map`, `--file`, `--pfn`, `--picture` and names of owners, on real mounts."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.commands import BIN, pmemfs, pmemfs_here, pmemfs_ok, refused, run_command
from kit.mounts import Mounted, PoolMaker
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.control.channel import Channel
from pmemfs.control.places import socket_path
from pmemfs.mountinfo import mount_at

pytestmark = pytest.mark.mount

PAGE = 4096


def asked(*words: object) -> dict[str, Any]:
    """What `pmemfs pages` says in JSON."""
    return dict(json.loads(pmemfs_here("pages", *words, "--json")))


def write(path: Path, page_count: int, *, sync: bool = True) -> None:
    """A file of so many pages, which are dirty or not."""
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"x" * page_count * PAGE, 0)
        if sync:
            os.fsync(fd)


def owners(report: dict[str, Any]) -> dict[str, int]:
    """The pages of each owner of a map."""
    return {share["owner"]["path"]: share["page_count"] for share in report["owners"]}


@pytest.mark.usefixtures("engine")
def test_a_map_of_files_and_what_it_is_made_of(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    at = mounted.mountpoint
    (at / "kv").mkdir()
    write(at / "kv/clean", 40)
    write(at / "kv/dirty", 24, sync=False)
    with opened(at / "kv/clean", os.O_RDONLY) as fd:
        for _ in range(3):
            os.pread(fd, 8 * PAGE, 16 * PAGE)
    mounted.wait_until_idle()
    # A map for programs, and its sums.
    report = asked(at, "--map", "--by", "owner")
    cells = report["cells"]
    sums = {
        name: sum(cell[name] for cell in cells)
        for name in ("clean", "dirty", "in_use", "reads", "writes")
    }
    assert sums == {"clean": 40, "dirty": 24, "in_use": 0, "reads": 24, "writes": 64}
    assert owners(report) == {"kv/clean": 40, "kv/dirty": 24}
    assert {cell["owner"] for cell in cells} == {
        share["owner"]["inode"] for share in report["owners"]
    }
    assert report["page_count"] == mounted.pages()["counts"]["total"]
    assert -(-report["page_count"] // report["pages_per_cell"]) <= 1024
    assert asked(at, "--map")["owners"] == [], "who has not asked waits for no names"
    # The hottest pages, by name.
    hottest = mounted.pages(hottest=8)["hottest"]
    assert {page["owner"]["path"] for page in hottest} == {"kv/clean"}
    assert [page["index"] for page in hottest] == list(range(16, 24))
    assert "kv/clean" in pmemfs_here("pages", at)
    # The pages of one file, joined where they are alike.
    of_file = asked("--file", at / "kv/clean")
    assert of_file == asked(mounted.pool, "--file", at / "kv/clean")
    # Where extents begin, so does a run.
    extents = json.loads(pmemfs_here("extents", at / "kv/clean", "--json"))["extents"]
    reads = {
        run["offset_bytes"] // PAGE + n: run["reads"]
        for run in of_file["runs"] for n in range(run["length_bytes"] // PAGE)
        if run["state"] != "uninitialised"
    }  # fmt: skip
    assert reads == {index: 3 * (16 <= index < 24) for index in range(40)}
    assert len(of_file["runs"]) <= 3 + 2 * len(extents)
    assert of_file["runs"][0]["pfn"] == extents[0]["pfn"]
    assert (of_file["size_bytes"], of_file["next_bytes"]) == (40 * PAGE, None)
    # One page.
    pfn = hottest[0]["pfn"]
    page = asked(at, "--pfn", hex(pfn))
    assert (page["first_pfn"], page["frame_count"], page["state"]) == (pfn, 1, "clean")
    assert (page["reads"], page["writes"], page["refcount"]) == (3, 1, 0)
    assert (page["owner"]["path"], page["offset_bytes"]) == ("kv/clean", 16 * PAGE)
    assert page["is_free"] is False
    assert page["pfn_t"] % 64 == 0
    told = pmemfs_here("pages", at, "--pfn", pfn)
    assert "kv/clean, its bytes from 65536 on" in told
    # And for people: small letters, since no cell is full of them.
    drawn = pmemfs_here("pages", at, "--map")
    assert "c clean   d dirty" in drawn
    assert "\x1b" not in drawn
    assert "kv/dirty" in pmemfs_here("pages", at, "--map", "--by", "owner")
    assert "no reads" in pmemfs_here("pages", at, "--map", "--by", "reads")
    structures = mounted.info()["structures"]
    assert structures["pool_bytes"] > 0
    assert structures["pool_bytes"] % PAGE == structures["dram_bytes"] == 0
    assert " in the pool" in pmemfs_here("info", at)


@pytest.fixture
def native_files(pools: PoolMaker) -> Iterator[Mounted]:
    """A mount of mode fs."""
    return pools.mount(pools.create("files", "64M", "--mode", "fs", "--scheme", "on-demand"))


def test_a_name_is_told_as_it_is_now(native_files: Mounted) -> None:
    at = native_files.mountpoint
    structures = native_files.info()["structures"]
    assert structures == {"pool_bytes": 0, "dram_bytes": 0}
    (at / "a/b").mkdir(parents=True)
    (at / "other").mkdir()
    write(at / "a/b/file", 20)
    assert owners(asked(at, "--map", "--by", "owner")) == {"a/b/file": 20}
    (at / "a/b/file").rename(at / "other/$x$\n")
    assert owners(asked(at, "--map", "--by", "owner")) == {"other/$x$\n": 20}
    (at / "other").rename(at / "a/b/c")
    assert owners(asked(at, "--map", "--by", "owner")) == {"a/b/c/$x$\n": 20}
    drawn = pmemfs_here("pages", at, "--map", "--by", "owner")
    assert "a/b/c/$x$\\n" in drawn, "no name makes a line of its own"
    pages = asked("--file", at / "a/b/c/$x$\n")
    with opened(at / "a/b/c/$x$\n", os.O_RDONLY):
        (at / "a/b/c/$x$\n").unlink()
        shares = asked(at, "--map", "--by", "owner")["owners"]
        assert [share["owner"]["note"] for share in shares] == ["unnamed"]
        assert "(unnamed)" in pmemfs_here("pages", at)

    def notes() -> set[str]:
        return {page["owner"]["note"] for page in native_files.pages()["hottest"]}

    wait_until(lambda: notes() == {"gone"}, "it is closed")
    page = asked(at, "--pfn", pages["runs"][0]["pfn"])
    assert page["owner"]["has_left"]
    # What has the number and the frames of an old file is told from it.
    write(at / "new", 1)
    assert "new" in owners(asked(at, "--map", "--by", "owner"))
    assert 0 < native_files.info()["structures"]["dram_bytes"] <= 4 << 20
    assert " in DRAM" in pmemfs_here("info", at)


def test_a_page_that_has_left_its_file_is_told_so(native_files: Mounted) -> None:
    at = native_files.mountpoint
    write(at / "file", 20)
    pfn = asked("--file", at / "file")["runs"][0]["pfn"]
    assert not asked(at, "--pfn", pfn)["owner"]["has_left"]
    os.truncate(at / "file", 0)
    assert asked("--file", at / "file")["runs"] == []
    assert asked(at, "--pfn", pfn)["owner"]["has_left"]
    assert "file (has left it)" in pmemfs_here("pages", at, "--pfn", pfn)


@pytest.mark.usefixtures("engine")
def test_pins_are_shown_with_who_has_them(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"))
    at = mounted.mountpoint
    (at / "kv").mkdir()
    for name in ("kv/large", "small"):
        write(at / name, 4 if name == "small" else 24)
    assert pmemfs_here("pages", at, "--pins") == "0 pins of 0B\n"
    assert "pins" not in pmemfs_here("info", at)
    mount = mount_at(str(at))
    assert mount is not None
    channel = Channel(socket_path(mount))
    inodes = [(at / name).stat().st_ino for name in ("kv/large", "small")]
    _, (large,) = channel.ask("pin", files=[[inodes[0], 0, -1]], writable=True)
    _, (both,) = channel.ask(
        "pin", files=[[inodes[1], 4096, -1], [inodes[0], 0, 4096]], writable=False
    )
    pins = asked(at, "--pins")["pins"]
    assert [(pin["page_count"], pin["writable"]) for pin in pins] == [(24, True), (4, False)]
    assert {pin["pid"] for pin in pins} == {os.getpid()}
    assert [part["owner"]["path"] for part in pins[1]["files"]] == ["small", "kv/large"]
    told = pmemfs_here("pages", at, "--pins")
    assert "small from 4096, kv/large" in told
    assert told.endswith("2 pins of 112KiB\n")
    assert "2 pins of 1 process, 112KiB; 'pmemfs pages --pins'" in pmemfs_here("info", at)
    assert mounted.info()["pins"]["held_bytes"] == 28 * PAGE
    # Pages in use, as all views have it.
    assert sum(cell["in_use"] for cell in asked(at, "--map")["cells"]) == 27
    assert "U" in pmemfs_here("pages", at, "--map") or "u" in pmemfs_here("pages", at, "--map")
    runs = asked("--file", at / "kv/large")["runs"]
    assert sorted({run["refcount"] for run in runs}) == [1, 2]
    assert "96KiB in use" in pmemfs_here("pages", "--file", at / "kv/large")
    # What the file gave away is still held, and the pages say so.
    os.truncate(at / "kv/large", 0)
    assert [pin["is_stale"] for pin in asked(at, "--pins")["pins"]] == [True, True]
    assert "held back" in pmemfs_here("pages", at, "--pfn", runs[0]["pfn"])
    page = asked(at, "--pfn", runs[0]["pfn"])
    assert (page["is_free"], page["refcount"] > 0, page["owner"]["has_left"]) == (False, True, True)
    assert "stale" in pmemfs_here("pages", at, "--pins")
    (at / "small").unlink()
    assert "(gone)" in (told := pmemfs_here("pages", at, "--pins")) or "(unnamed)" in told
    for fd, marks in ((both, b"d"), (large, b"x")):
        os.write(fd, marks)
        os.close(fd)
    channel.close()

    def has_rest() -> bool:
        return [pin["is_resting"] for pin in asked(at, "--pins")["pins"]] == [True]

    wait_until(has_rest, "the writable pin rests, and the other one is over")
    assert "rests, its process is gone" in pmemfs_here("pages", at, "--pins")
    assert "96KiB rest" in pmemfs_here("info", at)


def test_without_page_structures_there_is_no_map_and_no_page(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", "--scheme", "none"))
    for words in (("--map",), ("--file", mounted.device), ("--pfn", "0x200"), ("--pins",)):
        refused(pmemfs("pages", mounted.mountpoint, *words), 1, "'none'", "'pmem'", "'on-demand'")
    assert "in the pool" not in pmemfs_here("info", mounted.mountpoint)


@pytest.mark.parametrize("page_size", ["4K", "2M"])
def test_a_device_has_one_owner_and_maps_of_every_size(pools: PoolMaker, page_size: str) -> None:
    pool = pools.create("huge", "1T", "--sparse", "--page-size", page_size)
    mounted = pools.mount(pool)
    size_bytes = mounted.device.stat().st_size
    unit = PAGE if page_size == "4K" else 1 << 21
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x", 0)
        os.pwrite(fd, b"x" * 2 * PAGE, size_bytes // 2)
        os.pwrite(fd, b"x", size_bytes - 1)
    report = asked(mounted.mountpoint, "--map", "--by", "owner")
    assert (report["page_size_bytes"], report["page_count"]) == (unit, size_bytes // unit)
    assert len(report["cells"]) == 3
    touched = 4 if page_size == "4K" else 3
    assert owners(report) == {"huge": touched}
    runs = asked("--file", mounted.device)["runs"]
    assert [run["state"] for run in runs].count("dirty") == 3
    assert sum(run["length_bytes"] for run in runs) == size_bytes
    page = asked(mounted.mountpoint, "--pfn", runs[0]["pfn"] + 1 if unit > PAGE else runs[0]["pfn"])
    assert page["first_pfn"] == runs[0]["pfn"]
    assert page["frame_count"] == unit // PAGE
    assert page["is_free"] is None
    refused(pmemfs("pages", mounted.mountpoint, "--pfn", (1 << 40) // PAGE), 1, "outside the data")
    # A file of another mount is not of this one.
    other = pools.mount(pools.create("other", "16M"))
    refused(pmemfs("pages", other.mountpoint, "--file", mounted.device), 2, "is not in the mount")


def test_a_map_is_watched_and_painted_on_a_terminal(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M"))

    def make_dirty() -> None:
        """Again, because the daemon makes all durable every 30 seconds."""
        with opened(mounted.device) as fd:
            os.pwrite(fd, b"x", 0)

    make_dirty()
    words = ["pages", str(mounted.mountpoint), "--map", "--watch", "0.05", "--count", "2"]
    lines = pmemfs_ok(*words, "--json").splitlines()
    assert [len(json.loads(line)["cells"]) for line in lines] == [1, 1]
    plain = pmemfs_ok(*words)
    assert plain.count("A cell is") == 2
    assert "\x1b" not in plain
    make_dirty()
    assert "\x1b[33md" in pmemfs_ok("pages", mounted.mountpoint, "--map", "--color", "always")
    make_dirty()
    shown = on_terminal(words, TERM="xterm")
    assert shown.count("\x1b[H") == 2
    assert "\x1b[33md" in shown
    calm = on_terminal(words[:3], TERM="xterm", NO_COLOR="1")
    assert "A cell is" in calm
    assert "\x1b" not in calm


def on_terminal(words: list[str], **environment: str) -> str:
    """What the program shows on a terminal of 80 columns."""
    leader, follower = pty.openpty()
    ours = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment = {**ours, "COLUMNS": "80", **environment}
    with subprocess.Popen([BIN / "pmemfs", *words], stdout=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 1 << 16):
                shown += part
        except OSError:
            # The other side is closed.
            pass
        assert process.wait() == 0
    os.close(leader)
    return shown.decode()


def test_a_picture_is_drawn_or_it_is_said_how(
    native_files: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    at = native_files.mountpoint
    write(at / "$a_b$", 300)
    for by in ("state", "reads", "owner"):
        picture = tmp_path / f"{by}.png"
        assert pmemfs_here("pages", at, "--by", by, "--picture", picture) == ""
        assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = tmp_path / "map.svg"
    assert pmemfs_here("pages", at, "--by", "owner", "--picture", drawn) == ""
    assert b"</svg>" in drawn.read_bytes()
    assert "A cell is" in pmemfs_here("pages", at, "--map", "--picture", picture)
    assert json.loads(pmemfs_here("pages", at, "--picture", picture, "--json")) == {
        "picture": str(picture)
    }
    gone = tmp_path / "missing/map.png"
    refused(pmemfs("pages", at, "--picture", gone), 1, "cannot draw", "no such file")
    hidden = tmp_path / "without"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    refused(pmemfs("pages", at, "--picture", picture), 1, "matplotlib is not installed",
            "-m pip install matplotlib")  # fmt: skip


def test_only_the_owner_of_a_mount_and_root_see_its_pages(native_files: Mounted) -> None:
    words = [BIN / "pmemfs", "pages", native_files.mountpoint, "--map"]
    answer = run_command("setpriv", "--reuid=65534", "--clear-groups", *words)
    assert answer.code != 0
    assert "Traceback" not in answer.err
