"""The systemd unit is one that systemd takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kit.commands import run_command

UNIT = Path(__file__).parents[2] / "daemons/pmemfs@.service"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    # The program that it starts need not be installed where the tests run.
    unit = tmp_path / UNIT.name.replace("@", "@dev-pmem0")
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/pmemfs", "/bin/true"))
    result = run_command("systemd-analyze", "verify", "--man=no", unit)
    complaints = [line for line in result.err.splitlines() if unit.name in line]
    assert complaints == []


def test_the_unit_starts_what_the_install_script_links() -> None:
    install = (UNIT.parents[1] / "scripts/install").read_text()
    assert "/usr/local/bin/pmemfs" in install
    assert "ExecStart=/usr/local/bin/pmemfs mount --foreground" in UNIT.read_text()
