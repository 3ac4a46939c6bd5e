"""Requests that need an inode whose log is long wait while it is read, and nobody else does.

An operation of the file system is one step to everybody else, so reading may not happen in its
middle. One that meets an inode which takes long to read raises NotRead before it has changed
anything; then the inode is read, a few frames of its log at a time with other requests in between,
and the operation begins again. Invariants:
- whoever needs the same inode waits for the one reading of it;
- one inode is read at a time, so however many are wanted, others wait for one slice of reading.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import Any, TypeVar

import pyfuse3
import trio

from pmemfs.fuse.raw import Answer, Handler, Request
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.reading import MayWait, NotRead

T = TypeVar("T")
OperationsT = TypeVar("OperationsT", bound=type[pyfuse3.Operations])


class Patience:
    """Lets operations of one file system wait for inodes that take long to read."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._lock = trio.Lock()

    async def look(self, look: Callable[[], T]) -> T:
        """What an operation finds that changes nothing, at once if that takes little reading.

        Raises as the operation, and OSError where an inode can't be read.
        """
        while True:
            try:
                with MayWait():
                    return look()
            except NotRead as missing:
                number = missing.number
            await self._read_on(number)

    async def _read_on(self, number: int) -> None:
        """Read an inode that has been begun with, after others had their turn."""
        async with self._lock:
            while self._fs.read_on(number):
                await trio.lowlevel.checkpoint()

    async def run(self, operation: Callable[[], Awaitable[T]]) -> T:
        """An operation, begun again as often as it needs an inode that has to be read first."""
        while True:
            try:
                with MayWait():
                    return await operation()
            except NotRead as missing:
                number = missing.number
            await self._read_on(number)

    def patient(self, handler: Handler) -> Handler:
        """A handler of raw requests that answers at once, if what it needs is in memory."""

        def handle(request: Request) -> Answer | Coroutine[None, None, Answer]:
            try:
                with MayWait():
                    answer = handler(request)
            except NotRead as missing:
                return self._begin_again(handle, request, missing.number)
            if type(answer) is CoroutineType:
                return self._finish(answer, handle, request)
            return answer

        return functools.wraps(handler)(handle)

    async def _finish(
        self, answer: Coroutine[None, None, Answer], handle: Handler, request: Request
    ) -> Answer:
        try:
            with MayWait():
                return await answer
        except NotRead as missing:
            number = missing.number
        return await self._begin_again(handle, request, number)

    async def _begin_again(self, handle: Handler, request: Request, number: int) -> Answer:
        await self._read_on(number)
        answer = handle(request)
        return await answer if isinstance(answer, Coroutine) else answer


def patient(operations: OperationsT) -> OperationsT:
    """A class decorator: request handlers run with the `_patience` of their object.

    READDIR sees to it itself, since it can't begin again: it has answered a part by then.
    """
    for name, handler in list(vars(operations).items()):
        is_handler = callable(handler) and hasattr(pyfuse3.Operations, name)
        if is_handler and not name.startswith("_") and name != "readdir":
            setattr(operations, name, _patient_handler(handler))
    return operations


def _patient_handler(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def patient_handler(self: Any, *request: Any) -> Any:
        return await self._patience.run(lambda: handler(self, *request))

    return patient_handler
