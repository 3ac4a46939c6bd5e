"""A connection that stays open: threads, forks, daemons that hang up, descriptors."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.control_socket import METHODS, answering, echo, in_thread, saying
from kit.descriptors import open_before, open_descriptors
from pmemfs.control import Peer, WithDescriptors
from pmemfs.control.channel import Channel
from pmemfs.control.client import RemoteError
from pmemfs.control.server import listening, serve
from pmemfs.errors import NoAnswer, TooLong, TooManyOpenFiles


async def pipe(peer: Peer) -> WithDescriptors:
    readable, writable = os.pipe()
    os.write(writable, f"{peer.pid} {peer.uid}".encode())
    os.close(writable)
    return WithDescriptors({"long": "x" * 300_000}, [readable])


async def unsendable() -> WithDescriptors:
    return WithDescriptors({1, 2}, os.pipe())


MORE = METHODS | {"pipe": pipe, "unsendable": unsendable, "echo": echo}


def asked(
    path: Path, client: Any, *, patience_seconds: float = 20, mount: int | None = None
) -> None:
    """Run a client in a thread, beside a server on a real socket."""

    async def main() -> None:
        with trio.fail_after(60), listening(path) as (listener, _):
            async with trio.open_nursery() as nursery:
                await nursery.start(start_serving, listener, patience_seconds)
                await in_thread(client)
                nursery.cancel_scope.cancel()

    async def start_serving(
        listener: Any, patience: float, task_status: trio.TaskStatus[None]
    ) -> None:
        task_status.started()
        await serve(listener, lambda: MORE, mount=mount, patience_seconds=patience)

    trio.run(main)


@pytest.fixture
def path(shm: Path) -> Path:
    shm.chmod(0o700)
    return shm / "control"


def test_an_answer_brings_descriptors_that_no_other_program_inherits(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        result, (fd,) = channel.ask("pipe")
        assert result == {"long": "x" * 300_000}
        assert os.read(fd, 100) == f"{os.getpid()} {os.geteuid()}".encode()
        assert not os.get_inheritable(fd)
        os.close(fd)
        channel.close()

    asked(path, client)


def test_a_channel_goes_on_with_its_mount_and_no_other(path: Path) -> None:
    """The kernel gives a device number to another mount soon, and sockets are named after it."""
    channel = Channel(path)

    def is_answered() -> None:
        assert channel.ask("echo", a=1) == ({"a": 1}, [])

    def is_refused() -> None:
        for method in ("echo", "pipe"):
            with pytest.raises(RemoteError) as caught:
                channel.ask(method)
            assert caught.value.kind == "DaemonGone"

    asked(path, is_answered, mount=17)
    # Its daemon was started again.
    asked(path, is_answered, mount=17)
    asked(path, is_refused, mount=18)
    # What doesn't know whose it is may be anybody's.
    asked(path, is_refused)
    asked(path, is_answered, mount=17)
    channel.close()


def test_the_server_keeps_no_copy_of_what_it_has_sent(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        channel.ask("echo")
        before = open_before()
        for _ in range(20):
            _, (fd,) = channel.ask("pipe")
            os.close(fd)
            with pytest.raises(RemoteError):
                channel.ask("unsendable")
        assert open_descriptors() == before
        channel.close()

    asked(path, client)


def test_nobody_can_say_that_another_asks(path: Path) -> None:
    def client() -> None:
        with pytest.raises(RemoteError, match="does not understand"):
            Channel(path).ask("pipe", peer=[1, 0])

    asked(path, client)


def test_one_thread_asks_over_one_connection(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        channel.ask("echo")
        before = open_before()
        for number in range(50):
            assert channel.ask("echo", number=number) == ({"number": number}, [])
        assert open_descriptors() == before

    asked(path, client)


def test_threads_get_each_the_answer_to_their_own_question(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        wrong: list[object] = []

        def ask(thread: int) -> None:
            for number in range(30):
                wanted = {"thread": thread, "number": number}
                got = channel.ask("echo", **wanted)[0]
                if got != wanted:
                    wrong.append(got)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    asked(path, client)


def test_a_daemon_that_hung_up_is_asked_again(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        assert channel.ask("echo", number=1)[0] == {"number": 1}
        hung_up = threading.Event()
        hung_up.wait(0.5)
        assert channel.ask("echo", number=2)[0] == {"number": 2}

    asked(path, client, patience_seconds=0.2)


def test_a_forked_child_asks_over_a_connection_of_its_own(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        channel.ask("echo")
        child = os.fork()
        if not child:
            status = 1
            try:
                got = [channel.ask("echo", number=number)[0] for number in range(50)]
                status = got != [{"number": number} for number in range(50)]
            finally:
                os._exit(status)
        got = [channel.ask("echo", number=-number)[0] for number in range(50)]
        assert got == [{"number": -number} for number in range(50)]
        assert os.waitpid(child, 0)[1] == 0

    asked(path, client)


def test_a_process_without_room_for_descriptors_is_told_so(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        channel.ask("echo")
        child = os.fork()
        if not child:
            status = 1
            try:
                channel.ask("echo")
                least = max(map(int, open_descriptors())) + 1
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
                while True:
                    try:
                        os.dup(0)
                    except OSError:
                        break
                try:
                    channel.ask("pipe")
                except TooManyOpenFiles as error:
                    status = 0 if error.errno == errno.EMFILE else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0

    asked(path, client)


def test_a_long_question_is_answered_and_one_that_is_too_long_is_told_so(path: Path) -> None:
    def client() -> None:
        channel = Channel(path)
        assert channel.ask("echo", text="x" * 1_000_000) == ({"text": "x" * 1_000_000}, [])
        with pytest.raises(TooLong, match="fewer files"):
            channel.ask("echo", text="x" * (1 << 20))

    asked(path, client)


def test_an_answer_that_makes_no_sense_is_none(path: Path) -> None:
    with answering(path, saying(b"nonsense")), pytest.raises(NoAnswer, match="makes no sense"):
        Channel(path).ask("echo")


def test_a_daemon_that_is_gone_gives_no_answer(path: Path) -> None:
    with pytest.raises(NoAnswer):
        Channel(path).ask("echo")
