"""`pmemfs key`: the group of what is for keys. A command is loaded when it is called."""

from __future__ import annotations

import click

from pmemfs.cli.group import LazyCommands
from pmemfs.cli.options import manner_options

SUBCOMMANDS = {
    "add": "pmemfs.cli.key_add:key_add",
    "list": "pmemfs.cli.key_list:key_list",
    "change": "pmemfs.cli.key_change:key_change",
    "remove": "pmemfs.cli.key_remove:key_remove",
}


@click.group(cls=LazyCommands, places=SUBCOMMANDS)
@manner_options
def key() -> None:
    """Make keys for encrypted directories, and say what unlocks them.

    These are for mounts of pools of mode fs. A key is stored in the pool only wrapped: encrypted by
    a passphrase or a key file, or by several of them, of which each unlocks it. To change or add
    one touches no file that is encrypted with the key. If all of them are lost, so are the files.

    \b
    pmemfs key add /mnt --name work --passphrase
    pmemfs encrypt /mnt/private --key work
    pmemfs lock /mnt/private
    pmemfs unlock /mnt/private
    pmemfs key add /mnt --name work --key-file /media/stick/work.key
    """
