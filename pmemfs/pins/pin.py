"""One pin: references on every page of some ranges of files, for one client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.base import Piece
from pmemfs.volume.pinned import Held

_COMMAND_BYTES = 200
_MARK_BYTES = 65536
_START_FIELD = 19
"""Of the fields of /proc/PID/stat behind the name of the command: `starttime`."""

HEARING = 2
"""In the word of marks: its pin is being heard, and what it said may not be noted yet."""
OVER = 4
"""In the word of marks: the pin has no references any more."""
_FORCE = 1
_USERS_SHIFT, _FORKS_SHIFT = 8, 32
_MOST_USERS = (1 << 24) - 1


class Client:
    """A process that has pins. Its number and the time of its start tell it from all others."""

    def __init__(self, pid: int, started: int, command: str) -> None:
        self.pid = pid
        self.started = started
        self.command = command
        self.pin_count = 0
        self.page_count = 0


class WantedRange(NamedTuple):
    """A range of a file that a client wants to pin."""

    inode: int
    offset_bytes: int
    length_bytes: int
    """-1: up to the end of the file."""
    path: str = ""
    """What the client calls the file; only for people."""


class PinnedFile(NamedTuple):
    """A range of a file as it was pinned."""

    inode: int
    generation: int
    path: str
    offset_bytes: int
    length_bytes: int
    size_bytes: int
    """Of the file."""
    pieces: list[Piece]


class HeldRun(NamedTuple):
    """A run of frames to take references on."""

    pfn: int
    frame_count: int
    inode: int
    first_index: int
    """Which frame of the inode comes first."""


class Marks:
    """What the users of a pin have said: each fork wrote `f` and each user `d`; `x` says that
    addresses were taken away by force.

    A daemon that takes the place of a dead one finds them as one word (see `words`). Where the dead
    one may have heard what it had not noted yet, that counts as force.
    """

    __slots__ = ("_forks", "_has_force", "_users")

    def __init__(self, word: int = 0) -> None:
        self._forks = word >> _FORKS_SHIFT
        self._users = (word >> _USERS_SHIFT) & _MOST_USERS
        self._has_force = bool(word & (_FORCE | HEARING))

    def add(self, said: bytes) -> None:
        """They said more."""
        self._forks += said.count(b"f")
        self._users += said.count(b"d")
        self._has_force = self._has_force or b"x" in said

    @property
    def word(self) -> int:
        """All of it as one word."""
        has_force = self._has_force or max(self._forks, self._users) > _MOST_USERS
        users = min(self._users, _MOST_USERS) << _USERS_SHIFT
        return min(self._forks, _MOST_USERS) << _FORKS_SHIFT | users | _FORCE * has_force

    @property
    def are_orderly(self) -> bool:
        """Whether each process that had the pin has said that it needs the pages no more."""
        return not self._has_force and self._users == 1 + self._forks


class Pin:
    """A pin, in the making, living, resting or ending."""

    __slots__ = (
        "client", "fd", "files", "held", "is_kept", "is_renamed", "is_stale", "is_writable",
        "marks", "number", "owed", "page_count", "piece_count", "place", "runs", "since_ns",
        "taken", "tell",
    )  # fmt: skip

    def __init__(
        self, number: int, place: int, client: Client, since_ns: int, *, is_writable: bool,
        tell: Callable[[Pin], None],
    ) -> None:  # fmt: skip
        self.number = number
        self.place = place
        self.client = client
        self.since_ns = since_ns
        self.is_writable = is_writable
        self.tell = tell
        """Called when `is_stale` or `is_renamed` has become true."""
        self.fd = -1
        """The daemon's end of the socket; -1 before the pin lives and after it has ended."""
        self.marks = Marks()
        self.is_kept = False
        """Whether the keeper has it, for a daemon that takes the place of this one."""
        self.page_count = 0
        self.is_renamed = False
        self.forget()

    def forget(self) -> None:
        """Begin anew, without references."""
        self.is_stale = False
        self.piece_count = 0
        """Of all files together, holes included."""
        self.files: list[PinnedFile] = []
        self.held: list[Held] = []
        self.runs: list[HeldRun] = []
        self.taken: list[HeldRun] = []
        """The references that were taken, by each call."""
        self.owed: list[HeldRun] = []
        """References that were taken in page structures of an older generation, which count no
        more. They are to be taken again."""

    @property
    def who(self) -> str:
        """The program that has it, for people; while its frames rest, the one that had it."""
        client = self.client
        return f"{client.command} (pid {client.pid})" if client.command else f"pid {client.pid}"

    def hear(self) -> bool:
        """Hear some of what its users say; whether they said anything.

        Descriptors that come with it are closed by the kernel, because there is no room for them.
        """
        try:
            said = os.read(self.fd, _MARK_BYTES)
        except OSError:
            return False
        self.marks.add(said)
        return bool(said)

    def become_stale(self) -> None:
        """A page of the pin has left its file, or has moved in it."""
        self.is_stale = True
        self.tell(self)

    def was_renamed(self) -> None:
        """A name of a pinned file was removed or changed."""
        self.is_renamed = True
        self.tell(self)


def runs_of(inode: int, position: int, pieces: Iterable[Piece]) -> list[HeldRun]:
    """The runs of frames in the pieces of a file, whose offsets count from a position in it."""
    return [
        HeldRun(
            pool_bytes >> PAGE_SHIFT, length >> PAGE_SHIFT, inode,
            (position + offset) >> PAGE_SHIFT,
        )
        for offset, pool_bytes, length in pieces
        if pool_bytes >= 0
    ]  # fmt: skip


def read_client(pid: int) -> Client:
    """The client with this pid, as /proc shows it; of one in another pid namespace (0) nothing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command may have spaces and parentheses in it.
            started = int(file.read().rpartition(b")")[2].split()[_START_FIELD])
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(_COMMAND_BYTES).rstrip(b"\0").split(b"\0")
    except (OSError, ValueError, IndexError):
        return Client(pid, 0, "")
    return Client(pid, started, os.fsdecode(b" ".join(words)).encode("utf-8", "replace").decode())
