"""Opens the origin of a pool, and makes sure that it is the one that the pool caches.

A pool is never used before another origin, nor before one that was written to since, as far as its
kind lets one know that. What can be known of which kind stands in docs/origins.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from pmemfs.errors import WrongOrigin
from pmemfs.media.cache import HEAD, CacheHead
from pmemfs.origin.base import MARK_BYTES, Identity, Left, Origin, say_nothing
from pmemfs.origin.opening import open_origin
from pmemfs.units import format_size
from pmemfs.volume.cache.link import OriginLink, watched

log = logging.getLogger(__name__)

_END_SECONDS = 0.5
"""Nothing is lost if the first question is cut."""
UNKNOWN_MARK = bytes(MARK_BYTES)
FORGETTING_MARK = b"\xff" * MARK_BYTES
"""No origin has it: it stands in the head while a cache is being emptied."""


def identity_text(identity: Identity) -> str:
    """An identity as the head stores it: a checksum of what has no room there or is not text."""
    text = f"{identity.kind}:{identity.text}"
    raw = text.encode("utf-8", "surrogateescape")
    if text.isprintable() and len(raw) <= HEAD.room_of("origin_identity"):
        return text
    return f"{identity.kind}:sha256 {hashlib.sha256(raw).hexdigest()}"


async def open_right_origin(
    head: CacheHead, pool_path: str, *, read_only: bool,
    say: Callable[[str], None] = say_nothing, give_up: Callable[[str], None] = say_nothing,
    left: Left | None = None, opened: Callable[[Origin], None] = lambda origin: None,
) -> Origin:  # fmt: skip
    """The origin of a cache, fenced; `say` is told what this waits for, `give_up` as in
    `OriginLink`, `left` as in `open_origin`. `opened` is called with it before it is fenced.

    Raises WrongOrigin, and as `open_origin` and `fence`.
    """

    def tell(sentence: str) -> None:
        log.info("%s", sentence)
        say(sentence)

    origin = await open_origin(head.origin, read_only=read_only, left=left)
    try:
        opened(origin)
        if not read_only:
            await origin.fence(tell)
        link = OriginLink(origin, timeout_seconds=head.origin_timeout_seconds)
        link.give_up, link.end_seconds = give_up, _END_SECONDS
        async with watched(link):
            await _check_origin(head, origin, link, pool_path)
    except BaseException:
        await origin.close()
        raise
    return origin


async def _check_origin(
    head: CacheHead, origin: Origin, link: OriginLink, pool_path: str
) -> None:  # fmt: skip
    """Raise WrongOrigin unless an origin is what a cache says of it."""
    identity = await origin.identity()
    found = identity_text(identity)
    if head.origin_identity and found != head.origin_identity:
        raise WrongOrigin(
            name=origin.name, path=pool_path,
            why=f"it is another one ({found}, and the pool caches {head.origin_identity})",
        )  # fmt: skip
    if origin.size_bytes < head.origin_bytes:
        raise WrongOrigin(
            name=origin.name, path=pool_path,
            why=f"it has become smaller: {format_size(origin.size_bytes)} instead of "
            f"{format_size(head.origin_bytes)}",
        )  # fmt: skip
    if head.origin_mark == FORGETTING_MARK:
        raise WrongOrigin(name=origin.name, path=pool_path,
                          why="a 'pmemfs cache drop' was ended before it was done")  # fmt: skip
    marks = _possible_marks(head)
    if marks and await link.mark() not in marks:
        raise WrongOrigin(
            name=origin.name,
            path=pool_path,
            why="somebody has written to it since the pool was last mounted",
        )


async def marks_to_note(origin: Origin) -> dict[str, bytes]:
    """What the head has to say of the marks before a mount that has this origin changes it."""
    following = await origin.next_mark()
    if following is None:
        return {"origin_next_mark": bytes(MARK_BYTES)}
    return {"origin_mark": await origin.mark(), "origin_next_mark": following}


def _possible_marks(head: CacheHead) -> list[bytes]:
    """The marks that an origin has if nobody else has written to it; empty if that isn't known."""
    if head.is_settled:
        return [head.origin_mark] if any(head.origin_mark) else []
    # The mount was killed, before its first change of the origin or after it.
    return [head.origin_mark, head.origin_next_mark] if any(head.origin_next_mark) else []
