"""A daemon dies while it is asked, and another one takes its place on the same socket.

Daemons are processes here. This process holds the socket as a keeper does, and starts them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.processes import wait_until
from pmemfs.control import WithDescriptors
from pmemfs.control.channel import Channel
from pmemfs.control.client import MOST_DEATHS, Question, call, call_all, daemon_pidfd
from pmemfs.control.server import listening, listening_again, serve
from pmemfs.errors import NoAnswer


async def info() -> dict[str, Any]:
    return {"pid": os.getpid(), "is": "alive"}


async def echo(word: str) -> str:
    return word


async def die(word: str = "") -> None:
    os._exit(1)


async def die_once(flag: str) -> WithDescriptors:
    """Answer whoever asks after a death."""
    with suppress(FileExistsError):
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        os._exit(1)
    return WithDescriptors({"pid": os.getpid()}, [os.open(os.devnull, os.O_RDONLY)])


METHODS = {"info": info, "echo": echo, "die": die, "die_once": die_once}


class Daemons:
    """One daemon after the other on one socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with listening(path) as (listener, name_fd):
            self.listener, self.name_fd = listener.dup(), os.dup(name_fd)
            # The name is removed by daemons only.
            os.link(path, self._kept)
        os.rename(self._kept, path)
        self.pid = 0
        self.count = 0

    @property
    def _kept(self) -> Path:
        return self.path.with_name("kept")

    def start(self) -> int:
        """Start a daemon, which adopts the socket."""
        # It serves only once it is counted: whoever has its answer looks at `pid` and `count`.
        counted, close_counts = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                os.close(close_counts)
                os.read(counted, 1)
                os.close(counted)
                with suppress(KeyboardInterrupt):
                    self._serve()
                code = 0
            finally:
                os._exit(code)
        self.pid = pid
        self.count += 1
        os.close(counted)
        os.close(close_counts)
        return pid

    def _serve(self) -> None:
        async def main() -> None:
            with listening_again(self.listener.detach(), self.name_fd, self.path) as (listener, _):
                await serve(listener, lambda: METHODS)

        trio.run(main)

    def keep(self) -> None:
        """Start another one whenever one dies."""
        while os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 1:
            self.start()

    def kill(self) -> None:
        """The daemon dies, and no other one comes yet."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        """The daemon that lives ends in order."""
        os.kill(self.pid, signal.SIGINT)

    def close(self) -> None:
        """Leave the socket to the daemon that lives."""
        self.listener.close()
        os.close(self.name_fd)


@pytest.fixture
def daemons(shm: Path) -> Iterator[Daemons]:
    shm.chmod(0o700)
    with kept(shm / "control") as made:
        yield made


@contextmanager
def kept(path: Path) -> Iterator[Daemons]:
    daemons = Daemons(path)
    daemons.start()
    assert call(path, "echo", word="a") == "a"
    thread = threading.Thread(target=daemons.keep)
    thread.start()
    yield daemons
    daemons.end()
    thread.join()
    daemons.close()


def ask_by_call(path: Path, method: str, **params: Any) -> Any:
    return call(path, method, **params)


def ask_by_channel(path: Path, method: str, **params: Any) -> Any:
    result, descriptors = Channel(path).ask(method, **params)
    for fd in descriptors:
        os.close(fd)
    return result


WAYS = pytest.mark.parametrize("ask", [ask_by_call, ask_by_channel])


@WAYS
def test_who_was_not_answered_is_answered_by_the_next_daemon(
    daemons: Daemons, shm: Path, ask: Callable[..., Any]
) -> None:
    assert ask(daemons.path, "die_once", flag=str(shm / "flag"))["pid"] == daemons.pid
    assert daemons.count == 2


def test_a_connection_that_was_open_leads_to_the_next_daemon(daemons: Daemons) -> None:
    channel = Channel(daemons.path)
    assert channel.ask("echo", word="one") == ("one", [])
    first = daemons.pid
    with suppress(NoAnswer):
        call(daemons.path, "die")
    assert channel.ask("echo", word="two") == ("two", [])
    assert daemons.pid != first
    channel.close()


@WAYS
def test_a_question_that_every_daemon_dies_of_is_given_up(
    daemons: Daemons, ask: Callable[..., Any]
) -> None:
    with pytest.raises(NoAnswer, match="it closed the connection"):
        ask(daemons.path, "die")
    assert ask(daemons.path, "echo", word="b") == "b"
    assert daemons.count == 1 + MOST_DEATHS


def test_many_questions_are_all_answered(daemons: Daemons, shm: Path) -> None:
    questions = [
        Question(daemons.path, os.geteuid(), *words)
        for words in [("die_once", {"flag": str(shm / "flag")}), *[("echo", {"word": "w"})] * 20]
    ]
    answers = call_all(questions, lambda result, _: result)
    assert answers[1:] == ["w"] * 20
    assert isinstance(answers[0], dict)


def test_an_answer_names_the_process_that_lives(shm: Path) -> None:
    shm.chmod(0o700)
    daemons = Daemons(shm / "control")
    daemons.start()
    assert call(daemons.path, "echo", word="a") == "a"
    daemons.kill()
    answers: list[Any] = []
    # It connects to a socket that a dead process has listened on.
    asking = threading.Thread(target=lambda: answers.append(call(daemons.path, "info")))
    asking.start()
    wait_until(lambda: _waits(daemons.listener), "a connection waits")
    daemons.start()
    asking.join()
    assert answers == [{"pid": daemons.pid, "is": "alive"}]
    daemons.end()
    os.waitpid(daemons.pid, 0)


def _waits(listener: socket.socket) -> bool:
    """Whether a connection waits for somebody to accept it."""
    return bool(select.select([listener], [], [], 0)[0])


def test_who_wants_to_wait_for_the_end_waits_for_the_next_daemon(shm: Path) -> None:
    shm.chmod(0o700)
    daemons = Daemons(shm / "control")
    daemons.start()
    assert call(daemons.path, "echo", word="a") == "a"
    daemons.kill()
    found: list[int | None] = []
    waiting = threading.Thread(target=lambda: found.append(daemon_pidfd(daemons.path)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    daemons.start()
    waiting.join()
    (pidfd,) = found
    assert pidfd is not None
    assert f"Pid:\t{daemons.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    os.close(pidfd)
    daemons.end()
    os.waitpid(daemons.pid, 0)


@WAYS
def test_where_no_other_daemon_comes_the_answer_is_no_answer(
    shm: Path, ask: Callable[..., Any]
) -> None:
    shm.chmod(0o700)
    daemons = Daemons(shm / "control")
    daemons.start()
    daemons.close()
    assert ask(daemons.path, "echo", word="a") == "a"
    with pytest.raises(NoAnswer):
        ask(daemons.path, "die")
    assert daemon_pidfd(daemons.path) is None
    os.waitpid(daemons.pid, 0)


def test_the_last_daemon_removes_the_name_of_the_socket(shm: Path) -> None:
    shm.chmod(0o700)
    with kept(shm / "control") as daemons:
        with suppress(NoAnswer):
            call(daemons.path, "die")
        assert call(daemons.path, "echo", word="c") == "c"
    assert not daemons.path.exists()


def test_a_successor_leaves_the_socket_of_another_mount_that_has_the_number_now(shm: Path) -> None:
    shm.chmod(0o700)
    path = shm / "control"
    with listening(path) as (listener, name_fd):
        left = os.dup(listener.fileno()), os.dup(name_fd)
    # The mount has ended while it had no daemon.
    with listening(path):
        with listening_again(*left, path):
            pass
        assert path.is_socket()
