"""The one place where what goes wrong in a handler becomes an errno.

An exception other than FUSEError ends a pyfuse3 session, and every user of the mount gets ENOTCONN.
So every handler is wrapped: our errors and the system's answer with their errno, anything else is
logged with its request and answers EIO, and the mount goes on.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pyfuse3

from pmemfs.errors import MemoryFault, PmemfsError, cause_of
from pmemfs.medium.faultlog import report_fault

log = logging.getLogger(__name__)

OperationsT = TypeVar("OperationsT", bound=type[pyfuse3.Operations])


def guarded(operations: OperationsT) -> OperationsT:
    """A class decorator that wraps every request handler that the class defines."""
    for name, handler in list(vars(operations).items()):
        if not name.startswith("_") and callable(handler) and hasattr(pyfuse3.Operations, name):
            setattr(operations, name, _guarded_handler(handler))
    return operations


def _guarded_handler(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def guarded_handler(self: pyfuse3.Operations, *request: Any) -> Any:
        try:
            return await handler(self, *request)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error, handler, request)) from error

    return guarded_handler


def errno_of(error: Exception, handler: Callable[..., Any], request: tuple[Any, ...]) -> int:
    """What to answer a request whose handler raised; what should not have happened is logged."""
    error = cause_of(error)
    if isinstance(error, MemoryFault):
        whose = f"a request to inode {error.inode}" if error.inode else f"a {handler.__name__}"
        report_fault(error.path, error.pfn, f"{whose} was answered with EIO")
    if isinstance(error, PmemfsError):
        return error.errno
    if isinstance(error, OSError):
        if error.errno == errno.EIO or not error.errno:
            log.error("%s: %s", _describe(handler, request), error)
        return error.errno or errno.EIO
    log.error("%s failed; answering EIO", _describe(handler, request), exc_info=error)
    return errno.EIO


def _describe(handler: Callable[..., Any], request: tuple[Any, ...]) -> str:
    """A request for the log: payloads by their length."""
    shown = (
        f"<{len(argument)} bytes>" if isinstance(argument, bytes) and len(argument) > 255
        else repr(argument)
        for argument in request
    )  # fmt: skip
    return f"{handler.__name__}({', '.join(shown)})"
