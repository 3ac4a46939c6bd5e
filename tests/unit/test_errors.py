"""What is said of an error, whichever it is: one sentence, and never that of a group."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import trio

from pmemfs.control import Peer
from pmemfs.control.server import Methods, _Server
from pmemfs.errors import (
    DataPlaneFailed,
    Interrupted,
    NoAnswer,
    SourceBusy,
    cause_of,
    mount_exit_code,
    sentence_of,
    system_error,
)
from pmemfs.fuse.failures import errno_of
from pmemfs.mount.processes import limits_behind


def grouped(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("Exceptions from Trio nursery", errors)


OURS = DataPlaneFailed(why="it was ended by signal SIGKILL")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OURS, str(OURS)),
        (grouped(OURS), str(OURS)),
        (grouped(grouped(system_error(errno.EFBIG)), grouped(ValueError("x"), OURS)), str(OURS)),
        (grouped(ValueError("x"), system_error(errno.EFBIG)), "file too large"),
        (FileNotFoundError(2, os.strerror(2), "/a"), "/a: no such file or directory"),
        (grouped(ValueError("two\nlines")), "ValueError: two lines"),
        (MemoryError(), "MemoryError:"),
    ],
)
def test_an_error_is_one_sentence_and_a_group_is_what_it_is_about(
    error: Exception, sentence: str
) -> None:
    assert sentence_of(error) == sentence


def test_a_group_answers_a_request_as_what_it_is_about() -> None:
    async def fail() -> None:
        raise grouped(NoAnswer(path="x", why="y"))

    answer = trio.run(_answer, b'{"method": "fail"}', lambda: {"fail": fail})
    assert str(NoAnswer(path="x", why="y")).encode() in answer
    assert errno_of(grouped(system_error(errno.ENOSPC)), "fail") == errno.ENOSPC


def test_methods_that_can_not_be_loaded_cost_one_request() -> None:
    def load() -> dict[str, object]:
        raise system_error(errno.EMFILE)

    assert b"the daemon failed; its log says why" in trio.run(_answer, b'{"method": "info"}', load)


def test_what_a_nursery_raises_is_unwrapped() -> None:
    async def fail() -> None:
        raise OURS

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(run)
    assert cause_of(caught.value) is OURS


def test_a_pool_that_somebody_else_has_is_no_limit_of_the_caller() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (min(4000, hard) if hard > 0 else 4000, hard))
    try:
        locked, busy = BlockingIOError(errno.EAGAIN, "locked"), SourceBusy(path="pool", why="it is")
        busy.__cause__ = locked
        assert "ulimit -u" in limits_behind(locked)
        assert limits_behind(busy) == ""
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))


def test_a_command_that_a_signal_ends_answers_like_a_shell() -> None:
    assert mount_exit_code(Interrupted(15)) == 143
    assert "SIGTERM" in str(Interrupted(15))


async def _answer(line: bytes, methods: Methods) -> bytes:
    answer, _ = await _Server(methods, patience_seconds=20)._answer(
        line, Peer(os.getpid(), os.geteuid())
    )
    return answer
