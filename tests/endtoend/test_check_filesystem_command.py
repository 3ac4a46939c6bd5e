"""`pmemfs check` of a pool of mode `fs`, as a user calls it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from kit.commands import pmemfs
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode
from pmemfs.media.transform import Transformation
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem


@contextmanager
def filesystem(path: Path) -> Iterator[FileSystem]:
    """The file system of a pool, as a daemon has it."""
    with closing(MappedMedium.open(str(path))) as medium:
        pool = Pool.open(medium)
        pool.begin_mount()
        fs = FileSystem(pool, open_memmap(pool))
        yield fs
        fs.end()
        pool.end_mount()


@pytest.fixture
def pool(shm: Path) -> Path:
    """A pool with a file whose log has a wrong record."""
    path = shm / "pmem0"
    path.write_bytes(bytes(16 * MIB))
    with closing(MappedMedium.open(str(path))) as medium:
        FileSystem.format(Pool.create(medium, PoolSpec(name="pmem0", mode=Mode.FS)))
    with filesystem(path) as fs:
        directory = fs.make(ROOT, b"dir", NewInode(0o40755, 0, 0))
        for name in (b"good", b"b\nd"):
            fs.write(fs.make(directory, name, NewInode(0o100644, 0, 0)), 0, name * 2000)
    return path


def damage(path: Path) -> None:
    with filesystem(path) as fs:
        inode = fs.inode(fs.lookup(fs.lookup(ROOT, b"dir"), b"b\nd"))
        at = inode.log.head + 30
        fs.medium.store(at, bytes([fs.medium.read(at, 1)[0] ^ 1]))


def test_a_sound_pool_is_clean(pool: Path) -> None:
    result = pmemfs("check", pool)
    assert (result.code, result.err) == (0, "")
    assert "2 files, 2 directories" in result.out
    assert result.out.endswith(": no errors\n")
    before = pool.read_bytes()
    assert pmemfs("check", "--repair", pool).code == 0
    assert pool.read_bytes() == before


@pytest.mark.slow
def test_errors_are_said_with_paths_and_left_until_somebody_asks(pool: Path) -> None:
    damage(pool)
    before = pool.read_bytes()
    for options in ((), ("--dry-run",)):
        result = pmemfs("check", *options, pool)
        assert result.code == 4
        assert "(/dir/b\\nd)" in result.out
        assert "has a wrong checksum" in result.out
        assert ("would repair" in result.out) == bool(options)
        assert pool.read_bytes() == before
    left = pmemfs("check", "--repair", pool)
    assert left.code == 4
    assert "NOT repaired: inode" in left.out
    assert "only with --force: it is removed, and what it had is lost" in left.out
    assert pool.read_bytes() == before
    repaired = pmemfs("check", "--repair", "--force", pool)
    assert repaired.code == 1
    assert "it is removed, and what it had is lost" in repaired.out
    assert "errors were corrected" in repaired.out
    assert pmemfs("check", pool).code == 0
    with filesystem(pool) as fs:
        directory = fs.lookup(ROOT, b"dir")
        assert fs.names(directory) == [b"good"]
        assert bytes(fs.read(fs.lookup(directory, b"good"), 0, 10_000)) == b"good" * 2000


def test_programs_get_the_same_as_json(pool: Path) -> None:
    damage(pool)
    report = json.loads(pmemfs("check", "--json", pool).out)
    assert report["ok"] is False
    [bad] = [finding for finding in report["findings"] if finding["path"] == "/dir/b\nd"]
    assert bad["is_error"]
    assert bad["inode"] > 0
    report = json.loads(pmemfs("check", "--json", "--repair", "--force", pool).out)
    assert report["ok"] is True
    assert any(repair["inode"] == bad["inode"] for repair in report["repairs"])


@pytest.mark.parametrize("options", [(), ("--repair",)])
def test_a_pool_in_use_is_not_checked(pool: Path, options: tuple[str, ...]) -> None:
    with closing(MappedMedium.open(str(pool))):
        result = pmemfs("check", *options, pool)
    assert result.code == 8
    assert "in use" in result.err


@pytest.mark.slow
def test_a_damaged_copy_of_the_label_is_written_anew(pool: Path) -> None:
    raw = bytearray(pool.read_bytes())
    raw[-4096:] = b"x" * 4096
    pool.write_bytes(raw)
    found = pmemfs("check", pool)
    assert found.code == 4
    assert "would repair" not in found.out
    would = pmemfs("check", "-n", pool)
    assert would.code == 4
    assert "would repair: label copy: not valid: " in would.out
    assert would.out.count("both copies are written anew") == 1
    said = json.loads(pmemfs("check", "--json", pool).out)["findings"]
    [remedy] = [finding["remedy"] for finding in said if finding["is_error"]]
    assert remedy == "both copies are written anew"
    result = pmemfs("check", "--repair", pool)
    assert result.code == 1
    assert "repaired: label: not valid: " in result.out
    assert "both copies are written anew" in result.out
    assert pmemfs("check", pool).code == 0


@pytest.mark.parametrize("options", [(), ("-n",), ("--repair",)])
def test_very_many_findings_of_one_kind_are_a_few_lines_and_a_number(
    pool: Path, options: tuple[str, ...]
) -> None:
    with filesystem(pool) as fs:
        number = fs.make(ROOT, b"big", NewInode(0o100644, 0, 0))
        fs.write(number, 0, b"no inode" * (FRAME_BYTES // 8 * 128))
        runs = fs.extents(number)
        bitmap, first_pfn = fs.geometry.offset_of(1), fs.geometry.first_pfn
    damage(pool)
    raw = bytearray(pool.read_bytes())
    for run in runs:
        # As if its frames held inodes.
        for frame in range(run.pfn - first_pfn, run.pfn - first_pfn + run.frame_count):
            raw[bitmap + frame // 8] |= 1 << frame % 8
    pool.write_bytes(raw)
    found = json.loads(pmemfs("check", "--json", pool).out)["findings"]
    assert len(found) > 1000, "programs get all of them"
    report = pmemfs("check", *options, pool)
    assert report.code == 4
    assert len(report.out.splitlines()) < 150
    assert re.search(r"^\W*… and 1\d{3} more like it$", report.out, re.MULTILINE)
    assert "(/dir/b\\nd)" in report.out, "what is rare is seen among what is not"
    assert "has a wrong checksum" in report.out


def test_bad_usage_and_what_is_no_pool(pool: Path, tmp_path: Path) -> None:
    assert pmemfs("check", "--no-such-option", pool).code == 2
    nothing = tmp_path / "nothing"
    nothing.write_bytes(bytes(MIB))
    for options in ((), ("--repair",)):
        assert pmemfs("check", *options, nothing).code == 8


def test_a_damaged_piece_is_said_with_its_file_and_bytes_and_zeroed_only_if_forced(
    pool: Path,
) -> None:
    with filesystem(pool) as fs:
        number = fs.make(ROOT, b"log", NewInode(0o100644, 0, 0))
        fs.write(number, 0, b"a line of it\n" * 20_000)
        fs.properties.set_transform(number, Transformation.ZSTD)
        trio.run(fs.cooler.rewrite, number)
        at = (fs.inode(number).pieces[32].pfn << PAGE_SHIFT) + 20
    assert pmemfs("check", pool).code == 0
    with pool.open("r+b") as file:
        file.seek(at)
        file.write(b"?")
    found = pmemfs("check", pool)
    assert found.code == 4
    assert "(/log)" in found.out
    assert "its bytes 131072 to 262143 lie in a compressed piece that is damaged" in found.out
    assert "only with --force: they become zeroes" in pmemfs("check", "--repair", pool).out
    assert pmemfs("check", "--repair", "--force", pool).code == 1
    assert pmemfs("check", pool).code == 0
    with filesystem(pool) as fs:
        assert fs.read(number, 128 * KIB, 128 * KIB) == bytes(260_000 - 128 * KIB)
        assert bytes(fs.read(number, 0, 13)) == b"a line of it\n"
