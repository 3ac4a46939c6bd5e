"""Requests that the data plane hands over, and their replies: one message each.

Invariant: nothing here waits for room in a socket. A worker that is sending a request takes no
reply meanwhile, so if the daemon waited for that worker, both would wait for ever.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import trio

from pmemfs.dataplane.answers import AnswerState
from pmemfs.dataplane.layouts import (
    HAND_AGAIN,
    HOT,
    HOT_OPCODE,
    MISS,
    MISSES_OPCODE,
    NAMES_OPCODE,
    SERVE_AGAIN,
)
from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.fuse.failures import errno_of
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.inbox import Gate, Inbox
from pmemfs.fuse.interrupts import Interrupts, Waiting
from pmemfs.fuse.once import NUMBER, RECORDED, Once
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, WireDoor
from pmemfs.units import MIB
from pmemfs.volume.base import Later
from pmemfs.volume.coming import Bring, Coming

_HEAD_BYTES, _unpack_head = wire.IN_HEADER.size, wire.IN_HEADER.unpack_from
_OF_WORKERS = frozenset((MISSES_OPCODE, HOT_OPCODE, NAMES_OPCODE))
_WITHOUT_WAITING = int(socket.MSG_DONTWAIT)
_SHORT_BYTES = 4096
"""A reply up to this length is sent in one piece: copying it is cheaper than listing its parts."""
_MOST_AT_ONCE = 32
"""So many requests that wait are taken before the other tasks go on with them. With 64 callers an
origin has half of them to work at while the others are taken and answered."""
_DRAIN_POLL_SECONDS = 0.001
MOST_KEPT_BYTES = 128 * MIB
"""More than all entries of all rings hold together (`planes`), so no ring is ever muted."""


class Outbox:
    """The replies to one socket. Each is sent at once if there is room, and otherwise kept.

    A ring has as many requests under way as it has entries, so these bound what is kept for it. On
    the socket that workers share, requests wait while more than `MOST_KEPT_BYTES` is kept. That is
    safe, because the thread that takes those replies never waits for this process.
    """

    def __init__(self, connection: socket.socket, inbox: Inbox, nursery: trio.Nursery) -> None:
        self._connection = connection
        self._inbox = inbox
        self._nursery = nursery
        self._kept: deque[bytes] = deque()
        self._again: list[int] = []
        self.kept_bytes = 0

    def reply(self, unique: int, data: bytes | memoryview, error: int = 0) -> None:
        """Answer a request. `data` is copied before this returns."""
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(data), -error, unique)
        self._send_or_keep([header + data] if len(data) <= _SHORT_BYTES else [header, data])

    def serve_again(self, unique: int) -> None:
        """Let the worker serve a read of the cache again, whose blocks were brought: soon, and many
        with one message."""
        if not self._again:
            self._nursery.start_soon(self._send_again)
        self._again.append(unique)

    def hand_again(self) -> None:
        """Let the data plane hand over once more what another daemon was handed and has not
        answered. This is the socket that all workers share."""
        self._send_or_keep([wire.OUT_HEADER.pack(wire.OUT_HEADER.size, HAND_AGAIN, 0)])

    async def _send_again(self) -> None:
        again, self._again = self._again, []
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + 8 * len(again), SERVE_AGAIN, 0)
        self._send_or_keep([header + struct.pack(f"<{len(again)}Q", *again)])

    def _send_or_keep(self, parts: Sequence[bytes | memoryview]) -> None:
        if self._kept or not self._send(parts):
            self._keep(b"".join(parts))

    def _send(self, parts: Sequence[bytes | memoryview]) -> bool:
        """Send a reply; False if it has to be kept."""
        try:
            if len(parts) == 1:
                self._connection.send(parts[0], _WITHOUT_WAITING)
            else:
                self._connection.sendmsg(parts, [], _WITHOUT_WAITING)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            # The data plane is gone, and with it every caller that waits.
            return True
        return True

    def _keep(self, reply: bytes) -> None:
        if not self._kept:
            self._nursery.start_soon(self._send_kept)
        self._kept.append(reply)
        self.kept_bytes += len(reply)
        if self.kept_bytes > MOST_KEPT_BYTES:
            self._inbox.mute(self._connection)

    async def _send_kept(self) -> None:
        while self._kept:
            await trio.lowlevel.wait_writable(self._connection)
            while self._kept and self._send([self._kept[0]]):
                self.kept_bytes -= len(self._kept.popleft())
            if self.kept_bytes <= MOST_KEPT_BYTES:
                self._inbox.unmute(self._connection)


class MissedRead:
    """A read of blocks that a cache does not have, while these are being brought."""

    __slots__ = ("_left", "_over", "_unique")

    def __init__(self, unique: int, over: Callable[[int, Exception | None], None]) -> None:
        self._unique = unique
        self._over = over
        self._left = 0

    def wait_for(self, count: int) -> None:
        """So many blocks are being brought."""
        self._left = count

    def give(self, _: object) -> None:
        """One of the blocks was brought."""
        self._left -= 1
        if not self._left:
            self._over(self._unique, None)

    def fail(self, error: Exception) -> None:
        """One of the blocks can't be brought. The first error counts."""
        if self._left > 0:
            self._left = 0
            self._over(self._unique, error)

    def cancel(self) -> None:
        """The caller is being killed."""
        self.fail(system_error(errno.EINTR))


class ForwardedRequests:
    """Answers requests through the wire door, and brings blocks for reads of a cache."""

    def __init__(
        self, door: WireDoor, longest_bytes: int, once: Once, unanswered: Unanswered,
        bring: Bring | None = None, note_hot: Callable[[int, int], None] | None = None,
        gate: Gate | None = None,
    ) -> None:  # fmt: skip
        """`note_hot` is told of the inode and the index of a piece that a worker has found hot.
        `gate` is as of `Inbox`."""
        self._door = door
        self._gate = gate
        self._once = once
        self._unanswered = unanswered
        self._answered, self._waiting = once.answered, once.waiting
        self._begin, self._record = once.begin, once.record
        self._handles, self._listed = unanswered.handles, unanswered.listed
        self._bring = bring
        self._note_hot = note_hot
        self._buffer = memoryview(bytearray(longest_bytes))
        self._outboxes: dict[socket.socket, Outbox] = {}
        self._inbox: Inbox | None = None
        self._nursery: trio.Nursery | None = None
        self._interrupts = Interrupts()
        self._coming = self._begun = 0
        """Requests that wait without a task, and all that ever did."""

    async def serve(
        self, connections: Sequence[socket.socket], *, is_successor: bool = False
    ) -> None:
        """Answer requests until the data plane hangs up; slow answers don't hold up the others.

        As the successor of another daemon, answer those as well that were handed to that one.

        One task serves all sockets. So messages that come on several sockets at once, as a FORGET
        beside other requests does, are answered without a switch of tasks in between.
        """
        with closing(Inbox(connections, self._gate)) as inbox:
            async with trio.open_nursery() as nursery:
                self._inbox, self._nursery = inbox, nursery
                self._outboxes = {
                    connection: Outbox(connection, inbox, nursery) for connection in connections
                }
                if is_successor:
                    self._outboxes[connections[0]].hand_again()
                while inbox:
                    await inbox.wait()
                    begun = self._begun
                    # What waits for others is theirs to go on with, before more of it comes.
                    while self._begun - begun < _MOST_AT_ONCE and (
                        found := inbox.next(may_wait=self._is_idle(nursery))
                    ):
                        for connection in found:
                            if not self._serve_some(connection, nursery):
                                inbox.remove(connection)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and answer those that were taken, but wait no longer than this.

        What else comes stays in the sockets, for another process.
        """
        assert self._inbox is not None
        assert self._nursery is not None
        for connection in self._outboxes:
            self._inbox.mute(connection)
        with trio.move_on_after(seconds):
            while True:
                if self._is_idle(self._nursery):
                    return
                await trio.sleep(_DRAIN_POLL_SECONDS)

    def _is_idle(self, nursery: trio.Nursery) -> bool:
        """Whether no other request needs the other tasks of this process."""
        return not self._coming and not nursery.child_tasks

    def _serve_some(self, connection: socket.socket, nursery: trio.Nursery) -> bool:
        """Serve the next message, which is there, and those behind it if more are likely; False if
        the data plane has hung up."""
        outbox = self._outboxes[connection]
        try:
            for _ in range(_MOST_AT_ONCE):
                count = connection.recv_into(self._buffer, 0, _WITHOUT_WAITING)
                if not count:
                    return False
                self._serve_one(outbox, count, nursery)
                if not self._coming or outbox.kept_bytes:
                    # One request after another: it would be in vain to ask at once.
                    break
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return False
        return True

    def _serve_one(self, outbox: Outbox, count: int, nursery: trio.Nursery) -> None:
        """Serve a message of so many bytes, which is in the buffer."""
        if count < _HEAD_BYTES:
            outbox.reply(0, b"", errno.EINVAL)
            return
        _, opcode, unique, inode, uid, gid, pid, _ = _unpack_head(self._buffer)
        if opcode in _OF_WORKERS:
            self._hear(outbox, opcode, self._buffer[_HEAD_BYTES:count], nursery)
            return
        number = unique & NUMBER
        if number in self._waiting:
            # Its answer is on the way, and the kernel takes it in this form only.
            self._waiting[number] = unique
            return
        # A copy, because the next message comes into the same buffer while this one may wait.
        operation = bytes(self._buffer[_HEAD_BYTES:count])
        request = Request(inode, Caller(uid, gid, pid), operation)
        if opcode == Opcode.INTERRUPT and len(operation) >= wire.INTERRUPT_IN.size:
            (interrupted,) = wire.INTERRUPT_IN.unpack_from(operation)
            self._interrupts.arrived(interrupted & NUMBER, nursery)
            return
        answer_by: Callable[[int, Request], Later[Answer]] = self._door.answer
        if number in self._answered:
            found = self._once.find(number)
            if found.state == AnswerState.ANSWERED:
                # Perhaps the kernel has not got that.
                outbox.reply(unique, self._once.answer_of(found), found.error)
                return
            answer_by = partial(self._unanswered.answer, found.offset)
        if number in self._listed:
            self._unanswered.take_back(number)
        is_recorded = RECORDED >> opcode & 1
        if is_recorded:
            self._begin((number, opcode))
            if number in self._handles:
                self._unanswered.close_handle(number)
        try:
            answer = answer_by(opcode, request)
        except Exception as problem:
            error = _errno_of(problem, opcode, request)
            if is_recorded:
                self._record(number, opcode, b"", error)
            outbox.reply(unique, b"", error)
            return
        if type(answer) is bytes:
            # First, because it is nearly always so, and this is cheaper than the next question.
            if is_recorded:
                self._record(number, opcode, answer)
            outbox.reply(unique, answer)
        elif isinstance(answer, Coming):
            self._begin_waiting(unique, pid, answer, nursery)
            answer.when_there(partial(self._reply_to, outbox, number, opcode, request))
        elif isinstance(answer, Coroutine):
            self._waiting[number] = unique
            nursery.start_soon(
                self._wait_and_reply, nursery, outbox, number, opcode, request, answer
            )
        elif answer is not None:
            outbox.reply(unique, answer)

    def _note_all_hot(self, records: memoryview) -> None:
        for inode, index in HOT.struct.iter_unpack(records):
            if self._note_hot:
                self._note_hot(inode, index)

    def _hear(
        self, outbox: Outbox, opcode: int, records: memoryview, nursery: trio.Nursery
    ) -> None:
        """Do what a worker asks for by itself."""
        if opcode == MISSES_OPCODE:
            self._bring_all(outbox, records, nursery)
        elif opcode == HOT_OPCODE:
            self._note_all_hot(records)
        # What names need is seen to by now: see `SharedNames.enter`.

    def _bring_all(self, outbox: Outbox, records: memoryview, nursery: trio.Nursery) -> None:
        """Bring the blocks of reads that a worker can't answer; it serves them again then."""
        over = partial(self._end_miss, outbox)
        for unique, offset, length, pid in MISS.struct.iter_unpack(records):
            number = unique & NUMBER
            if number in self._waiting:
                self._waiting[number] = unique
                continue
            missed = MissedRead(number, over)
            count = self._bring(offset, length, missed) if self._bring else 0
            if not count:
                # It is forwarded then, unless its blocks are there by now.
                outbox.serve_again(unique)
                continue
            missed.wait_for(count)
            self._begin_waiting(unique, pid, missed, nursery)

    def _begin_waiting(
        self, unique: int, pid: int, waiting: Waiting, nursery: trio.Nursery
    ) -> None:
        """A request waits without a task from now on."""
        number = unique & NUMBER
        self._waiting[number] = unique
        self._coming += 1
        self._begun += 1
        self._interrupts.begin(number, pid, waiting, nursery)

    def _end_waiting(self, number: int) -> int:
        """The opposite of `_begin_waiting`; the latest form of the number."""
        self._coming -= 1
        self._interrupts.end(number)
        return self._waiting.pop(number)

    def _end_miss(self, outbox: Outbox, number: int, error: Exception | None) -> None:
        unique = self._end_waiting(number)
        if error is None:
            outbox.serve_again(unique)
        else:
            outbox.reply(unique, b"", (isinstance(error, OSError) and error.errno) or errno.EIO)

    def _reply_to(
        self, outbox: Outbox, number: int, opcode: int, request: Request,
        coming: Coming[bytes | memoryview],
    ) -> None:  # fmt: skip
        unique = self._end_waiting(number)
        try:
            data, error = coming.result(), 0
        except Exception as problem:
            data, error = b"", _errno_of(problem, opcode, request)
        self._record_and_reply(outbox, unique, opcode, data, error)

    async def _wait_and_reply(
        self, nursery: trio.Nursery, outbox: Outbox, number: int, opcode: int, request: Request,
        answer: Coroutine[Any, Any, Answer],
    ) -> None:  # fmt: skip
        data: Answer = None
        error = 0
        try:
            with self._interrupts.waiting(number, request.caller.pid, nursery) as scope:
                data = await answer
            if scope.cancelled_caught:
                data, error = b"", errno.EINTR
        except Exception as problem:
            data, error = b"", _errno_of(problem, opcode, request)
        finally:
            unique = self._waiting.pop(number)
        if data is not None:
            self._record_and_reply(outbox, unique, opcode, data, error)

    def _record_and_reply(
        self, outbox: Outbox, unique: int, opcode: int, data: bytes | memoryview, error: int
    ) -> None:
        if RECORDED >> opcode & 1:
            self._record(unique & NUMBER, opcode, data, error)
        outbox.reply(unique, data, error)


def _errno_of(problem: Exception, opcode: int, request: Request) -> int:
    known = opcode in Opcode.__members__.values()
    what = Opcode(opcode).name.lower() if known else f"opcode {opcode}"
    return errno_of(problem, what, request.inode, request.caller, request.operation)
