"""`pmemfs get`: show how a file or directory is transformed."""

from __future__ import annotations

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_facts, print_json
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.transforms import (
    ask_about_inode,
    find_inode,
    find_key_of,
    transform_facts,
    transform_values,
)
from pmemfs.media.transformreport import TransformReport


@click.command("get")
@click.argument("path", type=ANY_PATH)
@reporting
def get_transform(path: str, as_json: bool) -> None:
    """Show how a file or directory is compressed or encrypted.

    PATH is in a mounted pool of mode fs. Of what is encrypted also the name of the key, and whether
    it is locked. Of a file also how much of it lies compressed now, and what that takes of the
    pool. What a directory shows is what files that are made in it take over.
    """
    mount, inode = find_inode(path)
    report = ask_about_inode(mount, "transform-get", TransformReport, inode, path)
    key = find_key_of(mount, inode, path) if report.is_encrypted else None
    if as_json:
        print_json(transform_values(report, key))
    else:
        print_facts(transform_facts(path, report, key))
