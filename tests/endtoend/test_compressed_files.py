"""Compressed files on real mounts: what programs read and write, map and copy is what it was."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import mmap
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import wait_for_pins
from kit.commands import pmemfs as command
from kit.commands import pmemfs_here, pmemfs_ok, refused
from kit.mounts import Engine, Mounted
from kit.posix import opened
from kit.processes import wait_until
from pmemfs.client.filecopy import Copied
from pmemfs.errors import CannotPin
from pmemfs.media.transform import HOT_SECONDS
from pmemfs.pfn import FRAME_BYTES

pytestmark = [pytest.mark.mount, pytest.mark.slow]

PIECE = 32 * FRAME_BYTES
SIZE = 8 * PIECE + 5 * FRAME_BYTES + 77


def text(size_bytes: int = SIZE, seed: int = 1) -> bytes:
    """Bytes that shrink, and of which no two frames are the same."""
    chance = random.Random(seed)
    lines = [b"%08d %s\n" % (line, b"some words " * chance.randrange(9)) for line in range(40_000)]
    return b"".join(lines)[:size_bytes]


def rewrite(path: Path) -> None:
    """Let a file lie as its transformation says."""
    pmemfs_here("rewrite", path)


def compress(path: Path, content: bytes) -> None:
    """Make a file that lies compressed."""
    path.write_bytes(content)
    pmemfs_here("set", path, "compression=zstd")
    rewrite(path)
    assert is_compressed(path)


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def is_compressed(path: Path) -> bool:
    """Whether a file takes less than half of its size."""
    return blocks(path) < path.stat().st_size // 2


@pytest.fixture
def connected(file_system: tuple[Engine, Mounted]) -> Iterator[pmemfs.Mount]:
    with pmemfs.connect(file_system[1].mountpoint) as fs:
        yield fs
        gc.collect()
        wait_for_pins(fs, 0)


def test_reads_and_seeks_of_what_is_compressed_in_part_are_right(root: Path) -> None:
    path, content = root / "file", bytearray(text())
    compress(path, content)
    began = time.monotonic()
    with opened(path) as fd:
        # The first write makes one piece plain; the second comes to a published file.
        for at in (3 * PIECE + 5, 3 * PIECE + 100, 3 * PIECE + 200):
            os.pwrite(fd, b"plain again", at)
            content[at : at + 11] = b"plain again"
        chance = random.Random(2)
        for _ in range(300):
            at, length = chance.randrange(SIZE), chance.randrange(1, 3 * FRAME_BYTES)
            if chance.random() < 0.3:
                at = max(0, chance.randrange(9) * PIECE - length // 2)
            assert os.pread(fd, length, at) == content[at : at + length]
        assert os.pread(fd, SIZE + 9, 0) == content
        for at in (0, PIECE + 7, 3 * PIECE, SIZE - 1):
            assert os.lseek(fd, at, os.SEEK_DATA) == at
            assert os.lseek(fd, at, os.SEEK_HOLE) == SIZE
    # What is read in so many different seconds is hot, and made plain. The first and the last of
    # them may be over soon.
    is_hot = time.monotonic() - began > HOT_SECONDS - 2
    assert is_compressed(path) or is_hot, "reads and some writes leave the rest as it is"


def test_random_changes_of_a_file_that_is_compressed_again_and_again(root: Path) -> None:
    path, model, chance = root / "file", bytearray(text()), random.Random(5)
    compress(path, model)
    with opened(path) as fd:
        for step in range(250):
            at = chance.randrange(len(model) or 1)
            length = chance.choice((1, 17, FRAME_BYTES, 3 * FRAME_BYTES + 1, PIECE, 2 * PIECE + 9))
            kind = chance.choice(("write", "write", "append", "read", "truncate", "punch", "zero"))
            if kind == "append" or (kind == "write" and not model):
                at, kind = len(model), "write"
            if kind == "write":
                data = text(length, step)
                assert os.pwrite(fd, data, at) == len(data)
                model[at : at + len(data)] = data
            elif kind == "read":
                assert os.pread(fd, length, at) == model[at : at + length]
            elif kind == "truncate":
                size = max(0, at + chance.choice((-1, 1)) * chance.randrange(PIECE))
                os.ftruncate(fd, size)
                model = model[:size] + bytes(size - len(model[:size]))
            elif kind in ("punch", "zero"):
                end = min(len(model), at + length)
                failed = fallocate(fd, PUNCH if kind == "punch" else ZERO, at, length)
                if failed:
                    assert failed == errno.EOPNOTSUPP
                    continue
                model[at:end] = bytes(max(0, end - at))
            if step % 10 == 9:
                rewrite(path)
            if step % 25 == 24:
                assert path.read_bytes() == model, step
    assert path.read_bytes() == model


PUNCH, ZERO = 3, 0x11


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """The errno of fallocate(2), or 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset),
                 ctypes.c_int64(length))  # fmt: skip
    return ctypes.get_errno() if libc.fallocate(*arguments) else 0


def test_a_mapping_by_the_kernel_shows_and_changes_what_is_compressed(
    root: Path, file_system: tuple[Engine, Mounted]
) -> None:
    path, content = root / "file", bytearray(text())
    compress(path, content)
    is_native = file_system[0].name == "native"
    with opened(path) as fd:
        kind = mmap.MAP_SHARED if is_native else mmap.MAP_PRIVATE
        with mmap.mmap(fd, SIZE, kind) as mapped:
            assert mapped[:] == content
            if is_native:
                mapped[PIECE + 3 : PIECE + 8] = content[PIECE + 3 : PIECE + 8] = b"other"
                mapped.flush()
    assert path.read_bytes() == content


def test_copies_by_the_kernel_are_right(root: Path) -> None:
    content = text()
    compress(root / "file", content)
    with opened(root / "file") as source, opened(root / "copy", os.O_RDWR | os.O_CREAT) as target:
        at = 0
        while done := os.copy_file_range(source, target, PIECE + 99, at + 5, at):
            at += done
    assert (root / "copy").read_bytes() == content[5:]
    compress(root / "copy", content)
    with opened(root / "file") as source, opened(root / "copy") as target:
        assert os.copy_file_range(source, target, 1000, 5, PIECE - 500) == 1000
    expected = content[: PIECE - 500] + content[5:1005] + content[PIECE + 500 :]
    assert (root / "copy").read_bytes() == expected


# Arrays


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_an_array_over_a_compressed_file_shows_it_plain(
    root: Path, connected: pmemfs.Mount, mode: str
) -> None:
    path, content = root / "file", bytearray(text())
    compress(path, content)
    array = connected.map(path, mode=mode)
    assert bytes(array) == content
    assert not is_compressed(path)
    if mode != "r":
        array[PIECE : PIECE + 4] = np.frombuffer(b"mine", np.uint8)
        assert bytes(array[PIECE : PIECE + 4]) == b"mine"
    if mode == "r+":
        content[PIECE : PIECE + 4] = b"mine"
        array.flush()
    assert path.read_bytes() == content


def test_a_file_that_somebody_has_mapped_is_not_compressed_and_its_holder_is_named(
    root: Path, connected: pmemfs.Mount
) -> None:
    path = root / "file"
    path.write_bytes(text())
    array = connected.map(path)
    said = refused(command("set", path, "compression=zstd"), 16, f"pid {os.getpid()}")
    assert str(path) in said
    del array
    gc.collect()
    wait_for_pins(connected, 0)
    compress(path, text())
    array = connected.map(path)
    said = refused(command("rewrite", path), 16, f"pid {os.getpid()}")
    assert not connected.pins()[0].is_stale
    assert bytes(array) == text()


def test_where_there_is_no_room_to_make_it_plain_mapping_says_so(
    root: Path, connected: pmemfs.Mount
) -> None:
    path = root / "file"
    compress(path, text(seed=7) * 30)
    filler = root / "filler"
    with opened(filler, os.O_RDWR | os.O_CREAT) as fd:
        at = 0
        with suppress(OSError):
            while True:
                at += os.pwrite(fd, bytes(1 << 20), at)
    with pytest.raises(CannotPin, match="there is no room to make them plain") as failed:
        connected.map(path)
    assert failed.value.errno == errno.ENOSPC
    assert path.read_bytes() == text(seed=7) * 30
    filler.unlink()
    # The kernel may take its time with what it says about the end of a file.
    wait_until(lambda: can_be_mapped(connected, path), "what the other file had is free")
    assert bytes(connected.map(path)) == text(seed=7) * 30


def can_be_mapped(connected: pmemfs.Mount, path: Path) -> bool:
    """Whether there is room to make a file plain."""
    try:
        connected.map(path)
    except CannotPin:
        return False
    return True


def test_new_files_and_caches_of_arrays_work_in_a_compressed_directory(
    root: Path, connected: pmemfs.Mount
) -> None:
    pmemfs_ok("set", root, "compression=zstd")
    values = np.arange(300_000, dtype="u4")
    with connected.create(root / "new", values.shape, values.dtype) as new:
        new.array[:] = values
        new.commit()
    rewrite(root / "new")
    assert is_compressed(root / "new") or blocks(root / "new") < values.nbytes
    assert (connected.map(root / "new", dtype="u4") == values).all()
    with pmemfs.TensorCache(root / "cache") as cache:
        cache.put("a/b", values)
        (entry,) = (p for p in (root / "cache").rglob("*") if p.is_file() and p.name[0] != ".")
        assert json.loads(pmemfs_ok("get", entry, "--json"))["compression"].startswith("zstd")
        assert (cache.get("a/b") == values).all()
    gc.collect()
    wait_for_pins(connected, 0)
    rewrite(entry)
    with pmemfs.TensorCache(root / "cache") as cache:
        found = cache.get("a/b")
        assert found is not None
        assert (found == values).all()
    paths = [root / "new", entry]
    both = connected.map_many(paths)
    assert [bytes(each) for each in both] == [path.read_bytes() for path in paths]


def test_a_contiguous_array_over_a_compressed_file_is_one_run(
    root: Path, connected: pmemfs.Mount
) -> None:
    compress(root / "file", text())
    array = connected.map(root / "file", contiguous=True)
    assert bytes(array) == text()
    report = json.loads(pmemfs_ok("extents", root / "file", "--json"))
    assert len(report["extents"]) == 1


# Copies


def copy(source: Path, target: Path, *options: object) -> Copied:
    return Copied(**json.loads(pmemfs_here("copy", source, target, "--json", *options)))


def test_a_copy_out_of_a_compressed_file_goes_through_a_buffer_and_leaves_it_so(
    root: Path, tmp_path: Path
) -> None:
    path = root / "file"
    compress(path, text())
    copied = copy(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == text()
    assert (copied.path, copied.size_bytes) == ("bounce", SIZE)
    assert copied.why is not None
    assert copied.why.endswith("it is compressed")
    # A piece may have become hot, together with reads of an earlier file with this number.
    assert is_compressed(path)
    refused(command("copy", "--direct", path, tmp_path / "other"), 1, "it is compressed")
    assert not (tmp_path / "other").exists()


def test_a_copy_into_a_compressed_directory_goes_by_pages(root: Path, tmp_path: Path) -> None:
    pmemfs_ok("set", root, "compression=lz4")
    (tmp_path / "file").write_bytes(text())
    assert copy(tmp_path / "file", root / "file").path == "pages"
    rewrite(root / "file")
    assert is_compressed(root / "file")
    assert (root / "file").read_bytes() == text()
    # Over what is compressed already: a new file takes its place.
    (tmp_path / "file").write_bytes(text(seed=2))
    assert copy(tmp_path / "file", root / "file").path == "pages"
    assert (root / "file").read_bytes() == text(seed=2)


def test_what_is_read_often_is_plain_again_and_served_by_the_data_plane(
    root: Path, file_system: tuple[Engine, Mounted]
) -> None:
    path = root / "file"
    compress(path, text())
    with opened(path) as fd:
        # All of it: what is left compressed would be read by the daemon.
        wait_until(lambda: os.pread(fd, SIZE, 0) == text() and blocks(path) >= SIZE,
                   "what is hot is plain")  # fmt: skip
        if file_system[0].name == "native":
            os.pread(fd, FRAME_BYTES, 0)
            before = forwarded_reads(file_system[1])
            for at in range(0, SIZE - FRAME_BYTES, FRAME_BYTES):
                os.pread(fd, FRAME_BYTES, at)
            assert forwarded_reads(file_system[1]) - before <= 2


def forwarded_reads(mounted: Mounted) -> int:
    told = json.loads(pmemfs_here("stat", mounted.mountpoint, "--json"))
    return int(told["operations"]["read"]["forwarded"])
