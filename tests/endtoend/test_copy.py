"""`pmemfs copy`: into mounts and out of them, on the page path and past it, whole or not at all."""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_here, refused
from kit.mounts import NATIVE, Engine, Mounted, PoolMaker, pool_maker
from kit.sources import loop_device, needs_root
from pmemfs.client.filecopy import Copied
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB, TIB

pytestmark = pytest.mark.mount

SIZES = (0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, MIB + 4242, 65 * MIB + 5)
"""The last one is more than is pinned at a time."""


@dataclass
class Scene:
    """Mounts of one engine."""

    engine: Engine
    pools: PoolMaker
    files: Mounted
    device: Mounted

    @property
    def root(self) -> Path:
        """The file system."""
        return self.files.mountpoint


# Pages do not care for the transport.
@pytest.fixture(scope="module", params=[NATIVE[0], Engine("python")], ids=str)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Mounts that the tests of this file share: each leaves them as it found them."""
    with pool_maker(request.param) as pools:
        files = pools.mount(pools.create("files", "256M", "--mode", "fs"))
        device = pools.mount(pools.create("device", "32M"))
        yield Scene(request.param, pools, files, device)


@pytest.fixture
def root(scene: Scene) -> Iterator[Path]:
    """The file system, empty before and after each test."""
    assert list(scene.root.iterdir()) == []
    yield scene.root
    for path in scene.root.iterdir():
        path.unlink()


def copy(source: Path, target: Path, *options: object) -> Copied:
    """`pmemfs copy`, which must succeed; what it reports."""
    report = json.loads(pmemfs_here("copy", source, target, "--json", *options))
    return Copied(**report)


def written(path: Path, size_bytes: int) -> bytes:
    """Fill a file with anything; what is in it."""
    content = os.urandom(size_bytes)
    path.write_bytes(content)
    return content


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_file_goes_in_and_out_by_pages_and_stays_the_same(
    scene: Scene, root: Path, tmp_path: Path, size_bytes: int
) -> None:
    source, inside, back = tmp_path / "source", root / "inside", tmp_path / "back"
    content = written(source, size_bytes)
    source.chmod(0o754)
    for one, other in ((source, inside), (inside, back)):
        copied = copy(one, other)
        assert other.read_bytes() == content
        assert stat.S_IMODE(other.stat().st_mode) == 0o754
        assert copied[:2] == (str(one), str(other))
        assert (copied.size_bytes, copied.copied_bytes) == (size_bytes, size_bytes)
        if 0 < size_bytes < FRAME_BYTES:
            assert (copied.path, copied.why) == ("bounce", "it has no whole block of 4KiB")
        else:
            assert (copied.path, copied.why) == ("pages", None)
    assert sorted(tmp_path.iterdir()) == [back, source]


def test_pages_are_written_to_by_the_device_and_not_by_requests(
    scene: Scene, root: Path, tmp_path: Path
) -> None:
    written(tmp_path / "source", 8 * MIB)
    before = json.loads(pmemfs_here("stat", scene.root, "--json"))["operations"]
    assert copy(tmp_path / "source", root / "inside", "--direct").path == "pages"
    assert copy(root / "inside", tmp_path / "back", "--direct").path == "pages"
    after = json.loads(pmemfs_here("stat", scene.root, "--json"))["operations"]
    for name in ("read", "write"):
        assert after[name]["moved_bytes"] == before[name]["moved_bytes"]


def test_holes_of_a_terabyte_stay_holes(scene: Scene, root: Path, tmp_path: Path) -> None:
    source, inside, back = tmp_path / "source", root / "inside", tmp_path / "back"
    marks = (0, 3 * MIB + 5, TIB // 2, TIB - 1)
    with source.open("wb") as file:
        for at in marks:
            file.seek(at)
            file.write(b"x")
    pairs = [(source, inside)]
    if scene.engine.name == "native":
        # pyfuse3 tells no program where the holes are.
        pairs.append((inside, back))
    for one, other in pairs:
        copied = copy(one, other)
        assert copied.path == "pages"
        assert copied.copied_bytes == len(marks) * FRAME_BYTES
        assert other.stat().st_size == TIB
        assert used_bytes(other) < MIB
        with other.open("rb") as file:
            for at in marks:
                file.seek(max(0, at - 1))
                assert file.read(3).strip(b"\0") == b"x"


def test_what_a_program_has_stored_through_a_mapping_is_copied(
    scene: Scene, root: Path, tmp_path: Path
) -> None:
    if scene.engine.name != "native":
        pytest.skip("pyfuse3 has no shared mappings of what is opened for direct I/O")
    inside = root / "inside"
    written(inside, 2 * MIB)
    with inside.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[MIB : MIB + 5] = b"later"
        copy(inside, tmp_path / "back")
    assert (tmp_path / "back").read_bytes()[MIB : MIB + 5] == b"later"


# Devices


def test_the_device_of_a_mount_is_written_in_place(scene: Scene, tmp_path: Path) -> None:
    device, source = scene.device.device, tmp_path / "source"
    size_bytes = device.stat().st_size
    before = bytearray(os.urandom(size_bytes))
    device.write_bytes(before)
    number = device.stat().st_ino
    content = bytearray(written(source, 5 * MIB + 17))
    # A hole of a device is zeroes.
    with source.open("r+b") as file:
        file.truncate(MIB)
        file.seek(3 * MIB)
        file.write(content[3 * MIB :])
    content[MIB : 3 * MIB] = bytes(2 * MIB)
    copied = copy(source, scene.device.mountpoint / "device")
    assert (copied.path, copied.size_bytes) == ("pages", len(content))
    assert device.read_bytes() == content + before[len(content) :]
    assert (device.stat().st_ino, device.stat().st_size) == (number, size_bytes)

    back = tmp_path / "back"
    assert copy(device, back).path == "pages"
    assert back.read_bytes() == device.read_bytes()


def test_a_device_that_is_too_small_is_left_as_it_is(scene: Scene, tmp_path: Path) -> None:
    device, source = scene.device.device, tmp_path / "source"
    before = device.read_bytes()
    with source.open("wb") as file:
        file.write(b"x" * MIB)
        file.truncate(len(before) + 1)
    refused(pmemfs("copy", source, device), 1, f"{device}", "no room for")
    assert device.read_bytes() == before


@needs_root
def test_a_block_device_outside_is_a_source_and_a_target(
    scene: Scene, root: Path, tmp_path: Path
) -> None:
    backing = tmp_path / "backing"
    content = written(backing, 8 * MIB)
    with loop_device(backing) as loop:
        assert copy(loop, root / "inside").path == "pages"
        assert (root / "inside").read_bytes() == content
        with (root / "new").open("wb") as file:
            file.truncate(3 * MIB)
            file.seek(2 * MIB + 512)
            file.write(b"y" * 512)
        assert copy(root / "new", loop, "--direct").path == "pages"
        expected = (root / "new").read_bytes() + content[3 * MIB :]
        assert loop.read_bytes() == expected
        written(root / "new", 8 * MIB + 1)
        refused(pmemfs("copy", root / "new", loop), 1, f"{loop}: no room for", "8MiB")
        other = os.open(loop, os.O_RDWR | os.O_EXCL)
        try:
            refused(pmemfs("copy", root / "new", loop), 1, f"{loop}: device or resource busy")
        finally:
            os.close(other)
        assert loop.read_bytes() == expected


# Between mounts


def test_a_copy_from_mount_to_mount_and_within_one_takes_pages(
    scene: Scene, root: Path, tmp_path: Path
) -> None:
    content = written(root / "one", 3 * MIB + 77)
    assert copy(root / "one", root / "two").path == "pages"
    assert (root / "two").read_bytes() == content
    copied = copy(root / "one", scene.device.device)
    assert copied.path == "pages"
    assert scene.device.device.read_bytes()[: len(content)] == content


# Names


def test_a_directory_means_the_name_below_it(root: Path, tmp_path: Path) -> None:
    content = written(tmp_path / "a file\n", 10_000)
    copied = copy(tmp_path / "a file\n", root)
    assert copied.target == str(root / "a file\n")
    assert (root / "a file\n").read_bytes() == content
    refused(pmemfs("copy", tmp_path / "a file\n", f"{root}/no/"), 1, "/no/", "no such")
    refused(pmemfs("copy", tmp_path / "a file\n", f"{root / copied.target}/"), 1, "not a directory")


def test_a_file_is_replaced_at_once_and_keeps_what_is_its_own(root: Path, tmp_path: Path) -> None:
    content = written(tmp_path / "new", 10_000)
    old, link = root / "old", root / "link"
    was = written(old, 50_000)
    old.chmod(0o640)
    os.chown(old, 12, 34)
    link.symlink_to("old")
    with old.open("rb") as reader:
        copy(tmp_path / "new", link)
        assert reader.read() == was, "who reads the old one goes on"
    assert link.is_symlink()
    assert old.read_bytes() == content
    status = old.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)


def test_what_is_there_stays_with_no_clobber(root: Path, tmp_path: Path) -> None:
    written(tmp_path / "new", 10_000)
    old = written(root / "new", 100)
    said = json.loads(pmemfs_here("copy", "-n", tmp_path / "new", root, "--json"))
    assert (said["path"], said["why"], said["copied_bytes"]) == (None, "it exists", 0)
    assert (root / "new").read_bytes() == old
    pmemfs_here("copy", "--no-clobber", tmp_path / "new", root / "other")
    assert (root / "other").stat().st_size == 10_000


def test_nothing_is_copied_over_itself(root: Path) -> None:
    content = written(root / "one", 10_000)
    (root / "two").hardlink_to(root / "one")
    (root / "three").symlink_to("two")
    for name in ("one", "two", "three"):
        refused(pmemfs("copy", root / "one", root / name), 1, "they are the same file")
    assert (root / "one").read_bytes() == content


def test_a_link_that_leads_to_nothing_is_not_written_through(root: Path, tmp_path: Path) -> None:
    written(tmp_path / "new", 10)
    (root / "link").symlink_to("nothing")
    refused(pmemfs("copy", tmp_path / "new", root / "link"), 1, "leads to no file")
    assert [path.name for path in root.iterdir()] == ["link"]
