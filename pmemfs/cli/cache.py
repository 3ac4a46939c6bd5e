"""`pmemfs cache`: the group of what is for caches only. A command is loaded when it is called."""

from __future__ import annotations

import click

from pmemfs.cli.group import LazyCommands
from pmemfs.cli.options import manner_options

SUBCOMMANDS = {
    "set": "pmemfs.cli.cache_set:cache_set",
    "drop": "pmemfs.cli.cache_drop:cache_drop",
    "verify": "pmemfs.cli.cache_verify:cache_verify",
    "export": "pmemfs.cli.cache_export:cache_export",
}


@click.group(cls=LazyCommands, places=SUBCOMMANDS)
@manner_options
def cache() -> None:
    """Change settings of a cache, empty it, verify it, save what it has.

    These are for pools of mode cache. 'pmemfs cache COMMAND --help' says more of each. 'pmemfs
    create', 'info', 'stat', 'flush', 'resize' and 'umount --flush' are for caches, too.

    \b
    pmemfs cache set /mnt --policy write-through --max-dirty 20%
    pmemfs cache drop /mnt --range 0:1G
    pmemfs cache verify /mnt
    pmemfs cache export /dev/pmem0 /backup
    """
