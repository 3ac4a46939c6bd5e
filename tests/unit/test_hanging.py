"""A data plane that makes no progress is told from one that has nothing to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from kit.pools import mapped_pool
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.sharing import share_pool
from pmemfs.fuse.hanging import _LOOKS_AT_START, PlaneWatch
from pmemfs.fuse.notices import Notices
from pmemfs.fuse.planes import PlaneProcess
from pmemfs.media.label import Scheme
from pmemfs.units import KIB

WORKERS = 2
MANY = 12


class Watched:
    """A process that is watched, and that which it has to do: notices and sections."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.notices = Notices(ours)
        self.child = subprocess.Popen(["sleep", "1000"])
        self.plane = SimpleNamespace(process=self.process(), is_ready=True)
        self.watch = PlaneWatch("pool", shared, self.notices, self.plane)  # type: ignore[arg-type]

    def process(self) -> PlaneProcess:
        return PlaneProcess(self.child.pid, os.pidfd_open(self.child.pid), self.child)

    def set_section(self, worker: int, word: int) -> None:
        self.shared._set_slot_word(worker, "section", word)

    async def look(self, *, answers: bool = True) -> str | None:
        """Look once, after the process has answered what it was asked."""
        while answers:
            try:
                self.theirs.send(self.theirs.recv(512)[:8] + bytes(8))
            except BlockingIOError:
                break
        await trio.testing.wait_all_tasks_blocked()
        return self.watch.look()

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        self.plane.process.close()


@pytest.fixture
def watched(shm: Path) -> Iterator[Watched]:
    with mapped_pool(shm, Scheme.NONE, 4 * KIB) as pool:
        watched = Watched(share_pool(pool, worker_count=WORKERS))
        yield watched
        watched.end()


def looks(watched: Watched, count: int, words: list[list[int]], *, answers: bool = True) -> list[
    str | None
]:  # fmt: skip
    """What so many looks find, while the sections of workers have these words in turn."""

    async def look() -> list[str | None]:
        found = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.notices.serve)
            for number in range(count):
                for worker, word in enumerate(words[number % len(words)]):
                    watched.set_section(worker, word)
                found.append(await watched.look(answers=answers))
            nursery.cancel_scope.cancel()
        return found

    return trio.run(look)


def test_workers_that_sleep_make_no_progress_and_need_not(watched: Watched) -> None:
    assert looks(watched, MANY, [[0, 0], [4, 8]]) == [None] * MANY


def test_workers_that_serve_one_request_after_another_are_left_alone(watched: Watched) -> None:
    assert looks(watched, MANY, [[1, 3], [3, 5], [5, 7]]) == [None] * MANY


def test_a_request_that_lasts_is_found(watched: Watched) -> None:
    found = looks(watched, 5, [[2, 7]])
    assert found == [*[None] * 4, "a request of worker 1"]


def test_a_process_that_does_nothing_it_is_asked_for_is_found(watched: Watched) -> None:
    found = looks(watched, 6, [[0, 0]], answers=False)
    assert found == [*[None] * 4, "the threads", "the threads"]
    assert looks(watched, 1, [[0, 0]]) == [None]


def test_what_another_process_has_left_undone_is_not_held_against_the_next(
    watched: Watched,
) -> None:
    assert looks(watched, 4, [[1, 0]], answers=False) == [None] * 4
    watched.end()
    watched.child = subprocess.Popen(["sleep", "1000"])
    watched.plane.process = watched.process()
    assert looks(watched, 4, [[1, 0]], answers=False) == [None] * 4


def test_a_process_that_starts_is_not_looked_at_before_it_is_ready(watched: Watched) -> None:
    watched.plane.is_ready = False
    assert looks(watched, MANY, [[1, 1]], answers=False) == [None] * MANY
    assert MANY < _LOOKS_AT_START
    watched.plane.is_ready = True
    assert looks(watched, 5, [[1, 1]]) == [*[None] * 4, "a request of worker 0"]
    # Threads that end are not awaited a second time.
    watched.plane.is_ready = False
    assert looks(watched, 1, [[1, 1]]) == ["a request of worker 0"]


def test_a_process_that_never_gets_ready_is_found(watched: Watched) -> None:
    watched.plane.is_ready = False
    found = looks(watched, _LOOKS_AT_START + 5, [[0, 0]], answers=False)
    assert found == [*[None] * (_LOOKS_AT_START + 4), "the threads"]


def test_what_hangs_is_killed(watched: Watched) -> None:
    watched.set_section(0, 1)

    async def watch() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.notices.serve)
            nursery.start_soon(watched.watch.watch, 1)
            await trio.lowlevel.wait_readable(watched.plane.process.pidfd)
            nursery.cancel_scope.cancel()

    trio.run(watch)
    assert watched.plane.process.status() == -signal.SIGKILL
