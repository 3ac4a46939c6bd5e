"""The rings of a mount, occupied: the kernel hands the data plane nothing while it is replaced.

The kernel ends requests with ECANCELED that it is just handing to a ring whose process ends. It
hands over nothing while no entry is free. So for a planned end of the data plane, callers on each
CPU fill all entries with requests that only this process can answer, and it answers them
afterwards. Whatever else arrives waits in the kernel.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import trio

from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, WireDoor
from pmemfs.mount.processes import bare_python_words

_CALLERS = "pmemfs.daemons.occupierd"
_PATIENCE_SECONDS = 5


@asynccontextmanager
async def occupied(door: WireDoor, path: str, depth: int) -> AsyncIterator[bool]:
    """Meanwhile all entries of all rings are occupied, `depth` for each CPU; whether that came
    about. `path` lies on the mount. Raises OSError if the callers can't be started.

    A caller whose request a data plane has taken can't be killed before it is answered, so nothing
    here waits long for the callers.
    """
    answer = door.answered[Opcode.STATFS]
    wanted = depth * len(os.sched_getaffinity(0))
    is_full, is_over = trio.Event(), trio.Event()
    held = 0

    async def hold(request: Request) -> Answer:
        nonlocal held
        held += 1
        if held >= wanted:
            is_full.set()
        await is_over.wait()
        later = answer(request)
        return await later if isinstance(later, Coroutine) else later

    words = [*bare_python_words(_CALLERS), path, str(depth)]
    door.answered[Opcode.STATFS] = hold
    callers = None
    try:
        callers = await trio.lowlevel.open_process(words, stdin=subprocess.DEVNULL, cwd="/")
        with trio.move_on_after(_PATIENCE_SECONDS):
            await is_full.wait()
        yield is_full.is_set()
        if is_full.is_set():
            is_over.set()
            with trio.move_on_after(_PATIENCE_SECONDS):
                await callers.wait()
    finally:
        door.answered[Opcode.STATFS] = answer
        is_over.set()
        if callers is not None:
            callers.kill()
