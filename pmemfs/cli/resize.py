"""`pmemfs resize`: make a pool larger, mounted or not. Never smaller."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from pmemfs.cli.find import ask, find_mount, require_mount
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.control.client import ANSWER_TIMEOUT_SECONDS
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus
from pmemfs.pool.growth import Grown, grow_unmounted
from pmemfs.units import format_size, parse_size

_PATIENCE_SECONDS = 24 * 3600
"""A device is filled with zeroes where it is new, at whatever speed it takes them."""


@click.command()
@click.argument("target", type=ANY_PATH)
@click.option("--size", metavar="SIZE", help="The new size, such as 8G; devices have theirs.")
@reporting
def resize(target: str, size: str | None, as_json: bool) -> None:
    """Make a pool larger, mounted or not.

    TARGET is the pool, or the mountpoint of its mount.

    A file is made as large as --size says, with memory behind all of it unless it is sparse; if it
    is longer than its pool already, the pool takes all of it without --size. The pool on a device
    becomes as large as the device is now. What is new reads as zeroes.

    A mount goes on serving meanwhile. Its file has the new size afterwards; for a loop device on
    it, 'losetup --set-capacity' says so.

    A cache keeps the size of its pool. If its origin has grown, 'pmemfs resize MOUNTPOINT' without
    --size lets the mount's file be as large as the origin is now.

    A pool can't be made smaller: exit code 3. If it has the size already there is nothing to do,
    and that is no failure.
    """
    wanted_bytes = parse_size(size) if size is not None else None
    mount = find_mount(target)
    if mount is None and os.path.isdir(target):
        mount = require_mount(target)
    if mount:
        # Another user's daemon may have no intention to answer; it grows while nobody waits, too.
        is_ours = mount.owner_uid in (0, os.geteuid())
        seconds = _PATIENCE_SECONDS if is_ours else ANSWER_TIMEOUT_SECONDS
        grown = ask(mount, "resize", Grown, timeout_seconds=seconds, size_bytes=wanted_bytes)
    else:
        grown = grow_unmounted(target, wanted_bytes)
    if as_json:
        print_json(asdict(grown))
        return
    what = f"{_what(mount)} '{grown.name}'"
    if grown.old_bytes == grown.new_bytes:
        say(f"{what} has {format_size(grown.old_bytes)} already: nothing to do")
    else:
        old, new = format_size(grown.old_bytes), format_size(grown.new_bytes)
        say(f"{what} has {new} now, and had {old}")


def _what(mount: Mount | None) -> str:
    """What has another size: of a cache that is the file, because its pool keeps its size."""
    is_cache = mount is not None and ask(mount, "info", MountStatus).pool.mode == "cache"
    return "the file of cache" if is_cache else "pool"
