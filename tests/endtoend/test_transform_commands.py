"""What `pmemfs set`, `get`, `rewrite` and `copy` say of files that are encrypted or compressed."""

from __future__ import annotations

import errno
import json
import mmap
import os
from pathlib import Path

import pytest

from kit.clients import free_bytes
from kit.commands import pmemfs, pmemfs_here, pmemfs_ok, refused
from kit.fs_mounts import create_fs
from kit.keys import add_key, encrypted
from kit.mounts import Mounted, PoolMaker
from kit.processes import wait_until

pytestmark = [pytest.mark.mount]

WORDS = {"set": ["compression=zstd"], "get": [], "rewrite": []}


@pytest.fixture
def mounted(pools: PoolMaker) -> Mounted:
    return pools.mount(create_fs(pools, "fs0", "32M"))


def shown(path: Path) -> dict[str, object]:
    return dict(json.loads(pmemfs_here("get", path, "--json")))


def is_full_after(path: Path, offsets: range) -> bool:
    """Whether a page that is written at one of some places finds no room."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for offset in offsets:
            os.pwrite(fd, bytes(4096), offset)
    except OSError as error:
        return error.errno == errno.ENOSPC
    finally:
        os.close(fd)
    return False


def test_a_pool_of_another_mode_is_named_with_its_mode(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("block0", "16M"))
    for command, words in WORDS.items():
        for path in (mounted.mountpoint, *mounted.mountpoint.iterdir()):
            refused(pmemfs(command, path, *words), 1, "is a pool of mode block")


def test_get_names_the_key_and_says_whether_it_is_locked(mounted: Mounted) -> None:
    add_key(mounted)
    directory = encrypted(mounted)
    (directory / "file").touch()
    for path in (directory, directory / "file"):
        assert "yes, with the key 'work', which is unlocked" in pmemfs_ok("get", path)
    pmemfs_here("lock", directory)
    for path in (directory, *directory.iterdir()):
        assert "yes, with the key 'work', which is locked" in pmemfs_ok("get", path)
        key = shown(path)["key"]
        assert isinstance(key, dict)
        assert (key["name"], key["is_unlocked"]) == ("work", False)
    assert shown(mounted.mountpoint)["key"] is None


def test_a_directory_shows_what_it_passes_on(mounted: Mounted) -> None:
    pmemfs_here("set", mounted.mountpoint, "compression=lz4:9")
    assert shown(mounted.mountpoint)["compression"] == "lz4:9"


def test_rewrite_says_what_is_encrypted_and_so_stays_as_it_is(mounted: Mounted) -> None:
    add_key(mounted)
    directory = encrypted(mounted)
    for name in ("one", "two"):
        (directory / name).write_bytes(bytes(100_000))
    (mounted.mountpoint / "plain").write_bytes(bytes(100_000))
    assert "2 of them are encrypted" in pmemfs_ok("rewrite", mounted.mountpoint)
    assert "all of them are encrypted" in pmemfs_ok("rewrite", directory)
    assert "now; it is encrypted" in pmemfs_ok("rewrite", directory / "one")
    assert "encrypted" not in pmemfs_ok("rewrite", mounted.mountpoint / "plain")
    report = json.loads(pmemfs_here("rewrite", mounted.mountpoint, "--json"))
    assert (report["files"], report["encrypted_files"]) == (3, 2)


def test_a_copy_from_or_to_what_is_locked_says_what_unlocks_it(
    mounted: Mounted, tmp_path: Path
) -> None:
    add_key(mounted)
    directory = encrypted(mounted)
    (directory / "file").write_bytes(b"secret")
    pmemfs_here("lock", directory)
    [name] = directory.iterdir()
    plain = tmp_path / "plain"
    plain.touch()
    for source, target in ((name, tmp_path / "out"), (plain, directory)):
        refused(pmemfs("copy", source, target), 1, "'pmemfs unlock' unlocks it")


def test_a_file_that_is_mapped_with_mmap_can_be_set(mounted: Mounted) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(bytes(100_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = 1
        assert pmemfs_ok("set", path, "compression=zstd")
    assert path.read_bytes()[0] == 1


def test_a_full_pool_takes_no_write_to_what_is_compressed_as_the_documents_say(
    mounted: Mounted,
) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(bytes(4 << 20))
    pmemfs_here("set", path, "compression=zstd")
    pmemfs_here("rewrite", path)
    assert is_full_after(mounted.mountpoint / "fill", range(0, 64 << 20, 4096))
    assert is_full_after(path, range(0, 4 << 20, 128 << 10))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[-1] = 1
        with pytest.raises(OSError, match="No space left"):
            mapping.flush()
    pmemfs_here("set", path, "compression=none")
    refused(pmemfs("rewrite", path), 1, "no space left on device")
    (mounted.mountpoint / "fill").unlink()
    # The kernel forgets it a moment later, and a rewrite does not wait for frames.
    wait_until(lambda: free_bytes(mounted.mountpoint) > 8 << 20, "there is room")
    pmemfs_ok("rewrite", path)
    path.write_bytes(b"x")
