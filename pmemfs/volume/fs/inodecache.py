"""The inodes of a mounted file system that are in memory. An inode is read when it is needed.

Invariants:
- an inode in memory says what its log says, because every change goes through a transaction first.
  Only the live line changes without one;
- nothing here changes an inode that is being read in steps. A caller who needs it reads it to its
  end first, or is told to come again. Otherwise the reader would miss a record behind its tail. If
  a worker changes it, the reading begins anew (`catchup`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from pmemfs.errors import DamagedFileSystem, system_error
from pmemfs.volume.fs.ground import Ground
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.livelines import LiveLines
from pmemfs.volume.fs.reading import (
    NotRead,
    Reading,
    Steps,
    may_read_in_steps,
    read_live,
    reading_inode,
)

READING_STEPS = 16
"""How many frames of a log are read while other requests wait: some thousand records, some ms."""
_RUNS_A_STEP = 512


class InodeCache:
    """The inodes of one file system."""

    def __init__(self, ground: Ground, lines: LiveLines) -> None:
        self._ground = ground
        self._lines = lines
        self._inodes: dict[int, Inode] = {}
        self._readings: dict[int, Reading] = {}
        self.compressed: set[int] = set()
        """Files with a compression that came into memory, or changed, since somebody looked."""

    def inode(self, number: int) -> Inode:
        """An inode. Raises OSError: ESTALE if there is none, EIO if it is damaged; NotRead.

        A number that no inode can have is not damage: it may come from a file handle that outlasts
        its inode, or from a program that made it up.
        """
        inode = self._inodes.get(number)
        if inode is None:
            if self.read_on(number, READING_STEPS if may_read_in_steps.get() else None):
                raise NotRead(number)
            inode = self._inodes[number]
        inode.used_at = self._ground.clock
        return inode

    def read_on(self, number: int, steps: int | None = READING_STEPS) -> bool:
        """Read an inode that is not in memory, or go on reading it; whether there is more to read.

        Raises OSError as `inode` does; the next call then starts anew.
        """
        if number in self._inodes:
            return False
        ground = self._ground
        reading = self._readings.pop(number, None) or Reading(self._reading(number))
        try:
            if reading.go_on(steps):
                self._readings[number] = reading
                return True
            inode = reading.inode
        except DamagedFileSystem as damage:
            if not ground.table.is_possible(number):
                raise system_error(errno.ESTALE) from None
            raise ground.found_damage(str(damage)) from None
        if inode is None:
            raise OSError(errno.ESTALE, "no such inode")
        # The live line counts for another epoch, since a truncation was committed and then the
        # crash came before its line was stored. The data plane knows nothing but the line.
        if inode.is_file and not ground.read_only and read_live(ground.medium, inode)[0] is None:
            self._lines.set_live_size(inode, inode.state.size_bytes)
        if inode.is_encrypted and inode.is_file and not ground.read_only:
            self._lines.carry_out_redo(inode)
        self.keep(inode)
        return False

    def read_inode(self, number: int) -> Inode | None:
        """Read an inode without keeping it. Raises DamagedFileSystem, as `reading.read_inode`.

        It also raises where the file owns frames of inodes: a write to it would destroy them.
        """
        reading = Reading(self._reading(number))
        reading.go_on()
        return reading.inode

    def cached(self, number: int) -> Inode | None:
        """An inode if it is in memory."""
        return self._inodes.get(number)

    def keep(self, inode: Inode) -> None:
        """Keep a new inode in memory from now on."""
        inode.used_at = self._ground.clock
        self._inodes[inode.number] = inode
        if inode.transform is not None:
            self.note_compressed(inode)

    def note_compressed(self, inode: Inode) -> None:
        """A file that has a transformation has got plain frames, or came into memory."""
        if inode.is_file and not inode.is_encrypted:
            self.compressed.add(inode.number)

    def forget(self, number: int) -> None:
        """Drop an inode from memory, if it is there."""
        self._inodes.pop(number, None)

    def begin_anew(self, number: int) -> None:
        """A worker has changed an inode: if it is being read in steps, read it from the start."""
        self._readings.pop(number, None)

    @property
    def known(self) -> list[int]:
        """The inodes that are in memory or are being read."""
        return [*self._inodes, *self._readings]

    def __contains__(self, number: int) -> bool:
        """Whether an inode is in memory, or is being read in steps."""
        return number in self._inodes or number in self._readings

    @property
    def inodes(self) -> Iterable[Inode]:
        """The inodes in memory."""
        return self._inodes.values()

    def __len__(self) -> int:
        return len(self._inodes)

    def _reading(self, number: int) -> Steps:
        table = self._ground.table
        inode = yield from reading_inode(self._ground.medium, table, number)
        if inode is not None:
            for at, run in enumerate(inode.runs()):
                if table.has_inodes(run):
                    raise DamagedFileSystem(why=f"inode {number}: it has frames of inodes")
                if at % _RUNS_A_STEP == _RUNS_A_STEP - 1:
                    yield
        return inode
