"""`pmemfs mount`: start the daemon of a mount, and come back when the mount answers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pmemfs.cli.options import OneOf, reporting
from pmemfs.cli.output import complain, manner, warn
from pmemfs.cli.paths import A_DIRECTORY, ANY_PATH, ListedWords
from pmemfs.control.launch import Launch, NotedSignals, Said, Wanted
from pmemfs.control.prepared import daemon_words
from pmemfs.control.starter import ENDING_SIGNALS
from pmemfs.errors import (
    EXIT_MOUNT_FAILED,
    BadUsage,
    DaemonDied,
    MountFailed,
    OriginGone,
    PmemfsError,
    UnusableOrigin,
    mount_exit_code,
    sentence_of,
)
from pmemfs.medium.source import identify
from pmemfs.mount.mountpoint import detach, is_dead, mounts_of_pool, prepare_mountpoint
from pmemfs.mount.options import ENGINES, TRANSPORTS, WORDS, MountOptions, split_words
from pmemfs.mount.processes import (
    cpu_limit,
    limits_behind,
    limits_on_everything,
    raise_limits,
)
from pmemfs.mountinfo import Mount, mount_at
from pmemfs.reach import look

if TYPE_CHECKING:
    from pmemfs.cli.again import Living

_PATIENCE_SECONDS = 5
_LOOK_SECONDS = 60
_POLL_SECONDS = 0.1
_NO_ORIGIN = (UnusableOrigin.__name__, OriginGone.__name__)


class _Word(click.Option):
    """A flag that stands for a word of `-o` at its place in the command line: the last one wins."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let it add that word to those of `-o`."""
        parser.add_option(
            obj=self, opts=self.opts, dest="options_text", action="append_const", const="ro"
        )


@click.command()
@click.argument("pool", type=ANY_PATH)
@click.argument("mountpoint", type=A_DIRECTORY, required=False, metavar="MOUNTPOINT")
@click.option(
    "-o",
    "options_text",
    type=ListedWords((*WORDS, "remount")),
    metavar="OPTIONS",
    multiple=True,
    help="Mount options, separated by commas.",
)
@click.option(
    "-r", "--read-only", cls=_Word, is_flag=True, expose_value=False, help="The same as -o ro."
)
@click.option(
    "--engine",
    type=OneOf(ENGINES),
    help=f"Who answers reads and writes; the same as -o engine=…  [default: {ENGINES[0]}]",
)
@click.option(
    "--transport",
    type=OneOf(TRANSPORTS),
    help="How the native engine talks to the kernel: FUSE over io_uring, or reads of /dev/fuse; "
    f"the same as -o transport=…  [default: {TRANSPORTS[0]}]",
)
@click.option("--foreground", is_flag=True, help="Be the daemon, and log to standard error.")
@reporting
def mount(
    pool: str, mountpoint: str | None, options_text: tuple[str, ...], engine: str | None,
    transport: str | None, foreground: bool, as_json: bool,
) -> int:  # fmt: skip
    """Mount POOL on the directory MOUNTPOINT.

    Returns when the mount answers; a daemon stays behind until somebody unmounts it. If this fails
    or is interrupted, nothing is left. A pool that root has mounted already appears on MOUNTPOINT
    too, if the same options are asked for.

    With --foreground the command is the daemon. If that dies or is upgraded, the mount goes on in
    other processes, which systemd is told. Under other supervisors add -o no_keeper.

    \b
    Options for -o, separated by commas:
      ro, rw             read-only; page structures are then kept in DRAM
      allow_other        let other users in; the permissions of the file decide
      uid=, gid=, mode=  owner and mode (octal) of the device file; modes block and cache
      cached             keep in the page cache what was read; mode fs only
      degraded           without the origin: what the pool has is served; mode cache only
      populate           fault in the whole pool now, so that no access has to later
      huge_pages         ask for huge pages behind the mapping
      relatime, strictatime, noatime, nodiratime
                         which reads count as accesses, as for mount(8)
      engine=, transport=
                         as --engine and --transport
      no_keeper          end when a process of the mount dies, instead of starting it again
      no_standby         let no process wait to take the daemon's place, which saves some MiB
      hang_timeout=      end and start again what has made no progress for so many seconds; 0 (if
                         it is left out): never
      cold_seconds=      compress what was not touched for so long (600), if 'pmemfs set' says so;
                         0: only what is rewritten; mode fs only
      names_memory=      the most memory of the data plane for names (64M); 0: the daemon serves
                       them all; mode fs only
      nosuid, noexec, …  as for mount(8); of suid, dev and nosymfollow only root may ask
      remount            change how MOUNTPOINT is mounted; POOL may be left out

    Exit codes: 0 mounted, 2 bad usage, 32 anything else, 128 + the signal's number if interrupted.
    """
    if mountpoint is None and "remount" not in ",".join(options_text).split(","):
        raise BadUsage(why="MOUNTPOINT is missing; usage: pmemfs mount [OPTIONS] POOL MOUNTPOINT")

    def attempt() -> int:
        said = _said_once("engine", engine, options_text)
        said += _said_once("transport", transport, options_text)
        words = split_words(",".join([*options_text, *said]))
        if mountpoint is None or "remount" in words:
            where = pool if mountpoint is None else mountpoint
            remounted(None if mountpoint is None else pool, where, words)
            say_more(where, as_json=as_json)
            return 0
        options = MountOptions.parse(",".join(words))
        if foreground and as_json:
            raise BadUsage(why="--foreground stays, so that --json has no report: give one of them")
        start(pool, mountpoint, options, foreground=foreground)
        say_more(mountpoint, as_json=as_json)
        return 0

    return reporting_mount_failure(attempt)


def say_more(mountpoint: str, *, as_json: bool = False) -> None:
    """What has become of a mount, where somebody wants to know."""
    if as_json or manner.is_verbose:
        # Loads what asks a daemon, for which nobody else waits.
        from pmemfs.cli.mounted import report_mount

        report_mount(mountpoint, as_json=as_json)


def remounted(pool: str | None, mountpoint: str, words: Sequence[str]) -> None:
    """As `remount`, for words that say so."""
    # What asks a daemon takes as long to load as the rest of a command.
    from pmemfs.cli.remount import remount

    remount(pool, mountpoint, [word for word in words if word != "remount"])


def _said_once(name: str, value: str | None, options_text: Sequence[str]) -> list[str]:
    """What is to be added to the words of `-o` for an option of the command with the same name.

    Raises BadUsage where the two contradict each other: neither is the later one.
    """
    if value is None:
        return []
    for word in ",".join(options_text).split(","):
        if word.startswith(f"{name}=") and word != f"{name}={value}":
            raise BadUsage(why=f"--{name} {value} and -o {word} contradict each other")
    return [f"{name}={value}"]


def reporting_mount_failure(attempt: Callable[[], int]) -> int:
    """Run what mounts or unmounts; a failure prints its sentence and is 32, as for mount(8)."""
    try:
        return attempt()
    except PmemfsError as error:
        code = mount_exit_code(error)
        complain(str(error), exit_code=code, error=error)
        return code
    except (OSError, RuntimeError, MemoryError) as error:
        # Such as a process, a thread or a descriptor that could not be had.
        sentence = f"{sentence_of(error)}{limits_behind(error)}"
        complain(sentence, exit_code=EXIT_MOUNT_FAILED, error=error)
        return EXIT_MOUNT_FAILED


def start(
    pool: str,
    mountpoint: str,
    options: MountOptions,
    *,
    foreground: bool = False,
) -> int:
    """Start the daemon and wait until the mount answers. Raises PmemfsError, and leaves nothing.

    A signal counts as long as the mount is not there: afterwards the command has succeeded.
    """
    signals = NotedSignals()
    raise_limits()
    source = signals.wait_for(lambda: identify(pool))
    resolved = signals.wait_for(lambda: prepare_mountpoint(mountpoint, _has_daemon))
    wanted = Wanted(os.path.realpath(pool), resolved, options)
    if not foreground and _is_mounted_again(wanted, signals):
        return 0
    words = [wanted.pool, wanted.mountpoint, "-o", options.as_text(only_said=True)]
    if foreground:
        _become(daemon_words(words), signals)
    try:
        _launch(words, signals, wanted)
    except Said as said:
        # Somebody else has mounted it meanwhile, such as another line of fstab.
        if not said.is_busy or not _is_mounted_again(wanted, signals, _PATIENCE_SECONDS):
            raise _explained(said, wanted) from None
        return 0
    for warning in (source.warning, cpu_limit()):
        if warning:
            warn(warning)
    return 0


def _explained(said: Said, wanted: Wanted) -> PmemfsError:
    """What to do without an origin, and why a pool is in use that no mount here is of."""
    if said.kind in _NO_ORIGIN:
        return said.and_more("'-o degraded' mounts the pool without it")
    from pmemfs.cli.find import find_hidden
    from pmemfs.mount.elsewhere import named_processes, users_of

    hidden = find_hidden(wanted.pool) if said.is_busy and not mounts_of_pool(wanted.pool) else None
    if hidden is None:
        return said
    users = users_of(hidden.mount)
    by = f" by {named_processes(users)}" if users and not hidden.place else ""
    why = f"it is in use: {hidden.sentence}{by}"
    return MountFailed(pool=wanted.pool, path=wanted.mountpoint, why=why)


def _launch(words: list[str], signals: NotedSignals, wanted: Wanted) -> None:
    with _launched(words, signals, wanted) as launch:
        launch.wait_until_ready(warn)
        try:
            # Unlike its size, this is known at once, however large the pool is.
            launch.look(lambda: look(wanted.mountpoint, seconds=_LOOK_SECONDS))
        except OSError as error:
            why = f"the mount does not answer: {(error.strerror or str(error)).lower()}"
            raise MountFailed(pool=wanted.pool, path=wanted.mountpoint, why=why) from None
        launch.keep()


def _has_daemon(mount: Mount) -> bool:
    """Whether somebody listens for a mount, even if nobody answers: as far as we may ask."""
    from pmemfs.control.client import daemon_pidfd
    from pmemfs.control.places import socket_path

    pidfd = daemon_pidfd(socket_path(mount), owner_uid=mount.owner_uid)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def _is_mounted_again(wanted: Wanted, signals: NotedSignals, seconds: float = 0) -> bool:
    """Let the mount that a pool has already appear where it is wanted, too; whether it has one.

    One that is just made gets some seconds to be ready. Raises MountFailed and Interrupted.
    """
    if not mounts_of_pool(wanted.pool):
        return False
    # Most pools have none, and what asks a daemon takes as long to load as the rest of a command.
    from pmemfs.cli.again import find_living, mount_again

    def find() -> Living | None:
        deadline = time.monotonic() + seconds
        while True:
            found = find_living(wanted.pool)
            if found or not mounts_of_pool(wanted.pool) or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_SECONDS)

    first = signals.wait_for(find)
    if first is None:
        return False
    mount_again(first, wanted, signals)
    return True


def _become(words: list[str], signals: NotedSignals) -> NoReturn:
    """Be the daemon. What this process has blocked stays so until the daemon looks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    signals.check()
    # No directory is kept busy by a daemon that was started there.
    os.chdir("/")
    os.execv(words[0], words)


@contextmanager
def _launched(words: list[str], signals: NotedSignals, wanted: Wanted) -> Iterator[Launch]:
    """A daemon that is started, and of which nothing is left if this ends by an error."""
    launch = Launch(words, signals)
    try:
        try:
            yield launch
        except DaemonDied as error:
            raise DaemonDied(how=f"{error.facts['how']}{limits_on_everything()}") from None
    except BaseException:
        if not launch.abandon():
            warn(f"the daemon did not end by itself and was killed; {wanted.pool} is not clean")
        left = mount_at(wanted.mountpoint)
        # A daemon that was killed could not unmount.
        if left and left.is_ours and left.source == wanted.pool and is_dead(left):
            detach(wanted.mountpoint)
        raise
