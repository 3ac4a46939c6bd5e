"""What is released: the sdist, the wheel that it alone builds, and an environment with nothing but
the wheel, from which pmemfs mounts."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Mounted, PoolMaker, Session
from kit.packages import (
    LEFT_OVER,
    ROOT,
    copied_checkout,
    environment_with,
    sdist_of,
    unpacked,
    wheel_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MADE_BY_THE_BUILD = ("PKG-INFO", "setup.cfg", "pmemfs.egg-info/")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a checkout that somebody works in, unpacked elsewhere."""
    directory = tmp_path_factory.mktemp("sdist")
    checkout = copied_checkout(directory / "checkout")
    for name in LEFT_OVER:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    return unpacked(sdist_of(checkout, directory), directory / "unpacked")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist builds."""
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has nothing but the wheel."""
    return environment_with(wheel, tmp_path_factory.mktemp("environment") / "venv")


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_the_sdist_has_the_whole_checkout_and_nothing_that_was_left_there(source: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("only git knows what belongs to a checkout")
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    wanted = {name for name in known.split("\0") if name and (ROOT / name).exists()}
    found = {name for name in files_below(source) if not name.startswith(MADE_BY_THE_BUILD)}
    assert found == wanted
    assert (source / "scripts/setup").stat().st_mode & 0o111


def test_the_wheel_carries_the_manual_the_completions_and_the_unit(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {name.partition(".data/data/")[2] for name in names if ".data/data/" in name}
    pages = {f"share/man/man8/{page.name}" for page in (ROOT / "share/man/man8").iterdir()}
    assert data == pages | {
        "lib/systemd/system/pmemfs@.service",
        "share/bash-completion/completions/pmemfs",
        "share/fish/vendor_completions.d/pmemfs.fish",
        "share/zsh/site-functions/_pmemfs",
    }
    # Who installs it needs no source of what is built, and no tests.
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".pxi", ".h", ".c"))]
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "daemons/"))]


def test_a_fresh_environment_says_what_it_is(fresh: Path) -> None:
    assert run_command(fresh / "pmemfs", "--version").out.startswith("pmemfs ")
    for name in ("lib/systemd/system/pmemfs@.service", "share/man/man8/mount.pmemfs.8"):
        assert (fresh.parent / name).is_file()


@pytest.mark.mount
@pytest.mark.parametrize("mode", ["block", "fs"])
@pytest.mark.usefixtures("engine")
def test_a_fresh_environment_makes_a_pool_and_serves_it(
    fresh: Path, pools: PoolMaker, mode: str, tmp_path: Path
) -> None:
    program, mountpoint = fresh / "pmemfs", pools.mountpoint()
    mounted = Mounted(pools.directory / "pmem0", mountpoint)

    def ok(*words: object) -> None:
        done = run_command(*words)
        assert done.code == 0, done.err
        assert done.err == ""

    def copy(source: Path, target: Path) -> tuple[str, ...]:
        return ("dd", f"if={source}", f"of={target}", "bs=1M", "count=16", "status=none")

    content, read_back = tmp_path / "content", tmp_path / "read-back"
    ok(*copy(Path("/dev/urandom"), content))
    ok(program, "create", mounted.pool, "--size", "64M", "--mode", mode)
    ok(program, "mount", mounted.pool, mountpoint, *pools.engine.options)
    session = Session.of(mounted)
    assert str(fresh) in Path(f"/proc/{session.pid}/cmdline").read_text()
    file = mounted.device if mode == "block" else mountpoint / "file"
    ok(*copy(content, file), "oflag=direct", "conv=notrunc")
    ok(*copy(file, read_back), "iflag=direct")
    assert read_back.read_bytes() == content.read_bytes()
    ok(program, "umount", mountpoint)
    session.assert_ended()
    ok(program, "check", mounted.pool)


@pytest.mark.mount
def test_mount_pmemfs_of_a_fresh_environment_mounts_a_line_of_fstab(
    fresh: Path, pools: PoolMaker
) -> None:
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    # As mount(8) calls it.
    words = (mounted.pool, mounted.mountpoint, "-n", "-o", "rw,mode=640")
    done = run_command(fresh / "mount.pmemfs", *words)
    assert done.code == 0, done.err
    assert mounted.device.stat().st_mode & 0o777 == 0o640
    pools.umount(mounted)
