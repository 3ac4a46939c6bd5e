"""Whatever goes wrong in a handler is an errno for one request, and never the end of the mount."""

from __future__ import annotations

import errno
import inspect
import logging
import struct
from collections.abc import Callable
from functools import partial
from string import Formatter
from typing import Any

import pyfuse3
import pytest
import trio

from pmemfs import errors
from pmemfs.errors import NoPageStructures, NotInPool, PmemfsError, ReadOnlyMedium
from pmemfs.fuse.failures import errno_of
from pmemfs.fuse.handlers.patience import Patience
from pmemfs.fuse.pyfuse3door import Pyfuse3Door
from pmemfs.medium.shortage import Attempts


def answered(error: Exception) -> int:
    return errno_of(error, "read", 1, 2, 3)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (struct.error("too little"), errno.EINVAL),
        (NotInPool(pfn=1, first=2, last=3), errno.EFAULT),
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
        # What a sentence wants to know stands in it; what it formats is a number.
        facts = {
            name: 5 if spec else "fact"
            for _, name, spec, _ in Formatter().parse(template)
            if name
        }  # fmt: skip
        own: dict[type[PmemfsError], Callable[[], PmemfsError]] = {
            errors.Interrupted: lambda: errors.Interrupted(15),
            errors.OutputLost: lambda: errors.OutputLost(OSError(errno.ENOSPC, "full")),
        }
        # These take the errno first, since it is not always the same.
        for numbered in (
            errors.CannotPin, errors.CannotTransform, errors.CannotStoreKey, errors.CannotEncrypt,
        ):  # fmt: skip
            own[numbered] = partial(numbered, errno.ENOSPC, **facts)
        error = own[kind]() if kind in own else kind(**facts)
        sentence = str(error)
        assert "{" not in sentence
        assert "\n" not in sentence


def test_a_bug_is_logged_with_its_request_and_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert errno_of(ValueError("a bug"), "write", 7, 4096, b"x" * 5000) == errno.EIO
    (record,) = caplog.records
    assert "write(7, 4096, <5000 bytes>) failed; answering EIO" in record.getMessage()
    assert record.exc_info is not None
    assert record.levelno == logging.ERROR


def test_a_failing_device_is_logged_and_a_full_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answered(OSError(errno.ENOSPC, "full"))
    answered(NotInPool(pfn=1, first=2, last=3))
    assert caplog.records == []
    answered(OSError(errno.EIO, "gone"))
    assert "read(1, 2, 3): [Errno 5] gone" in caplog.text


async def no_room(attempts: Attempts) -> bool:
    """There is none to be found."""
    return False


class Failing:
    """Handlers that raise what they are told to, whatever they are asked."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.patience = Patience(self, no_room)  # type: ignore[arg-type]
        self.has_files = True

    def __getattr__(self, name: str) -> Failing:
        return self

    def __call__(self, *request: Any, **more: Any) -> Any:
        raise self._error


def methods() -> dict[str, Callable[..., Any]]:
    """What the kernel's requests reach: coroutines that pyfuse3 knows by name."""
    return {
        name: value
        for name, value in vars(Pyfuse3Door).items()
        if inspect.iscoroutinefunction(value) and not name.startswith("_")
    }


def ask(name: str, error: BaseException) -> None:
    door = Pyfuse3Door(Failing(error))  # type: ignore[arg-type]
    method = getattr(door, name)
    arguments: list[Any] = [1] * len(inspect.signature(method).parameters)
    for place, parameter in enumerate(inspect.signature(method).parameters):
        if parameter == "ctx":
            arguments[place] = pyfuse3.RequestContext()
        elif parameter == "attr":
            arguments[place] = pyfuse3.EntryAttributes()
        elif parameter == "fields":
            arguments[place] = pyfuse3.SetattrFields()
        elif parameter == "inode_list":
            arguments[place] = []
    trio.run(method, *arguments)


@pytest.mark.parametrize("name", sorted(methods()))
def test_no_method_of_the_pyfuse3_door_lets_anything_but_an_errno_out(name: str) -> None:
    assert hasattr(pyfuse3.Operations, name), f"{name} is no handler that pyfuse3 knows"
    if name in ("access", "forget", "fsyncdir"):
        ask(name, ValueError())
        return
    for error, number in ((ValueError(), errno.EIO), (OSError(errno.EDOM, "x"), errno.EDOM)):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            ask(name, error)
        assert caught.value.errno == number


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_meant_to_end_the_process_ends_it(kind: type[BaseException]) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        ask("read", kind())
    assert not isinstance(caught.value, pyfuse3.FUSEError)
