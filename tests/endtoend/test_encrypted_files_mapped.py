"""Encrypted files for programs that want pages: refused with what would serve, and copied."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import pmemfs
from kit.commands import pmemfs as command
from kit.commands import pmemfs_here, refused
from kit.fs_mounts import create_fs
from kit.keys import add_key, encrypted
from kit.mounts import ENGINES, Engine, Mounted, PoolMaker, pool_maker
from kit.posix import opened
from pmemfs.client.filecopy import Copied
from pmemfs.errors import BadCache, CannotMapTransformed
from pmemfs.pfn import FRAME_BYTES

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SIZE = 40 * FRAME_BYTES + 77


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def mounted(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Mounted, PoolMaker]]:
    with pool_maker(request.param) as pools:
        made = pools.mount(create_fs(pools, "fs0", "128M"))
        add_key(made)
        encrypted(made)
        yield request.param, made, pools


@pytest.fixture
def private(mounted: tuple[Engine, Mounted, PoolMaker], tmp_path: Path) -> Path:
    """A directory in the encrypted one, and in it `file`."""
    path = mounted[1].mountpoint / "private" / tmp_path.name
    path.mkdir()
    (path / "file").write_bytes(CONTENT)
    return path


CONTENT = random.Random(1).randbytes(SIZE)


def refusal(error: pytest.ExceptionInfo[CannotMapTransformed], name: str) -> None:
    assert error.value.errno == errno.EOPNOTSUPP
    for word in (name, "encrypted", "'pmemfs copy'"):
        assert word in str(error.value)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_no_array_shows_an_encrypted_file(private: Path, mode: str) -> None:
    with pmemfs.connect(private) as fs:
        for call in (fs.map, fs.open):
            with pytest.raises(CannotMapTransformed) as error:
                call(private / "file", mode=mode)
            refusal(error, "file")
        with pytest.raises(CannotMapTransformed) as error:
            fs.map_many([private / "file"], mode=mode)
        refusal(error, "file")
        with pytest.raises(CannotMapTransformed) as error:
            fs.map(private / "file", contiguous=True)
        assert fs.pins() == []
    assert (private / "file").read_bytes() == CONTENT


def test_neither_new_arrays_nor_caches_are_made_and_nothing_is_left_of_them(private: Path) -> None:
    with pmemfs.connect(private) as fs, pytest.raises(CannotMapTransformed) as error:
        fs.create(private / "new", (10,))
    refusal(error, "new")
    for path in (private, private / "cache"):
        with pytest.raises(BadCache, match=f"{path} cannot be a cache: it is encrypted"):
            pmemfs.TensorCache(path)
    assert os.listdir(private) == ["file"]


def copy(source: Path, target: Path, *options: object) -> Copied:
    return Copied(**json.loads(pmemfs_here("copy", source, target, "--json", *options)))


def test_copies_go_in_and_out_through_a_buffer_and_say_why(
    mounted: tuple[Engine, Mounted, PoolMaker], private: Path, tmp_path: Path
) -> None:
    out, back = tmp_path / "out", private / "back"
    for source, target in ((private / "file", out), (out, back), (back, private / "again")):
        copied = copy(source, target)
        assert (copied.path, copied.why) == ("bounce", "its pages are encrypted")
        assert target.read_bytes() == CONTENT
    # Between two directories of a mount the other one's pages can be had. What goes to them or
    # comes from them is deciphered or ciphered on the way all the same.
    plain = mounted[1].mountpoint / f"plain-{tmp_path.name}"
    for source, target in ((private / "file", plain), (plain, back)):
        copied = copy(source, target)
        assert (copied.path, copied.why) == ("bounce", "its pages are encrypted")
        assert target.read_bytes() == CONTENT
    refused(command("copy", "--direct", private / "file", plain), 1, "are encrypted")
    plain.unlink()
    refused(command("copy", "--direct", private / "file", tmp_path / "other"), 1, "are encrypted")
    refused(command("copy", "--direct", out, private / "other"), 1, "are encrypted")
    assert not (tmp_path / "other").exists()
    assert sorted(os.listdir(private)) == ["again", "back", "file"]


def test_the_kernel_maps_and_copies_them(
    mounted: tuple[Engine, Mounted, PoolMaker], private: Path
) -> None:
    content = bytearray(CONTENT)
    plain = mounted[1].mountpoint / f"plain-{private.name}"
    with opened(private / "file") as fd:
        is_native = mounted[0].name == "native"
        kind = mmap.MAP_SHARED if is_native else mmap.MAP_PRIVATE
        with mmap.mmap(fd, SIZE, kind) as mapped:
            assert mapped[:] == content
            if is_native:
                mapped[5000:5005] = content[5000:5005] = b"other"
                mapped.flush()
        with opened(plain, os.O_RDWR | os.O_CREAT) as other:
            done = 0
            while count := os.copy_file_range(fd, other, SIZE, done, done + 3):
                done += count
        with opened(plain) as other:
            assert os.copy_file_range(other, fd, 9000, 3 + 17, 333) == 9000
            content[333:9333] = content[17:9017]
    assert plain.read_bytes()[3 : 3 + 333] == content[:333]
    assert (private / "file").read_bytes() == content
    plain.unlink()
