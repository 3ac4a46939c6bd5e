"""The control socket: whatever is sent to it, the daemon answers or hangs up, and lives."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

import pytest
import trio

from kit.control_socket import exchange, in_thread, served
from pmemfs.control.client import RemoteError, call, daemon_pidfd
from pmemfs.control.server import listening
from pmemfs.errors import EXIT_BUSY, NoAnswer, NoControlSocket


@pytest.fixture
def path(shm: Path) -> Path:
    directory = shm / "run"
    directory.mkdir(mode=0o700)
    return directory / "0:57.sock"


def test_a_method_answers_with_its_parameters(path: Path) -> None:
    async def client(path: Path) -> None:
        assert await in_thread(call, path, "echo", words=["é", 1, None]) == {
            "words": ["é", 1, None]
        }

    served(path, client)


def test_an_answer_that_json_cannot_say_is_a_failure_of_that_request_alone(path: Path) -> None:
    async def client(path: Path) -> None:
        with pytest.raises(RemoteError, match="its log says why"):
            await in_thread(call, path, "unspeakable")

    served(path, client)


def test_an_error_of_ours_arrives_with_its_own_sentence_and_exit_code(path: Path) -> None:
    async def client(path: Path) -> None:
        with pytest.raises(RemoteError, match=r"^/dev/pmem0 is in use: it is ours$") as caught:
            await in_thread(call, path, "busy")
        assert caught.value.exit_code == EXIT_BUSY

    served(path, client)


def test_a_bug_is_logged_there_and_a_sentence_here(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def client(path: Path) -> None:
        with pytest.raises(RemoteError, match="the daemon failed; its log says why"):
            await in_thread(call, path, "bug", secret="a passphrase")

    served(path, client)
    assert "a bug" in caplog.text
    assert "request bug failed" in caplog.text
    assert "a passphrase" not in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"echo"',
        b"{}",
        b'{"method": "unknown"}',
        b'{"method": ["echo"]}',
        b'{"method": {}}',
        b'{"method": "echo", "params": 1}',
        b'{"method": "echo", "params": [1]}',
        b'{"method": "busy", "params": {"no": "such"}}',
        b"\xff\xfe\x00garbage",
        b"GET / HTTP/1.1",
        b"[" * 60_000,
        b'{"method": "__class__"}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_request_that_makes_no_sense_is_answered_with_a_sentence(path: Path, line: bytes) -> None:
    async def client(path: Path) -> None:
        (answer,) = await in_thread(exchange, path, line + b"\n")
        assert answer["error"]["exit_code"] == 1
        assert "does not understand" in answer["error"]["message"] or (
            line.startswith(b"[[") and "failed" in answer["error"]["message"]
        )

    served(path, client)


def test_a_line_without_an_end_is_hung_up_on(path: Path) -> None:
    async def client(path: Path) -> None:
        assert await in_thread(exchange, path, b"x" * 3_000_000) == []

    served(path, client)


def test_several_requests_on_one_connection_are_answered_in_order(path: Path) -> None:
    async def client(path: Path) -> None:
        lines = b"".join(
            b'{"method": "echo", "params": {"n": %d}}\n' % number for number in range(50)
        )
        answers = await in_thread(exchange, path, lines, lines=50)
        assert [answer["result"]["n"] for answer in answers] == list(range(50))

    served(path, client)


def test_who_hangs_up_early_harms_nobody(path: Path) -> None:
    async def client(path: Path) -> None:
        for sent in (
            b"",
            b'{"method"',
            b'{"method": "echo", "params": {"x": "' + b"y" * 50_000 + b'"}}\n',
        ):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(sent)
            await trio.sleep(0.02)

    served(path, client)


def test_many_clients_are_served_at_once(path: Path) -> None:
    async def client(path: Path) -> None:
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(path))
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(in_thread, lambda n=number: call(path, "echo", n=n))
        silent.close()

    served(path, client)


def test_nobody_there_is_no_answer(path: Path) -> None:
    with pytest.raises(NoAnswer, match="does not answer") as caught:
        call(path, "echo")
    assert caught.value.errno == errno.ETIMEDOUT
    assert daemon_pidfd(path) is None


def test_a_daemon_that_says_nothing_is_not_waited_for_forever(
    path: Path,
) -> None:
    with listening(path), pytest.raises(NoAnswer, match="timed out"):
        call(path, "echo", timeout_seconds=0.05)


def test_the_socket_goes_with_the_daemon(path: Path) -> None:
    with listening(path):
        assert stat.S_ISSOCK(path.stat().st_mode)
        pidfd = daemon_pidfd(path)
        assert pidfd is not None
        os.close(pidfd)
    assert not path.exists()


def test_the_socket_of_the_next_daemon_stays_when_the_one_before_ends(path: Path) -> None:
    with contextlib.ExitStack() as next_one:
        with listening(path):
            next_one.enter_context(listening(path))
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


def test_the_socket_of_a_dead_daemon_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def client(path: Path) -> None:
        assert await in_thread(call, path, "echo") == {}

    served(path, client)


def test_a_directory_that_others_can_write_to_is_refused(path: Path) -> None:
    path.parent.chmod(0o777)
    with pytest.raises(NoControlSocket, match="does not belong to user"), listening(path):
        pytest.fail("it listens where anybody can put a socket")
    path.parent.rmdir()
    path.parent.symlink_to("/tmp")
    with pytest.raises(NoControlSocket), listening(path):
        pytest.fail("it followed a link")


def test_a_daemon_that_ends_leaves_the_socket_of_the_next_one(tmp_path: Path) -> None:
    """On a file system that gives inode numbers out again at once, such as ext4, as /tmp may be."""
    path = tmp_path / "0:57.sock"
    with contextlib.ExitStack() as second:
        with listening(path) as (first, _):
            # As trio does when serving ends: from here on nothing else holds the inode.
            first.close()
            second.enter_context(listening(path))
        assert path.is_socket()
    assert not path.exists()
