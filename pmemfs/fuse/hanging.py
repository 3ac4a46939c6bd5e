"""Whether a data plane makes progress, as far as its daemon can tell.

Invariant: looks are counted, and no time is measured. So a daemon that has stood still itself does
not take a data plane for hung that did nothing meanwhile.
"""

from __future__ import annotations

import logging

import trio

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.fuse.notices import Notices, Told
from pmemfs.fuse.planes import DataPlane

log = logging.getLogger(__name__)

_LOOKS = 4
"""So many in a row must have seen no progress."""
_LOOKS_AT_START = 10 * _LOOKS
"""Until every worker runs, it takes ten times as long before a data plane counts as hung."""
_NO_INODE = 0
"""A notice of this inode changes nothing, but a thread of the data plane passes it on."""


class PlaneWatch:
    """Looks at a data plane from time to time, and kills what hangs."""

    def __init__(self, name: str, shared: SharedMemory, notices: Notices, plane: DataPlane) -> None:
        self._name = name
        self._shared = shared
        self._notices = notices
        self._plane = plane
        self._pid = 0
        """The process that the rest is about."""
        self._looks_at_start = 0
        """How many more looks it has to get ready; 0: it is ready, or has had them all."""
        self._sections: dict[int, tuple[int, int]] = {}
        """Of workers that were in a section: its word, and how often it was seen."""
        self._asked: Told | None = None
        self._unanswered = 0

    async def watch(self, seconds: int) -> None:
        """Kill the process of the data plane whenever it has made no progress for so long."""
        while True:
            await trio.sleep(seconds / _LOOKS)
            stuck = self.look()
            if stuck:
                log.error(
                    "%s: no progress was made for %d s by %s of the data plane (pid %d): it is "
                    "killed", self._name, seconds, stuck, self._pid,
                )  # fmt: skip
                self._plane.process.kill()
                self._forget()

    def look(self) -> str | None:
        """What makes no progress and should; None if all do."""
        if self._plane.process.pid != self._pid:
            self._forget()
        if self._looks_at_start and not self._plane.is_ready:
            self._looks_at_start -= 1
            return None
        self._looks_at_start = 0
        before = self._sections
        self._sections = {}
        for worker in range(self._shared.worker_count):
            section = self._shared.slot_word(worker, "section")
            # An odd word lasts as long as a request does.
            if section % 2:
                known, looks = before.get(worker, (section, 0))
                looks = looks + 1 if known == section else 1
                self._sections[worker] = section, looks
                if looks > _LOOKS:
                    return f"a request of worker {worker}"
        if self._asked is None or self._asked.is_over:
            self._asked, self._unanswered = self._notices.tell(_NO_INODE), 0
        elif (unanswered := self._unanswered + 1) >= _LOOKS:
            return "the threads"
        else:
            self._unanswered = unanswered
        return None

    def _forget(self) -> None:
        self._pid = self._plane.process.pid
        self._looks_at_start = _LOOKS_AT_START
        self._sections = {}
        self._asked, self._unanswered = None, 0
