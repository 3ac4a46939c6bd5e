"""Programs that people use, on a mount of mode `fs`, as they use them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import Result, run_command
from kit.ext4 import assert_sound
from kit.fs_mounts import FsMount
from kit.mounts import PoolMaker
from kit.processes import wait_until
from kit.sources import loop_device

pytestmark = [pytest.mark.mount, pytest.mark.slow]

TREE = Path("/usr/share/doc")
POSTGRES = Path("/usr/lib/postgresql")


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where a program isn't installed."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def mount(pools: PoolMaker) -> Iterator[FsMount]:
    """A mount with some room; in the end the file system is whole."""
    with FsMount.made(pools, size="768M") as it:
        yield it
        it.check()


@pytest.fixture
def directory(mount: FsMount) -> Path:
    """Where the files are."""
    return mount.directory


def ok(*words: object, cwd: Path | None = None, timeout: float = 200, **env: str) -> str:
    """Run a program that must succeed; its output."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def small_tree(directory: Path) -> Path:
    """A tree with everything that archivers keep: links, times, modes, holes, odd names."""
    top = directory / "tree"
    (top / "inner" / "empty").mkdir(parents=True)
    for number in range(300):
        (top / "inner" / f"file {number}").write_bytes(b"%d\n" % number * (number * 7))
    os.link(top / "inner" / "file 1", top / "hard")
    os.symlink("inner/file 2", top / "soft")
    os.symlink("nowhere", top / "dangling")
    os.mkfifo(top / "fifo", 0o640)
    with (top / "holes").open("wb") as file:
        for place in (0, 1 << 20, 5 << 20):
            file.seek(place)
            file.write(b"data" * 3000)
        file.truncate(7 << 20)
    os.setxattr(top / "hard", "user.note", b"an attribute")
    os.setxattr(top / "inner", "user.note", b"a directory's")
    os.chmod(top / "inner" / "file 3", 0o4751)
    os.chown(top / "inner" / "file 4", 1000, 1001)
    os.utime(top / "inner" / "file 5", ns=(10**18 + 1, 10**18 + 123_456_789))
    (top / os.fsdecode(b"\xff\xfe")).touch()
    os.utime(top / "inner", ns=(10**18, 10**18 + 7))
    return top


def described(top: Path) -> dict[str, object]:
    """What an archiver must keep of a tree."""
    seen = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else None
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes().hex() if status.st_size < 10_000 else status.st_size
        seen[str(path.relative_to(top))] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, content,
            status.st_nlink if not path.is_dir() else None,
            [(name, os.getxattr(path, name, follow_symlinks=False))
             for name in sorted(os.listxattr(path, follow_symlinks=False))],
        )  # fmt: skip
    return seen


def test_cp_of_a_large_tree_is_the_same_tree(directory: Path, tmp_path: Path) -> None:
    # A third is thousands of files, too, of every kind there is.
    top = tmp_path / "tree"
    top.mkdir()
    ok("cp", "-a", *sorted(TREE.iterdir())[::3], top)
    ok("cp", "-a", top, directory / "copy")
    assert ok("diff", "-r", "--no-dereference", top, directory / "copy") == ""
    ok("cp", "-a", directory / "copy", directory / "second")
    ok("rm", "-r", directory / "copy")
    assert ok("diff", "-r", "--no-dereference", top, directory / "second") == ""
    for path in top.rglob("*"):
        there = (directory / "second" / path.relative_to(top)).lstat()
        status = path.lstat()
        assert (there.st_mode, there.st_mtime_ns) == (status.st_mode, status.st_mtime_ns), path


def test_cp_keeps_all_that_a_file_can_have(directory: Path, tmp_path: Path) -> None:
    top = small_tree(directory)
    ok("cp", "-a", top, directory / "copy")
    assert described(directory / "copy") == described(top)
    ok("cp", "-a", top, tmp_path / "out")
    assert described(tmp_path / "out") == described(top)


def test_tar_takes_a_tree_away_and_brings_it_back(directory: Path) -> None:
    top = small_tree(directory)
    archive = directory / "it.tar"
    ok("tar", "--xattrs", "--sparse", "-cf", archive, "-C", directory, "tree")
    (directory / "back").mkdir()
    ok("tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", directory / "back")
    assert described(directory / "back" / "tree") == described(top)
    assert archive.stat().st_size < 6 << 20, "the holes were not archived"


@needs("rsync")
def test_rsync_copies_everything_once(directory: Path) -> None:
    top = small_tree(directory)
    # Without it, two times in the same second are the same to rsync.
    options = ("-aHAX", "--itemize-changes", "--modify-window=-1")
    ok("rsync", *options, f"{top}/", directory / "copy")
    assert described(directory / "copy") == described(top)
    assert ok("rsync", *options, f"{top}/", directory / "copy") == ""
    ok("rsync", *options, "--sparse", "--delete", f"{top}/inner/", directory / "copy")
    assert set(described(directory / "copy")) == set(described(top / "inner"))


@needs("setfacl", "getfacl")
def test_access_control_lists_decide_who_may(directory: Path) -> None:
    file, inner = directory / "file", directory / "inner"
    file.write_text("text")
    file.chmod(0o600)
    inner.mkdir()
    ok("setfacl", "-m", "u:nobody:r", file)
    assert "user:nobody:r--" in ok("getfacl", "-p", file)
    assert as_nobody("cat", file).out == "text"
    assert as_nobody("sh", "-c", f"echo >> {file}").code != 0
    ok("setfacl", "-d", "-m", "u:nobody:rwx,o::-", inner)
    (inner / "made").touch()
    listed = ok("getfacl", "-p", inner / "made")
    assert "user:nobody:rwx" in listed
    assert "other::---" in listed
    assert as_nobody("cat", inner / "made").code == 0
    ok("setfacl", "-b", file)
    assert as_nobody("cat", file).code != 0


def as_nobody(*words: object) -> Result:
    """Run a program as a user who owns nothing."""
    who = ("setpriv", "--reuid", 65534, "--regid", 65534, "--clear-groups", "--")
    return run_command(*who, *words)


@needs("git")
def test_git_keeps_its_history(mount: FsMount) -> None:
    directory = mount.directory
    who = ("-c", "user.name=A", "-c", "user.email=a@b.invalid", "-c", "safe.directory=*")
    first = directory / "first"
    ok("git", "init", "-q", first)
    for number in range(5):
        for place in range(80):
            path = first / f"{place % 9}" / f"{place}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number * place}\n" * 200)
        ok("git", *who, "-C", first, "add", ".")
        ok("git", *who, "-C", first, "commit", "-qm", f"commit {number}")
    ok("git", *who, "clone", "-q", first, directory / "linked")
    ok("git", *who, "clone", "-q", "--no-local", first, directory / "packed")
    mount.remount()
    for clone in ("first", "linked", "packed"):
        repository = directory / clone
        ok("git", *who, "-C", repository, "fsck", "--full", "--strict")
        ok("git", *who, "-C", repository, "gc", "-q", "--prune=now")
        ok("git", *who, "-C", repository, "fsck", "--full", "--strict")
        assert ok("git", *who, "-C", repository, "status", "--porcelain") == ""
        assert len(ok("git", *who, "-C", repository, "log", "--oneline").splitlines()) == 5


@needs("gcc", "make")
def test_make_builds_and_then_builds_only_what_changed(directory: Path) -> None:
    numbers = range(12)
    for number in numbers:
        (directory / f"part{number}.c").write_text(
            f'#include "parts.h"\nint part{number}(void) {{ return {number}; }}\n'
        )
    declarations = "".join(f"int part{number}(void);\n" for number in numbers)
    (directory / "parts.h").write_text(declarations)
    total = " + ".join(f"part{number}()" for number in numbers)
    (directory / "main.c").write_text(
        f'#include <stdio.h>\n#include "parts.h"\nint main(void) {{ printf("%d\\n", {total}); }}\n'
    )
    objects = " ".join(["main.o", *(f"part{number}.o" for number in numbers)])
    (directory / "Makefile").write_text(
        f"program: {objects}\n\tgcc -o $@ $^\n{objects}: %.o: %.c parts.h\n\tgcc -c -o $@ $<\n"
    )
    ok("make", "-j2", cwd=directory)
    assert ok(directory / "program") == "66\n"
    assert "up to date" in ok("make", "-j2", cwd=directory)
    (directory / "part5.c").write_text("int part5(void) { return 1005; }\n")
    rebuilt = ok("make", "-j2", cwd=directory)
    assert rebuilt.count("gcc -c") == 1
    assert ok(directory / "program") == "1066\n"
    ok("touch", directory / "parts.h")
    assert ok("make", "-j2", cwd=directory).count("gcc -c") == 13


def wheel(directory: Path) -> Path:
    """A wheel of one module and one command."""
    path = directory / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("sample/__init__.py", "def main():\n    print('it runs')\n")
        about = "sample-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\n"
                      "Root-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        file.writestr(f"{about}/entry_points.txt", "[console_scripts]\nsample = sample:main\n")
        names = [*file.namelist(), f"{about}/RECORD"]
        file.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def test_pip_installs_into_a_virtual_environment(mount: FsMount, tmp_path: Path) -> None:
    home = mount.directory / "venv"
    ok(sys.executable, "-m", "venv", home)
    ok(home / "bin" / "pip", "install", "--no-index", "--no-deps", wheel(tmp_path))
    assert ok(home / "bin" / "sample") == "it runs\n"
    mount.remount()
    assert ok(home / "bin" / "sample") == "it runs\n"
    ok(home / "bin" / "pip", "uninstall", "-y", "sample")
    assert not (home / "bin" / "sample").exists()


WRITER = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1])
base.execute("PRAGMA journal_mode=WAL")
base.execute("PRAGMA synchronous=FULL")
base.execute("CREATE TABLE IF NOT EXISTS t (number INTEGER PRIMARY KEY, data BLOB)")
number = base.execute("SELECT coalesce(max(number), 0) FROM t").fetchone()[0]
while True:
    number += 1
    base.execute("INSERT INTO t VALUES (?, randomblob(?))", (number, number * 13 % 5000))
    if number % 50 == 0:
        base.execute("DELETE FROM t WHERE number % 7 = 0")
    base.commit()
    print(number, flush=True)
"""


def test_sqlite_has_every_transaction_that_was_committed_before_kill_9(mount: FsMount) -> None:
    base = mount.directory / "base.sqlite"
    for kill in ("kill daemon", "kill data plane", "kill daemon"):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(base)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(300)]
            mount.restart(kill)
            writer.kill()
            lines += writer.stdout.read().split()
        connection = sqlite3.connect(base)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            largest = connection.execute("SELECT max(number) FROM t").fetchone()[0]
            wanted = max(number for number in map(int, filter(str.strip, lines)) if number % 7)
            assert largest >= wanted
        finally:
            connection.close()


def test_a_file_system_in_a_file_survives_its_own_check(directory: Path, tmp_path: Path) -> None:
    image = directory / "image"
    image.touch()
    os.truncate(image, 200 << 20)
    ok("mkfs.ext4", "-q", image)
    inside = tmp_path / "inside"
    inside.mkdir()
    with loop_device(image) as device:
        ok("mount", device, inside)
        for path in sorted(TREE.iterdir())[:200]:
            ok("cp", "-a", path, inside)
        ok("umount", inside)
        assert_sound(device)
        ok("mount", device, inside)
        for path in sorted(TREE.iterdir())[:200]:
            ok("diff", "-r", "--no-dereference", path, inside / path.name)
        ok("rm", "-rf", *inside.iterdir())
        ok("fstrim", inside)
        ok("umount", inside)
        assert_sound(device)
    ok("e2fsck", "-fn", image)


def postgres_programs() -> Path | None:
    """Where the newest server's programs are."""
    found = sorted(POSTGRES.glob("*/bin/initdb"))
    return found[-1].parent if found and shutil.which("pgbench") else None


@pytest.mark.skipif(postgres_programs() is None, reason="not installed: postgresql")
@pytest.mark.timeout(600)
def test_postgres_keeps_its_accounts_balanced_over_kill_9(mount: FsMount, tmp_path: Path) -> None:
    server = Postgres(mount, tmp_path)
    server.make()
    server.start()
    server.client("pgbench", "-i", "-q", "-s", "1")
    for kill in ("kill daemon", "kill data plane"):
        made = server.count("pgbench_history")
        bench = subprocess.Popen(
            server.as_user(
                "pgbench", "-n", "-h", server.sockets, "-c", "2", "-T", "30", "postgres"
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(
                lambda made=made: server.count("pgbench_history") > made + 200,  # type: ignore[misc]
                "transactions are made",
            )
            before = server.count("pgbench_history")
            mount.restart(kill)
        finally:
            bench.kill()
            bench.wait()
            server.crash()
        server.start()
        assert server.count("pgbench_history") >= before
        sums = [
            server.value(f"select coalesce(sum({column}), 0) from pgbench_{table}")
            for table, column in [("accounts", "abalance"), ("tellers", "tbalance"),
                                  ("branches", "bbalance"), ("history", "delta")]
        ]  # fmt: skip
        assert len(set(sums)) == 1, sums
        server.client("pg_amcheck", "--install-missing", "--heapallindexed")
    server.stop()


class Postgres:
    """A server whose data is on the mount and whose socket is not."""

    def __init__(self, mount: FsMount, tmp_path: Path) -> None:
        programs = postgres_programs()
        assert programs is not None
        self.programs = programs
        self.data = mount.directory / "data"
        self.sockets = mount.mounted.pool.parent / "sockets"
        self.log = tmp_path / "log"
        self.user = pwd.getpwnam("postgres")
        self.pid = 0

    def as_user(self, program: str, *words: object) -> list[str]:
        ids = (self.user.pw_uid, self.user.pw_gid)
        who = ["setpriv", "--reuid", ids[0], "--regid", ids[1], "--clear-groups", "--"]
        path = self.programs / program
        return [str(word) for word in (*who, path if path.exists() else program, *words)]

    def run(self, program: str, *words: object) -> str:
        return ok(*self.as_user(program, *words), cwd=Path("/"))

    def client(self, program: str, *words: object) -> str:
        return self.run(program, "-h", self.sockets, *words, "postgres")

    def make(self) -> None:
        for path in (self.data, self.sockets):
            path.mkdir()
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        self.run("initdb", "-D", self.data, "-A", "trust", "-E", "UTF8", "--locale", "C")

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.sockets}"
        log = self.sockets / "log"
        log.write_bytes(b"")
        os.chown(log, self.user.pw_uid, self.user.pw_gid)
        try:
            self.run("pg_ctl", "-D", self.data, "-w", "-t", "60", "-l", log, "-o", options, "start")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from None
        self.pid = int((self.data / "postmaster.pid").read_text().split()[0])
        assert self.has_processes()

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")
        shutil.rmtree(self.sockets)

    def crash(self) -> None:
        """End what is left of a server whose disk went away."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGQUIT)
        # A server that nobody has waited for yet still holds its lock in the eyes of the next.
        wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), "it has ended")
        # What is left of its processes has its shared memory, and no server starts beside that.
        wait_until(lambda: not self.has_processes(), "so have its processes")

    def has_processes(self) -> bool:
        """Whether there are processes of it: all of them work in the directory of its data."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                # " (deleted)" may stand behind it where the mount has died.
                if os.readlink(entry / "cwd").startswith(str(self.data)):
                    return True
        return False

    def value(self, query: str) -> int:
        return int(self.client("psql", "-qAt", "-c", query, "-d"))

    def count(self, table: str) -> int:
        return self.value(f"select count(*) from {table}")
