"""The keeper of a mount, on the side of the daemon: begun, watched, and given to another
version."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from pmemfs.control import Peer
from pmemfs.control.starter import Starter
from pmemfs.logs import log_for_others
from pmemfs.mount.processes import python_words, raise_descriptors

if TYPE_CHECKING:
    from pmemfs.control.server import Listening
    from pmemfs.control.standby import Standby
    from pmemfs.fuse.keeping import Keeper
    from pmemfs.fuse.session import Session
    from pmemfs.fuse.upgrading import Upgrader
    from pmemfs.pool import Pool

log = logging.getLogger("pmemfs")


def _call_soon(token: trio.lowlevel.TrioToken, call: Callable[[], None]) -> None:
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(call)


class Keeping:
    """What a daemon does so that its mount outlives it."""

    def __init__(
        self, pool: Pool, session: Session, keep_pins_with: Callable[[Keeper], None],
        words: Sequence[str], standby: Standby | None,
    ) -> None:  # fmt: skip
        """`words` follow those that start a daemon of any version; `standby` waits for the end of
        this one."""
        self._pool = pool
        self._session = session
        self._keep_pins_with = keep_pins_with
        self._words = words
        self._standby = standby
        self._upgrader: Upgrader | None = None
        self.nursery: trio.Nursery | None = None
        """Of the tasks that serve the mount."""
        self._starter: Starter | None = None

    async def serve(
        self, starter: Starter, listening: Listening, pool: str, hang_seconds: int
    ) -> None:
        """Once the mount is to stay, have a keeper hold what it needs, and notice its end."""
        kept = self._session.kept
        if kept is None:
            return
        self._starter = starter
        listener, name_fd = listening
        kept.store("listener", [listener.fileno(), name_fd], os.fsencode(listener.getsockname()))
        if place := log_for_others():
            fd, line = place
            name = pool.replace("{", "{{").replace("}", "}}")
            kept.store("log", [fd], os.fsencode(line.replace("{message}", f"{name}: {{message}}")))
        if kept.keeper is None:
            self._have_standby()
            is_kept = trio.Event()
            token = trio.lowlevel.current_trio_token()
            starter.when_kept(functools.partial(_call_soon, token, is_kept.set))
            await is_kept.wait()
            try:
                self._begin()
            finally:
                # Only now the command ends: its user may kill whatever he likes from then on.
                starter.say_kept()
            if kept.keeper is None:
                return
        else:
            # A daemon of another version may have started this one, whose successors stay for now.
            kept.after_upgrade(self._have_own_successors)
        kept.have_watched(hang_seconds)
        await kept.watch()

    def _have_own_successors(self) -> None:
        assert self._session.kept is not None
        self._have_standby()
        self._session.kept.store_words(self._own_words)

    def _have_standby(self) -> None:
        kept, standby = self._session.kept, self._standby
        assert kept is not None
        if standby is None:
            kept.drop("standby")
            return
        kept.store("standby", standby.fds, b"%d" % standby.pid)
        standby.close()

    def _begin(self) -> None:
        """Have the first keeper, if one can be started."""
        # Imported here, so that a mount is made before.
        from pmemfs.fuse.keeping import Keeper

        # The keeper needs as many as this process for what clients have pinned.
        raise_descriptors()
        try:
            keeper = Keeper.start()
        except OSError as error:
            log.error("the mount ends with its processes, because no keeper can be started: %s",
                      error)  # fmt: skip
        else:
            self._have(keeper)

    async def upgrade(
        self, daemon: list[str], keeper: list[str], knows: dict[str, int], peer: Peer
    ) -> Mapping[str, object]:
        """Let another version take the mount over; see `Upgrader`."""
        from pmemfs.fuse.upgrading import Upgrader

        session = self._session
        if self._upgrader is None:
            self._upgrader = Upgrader(self._pool, session, self._have, self._words)
        await self._upgrader.begin(daemon, keeper, knows, peer.is_gone)
        assert session.kept is not None
        assert self.nursery is not None
        self.nursery.start_soon(self._upgrader.end, daemon)
        deaths, _ = session.kept.deaths()["daemon"]
        # As `observe.answers.UpgradeBegun` says.
        return {
            "since_ns": session.kept.since_ns,
            "data_plane_pid": session.data_plane_pid,
            "daemon_deaths": deaths,
        }

    @property
    def _own_words(self) -> list[str]:
        """The words that start a successor of this version."""
        return [*python_words("pmemfs.daemons.mountd"), *self._words]

    def _have(self, keeper: Keeper) -> None:
        """Have a keeper, instead of the one that there is, if there is one."""
        assert self._session.kept is not None
        if self._starter and keeper.pid is not None:
            # Before another keeper ends, because systemd ends what the main process leaves.
            self._starter.say_keeper(keeper.pid)
        self._keep_pins_with(keeper)
        self._session.kept.begin(keeper, self._own_words)
