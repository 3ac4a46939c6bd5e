"""One mount from its making to its end, with either engine.

session = open_session(...)       all but the mount
session.make_mount(...)           mounted, but nothing is answered yet
await session.serve(on_ready)     until it is unmounted, or `terminate` is called
session.end()                     unmounted, and nothing is served any more
session.close()                   the volume has ended, too
"""

from __future__ import annotations

import errno
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.native import stay_in_memory
from pmemfs.engine.base import Engine
from pmemfs.engine.growing import Grower, OriginFollower
from pmemfs.engine.native import SharedEngine
from pmemfs.engine.sharing import share_memmap
from pmemfs.errors import DataPlaneFailed, sentence_of
from pmemfs.fuse.forwarded import ForwardedRequests
from pmemfs.fuse.handshake import Terms
from pmemfs.fuse.joint import Joint
from pmemfs.fuse.keptmount import KeptMount
from pmemfs.fuse.notices import Notices
from pmemfs.fuse.once import Once
from pmemfs.fuse.planes import MAX_BACKGROUND, DataPlane
from pmemfs.fuse.remounting import Remounter
from pmemfs.fuse.served import Keys, Served, serve_pool
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wiredoor import WireDoor
from pmemfs.media.label import Mode
from pmemfs.medium.faultlog import report_fault
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.mount.making import detach_mount, mount_by_helper
from pmemfs.mount.mountpoint import places_of
from pmemfs.mount.options import MountOptions
from pmemfs.mount.processes import keep_out_of_cores
from pmemfs.mountinfo import Mount
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.tally import Tally
from pmemfs.volume.onefile import INODE, OneFileVolume

if TYPE_CHECKING:
    from pmemfs.fuse.sharednames import SharedNames
    from pmemfs.fuse.takeover import Left

log = logging.getLogger(__name__)

_WATCH_SECONDS = 1
_ENDING_SECONDS = 10
"""A request that was begun may take so long when the mount is to end."""


class Session(ABC):
    """A mount that this process serves, alone or with a data plane."""

    memmap: Memmap
    served: Served
    grower: Grower
    remounter: Remounter
    mount: Mount
    transport: str
    transport_reason: str
    """One line that says why this transport was chosen and not the other."""
    kept: KeptMount | None = None
    """What lets the mount outlive its processes; None: it ends with each of them."""
    keys: Keys | None = None
    """The secret memory of a file system."""
    queue_count = 0
    """The first so many workers serve the CPU of their number; the others read /dev/fuse."""

    @property
    def data_plane_pid(self) -> int | None:
        """The process that moves the bytes; None if this one does."""
        return None

    @property
    @abstractmethod
    def mount_identity(self) -> int:
        """Tells this mount from all others, also from a later one of the same pool. A daemon that
        takes the mount over has the same."""

    @property
    def engine(self) -> Engine:
        """The counts of the mount, and its durability."""
        return self.served.engine

    @property
    def mountpoint(self) -> str:
        """Where the mount is now: where it was made, or elsewhere if only a bind mount is left."""
        places = [place.mountpoint for place in places_of(self.mount)]
        return places[0] if places else self.mount.mountpoint

    def _grower(self, pool: Pool, medium: MappedMedium) -> Grower:
        async def show() -> None:
            self.engine.note_size()
            volume = self.served.volume
            volume.grow()
            if isinstance(volume, OneFileVolume):
                told = self.served.handlers.notifier.tell(INODE)
                if told is not None:
                    await told
                # A stat(2) makes the kernel ask for the new size. Until then asynchronous reads
                # behind the old end find nothing. Another process must call it: a thread of this
                # one would wait for its own process's answer, which would keep this process from
                # dying when it is killed, and the data plane from noticing.
                path = os.path.join(self.mountpoint, volume.name)
                await trio.run_process(["stat", "--", path], check=False,
                                       capture_stdout=True, capture_stderr=True)  # fmt: skip

        cache = self.served.cache
        if cache is not None:
            return OriginFollower(pool, medium, self.memmap, self.engine, show, cache)
        return Grower(pool, medium, self.memmap, self.engine, show)

    @abstractmethod
    def make_mount(self, mountpoint: str, options: MountOptions) -> None:
        """Mount; from now on `end` has to be called. Raises MountFailed."""

    def adopt_mount(self, mountpoint: str) -> None:
        """Have the mount of a daemon that has died, in place of `make_mount`."""
        raise NotImplementedError

    def let_workers_go_on(self) -> None:
        """After `adopt_mount`: all references on pages that count are taken."""
        raise NotImplementedError

    async def drain(self, seconds: float) -> None:
        """Begin no more requests, and finish those that are begun, but wait no longer than this."""
        raise NotImplementedError

    def renew_plane_soon(self) -> None:
        """After `adopt_mount`: replace the data plane by one of this version, once it serves."""
        raise NotImplementedError

    @abstractmethod
    async def serve(self, on_ready: Callable[[Mount], None]) -> None:
        """Serve until the mount ends; `on_ready` is called once it answers.

        Raises DataPlaneFailed.
        """

    @abstractmethod
    def end(self) -> None:
        """Unmount if it is still mounted. After that only this process touches the pool."""

    def close(self) -> None:
        """The volume has ended: let go of what it needed of this session, and wipe all keys."""
        self._forget_keys()

    def guard_keys(self) -> None:
        """Call before the first key is in secret memory: whatever ends, the keys stay until the
        unmount, and no core file of a process of this mount has memory of it. Raises OSError."""
        if self.keys is None or self.keys.may_be_there:
            return
        fd = self.keys.fd()
        pids = [os.getpid(), self.data_plane_pid]
        if self.kept:
            self.kept.store("keys", [fd])
            pids.append(self.kept.keeper.pid if self.kept.keeper else None)
        keep_out_of_cores(pid for pid in pids if pid)
        self._give_keys(fd)

    def _give_keys(self, fd: int) -> None:
        """Let a data plane have the keys, if there is one."""
        return

    def _forget_keys(self) -> None:
        if self.served.keyring:
            self.served.keyring.wipe_all()
        if self.keys:
            self.keys.close()

    @abstractmethod
    def terminate(self) -> None:
        """Make `serve` return."""


def new_keys(pool: Pool) -> Keys | None:
    """Of a new mount; None if it can't have encrypted files."""
    return Keys() if pool.label.mode == Mode.FS else None


class NativeSession(Session):
    """The data plane on /dev/fuse, and the wire door behind it."""

    def __init__(
        self,
        pool: Pool,
        medium: MappedMedium,
        options: MountOptions,
        joint: Joint,
        left: Left | None = None,
    ) -> None:
        """`left` is what a daemon that has died has left, in whose place this one serves. Then
        workers of its data plane stand still until `let_workers_go_on`."""
        shared, sockets, settings, choice = joint
        self.transport = choice.transport
        self.transport_reason = choice.sentence
        self.queue_count = settings.queue_count
        self._medium = medium
        self._shared, self._sockets, self._settings = shared, sockets, settings
        self._choice = choice
        self._left = left
        self._is_renewing = False
        """Whether the next death of the data plane is planned."""
        self._goes_on = trio.Event()
        """Set when the data plane serves again after that."""
        self._is_ending = trio.Event()
        if left is not None:
            left.stop_workers(medium.name)
        self.memmap = share_memmap(pool, medium, shared)
        self._engine = SharedEngine(pool, medium, self.memmap, shared)
        if left is not None:
            self._engine.renew()
        once = Once(shared.answers)
        self.keys = (left and left.keys) or new_keys(pool)
        self.served = served = serve_pool(
            pool, medium, self.memmap, self._engine, options, once, self.keys
        )
        counts = left and left.others.get("counts")
        self._tally = self._engine.tally = Tally(counts.fds[0] if counts else -1)
        if served.cache:
            served.cache.tally = self._tally
        unanswered = Unanswered(
            once, served.handlers, OpenPlaces(shared.opens), served.fs, served.tables, served.names
        )
        terms = Terms(
            max_write=settings.max_write, max_background=MAX_BACKGROUND,
            has_files=pool.label.mode == Mode.FS, over_uring=settings.queue_count > 0,
        )  # fmt: skip
        door = WireDoor(self.served.handlers, terms, shared)
        shared.set_header_word("answered", door.opcodes)
        self._door = door
        self._names = served.names
        self._forwarded = ForwardedRequests(
            door, settings.longest_bytes, once, unanswered, served.bring,
            served.fs.frames.packed.note_hot if served.fs else None, self._names,
        )  # fmt: skip
        self._notices = Notices(sockets.notices)
        self._notices.speak_for(self.served.handlers.notifier)
        unanswered.tell_kernel()
        self.grower = self._grower(pool, medium)
        self.remounter = Remounter(pool, medium, self.served, self.grower, options)
        if self._names:
            self._names.may_change = self._may_workers_change_names

    def _may_workers_change_names(self) -> bool:
        # Where each change is to be durable, so is each write; and while the pool grows, or is
        # being closed for writing, nothing else may change it.
        return not self.grower.lock.locked() and not self.served.handlers.files.is_synchronous

    def make_mount(self, mountpoint: str, options: MountOptions) -> None:
        fuse_fd, self.mount = mount_by_helper(self._medium.name, mountpoint, options)
        self._shared.set_header_word("device", self.mount.number)
        self._join(fuse_fd, is_kept=options.is_kept)

    def adopt_mount(self, mountpoint: str) -> None:
        left = self._left
        assert left is not None
        self.mount = left.mount(mountpoint, self._medium.name)
        self._join(left.fuse_fd, is_kept=True)
        self._plane.adopt(left.plane)
        if self.keys and self.keys.may_be_there:
            # The dead daemon may have started this one before it had keys, and may not have come to
            # tell the data plane of them.
            keep_out_of_cores([os.getpid()])
            self._give_keys(self.keys.fd())
        if self.served.life:
            self.served.life.left = left.origin
        assert self.kept is not None
        self.kept.keeper = left.keeper
        self._shared.note_death("daemon", left.deaths.times, left.deaths.last_ns)

    def let_workers_go_on(self) -> None:
        # A growth and a remount may have come this far, or less.
        self._engine.note_size()
        self.remounter.go_on()
        self._shared.set_header_word("read_only", int(self.remounter.options.read_only))
        self._shared.resume()
        if self._sockets.have_hung_up:
            # The dead daemon was ending the mount.
            self.terminate()

    def _give_keys(self, fd: int) -> None:
        self._plane.give_secrets(fd)

    def _join(self, fuse_fd: int, *, is_kept: bool) -> None:
        self._plane = DataPlane(
            fuse_fd, self._shared, self._settings, self._sockets, is_kept=is_kept,
            entries_fd=self._left.entries_fd if self._left else -1,
        )  # fmt: skip
        if is_kept:
            self.kept = KeptMount(self._medium, self._shared, self._plane, self._choice)
            self.kept.store("counts", [self._tally.fd])
            if self.served.life:
                self.served.life.keep = self.kept.store
            if self.keys and self.keys.may_be_there:
                self.kept.store("keys", [self.keys.fd()])

    async def serve(self, on_ready: Callable[[Mount], None]) -> None:
        is_successor = self._left is not None
        if not is_successor:
            self._plane.start(self._medium)
        async with trio.open_nursery() as nursery:
            if self._names:
                self._names.kill_plane = self._plane.kill
                nursery.start_soon(self._share_names, self._names)
            nursery.start_soon(
                partial(self._forwarded.serve, self._sockets.forwarded, is_successor=is_successor)
            )
            nursery.start_soon(self._notices.serve)
            nursery.start_soon(self._watch_memory)
            nursery.start_soon(self._end_in_time)
            if not is_successor:
                await self._plane.wait_until_ready()
            if stay_in_memory():
                log.info(
                    "%s: without both CAP_SYS_RESOURCE and CAP_IPC_LOCK these processes may "
                    "have to wait for memory; do not swap to this mount",
                    self._medium.name,
                )
            if self._left is not None:
                self._say_that_it_goes_on(self._left)
            on_ready(self.mount)
            if self.kept and (seconds := self.remounter.options.hang_timeout):
                # Imported here, because most mounts do without.
                from pmemfs.fuse.hanging import PlaneWatch

                watch = PlaneWatch(self._medium.name, self._shared, self._notices, self._plane)
                nursery.start_soon(watch.watch, seconds)
            if self.kept and self.kept.is_upgrading:
                nursery.start_soon(self._renew_plane)
            await self._plane.wait()
            while self._plane.has_died():
                await self._start_again()
                await self._plane.wait()
            if not self._shared.header_word("ended"):
                # It was killed, maybe in a section, whose end the volume must not wait for.
                self._engine.forget_workers()
            nursery.cancel_scope.cancel()

    async def _share_names(self, names: SharedNames) -> None:
        trio.lowlevel.add_instrument(names)
        try:
            await names.serve()
        finally:
            trio.lowlevel.remove_instrument(names)
            names.stop()

    def renew_plane_soon(self) -> None:
        assert self.kept is not None
        self.kept.is_upgrading = True

    async def _renew_plane(self) -> None:
        """Have another process be the data plane."""
        # Imported here, because this happens but once in a while.
        from pmemfs.fuse.occupying import occupied

        assert self.kept is not None
        why_not = ""
        try:
            if not self.kept.says_again:
                why_not = "this kernel, older than 6.9, would not say again what that one has read"
            elif not self.queue_count:
                # The kernel gives the next one whatever this one has read.
                await self._replace_plane()
            else:
                async with occupied(
                    self._door, self.mountpoint, self._settings.depth
                ) as is_occupied:
                    if is_occupied:
                        await self._replace_plane()
                    else:
                        why_not = "its rings never had all their entries in use"
        except OSError as error:
            self.kept.leave_to_version_of_before(error)
        if why_not:
            log.warning("%s: the data plane stays that of the version of before, because %s",
                        self._medium.name, why_not)  # fmt: skip
        self.kept.end_upgrade()

    def _say_that_it_goes_on(self, left: Left) -> None:
        died = left.deaths
        after = f", after {(time.time_ns() - died.last_ns) / 1e9:.3f} s" if died.times else ""
        log.info("%s: the daemon goes on as pid %d%s", self._medium.name, os.getpid(), after)

    async def _replace_plane(self) -> None:
        log.info("%s: the data plane (pid %d) is replaced by one of this version",
                 self._medium.name, self._plane.process.pid)  # fmt: skip
        self._is_renewing = True
        self._plane.process.kill()
        await self._goes_on.wait()

    async def drain(self, seconds: float) -> None:
        await self._forwarded.drain(seconds)

    async def _start_again(self) -> None:
        """Start another data plane in place of the one that has died. Raises DataPlaneFailed if
        the mount ends by that, and what the end of its references raises."""
        is_planned, self._is_renewing = self._is_renewing, False
        if not is_planned:
            self._note_death()
        began = trio.current_time()
        if self._names:
            self._names.recover()
        self._engine.forget_workers()
        self._notices.tell_again()
        assert self.kept is not None
        try:
            self._plane.start(self._medium, resumes=True, mountpoint=self.mountpoint)
            self.kept.store_plane()
            self._plane.process.go()
            await self._plane.wait_until_ready()
        except (OSError, DataPlaneFailed) as failure:
            # Why is said when its end is noticed, which is at once.
            self._plane.process.kill()
            if self.kept.is_upgrading:
                self.kept.leave_to_version_of_before(failure)
            if isinstance(failure, OSError):
                raise DataPlaneFailed(
                    why=f"it can't be started again: {sentence_of(failure)}"
                ) from failure
            return
        self._goes_on.set()
        seconds = trio.current_time() - began
        log.info("%s: the data plane goes on as pid %d, after %.3f s",
                 self._medium.name, self._plane.process.pid, seconds)  # fmt: skip

    def _note_death(self) -> None:
        """Log the death of the data plane. Raises DataPlaneFailed if the mount ends by it."""
        failure, pid = self._plane.failure(), self._plane.process.pid
        why = failure.facts["why"]
        # Of a mount that is not kept, `has_died` has raised.
        assert self.kept is not None
        if why_not := self.kept.note_death():
            raise DataPlaneFailed(why=f"{why}; it is not started again, because {why_not}")
        log.error("%s: the data plane (pid %d) has died: %s; it is started again",
                  self._medium.name, pid, why)  # fmt: skip

    @property
    def mount_identity(self) -> int:
        return self._shared.header_word("mount_identity")

    @property
    def data_plane_pid(self) -> int | None:
        return self._plane.process.pid

    def terminate(self) -> None:
        detach_mount(self.mount)
        self._plane.ask_to_end()
        self._is_ending.set()

    async def _end_in_time(self) -> None:
        """Once the mount is to end, kill a data plane that does not come to it, such as one that
        was stopped by SIGSTOP."""
        await self._is_ending.wait()
        await trio.sleep(_ENDING_SECONDS)
        process = self._plane.process
        log.error("%s: the data plane (pid %d) does not end within %d s, and is killed",
                  self._medium.name, process.pid, _ENDING_SECONDS)  # fmt: skip
        process.kill()

    def end(self) -> None:
        detach_mount(self.mount)
        self._plane.stop()
        if self._names:
            self._names.stop()
            self._names.recover()
        self._plane.close()

    def close(self) -> None:
        self._forget_keys()
        self._shared.close()

    async def _watch_memory(self) -> None:
        """Find out where memory comes and goes, and log what could not be touched."""
        engine = self._engine
        await engine.survey_presence()
        while True:
            await trio.sleep(_WATCH_SECONDS)
            # This writes them where they are not lost with this process.
            engine.own_statistics()
            if self.served.cache:
                self.served.cache.own_counts()
            for fault in engine.new_faults():
                answer = errno.errorcode.get(fault.error, fault.error)
                what = f"a request to inode {fault.inode} was answered with {answer}"
                report_fault(self._medium.name, fault.pool_offset >> PAGE_SHIFT, what)
            await engine.keep_presence()
