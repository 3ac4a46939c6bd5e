"""A data plane that refuses writes, as after a remount to read-only: also what was under way."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from kit.data_plane import InProcess, in_process
from pmemfs.dataplane.native import store_word


def set_section(engine: InProcess, value: int) -> None:
    """Let the first worker be in a section (odd) or not."""
    at = engine.shared._slot_offset(0, "section")
    store_word(engine.shared.memory, at, value)


def test_a_worker_refuses_writes_until_they_are_accepted_again(shm: Path) -> None:
    with in_process(shm) as (_, engine):
        engine.write(0, b"before")
        trio.run(engine.control.refuse_writes)
        with pytest.raises(OSError, match="refused to write") as caught:
            engine.write(0, b"behind")
        assert caught.value.errno == errno.EROFS
        assert (engine.read(0, 6), engine.forwarded) == (b"before", 0)
        engine.control.accept_writes()
        engine.write(0, b"behind")
        assert engine.read(0, 6) == b"behind"


def test_a_request_under_way_is_over_when_writes_are_refused(shm: Path) -> None:
    async def refuse(engine: InProcess) -> None:
        async with trio.open_nursery() as nursery:
            over = trio.Event()

            async def refuse() -> None:
                await engine.control.refuse_writes()
                over.set()

            nursery.start_soon(refuse)
            await trio.sleep(0.05)
            assert not over.is_set()
            assert engine.shared.header_word("read_only") == 1
            set_section(engine, 2)
            await over.wait()

    with in_process(shm) as (_, engine):
        set_section(engine, 1)
        trio.run(refuse, engine)
