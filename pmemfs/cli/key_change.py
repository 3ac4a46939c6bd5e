"""`pmemfs key change`: change a passphrase or a key file."""

from __future__ import annotations

import os

import click

from pmemfs.cli.find import require_mount
from pmemfs.cli.key_asking import (
    ask_about,
    find_key,
    given_secret,
    name_option,
    print_key,
    secret_options,
)
from pmemfs.cli.options import reporting
from pmemfs.cli.paths import A_DIRECTORY, ANY_PATH
from pmemfs.errors import NoSuchKey
from pmemfs.media.keyreport import SALT_BYTES, KeyReport


@click.command("change")
@click.argument("mountpoint", type=A_DIRECTORY)
@name_option
@secret_options
@click.option("--new-key-file", type=ANY_PATH, metavar="FILE",
              help="Let this file unlock the key from now on, and no new passphrase.")  # fmt: skip
@reporting
def key_change(
    mountpoint: str, name: str, key_file: str | None, new_key_file: str | None, *,
    passphrase: bool, as_json: bool,
) -> None:  # fmt: skip
    """Change a passphrase or a key file that unlocks a key.

    First what unlocks the key so far is asked for, then twice what is to unlock it from now on; of
    a pipe, these are the first two lines. The key may be locked, and stays so. Other ways to unlock
    it stay as well, and no file is touched. If the new one is one of these already, one way is left
    of the two. Who has a copy of the pool from before can still unlock that with what was changed.

    If what was given does not unlock the key, the exit code is 1, and nothing is changed, whatever
    the new one unlocks. If both are the same, the exit code is 2.
    """
    mount = require_mount(mountpoint)
    if find_key(mount, name) is None:
        raise NoSuchKey(name=name)
    old = given_secret(f"Passphrase for the key '{name}'", key_file, passphrase=passphrase)
    new = given_secret(f"New passphrase for the key '{name}'", new_key_file, is_new=True)
    now = ask_about(
        mount, "key-change", KeyReport, name=name, **old, new_secret=new["secret"],
        new_kind=new["kind"], salt=os.urandom(SALT_BYTES).hex(),
    )  # fmt: skip
    print_key(now, f"the {new['kind']} unlocks the key '{name}' from now on, and the {old['kind']} "
              "of before does not", as_json=as_json)  # fmt: skip
