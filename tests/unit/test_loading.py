"""What a mount has to load before it answers, counted: modules, since no time is the same twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import click
import pytest

from kit.commands import pmemfs_ok, run_command
from pmemfs.cli.catalogue import COMMANDS, help_text
from pmemfs.cli.commands import pmemfs as program
from pmemfs.mount.processes import bare_python_words

LOADED = "import {module}, sys; print(*sorted(sys.modules))"

HEAVY = {"numpy", "trio", "rich", "pyfuse3", "ssl", "asyncio"}
"""Each takes about as long to load as Python itself takes to start, or longer."""


def loaded_by(module: str) -> set[str]:
    """All that a process has loaded that has just loaded a module."""
    result = run_command(sys.executable, "-P", "-c", LOADED.format(module=module))
    assert result.code == 0, result.err
    return set(result.out.split())


@pytest.mark.parametrize("command", ["mount", "umount", "info", "create", "list"])
def test_a_command_loads_nothing_heavy_before_it_begins(command: str) -> None:
    assert not loaded_by(f"pmemfs.cli.{command}") & HEAVY


RAN = """
import atexit, sys
atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))
from pmemfs.cli.main import main
sys.argv[0] = "pmemfs"
main()
"""


def loaded_by_running(*words: object, **environment: str) -> set[str]:
    """All that the program has loaded by the end of a command that went well."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", RAN, *map(str, words)],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["-V"]], ids=str)
def test_help_and_version_load_no_command_and_nothing_that_parses_words(words: list[str]) -> None:
    loaded = loaded_by_running(*words)
    assert not loaded & {*HEAVY, "click", "json", "inspect", "dataclasses"}
    assert not {f"pmemfs.cli.{name}" for name in COMMANDS} & loaded


def test_a_list_and_facts_of_a_pool_are_shown_without_anything_heavy(shm: Path) -> None:
    pool = shm / "pmem0"
    pmemfs_ok("create", pool, "--size", "16M")
    for words in (["list"], ["list", "--json"], ["info", pool], ["info", pool, "--json"],
                  ["create", "--help"], ["mount", "--help"], ["doctor"]):  # fmt: skip
        assert not loaded_by_running(*words) & HEAVY, words


@pytest.mark.parametrize("command", ["list", "info"])
def test_who_asks_daemons_loads_nothing_that_reads_or_makes_a_pool(command: str) -> None:
    loaded = loaded_by(f"pmemfs.cli.{command}")
    assert not loaded & {"secrets", "hashlib", "tempfile", "shutil", "logging", "ctypes"}
    parts = ("pmemfs.pool", "pmemfs.media.label", "pmemfs.medium")
    assert not [name for name in loaded if name.startswith(parts)]


def loaded_without_site(*modules: str) -> set[str]:
    """As `loaded_by`, without what packages of the environment have loaded at the start."""
    path = f"{Path(__file__).parents[2]}:{sysconfig.get_path('platlib')}"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", LOADED.format(module=", ".join(modules))],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["list", "info"])
def test_who_asks_nobody_loads_nothing_that_asks(command: str) -> None:
    loaded = loaded_without_site(f"pmemfs.cli.{command}")
    assert not loaded & {"json", "socket", "selectors", "pathlib", "subprocess", "resource"}
    assert not loaded & {"pmemfs.control.client", "pmemfs.mount.processes"}


def test_what_list_and_info_show_is_made_of_no_dataclass_and_no_path() -> None:
    # click loads `inspect`, which is most of what dataclasses load, but they also compile code.
    loaded = loaded_without_site(
        "pmemfs.cli.list", "pmemfs.cli.info", "pmemfs.control.client", "pmemfs.observe.answers",
        "pmemfs.observe.pool",
    )  # fmt: skip
    assert not loaded & {"dataclasses", "pathlib", "subprocess"}


def test_what_a_command_is_for_is_said_in_its_own_words() -> None:
    for name, (_, summary) in COMMANDS.items():
        command = program.get_command(click.Context(program), name)
        assert command is not None
        assert command.get_short_help_str(1000) == summary


def test_the_help_fits_a_terminal() -> None:
    assert max(map(len, help_text().splitlines())) < 80


def test_mounting_loads_nothing_that_asks_a_daemon_or_reads_its_answers() -> None:
    loaded = loaded_by("pmemfs.cli.mount")
    assert not [name for name in loaded if name.startswith(("pmemfs.observe", "pmemfs.volume"))]
    assert "pmemfs.control.client" not in loaded


def test_the_process_of_a_data_plane_loads_next_to_nothing() -> None:
    words = bare_python_words("pmemfs.daemons.planed")
    # It has no descriptors, and so it ends at once.
    done = run_command(words[0], "-X", "importtime", *words[1:], *NO_DESCRIPTORS)
    assert done.code == errno.EBADF, done
    loaded = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    ours = {name for name in loaded if name.startswith("pmemfs")}
    assert ours == {"pmemfs", "pmemfs.version", "pmemfs.dataplane", "pmemfs.dataplane.native"}
    assert not loaded & {
        *HEAVY,
        "site",
        "re",
        "json",
        "enum",
        "dataclasses",
        "typing",
        "subprocess",
    }


NO_DESCRIPTORS = [
    *(f"{name}_fd=-1" for name in ("fuse", "shared", "pool", "notices")), "forward_fds=-1",
    *(f"{name}=1" for name in ("map_flags", "max_write", "queue_count", "depth", "reader_count")),
]  # fmt: skip


def test_what_is_loaded_once_for_a_command_and_its_daemon_is_needed_by_both() -> None:
    shared = loaded_by("pmemfs.control.prepared") - {"pmemfs.control.prepared"}
    assert "pmemfs.errors" in shared
    for module in ("pmemfs.cli.mount", "pmemfs.daemons.mountd"):
        assert shared <= loaded_by(module)


def test_a_daemon_loads_no_numpy_and_nothing_that_only_answers_questions() -> None:
    loaded = loaded_by("pmemfs.daemons.mountd")
    assert "numpy" not in loaded, "what counts pages in Python is the python engine's"
    assert not [name for name in loaded if name.startswith(("pmemfs.observe", "pmemfs.cli"))]


WRITTEN = """
import sys
written = []
def hook(event, details):
    if event == "compile" and details[1] == "<string>":
        written.append(details[0])
import trio
sys.addaudithook(hook)
import pmemfs.daemons.mountd
print(len(written))
"""


def test_a_daemon_writes_and_compiles_little_code_while_it_loads() -> None:
    # Each dataclass is six functions, each named tuple one.
    result = run_command(sys.executable, "-P", "-c", WRITTEN)
    assert result.code == 0, result.err
    assert 0 < int(result.out) <= 377


def test_what_a_program_imports_loads_nothing_before_it_is_used() -> None:
    ours = {name for name in loaded_without_site("pmemfs") if name.startswith("pmemfs")}
    assert ours == {"pmemfs", "pmemfs.version"}
    used = loaded_by("pmemfs, pmemfs; pmemfs.StillInUse, pmemfs.DaemonGone; import json")
    assert not used & HEAVY, "who catches an exception has no array yet"
    used = loaded_by("pmemfs, pmemfs; pmemfs.connect; import json")
    assert "numpy" in used
    assert not used & HEAVY - {"numpy"}


def test_what_is_imported_is_what_is_promised() -> None:
    import pmemfs

    for name in pmemfs.__all__:
        assert getattr(pmemfs, name) is not None
    assert dir(pmemfs) == sorted(pmemfs.__all__), "and nothing of what was loaded for it"
    with pytest.raises(AttributeError, match="nothing"):
        pmemfs.nothing  # noqa: B018
