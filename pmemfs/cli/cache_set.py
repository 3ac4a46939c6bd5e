"""`pmemfs cache set`: change the settings of a cache, mounted or not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pmemfs.cli.cache_asking import find_cache
from pmemfs.cli.cache_settings import settings_options
from pmemfs.cli.find import ask
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_facts, print_json
from pmemfs.cli.paths import ANY_PATH
from pmemfs.media.cachereport import CacheSettings
from pmemfs.units import format_size


@click.command("set")
@click.argument("target", metavar="{MOUNTPOINT|POOL}", type=ANY_PATH)
@settings_options
@reporting
def cache_set(target: str, as_json: bool, **settings: Any) -> None:
    """Change the settings of a cache, and show them.

    They are stored in the pool, so later mounts have them, too. Without an option nothing is
    changed. What is dirty under write-back stays dirty under another policy until it is due, or
    until 'pmemfs flush'.
    """
    changes = {name: value for name, value in settings.items() if value is not None}
    mount = find_cache(target)
    if mount:
        now = ask(mount, "cache-set", CacheSettings, **changes)
    else:
        from pmemfs.cli.unmounted import set_unmounted
        from pmemfs.media.cache import Policy

        words = {policy.word: int(policy) for policy in Policy}
        if "policy" in changes:
            changes["policy"] = words[changes["policy"]]
        now = set_unmounted(target, changes)
    if as_json:
        print_json(asdict(now))
    else:
        print_facts(settings_facts(now))


def settings_facts(settings: CacheSettings) -> list[tuple[str, object]]:
    """Names and values, for people."""
    age, ahead, bypass = (
        settings.max_dirty_age_seconds, settings.read_ahead_bytes, settings.bypass_bytes,
    )  # fmt: skip
    return [
        ("policy", settings.policy),
        ("max dirty", f"{settings.max_dirty_percent} % of the blocks, "
                      + (f"{age} s old" if age else "of any age")),
        ("origin timeout", f"{settings.origin_timeout_seconds} s"),
        ("read ahead", format_size(ahead) if ahead else "nothing"),
        ("bypass", f"sequential reads above {format_size(bypass)}" if bypass else "nothing"),
    ]  # fmt: skip
