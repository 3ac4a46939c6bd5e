"""The manual: a page for each command, which man(1) renders without a complaint."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from pmemfs.cli.cache import SUBCOMMANDS as FOR_CACHES
from pmemfs.cli.commands import pmemfs
from pmemfs.cli.key import SUBCOMMANDS as FOR_KEYS

DIRECTORY = Path(__file__).parents[2] / "share/man/man8"
PAGES = sorted(DIRECTORY.glob("*.8"))
CONTEXT = click.Context(pmemfs)
COMMANDS = pmemfs.list_commands(CONTEXT)

needs_man = pytest.mark.skipif(not shutil.which("man"), reason="there is no man(1) here")


def rendered(page: Path, locale: str = "C.UTF-8") -> str:
    """What man(1) shows of a page; it must have nothing to complain of."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": locale, "MANWIDTH": "200"}
    done = subprocess.run(
        ["man", "--warnings", "--no-hyphenation", "--no-justification", "--local-file", page],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_each_command_has_a_page_and_mount_8_has_its_helpers() -> None:
    names = {"pmemfs.8", "mount.pmemfs.8", *(f"pmemfs-{name}.8" for name in COMMANDS)}
    names |= {f"pmemfs-cache-{name}.8" for name in FOR_CACHES}
    names |= {f"pmemfs-key-{name}.8" for name in FOR_KEYS}
    assert {page.name for page in PAGES} == names


@needs_man
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_renders_without_a_warning(page: Path, locale: str) -> None:
    text = rendered(page, locale)
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
        assert f"\n{section}\n" in f"\n{text}"
    assert f"{page.stem} - " in text


@needs_man
@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_tells_every_option_and_the_whole_text(name: str) -> None:
    command = pmemfs.get_command(CONTEXT, name)
    assert command is not None
    assert command.help is not None
    words = rendered(DIRECTORY / f"pmemfs-{name}.8").split()
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.opts[-1] in [word.rstrip(",") for word in words]
    said = command.help.replace("\b", "").replace("…", "...").replace("Exit codes:", "").split()
    assert not set(said) - set(words) - {"0"}


@needs_man
def test_the_page_of_the_helper_has_the_mount_options() -> None:
    text = rendered(DIRECTORY / "mount.pmemfs.8")
    for option in ("allow_other", "uid=, gid=, mode=", "cached", "populate", "/etc/fstab"):
        assert option in text
