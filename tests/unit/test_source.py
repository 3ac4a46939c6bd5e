"""What a path is as a source of memory, and making a file of one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.sources import loop_device, needs_root, small_tmpfs, sparse_file
from pmemfs.errors import NoSpace, NoSuchSource, PmemfsError, UnusableSource
from pmemfs.medium.source import SourceKind, identify, known_content, make_file
from pmemfs.units import MIB


def test_a_file_in_memory_is_a_tmpfs_file_without_a_warning(shm: Path) -> None:
    source = identify(str(sparse_file(shm / "pool", MIB + 4097)))
    assert source.kind is SourceKind.TMPFS_FILE
    assert not source.kind.is_device
    assert source.size_bytes == MIB + 4096
    assert source.warning == ""


def test_any_other_file_comes_with_a_warning_of_what_durable_means(tmp_path: Path) -> None:
    source = identify(str(sparse_file(tmp_path / "pool", MIB)))
    if source.kind is SourceKind.TMPFS_FILE:
        pytest.skip("temporary files are in memory here")
    assert source.kind is SourceKind.FILE
    assert "survives a power failure only after fsync" in source.warning
    assert str(tmp_path) in source.warning


@needs_root
def test_a_block_device_has_the_size_of_its_end(tmp_path: Path) -> None:
    with loop_device(sparse_file(tmp_path / "disk", MIB), direct_io=False) as device:
        source = identify(str(device))
        assert source.kind is SourceKind.BLOCK_DEVICE
        assert source.kind.is_device
        assert source.size_bytes == MIB
        assert "is not persistent memory" in source.warning


@pytest.mark.parametrize(
    ("path", "error", "why"),
    [
        ("/dev/null", UnusableSource, "a character device, but not a DAX device"),
        ("/dev/shm", UnusableSource, "it is a directory"),
        ("/nowhere/at/all", NoSuchSource, "no such file or directory"),
        ("/dev/null/x", NoSuchSource, "not a directory"),
    ],
)
def test_what_holds_no_pool_is_refused_with_its_reason(
    path: str, error: type[PmemfsError], why: str
) -> None:
    with pytest.raises(error, match=why) as caught:
        identify(path)
    assert path in str(caught.value)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnusableSource, match="neither a file nor a device"):
        identify(str(tmp_path / "fifo"))


def test_a_made_file_has_memory_behind_every_byte_unless_sparse(shm: Path) -> None:
    full, empty = shm / "full", shm / "empty"
    make_file(str(full), MIB, sparse=False)
    make_file(str(empty), MIB, sparse=True)
    assert full.stat().st_size == empty.stat().st_size == MIB
    assert full.stat().st_blocks * 512 == MIB
    assert empty.stat().st_blocks == 0


def test_making_a_file_keeps_what_it_holds_and_never_shrinks_it(shm: Path) -> None:
    path = shm / "pool"
    path.write_bytes(b"content" * 1000)
    make_file(str(path), 4096, sparse=False)
    assert path.read_bytes() == b"content" * 1000
    make_file(str(path), 8192, sparse=False)
    assert path.read_bytes() == (b"content" * 1000).ljust(8192, b"\0")


@needs_root
def test_a_file_for_which_there_is_no_room_is_not_there_afterwards() -> None:
    with small_tmpfs(MIB) as directory:
        path = directory / "pool"
        with pytest.raises(NoSpace, match="no room for 4MiB: no space left on device") as caught:
            make_file(str(path), 4 * MIB, sparse=False)
        assert caught.value.errno == errno.ENOSPC
        assert not path.exists()
        assert shutil.disk_usage(directory).used == 0


@needs_root
def test_a_file_that_could_not_grow_keeps_its_size_and_content() -> None:
    with small_tmpfs(MIB) as directory:
        path = directory / "pool"
        path.write_bytes(b"x" * 5000)
        with pytest.raises(NoSpace):
            make_file(str(path), 4 * MIB, sparse=False)
        assert path.read_bytes() == b"x" * 5000
        assert shutil.disk_usage(directory).used == 8192


def test_a_file_that_is_too_large_for_any_is_refused(shm: Path) -> None:
    with pytest.raises(NoSpace):
        make_file(str(shm / "pool"), (1 << 63) - 4096, sparse=False)
    assert not (shm / "pool").exists()


def test_a_file_in_no_directory_is_refused() -> None:
    with pytest.raises(NoSuchSource, match="there is no directory /nowhere"):
        make_file("/nowhere/pool", MIB, sparse=True)


@pytest.mark.skipif(not shutil.which("blkid"), reason="blkid is not installed")
def test_known_content_is_called_by_its_name(shm: Path) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    path = sparse_file(shm / "disk", 4 * MIB)
    assert known_content(str(path)) == ""
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
    assert known_content(str(path)) == "ext4 (filesystem)"
