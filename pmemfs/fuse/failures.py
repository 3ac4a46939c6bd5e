"""The one place where an exception in a handler becomes an errno.

An exception that left a door would end it, and every user of the mount would get ENOTCONN. So each
door asks here. Errors of pmemfs and of the system answer with their errno, and a request that is
too short answers EINVAL. Any other exception is logged with its request and answers EIO, and the
mount goes on.
"""

from __future__ import annotations

import errno
import logging
import struct

from pmemfs.errors import MemoryFault, PmemfsError, cause_of
from pmemfs.medium.faultlog import report_fault

log = logging.getLogger(__name__)


def errno_of(error: Exception, what: str, *request: object) -> int:
    """The errno for a request that failed; an unexpected exception is logged."""
    error = cause_of(error)
    if isinstance(error, MemoryFault):
        whose = f"a request to inode {error.inode}" if error.inode else f"a {what}"
        report_fault(error.path, error.pfn, f"{whose} was answered with EIO")
    if isinstance(error, PmemfsError):
        return error.errno
    if isinstance(error, struct.error):
        return errno.EINVAL
    if isinstance(error, OSError):
        if error.errno == errno.EIO or not error.errno:
            log.error("%s: %s", _describe(what, request), error)
        return error.errno or errno.EIO
    log.error("%s failed; answering EIO", _describe(what, request), exc_info=error)
    return errno.EIO


def _describe(what: str, request: tuple[object, ...]) -> str:
    """A request for the log, with the lengths of long payloads instead of their bytes."""
    shown = (
        f"<{len(argument)} bytes>" if isinstance(argument, bytes) and len(argument) > 255
        else repr(argument)
        for argument in request
    )  # fmt: skip
    return f"{what}({', '.join(shown)})"
