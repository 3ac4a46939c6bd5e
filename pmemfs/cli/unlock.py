"""`pmemfs unlock`: unlock the key of an encrypted directory."""

from __future__ import annotations

import click

from pmemfs.cli.key_asking import (
    KEY_FILE,
    PASSPHRASE,
    ask_about,
    given_secret,
    key_directory,
    print_key,
    secret_options,
)
from pmemfs.cli.options import reporting
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.errors import LostKey, WrongKey
from pmemfs.media.keyreport import KeyReport


@click.command()
@click.argument("directory", type=A_DIRECTORY)
@secret_options
@click.option("--key", "name", metavar="KEY", help="This key, and not that of DIRECTORY.")
@reporting
def unlock(
    directory: str, key_file: str | None, name: str | None, *, passphrase: bool, as_json: bool
) -> None:
    """Unlock the key of an encrypted directory.

    The files of all directories of the same key can be opened from then on, by every user who may,
    until 'pmemfs lock' or the unmount. With --key, DIRECTORY may be any directory of the mount.

    A passphrase is asked for without showing it; of a pipe it is the first line of standard input.
    If it is wrong, the exit code is 1. A key that is unlocked already stays so, and that is no
    failure.
    """
    mount, inode = key_directory(directory)
    which = {"name": name} if name is not None else {"inode": inode}
    key = ask_about(mount, "key-find", KeyReport, path=directory, **which)
    shown = key.name or key.key_id
    if key.is_unlocked:
        print_key(key, f"the key '{shown}' is unlocked already", as_json=as_json)
        return
    _check_kind(key, PASSPHRASE if key_file is None else KEY_FILE)
    secret = given_secret(f"Passphrase for the key '{shown}'", key_file, passphrase=passphrase)
    now = ask_about(mount, "unlock", KeyReport, path=directory, **which, **secret)
    print_key(now, f"the key '{shown}' is unlocked", as_json=as_json)


def _check_kind(key: KeyReport, kind: str) -> None:
    """Nobody is asked for a passphrase where only a key file unlocks. Raises LostKey, WrongKey."""
    if not key.ways:
        raise LostKey(key_id=key.key_id)
    kinds = {way.kind for way in key.ways}
    if kind == PASSPHRASE and kinds == {KEY_FILE}:
        raise WrongKey(name=key.name, why="it has no passphrase; give its key file by --key-file")
