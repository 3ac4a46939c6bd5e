"""What becomes of work for the origin when whoever asked for it has given up."""

from __future__ import annotations

import pytest
import trio

from pmemfs.volume.cache.errands import Errands
from pmemfs.volume.cache.link import OriginLink


def test_an_errand_that_was_given_up_changes_nothing_later() -> None:
    done: list[str] = []

    async def main() -> None:
        errands = Errands(OriginLink(None, timeout_seconds=0.01))
        has_answered, is_over = trio.Event(), trio.Event()

        async def store_later() -> None:
            try:
                with trio.CancelScope(shield=True):
                    # A call of the origin, which nothing ends.
                    await has_answered.wait()
                done.append("answered")
                await trio.lowlevel.checkpoint()
                done.append("stored")
            finally:
                is_over.set()

        async with trio.open_nursery() as nursery:
            errands.nursery = nursery
            with pytest.raises(OSError, match="took longer"):
                await errands.run(store_later)
            has_answered.set()
            await is_over.wait()

    trio.run(main)
    assert done == ["answered"]
