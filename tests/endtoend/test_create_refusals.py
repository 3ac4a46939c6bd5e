"""`pmemfs create` never loses anything, and says in one sentence what is in its way."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import PoolMaker, Session
from kit.posix import opened
from kit.sources import mounted_tmpfs
from kit.users import as_user
from pmemfs.errors import UnusableSource
from pmemfs.medium.source import make_empty
from pmemfs.units import MIB

pytestmark = pytest.mark.mount


@pytest.mark.parametrize(
    "size", ["0", "-1", "abc", "1K", "9E", "1e30", "", "8192P", "1M", "4G4", "¼"]
)
def test_a_size_that_is_nonsense_is_bad_usage_and_makes_nothing(shm: Path, size: str) -> None:
    refused(pmemfs("create", shm / "pool", f"--size={size}"), 2)
    assert not list(shm.iterdir())


def test_a_size_that_is_too_small_is_said_as_it_was_asked_for(shm: Path) -> None:
    for size, said in (("1K", "1KiB"), ("5000", "4.88KiB"), ("1M", "1MiB")):
        refused(pmemfs("create", shm / "pool", "--size", size), 2, f"a pool of {said} is too small")


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_a_directory_that_one_may_not_enter_is_not_said_to_be_missing(shm: Path) -> None:
    inner = shm / "locked" / "inner"
    inner.mkdir(parents=True)
    shm.chmod(0o755)
    inner.parent.chmod(0o700)

    def create() -> str:
        with pytest.raises(UnusableSource) as caught:
            make_empty(str(inner / "pool"))
        return str(caught.value)

    assert "permission denied" in as_user(create)


@pytest.mark.parametrize("align", ["0", "3M", "1K", "abc", "8E", ""])
def test_an_alignment_that_is_nonsense_is_bad_usage(shm: Path, align: str) -> None:
    refused(pmemfs("create", shm / "pool", "--size=16M", f"--align={align}"), 2)
    assert not list(shm.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "x" * 64, "ü" * 32])
def test_a_name_that_no_file_can_have_is_bad_usage(shm: Path, name: str) -> None:
    refused(pmemfs("create", shm / "pool", "--size=16M", f"--name={name}"), 2, "name")
    assert not list(shm.iterdir())


@pytest.mark.slow
def test_names_that_a_file_can_have_name_the_device(pools: PoolMaker) -> None:
    for number, name in enumerate(("ü" * 31, "with space", "-x,b")):
        pool = pools.create(f"p{number}", "16M", f"--name={name}")
        mounted = pools.mount(pool)
        assert os.listdir(mounted.mountpoint) == [name]
        pools.umount(mounted)


@pytest.mark.slow
def test_a_path_of_any_letters_can_be_mounted(pools: PoolMaker) -> None:
    for name in ("a,b", "back\\slash", "two  ünï#"):
        mounted = pools.mount(pools.create(name, "16M"))
        assert os.listdir(mounted.mountpoint) == [name]
        listed = {mount["pool"]: mount for mount in json.loads(pmemfs_ok("list", "--json"))}
        assert listed[str(mounted.pool)]["mountpoint"] == str(mounted.mountpoint)
        by_pool = json.loads(pmemfs_ok("info", mounted.pool, "--json"))
        assert by_pool["mountpoint"] == str(mounted.mountpoint)
        assert by_pool["pool"]["name"] == name
        pmemfs_ok("umount", mounted.pool)


def test_where_there_is_no_directory_and_no_size_it_is_said(shm: Path) -> None:
    refused(pmemfs("create", shm / "none" / "pool", "--size=16M"), 1, "no directory")
    refused(pmemfs("create", shm / "pool"), 1, "--size")
    refused(pmemfs("create", shm), 1, "directory")
    refused(pmemfs("create", "/dev/null"), 1, "character device")


@pytest.mark.parametrize(
    "words",
    [("create", "--size=16M"), ("create",), ("info",), ("check",), ("resize", "--size=32M")],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "directory", ["/dev", "/dev/shm/..", "/dev/disk/by-places", "{shm}/devices"]
)
def test_below_dev_there_are_devices_and_no_files_are_made(
    shm: Path, words: tuple[str, ...], directory: str
) -> None:
    (shm / "devices").symlink_to("/dev")
    path = f"{directory.format(shm=shm)}/dax9.places"
    said = refused(pmemfs(*words, path), 8 if words[0] == "check" else 1, path, "no such device")
    assert "--size" not in said
    assert not Path("/dev/dax9.places").exists()


def test_a_mount_of_a_device_that_is_not_there_advises_to_make_no_file(shm: Path) -> None:
    said = refused(pmemfs("mount", "/dev/dax9.places", shm), 32, "no such device")
    assert "--size" not in said
    assert "create" not in said


def existing_pool(path: Path) -> str:
    return str(json.loads(pmemfs_ok("create", path, "--size=16M", "--json"))["uuid"])


def ext4_image(path: Path) -> str:
    path.write_bytes(bytes(16 * MIB))
    assert run_command("mkfs.ext4", "-q", path).code == 0
    return "ext4"


def partition_table(path: Path) -> str:
    path.write_bytes(bytes(16 * MIB))
    done = run_command("sh", "-c", f"echo ,, | sfdisk -q --label dos {path}")
    if done.code:
        pytest.skip(f"no sfdisk: {done.err}")
    return "dos"


def data_in_the_first_mib(path: Path) -> str:
    path.write_bytes(bytes(123456) + b"x" + bytes(16 * MIB - 123457))
    return "first MiB"


def data_in_the_last_mib(path: Path) -> str:
    path.write_bytes(bytes(16 * MIB - 1) + b"x")
    return "last MiB"


def scribbled_label(path: Path) -> str:
    existing_pool(path)
    with path.open("r+b") as file:
        file.write(b"scribble")
    return "pmemfs pool"


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [existing_pool, ext4_image, partition_table, data_in_the_first_mib, data_in_the_last_mib,
     scribbled_label],
)  # fmt: skip
def test_content_is_overwritten_with_force_only(shm: Path, make: object) -> None:
    assert callable(make)
    path = shm / "pool"
    found = make(path)
    before = path.read_bytes()
    for options in ((), ("--size=16M",), ("--size=32M",), ("--sparse",)):
        refused(pmemfs("create", path, *options), 3, str(path), "already holds", found, "--force")
        assert path.read_bytes() == before
    report = json.loads(pmemfs_ok("create", path, "--force", "--json"))
    assert report["size_bytes"] == 16 * MIB
    assert report["uuid"] != found
    assert pmemfs("check", path).code == 0


def test_a_smaller_size_than_the_file_has_is_refused(shm: Path) -> None:
    path = shm / "pool"
    path.write_bytes(bytes(16 * MIB))
    refused(pmemfs("create", path, "--size=8M"), 2, "16MiB", "not smaller")
    assert path.read_bytes() == bytes(16 * MIB)


def test_a_file_of_zeroes_becomes_a_pool_without_a_size(shm: Path) -> None:
    path = shm / "pool"
    path.write_bytes(bytes(16 * MIB))
    report = json.loads(pmemfs_ok("create", path, "--json"))
    assert report["size_bytes"] == path.stat().st_size == 16 * MIB
    assert report["kind"] == "tmpfs file"
    assert "tmpfs file, lost with the power" in pmemfs_ok("info", path)
    assert pmemfs("check", path).code == 0


def test_a_mounted_pool_can_not_be_created_over(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    before = mounted.info()["pool"]
    for options in ((), ("--force",), ("--force", "--size=32M")):
        refused(pmemfs("create", mounted.pool, *options), 16, "in use", str(session.pid))
    assert mounted.pool.stat().st_size == 16 * MIB
    assert mounted.info()["pool"] == before


def test_create_on_a_full_tmpfs_fails_and_leaves_no_file(pools: PoolMaker) -> None:
    with mounted_tmpfs(pools.directory / "small", "size=16M") as directory:
        pool = directory / "pool"
        refused(pmemfs("create", pool, "--size=32M"), 1, str(pool), "32MiB", "no space left")
        assert not list(directory.iterdir())
        # What was there before stays as it was.
        pool.write_bytes(bytes(4 * MIB))
        for size in ("32M", "4P"):
            refused(pmemfs("create", pool, f"--size={size}"), 1, "no space left")
        assert pool.read_bytes() == bytes(4 * MIB)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("scheme", ["pmem", "on-demand", "none"])
def test_a_sparse_pool_on_a_full_tmpfs_refuses_writes_and_serves_on(
    pools: PoolMaker, scheme: str
) -> None:
    with mounted_tmpfs(pools.directory / "small", "size=16M") as directory:
        pool = directory / "pool"
        pmemfs_ok("create", pool, "--size=1G", "--sparse", "--scheme", scheme)
        mounted = pools.mount(pool)
        pid = mounted.pid
        with opened(mounted.device) as fd:
            os.pwrite(fd, b"first" * 800, 0)
            filled = 0
            with suppress(OSError):
                while filled < 64 * MIB:
                    filled += os.pwrite(fd, b"f" * MIB, 100 * MIB + filled)
            with pytest.raises(OSError, match="No space"):
                os.pwrite(fd, b"f" * MIB, 100 * MIB + filled)
            assert 10 * MIB < filled < 16 * MIB
            # Far away, where not even a page structure has memory.
            for offset in (500 * MIB, 900 * MIB, 900 * MIB + 5):
                with pytest.raises(OSError, match="No space"):
                    os.pwrite(fd, bytes(64 * 1024), offset)
                assert os.pread(fd, MIB, offset) == bytes(MIB)
            # Reads, and writes to where there is memory, go on.
            assert os.pread(fd, 4000, 0) == b"first" * 800
            assert os.pread(fd, filled, 100 * MIB) == b"f" * filled
            assert os.pwrite(fd, b"again" * 800, 0) == 4000
            assert os.pread(fd, 4000, 0) == b"again" * 800
            os.fsync(fd)
        assert mounted.pid == pid
        session = Session.of(mounted)
        pools.umount(mounted)
        session.assert_ended()


def test_reports_of_queries_parse_as_json(pools: PoolMaker) -> None:
    created = json.loads(pmemfs_ok("create", pools.directory / "p", "--size=16M", "--json"))
    assert created["name"] == "p"
    assert json.loads(pmemfs_ok("info", pools.directory / "p", "--json"))["pool"] == created
    checked = json.loads(pmemfs_ok("check", pools.directory / "p", "--json"))
    assert checked["ok"]
    assert checked["findings"]


@pytest.mark.parametrize("length", [6, 4095, 8195])
def test_a_short_text_at_the_end_of_a_file_is_content(shm: Path, length: int) -> None:
    notes = shm / "notes"
    content = bytes(length - 6) + b"notes\n"
    notes.write_bytes(content)
    refused(pmemfs("create", notes, "--size", "16M"), 3, "already holds", "--force")
    assert notes.read_bytes() == content


def test_a_create_that_fails_after_making_the_file_leaves_none(shm: Path) -> None:
    # Larger than any address space: it can be made, and not be mapped.
    result = pmemfs("create", shm / "huge", "--size", "200T", "--sparse")
    refused(result, 1, "can't be mapped")
    assert not (shm / "huge").exists()
    (shm / "small").write_bytes(bytes(MIB))
    refused(pmemfs("create", shm / "small", "--size", "200T", "--sparse"), 1, "can't be mapped")
    assert (shm / "small").stat().st_size == MIB


@pytest.mark.slow
def test_of_creates_at_once_one_makes_the_pool_and_the_others_leave_it(shm: Path) -> None:
    for _ in range(5):
        creates = [
            subprocess.Popen(
                [BIN / "pmemfs", "create", shm / "pool", "--size", "64M"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        errors = [create.communicate()[1] for create in creates]
        assert sorted(create.returncode == 0 for create in creates) == [False, False, False, True]
        assert not any("Traceback" in error for error in errors)
        pmemfs_ok("check", shm / "pool")
        (shm / "pool").unlink()


def test_a_path_that_is_no_text_is_named_all_the_same(shm: Path) -> None:
    path = os.fsencode(shm) + b"/a\xff"
    done = subprocess.run(
        [BIN / "pmemfs", "create", path, "--name", "x", "--size", "16M"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"pool 'x'" in done.stdout
