"""`pmemfs key list`: the keys of a mount or of a pool, and what unlocks them."""

from __future__ import annotations

import os
from contextlib import closing

import click

from pmemfs.cli.find import find_hidden, find_mount, require_mount
from pmemfs.cli.key_asking import all_keys, since
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, print_table, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import NoKeysHere
from pmemfs.media.keyreport import KeyReport, KeyWay
from pmemfs.unsaid import json_values


@click.command("list")
@click.argument("target", type=ANY_PATH)
@reporting
def key_list(target: str, as_json: bool) -> None:
    """List the keys of the mount on TARGET, or of the pool TARGET, and what unlocks them.

    The pool need not be mounted; then all keys are locked. The number of a way is what 'pmemfs key
    remove --way' takes.
    """
    mount = find_mount(target)
    if mount is None and os.path.isdir(target):
        mount = require_mount(target)
    if mount:
        keys = all_keys(mount)
    else:
        hidden = find_hidden(target)
        keys = hidden.status.keys if hidden else _stored_keys(target)
    if as_json:
        print_json([json_values(key) for key in keys])
    elif not keys:
        when = "" if mount else " once it is mounted"
        say(f"{target} has no keys; 'pmemfs key add' makes one{when}")
    else:
        nothing = (KeyWay(0, "nothing", 0),)
        print_table(
            ["KEY", "STATE", "WAY", "UNLOCKED BY", "SINCE", "ID"],
            [
                (
                    key.name or "?",
                    "unlocked" if key.is_unlocked else "locked",
                    way.number or "-",
                    f"{way.kind}: {way.problem}" if way.problem else way.kind,
                    since(way.created_ns) if way.created_ns else "-",
                    key.key_id,
                )
                for key in keys
                for way in key.ways or nothing
            ],
            spare=["ID", "SINCE"],
        )


def _stored_keys(path: str) -> tuple[KeyReport, ...]:
    """Raises NoSuchSource, NotAPool, SourceBusy, NoKeysHere, DamagedFileSystem."""
    # Who asks a daemon does not wait for what reads a pool.
    from pmemfs.media.label import Mode
    from pmemfs.medium.mapped import MappedMedium
    from pmemfs.pool import Pool
    from pmemfs.volume.fs.keystore import stored_keys

    with closing(MappedMedium.open(path, read_only=True)) as medium:
        pool = Pool.open(medium)
        if pool.label.mode != Mode.FS:
            raise NoKeysHere(path=path, mode=Mode(pool.label.mode).word)
        return stored_keys(pool)
