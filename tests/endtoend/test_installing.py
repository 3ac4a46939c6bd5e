"""What is released, and what scripts/install makes of it.

The sdist alone builds the wheel; an environment with nothing but the wheel mounts; scripts/install
puts it into a place of its own, for all users, and takes it away again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import refused, run_command
from kit.machine import HOME, PROGRAM, SYSTEM, Machine
from kit.mounts import Mounted, PoolMaker, Session, pool_maker
from kit.namespaces import mount_namespace
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


@pytest.fixture
def broken_wheel(wheel: Path, tmp_path: Path) -> Path:
    """A file that only its name makes a wheel."""
    path = tmp_path / "broken" / wheel.name
    path.parent.mkdir()
    path.write_bytes(b"no wheel")
    return path


@pytest.fixture(scope="module")
def one_machine() -> Iterator[Machine]:
    """One for all tests: to make it takes longer than most of them."""
    if os.geteuid() != 0:
        pytest.skip("only root installs")
    if HOME.exists():
        pytest.skip("pmemfs is installed on this machine")
    with pool_maker() as pools, mount_namespace(pools, shows_our_python=False) as run:
        yield Machine(pools, run)


@pytest.fixture
def newer_wheel(wheel: Path, tmp_path: Path) -> Path:
    """The same as a newer version, which says so."""
    path = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename == "pmemfs/version.py":
                content = content.replace(b'VERSION = "', b'VERSION = "9.')
            new.writestr(item, content)
    return path


@pytest.fixture
def machine(one_machine: Machine) -> Iterator[Machine]:
    """Each test begins and ends with a machine on which nothing is installed."""
    machine = one_machine
    assert machine.changed() == set()
    yield machine
    # After a test that failed.
    for mountpoint in (*machine.pools.mountpoints, machine.pools.directory / "home/mnt"):
        machine.run("umount", "--quiet", "--lazy", mountpoint)
    machine.install("--remove")


@pytest.mark.mount
def test_the_checkout_installs_for_all_users_even_from_where_they_may_not_look(
    machine: Machine,
) -> None:
    before = {path.relative_to(machine.checkout) for path in machine.checkout.rglob("*")}
    # What it made in earlier times: links into a checkout.
    old_unit = "/etc/systemd/system/pmemfs@.service"
    for target, link in (("scripts/installed", PROGRAM), ("daemons/pmemfs@.service", old_unit)):
        machine.run("mkdir", "-p", Path(link).parent)
        machine.run("ln", "-s", f"/somewhere/{target}", link)
    said = machine.installed()
    assert "done: pmemfs" in said
    assert {path.relative_to(machine.checkout) for path in machine.checkout.rglob("*")} == before
    assert machine.run("test", "-L", old_unit).code == 1
    # Nothing of it needs the checkout, and every link leads somewhere.
    shutil.move(machine.checkout, machine.checkout.with_suffix(".away"))
    try:
        links = {name for name in machine.changed() if not name.startswith("opt/")}
        assert {"sbin/mount.pmemfs", "sbin/mount.fuse.pmemfs", "local/bin/pmemfs",
                "local/lib/systemd/system/pmemfs@.service", "local/share/man/man8/pmemfs.8",
                "local/share/zsh/site-functions/_pmemfs", "etc/fish/completions/pmemfs.fish",
                "local/share/bash-completion/completions/pmemfs"} <= links  # fmt: skip
        for name in links:
            directory = next(path for path in SYSTEM if path.name == name.partition("/")[0])
            path = directory / name.partition("/")[2]
            assert machine.user("test", "-r", path).code == 0, path
        _a_user_mounts(machine)
        _root_mounts_by_type(machine)
    finally:
        shutil.move(machine.checkout.with_suffix(".away"), machine.checkout)
    # A second time there is nothing to build.
    assert "is there already" in machine.installed()
    # All of it goes, and each thing is named.
    said = machine.installed("--remove")
    assert machine.changed() == set()
    for name in ("/usr/local/bin/pmemfs", "/sbin/mount.pmemfs", "/opt/pmemfs"):
        assert f"removed {name}\n" in said
    assert "nothing is installed" in machine.installed("--remove")


def _a_user_mounts(machine: Machine) -> None:
    home = machine.pools.directory / "home"
    pool, mountpoint = home / "pool", home / "mnt"
    content = "hello" * 1000
    for words in (
        (PROGRAM, "create", pool, "--size", "16M", "--mode", "fs"),
        ("mkdir", mountpoint),
        (PROGRAM, "mount", pool, mountpoint),
        ("sh", "-c", f"echo {content} >{mountpoint}/file && grep -q {content} {mountpoint}/file"),
        (PROGRAM, "umount", mountpoint),
        (PROGRAM, "check", pool),
        ("man", "-w", "pmemfs-create"),
    ):
        done = machine.user(*words)
        assert (done.code, done.err) == (0, ""), words


def _root_mounts_by_type(machine: Machine) -> None:
    mountpoint = machine.pools.mountpoint("of-root")
    pool = machine.pools.create(size="16M")
    for kind in ("pmemfs", "fuse.pmemfs"):
        for words in (
            ("mount", "-t", kind, pool, mountpoint),
            ("dd", "if=/dev/zero", f"of={mountpoint}/{pool.name}", "bs=1M", "count=1",
             "oflag=direct", "status=none", "conv=notrunc"),
            ("umount", mountpoint),
        ):  # fmt: skip
            done = machine.run(*words)
            assert (done.code, done.err) == (0, ""), words


@pytest.mark.mount
def test_mounts_go_on_while_a_newer_version_takes_the_place(
    machine: Machine, wheel: Path, newer_wheel: Path, broken_wheel: Path
) -> None:
    machine.installed("--wheel", wheel)
    (old,) = machine.versions()
    pool, mountpoint = machine.pools.create("old", "16M"), machine.pools.mountpoint("of-old")
    assert machine.run(PROGRAM, "mount", pool, mountpoint).code == 0
    said = machine.installed("--wheel", newer_wheel)
    assert f"kept /opt/pmemfs/{old}, which processes run" in said
    assert len(machine.versions()) == 2
    # A command of the newer version and the daemon of the older one.
    assert machine.run(PROGRAM, "--version").out.startswith("pmemfs 9.")
    for words in (
        (PROGRAM, "info", mountpoint),
        (PROGRAM, "pages", mountpoint),
        ("dd", "if=/dev/zero", f"of={mountpoint}/{pool.name}", "bs=1M", "count=1",
         "oflag=direct", "status=none", "conv=notrunc"),
    ):  # fmt: skip
        done = machine.run(*words)
        assert done.code == 0, done.err
    _fails(machine, broken_wheel)
    # Nothing is taken away from who uses it.
    refused(machine.install("--remove"), 1, "processes run it", "pmemfs list")
    assert machine.run(PROGRAM, "umount", mountpoint).code == 0
    assert machine.run(PROGRAM, "check", pool).code == 0
    assert f"removed /opt/pmemfs/{old}" in machine.installed("--wheel", newer_wheel)
    assert len(machine.versions()) == 1
    machine.installed("--remove")
    assert machine.changed() == set()


@pytest.mark.mount
def test_what_somebody_else_has_put_there_stays(machine: Machine, wheel: Path) -> None:
    for path in (PROGRAM, HOME / "something"):
        machine.run("mkdir", "-p", path.parent)
        machine.run("cp", "/etc/hostname", path)
        before = machine.changed()
        in_the_way = PROGRAM if path == PROGRAM else HOME
        refused(machine.install("--wheel", wheel), 1, "in the way", f" {in_the_way};")
        machine.installed("--remove")
        assert machine.changed() == before
        machine.run("rm", "-r", path if path == PROGRAM else HOME)


@pytest.mark.mount
def test_a_link_into_the_checkout_of_another_project_stays(machine: Machine) -> None:
    machine.run("ln", "-s", "/srv/other/scripts/installed", PROGRAM.parent / "other")
    before = machine.changed()
    machine.installed("--remove")
    assert machine.changed() == before
    machine.run("rm", PROGRAM.parent / "other")


@pytest.mark.mount
def test_what_an_interrupt_left_at_the_very_beginning_is_in_nobodys_way(machine: Machine) -> None:
    machine.run("mkdir", HOME)
    assert f"removed {HOME}" in machine.installed("--remove")
    assert machine.run("test", "-e", HOME).code == 1


@pytest.mark.mount
def test_one_ends_before_another_one_removes(machine: Machine) -> None:
    said: list[str] = []
    with lock_of_install():
        removing = threading.Thread(target=lambda: said.append(machine.installed("--remove")))
        removing.start()
        # As long as it takes without a lock.
        removing.join(2)
        assert said == []
    removing.join(60)
    assert "nothing is installed" in said[0]


@contextmanager
def lock_of_install() -> Iterator[None]:
    """Be a scripts/install that has not ended."""
    fd = os.open("/", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@pytest.mark.mount
def test_a_first_installation_that_fails_leaves_nothing(
    machine: Machine, broken_wheel: Path
) -> None:
    _fails(machine, broken_wheel)
    assert machine.changed() == set()


def _fails(machine: Machine, broken_wheel: Path) -> None:
    before = machine.changed()
    done = machine.install("--wheel", broken_wheel)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "install: the installation failed; nothing was changed"
    assert machine.changed() == before


@pytest.mark.mount
def test_bad_words_and_other_users_are_refused_with_a_sentence(machine: Machine) -> None:
    refused(machine.install("--nonsense"), 2, "unknown argument: --nonsense")
    refused(machine.install("--wheel", "missing"), 2, "--wheel needs the file of a wheel")
    public = machine.pools.directory / "home/scripts"
    shutil.copytree(machine.checkout / "scripts", public)
    refused(machine.user(public / "install"), 1, "only root", "sudo ./scripts/install")
    shutil.rmtree(public)
    assert machine.changed() == set()
