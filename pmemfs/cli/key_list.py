"""`pmemfs key list`: the keys of a mount, and what unlocks them."""

from __future__ import annotations

import click

from pmemfs.cli.key_asking import all_keys, key_mount, since
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, print_table, say
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.media.keyreport import KeyWay
from pmemfs.unsaid import json_values


@click.command("list")
@click.argument("mountpoint", type=A_DIRECTORY)
@reporting
def key_list(mountpoint: str, as_json: bool) -> None:
    """List the keys of a mount, and what unlocks them.

    The number of a way is what 'pmemfs key remove --way' takes.
    """
    keys = all_keys(key_mount(mountpoint))
    if as_json:
        print_json([json_values(key) for key in keys])
    elif not keys:
        say(f"{mountpoint} has no keys; 'pmemfs key add' makes one")
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
