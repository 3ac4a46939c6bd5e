"""Changes the options of a mount while it is served: the daemon's part of a remount.

The kernel tells a FUSE daemon nothing of a remount, so the command that remounts tells both. Where
a program tells the kernel alone, as systemd does at shutdown, the daemon sees it in mountinfo.
Invariants:
- the pool is marked clean only while the kernel lets no user write and both planes refuse writes.
  The daemon looks at the kernel's flag itself, and waits until everything under way is over. A
  write after that would change a pool that says it is clean;
- the pool is marked dirty before either plane accepts a write again, and so before the kernel
  passes a write on;
- a change that fails is undone: the pool is dirty and accepts writes, as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import trio

from pmemfs.engine.growing import Grower
from pmemfs.errors import RemountFailed, sentence_of
from pmemfs.fuse.served import Served
from pmemfs.media.label import State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.elsewhere import named_processes
from pmemfs.mount.mountpoint import places_of
from pmemfs.mount.options import MountOptions
from pmemfs.mountinfo import Mount, MountChanges
from pmemfs.pool import Pool

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 5
_POLL_SECONDS = 0.005
_FOLLOW_SECONDS = 1


class Remounter:
    """Changes the options of one mount."""

    def __init__(
        self, pool: Pool, medium: MappedMedium, served: Served, grower: Grower,
        options: MountOptions,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._medium = medium
        self._served = served
        self._grower = grower
        self.options = options
        """The options of the mount now."""
        self.page_writers: Callable[[], list[int]] = list
        """The processes that have pages pinned and may write to them."""
        self._kernel_forbids = options.read_only
        """What the kernel's flag was when it was last looked at."""

    def go_on(self) -> None:
        """Serve by these options in the place of a daemon that has died, maybe while it changed
        them. Nobody is served yet. Raises OSError."""
        pool, volume = self._pool, self._served.volume
        if not self.options.read_only or self._medium.read_only:
            return
        self._served.note_no_reads()
        volume.stop_writing()
        if pool.label.state != State.CLEAN:
            # It was to be written to again, and nobody has done so yet.
            self._medium.fence()
            volume.leave_clean()
            pool.end_mount()

    async def remount(self, wanted: MountOptions, mount: Mount) -> None:
        """Serve by these options from now on, as far as options may change.

        Raises RemountFailed.
        """
        async with self._grower.lock:
            wanted = self.options.changed_as(wanted)
            try:
                if wanted.read_only and not self.options.read_only:
                    await self._stop_writing(mount)
                elif self.options.read_only and not wanted.read_only:
                    await self._resume_writing(mount)
            except OSError as error:
                log.error("%s: remounting failed", self._medium.name, exc_info=error)
                why = f"the pool could not be made durable: {sentence_of(error)}"
                raise RemountFailed(path=mount.mountpoint, why=why) from None
            self.options = wanted
            # A command that opens the mount tells the daemon first, so the kernel's flag may still
            # be set now. That is no wish to close it again.
            self._kernel_forbids = _forbids_writing(mount)
            self._served.obey(wanted)
            words = wanted.as_text(only_said=True) or "rw"
            log.info("%s: remounted with %s", self._medium.name, words)

    async def follow_kernel(self, mount: Mount) -> None:
        """Close and open the mount as the kernel does, where the kernel alone was told."""
        changes, is_first = MountChanges(), True
        while True:
            await trio.sleep(_FOLLOW_SECONDS)
            # The first time in any case: this daemon may have taken the mount over since a change.
            if changes.are_there() or is_first:
                await self._follow(mount)
            is_first = False

    async def _follow(self, mount: Mount) -> None:
        forbids = _forbids_writing(mount)
        if forbids == self._kernel_forbids:
            return
        self._kernel_forbids = forbids
        if forbids == self.options.read_only:
            return
        try:
            await self.remount(replace(self.options, read_only=forbids), mount)
        except RemountFailed as error:
            log.warning("%s: the kernel was remounted, and the daemon not: %s", mount.source, error)

    async def _stop_writing(self, mount: Mount) -> None:
        served, pool = self._served, self._pool
        self._require_no_writers(mount)
        _require_read_only(mount)
        await self._wait_for_last_close(mount)
        # In this order: once everything under way is over, neither plane writes anything any more.
        served.note_no_reads()
        await served.engine.refuse_writes()
        try:
            self._require_no_writers(mount)
            served.volume.stop_writing()
            with trio.move_on_after(_PATIENCE_SECONDS):
                while served.volume.settle():  # noqa: ASYNC110
                    await trio.sleep(_POLL_SECONDS)
            await served.engine.make_durable()
            # All of this took a while, and any remount without us may have changed the kernel's
            # mind.
            _require_read_only(mount)
            served.volume.leave_clean()
            await trio.to_thread.run_sync(pool.end_mount)
        except BaseException:
            if pool.label.state == State.CLEAN:
                pool.resume_mount()
            self._accept_writes()
            served.obey(self.options)
            raise

    def _require_no_writers(self, mount: Mount) -> None:
        """Raise RemountFailed if a program may write to pages, which no system call tells of."""
        pids = self.page_writers()
        if pids:
            has = "has" if len(pids) == 1 else "have"
            why = f"{named_processes(pids)} {has} pages of it mapped for writing; close them first"
            raise RemountFailed(path=mount.mountpoint, why=why)

    async def _wait_for_last_close(self, mount: Mount) -> None:
        """Wait for closes: the kernel knows that no writer is left, but says so later."""
        served = self._served
        with trio.move_on_after(_PATIENCE_SECONDS):
            files, volume = served.handlers.files, served.volume
            while files.has_writers or volume.has_unnamed():  # noqa: ASYNC110
                await trio.sleep(_POLL_SECONDS)
            return
        raise RemountFailed(
            path=mount.mountpoint, why="files on it are open for writing; close them and try again"
        )

    async def _resume_writing(self, mount: Mount) -> None:
        fs = self._served.fs
        if self._medium.read_only:
            why = "it was mounted read-only from the beginning: unmount it, and mount it again"
            raise RemountFailed(path=mount.mountpoint, why=why)
        if fs is not None and fs.damage:
            why = f"it is damaged ({fs.damage}): unmount it, and run 'pmemfs check'"
            raise RemountFailed(path=mount.mountpoint, why=why)
        await trio.to_thread.run_sync(self._pool.resume_mount)
        self._accept_writes()

    def _accept_writes(self) -> None:
        served = self._served
        if served.tables:
            # Files that were published meanwhile have no time of access in their live lines.
            served.tables.withdraw_all()
        served.volume.resume_writing()
        served.engine.accept_writes()


def _forbids_writing(mount: Mount) -> bool:
    """Whether the kernel passes no write on; not known of a mount that was detached."""
    places = places_of(mount)
    return bool(places) and all(place.is_read_only for place in places)


def _require_read_only(mount: Mount) -> None:
    """Raise RemountFailed unless the kernel lets no user write."""
    if not _forbids_writing(mount):
        raise RemountFailed(path=mount.mountpoint, why="the kernel still lets it be written to")
