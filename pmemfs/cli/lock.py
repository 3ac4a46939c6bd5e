"""`pmemfs lock`: lock the key of an encrypted directory."""

from __future__ import annotations

import click

from pmemfs.cli.find import ask
from pmemfs.cli.key_asking import PATIENCE_SECONDS, key_directory
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.media.keyreport import Locked
from pmemfs.observe.answers import json_values


@click.command()
@click.argument("directory", type=A_DIRECTORY)
@click.option("--key", "name", metavar="KEY", help="This key, and not that of DIRECTORY.")
@reporting
def lock(directory: str, name: str | None, as_json: bool) -> None:
    """Lock the key of an encrypted directory, and forget it.

    All directories of the same key are locked then: their names are shown encoded, and no file of
    them can be opened. The key is overwritten in memory, and the kernel forgets the names and pages
    that it has kept. With --key, DIRECTORY may be any directory of the mount.

    While a file is open the key stays unlocked, and the exit code is 16; the sentence names the
    file and the process. A key that is locked already stays so, and that is no failure. To unmount
    locks all keys.
    """
    mount, inode = key_directory(directory)
    which = {"name": name} if name is not None else {"inode": inode}
    locked = ask(mount, "lock", Locked, timeout_seconds=PATIENCE_SECONDS, path=directory, **which)
    if as_json:
        print_json(json_values(locked))
    else:
        say(f"the key '{locked.name}' is locked{' already' if locked.was_locked else ''}")
