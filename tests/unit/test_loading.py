"""What a mount has to load before it answers, counted: modules, since no time is the same twice."""

from __future__ import annotations

import errno
import sys

import pytest

from kit.commands import run_command
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
    assert 0 < int(result.out) <= 320
