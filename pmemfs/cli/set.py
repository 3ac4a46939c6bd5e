"""`pmemfs set`: let a file, or what is made in a directory, be compressed while it is cold."""

from __future__ import annotations

from typing import Any

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_facts, print_json
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.transforms import (
    ask_about_inode,
    find_inode,
    transform_facts,
    transform_values,
)
from pmemfs.media.transformreport import MOST_LEVELS, TransformReport
from pmemfs.text import did_you_mean

_NAMES = ("compression",)
_KINDS = (*MOST_LEVELS, "none")


class _Property(click.ParamType[tuple[str, int]]):
    """NAME=VALUE, as a kind of compression and its level."""

    name = "property"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """The kind and the level. Raises BadParameter."""
        name, equals, word = str(value).partition("=")
        if name in _NAMES and not equals:
            self.fail(f"say which: {name}=zstd, lz4 or none", param, ctx)
        if name not in _NAMES:
            meant = did_you_mean(name, _NAMES)
            self.fail(f"'{value}' is not compression=zstd, lz4 or none{meant}", param, ctx)
        kind, colon, level = word.partition(":")
        if kind not in _KINDS:
            meant = did_you_mean(kind, _KINDS)
            self.fail(f"'{kind}' is none of {', '.join(_KINDS)}{meant}", param, ctx)
        if not colon:
            return kind, 0
        if kind not in MOST_LEVELS:
            self.fail(f"{kind} has no levels", param, ctx)
        most = MOST_LEVELS[kind]
        # A long word of digits is not made a number, which would take long.
        is_number = level.isascii() and level.isdigit() and len(level) < 9
        if not is_number or not 1 <= int(level) <= most:
            self.fail(f"'{level}' is not a level of {kind}, which has 1 to {most}", param, ctx)
        return kind, int(level)


@click.command("set")
@click.argument("path", type=ANY_PATH)
@click.argument("wanted", metavar="compression={zstd[:LEVEL]|lz4[:LEVEL]|none}", type=_Property())
@reporting
def set_transform(path: str, wanted: tuple[str, int], as_json: bool) -> None:
    """Let a file be compressed while it is cold.

    PATH is in a mounted pool of mode fs. What is written lies plain at first. What nobody has
    touched for a while ('pmemfs mount -o cold_seconds=') is compressed in the background, in pieces
    of 128 KiB, and is plain again once it is read often or written to. 'pmemfs rewrite' compresses
    a file at once. To write to what is compressed needs room for its plain bytes: on a full pool it
    fails (ENOSPC).

    A higher LEVEL packs closer and takes longer: 1 to 22 of zstd, which has 3 without one, and 1 to
    12 of lz4, which without one is faster than with any.

    A directory passes it on to files and directories that are made in it from then on. chattr +c
    means compression=zstd, chattr -c none; the owner of a file may do that, also where the mount is
    another user's, and this command is for the user who has mounted, and for root.

    A file that a Python program has as an array over its pages (import pmemfs) is refused; mmap(2)
    is not in the way. Whatever is encrypted is refused, too: it does not shrink.
    """
    mount, inode = find_inode(path)
    kind, level = wanted
    report = ask_about_inode(
        mount, "transform-set", TransformReport, inode, path, compression=kind, level=level
    )
    if as_json:
        print_json(transform_values(report, None))
    else:
        print_facts(transform_facts(path, report))
