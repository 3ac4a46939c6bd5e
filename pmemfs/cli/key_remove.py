"""`pmemfs key remove`: remove a way to unlock a key."""

from __future__ import annotations

import click

from pmemfs.cli.find import require_mount
from pmemfs.cli.key_asking import (
    ask_about,
    find_key,
    given_secret,
    in_ways,
    name_option,
    print_key,
)
from pmemfs.cli.options import Count, reporting
from pmemfs.cli.paths import A_DIRECTORY, ANY_PATH
from pmemfs.errors import BadUsage, NoSuchKey, NoSuchWay, WhichWay
from pmemfs.media.keyreport import KeyReport, KeyWay


@click.command("remove")
@click.argument("mountpoint", type=A_DIRECTORY)
@name_option
@click.option(
    "--passphrase",
    is_flag=True,
    help="The way of a passphrase, which is asked for. Of a pipe, it is one line.",
)
@click.option("--key-file", type=ANY_PATH, metavar="FILE", help="The way of this key file.")
@click.option("--way", type=Count(1, 9999), metavar="NUMBER",
              help="The way of this number, as 'pmemfs key list' shows it.")  # fmt: skip
@click.option(
    "--force",
    is_flag=True,
    help="Remove the last way, too, without a question: the files are lost then.",
)
@reporting
def key_remove(
    mountpoint: str, name: str, key_file: str | None, way: int | None, *, passphrase: bool,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Remove a way to unlock a key: a passphrase, a key file, or the way of a number.

    With none of --passphrase, --key-file and --way nothing is asked for: the only way is meant. If
    there are several, the exit code is 2, or with --force all of them are removed.

    No file is touched. The last way stays, exit code 3, unless --force removes it, and with it all
    files that are encrypted with the key: they can be read until the key is locked or the pool is
    unmounted, and never again. Until then 'pmemfs key add' takes that back.

    Who has a copy of the pool from before can still unlock that with what was removed.
    """
    if way is not None and (key_file is not None or passphrase):
        raise BadUsage(why="--way, --passphrase and --key-file exclude each other")
    mount = require_mount(mountpoint)
    key = find_key(mount, name)
    if key is None:
        raise NoSuchKey(name=name)
    if key_file is not None or passphrase:
        prompt = f"Passphrase for the key '{name}'"
        secret = given_secret(prompt, key_file, passphrase=passphrase)
        chosen = ask_about(mount, "key-ways", KeyReport, name=name, **secret).ways
    else:
        chosen = _chosen(key, way, force=force)
    now = ask_about(
        mount, "key-remove", KeyReport, name=name, key_id=key.key_id,
        ways=[each._asdict() for each in chosen], is_forced=force,
    )  # fmt: skip
    left = f"can be unlocked in {in_ways(now)} now" if now.ways else (
        "can't be unlocked any more once it is locked or the pool is unmounted; until then "
        "'pmemfs key add' takes that back"
        if now.is_unlocked else "can't be unlocked any more"
    )  # fmt: skip
    print_key(now, f"the key '{name}' {left}", as_json=as_json)


def _chosen(key: KeyReport, way: int | None, *, force: bool) -> tuple[KeyWay, ...]:
    """The way of a number; without one, the only way, or with force all ways. Raises NoSuchWay,
    WhichWay."""
    if way is not None:
        chosen = tuple(each for each in key.ways if each.number == way)
        if not chosen:
            raise NoSuchWay(name=key.name or key.key_id, way=way)
        return chosen
    if len(key.ways) > 1 and not force:
        raise WhichWay(name=key.name, count=len(key.ways))
    return key.ways
