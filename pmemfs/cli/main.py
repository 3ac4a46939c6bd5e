"""`pmemfs`: the group of all commands, and the one place where an error becomes a sentence."""

from __future__ import annotations

import os
import sys

import click

from pmemfs.cli.check import check
from pmemfs.cli.create import create
from pmemfs.cli.info import info
from pmemfs.cli.list import list_mounts
from pmemfs.cli.mount import mount
from pmemfs.cli.pages import pages
from pmemfs.cli.umount import umount
from pmemfs.errors import EXIT_FAILED, PmemfsError
from pmemfs.version import VERSION


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    pool is not valid, 16 in use. mount and umount fail with 32, like mount(8); check answers
    like fsck(8).
    """


for command in (create, mount, umount, info, pages, list_mounts, check):
    pmemfs.add_command(command)


def main() -> None:
    """The program."""
    sys.exit(run(pmemfs, sys.argv[1:]))


def run(command: click.Command, words: list[str]) -> int:
    """Run a command; its exit code. Nothing that a user does wrong prints a traceback."""
    try:
        result = command.main(words, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.Abort:
        print("pmemfs: interrupted", file=sys.stderr)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PmemfsError as error:
        print(f"pmemfs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        print(f"pmemfs: {error.filename or ''}: {error.strerror}".replace(": :", ":"),
              file=sys.stderr)  # fmt: skip
        return EXIT_FAILED
