"""The commands by name, and what `pmemfs --help` says of them. Loads nothing.

Whoever asks for help or for the version waits for no command to be loaded: all of that is here. A
test holds each summary to the command's own text.
"""

from __future__ import annotations

from pmemfs.version import VERSION

COMMANDS = {
    "create": ("pmemfs.cli.create:create", "Make a pool of a file or a device."),
    "mount": ("pmemfs.cli.mount:mount", "Mount POOL on the directory MOUNTPOINT."),
    "umount": ("pmemfs.cli.umount:umount", "Unmount MOUNTPOINT, or POOL wherever it is mounted."),
    "info": ("pmemfs.cli.info:info", "Show the pool TARGET, or the mount on TARGET."),
    "pages": (
        "pmemfs.cli.pages:pages",
        "Count the page structures of a mount, and show the hottest pages.",
    ),
    "stat": ("pmemfs.cli.stat:stat", "Show what a mount has answered, how fast, and who did."),
    "extents": ("pmemfs.cli.extents:extents", "Show where a file of a mount lies in the pool."),
    "set": (
        "pmemfs.cli.set:set_transform",
        "Let a file be compressed while it is cold.",
    ),
    "get": (
        "pmemfs.cli.get:get_transform",
        "Show how a file or directory is compressed or encrypted.",
    ),
    "rewrite": (
        "pmemfs.cli.rewrite:rewrite",
        "Compress files now, or make them plain, as they are set.",
    ),
    "copy": (
        "pmemfs.cli.copy:copy",
        "Copy a file or a device into a mount, or out of one.",
    ),
    "list": (
        "pmemfs.cli.list:list_mounts",
        "List all mounts, and those whose daemon does not answer.",
    ),
    "resize": ("pmemfs.cli.resize:resize", "Make a pool larger, mounted or not."),
    "trim": ("pmemfs.cli.trim:trim", "Give back the memory that no file of a mount uses."),
    "upgrade": (
        "pmemfs.cli.upgrade:upgrade",
        "Let this version of pmemfs serve a mount that another one serves.",
    ),
    "flush": (
        "pmemfs.cli.flush:flush",
        "Give the origin of a cache all that only the cache has.",
    ),
    "cache": (
        "pmemfs.cli.cache:cache",
        "Change settings of a cache, empty it, verify it, save what it has.",
    ),
    "key": (
        "pmemfs.cli.key:key",
        "Make keys for encrypted directories, and say what unlocks them.",
    ),
    "encrypt": (
        "pmemfs.cli.encrypt:encrypt",
        "Encrypt what will be made in an empty directory.",
    ),
    "unlock": ("pmemfs.cli.unlock:unlock", "Unlock the key of an encrypted directory."),
    "lock": ("pmemfs.cli.lock:lock", "Lock the key of an encrypted directory, and forget it."),
    "check": ("pmemfs.cli.check:check", "Verify a pool that is not mounted, and repair it."),
    "doctor": (
        "pmemfs.cli.doctor:doctor",
        "Show what this machine offers, and what would be faster.",
    ),
    "compare": (
        "pmemfs.cli.compare:compare",
        "Compare the ways to keep page structures, side by side.",
    ),
}
"""Where each command is, and its summary; in the order of a pool's life."""

ABOUT = """\
Persistent memory as storage, through a mount.

A pool is the memory behind a tmpfs file, a file of a DAX file system,
/dev/daxX.Y or /dev/pmemN.

  pmemfs create /dev/shm/pmem0 --size 4G
  pmemfs mount  /dev/shm/pmem0 /mnt
  fio --name=v --filename=/mnt/pmem0 --direct=1 --rw=randwrite --size=1g
  pmemfs umount /mnt

Exit codes: 0 done, 1 failed, 2 bad usage, 3 refused since something would be
lost, 4 the pool is not valid, 16 in use. mount and umount fail with 32, like
mount(8), and bad usage of them is 2, too; check answers like fsck(8).

With --json a report is JSON on standard output, and each error, warning and
note a line of JSON on standard error. An error has its name as "error", and
"message", "exit_code" and "errno"."""

HELP_OPTIONS = ("-h", "--help")
VERSION_OPTIONS = ("-V", "--version")

VERSION_LINE = f"pmemfs {VERSION}"


def help_text() -> str:
    """What `pmemfs --help` prints."""
    options = {
        "--json": "Print JSON for programs; errors too.",
        "-q, --quiet": "Say nothing but errors.",
        "-v, --verbose": "Say more: what is done, and why.",
        ", ".join(VERSION_OPTIONS): "Show the version and exit.",
        ", ".join(HELP_OPTIONS): "Show this message and exit.",
    }
    summaries = {name: summary for name, (_, summary) in COMMANDS.items()}
    parts = ["Usage: pmemfs [OPTIONS] COMMAND [ARGUMENTS]...", ABOUT,
             _section("Options", options), _section("Commands", summaries),
             "Options may follow the command; 'pmemfs COMMAND --help' says more."]  # fmt: skip
    return "\n\n".join(parts)


def _section(heading: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([f"{heading}:", *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def told_at_once(words: list[str]) -> str | None:
    """What a command line wants to know that is known before anything is loaded."""
    first = words[0] if words else None
    if first in HELP_OPTIONS:
        return help_text()
    return VERSION_LINE if first in VERSION_OPTIONS else None


def first_word(words: list[str]) -> str | None:
    """The name of the command in a command line: what is no option of `pmemfs` itself."""
    return next((word for word in words if not word.startswith("-")), None)
