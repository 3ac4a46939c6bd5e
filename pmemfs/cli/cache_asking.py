"""What the commands for caches share: where the cache is, and waiting for what it does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pmemfs.cli.find import ask, find_mount, require_mount
from pmemfs.cli.output import progress_bar
from pmemfs.errors import BadSize, NotACache
from pmemfs.media.cachereport import MOST_DIFFERING, CacheReport, Verified
from pmemfs.mountinfo import Mount
from pmemfs.text import counted
from pmemfs.units import parse_size

if TYPE_CHECKING:
    from pmemfs.observe.answers import MountStatus

PATIENCE_SECONDS = 24 * 3600
"""An origin may be as slow as it likes; Ctrl-C ends the wait."""
_POLL_SECONDS = 0.5
_STEPS = 16
_ALIGNMENT_BYTES = 2 << 20

Answer = TypeVar("Answer")
_RANGE = re.compile(r"([^:]*):([^:]*)")


class _Range(click.ParamType[tuple[int, int | None]]):
    """A range of bytes, A:B, of which either may be left out."""

    name = "range"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        match = _RANGE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"'{value}' is not a range of bytes, such as 0:1G", param, ctx)
        try:
            start, end = (_size(text) for text in match.groups())
        except BadSize as error:
            self.fail(str(error), param, ctx)
        if end is not None and end <= (start or 0):
            self.fail(f"'{value}' ends before it begins", param, ctx)
        return start or 0, end


def _size(text: str) -> int | None:
    if not text:
        return None
    return 0 if text == "0" else parse_size(text)


range_option = click.option(
    "--range", "chosen", type=_Range(), metavar="A:B",
    help="Only blocks that lie whole in these bytes of the origin, such as 0:1G.",
)  # fmt: skip
WHOLE: tuple[int, int | None] = (0, None)


def find_cache(target: str) -> Mount | None:
    """The mount of a cache; None for what is not mounted. Raises NotACache, NotMounted, NoAnswer,
    NotPermitted."""
    mount = find_mount(target)
    if mount is None and os.path.isdir(target):
        mount = require_mount(target)
    if mount is not None:
        from pmemfs.observe.answers import MountStatus

        check_is_cache(ask(mount, "info", MountStatus))
    return mount


def require_cache(target: str) -> Mount:
    """As `find_cache`. Raises NotMounted."""
    return find_cache(target) or require_mount(target)


def check_is_cache(status: MountStatus) -> None:
    """Raise NotACache for a mount of another mode."""
    if status.pool.mode != "cache":
        raise NotACache(path=status.pool.path, mode=status.pool.mode)


def cache_report(mount: Mount) -> CacheReport:
    """The figures of a mounted cache."""
    return ask(mount, "cache-info", CacheReport)


def ask_showing_dirty(mount: Mount, method: str, shape: type[Answer], what: str) -> Answer:
    """Ask for what lets dirty blocks become clean, and show how many there still are.

    Who is interrupted leaves the daemon at it; what is dirty then is written back later.
    """
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            answers.append(ask(mount, method, shape, timeout_seconds=PATIENCE_SECONDS))
        except BaseException as error:
            failures.append(error)

    asking = threading.Thread(target=call, daemon=True)
    with progress_bar(what) as show:
        total = cache_report(mount).dirty
        asking.start()
        while asking.is_alive():
            asking.join(_POLL_SECONDS)
            if asking.is_alive() and total:
                show(max(0, total - cache_report(mount).dirty), total)
    if failures:
        raise failures[0]
    return answers[0]


def parts_of(chosen: tuple[int, int | None], size_bytes: int) -> Iterator[tuple[int, int]]:
    """A range in some parts, as offset and length, so that it can be said how far one is."""
    start, end = chosen[0], min(size_bytes, chosen[1] or size_bytes)
    step = max(_ALIGNMENT_BYTES, -(-(end - start) // _STEPS // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
    while start < end:
        stop = min(end, (start // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES + step)
        yield start, stop - start
        start = stop


def added(one: Verified, other: Verified) -> Verified:
    """What two parts have found."""
    first = sorted((*one.first_differing, *other.first_differing))[:MOST_DIFFERING]
    return Verified(one.compared + other.compared, one.differing + other.differing, tuple(first))


def in_blocks(count: int) -> str:
    """So many blocks."""
    return counted(count, "block", "blocks")
