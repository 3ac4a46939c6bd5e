"""Where a daemon's log goes: to the journal if there is one, else to a file."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

from pmemfs.text import printable

JOURNAL = "/run/systemd/journal/dev-log"
_NAME_LIMIT = 60
"""Characters of a pool's name in that of its log, so that no file system finds it too long."""

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


def log_file(name: str) -> Path:
    """The log file of pools of that name. Raises RuntimeError for a user without a home."""
    name = name[:_NAME_LIMIT]
    if os.geteuid() == 0:
        return Path("/var/log/pmemfs") / f"{name}.log"
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "pmemfs" / f"{name}.log"


def start_logging(name: str, *, foreground: bool) -> str:
    """Send the log of this process to where it belongs; in words, where that is."""
    handler, where = _handler(name, foreground)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return where


def _handler(name: str, foreground: bool) -> tuple[logging.Handler, str]:
    if foreground:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Formatter("pmemfs: %(levelname)s: %(message)s"))
        return handler, "standard error"
    if os.path.exists(JOURNAL):
        handler = logging.handlers.SysLogHandler(
            JOURNAL, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.setFormatter(Formatter("pmemfs[%(process)d]: %(message)s"))
        return handler, "the journal (journalctl -t pmemfs)"
    try:
        path = log_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several daemons may share a file: appended to line by line, and moved away by logrotate.
        handler = logging.handlers.WatchedFileHandler(path, errors="backslashreplace")
    except (OSError, RuntimeError):
        return logging.NullHandler(), "nowhere: there is no place for a log file"
    handler.setFormatter(Formatter(_FILE_FORMAT))
    return handler, str(path)
