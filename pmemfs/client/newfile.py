"""A file that is made in the pool, and appears under its name when it is complete.

`commit` is all or nothing: `unnamed` says what that rests on.
"""

from __future__ import annotations

import os

from pmemfs.client.closing import Closing
from pmemfs.client.connection import Connection
from pmemfs.client.mapping import Array, Mapping, Wanted, map_all
from pmemfs.client.unnamed import UnnamedFile
from pmemfs.errors import Closed


class NewFile(Closing):
    """An array in a file that has no name yet. `with` gives it up if it is not committed."""

    def __init__(self, connection: Connection, wanted: Wanted) -> None:
        self._connection = connection
        with connection.translated():
            self._file = UnnamedFile(connection.full(wanted.path))
        try:
            with connection.translated():
                os.ftruncate(self._file.fd, wanted.length_bytes)
                status = os.fstat(self._file.fd)
            connection.check_device(self._file.path, status.st_dev)
            (memory,) = map_all(connection, [wanted], [status.st_ino], mode="r+")
            self._mapping = Mapping(memory)
        except BaseException:
            self._file.give_up()
            raise

    def __repr__(self) -> str:
        return f"<NewFile {self._file.path!r}{', closed' if self._file.fd < 0 else ''}>"

    @property
    def array(self) -> Array:
        """The content, a plain ndarray. Every view of it keeps the pages. Raises Closed."""
        return self._mapping.array

    @property
    def mapping(self) -> Mapping:
        """The hold on the pages, with `flush`, `pin` and the like."""
        return self._mapping

    def commit(self) -> None:
        """Make the content durable, then give the file its name, durably.

        The array may be used afterwards. Raises OSError, Closed if it was committed or closed
        before, DaemonGone, and NoAnswer.
        """
        if self._file.fd < 0:
            raise Closed(what=f"the new file {self._file.path}")
        self._mapping.flush()
        with self._connection.translated():
            self._file.appear()

    def close(self) -> None:
        """Let go of the pages; a file that was not committed is gone, except for its views."""
        self._mapping.release()
        self._file.give_up()
