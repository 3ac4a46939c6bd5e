"""The command behind `mount.pmemfs`, as mount(8) calls it.

    mount.pmemfs SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

Exit codes are those of mount(8): 1 for bad usage, 32 for a mount that failed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from pmemfs.cli.commands import run
from pmemfs.cli.early import raise_interrupts
from pmemfs.cli.mount import remounted, reporting_mount_failure, say_more, start
from pmemfs.cli.output import manner
from pmemfs.cli.paths import A_DIRECTORY, ANY_PATH
from pmemfs.errors import EXIT_USAGE, NoSuchSource
from pmemfs.medium.source import identify
from pmemfs.mount.options import MountOptions, split_words
from pmemfs.mountinfo import mount_at

_EXIT_MOUNT_USAGE = 1


@click.command("mount.pmemfs")
@click.argument("source", type=ANY_PATH)
@click.argument("directory", type=A_DIRECTORY)
@click.option("-o", "options_text", default="", help="Mount options.")
@click.option("-f", "fake", is_flag=True, help="Check the words, don't mount.")
@click.option("-s", "sloppy", is_flag=True, help="Ignored.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored.")
@click.option("-v", "verbose", is_flag=True, help="Say more.")
@click.option("-N", "namespace", help="Ignored: mount(8) has entered it.")
@click.option("-t", "fs_type", help="Ignored.")
def mount_pmemfs(
    source: str,
    directory: str,
    options_text: str,
    fake: bool,
    sloppy: bool,
    no_mtab: bool,
    verbose: bool,
    namespace: str | None,
    fs_type: str | None,
) -> int:
    """Mount the pool SOURCE on DIRECTORY, as mount(8) asks for it."""

    manner.is_verbose = verbose

    def attempt() -> int:
        words = split_words(options_text)
        if "remount" in words:
            if not fake:
                remounted(source, directory, [*_cleared(directory), *words])
            return 0
        # mount(8) does not pass on `suid` and `dev`, which it takes for granted.
        given = ["suid", "dev"] if os.geteuid() == 0 else []
        options = MountOptions.parse(",".join([*given, *words]))
        try:
            identify(source)
        except NoSuchSource:
            # mount(8) leaves it to us, as it leaves the exit code.
            if "nofail" in words:
                return 0
            raise
        if fake:
            return 0
        start(source, directory, options)
        say_more(directory)
        return 0

    return reporting_mount_failure(attempt)


def _cleared(directory: str) -> list[str]:
    """What counts at a remount unless the options say else: mount(8) passes no flags that are off.

    On what another user has mounted, root does not honour set-user-ID without saying so.
    """
    mount = mount_at(os.path.realpath(directory))
    is_roots = mount is not None and mount.owner_uid == 0
    return [*(["suid", "dev"] if is_roots and os.geteuid() == 0 else []), "exec", "async",
            "diratime", "symfollow"]  # fmt: skip


def run_helper(words: Sequence[str]) -> int:
    """Run it; its exit code."""
    raise_interrupts()
    code = run(mount_pmemfs, list(words))
    return _EXIT_MOUNT_USAGE if code == EXIT_USAGE else code
