"""`pmemfs encrypt`: let all that is made in a directory be encrypted."""

from __future__ import annotations

import click

from pmemfs.cli.key_asking import ask_about, key_directory, print_key
from pmemfs.cli.options import reporting
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.media.keyreport import KeyReport


@click.command()
@click.argument("directory", type=A_DIRECTORY)
@click.option("--key", "name", required=True, metavar="KEY", help="The name of an unlocked key.")
@reporting
def encrypt(directory: str, name: str, as_json: bool) -> None:
    """Encrypt what will be made in an empty directory.

    DIRECTORY is in a mounted pool of mode fs. From now on the content of files below it, their
    names, the targets of symbolic links and the user attributes are stored encrypted. Sizes, times,
    owners, modes and access control lists are not. It stays encrypted as long as it exists; other
    files are moved there by copying them.

    While the key is locked, names are shown encoded, and files can be removed, but not opened.
    """
    mount, inode = key_directory(directory)
    key = ask_about(mount, "encrypt", KeyReport, inode=inode, name=name, path=directory)
    print_key(key, f"{directory} is encrypted with the key '{name}'", as_json=as_json)
