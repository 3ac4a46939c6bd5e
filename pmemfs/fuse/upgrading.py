"""A planned end of the daemon: a program of another version takes its place.

    checks      nothing is begun if the other version does not know this pool or this memory, or
                if nobody waits for it any more
    keeper      one of the other version gets all that this one's has; then this one's ends
    drain       requests that were taken are answered; others wait in the sockets
    replace     the keeper starts the other daemon when this one has ended, and counts no death

The other daemon then replaces the data plane (`NativeSession.renew_plane`). Invariant: whatever
fails, the keeper starts this version again, because that is what its `arguments` say until another
daemon serves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from pmemfs.dataplane.layouts import SIGNATURE
from pmemfs.errors import UpgradeFailed
from pmemfs.fuse.keeping import Keeper
from pmemfs.media.label import Mode
from pmemfs.pool import Pool

if TYPE_CHECKING:
    from pmemfs.fuse.session import Session

log = logging.getLogger(__name__)

_DRAIN_SECONDS = 2
_ANSWER_SECONDS = 0.02
_KEEPER_SECONDS = 10


class Upgrader:
    """Ends this process in favour of another version."""

    def __init__(
        self, pool: Pool, session: Session, have: Callable[[Keeper], None], words: Sequence[str]
    ) -> None:
        """`have` has a keeper instead of the one that the mount has; `words` follow those that
        start a daemon."""
        self._pool = pool
        self._session = session
        self._have = have
        self._words = words
        self._is_under_way = False

    async def begin(
        self,
        daemon: Sequence[str],
        keeper: Sequence[str],
        knows: Mapping[str, int],
        has_given_up: Callable[[], bool],
    ) -> None:
        """Have programs of another version ready; `end` ends this process. Raises UpgradeFailed.

        `daemon` and `keeper` are the words that start them; `knows` has the formats that the other
        version knows. Nothing is begun if who asks `has_given_up`, for example because this process
        was stopped.
        """
        self._check_asker(has_given_up)
        self._check(daemon, keeper, knows)
        self._is_under_way = True
        try:
            new = await self._started(keeper)
            try:
                self._check_asker(has_given_up)
            except UpgradeFailed:
                new.end()
                raise
        except BaseException:
            self._is_under_way = False
            raise
        self._have(new)
        log.info("%s: the keeper is pid %d from now on", self._path, new.pid)

    async def end(self, daemon: Sequence[str]) -> None:
        """End this process, and have these words started."""
        assert self._session.kept is not None
        keeper = self._session.kept.keeper
        assert keeper is not None
        # The answer to who asked for it goes out first.
        await trio.sleep(_ANSWER_SECONDS)
        await self._session.drain(_DRAIN_SECONDS)
        keeper.replace([*daemon, *self._words, "--upgrade"])
        log.info("%s: pid %d ends, because another version takes the mount over",
                 self._path, os.getpid())  # fmt: skip
        # Without any of what ends a mount.
        os._exit(0)

    @property
    def _path(self) -> str:
        return self._session.mountpoint

    def _check_asker(self, has_given_up: Callable[[], bool]) -> None:
        if has_given_up():
            error = UpgradeFailed(path=self._path, why="the command that asked for it has given up")
            # There is nobody else to say it to.
            log.warning("%s", error)
            raise error

    def _check(
        self, daemon: Sequence[str], keeper: Sequence[str], knows: Mapping[str, int]
    ) -> None:
        """Raise UpgradeFailed where the other version can't go on with what this one has made."""

        def refuse(why: str) -> UpgradeFailed:
            return UpgradeFailed(path=self._path, why=why)

        label = self._pool.label
        if self._session.kept is None:
            raise refuse("it has no keeper, which would hold it meanwhile; unmount it, and mount "
                         "it with the native engine and without '-o no_keeper'")  # fmt: skip
        if self._is_under_way:
            raise refuse("another upgrade is under way")
        if not all(map(_is_word, [*daemon, *keeper])):
            raise refuse("a command line can't have such a word")
        if not daemon or not os.access(daemon[0], os.X_OK):
            raise refuse(f"the daemon can't run {' '.join(daemon[:1]) or 'nothing'}")
        if knows.get("label", 0) < label.format_version:
            raise refuse(f"that version does not know format {label.format_version} of pools")
        formats = _formats(Mode(label.mode))
        for what, ours in formats.items():
            if knows.get(what) != ours:
                raise refuse(f"that version stores mode {what} in format {knows.get(what)}, and "
                             f"this pool has format {ours}")  # fmt: skip
        if knows.get("memory") != SIGNATURE:
            raise refuse("the processes of that version share other memory; unmount it, and mount "
                         "it again")  # fmt: skip

    async def _started(self, words: Sequence[str]) -> Keeper:
        """A keeper that was seen to work. Raises UpgradeFailed."""
        try:
            keeper = Keeper.start(words)
            await trio.to_thread.run_sync(keeper.check)
        except OSError as error:
            raise UpgradeFailed(path=self._path, why=f"no keeper of that version could be started: "
                                f"{(error.strerror or str(error)).lower()}") from None  # fmt: skip
        return keeper


def _is_word(text: str) -> bool:
    """Whether a command line can have this word, which comes from another process."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _formats(mode: Mode) -> dict[str, int]:
    """The formats that a mode stores besides the label, by the mode's word."""
    if mode is Mode.FS:
        from pmemfs.media.filesystem import FORMAT_VERSION

        return {"fs": FORMAT_VERSION}
    if mode is Mode.CACHE:
        from pmemfs.media.cache import FORMAT_VERSION as CACHE_VERSION

        return {"cache": CACHE_VERSION}
    return {}
