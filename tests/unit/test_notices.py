"""What the kernel is told reaches it, whichever process dies meanwhile. The data plane is the other
end of a socket here."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from pmemfs.fuse.notices import Notices, Told

Over = Callable[[], bool]


class Plane:
    """The thread of the data plane that takes notices."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(False)

    def take(self) -> list[bytes]:
        """All notices that are there."""
        found = []
        while True:
            try:
                found.append(self.end.recv(512))
            except BlockingIOError:
                return found

    def answer(self, notice: bytes, failed: int = 0) -> None:
        self.end.send(notice[:8] + struct.pack("<Q", failed))


def inode_of(notice: bytes) -> int:
    return int(struct.unpack_from("<Q", notice, 8 + 16)[0])


@asynccontextmanager
async def served(end: socket.socket) -> AsyncIterator[Notices]:
    notices = Notices(end)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notices.serve)
        yield notices
        nursery.cancel_scope.cancel()


async def is_over(told: Told) -> bool:
    await trio.testing.wait_all_tasks_blocked()
    with trio.move_on_after(0.2):
        await told
        return True
    return False


@pytest.mark.parametrize("failed", [0, errno.ENOENT])
def test_a_notice_is_over_when_the_kernel_has_answered_it(failed: int) -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane = Plane(theirs)
        async with served(ours) as notices:
            first, second = notices.tell(7), notices.tell(8)
            taken = plane.take()
            assert [inode_of(notice) for notice in taken] == [7, 8]
            plane.answer(taken[0], failed)
            assert await is_over(first)
            assert not await is_over(second)

    trio.run(check)


def test_names_and_pages_are_forgotten_in_the_order_in_which_that_is_said() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane = Plane(theirs)
        async with served(ours) as notices:
            notices.forget_name(7, b"name")
            notices.forget_inode(8)
            notices.doubt_names()
            name, pages, names = (notice[8:] for notice in plane.take())
            # The length of all, the code, and what struct fuse_notify_inval_entry_out has.
            assert name == struct.pack("<IiQQII", 37, 3, 0, 7, 4, 0) + b"name\0"
            assert pages == struct.pack("<IiQQqq", 40, 2, 0, 8, 0, 0)
            assert names == struct.pack("<IiQ", 16, 8, 0)

    trio.run(check)


def test_what_is_no_answer_does_not_end_the_daemon() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane = Plane(theirs)
        async with served(ours) as notices:
            told = notices.tell(7)
            for length in (1, 7, 8, 15, 400):
                theirs.send(bytes(length))
            assert not await is_over(told)
            plane.answer(*plane.take())
            assert await is_over(told)

    trio.run(check)


def test_what_a_killed_data_plane_has_taken_is_told_by_the_next_one() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane = Plane(theirs)
        async with served(ours) as notices:
            first, lost, queued = (notices.tell(inode) for inode in (7, 8, 9))
            taken = plane.take()
            plane.answer(taken[0])
            # It dies with two in its hands, and another two come meanwhile.
            late = notices.tell(10)
            assert await is_over(first)
            notices.tell_again()
            taken = plane.take()
            assert [inode_of(notice) for notice in taken] == [10, 8, 9, 10]
            for notice in taken:
                plane.answer(notice)
            for told in (lost, queued, late):
                assert await is_over(told)

    trio.run(check)


def test_answers_to_a_dead_daemon_end_no_notice_of_its_successor() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plane = Plane(theirs)
        Notices(ours).tell(7)
        async with served(ours) as notices:
            told = notices.tell(8)
            before, after = plane.take()
            plane.answer(before)
            assert not await is_over(told)
            plane.answer(after)
            assert await is_over(told)

    trio.run(check)


def test_nobody_waits_once_the_data_plane_has_hung_up() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        async with served(ours) as notices:
            told = notices.tell(7)
            theirs.close()
            assert await is_over(told)
            assert await is_over(notices.tell(8))

    trio.run(check)
