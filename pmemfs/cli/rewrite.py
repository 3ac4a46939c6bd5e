"""`pmemfs rewrite`: let files lie as they are set, at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.transforms import ask_about_inode, find_inode
from pmemfs.media.transformreport import RewrittenReport
from pmemfs.text import counted
from pmemfs.units import format_size

_PATIENCE_SECONDS = 24 * 3600
"""A file may be terabytes long."""


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=ANY_PATH)
@reporting
def rewrite(paths: tuple[str, ...], as_json: bool) -> None:
    """Compress files now, or make them plain, as they are set.

    Each PATH is in a mounted pool of mode fs; of a directory, all files below it. The background
    does the same with what nobody has touched for a while. What another algorithm has compressed is
    compressed anew, and so is what another level makes smaller. What does not shrink stays plain,
    and what is encrypted stays as it is. To make a file plain needs room for its plain bytes.

    A power failure leaves each piece of a file as it was, or as it is to be.
    """
    before = after = size = count = encrypted = 0
    for path in paths:
        mount, _ = find_inode(path)
        for file, inode in _files_of(path):
            done = ask_about_inode(
                mount, "rewrite", RewrittenReport, inode, file, timeout_seconds=_PATIENCE_SECONDS
            )
            before, after = before + done.before_bytes, after + done.after_bytes
            size, count = size + done.size_bytes, count + 1
            encrypted += done.is_encrypted
    if as_json:
        print_json({"files": count, "size_bytes": size, "before_bytes": before,
                    "after_bytes": after, "encrypted_files": encrypted})  # fmt: skip
    else:
        what = f"{counted(count, 'file', 'files')} of {format_size(size)}"
        rest = f"; {_encrypted(encrypted, count)}" if encrypted else ""
        say(f"{what}: {format_size(before)} before, {format_size(after)} now{rest}")


def _encrypted(encrypted: int, count: int) -> str:
    if encrypted == count:
        which = "it is" if count == 1 else "all of them are"
    else:
        which = f"{encrypted} of them {'is' if encrypted == 1 else 'are'}"
    return f"{which} encrypted, and what is encrypted is not compressed"


def _files_of(path: str) -> Iterator[tuple[str, int]]:
    """A file, or the regular files below a directory on the same mount, with their inodes."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        yield path, status.st_ino
        return
    for directory, below, names in os.walk(path):
        below[:] = [name for name in below if _device(directory, name) == status.st_dev]
        for name in names:
            found = os.path.join(directory, name)
            status = os.lstat(found)
            if stat.S_ISREG(status.st_mode):
                yield found, status.st_ino


def _device(directory: str, name: str) -> int:
    return os.lstat(os.path.join(directory, name)).st_dev
