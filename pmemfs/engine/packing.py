"""The daemon's end of the process that compresses for it, and when the mount has one.

Invariants:
- the process is started with the first piece that is cold, because most mounts never have any;
- it has no descriptor and no memory of the mount, so its death costs the piece that it had, which
  stays plain. Another process is started for the next piece.
"""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from pmemfs.errors import system_error
from pmemfs.mount.processes import python_words
from pmemfs.transform.packing import ANSWER, REQUEST

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from pmemfs.volume.fs.cold import Cooler
    from pmemfs.volume.fs.filesystem import FileSystem

_DAEMON = "pmemfs.daemons.packerd"
_STEP_SECONDS = 1


class PackingProcess:
    """A process that compresses, once there is something to compress."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stream: trio.SocketStream | None = None

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._child.pid if self._child else None

    async def pack(self, data: bytes, kind: int, level: int) -> bytes:
        """As of `cold.Pack`; one call at a time. Raises OSError."""
        stream = self._stream or self._start()
        try:
            await stream.send_all(REQUEST.pack(len(data), kind, level) + data)
            (length,) = ANSWER.unpack(await self._receive(stream, ANSWER.size))
            return await self._receive(stream, length)
        except BaseException as error:
            # Half an answer may still come, so this process gets no other request.
            self.close()
            if isinstance(error, trio.BrokenResourceError):
                raise system_error(errno.EPIPE) from None
            raise

    def close(self) -> None:
        """End the process."""
        child, self._child, self._stream = self._child, None, None
        if child is not None:
            child.kill()
            child.wait()

    def _start(self) -> trio.SocketStream:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = subprocess.Popen(
                    [*python_words(_DAEMON), str(theirs.fileno())], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    pass_fds=[theirs.fileno()],
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        return self._stream

    async def _receive(self, stream: trio.SocketStream, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = await stream.receive_some(length - len(data))
            if not part:
                raise system_error(errno.EPIPE)
            data += part
        return bytes(data)


class Packing:
    """Compresses what is cold in a mounted file system, once any file wants that."""

    def __init__(self, fs: FileSystem, tell: Callable[[int], Awaitable[None] | None]) -> None:
        """`tell` is called when a file takes another number of blocks."""
        self._fs = fs
        self._tell = tell
        self.process = PackingProcess()
        self._executor: ThreadPoolExecutor | None = None

    def begin(self) -> Cooler:
        """What compresses files, by a process of its own, and by a thread where a user waits."""
        from pmemfs.transform.codec import codec_of

        async def pack_now(data: bytes, kind: int, level: int) -> bytes:
            codec = codec_of(kind)
            assert codec is not None, "no file gets a compression that is not known"
            return await trio.to_thread.run_sync(codec.compress, data, level)

        cooler = self._fs.cooler
        cooler.pack, cooler.pack_now = self.process.pack, pack_now
        cooler.tell = self._tell
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            from pmemfs.volume.fs.readahead import ReadAhead

            self._executor = ThreadPoolExecutor(1)
            self._fs.frames.packed.ahead = ReadAhead(self._executor)
        return cooler

    async def serve(self) -> None:
        """Do so until the mount ends."""
        try:
            while not self._fs.may_have_compressed:  # noqa: ASYNC110
                await trio.sleep(_STEP_SECONDS)
            await self.begin().serve()
        finally:
            self.process.close()
            self._fs.frames.packed.ahead = None
            if self._executor is not None:
                self._executor.shutdown(cancel_futures=True)
