"""`pmemfs cache`: the group of what is for caches only. A command is loaded when it is called."""

from __future__ import annotations

import importlib

import click

from pmemfs.cli.options import manner_options

SUBCOMMANDS = {
    "set": "pmemfs.cli.cache_set:cache_set",
    "drop": "pmemfs.cli.cache_drop:cache_drop",
    "verify": "pmemfs.cli.cache_verify:cache_verify",
    "export": "pmemfs.cli.cache_export:cache_export",
}


class _LazyCommands(click.Group):
    """A group of the commands in `SUBCOMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of their use."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module, _, name = SUBCOMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_LazyCommands)
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
