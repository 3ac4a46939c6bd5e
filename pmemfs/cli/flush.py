"""`pmemfs flush`: give the origin of a cache all that only the cache has."""

from __future__ import annotations

from dataclasses import asdict

import click

from pmemfs.cli.cache_asking import ask_showing_dirty, find_cache, in_blocks
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.media.cachereport import Flushed


@click.command()
@click.argument("target", metavar="{MOUNTPOINT|POOL}", type=ANY_PATH)
@reporting
def flush(target: str, as_json: bool) -> None:
    """Give the origin of a cache all that only the cache has.

    Afterwards the origin is what it would be without the cache, byte for byte, and durable. A pool
    that is not mounted is flushed as well, also one whose daemon was killed. In a mount, what is
    written meanwhile may be dirty again. The blocks stay in the cache, and are clean.

    If the origin fails, the exit code is 1, and what it lacks stays dirty. The same is true if
    Ctrl-C ends the command.
    """
    mount = find_cache(target)
    if mount:
        flushed = ask_showing_dirty(mount, "cache-flush", Flushed, target)
    else:
        from pmemfs.cli.unmounted import flush_unmounted

        flushed = flush_unmounted(target)
    if as_json:
        print_json(asdict(flushed))
    elif flushed.dirty:
        say(f"{target}: the origin got {in_blocks(flushed.cleaned)}; "
            f"{in_blocks(flushed.dirty)} became dirty meanwhile")  # fmt: skip
    else:
        say(f"{target}: the origin is complete, and got {in_blocks(flushed.cleaned)}")
