"""The daemon behind one mount: parse, wire, run, stop.

`pmemfs mount` starts it as `python -m pmemfs.daemons.mountd POOL MOUNTPOINT -o OPTIONS`. It reports
on --starter-fd whether the mount is made or why not (see control/starter), and it ends when the
mount ends.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from pmemfs.control import server
from pmemfs.control.keeping import Keeping
from pmemfs.control.places import new_socket_path
from pmemfs.control.starter import ENDING_SIGNALS, Starter
from pmemfs.engine.native import SharedEngine
from pmemfs.engine.packing import Packing
from pmemfs.errors import (
    EXIT_MOUNT_FAILED,
    Interrupted,
    MemoryFault,
    MountFailed,
    NotDurable,
    PmemfsError,
    SourceBusy,
    cause_of,
    mount_exit_code,
    sentence_of,
)
from pmemfs.fuse.joint import Joint
from pmemfs.fuse.session import NativeSession, Session
from pmemfs.logs import start_logging
from pmemfs.media.label import Mode, State
from pmemfs.medium.faultlog import report_fault
from pmemfs.medium.mapped import Advice, MappedMedium
from pmemfs.medium.shortage import with_room
from pmemfs.mount.mountpoint import mounts_of_pool
from pmemfs.mount.options import MountOptions
from pmemfs.mount.processes import (
    SpareDescriptors,
    limits_behind,
    raise_descriptors,
)
from pmemfs.mount.transport import choose_transport, read_offer
from pmemfs.pool import Pool
from pmemfs.units import GIB

if TYPE_CHECKING:
    from pmemfs.control.standby import Standby
    from pmemfs.fuse.keeping import Keeper, Stored
    from pmemfs.fuse.keymethods import KeyMethods
    from pmemfs.fuse.takeover import Left
    from pmemfs.pins.methods import PinMethods
    from pmemfs.pins.registry import Pins

log = logging.getLogger("pmemfs")

_HOUSEKEEPING_SECONDS = 30
_TIDY_SECONDS = 1
_SOON_SECONDS = 0.01
_PATIENCE_SECONDS = 5
_ADVICE_BYTES = GIB


class Arguments(NamedTuple):
    """What the command line says."""

    pool: str
    mountpoint: str
    options: MountOptions
    starter_fd: int | None
    takeover_fd: int | None
    foreground: bool
    is_upgrade: bool
    """Whether another version of pmemfs has served the mount until now, with its data plane."""


def parse(words: list[str]) -> Arguments:
    """The arguments. They come from `pmemfs mount`, which has checked them, so this is terse."""
    parser = argparse.ArgumentParser(prog="pmemfs.daemons.mountd")
    parser.add_argument("pool")
    parser.add_argument("mountpoint")
    parser.add_argument("-o", dest="options", type=MountOptions.parse, default=MountOptions())
    parser.add_argument("--starter-fd", type=int)
    parser.add_argument("--takeover", dest="takeover_fd", type=int)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--upgrade", dest="is_upgrade", action="store_true")
    said = Arguments(**vars(parser.parse_args(words)))
    # With nobody who waits for it, it was started by hand, or by a service manager.
    is_alone = said.starter_fd is None and said.takeover_fd is None
    return said._replace(foreground=said.foreground or is_alone)


def main() -> None:
    """Serve one mount until it ends."""
    arguments, standby = _with_standby(parse(sys.argv[1:]))
    # Signals break off no system call of this thread, except where `endable` allows it.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    starter = Starter(arguments.starter_fd, is_kept=arguments.takeover_fd is not None)
    starter.note_signals()
    items = _inherited(arguments)
    where = start_logging(arguments.pool, foreground=arguments.foreground)
    log.info("log to %s", where)
    try:
        serve_mount(arguments, starter, _left_by(items) if items else None, standby)
    except Exception as error:
        cause, sentence = cause_of(error), f"{sentence_of(error)}{limits_behind(error)}"
        if isinstance(cause, PmemfsError):
            log.error("%s", sentence)
            starter.say_failed(sentence, cause)
            sys.exit(mount_exit_code(cause))
        log.error("the daemon failed: %s", sentence, exc_info=cause)
        starter.say_failed(f"the daemon failed: {sentence}")
        sys.exit(EXIT_MOUNT_FAILED)


def _with_standby(arguments: Arguments) -> tuple[Arguments, Standby | None]:
    """Have a process that waits to take the place of this one, before anything is opened.

    In that process this returns when it takes over; then another one waits by now.
    """
    if not (arguments.options.is_kept and arguments.options.standby):
        return arguments, None
    from pmemfs.control.standby import TakeOver, fork

    forked = fork()
    while isinstance(forked, TakeOver):
        arguments = arguments._replace(starter_fd=None, takeover_fd=forked.fd, is_upgrade=False)
        forked = fork()
    return arguments, forked


def _inherited(arguments: Arguments) -> dict[str, Stored]:
    """What a keeper has of the mount whose daemon has died; nothing if this is its first one."""
    if arguments.takeover_fd is None:
        return {}
    from pmemfs.fuse.takeover import inherited

    # There is one for each pin of a client.
    raise_descriptors()
    return inherited(arguments.takeover_fd, foreground=arguments.foreground)


def _left_by(items: dict[str, Stored]) -> Left:
    from pmemfs.fuse.takeover import left_by

    return left_by(items)


def serve_mount(
    arguments: Arguments, starter: Starter, left: Left | None, standby: Standby | None
) -> None:
    """Serve one mount until it ends, in the place of a daemon that has died if that has `left`
    anything. Raises what ended it, unless it ended in order."""
    if left is not None:
        arguments = arguments._replace(options=left.options(arguments.options))
    try:
        # Before anything is written: a daemon without spare descriptors may not be able to end.
        with (
            contextlib.ExitStack() as last,
            SpareDescriptors() as spare,
            mounted_pool(arguments, starter, left) as (pool, medium),
        ):
            run(arguments, pool, medium, starter, spare, last, left, standby)
            if not starter.is_kept:
                raise MountFailed(pool=medium.name, path=arguments.mountpoint,
                                  why="it was unmounted before it was ready")  # fmt: skip
    except Exception:
        if starter.ended_by is not None and not starter.is_kept:
            # What failed after that signal failed because of it.
            raise Interrupted(starter.ended_by) from None
        raise


@contextlib.contextmanager
def mounted_pool(
    arguments: Arguments, starter: Starter, left: Left | None
) -> Iterator[tuple[Pool, MappedMedium]]:
    """The pool, open, and dirty while this lasts; it stays dirty if this ends by an error."""
    with starter.endable():
        medium = (
            _open(arguments.pool, read_only=arguments.options.read_only) if left is None
            else left.medium(arguments.pool)
        )  # fmt: skip
    read_only = medium.read_only
    try:
        pool = Pool.open(medium)
        arguments.options.check_mode(Mode(pool.label.mode))
        doing = "taking over the mount" if left else "mounting"
        log.info("%s: %s on %s", medium.name, doing, arguments.mountpoint)
        for reading in pool.damaged_copies:
            log.warning("%s of %s: %s; the other copy serves", reading.where, medium.name,
                        reading.problem)  # fmt: skip
        if medium.source.warning:
            log.warning("%s", medium.source.warning)
        with contextlib.nullcontext() if read_only else _dirty(pool, arguments, starter, left):
            yield pool, medium
        log.info("%s: unmounted%s", medium.name, "" if read_only else ", clean")
    finally:
        medium.close()


@contextlib.contextmanager
def _dirty(pool: Pool, arguments: Arguments, starter: Starter, left: Left | None) -> Iterator[None]:
    was_clean = pool.label.state == State.CLEAN
    if left is None:
        pool.begin_mount()
    elif was_clean and not arguments.options.read_only:
        # Whoever has marked it clean has died before anybody relied on that.
        pool.resume_mount()
    try:
        yield
    except NotDurable:
        raise
    except BaseException:
        # A mount that is not kept leaves the pool as it was: clean, if there was nothing to
        # recover.
        if was_clean and not starter.is_kept:
            pool.end_mount()
        raise
    pool.end_mount()


def _open(path: str, *, read_only: bool) -> MappedMedium:
    """Open a source. Raises SourceBusy if it is mounted, or if another process has it for long.

    The daemon of a mount that was just unmounted still has the pool, to make it durable and clean.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return MappedMedium.open(path, read_only=read_only)
        except SourceBusy:
            if mounts_of_pool(path) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def run(
    arguments: Arguments,
    pool: Pool,
    medium: MappedMedium,
    starter: Starter,
    spare: SpareDescriptors,
    last: contextlib.ExitStack,
    left: Left | None,
    standby: Standby | None,
) -> None:
    """Wire the parts, mount, and serve until the mount ends and everything written is durable.

    In `last` comes what is to be done after the pool is closed.
    """
    options = arguments.options
    with starter.endable():
        # The memory is there already, if another daemon has populated it.
        _advise(pool, medium, options if left is None else replace(options, populate=False))
        session = open_session(arguments, pool, medium, left)
    pinning = Pinning()
    if left is not None:
        session.adopt_mount(arguments.mountpoint)
        if arguments.is_upgrade:
            session.renew_plane_soon()
        pinning.take_over(left.others, left.keeper, medium, session)
        session.let_workers_go_on()
    # What fails before this, the next successor may do better.
    last.callback(_let_go, session)
    try:
        if left is None:
            session.make_mount(arguments.mountpoint, options)
        try:
            words = _words_of_a_successor(arguments)
            keeping = Keeping(pool, session, pinning.keep_with, words, standby)
            packing = _packing_of(session)
            methods = _methods(pool, medium, session, options, pinning, keeping, packing)
            trio.run(
                _serve, arguments, starter, session, methods, pinning, keeping, packing, spare, left
            )
        except Exception as error:
            if session.kept and session.kept.is_upgrading:
                session.kept.leave_to_version_of_before(error)
            raise
        finally:
            spare.release()
            # While the pool is made clean, no signal counts.
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
            starter.end()
            session.end()
            # Before all is made durable: so that what clients have stored is, too.
            medium.keeps_lock = pinning.pins is not None and pinning.pins.close()
    except BaseException:
        spare.release()
        if not starter.is_kept:
            # A mount that fails was visible for a moment, so somebody may have written to it.
            _leave_durable(session, medium)
        raise
    _leave_durable(session, medium)


def _packing_of(session: Session) -> Packing | None:
    """What compresses the files of a mount, if it has files."""
    if session.served.fs is None:
        return None
    notifier = session.served.handlers.notifier
    # As it is when it is called: the notifier knows the kernel only once it is mounted.
    return Packing(session.served.fs, lambda ino: notifier.tell(ino))


def _let_go(session: Session) -> None:
    """Let the keeper go: from now on nobody takes the place of this process."""
    if session.kept:
        session.kept.end()


def _leave_durable(session: Session, medium: MappedMedium) -> None:
    try:
        try:
            session.served.volume.end()
        finally:
            # Also after bad memory: what was written elsewhere must last.
            trio.run(session.engine.make_durable)
            session.close()
    except (OSError, PmemfsError) as error:
        raise NotDurable(path=medium.name, why=sentence_of(error)) from error


class Pinning:
    """The pins of a mount, once somebody has asked for something."""

    def __init__(self) -> None:
        self.nursery: trio.Nursery | None = None
        """Of the tasks that serve the mount."""
        self.pins: Pins | None = None
        self._keeper: Keeper | None = None

    def begin(self, pool: Pool, medium: MappedMedium, session: Session) -> PinMethods:
        """Begin to have pins, and to notice their ends."""
        # Imported here, because most mounts never have any.
        from pmemfs.pins.methods import PinMethods

        assert self.nursery is not None
        if self.pins is None:
            self._make(medium, session)
            self.serve(self.nursery)
        assert self.pins is not None
        return PinMethods(self.pins, pool, medium, session.served.volume, session.mount_identity)

    def keep_with(self, keeper: Keeper) -> None:
        """Have a keeper hold the pins that there are and will be."""
        self._keeper = keeper
        if self.pins:
            self.pins.keep_with(keeper)

    def take_over(
        self, stored: Mapping[str, Stored], keeper: Keeper, medium: MappedMedium, session: Session
    ) -> None:
        """Have the pins of the daemon that has died, if it had any.

        Before anything is freed or given out. See `Pins.take_over`.
        """
        self._keeper = keeper
        if any(name.startswith("pin-") for name in stored):
            self._make(medium, session).take_over(stored, keeper)

    def serve(self, nursery: trio.Nursery) -> None:
        """From now on notice the ends of pins, if there are any."""
        self.nursery = nursery
        if self.pins:
            nursery.start_soon(self.pins.serve)

    def _make(self, medium: MappedMedium, session: Session) -> Pins:
        from pmemfs.pins.registry import Pins

        volume, tell = session.served.volume, session.served.handlers.notifier.tell
        self.pins = pins = Pins(medium, session.memmap, volume, tell)
        session.remounter.page_writers = pins.writers
        pins.find_room = session.served.trimmer.find_room
        if isinstance(session.engine, SharedEngine):
            session.engine.holders.append(pins.renew)
        if self._keeper:
            pins.keep_with(self._keeper)
        return pins


def _methods(
    pool: Pool, medium: MappedMedium, session: Session, options: MountOptions, pinning: Pinning,
    keeping: Keeping, packing: Packing | None,
) -> server.Methods:  # fmt: skip
    """The methods that the daemon answers on its socket."""
    started = time.monotonic()

    async def resize(size_bytes: int | None = None) -> dict[str, Any]:
        grown = await session.grower.grow(size_bytes)
        if grown.new_bytes > grown.old_bytes:
            await trio.to_thread.run_sync(lambda: _advise(pool, medium, options))
        return asdict(grown)

    async def remount(options: str) -> dict[str, Any]:
        await session.remounter.remount(MountOptions.parse(options), session.mount)
        return {"options": session.remounter.options.as_text()}

    async def trim() -> dict[str, Any]:
        return asdict(await session.served.trimmer.trim())

    @functools.cache
    def all_of_them() -> dict[str, server.Method]:
        # Imported here, so that a mount is made before the daemon can report on it.
        from pmemfs.observe.mount import MountObserver
        from pmemfs.observe.pages import PageObserver

        pins = pinning.begin(pool, medium, session)
        keys = _key_methods(session)
        observer = MountObserver(
            pool, medium, session, started, pins.registry, keys.reports if keys else tuple
        )
        return {
            "info": observer.info,
            "stat": observer.stat,
            "extents": observer.extents,
            "resize": with_room(resize, session.served.trimmer.find_memory),
            "trim": trim,
            "remount": remount,
            "upgrade": keeping.upgrade,
            "pin": pins.pin,
            "flush": pins.flush,
            "pins": pins.pins,
            "accesses": pins.accesses,
            **PageObserver(pool, session, pins.registry).methods(),
            **_cache_methods(session),
            **(keys.methods() if keys else {}),
            **_transform_methods(session, packing, pins.registry),
        }

    return all_of_them


def _key_methods(session: Session) -> KeyMethods | None:
    served = session.served
    if served.fs is None or served.keyring is None:
        return None
    from pmemfs.fuse.keymethods import KeyMethods
    from pmemfs.mount.elsewhere import named_openers

    return KeyMethods(
        served.fs, served.keyring, served.handlers,
        functools.partial(named_openers, session.mount), session.guard_keys,
    )  # fmt: skip


def _cache_methods(session: Session) -> dict[str, server.Method]:
    if session.served.cache is None:
        return {}
    from pmemfs.volume.cache.methods import CacheMethods

    return CacheMethods(session.served.cache).methods()


def _transform_methods(
    session: Session, packing: Packing | None, pins: Pins
) -> dict[str, server.Method]:
    if packing is None or session.served.fs is None:
        return {}
    from pmemfs.volume.fs.transforming import TransformMethods

    # By now the notifier knows the kernel.
    tell = session.served.handlers.notifier.tell
    methods = TransformMethods(session.served.fs, packing.begin, tell, pins.hear_ends).methods()
    trimmer = session.served.trimmer
    # Frames are not waited for by what begins anew: it would decompress what it has compressed.
    return methods | {
        "transform-set": with_room(methods["transform-set"], trimmer.find_room),
        "rewrite": with_room(methods["rewrite"], trimmer.find_memory),
    }


def open_session(
    arguments: Arguments, pool: Pool, medium: MappedMedium, left: Left | None
) -> Session:
    """A session without its mount, with the engine that was asked for. Raises PmemfsError."""
    options = arguments.options
    if options.engine == "python":
        # This loads pyfuse3, which a native mount does without.
        from pmemfs.fuse.pythonsession import PythonSession

        return PythonSession(pool, medium, options)
    if left is not None:
        return NativeSession(pool, medium, options, left.joint, left)
    choice = choose_transport(options.transport, read_offer())
    log.info("%s: %s", medium.name, choice.sentence)
    return NativeSession(pool, medium, options, Joint.make(pool, choice))


async def _serve(
    arguments: Arguments, starter: Starter, session: Session, methods: server.Methods,
    pinning: Pinning, keeping: Keeping, packing: Packing | None, spare: SpareDescriptors,
    left: Left | None,
) -> None:  # fmt: skip
    with (
        server.listening_again(*left.listener) if left
        else server.listening(new_socket_path(session.mount))
    ) as listening:  # fmt: skip
        spare.release_for_questions()
        async with trio.open_nursery() as nursery:
            pinning.serve(nursery)
            answering = trio.CancelScope()
            nursery.start_soon(_answer, listening.socket, methods, session, answering)
            nursery.start_soon(_stop_on_signal, starter, session)
            nursery.start_soon(_keep_house, session)
            nursery.start_soon(_tidy, session)
            if packing is not None:
                nursery.start_soon(packing.serve)
            nursery.start_soon(session.remounter.follow_kernel, session.mount)
            keeping.nursery = nursery
            nursery.start_soon(
                keeping.serve, starter, listening, arguments.pool, arguments.options.hang_timeout
            )
            await _serve_volume(session, starter, answering.cancel)
            nursery.cancel_scope.cancel()


async def _answer(
    listener: socket.socket, methods: server.Methods, session: Session, scope: trio.CancelScope
) -> None:
    """Answer questions until the mount has ended: who still gets answers takes it for served."""
    with scope:
        await server.serve(listener, methods, mount=session.mount_identity)


def _words_of_a_successor(arguments: Arguments) -> list[str]:
    words = [arguments.pool, arguments.mountpoint]
    words += ["-o", arguments.options.as_text(only_said=True)]
    return [*words, "--foreground"] if arguments.foreground else words


async def _serve_volume(session: Session, starter: Starter, has_ended: Callable[[], None]) -> None:
    """Serve the mount until it ends; a cache with its origin, and in the end without it."""
    life = session.served.life
    if life is None:
        await session.serve(starter.say_ready)
        return
    life.give_up = functools.partial(_give_up, starter, session)
    try:
        await life.begin(starter.say_waiting)
        async with trio.open_nursery() as tasks:
            await tasks.start(life.serve)
            await session.serve(starter.say_ready)
            has_ended()
            tasks.cancel_scope.cancel()
        await life.finish()
    finally:
        with trio.CancelScope(shield=True):
            await life.close()


def _give_up(starter: Starter, session: Session, why: str) -> None:
    """End the process while an origin may still touch its pages; its pool stays to be recovered."""
    sentence = f"{why}; the daemon ends, and leaves what it can't wait for to the kernel"
    log.error("%s", sentence)
    starter.say_failed(sentence)
    session.end()
    _let_go(session)
    os._exit(EXIT_MOUNT_FAILED)


async def _stop_on_signal(starter: Starter, session: Session) -> None:
    with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        if starter.ended_by is not None:
            # The signal came before there was a session to end.
            _terminate(session)
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            starter.ended_by = starter.ended_by or number
            _terminate(session)


def _terminate(session: Session) -> None:
    if session.served.life:
        session.served.life.stop_beginning()
    session.terminate()


async def _keep_house(session: Session) -> None:
    """Make durable what was written a while ago, as a flusher does, and drop idle structures."""
    while True:
        await trio.sleep(_HOUSEKEEPING_SECONDS)
        try:
            await session.engine.make_durable()
        except OSError as error:
            log.error("what was written could not be made durable: %s", error)
        session.memmap.drop_idle(_idle_seconds(session))


def _idle_seconds(session: Session) -> float:
    """How long page structures are kept that nobody uses: they say what of a file is cold."""
    fs = session.served.fs
    if fs is None or not fs.may_have_compressed:
        return _HOUSEKEEPING_SECONDS
    return max(_HOUSEKEEPING_SECONDS, fs.frames.packed.cold_seconds)


async def _tidy(session: Session) -> None:
    """Let the volume do what no request should have to wait for."""
    volume = session.served.volume
    while True:
        await trio.sleep(_TIDY_SECONDS)
        due = trio.current_time() + _TIDY_SECONDS
        has_more = _done(volume.tidy)
        while has_more and trio.current_time() < due:
            await trio.sleep(_SOON_SECONDS)
            has_more = _done(volume.go_on)


def _done(step: Callable[[], bool]) -> bool:
    """Do a step of tidying; whether there is more to do soon."""
    try:
        return step()
    except MemoryFault as fault:
        report_fault(fault.path, fault.pfn, "tidying up failed")
    except (OSError, PmemfsError) as error:
        log.error("tidying up failed: %s", error)
    return False


def _advise(pool: Pool, medium: MappedMedium, options: MountOptions) -> None:
    zone = pool.zones.data
    populate = Advice.POPULATE_READ if options.read_only else Advice.POPULATE_WRITE
    for wanted, advice in ((options.huge_pages, Advice.HUGE_PAGES), (options.populate, populate)):
        if wanted and not medium.reserved:
            log.warning("%s is sparse: it takes no memory in advance", medium.name)
        elif wanted and not all(
            # In steps, because a signal has no effect during one.
            medium.advise(advice, start, min(_ADVICE_BYTES, zone.end_bytes - start))
            for start in range(zone.offset_bytes, zone.end_bytes, _ADVICE_BYTES)
        ):
            log.warning("%s: the kernel does not take the advice %s", medium.name, advice.name)


if __name__ == "__main__":
    main()
