"""The search for dirty blocks after a mount that did not end, in the background.

Only groups whose word is not 0 can have dirty blocks, so they come first. A group that is needed
before its turn is searched then, because nothing in it changes unseen (see `groups.py`). So every
dirty block of the last mount is counted once, and none that has become dirty since.

Then dirty blocks can be written back. Beside that, all other groups are seen as well. Otherwise the
next mount, which follows one that has ended in order, would take for durable what the process
before has left there.
"""

from __future__ import annotations

from itertools import islice

from pmemfs.errors import PmemfsError
from pmemfs.volume.cache.groups import SEEING, UNSEEN, Groups
from pmemfs.volume.cache.steps import Steps

_SUSPECTS_AT_ONCE = 2
_GROUPS_AT_ONCE = 64


class DirtySearch:
    """Finds what the last mount has left dirty."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._next = 0
        self._has_skipped = False
        self.has_counted = groups.is_settled
        """Whether all dirty blocks were found: `Groups.found_dirty` is right now."""
        self.is_done = groups.is_settled
        """Whether, besides, all that the last mount has left is durable."""
        self.has_failed = False
        """Whether a group could not be read, so that the next mount must search again."""

    def begin_anew(self) -> None:
        """Search all groups again, because nothing is known of them any more."""
        self._next = 0
        self._has_skipped = self.has_failed = False
        self.has_counted = self.is_done = False

    def step(self) -> Steps[bool]:
        """Search in some more groups; whether there are more."""
        if self.is_done:
            return False
        if self.has_counted:
            groups = list(range(self._next, min(self._next + _GROUPS_AT_ONCE, self._groups.count)))
        else:
            groups = list(islice(self._groups.suspects(self._next), _SUSPECTS_AT_ONCE))
        if groups:
            self._next = groups[-1] + 1
            # Another task is about to see this one, or to fail.
            self._has_skipped |= any(self._groups.state(group) == SEEING for group in groups)
            unseen = [group for group in groups if self._groups.state(group) == UNSEEN]
            try:
                yield from self._groups.seeing(unseen)
            except (OSError, PmemfsError):
                # The others go on: what is dirty in them must not wait for bad memory.
                self.has_failed = True
                raise
            return True
        self._next = 0
        if self._has_skipped:
            self._has_skipped = False
        elif self.has_counted:
            self.is_done = True
        else:
            self.has_counted = True
        return not self.is_done
