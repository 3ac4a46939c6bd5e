"""Sixty plausible mistakes: one sentence each that names what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.commands import Result, pmemfs, pmemfs_here, refused
from kit.mistakes import MISTAKES, Mistake
from kit.mounts import Engine, pool_maker
from kit.sources import mounted_tmpfs
from pmemfs.cli.commands import pmemfs as program
from pmemfs.cli.commands import run
from pmemfs.media.label import FORMAT_VERSION, pack, validate
from pmemfs.media.layout import replace
from pmemfs.units import MIB

pytestmark = pytest.mark.mount

Scene = dict[str, str]


def relabel(pool: Path, format_version: int) -> None:
    """Have a pool say that it is of another version."""
    with pool.open("r+b") as file:
        for offset in (0, 16 * MIB - 4096):
            file.seek(offset)
            label = validate(file.read(4096))
            file.seek(offset)
            file.write(pack(replace(label, format_version=format_version)))


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """Files, directories and mounts to be mistaken about."""
    with ExitStack() as stack:
        pools = stack.enter_context(pool_maker(Engine("native")))
        here = pools.directory
        for name in ("clean", "truncated", "newer", "older", "damaged"):
            pools.create(name, "16M")
        os.truncate(here / "truncated", 3 * MIB)
        relabel(here / "newer", FORMAT_VERSION + 1)
        relabel(here / "older", 0)
        (here / "damaged").write_bytes(bytes(16 * MIB))
        (here / "text").write_bytes(b"text" * MIB)
        (here / "empty").touch()
        (here / "loop").symlink_to("loop")
        (here / "directory").mkdir()
        mounted = pools.mount(pools.create("mounted", "16M"))
        busy = pools.mount(pools.create("busy", "16M"))
        stack.enter_context(mounted.device.open("rb"))
        stack.enter_context((busy.device).open("rb"))
        tmpfs = stack.enter_context(mounted_tmpfs(here / "tmpfs", "size=32M"))
        frozen = stack.enter_context(mounted_tmpfs(here / "frozen", "size=32M"))
        pmemfs_here("create", frozen / "pool", "--size", "16M")
        subprocess.run(["mount", "-o", "remount,ro", frozen], check=True)
        names = ("clean", "truncated", "newer", "older", "damaged", "text", "empty", "loop",
                 "directory", "missing", "new", "mounted")  # fmt: skip
        yield {
            **{name: str(here / name) for name in names},
            "mountpoint": str(pools.mountpoint("free")),
            "at": str(mounted.mountpoint),
            "busy": str(busy.mountpoint),
            "tmpfs": str(tmpfs),
            "frozen": str(frozen),
            "long": "x" * 300,
        }


def without_numbers(text: str) -> str:
    return re.sub(r"[0-9.]+[KMGT]?", "", text)


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> Result:
    """What a command answers. What mounts runs as a process of its own, since it takes signals."""
    if words and "mount" in words[0]:
        return pmemfs(*words)
    code = run(program, words)
    shown = capsys.readouterr()
    return Result(code, shown.out, shown.err)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.line for mistake in MISTAKES])
def test_a_mistake_is_one_sentence_that_says_what_to_do(
    scene: Scene, mistake: Mistake, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(**scene) for word in shlex.split(mistake.line)]
    said = [part.format(**scene) for part in mistake.words]
    plain = answer(words, capsys)
    assert plain.out == ""
    sentence = refused(plain, mistake.code, *said)
    assert sentence.startswith("pmemfs: ")
    for_programs = answer([*words, "--json"], capsys)
    assert for_programs.out == ""
    error = json.loads(refused(for_programs, mistake.code))
    # How much is free, and which process it was, may be another by now.
    assert without_numbers(f"pmemfs: {error['message']}") == without_numbers(sentence)
    assert error["exit_code"] == mistake.code
    assert error["error"].isidentifier()
    assert error["errno"].startswith("E")
    assert not os.path.exists(scene["new"])
