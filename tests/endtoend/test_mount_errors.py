"""Mounts that can't be: one sentence, the exit code of mount(8), and nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import PoolMaker, Session, mounts_at
from kit.sources import mounted_tmpfs
from pmemfs.media.label import FORMAT_VERSION, pack, validate
from pmemfs.media.layout import replace
from pmemfs.units import MIB

pytestmark = pytest.mark.mount


def assert_refused(
    pools: PoolMaker, pool: Path, *words: str, at: Path | None = None, options: str = "rw"
) -> None:
    """A mount that fails with these words, leaves no mount, and no byte of the pool changed."""
    mountpoint = at or pools.mountpoint("mnt")
    before = pool.read_bytes() if pool.is_file() else None
    mount_count = mounts_at(mountpoint)
    refused(pmemfs("mount", pool, mountpoint, "-o", options), 32, *words)
    assert mounts_at(mountpoint) == mount_count
    assert pool.read_bytes() == before if before is not None else not pool.is_file()


@pytest.mark.slow
def test_a_second_mount_of_a_pool_with_other_options_names_the_first(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    assert_refused(pools, mounted.pool, "in use", str(mounted.mountpoint), options="ro")
    assert mounted.pid == session.pid
    assert mounted.device.read_bytes()
    # Through another name of the same file, too.
    link = pools.directory / "link"
    link.symlink_to(mounted.pool)
    assert_refused(pools, link, "in use", options="ro")
    # A name that leads nowhere else, but that no mount is called by, tells the process.
    hard = pools.directory / "hard"
    hard.hardlink_to(mounted.pool)
    assert_refused(pools, hard, "in use", str(session.pid))


def test_a_mountpoint_must_be_a_directory(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    file = pools.directory / "file"
    file.touch()
    assert_refused(pools, pool, str(file), "not a directory", at=file)
    missing = pools.directory / "missing"
    assert_refused(pools, pool, str(missing), "no such file or directory", at=missing)
    assert_refused(pools, pool, "not a directory", at=file / "below")
    # As of a variable that is not set.
    refused(pmemfs("mount", pool, ""), 32, "a directory has a name")
    mounted = pools.mount(pool)
    assert mounted.info()["pool"]["mount_count"] == 1


def test_a_mountpoint_that_serves_a_pool_takes_no_other(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("one", "16M"))
    other = pools.create("two", "16M")
    assert_refused(pools, other, str(mounted.pool), "is mounted there", at=mounted.mountpoint)
    assert mounted.info()["pool"]["name"] == "one"


def test_a_file_without_a_label_tells_the_command_that_makes_one(pools: PoolMaker) -> None:
    for name, content in (("zeroes", bytes(MIB)), ("text", b"text" * 4096)):
        path = pools.directory / name
        path.write_bytes(content)
        assert_refused(pools, path, f"pmemfs create {path}")


def test_what_is_no_pool_is_refused(pools: PoolMaker) -> None:
    assert_refused(pools, pools.directory / "missing", "no such file")
    assert_refused(pools, pools.directory, "directory")
    assert_refused(pools, Path("/dev/null"), "character device")
    empty = pools.directory / "empty"
    empty.touch()
    assert_refused(pools, empty, "smaller")


@pytest.mark.parametrize("left_bytes", [16 * MIB - 1, 16 * MIB - 4096, 3 * MIB, 8192])
def test_a_truncated_pool_is_refused(pools: PoolMaker, left_bytes: int) -> None:
    pool = pools.create(size="16M")
    os.truncate(pool, left_bytes)
    assert_refused(pools, pool, "cut off", "16MiB")
    assert_refused(pools, pool, "cut off", options="ro")


def test_a_pool_of_a_newer_format_is_refused(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    with pool.open("r+b") as file:
        for offset in (0, 16 * MIB - 4096):
            file.seek(offset)
            label = validate(file.read(4096))
            file.seek(offset)
            file.write(pack(replace(label, format_version=FORMAT_VERSION + 1)))
    assert_refused(pools, pool, "format", str(FORMAT_VERSION + 1), str(FORMAT_VERSION))
    assert_refused(pools, pool, "format", options="ro")


def test_a_pool_with_features_of_a_newer_program_is_refused_or_read_only(
    pools: PoolMaker,
) -> None:
    for name, feature in (("a", "incompatible_features"), ("b", "readonly_features")):
        pool = pools.create(name, "16M")
        label = validate(pool.read_bytes()[:4096])
        with pool.open("r+b") as file:
            for offset in (0, 16 * MIB - 4096):
                file.seek(offset)
                file.write(pack(replace(label, **{feature: 1 << 63})))
        assert_refused(pools, pool, "newer")
    pools.mount(pools.directory / "b", "-o", "ro")


def test_a_pool_of_a_read_only_file_system_can_be_mounted_read_only(pools: PoolMaker) -> None:
    with mounted_tmpfs(pools.directory / "small", "size=32M") as directory:
        pool = directory / "pmem0"
        pmemfs_ok("create", pool, "--size", "16M")
        assert run_command("mount", "-o", "remount,ro", directory).code == 0
        assert_refused(pools, pool, "read-only")
        mounted = pools.mount(pool, "-o", "ro")
        assert mounted.device.read_bytes() == bytes(mounted.device.stat().st_size)
        pools.umount(mounted)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("nonsense", "does not know"),
        ("mode=99", "octal"),
        ("mode=10000000", "is not between"),
        ("mode=", "octal"),
        ("uid=-1", "is not between"),
        ("uid=root", "number"),
        ("gid=4294967295", "is not between"),
        ("ro=1", "does not know"),
        ("ro,nonsense", "nonsense"),
        ("engine=fast", "none of native, python"),
        ("transport=", "none of auto, uring, fd"),
        ("engine=python,transport=uring", "only the native engine"),
    ],
)
def test_a_bad_mount_option_is_bad_usage(pools: PoolMaker, option: str, why: str) -> None:
    pool = pools.directory / "pmem0"
    result = pmemfs("mount", pool, pools.mountpoint(), "-o", option)
    refused(result, 2, "mount option", why)


@pytest.mark.parametrize(
    ("mode", "option"),
    [("fs", "uid=0"), ("fs", "gid=0"), ("fs", "ro,mode=600"), ("block", "cached")],
)
def test_an_option_of_the_other_mode_is_bad_usage(pools: PoolMaker, mode: str, option: str) -> None:
    pool = pools.create("pmem0", "16M", "--mode", mode)
    before = pool.read_bytes()
    mountpoint = pools.mountpoint()
    result = pmemfs("mount", pool, mountpoint, "-o", option)
    refused(result, 2, "mount option", f"no meaning in mode {mode}")
    assert mounts_at(mountpoint) == 0
    assert pool.read_bytes() == before


def test_the_python_engine_has_no_transports(pools: PoolMaker) -> None:
    words = ("--engine", "python", "--transport", "uring")
    refused(pmemfs("mount", pools.create(size="16M"), pools.mountpoint(), *words), 2, "transport")


@pytest.mark.parametrize(
    ("words", "contradiction"),
    [
        (("--engine", "python", "-o", "ro,engine=native"), "--engine python and -o engine=native"),
        (("-o", "transport=uring", "--transport", "fd"), "--transport fd and -o transport=uring"),
    ],
)
def test_an_engine_is_not_asked_for_in_two_ways_that_differ(
    pools: PoolMaker, words: tuple[str, ...], contradiction: str
) -> None:
    mountpoint = pools.mountpoint()
    result = pmemfs("mount", pools.create(size="16M"), mountpoint, *words)
    refused(result, 2, f"{contradiction} contradict each other")
    assert mounts_at(mountpoint) == 0


def test_the_exit_codes_of_mount_are_those_that_its_help_names(pools: PoolMaker) -> None:
    said = pmemfs_ok("mount", "--help")
    assert "2 bad usage, 32 anything else" in " ".join(said.split())
    refused(pmemfs("mount", pools.directory / "none", pools.mountpoint()), 32)
    assert pmemfs("mount", pools.directory / "none", "-o", "nonsense").code == 2


def test_an_engine_may_be_asked_for_twice(pools: PoolMaker) -> None:
    words = ("--engine", "python", "-o", "engine=python")
    pmemfs_ok("mount", pools.create(size="16M"), pools.mountpoint(), *words)


@pytest.mark.parametrize("words", [("--force",), ("--repair", "--dry-run"), ("-n", "--force")])
def test_a_check_that_contradicts_itself_is_bad_usage(
    pools: PoolMaker, words: tuple[str, ...]
) -> None:
    refused(pmemfs("check", pools.create(size="16M"), *words), 2, "--repair")


@pytest.mark.parametrize("words", [("mount",), ("mount", "x"), ("mount", "x", "y", "--engine=no")])
def test_a_bad_command_line_is_bad_usage(words: tuple[str, ...]) -> None:
    refused(pmemfs(*words), 2)


def test_an_empty_path_is_refused_and_is_not_the_current_directory(
    pools: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    monkeypatch.chdir(mounted.mountpoint)
    refused(pmemfs("mount", "", pools.mountpoint("other")), 32, "''", "empty")
    for command in ("info", "pages", "stat", "trim", "resize"):
        refused(pmemfs(command, ""), 1, "''")
    for command, code in (("umount", 32), ("check", 8), ("extents", 1), ("create", 1)):
        refused(pmemfs(command, ""), code, "''")
    assert mounts_at(mounted.mountpoint) == 1


@pytest.mark.parametrize("command", ["umount", "info", "pages"])
def test_commands_about_a_mount_refuse_what_is_none(pools: PoolMaker, command: str) -> None:
    code = {"umount": 32, "info": 1, "pages": 1}[command]
    refused(pmemfs(command, pools.directory / "missing"), code, "no such")
    code = {"umount": 32, "info": 1, "pages": 1}[command]
    refused(pmemfs(command, pools.mountpoint()), code)
