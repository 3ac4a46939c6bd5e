"""`pmemfs cache verify`: compare what a cache has with its origin."""

from __future__ import annotations

from dataclasses import asdict

import click

from pmemfs.cli.cache_asking import (
    PATIENCE_SECONDS,
    WHOLE,
    added,
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
from pmemfs.errors import EXIT_INVALID_POOL
from pmemfs.media.cachereport import Verified
from pmemfs.mountinfo import Mount


@click.command("verify")
@click.argument("target", metavar="{MOUNTPOINT|POOL}", type=ANY_PATH)
@range_option
@reporting
def cache_verify(target: str, chosen: tuple[int, int | None] | None, as_json: bool) -> int:
    """Compare the clean blocks of a cache with its origin.

    They differ if somebody else has written to the origin, or if one of the two has lost something.
    Dirty blocks are not compared, since the origin lacks them. Nothing is written, and a mount goes
    on serving. 'pmemfs cache drop' forgets what differs.

    Exit codes: 0 all are the same, 1 it could not be done, 2 bad usage, 4 some differ.
    """
    mount = find_cache(target)
    if mount:
        found = _verify_mounted(mount, target, chosen or WHOLE)
    else:
        from pmemfs.cli.unmounted import verify_unmounted

        found = verify_unmounted(target, chosen or WHOLE)
    if as_json:
        print_json(asdict(found))
    elif found.differing:
        places = ", ".join(map(str, found.first_differing))
        more = ", …" if found.differing > len(found.first_differing) else ""
        say(f"{target}: {found.differing} of {in_blocks(found.compared)} differ from the origin: "
            f"at {places}{more}")  # fmt: skip
    else:
        say(f"{target}: {in_blocks(found.compared)} compared, all as the origin has them")
    return EXIT_INVALID_POOL if found.differing else 0


def _verify_mounted(mount: Mount, target: str, chosen: tuple[int, int | None]) -> Verified:
    size_bytes, found = cache_report(mount).origin.size_bytes, Verified(0, 0, ())
    with progress_bar(target) as show:
        for offset, length in parts_of(chosen, size_bytes):
            part = ask(mount, "cache-verify", Verified, timeout_seconds=PATIENCE_SECONDS,
                       offset_bytes=offset, length_bytes=length)  # fmt: skip
            found = added(found, part)
            show(offset + length, size_bytes)
    return found
