"""A file that has no name until it is complete, in a mount or in any other file system.

Invariants:
- nobody finds the file before `appear`, and a program or a machine that dies leaves nothing behind.
  It has a hidden name (`.pmemfs-new-…`) for the instant in which it replaces another file, because
  link(2) replaces none; and all the time where a file system has no O_TMPFILE, as pyfuse3 has none;
- its content is durable before its name is there. So a name leads to all of the content, after a
  power failure, too;
- a name that is taken changes from the old file to the new one in one step.
Source: open(2), O_TMPFILE.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from pmemfs.medium.addresses import Descriptor

HIDDEN_PREFIX = ".pmemfs-new-"
PERMISSIONS = 0o666
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.EINVAL)


class UnnamedFile:
    """A new file, open for reading and writing."""

    def __init__(self, path: str, permissions: int = PERMISSIONS) -> None:
        """`path` is where it is to appear, and the umask is taken from `permissions`.

        Raises OSError.
        """
        self.path = path
        self._directory = os.path.dirname(path) or "."
        self._hidden = ""
        self._pid = os.getpid()
        self._file = self._made(permissions)

    def __del__(self) -> None:
        # It has none if it could not be made.
        if getattr(self, "fd", -1) >= 0:
            self.give_up()

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it is closed."""
        return self._file.number

    def appear(self, *, may_replace: bool = True) -> None:
        """Make the content durable, give it its name, and close it.

        Raises OSError; FileExistsError only without `may_replace`. After an error the file still is
        what it was, and this may be called again.
        """
        with self._named():
            os.fsync(self.fd)
            if self._hidden and not may_replace:
                os.link(self._hidden, self.path)
            elif not self._hidden:
                try:
                    self._link(self.path)
                except FileExistsError:
                    if not may_replace:
                        raise
                    hidden = self._hidden_name()
                    self._link(hidden)
                    # Only now: where the pool has no room for the name, there is none.
                    self._hidden = hidden
            if self._hidden and may_replace:
                os.replace(self._hidden, self.path)
                self._hidden = ""
        self.give_up()

    def give_up(self) -> None:
        """Close it. What has no name of its own by now is gone, unless a fork has it open, too."""
        self._file.close()
        hidden, self._hidden = self._hidden, ""
        # A forked child that lets go of its copy leaves the file to its parent.
        if hidden and self._pid == os.getpid():
            # The file system may be gone; whoever finds it again finds this file.
            with contextlib.suppress(OSError):
                os.unlink(hidden)

    def _made(self, permissions: int) -> Descriptor:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return Descriptor.opened(self._directory, os.O_TMPFILE | flags, permissions)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        hidden = self._hidden_name()
        with self._named():
            file = Descriptor.opened(hidden, os.O_CREAT | os.O_EXCL | flags, permissions)
        self._hidden = hidden
        return file

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Have errors name the file by its own name, which alone its user knows."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def _hidden_name(self) -> str:
        return os.path.join(self._directory, f"{HIDDEN_PREFIX}{os.urandom(8).hex()}")

    def _link(self, path: str) -> None:
        # Only with a directory Python calls linkat(2), which alone follows the link in /proc.
        os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd)
