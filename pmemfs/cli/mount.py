"""`pmemfs mount`: start the daemon of a mount, and come back when the mount answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import click

from pmemfs.cli.output import complain, warn
from pmemfs.errors import MountFailed, PmemfsError, mount_exit_code
from pmemfs.fuse.mountpoint import prepare_mountpoint
from pmemfs.fuse.options import MountOptions
from pmemfs.medium.source import identify

ENGINES = ("native", "python")
TRANSPORTS = ("auto", "uring", "fd")
_DAEMON = "pmemfs.daemons.mountd"


@click.command()
@click.argument("pool")
@click.argument("mountpoint")
@click.option(
    "-o", "options_text", metavar="OPTIONS", multiple=True, help="Mount options, see below."
)
@click.option("-r", "--read-only", is_flag=True, help="The same as -o ro.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=ENGINES[0],
    show_default=True,
    help="Who answers reads and writes.",
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default=TRANSPORTS[0],
    show_default=True,
    help="How the native engine talks to the kernel: FUSE over io_uring, or reads of /dev/fuse.",
)
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
def mount(
    pool: str,
    mountpoint: str,
    options_text: tuple[str, ...],
    read_only: bool,
    engine: str,
    transport: str,
    foreground: bool,
) -> int:
    """Mount POOL on the directory MOUNTPOINT.

    Returns when the mount answers; a daemon stays behind until somebody unmounts it.

    \b
    Options for -o, separated by commas:
      ro, rw             read-only; page structures are then kept in DRAM
      allow_other        let other users in; the permissions of the file decide
      uid=, gid=, mode=  owner and mode (octal) of the device file; mode block only
      cached             keep in the page cache what was read; mode fs only
      populate           fault in the whole pool now, so that no access has to later
      huge_pages         ask for huge pages behind the mapping
      nosuid, noexec, …  as for mount(8)
    """

    def attempt() -> int:
        options = MountOptions.parse(",".join([*options_text, *(["ro"] if read_only else [])]))
        return start(
            pool, mountpoint, options, engine=engine, transport=transport, foreground=foreground
        )

    return reporting_mount_failure(attempt)


def reporting_mount_failure(attempt: Callable[[], int]) -> int:
    """Run what mounts or unmounts; a failure prints its sentence and is 32, as for mount(8)."""
    try:
        return attempt()
    except PmemfsError as error:
        complain(str(error))
        return mount_exit_code(error)


def start(
    pool: str,
    mountpoint: str,
    options: MountOptions,
    *,
    engine: str = ENGINES[0],
    transport: str = TRANSPORTS[0],
    foreground: bool = False,
) -> int:
    """Start the daemon and wait until the mount answers. Raises PmemfsError."""
    source = identify(pool)
    resolved = prepare_mountpoint(mountpoint)
    words = [sys.executable, "-m", _DAEMON, os.path.realpath(pool), resolved]
    words += ["-o", options.as_text(), "--engine", engine, "--transport", transport]
    if foreground:
        os.execv(sys.executable, words)
    answer = _start_in_background(words)
    if "error" in answer:
        raise _Said(answer["error"])
    if source.warning:
        warn(source.warning)
    try:
        # Unlike its size, this is known at once, however large the pool is.
        os.stat(resolved)
    except OSError as error:
        why = f"the mount does not answer: {error.strerror}"
        raise MountFailed(pool=pool, path=mountpoint, why=why) from None
    return 0


class _Said(PmemfsError):
    """{sentence}"""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence=sentence)


def _start_in_background(words: list[str]) -> dict[str, str]:
    """Start the daemon in a session of its own; the line that it says when it is ready or fails."""
    reader, writer = os.pipe()
    daemon = subprocess.Popen(
        [*words, "--ready-fd", str(writer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    with os.fdopen(reader) as ready:
        line = ready.readline()
    if not line:
        return {"error": f"the daemon ended with status {daemon.wait()} before it was ready"}
    answer: dict[str, str] = json.loads(line)
    return answer
