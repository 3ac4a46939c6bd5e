"""The search for dirty blocks after a mount that did not end, in the background.

Only groups whose word is not 0 can have dirty blocks, so it costs time where the last mount wrote,
and none elsewhere. A group that is needed before its turn is searched then, because nothing in it
changes unseen (see `groups.py`). So every dirty block of the last mount is counted once, and none
that has become dirty since.
"""

from __future__ import annotations

from itertools import islice

from pmemfs.volume.cache.groups import SEEING, UNSEEN, Groups
from pmemfs.volume.cache.steps import Steps

_GROUPS_AT_ONCE = 4


class DirtySearch:
    """Finds what the last mount has left dirty."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._next = 0
        self._has_skipped = False
        self.is_done = groups.is_settled
        """Whether all of it was found: `Groups.found_dirty` is right now."""

    def step(self) -> Steps[bool]:
        """Search in some more groups; whether there are more."""
        if self.is_done:
            return False
        groups = list(islice(self._groups.suspects(self._next), _GROUPS_AT_ONCE))
        if groups:
            self._next = groups[-1] + 1
            # Another task is about to see this one, or to fail.
            self._has_skipped |= any(self._groups.state(group) == SEEING for group in groups)
            yield from self._groups.seeing(g for g in groups if self._groups.state(g) == UNSEEN)
        elif self._has_skipped:
            self._next, self._has_skipped = 0, False
        else:
            self.is_done = True
        return not self.is_done
