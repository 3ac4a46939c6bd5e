"""Where a daemon's log goes: to the journal if there is one, else to a file."""

from __future__ import annotations

import fcntl
import logging
import logging.handlers
import os
import socket
import sys
import zlib
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from pmemfs.text import printable

JOURNAL = "/run/systemd/journal/dev-log"
_THE_JOURNAL = "the journal (journalctl -t pmemfs)"
_NAME_LIMIT = 60
"""Characters of a pool's name in that of its log, so that no file system finds it too long."""

LIMIT_BYTES = 1 << 20
"""Of a log file; there are two of them for a pool at most."""

_FILE_FORMAT = "%(asctime)s pmemfs[%(process)d]: %(levelname)s: %(message)s"


class Formatter(logging.Formatter):
    """Lines that nobody can forge by the name of a file or pool, and that any terminal can show.

    Those of a traceback are indented.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """See logging.Formatter."""
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


class LogFile(logging.handlers.WatchedFileHandler):
    """A file that never becomes large: a full one gets `.1` behind its name, in place of the last.

    Two daemons may share it for a while, such as one that ends and the next one of its pool. Each
    appends line by line, and follows when the other one, or logrotate, has moved the file away.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            if self.stream is None:
                self.stream = self._open()
                self._statstream()
            self.reopenIfNeeded()
            self._move_full_file()
        except OSError:
            # What can't be moved is appended to: a line in a large file is better than none.
            pass
        if self.stream is not None:
            # Not by FileHandler, which would raise where no file can be opened. No daemon fails
            # because it can't say what it does.
            logging.StreamHandler.emit(self, record)

    def _open(self) -> TextIOWrapper:
        # An administrator may have removed the directory meanwhile.
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        return super()._open()

    def _move_full_file(self) -> None:
        stream = self.stream
        if stream is None or os.fstat(stream.fileno()).st_size < LIMIT_BYTES:
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The other daemon is doing it.
            return
        if os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno())):
            os.replace(self.baseFilename, f"{self.baseFilename}.1")
        self.reopenIfNeeded()


def log_file(pool: str) -> Path:
    """The log file of the pool at an absolute path. Raises RuntimeError for a user without a home.

    Two pools of one name in different directories have different ones.
    """
    name = f"{os.path.basename(pool)[:_NAME_LIMIT]}-{zlib.crc32(os.fsencode(pool)):08x}.log"
    if os.geteuid() == 0:
        return Path("/var/log/pmemfs") / name
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "pmemfs" / name


def log_of(pool: str, uid: int) -> str:
    """Where a daemon of that user most likely has left its log, for a sentence."""
    if os.path.exists(JOURNAL):
        return _THE_JOURNAL
    if uid == os.geteuid() and (file := log_file(pool)).exists():
        return str(file)
    return "its log"


_place = ""


def start_logging(pool: str, *, foreground: bool) -> str:
    """Send the log of the daemon of a pool to where it belongs; in words, where that is."""
    global _place
    handler, _place = _handler(pool, foreground)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return _place


def log_place() -> str:
    """Where the log of this process goes; empty before `start_logging`."""
    return _place


def log_for_others() -> tuple[int, str] | None:
    """Where another process writes lines to this log as errors: a descriptor, and what a line is
    there, with `{time}`, `{pid}` and `{message}`. None: nowhere."""
    (handler,) = logging.getLogger().handlers
    if isinstance(handler, logging.handlers.SysLogHandler):
        priority = handler.encodePriority(handler.facility, "err")
        connection: socket.socket = handler.socket  # type: ignore[attr-defined]
        return connection.fileno(), f"<{priority}>pmemfs[{{pid}}]: {{message}}\0"
    if isinstance(handler, LogFile) and handler.stream:
        return handler.stream.fileno(), "{time} pmemfs[{pid}]: ERROR: {message}\n"
    if isinstance(handler, logging.StreamHandler):
        return sys.stderr.fileno(), "pmemfs: ERROR: {message}\n"
    return None


def _handler(pool: str, foreground: bool) -> tuple[logging.Handler, str]:
    if foreground:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter("pmemfs: %(levelname)s: %(message)s"))
        return handler, "standard error"
    if os.path.exists(JOURNAL):
        handler = logging.handlers.SysLogHandler(
            JOURNAL, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.setFormatter(Formatter("pmemfs[%(process)d]: %(message)s"))
        return handler, _THE_JOURNAL
    try:
        path = log_file(pool)
        handler = LogFile(path, errors="backslashreplace")
    except (OSError, RuntimeError):
        return logging.NullHandler(), "nowhere: there is no place for a log file"
    handler.setFormatter(Formatter(_FILE_FORMAT))
    return handler, str(path)
