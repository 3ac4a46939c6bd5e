"""The functions of libnbd that an origin needs, by ctypes.

Its Python module can't read into memory that it hasn't made, and is built for one version of Python
only. The library takes addresses, so it reads into the pages of a pool.

What returns at once is called with the interpreter's lock held, because to let go of it and take it
again costs more than most of these calls. `connect` waits for the server and is for threads.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Any, NamedTuple

from pmemfs.errors import NeedsPackage, system_error

LIBRARY, PACKAGE = "libnbd.so.0", "libnbd0"
DIRECTION_READ, DIRECTION_WRITE = 1, 2
FLAG_NO_HOLE = 0x02
SIZE_MINIMUM, SIZE_MAXIMUM = 0, 2


class _Callback(ctypes.Structure):
    _fields_ = (
        ("callback", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


_NOBODY = _Callback()
_HANDLE, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p
_FLAGS, _INT, _COOKIE = ctypes.c_uint32, ctypes.c_int, ctypes.c_int64

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "create": (_HANDLE,),
    "close": (None, _HANDLE),
    "get_error": (_TEXT,),
    "get_errno": (_INT,),
    "set_uri_allow_local_file": (_INT, _HANDLE, ctypes.c_bool),
    "set_pread_initialize": (_INT, _HANDLE, ctypes.c_bool),
    "connect_uri": (_INT, _HANDLE, _TEXT),
    "is_read_only": (_INT, _HANDLE),
    "can_flush": (_INT, _HANDLE),
    "can_trim": (_INT, _HANDLE),
    "can_zero": (_INT, _HANDLE),
    "can_multi_conn": (_INT, _HANDLE),
    "get_size": (_COOKIE, _HANDLE),
    "get_block_size": (_COOKIE, _HANDLE, _INT),
    "aio_pread": (_COOKIE, _HANDLE, ctypes.c_void_p, _SIZE, _SIZE, _Callback, _FLAGS),
    "aio_pwrite": (_COOKIE, _HANDLE, ctypes.c_void_p, _SIZE, _SIZE, _Callback, _FLAGS),
    "aio_flush": (_COOKIE, _HANDLE, _Callback, _FLAGS),
    "aio_trim": (_COOKIE, _HANDLE, _SIZE, _SIZE, _Callback, _FLAGS),
    "aio_zero": (_COOKIE, _HANDLE, _SIZE, _SIZE, _Callback, _FLAGS),
    "aio_disconnect": (_INT, _HANDLE, _FLAGS),
    "aio_get_fd": (_INT, _HANDLE),
    "aio_get_direction": (ctypes.c_uint, _HANDLE),
    "aio_notify_read": (_INT, _HANDLE),
    "aio_notify_write": (_INT, _HANDLE),
    "aio_is_dead": (_INT, _HANDLE),
    "aio_is_closed": (_INT, _HANDLE),
    "aio_command_completed": (_INT, _HANDLE, ctypes.c_uint64),
    "aio_peek_command_completed": (_COOKIE, _HANDLE),
}


class Facts(NamedTuple):
    """What a server says of an export."""

    size_bytes: int
    is_read_only: bool
    can_flush: bool
    can_trim: bool
    can_zero: bool
    can_multi_conn: bool
    least_bytes: int
    """Of a request; 0 where the server doesn't say."""
    most_bytes: int


class LibNbd:
    """The library. Raises NeedsPackage where it is missing."""

    def __init__(self) -> None:
        try:
            self._quick = ctypes.PyDLL(LIBRARY)
            self._slow = ctypes.CDLL(LIBRARY)
        except OSError:
            raise NeedsPackage(
                what="an NBD origin",
                package=PACKAGE,
                remedy="scripts/install-origins installs it",
            ) from None
        for library in (self._quick, self._slow):
            for name, (result, *words) in _FUNCTIONS.items():
                function = getattr(library, f"nbd_{name}")
                function.restype, function.argtypes = result, words

    def connect(self, uri: str) -> int:
        """A handle that is connected. Waits for the server. Raises OSError."""
        handle = self._slow.nbd_create()
        if not handle:
            raise MemoryError
        if (
            self._slow.nbd_set_uri_allow_local_file(handle, True)
            or self._slow.nbd_set_pread_initialize(handle, False)
            or self._slow.nbd_connect_uri(handle, uri.encode())
        ):
            error = self._error()
            self._slow.nbd_close(handle)
            raise error
        return int(handle)

    def facts(self, handle: int) -> Facts:
        """What the server said when it was connected."""
        quick = self._quick
        return Facts(
            quick.nbd_get_size(handle),
            quick.nbd_is_read_only(handle) > 0,
            quick.nbd_can_flush(handle) > 0,
            quick.nbd_can_trim(handle) > 0,
            quick.nbd_can_zero(handle) > 0,
            quick.nbd_can_multi_conn(handle) > 0,
            max(quick.nbd_get_block_size(handle, SIZE_MINIMUM), 0),
            max(quick.nbd_get_block_size(handle, SIZE_MAXIMUM), 0),
        )

    def close(self, handle: int) -> None:
        """Hang up. From here on the library touches no memory that it was given."""
        self._quick.nbd_close(handle)

    def say_goodbye(self, handle: int) -> None:
        """Ask the server to end the connection when it has answered everything."""
        self._quick.nbd_aio_disconnect(handle, 0)

    def read(self, handle: int, address: int, length_bytes: int, offset_bytes: int) -> int:
        """Begin to read to an address; the cookie of the command. Raises OSError."""
        return self._begun(
            self._quick.nbd_aio_pread(handle, address, length_bytes, offset_bytes, _NOBODY, 0)
        )

    def write(self, handle: int, address: int, length_bytes: int, offset_bytes: int) -> int:
        """Begin to write from an address."""
        return self._begun(
            self._quick.nbd_aio_pwrite(handle, address, length_bytes, offset_bytes, _NOBODY, 0)
        )

    def flush(self, handle: int) -> int:
        """Begin to flush."""
        return self._begun(self._quick.nbd_aio_flush(handle, _NOBODY, 0))

    def trim(self, handle: int, length_bytes: int, offset_bytes: int) -> int:
        """Begin to discard."""
        return self._begun(self._quick.nbd_aio_trim(handle, length_bytes, offset_bytes, _NOBODY, 0))

    def zero(self, handle: int, length_bytes: int, offset_bytes: int, flags: int) -> int:
        """Begin to write zeroes."""
        return self._begun(
            self._quick.nbd_aio_zero(handle, length_bytes, offset_bytes, _NOBODY, flags)
        )

    def fd(self, handle: int) -> int:
        """The socket, to wait for."""
        return int(self._quick.nbd_aio_get_fd(handle))

    def direction(self, handle: int) -> int:
        """What to wait for at the socket."""
        return int(self._quick.nbd_aio_get_direction(handle))

    def notify_read(self, handle: int) -> None:
        """Go on, as the socket is readable. The handle may be dead afterwards."""
        self._quick.nbd_aio_notify_read(handle)

    def notify_write(self, handle: int) -> None:
        """Go on, as the socket is writable."""
        self._quick.nbd_aio_notify_write(handle)

    def is_over(self, handle: int) -> bool:
        """Whether the connection has ended."""
        quick = self._quick
        return bool(quick.nbd_aio_is_dead(handle) or quick.nbd_aio_is_closed(handle))

    def next_done(self, handle: int) -> tuple[int, int] | None:
        """The cookie and the errno (0: none) of a command that is done, if there is one."""
        cookie = self._quick.nbd_aio_peek_command_completed(handle)
        if cookie <= 0:
            return None
        is_bad = self._quick.nbd_aio_command_completed(handle, cookie) < 0
        return cookie, (self._quick.nbd_get_errno() or errno.EIO) if is_bad else 0

    def _begun(self, cookie: int) -> int:
        if cookie < 0:
            raise self._error()
        return cookie

    def _error(self) -> OSError:
        """The last error of this thread; its text is the library's."""
        number = self._quick.nbd_get_errno() or errno.EIO
        text = self._quick.nbd_get_error()
        if not text:
            return system_error(number)
        # The library says which of its functions failed first, which tells a user nothing.
        return OSError(number, text.decode(errors="replace").partition(": ")[2] or text.decode())
