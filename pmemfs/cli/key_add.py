"""`pmemfs key add`: make a key, or add one more way to unlock it."""

from __future__ import annotations

import os
import shlex

import click

from pmemfs.cli.find import require_mount
from pmemfs.cli.key_asking import (
    ask_about,
    find_key,
    given_secret,
    in_ways,
    name_option,
    print_key,
    secret_options,
)
from pmemfs.cli.options import reporting
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.errors import NoKey
from pmemfs.media.keyreport import SALT_BYTES, Added


@click.command("add")
@click.argument("mountpoint", type=A_DIRECTORY)
@name_option
@secret_options
@reporting
def key_add(
    mountpoint: str, name: str, key_file: str | None, *, passphrase: bool, as_json: bool
) -> None:
    """Make a key, or add one more way to unlock it.

    A new key is made if there is none of this name, and is unlocked then. Otherwise the key must be
    unlocked, and can be unlocked in one more way from now on. What unlocks it already is added only
    once. A key whose last way was removed takes a new one as long as it is unlocked, by its name,
    or, where 'pmemfs key list' shows '?', by its ID.

    A passphrase is asked for twice, without showing it; of a pipe it is the first line of standard
    input, without its line end (LF or CRLF), and blanks count. Letters with accents are the same
    however a keyboard composes them (NFC).

    'head -c 64 /dev/urandom > FILE' makes a good key file. Keep a copy of it elsewhere: in
    an encrypted directory of the same key it is of no use.
    """
    mount = require_mount(mountpoint)
    key = find_key(mount, name)
    if key is not None and not key.is_unlocked:
        raise NoKey(name=name)
    prompt = f"Passphrase for {'the new' if key is None else 'the'} key '{name}'"
    secret = given_secret(prompt, key_file, passphrase=passphrase, is_new=True)
    added = ask_about(
        mount, "key-add", Added, name=name, salt=os.urandom(SALT_BYTES).hex(), **secret
    )
    now = added.key
    if not added.is_new_way:
        sentence = (
            f"the {secret['kind']} unlocks the key '{name}' already, in {in_ways(now)} as before"
        )
    elif key is None and len(now.ways) == 1:
        command = shlex.join(["pmemfs", "encrypt", "DIRECTORY", "--key", name])
        quote = '"' if "'" in command else "'"
        sentence = (
            f"made the key '{name}', which is unlocked; "
            f"{quote}{command}{quote} encrypts an empty directory with it"
        )
    else:
        sentence = f"the key '{name}' can be unlocked in {in_ways(now)} now"
    print_key(now, sentence, as_json=as_json)
