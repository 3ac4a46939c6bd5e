"""How messages of several sockets are waited for: asleep, or awake, and for how long."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
import trio

from pmemfs.fuse import inbox as inbox_module
from pmemfs.fuse.inbox import Inbox


@dataclass
class Ends:
    """Two sockets that are served, and their far ends."""

    inbox: Inbox
    ours: list[socket.socket]
    theirs: list[socket.socket]

    def wait(self) -> None:
        """Fall asleep until there is a message."""

        async def with_a_limit() -> None:
            with trio.fail_after(10):
                await self.inbox.wait()

        trio.run(with_a_limit)

    def take(self, *, may_wait: bool = False) -> list[int]:
        """The numbers of the sockets with messages, which are read."""
        found = self.inbox.next(may_wait=may_wait)
        for connection in found:
            connection.recv(10)
        return sorted(map(self.ours.index, found))


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    # However slow the machine is, no turn ends by itself.
    monkeypatch.setattr(inbox_module, "_TURN_SECONDS", 1000)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with closing(Inbox(ours)) as inbox:
        yield Ends(inbox, ours, theirs)
    for end in (*ours, *theirs):
        end.close()


@pytest.fixture
def yields(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is to happen each time the CPU is offered to others; the first of it first."""
    steps: list[object] = []

    def on_yield() -> None:
        step = steps.pop(0) if steps else None
        if callable(step):
            step()

    monkeypatch.setattr(os, "sched_yield", on_yield)
    return steps


def test_all_that_is_there_is_found_at_once(ends: Ends) -> None:
    for end in ends.theirs:
        end.send(b"x")
    ends.wait()
    assert ends.take() == [0, 1]
    assert ends.take() == []


def test_what_follows_soon_is_waited_for_awake(
    ends: Ends, yields: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is, this is soon.
    monkeypatch.setattr(inbox_module, "AWAKE_SECONDS", 1000)
    ends.theirs[0].send(b"x")
    ends.wait()
    assert ends.take() == [0]
    yields += [None, lambda: ends.theirs[1].send(b"x")]
    assert ends.take(may_wait=True) == [1]
    assert not yields


def test_but_not_where_others_have_something_to_do(ends: Ends, yields: list[object]) -> None:
    ends.theirs[0].send(b"x")
    ends.wait()
    assert ends.take() == [0]
    yields += [None]
    assert ends.take(may_wait=False) == []
    assert yields


def test_nor_after_a_long_sleep(
    ends: Ends, yields: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "AWAKE_SECONDS", 0)
    ends.theirs[0].send(b"x")
    ends.wait()
    monkeypatch.setattr(inbox_module, "AWAKE_SECONDS", 1000)
    assert ends.take() == [0]
    yields += [lambda: ends.theirs[1].send(b"x")]
    assert ends.take(may_wait=True) == []
    assert yields
    ends.theirs[1].send(b"x")
    ends.wait()
    assert ends.take() == [1]
    yields += [lambda: ends.theirs[1].send(b"x")]
    assert ends.take(may_wait=True) == [1]


def test_it_is_not_waited_for_ever(ends: Ends, yields: list[object]) -> None:
    ends.theirs[0].send(b"x")
    ends.wait()
    assert ends.take() == [0]
    assert ends.take(may_wait=True) == []


def test_a_turn_ends_however_much_there_is(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_TURN_SECONDS", 0)
    ends.theirs[0].send(b"x")
    ends.wait()
    assert ends.take() == []
    monkeypatch.setattr(inbox_module, "_TURN_SECONDS", 1000)
    ends.wait()
    assert ends.take() == [0]


def test_what_has_hung_up_is_watched_no_more(ends: Ends) -> None:
    ends.theirs[0].close()
    ends.wait()
    assert ends.inbox.next(may_wait=False) == [ends.ours[0]]
    ends.inbox.remove(ends.ours[0])
    assert ends.inbox
    ends.theirs[1].send(b"x")
    assert ends.take() == [1]
    ends.inbox.remove(ends.ours[1])
    assert not ends.inbox


def test_a_muted_socket_has_no_messages_until_it_is_unmuted(ends: Ends) -> None:
    for _ in range(2):
        ends.inbox.mute(ends.ours[0])
    for end in ends.theirs:
        end.send(b"message")
    ends.wait()
    assert ends.take() == [1]
    assert ends.take() == []
    for _ in range(2):
        ends.inbox.unmute(ends.ours[0])
    assert ends.take() == [0]
    ends.inbox.remove(ends.ours[0])
    ends.inbox.unmute(ends.ours[0])
    ends.theirs[0].send(b"message")
    assert ends.take() == []
