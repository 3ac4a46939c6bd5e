"""`pmemfs cache drop`: let a cache forget blocks."""

from __future__ import annotations

from dataclasses import asdict

import click

from pmemfs.cli.cache_asking import (
    PATIENCE_SECONDS,
    WHOLE,
    ask_showing_dirty,
    cache_report,
    find_cache,
    in_blocks,
    parts_of,
    range_option,
)
from pmemfs.cli.find import ask
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, progress_bar, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import BadUsage
from pmemfs.media.cachereport import Dropped, Flushed
from pmemfs.mountinfo import Mount


@click.command("drop")
@click.argument("target", metavar="{MOUNTPOINT|POOL}", type=ANY_PATH)
@range_option
@click.option("--clean-only", is_flag=True, help="Leave dirty blocks alone.")
@click.option(
    "--discard-dirty",
    is_flag=True,
    help="Lose what the origin lacks. Only of a pool that is not mounted.",
)
@reporting
def cache_drop(
    target: str,
    chosen: tuple[int, int | None] | None,
    clean_only: bool,
    discard_dirty: bool,
    as_json: bool,
) -> None:
    """Let a cache forget blocks, so that they are read from the origin again.

    The origin is given all dirty blocks first; if that fails, nothing is forgotten.

    A pool that is not mounted, without --range, is emptied, and takes the origin as it is by then:
    one that somebody else has written to meanwhile, or another one of the same name. If its dirty
    blocks can't be given to the origin, that is refused (exit code 3), unless --discard-dirty lets
    them be lost.
    """
    _check_usage(chosen, clean_only, discard_dirty)
    mount = find_cache(target)
    if mount:
        if discard_dirty:
            raise BadUsage(why="--discard-dirty would change what programs have just read: "
                           "unmount it first")  # fmt: skip
        dropped = _drop_mounted(mount, target, chosen or WHOLE, clean_only=clean_only)
    else:
        from pmemfs.cli.unmounted import drop_all, drop_unmounted

        dropped = (
            drop_all(target, discard_dirty=discard_dirty)
            if chosen is None and not clean_only
            else drop_unmounted(target, chosen or WHOLE, clean_only=clean_only)
        )
    if as_json:
        print_json(asdict(dropped))
    else:
        kept = (
            f"; {in_blocks(dropped.kept_dirty)} are dirty, and stay" if dropped.kept_dirty else ""
        )
        say(f"{target}: {in_blocks(dropped.dropped)} dropped{kept}")


def _check_usage(
    chosen: tuple[int, int | None] | None, clean_only: bool, discard_dirty: bool
) -> None:
    if discard_dirty and (clean_only or chosen):
        other = "--clean-only" if clean_only else "--range"
        raise BadUsage(why=f"--discard-dirty empties the whole pool: give it or {other}")


def _drop_mounted(
    mount: Mount, target: str, chosen: tuple[int, int | None], *, clean_only: bool
) -> Dropped:
    if not clean_only:
        ask_showing_dirty(mount, "cache-flush", Flushed, target)
    size_bytes, dropped, kept = cache_report(mount).origin.size_bytes, 0, 0
    with progress_bar(target) as show:
        for offset, length in parts_of(chosen, size_bytes):
            part = ask(mount, "cache-drop", Dropped, timeout_seconds=PATIENCE_SECONDS,
                       offset_bytes=offset, length_bytes=length)  # fmt: skip
            dropped, kept = dropped + part.dropped, kept + part.kept_dirty
            show(offset + length, size_bytes)
    return Dropped(dropped, kept)
