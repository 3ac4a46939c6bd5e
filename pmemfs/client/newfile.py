"""A file that is made in the pool, and appears under its name when it is complete.

Invariants:
- until the commit the file has no name, so a program or a machine that dies leaves nothing behind.
  It has a hidden name (`.pmemfs-new-…`) for the instant in which it replaces another file, because
  link(2) replaces none; and all the time where the engine has no unnamed files (pyfuse3 has no
  O_TMPFILE);
- the content is durable before the name is. So whoever finds the name, after a power failure too,
  finds all of the content: `commit` is all or nothing;
- a name that is taken changes from the old file to the new one in one step.
"""

from __future__ import annotations

import errno
import os
import secrets
from typing import TYPE_CHECKING

from pmemfs.client.connection import Connection
from pmemfs.client.mapping import Array, Mapping, Wanted, map_all
from pmemfs.errors import Closed

if TYPE_CHECKING:
    from types import TracebackType

_PERMISSIONS = 0o666
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.EINVAL)


class NewFile:
    """An array in a file that has no name yet. `with` gives it up if it is not committed."""

    def __init__(self, connection: Connection, wanted: Wanted) -> None:
        self._connection = connection
        self._path = connection.full(wanted.path)
        self._directory, self._name = os.path.split(self._path)
        self._hidden = ""
        with connection.translated():
            self._fd = self._made()
        try:
            with connection.translated():
                os.ftruncate(self._fd, wanted.length_bytes)
                status = os.fstat(self._fd)
            connection.check_device(self._path, status)
            (memory,) = map_all(connection, [wanted], [status.st_ino], mode="r+")
            self._mapping = Mapping(memory)
        except BaseException:
            self._give_up()
            raise

    def __repr__(self) -> str:
        return f"<NewFile {self._path!r}{', closed' if self._fd < 0 else ''}>"

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
        if self._fd < 0:
            raise Closed(what=f"the new file {self._path}")
        self._mapping.flush()
        with self._connection.translated():
            os.fsync(self._fd)
            self._name_it()
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        """Let go of the pages; a file that was not committed is gone, except for its views."""
        self._mapping.release()
        self._give_up()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # It has none if it could not be made.
        if getattr(self, "_fd", -1) >= 0:
            self._give_up()

    def _made(self) -> int:
        directory = self._directory or "."
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _PERMISSIONS)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        self._hidden = self._hidden_name()
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        return os.open(self._hidden, flags, _PERMISSIONS)

    def _hidden_name(self) -> str:
        return os.path.join(self._directory, f".pmemfs-new-{secrets.token_hex(8)}")

    def _name_it(self) -> None:
        if not self._hidden:
            try:
                self._link(self._path)
            except FileExistsError:
                self._hidden = self._hidden_name()
                self._link(self._hidden)
            else:
                return
        os.replace(self._hidden, self._path)
        self._hidden = ""

    def _link(self, path: str) -> None:
        # Only with a directory Python calls linkat(2), which alone follows the link in /proc.
        os.link(f"/proc/self/fd/{self._fd}", path, src_dir_fd=self._fd)

    def _give_up(self) -> None:
        hidden, self._hidden = self._hidden, ""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if hidden:
            try:
                os.unlink(hidden)
            except OSError:
                # The mount is gone, and whoever mounts the pool again finds the file.
                return
