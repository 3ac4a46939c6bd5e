"""Requests that are answered without pyfuse3, as the kernel sends them.

There are those that pyfuse3 lacks and, in mode `fs`, those that come most often: what pyfuse3 and
a task switch cost would be more than the answer. The data plane hands them over on a socket of
their own, one message each; each is answered with one message. What a mode does not have answers
ENOSYS, and the kernel does not ask again.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import trio

from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.fuse.barrier import errno_of
from pmemfs.fuse.inbox import Inbox
from pmemfs.fuse.privileges import Caller
from pmemfs.units import MIB

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
COLLAPSE_RANGE = 0x08
ZERO_RANGE = 0x10
INSERT_RANGE = 0x20

_OFFSET_LIMIT = 1 << 63
MOST_KEPT_BYTES = 128 * MIB
"""More than the entries of all rings together can hold (`planes`), so no ring is ever muted."""
_COPY_AT_ONCE_BYTES = 128 * MIB
"""copy_file_range(2) may copy less than it is asked for, so one request need not last for long."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what it is about, who asks, and what follows the header."""

    inode: int
    caller: Caller
    operation: bytes


Answer = bytes | memoryview | None
"""What follows the header of a reply; None where the kernel waits for none."""
Handler = Callable[[Request], Answer | Coroutine[None, None, Answer]]
"""Answers at once, or with what has to be waited for. Raises OSError, and struct.error for too
little."""
IoctlHandler = Callable[[Request, bytes], bytes | Coroutine[None, None, bytes]]
"""Answers an ioctl(2): gets what the caller's argument points at, answers what goes back there.
Raises as `Handler`."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What fallocate(2) asks for."""

    offset_bytes: int
    length_bytes: int
    mode: int

    @property
    def keeps_size(self) -> bool:
        """Whether the file is not to become longer."""
        return bool(self.mode & KEEP_SIZE)

    @property
    def kind(self) -> int:
        """The mode but for the size."""
        return self.mode & ~KEEP_SIZE


@dataclass(frozen=True, slots=True)
class Copy:
    """What copy_file_range(2) asks for."""

    source_handle: int
    source_bytes: int
    target_inode: int
    target_handle: int
    target_bytes: int
    length_bytes: int


class Outbox:
    """The replies to one socket: sent at once where there is room, else kept until there is.

    A ring has as many requests under way as it has entries, so their replies bound what is kept.
    On the socket that all workers share, requests wait while more than `MOST_KEPT_BYTES` is kept:
    the thread that takes those replies never waits for this process.
    """

    def __init__(self, connection: socket.socket, inbox: Inbox, nursery: trio.Nursery) -> None:
        self._connection = connection
        self._inbox = inbox
        self._nursery = nursery
        self._kept: deque[bytes] = deque()
        self.kept_bytes = 0

    def reply(self, unique: int, data: bytes | memoryview, error: int = 0) -> None:
        """Answer a request. What `data` shows is copied before this returns."""
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(data), -error, unique)
        if self._kept or not self._send([header, data]):
            self._keep(header + data)

    def _send(self, parts: Sequence[bytes | memoryview]) -> bool:
        """Send a reply; whether it needs no keeping."""
        try:
            self._connection.sendmsg(parts, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            # The data plane is gone, and with it whoever waits.
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


class RawRequests:
    """Answers requests with the handlers of a mode, by opcode.

    Invariant: nothing here waits for room in a socket. A worker that is sending a request takes no
    reply meanwhile, so a daemon that waited for the worker would wait for ever.
    """

    def __init__(self, handlers: Mapping[int, Handler], longest_bytes: int) -> None:
        self._handlers = handlers
        self._buffer = memoryview(bytearray(longest_bytes))
        self._outboxes: dict[socket.socket, Outbox] = {}

    async def serve(
        self, connections: Sequence[socket.socket], neighbours: Sequence[socket.socket] = ()
    ) -> None:
        """Answer what comes until the data plane hangs up; what has to wait, beside the rest.

        One task for all sockets: what comes on several at a time, as a FORGET beside other
        requests does, is answered without a switch of tasks in between. It makes way for what
        comes at the `neighbours`, which others here serve.
        """
        with closing(Inbox(connections, neighbours)) as inbox:
            async with trio.open_nursery() as nursery:
                self._outboxes = {
                    connection: Outbox(connection, inbox, nursery) for connection in connections
                }
                while inbox:
                    await inbox.wait()
                    while found := inbox.next(may_wait=not nursery.child_tasks):
                        for connection in found:
                            if not self._serve_next(connection, nursery):
                                inbox.remove(connection)

    def _serve_next(self, connection: socket.socket, nursery: trio.Nursery) -> bool:
        """Serve the next message, which is there; False where the data plane has hung up."""
        try:
            count = connection.recv_into(self._buffer)
        except ConnectionResetError:
            return False
        if count:
            self._serve_one(connection, self._buffer[:count], nursery)
        return count > 0

    def _serve_one(
        self, connection: socket.socket, message: memoryview, nursery: trio.Nursery
    ) -> None:
        outbox = self._outboxes[connection]
        if len(message) < wire.IN_HEADER.size:
            outbox.reply(0, b"", errno.EINVAL)
            return
        _, opcode, unique, inode, uid, gid, pid, *_ = wire.IN_HEADER.unpack_from(message)
        # A copy, since the next message comes into the same buffer.
        request = Request(inode, Caller(uid, gid, pid), bytes(message[wire.IN_HEADER.size :]))
        handler = self._handlers.get(opcode, _unknown)
        try:
            answer = handler(request)
        except Exception as problem:
            outbox.reply(unique, b"", _errno_of(problem, handler, request))
            return
        if isinstance(answer, Coroutine):
            nursery.start_soon(_wait_and_reply, outbox, unique, handler, request, answer)
        elif answer is not None:
            outbox.reply(unique, answer)


async def _wait_and_reply(
    outbox: Outbox,
    unique: int,
    handler: Handler,
    request: Request,
    answer: Coroutine[None, None, Answer],
) -> None:
    try:
        data = await answer
    except Exception as problem:
        outbox.reply(unique, b"", _errno_of(problem, handler, request))
    else:
        if data is not None:
            outbox.reply(unique, data)


def _errno_of(problem: Exception, handler: Handler, request: Request) -> int:
    if isinstance(problem, struct.error):
        return errno.EINVAL
    return errno_of(problem, handler, (request,))


def allocation_of(request: Request) -> Allocation:
    """What a FALLOCATE asks for. Raises OSError (EINVAL) for an impossible range."""
    _, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(request.operation)
    if not length or offset >= _OFFSET_LIMIT or length >= _OFFSET_LIMIT:
        raise OSError(errno.EINVAL, "no such range")
    return Allocation(offset, length, mode)


def copy_of(request: Request) -> Copy:
    """What a COPY_FILE_RANGE asks for, as far as is copied at once.

    Raises OSError (EINVAL) for an impossible range.
    """
    handle, source, inode_out, handle_out, target, length, flags = wire.COPY_IN.unpack_from(
        request.operation
    )
    if flags or max(source, target) >= _OFFSET_LIMIT:
        raise OSError(errno.EINVAL, "no such range")
    length = min(length, _COPY_AT_ONCE_BYTES)
    return Copy(handle, source, inode_out, handle_out, target, length)


def copying(copy: Callable[[Request], Coroutine[None, None, int]]) -> dict[int, Handler]:
    """Handlers for both forms of COPY_FILE_RANGE, whose replies differ in the width of a number."""

    async def in_32_bits(request: Request) -> bytes:
        return struct.pack("<II", await copy(request), 0)

    async def in_64_bits(request: Request) -> bytes:
        return struct.pack("<Q", await copy(request))

    return {wire.COPY_FILE_RANGE: in_32_bits, wire.COPY_FILE_RANGE_64: in_64_bits}


def ioctls(commands: Mapping[int, IoctlHandler]) -> Handler:
    """The handler of IOCTL for these commands; all others are none of ours: ENOTTY.

    The kernel says what goes in and out by what the number of the command says (_IOC_SIZE), so
    nothing may be answered but that. Source: fs/fuse/ioctl.c of Linux, fuse_do_ioctl.
    """

    def handle(request: Request) -> Answer | Coroutine[None, None, bytes]:
        _, _, command, _, in_bytes, out_bytes = wire.IOCTL_IN.unpack_from(request.operation)
        handler = commands.get(command)
        if handler is None:
            raise system_error(errno.ENOTTY)
        argument = request.operation[wire.IOCTL_IN.size :][:in_bytes]
        answer = handler(request, argument)
        if isinstance(answer, Coroutine):
            return _answer_ioctl_later(answer, out_bytes)
        return _ioctl_out(answer, out_bytes)

    return handle


async def _answer_ioctl_later(answer: Coroutine[None, None, bytes], out_bytes: int) -> bytes:
    return _ioctl_out(await answer, out_bytes)


def _ioctl_out(data: bytes, out_bytes: int) -> bytes:
    return wire.IOCTL_OUT.pack(0, 0, 0, 0) + data[:out_bytes]


def _unknown(request: Request) -> Answer:
    raise system_error(errno.ENOSYS)
