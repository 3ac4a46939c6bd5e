"""`pmemfs trim`: give memory back that no file of a mount uses."""

from __future__ import annotations

from dataclasses import asdict

import click

from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.engine.trimming import Trimmed
from pmemfs.units import format_size

_PATIENCE_SECONDS = 3600


@click.command()
@click.argument("mountpoint", type=A_DIRECTORY)
@reporting
def trim(mountpoint: str, as_json: bool) -> None:
    """Give back the memory that no file of a mount uses.

    For pools that were created with --sparse, and on block devices: files that were deleted leave
    memory there that only their pool could use again. 'fstrim MOUNTPOINT' does the same. Other
    pools were promised their memory when they were created, and keep it.
    """
    mount = require_mount(mountpoint)
    trimmed = ask(mount, "trim", Trimmed, timeout_seconds=_PATIENCE_SECONDS)
    if as_json:
        print_json(asdict(trimmed))
    else:
        given_back = trimmed.given_back_bytes
        say(f"{mountpoint}: {format_size(given_back)} ({given_back} bytes) trimmed")
