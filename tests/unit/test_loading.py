"""What a mount has to load before it answers, counted: modules, since no time is the same twice."""

from __future__ import annotations

import sys

import pytest

from kit.commands import run_command

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
    loaded = loaded_by("pmemfs.daemons.planed")
    assert not loaded & {*HEAVY, "dataclasses", "inspect", "logging", "typing", "subprocess"}
    ours = {name.rpartition(".")[0] for name in loaded if name.startswith("pmemfs.")}
    assert ours <= {"pmemfs", "pmemfs.dataplane", "pmemfs.medium", "pmemfs.daemons"}


def test_a_daemon_loads_no_numpy_and_nothing_that_only_answers_questions() -> None:
    loaded = loaded_by("pmemfs.daemons.mountd")
    assert "numpy" not in loaded, "what counts pages in Python is the python engine's"
    assert not [name for name in loaded if name.startswith(("pmemfs.observe", "pmemfs.cli"))]
