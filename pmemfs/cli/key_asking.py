"""What the commands for keys share: secrets that a user gives, and the daemon that is asked.

Invariant: a passphrase is read from the terminal without an echo, or from standard input. It is
never a word of a command line, nor in the environment, because every user may see these.
"""

from __future__ import annotations

import base64
import sys
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from pmemfs.cli.find import Report
from pmemfs.cli.output import print_json, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.place import ask_of_files, find_place
from pmemfs.errors import BadSecret, BadUsage, NoKeysHere, NoSuchSource
from pmemfs.media.keyreport import KeyReport, KeyReports, check_secret
from pmemfs.mountinfo import Mount
from pmemfs.text import counted
from pmemfs.unsaid import json_values

_PATIENCE_SECONDS = 300
"""To try one passphrase takes about a second; a key may have many ways, and a machine much to
do."""
PASSPHRASE, KEY_FILE = "passphrase", "key file"


def secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What unlocks a key, as `passphrase` and `key_file`."""
    for option in (
        click.option("--key-file", type=ANY_PATH, metavar="FILE",
                     help="A file of at least 32 bytes, best of random ones."),
        click.option("--passphrase", is_flag=True,
                     help="Ask for a passphrase; the default. Of a pipe, it is one line."),
    ):  # fmt: skip
        command = option(command)
    return command


name_option = click.option("--name", required=True, metavar="KEY", help="The name of the key.")


def key_directory(path: str) -> tuple[Mount, int]:
    """The mount that a path is of, and its inode. Raises NoSuchSource, NotMounted."""
    mount, status = find_place(path)
    return mount, status.st_ino


def find_key(mount: Mount, name: str) -> KeyReport | None:
    """The key of a name, or of the ID if nothing unlocks it any more; None if there is none."""
    return next(
        (
            key
            for key in all_keys(mount)
            if key.name == name or (not key.ways and key.key_id == name)
        ),
        None,
    )


def all_keys(mount: Mount) -> tuple[KeyReport, ...]:
    """All keys of a mount."""
    return ask_about(mount, "key-list", KeyReports).keys


def ask_about(mount: Mount, method: str, shape: type[Report], **params: Any) -> Report:
    """Ask for something that may have to try all ways to unlock a key. Raises NoKeysHere."""
    return ask_of_files(
        mount, NoKeysHere, method, shape, timeout_seconds=_PATIENCE_SECONDS, **params
    )


def given_secret(
    prompt: str, key_file: str | None, *, passphrase: bool = False, is_new: bool = False
) -> dict[str, str]:
    """A secret as the daemon is told it: of a key file, or a passphrase that is asked for, twice if
    it is new. Raises BadUsage, BadSecret."""
    if key_file is not None and passphrase:
        raise BadUsage(why="--passphrase and --key-file exclude each other")
    kind = PASSPHRASE if key_file is None else KEY_FILE
    secret = _typed(prompt, is_new=is_new) if key_file is None else _read(key_file)
    check_secret(secret, kind)
    return {"secret": base64.b64encode(secret).decode(), "kind": kind}


def print_key(key: KeyReport, sentence: str, *, as_json: bool) -> None:
    """Say what became of a key."""
    if as_json:
        print_json(json_values(key))
    else:
        say(sentence)


def in_ways(key: KeyReport) -> str:
    """In how many ways a key can be unlocked."""
    return counted(len(key.ways), "way", "ways")


def since(created_ns: int) -> str:
    """A stored time, for people."""
    return datetime.fromtimestamp(created_ns / 1e9, UTC).isoformat(timespec="seconds")


def _typed(prompt: str, *, is_new: bool) -> bytes:
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        # A line end of Windows, too: on a terminal nobody could type its carriage return.
        return _composed(line.removesuffix(b"\n").removesuffix(b"\r"))
    # Imported here, because programs type nothing.
    from getpass import getpass

    try:
        first = getpass(f"{prompt}: ")
        if is_new and getpass(f"{prompt}, again: ") != first:
            raise BadSecret(what="this passphrase", why="it was another one the second time")
    except EOFError:
        first = ""
    return _composed(first.encode(errors="surrogateescape"))


def _composed(passphrase: bytes) -> bytes:
    """A passphrase in Unicode's normal form C, so that it is the same from all keyboards and
    programs. What is no UTF-8 stays as it is."""
    try:
        text = passphrase.decode()
    except UnicodeDecodeError:
        return passphrase
    return passphrase if text.isascii() else unicodedata.normalize("NFC", text).encode()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            # One byte more than is allowed, so that a file that is too long is known as such.
            return file.read((64 << 10) + 1)
    except OSError as error:
        raise NoSuchSource(path=path, why=(error.strerror or str(error)).lower()) from None
