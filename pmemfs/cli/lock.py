"""`pmemfs lock`: lock the key of an encrypted directory."""

from __future__ import annotations

from typing import Any

import click

from pmemfs.cli.key_asking import ask_about, key_directory
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.media.keyreport import Locked
from pmemfs.unsaid import json_values


@click.command()
@click.argument("directory", type=A_DIRECTORY)
@click.option("--key", "name", metavar="KEY", help="This key, and not that of DIRECTORY.")
@click.option(
    "--force",
    is_flag=True,
    help="Lock a key that nothing unlocks any more, too: the files are lost then.",
)
@reporting
def lock(directory: str, name: str | None, *, force: bool, as_json: bool) -> None:
    """Lock the key of an encrypted directory, and forget it.

    All directories of the same key are locked then: their names are shown encoded, and no file of
    them can be opened. The key is overwritten in memory, and the kernel forgets the names and pages
    that it has kept. With --key, DIRECTORY may be any directory of the mount.

    While a file is open the key stays unlocked, and the exit code is 16; the sentence names the
    file and the process. A key that is locked already stays so, and that is no failure. To unmount
    locks all keys.

    A key whose last way to unlock it was removed stays unlocked, exit code 3, unless --force locks
    it; 'pmemfs key add' lets something unlock it again.
    """
    mount, inode = key_directory(directory)
    which: dict[str, Any] = {"name": name} if name is not None else {"inode": inode}
    if force:
        which["is_forced"] = True
    locked = ask_about(mount, "lock", Locked, path=directory, **which)
    if as_json:
        print_json(json_values(locked))
    else:
        say(f"the key '{locked.name}' is locked{' already' if locked.was_locked else ''}")
