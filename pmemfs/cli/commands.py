"""`pmemfs`: the group of all commands, and the one place where an error becomes a sentence."""

from __future__ import annotations

import importlib
import io
import sys

import click

from pmemfs.cli.early import EXIT_INTERRUPTED, raise_interrupts
from pmemfs.cli.output import complain, heard_output, show_usage_error
from pmemfs.errors import (
    EXIT_CANNOT_CHECK,
    EXIT_FAILED,
    EXIT_MOUNT_FAILED,
    OutputLost,
    PmemfsError,
)
from pmemfs.version import VERSION

_COMMANDS = {
    "create": "pmemfs.cli.create:create",
    "mount": "pmemfs.cli.mount:mount",
    "umount": "pmemfs.cli.umount:umount",
    "info": "pmemfs.cli.info:info",
    "pages": "pmemfs.cli.pages:pages",
    "stat": "pmemfs.cli.stat:stat",
    "extents": "pmemfs.cli.extents:extents",
    "list": "pmemfs.cli.list:list_mounts",
    "resize": "pmemfs.cli.resize:resize",
    "trim": "pmemfs.cli.trim:trim",
    "check": "pmemfs.cli.check:check",
    "doctor": "pmemfs.cli.doctor:doctor",
}
"""Where each command is. Only the one that is called is loaded, so that it starts at once."""

_EXIT_OUTPUT_LOST: dict[str | None, int] = {
    "check": EXIT_CANNOT_CHECK,
    "mount": EXIT_MOUNT_FAILED,
    "umount": EXIT_MOUNT_FAILED,
    "mount-pmemfs": EXIT_MOUNT_FAILED,
}
"""What commands that have exit codes of their own end with where nobody takes what they say."""


class LazyGroup(click.Group):
    """A group of the commands in `_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a pool's life."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        raise_interrupts()
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="pmemfs %(version)s")
def pmemfs() -> None:
    """Persistent memory as storage, through a mount.

    A pool is the memory behind a tmpfs file, a file of a DAX file system, /dev/daxX.Y or
    /dev/pmemN.

    \b
    pmemfs create /dev/shm/pmem0 --size 4G
    pmemfs mount  /dev/shm/pmem0 /mnt
    fio --name=v --filename=/mnt/pmem0 --direct=1 --rw=randwrite --bs=4k --size=1g
    pmemfs umount /mnt

    Exit codes: 0 done, 1 failed, 2 bad usage, 3 refused since something would be lost, 4 the
    pool is not valid, 16 in use. mount and umount fail with 32, like mount(8), and bad usage of
    them is 2, too; check answers like fsck(8).
    """


def run(command: click.Command, words: list[str]) -> int:
    """Run a command; its exit code. Nothing that a user does wrong prints a traceback.

    Nobody may have taken what it said, which is a failure too, also where the rest went well.
    """
    # A path need not be text in the user's encoding, and must not stop us from naming it.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with heard_output():
            return _run(command, words)
    except OutputLost as lost:
        if not lost.has_no_reader:
            complain(str(lost))
        name = next(iter(words), None) if isinstance(command, click.Group) else command.name
        return _EXIT_OUTPUT_LOST.get(name, EXIT_FAILED)


def _run(command: click.Command, words: list[str]) -> int:
    """As `run`. Raises OutputLost."""
    try:
        result = command.main(words, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted")
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        show_usage_error(error)
        return error.exit_code
    except OutputLost:
        raise
    except PmemfsError as error:
        complain(str(error))
        return error.exit_code
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
        return EXIT_FAILED
