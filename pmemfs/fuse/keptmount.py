"""A mount that outlives its processes, from the side of its daemon.

Invariants:
- nothing is stored with a keeper before the command has said that the mount stays: until then, the
  death of any process ends it;
- `arguments` is stored last, because from then on a successor is started, and finds everything;
- a data plane begins nothing before the keeper knows its process: two of them would answer the same
  requests;
- a data plane that dies again and again ends the mount, because requests that can't be served would
  otherwise wait for ever;
- a daemon of another version has no successor of its own version before its data plane serves:
  until then, whatever ends it brings back the version of before, whose successors the keeper has.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import trio

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.errors import EXIT_FAILED, PmemfsError, cause_of, sentence_of
from pmemfs.fuse import wire
from pmemfs.fuse.planes import DataPlane
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.transport import Choice

if TYPE_CHECKING:
    from pmemfs.fuse.keeping import Keeper

log = logging.getLogger(__name__)

_MOST_DEATHS = int(os.environ.get("PMEMFS_MOST_DEATHS", 5))
"""What kills data planes on purpose, as tests do, needs more."""
_WITHIN_SECONDS = 60


class KeptMount:
    """What is stored with the keeper of a mount, and how often processes of the mount died."""

    def __init__(
        self, medium: MappedMedium, shared: SharedMemory, plane: DataPlane, choice: Choice
    ) -> None:
        self._choice = choice
        self._medium = medium
        self._shared = shared
        self._plane = plane
        self.keeper: Keeper | None = None
        """None: there is none yet, so a death ends the mount."""
        self.since_ns = time.time_ns()
        """When this process began to serve the mount, in ns since 1970."""
        self.is_upgrading = False
        """Whether the data plane is still that of another version."""
        self._after_upgrade: Callable[[], None] | None = None
        self._deaths: list[float] = []
        self._stored: dict[str, tuple[list[int], bytes]] = {}
        """What each keeper is to hold beside what is known here."""
        self._watching: trio.CancelScope | None = None

    def store(self, name: str, fds: Sequence[int] = (), data: bytes = b"") -> None:
        """Have the keeper hold something, as soon as there is one, and each keeper after it."""
        self._forget(name)
        self._stored[name] = [os.dup(fd) for fd in fds], data
        if self.keeper:
            self.keeper.store(name, fds, data)

    def begin(self, keeper: Keeper, words: Sequence[str]) -> None:
        """The mount is to stay: have the keeper hold everything for a daemon that would be started
        by these words. It takes the place of another keeper, if there is one."""
        before, self.keeper = self.keeper, keeper
        for name, (fds, data) in self._stored.items():
            keeper.store(name, fds, data)
        keeper.store("pool", [self._medium.fileno()])
        keeper.store("shared", [self._shared.fd])
        keeper.store("fuse", [self._plane.fuse_fd])
        keeper.store("sockets", self._plane.sockets.fds)
        if self._plane.entries_fd >= 0:
            keeper.store("entries", [self._plane.entries_fd])
        keeper.store("transport", data=self._choice.sentence.encode())
        self.store_plane()
        if before:
            # Two keepers that have the words would start two daemons.
            before.drop("arguments")
        self.store_words(words)
        if before:
            if self._watching:
                self._watching.cancel()
            before.end()

    def store_words(self, words: Sequence[str]) -> None:
        """Have the keeper start successors by these words."""
        if self.keeper:
            self.keeper.store("arguments", data=b"\0".join(map(os.fsencode, words)))

    def after_upgrade(self, call: Callable[[], None]) -> None:
        """Call something as soon as no upgrade is under way, which may be now."""
        if self.is_upgrading:
            self._after_upgrade = call
        else:
            call()

    def end_upgrade(self) -> None:
        """The data plane is no more to be replaced."""
        self.is_upgrading = False
        call, self._after_upgrade = self._after_upgrade, None
        if call:
            call()

    def leave_to_version_of_before(self, error: Exception) -> NoReturn:
        """End this process while it upgrades the mount: the keeper starts the version of before."""
        cause = cause_of(error)
        is_bug = not isinstance(cause, OSError | PmemfsError)
        log.error("%s: the new version can't serve it: %s; that of before takes it over again",
                  self._medium.name, sentence_of(cause),
                  exc_info=cause if is_bug else None)  # fmt: skip
        # What has failed may have said so there, and the next daemon would take it for the end.
        self._shared.set_header_word("ended", 0)
        # Without any of what ends a mount.
        os._exit(EXIT_FAILED)

    def drop(self, name: str) -> None:
        """Have no keeper hold that, whoever has stored it."""
        self._forget(name)
        if self.keeper:
            self.keeper.drop(name)

    def have_watched(self, seconds: float) -> None:
        """Have the keeper kill this process if it hangs for so long; 0: never."""
        if self.keeper:
            self.keeper.watch(seconds)

    def store_plane(self) -> None:
        """Have the keeper know the data plane that serves now."""
        if self.keeper:
            process = self._plane.process
            self.keeper.store("plane", [process.pidfd], str(process.pid).encode())

    def _forget(self, *names: str) -> None:
        for name in names:
            fds, _ = self._stored.pop(name, ([], b""))
            for fd in fds:
                os.close(fd)

    @property
    def says_again(self) -> bool:
        """Whether the kernel gives the next data plane what this one has read and not answered."""
        return self._shared.header_word("minor") >= wire.RESEND_MINOR

    def note_death(self) -> str:
        """Note that the data plane has died; why no other may take its place, empty: one may."""
        pid = self._plane.process.pid
        # A daemon that has died since may have counted it.
        if self._shared.header_word("dead_plane") != pid:
            self._shared.note_death("plane")
            self._shared.set_header_word("dead_plane", pid)
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if then > now - _WITHIN_SECONDS] + [now]
        if self.keeper is None:
            return "that was before the mount was to stay"
        if not self.says_again:
            return "this kernel would not say again what that one has read"
        if len(self._deaths) > _MOST_DEATHS:
            return f"the data plane has died {len(self._deaths)} times within a minute"
        return ""

    def deaths(self) -> dict[str, tuple[int, int]]:
        """How often a daemon, data plane (`plane`) and keeper of the mount have died, and when the
        last one did, in ns since 1970; 0: none has."""
        word = self._shared.header_word
        return {
            whose: (word(f"{whose}_deaths"), word(f"{whose}_died_ns"))
            for whose in ("daemon", "plane", "keeper")
        }

    async def watch(self) -> None:
        """Return when the keeper is gone, though the mount has not ended."""
        while True:
            keeper = self.keeper
            assert keeper is not None
            pid = keeper.pid
            with trio.CancelScope() as self._watching:
                await keeper.wait_until_gone()
            if self.keeper is keeper:
                break
        self._shared.note_death("keeper")
        log.error(
            "%s: the keeper (pid %d) is gone: the mount goes on, and ends with its daemon",
            self._medium.name, pid,
        )  # fmt: skip

    def end(self) -> None:
        """The mount has ended in order: let go of all that the keeper has."""
        self._forget(*list(self._stored))
        if self.keeper:
            self.keeper.end()
