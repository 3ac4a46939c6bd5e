"""The control socket between two who don't trust each other: commands, and what may answer them."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.control_socket import (
    EXTENTS,
    METHODS,
    PAGES,
    SAMPLE,
    STATUS,
    answering,
    exchange,
    in_thread,
    lies_about,
    result,
    saying,
    served,
    with_another,
)
from pmemfs.control import ANSWER_LIMIT_BYTES
from pmemfs.control.client import Question, RemoteError, call, call_all, daemon_pidfd
from pmemfs.control.server import listening, serve
from pmemfs.control.shape import decode
from pmemfs.errors import NoAnswer, PmemfsError
from pmemfs.observe.answers import FileExtents, MountStatus, Pages
from pmemfs.observe.stat import Sample
from pmemfs.version import VERSION

NOBODY = 65534


@pytest.fixture
def path(shm: Path) -> Path:
    directory = shm / "run"
    directory.mkdir(mode=0o700)
    return directory / "0:57.sock"


SENTENCE = "its answer makes no sense"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"7",
        b"[]",
        b'"result"',
        b"{}",
        b'{"result": 1, "error": {}}',
        b'{"error": null}',
        b'{"error": "no"}',
        b'{"error": {"message": 1, "exit_code": 1}}',
        b'{"error": {"message": "no", "exit_code": "1"}}',
        b'{"error": {"message": "no", "exit_code": true}}',
        b'{"result": NaN}',
        b'{"result": [-Infinity]}',
        b'{"result": ' + b"9" * 100_000 + b"}",
        b'{"result": ' + b"[" * 500_000 + b"}",
        b'{"result": ' + b'{"a":' * 200_000 + b"}",
        b"\xff\xfe\x00garbage",
        b"\x00" * 1000,
        b"HTTP/1.1 400 Bad Request",
    ],
    ids=lambda line: repr(line[:30]),
)
def test_an_answer_that_is_none_is_one_sentence(path: Path, line: bytes) -> None:
    with answering(path, saying(line)), pytest.raises(NoAnswer, match=SENTENCE):
        call(path, "info")


REPORTS: dict[type, dict[str, Any]] = {
    MountStatus: STATUS, Sample: SAMPLE, Pages: PAGES, FileExtents: EXTENTS
}  # fmt: skip


@pytest.mark.parametrize("shape", REPORTS)
def test_a_report_with_anything_else_in_any_place_is_refused_or_of_its_type(
    path: Path, shape: type
) -> None:
    assert decode(shape, REPORTS[shape])
    lies = lies_about(REPORTS[shape])
    lines = iter(lies)
    refused = 0
    with answering(path, lambda connection: saying(next(lines))(connection)):
        for _ in lies:
            question = Question(path, os.geteuid(), "info", {})
            (answer,) = call_all([question], partial(decode, shape))
            if isinstance(answer, PmemfsError):
                assert str(answer).count(SENTENCE) == 1
                refused += 1
    # What is left are other values of the right type, and keys whose absence means the default.
    assert refused > len(lies) // 2


def test_the_bucket_of_a_latency_that_cannot_be_is_refused() -> None:
    for bucket in ("120", "-1", "99999999999", "\u0661", "1e3"):
        way = ("workers", 0, "operations", "read", "latencies")
        with pytest.raises(Exception, match=r"bucket|should be"):
            decode(Sample, with_another(SAMPLE, way, {bucket: 1}))


def test_the_exit_code_of_a_failure_is_never_that_of_success(path: Path) -> None:
    for code, expected in ((0, 1), (256, 1), (-1, 1), (1 << 40, 1), (16, 16)):
        line = json.dumps({"error": {"message": "no " * 10_000, "exit_code": code}}).encode()
        path.unlink(missing_ok=True)
        with answering(path, saying(line)), pytest.raises(RemoteError, match=r"^no") as caught:
            call(path, "info")
        assert caught.value.exit_code == expected
        assert len(str(caught.value)) <= 1000


def test_who_hangs_up_before_the_end_of_the_line_has_not_answered(path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b'{"result": 1}')

    with answering(path, answer), pytest.raises(NoAnswer, match="closed the connection"):
        call(path, "info")


def test_an_answer_without_end_takes_bounded_memory(path: Path) -> None:
    sent = []

    def answer(connection: socket.socket) -> None:
        while True:
            sent.append(connection.send(b"x" * 1_000_000))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with answering(path, answer), pytest.raises(NoAnswer, match="longer than"):
        call(path, "info")
    assert sum(sent) < 2 * ANSWER_LIMIT_BYTES
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 8 * ANSWER_LIMIT_BYTES


def trickle(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b" ")
        time.sleep(0.02)


def test_a_byte_now_and_then_does_not_make_more_time(path: Path) -> None:
    with answering(path, trickle), pytest.raises(NoAnswer, match="timed out"):
        call(path, "info", timeout_seconds=0.3)


def test_a_request_that_nobody_reads_is_given_up(path: Path) -> None:
    with answering(path, lambda _: time.sleep(2)), pytest.raises(NoAnswer, match="timed out"):
        call(path, "info", timeout_seconds=0.3, much="x" * 10_000_000)


def test_a_queue_of_connections_that_is_full_is_waited_for_and_given_up(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            with pytest.raises(NoAnswer, match="timed out"):
                call(path, "info", timeout_seconds=0.2)

            def accept_both() -> None:
                listener.accept()[0].close()
                saying(result(7))(listener.accept()[0])

            threading.Timer(0.2, accept_both).start()
            assert call(path, "info") == 7


def test_many_that_say_nothing_are_waited_for_together_and_the_others_are_heard(shm: Path) -> None:
    """Not by a clock: each of the silent ones is let go by the others' being asked."""
    together = threading.Barrier(6)

    def silent(connection: socket.socket) -> None:
        connection.recv(65536)
        together.wait(timeout=30)
        trickle(connection)

    (shm / "run").mkdir(mode=0o700)
    paths = [shm / "run" / f"0:{number}.sock" for number in range(7)]
    with ExitStack() as stack:
        for position, path in enumerate(paths):
            stack.enter_context(answering(path, saying(result(7)) if position == 3 else silent))
        questions = [Question(path, os.geteuid(), "info", {}) for path in paths]
        answers = call_all(questions, lambda value, _: value, timeout_seconds=3)
    assert not together.broken
    assert answers[3] == 7
    others = answers[:3] + answers[4:]
    assert all(isinstance(answer, NoAnswer) and "timed out" in str(answer) for answer in others)


# Whose process answers


def in_child(uid: int, action: Callable[[], None]) -> int:
    """Run something as another user, in a process of its own; its exit code, 0 if all went well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def nobodys(shm: Path) -> Path:
    """A directory that is another user's alone."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    shm.chmod(0o755)
    directory = shm / "nobodys"
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, NOBODY)
    return directory


@contextmanager
def nobody_answering(path: Path, line: bytes) -> Iterator[None]:
    """A process of another user that answers whoever connects; and counts no bytes that it got."""
    ready_read, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with answering(path, saying(line)):
                os.write(ready, b".")
                time.sleep(600)
        finally:
            os._exit(1)
    os.close(ready)
    try:
        assert os.read(ready_read, 1) == b"."
        yield
    finally:
        os.close(ready_read)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_another_users_daemon_is_believed_about_that_users_mounts_alone(nobodys: Path) -> None:
    path = nobodys / "0:57.sock"
    with nobody_answering(path, result({"pid": 1})):
        # Its own word about its process doesn't count: somebody may want to end that.
        assert call(path, "info", owner_uid=NOBODY)["pid"] not in (1, os.getpid())
        with pytest.raises(NoAnswer, match="not belong to user 0"):
            call(path, "info", owner_uid=0)
        assert daemon_pidfd(path, owner_uid=0) is None


def test_a_socket_that_leads_to_somebody_else_is_not_asked(
    nobodys: Path, shm: Path, path: Path
) -> None:
    asked = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(result(7) + b"\n")

    with answering(path, answer):
        (nobodys / "0:57.sock").symlink_to(path)
        os.chown(nobodys / "0:57.sock", NOBODY, NOBODY, follow_symlinks=False)
        with pytest.raises(NoAnswer):
            call(nobodys / "0:57.sock", "info", owner_uid=NOBODY)
        # The socket is given away, but not who listens.
        os.link(path, nobodys / "0:58.sock")
        with pytest.raises(NoAnswer, match="not a socket of user"):
            call(nobodys / "0:58.sock", "info", owner_uid=NOBODY)
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(NoAnswer, match="a process of user 0"):
            call(nobodys / "0:58.sock", "info", owner_uid=NOBODY)
        link = shm / "link"
        link.symlink_to(nobodys)
        with pytest.raises(NoAnswer):
            call(link / "0:58.sock", "info", owner_uid=NOBODY)
    # All of them hang up before they have said what they want.
    assert not any(asked)


def test_a_daemon_answers_its_owner_and_root_and_nobody_else(nobodys: Path) -> None:
    path = nobodys / "0:57.sock"

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            with suppress(BrokenPipeError):
                connection.sendall(b'{"method": "echo"}\n')
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""

    async def main() -> None:
        with trio.fail_after(60), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(16)
            # As where somebody has opened the directory.
            os.chmod(nobodys, 0o711)
            os.chmod(path, 0o777)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, listener, lambda: METHODS)
                assert await trio.to_thread.run_sync(in_child, NOBODY, ask) == 0
                answers = await in_thread(exchange, path, b'{"method": "echo"}\n')
                assert [answer["result"] for answer in answers] == [{}]
                nursery.cancel_scope.cancel()

    trio.run(main)


# What a client can do to a daemon


def patient(path: Path, client: Callable[[Path], Any], seconds: float) -> None:
    """As `served`, with a daemon whose patience ends sooner."""

    async def main() -> None:
        with trio.fail_after(60), listening(path) as (listener, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: serve(listener, lambda: METHODS, patience_seconds=seconds)
                )
                await client(path)
                assert await in_thread(call, path, "echo", alive=True) == {"alive": True}
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_thousand_silent_connections_shut_nobody_out(path: Path) -> None:
    async def client(path: Path) -> None:
        connections = [socket.socket(socket.AF_UNIX) for _ in range(900)]
        for connection in connections:
            await in_thread(connection.connect, str(path))
        assert await in_thread(call, path, "echo", n=1) == {"n": 1}
        # Those that were there first have been let go.
        connections[0].settimeout(60)
        assert await in_thread(connections[0].recv, 1) == b""
        for connection in connections:
            connection.close()

    served(path, client)


def test_a_request_that_never_ends_is_hung_up_on_however_slowly_it_comes(path: Path) -> None:
    async def client(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))

            async def trickle() -> None:
                for _ in range(3000):
                    connection.send(b" ")
                    await trio.sleep(0.01)

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await trickle()

    patient(path, client, seconds=0.2)


def test_who_never_reads_is_hung_up_on(path: Path) -> None:
    async def client(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.settimeout(20)
            line = json.dumps({"method": "echo", "params": {"x": "y" * 50_000}}).encode() + b"\n"

            def send() -> None:
                while True:
                    connection.sendall(line)

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await trio.to_thread.run_sync(send)

    patient(path, client, seconds=0.3)


async def typed(size_bytes: int | None = None) -> Any:
    return size_bytes


@pytest.mark.parametrize("value", ["NaN", "1e400", '"8G"', "[]", "{}", "true", "1.5", str(1 << 70)])
def test_a_parameter_of_another_type_is_not_understood(
    path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "typed", typed)

    async def client(path: Path) -> None:
        line = b'{"method": "typed", "params": {"size_bytes": %s}}\n' % value.encode()
        (answer,) = await in_thread(exchange, path, line)
        assert "does not understand" in answer["error"]["message"]
        assert await in_thread(call, path, "typed", size_bytes=7) == 7

    served(path, client)


async def long(count: int) -> Any:
    return "x" * count


def test_an_answer_that_no_command_would_take_is_not_sent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "long", long)

    async def client(path: Path) -> None:
        with pytest.raises(RemoteError, match="too long"):
            await in_thread(call, path, "long", count=ANSWER_LIMIT_BYTES)
        fits = ANSWER_LIMIT_BYTES - len(json.dumps({"result": "", "version": VERSION}))
        assert len(await in_thread(call, path, "long", count=fits)) == fits

    served(path, client)
