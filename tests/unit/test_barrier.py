"""Whatever goes wrong in a handler is an errno for one request, and never the end of the mount."""

from __future__ import annotations

import errno
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import pytest
import trio

from pmemfs import errors
from pmemfs.errors import NoPageStructures, NotInPool, PmemfsError, ReadOnlyMedium
from pmemfs.fuse.barrier import guarded
from pmemfs.fuse.block import BlockOperations


@guarded
class Failing(pyfuse3.Operations):
    """Handlers that raise what they are told to."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    async def read(self, fh: int, off: int, size: int) -> bytes:  # type: ignore[override]
        raise self._error

    async def write(self, fh: int, off: int, buf: bytes) -> int:  # type: ignore[override]
        raise self._error

    async def fsync(self, fh: int, datasync: bool) -> None:  # type: ignore[override]
        return None

    async def not_a_request(self) -> None:
        raise self._error

    async def _helper(self) -> None:
        raise self._error


def answered(error: BaseException) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        trio.run(Failing(error).read, 1, 2, 3)
    return int(caught.value.errno)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (pyfuse3.FUSEError(errno.ENOENT), errno.ENOENT),
        (NotInPool(pfn=1), errno.EFAULT),
        (NoPageStructures(what="a pin"), errno.EOPNOTSUPP),
        (ReadOnlyMedium(path="x"), errno.EROFS),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EIO, "gone"), errno.EIO),
        (OSError("without a number"), errno.EIO),
        (TimeoutError(), errno.EIO),
        (ValueError("a bug"), errno.EIO),
        (AssertionError(), errno.EIO),
        (MemoryError(), errno.EIO),
        (RecursionError(), errno.EIO),
        (StopAsyncIteration(), errno.EIO),
        (ExceptionGroup("several", [ValueError("one")]), errno.EIO),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_exception_becomes_the_right_errno(error: BaseException, number: int) -> None:
    assert answered(error) == number


def all_errors(kind: type[PmemfsError]) -> list[type[PmemfsError]]:
    return [kind, *(one for sub in kind.__subclasses__() for one in all_errors(sub))]


@pytest.mark.parametrize("kind", all_errors(PmemfsError), ids=lambda kind: kind.__name__)
def test_every_error_of_ours_has_an_errno_an_exit_code_and_a_sentence(
    kind: type[PmemfsError],
) -> None:
    assert kind.errno in errno.errorcode
    assert 0 < kind.exit_code < 126
    template = inspect.getdoc(kind)
    assert template, f"{kind.__name__} says nothing"
    if kind.__module__ == errors.__name__:
        names = ("why", "text", "name", "option", "path", "wanted", "found", "what", "pool",
                 "transport", "size", "how")  # fmt: skip
        facts = dict.fromkeys(names, "fact") | {"pfn": 5}
        error = kind(15) if kind is errors.Interrupted else kind(**facts)
        sentence = str(error)
        assert "{" not in sentence
        assert "\n" not in sentence


def test_a_bug_is_logged_with_its_request_and_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(pyfuse3.FUSEError):
        trio.run(Failing(ValueError("a bug")).write, 7, 4096, b"x" * 5000)
    (record,) = caplog.records
    assert "write(7, 4096, <5000 bytes>) failed; answering EIO" in record.getMessage()
    assert record.exc_info is not None
    assert record.levelno == logging.ERROR


def test_a_failing_device_is_logged_and_a_full_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answered(OSError(errno.ENOSPC, "full"))
    answered(NotInPool(pfn=1))
    assert caplog.records == []
    answered(OSError(errno.EIO, "gone"))
    assert "read(1, 2, 3): [Errno 5] gone" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_meant_to_end_the_process_ends_it(kind: type[BaseException]) -> None:
    async def run() -> None:
        await Failing(kind()).read(1, 2, 3)  # type: ignore[arg-type]

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        trio.run(run)
    assert not isinstance(caught.value, pyfuse3.FUSEError)


def test_a_handler_that_succeeds_is_left_alone() -> None:
    assert trio.run(Failing(ValueError()).fsync, 1, True) is None


def test_only_handlers_are_wrapped() -> None:
    assert hasattr(Failing.read, "__wrapped__")
    assert not hasattr(Failing.not_a_request, "__wrapped__")
    assert not hasattr(Failing._helper, "__wrapped__")


def handlers(operations: type) -> dict[str, Callable[..., Awaitable[Any]]]:
    """What the kernel's requests reach: coroutines that pyfuse3 knows by name."""
    return {
        name: value
        for name, value in vars(operations).items()
        if inspect.iscoroutinefunction(inspect.unwrap(value)) if callable(value)
    }  # fmt: skip


def test_every_handler_of_mode_block_is_wrapped() -> None:
    found = handlers(BlockOperations)
    assert len(found) > 20
    for name, handler in found.items():
        assert hasattr(pyfuse3.Operations, name), f"{name} is no handler that pyfuse3 knows"
        assert hasattr(handler, "__wrapped__"), f"{name} is not guarded"


def test_what_mode_block_does_not_define_answers_enosys_by_itself() -> None:
    left = set(handlers(pyfuse3.Operations)) - set(handlers(BlockOperations))
    # None of these may be one that a program needs from a device.
    assert not left & {"lookup", "getattr", "read", "write", "fsync", "open", "statfs", "setattr"}
