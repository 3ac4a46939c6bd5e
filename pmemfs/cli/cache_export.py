"""`pmemfs cache export`: save what only a cache has, where its origin is lost."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from pmemfs.cli.cache_asking import find_cache, in_blocks
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import BadUsage, SourceBusy
from pmemfs.text import counted


@click.command("export")
@click.argument("pool", type=ANY_PATH)
@click.argument("target", metavar="{DIRECTORY|FILE}", type=ANY_PATH)
@click.option(
    "--onto",
    is_flag=True,
    help="FILE exists, or is a device: write the dirty blocks into it, in place.",
)
@reporting
def cache_export(pool: str, target: str, onto: bool, as_json: bool) -> None:
    """Save the dirty blocks of a pool whose origin is lost.

    A new FILE (in DIRECTORY: NAME.dirty) is as large as the origin, and sparse: it has the dirty
    blocks where they belong, and holes elsewhere. FILE.ranges lists them, a range a line: offset,
    length, and 'data' or 'zero' for what was discarded.

    With --onto, a backup of the origin is given the blocks and then has what the mount had. It has
    to be as large as the origin.

    The pool must not be mounted. Nothing in it is changed, and its origin is not asked for.
    """
    mount = find_cache(pool)
    if mount:
        why = f"mounted on {mount.mountpoint}; unmount it, then export what is dirty"
        raise SourceBusy(path=mount.source, why=why)
    path = _target(pool, target, onto)
    from pmemfs.cli.unmounted import export_unmounted

    exported = export_unmounted(pool, path, is_new=not onto)
    if as_json:
        print_json(asdict(exported))
        return
    listed = f", listed in {exported.ranges_path}" if exported.ranges_path else ""
    ranges = counted(exported.ranges, "range", "ranges")
    say(f"{path}: {in_blocks(exported.blocks)} in {ranges}{listed}")


def _target(pool: str, target: str, onto: bool) -> str:
    """The file to write. Raises BadUsage."""
    if not target:
        raise BadUsage(why="the file to write to has no name")
    if onto:
        if not os.path.exists(target) or os.path.isdir(target):
            raise BadUsage(why=f"--onto writes into a file that is there, and {target} is none")
        if os.path.exists(pool) and os.path.samefile(pool, target):
            raise BadUsage(why=f"{target} is the pool itself")
        return target
    if os.path.isdir(target):
        target = os.path.join(target, f"{os.path.basename(os.path.abspath(pool))}.dirty")
    if os.path.lexists(target):
        raise BadUsage(why=f"{target} exists; --onto writes into it, or take another name")
    return target
