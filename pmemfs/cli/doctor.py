"""`pmemfs doctor`: what this machine offers, what pmemfs makes of it, and what would be faster.

Changes nothing unless `--fix` is said, and then only settings that are gone after the next boot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, print_table, say
from pmemfs.errors import EXIT_FAILED, RootOnly
from pmemfs.observe.finding import Finding, Setting
from pmemfs.observe.machine import can_mount, examine


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a setting that was to be changed."""

    command: str
    before: str
    after: str
    undo: str
    error: str | None = None

    @property
    def sentence(self) -> str:
        """What was done, for people."""
        if self.error:
            return f"{self.command}: failed: {self.error}"
        return f"{self.command}: it was {self.before} and is {self.after}; to undo: {self.undo}"


@click.command()
@click.option(
    "--fix", is_flag=True, help="Change the settings that last until the next boot; for root."
)
@reporting
def doctor(fix: bool, as_json: bool) -> int:
    """Show what this machine offers, and what would be faster.

    Each row says what was found, and what pmemfs makes of it. Nothing is changed without --fix.
    With --fix, settings are changed that the next boot resets: FUSE over io_uring is enabled where
    this kernel can be trusted with it, and limits of sockets and requests are raised.

    Exit codes: 0 pmemfs can mount here, 1 something that is needed is missing, or --fix failed.
    """
    if fix and os.geteuid() != 0:
        raise RootOnly(what="doctor --fix")
    findings = examine()
    changes = [apply(f.setting) for f in findings if f.setting] if fix else []
    if changes:
        findings = examine()
    is_well = can_mount(findings)
    if as_json:
        print_json(
            {
                "can_mount": is_well,
                "checks": [f.as_json() for f in findings],
                "changes": [asdict(change) for change in changes],
            }
        )
    else:
        _print(findings, changes, fix=fix)
    return 0 if is_well and not any(change.error for change in changes) else EXIT_FAILED


def apply(setting: Setting, root: Path = Path("/")) -> Change:
    """Write a setting and read it back. A failure is part of the answer."""
    path = root / setting.path
    before = after = ""
    error = None
    try:
        before = path.read_text().strip()
        # Path.write_text would make a file where there is none.
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, f"{setting.value}\n".encode())
        finally:
            os.close(fd)
        after = path.read_text().strip()
        if after != setting.value:
            error = f"the kernel took it for {after}"
    except OSError as caught:
        error = (caught.strerror or str(caught)).lower()
    undo = Setting(setting.path, before).command if before else ""
    return Change(setting.command, before, after, undo, error)


def _print(findings: Sequence[Finding], changes: Iterable[Change], *, fix: bool) -> None:
    print_table(
        ["CHECK", "STATE", "FOUND", "THEREFORE"],
        [(f.name, f.state, f.found, f.therefore) for f in findings],
    )
    # Below the table, so that no terminal breaks a command that is to be copied.
    advice = [f"  {f.name}: {f.command}" for f in findings if f.command]
    if advice:
        _say_all("What would improve this:", advice)
    if fix:
        done = [f"  {change.sentence}" for change in changes]
        _say_all("What was changed:", done or ["  nothing"])
    needed = [f.name for f in findings if not can_mount([f])]
    said = f"pmemfs can't mount here: {', '.join(needed)}" if needed else "pmemfs can mount here"
    _say_all(said, [])


def _say_all(heading: str, lines: Iterable[str]) -> None:
    for line in ("", heading, *lines):
        say(line)
