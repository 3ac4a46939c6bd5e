"""Whatever is said about keys on the control socket of a mount: no request does harm.

Each request is one that is refused or changes nothing, and then the same with something else in one
place of it, with a part missing, or garbled. So afterwards all keys are what they were.
"""

from __future__ import annotations

import json
import random
import socket
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kit.commands import pmemfs_here, pmemfs_ok
from kit.control_socket import WRONG, exchange, places, with_another
from kit.fs_mounts import create_fs
from kit.keys import add_key, encrypted, keys_of, new_key_file
from kit.mounts import Mounted, PoolMaker
from kit.posix import opened
from pmemfs.control import REQUEST_LIMIT_BYTES
from pmemfs.control.places import socket_path
from pmemfs.logs import log_file
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount]

CONTENT = b"content that stays what it is"
NO_NAMES = ("", "\0", "work\0", "\x1b[2J", "\ud800", "n" * 65, "\u202e")
"""What can't name a key."""
SECRET = b64encode(b"no key was ever wrapped with this").decode()
SALT = "5a" * 16
CLIENTS, ROUNDS = 8, 300
AT_ONCE = 200


class Rig(NamedTuple):
    """A mount with a key that two files unlock, one that one file unlocks, and one that is
    locked."""

    mounted: Mounted
    path: Path
    """Of the control socket."""
    file: Path
    """An encrypted file."""
    key_file: Path
    """What unlocks the first key."""

    @property
    def log(self) -> str:
        return log_file(str(self.mounted.pool)).read_text()

    def ask(self, line: bytes) -> list[Any]:
        return exchange(self.path, line)


@pytest.fixture
def rig(pools: PoolMaker) -> Rig:
    mounted = pools.mount(create_fs(pools, "fs0", "32M"))
    at = mounted.mountpoint
    key_file = add_key(mounted)
    second = new_key_file(mounted.pool.parent, "second")
    pmemfs_here("key", "add", at, "--name", "work", "--key-file", second)
    for name in ("lone", "locked"):
        add_key(mounted, name)
    pmemfs_here("lock", at, "--key", "locked")
    file = encrypted(mounted) / "file"
    file.write_bytes(CONTENT)
    mount = mount_at(str(at))
    assert mount is not None
    return Rig(mounted, Path(socket_path(mount)), file, key_file)


def requests(rig: Rig) -> list[dict[str, Any]]:
    """One or more of each method; none of them changes anything."""
    keys = {key["name"]: key for key in keys_of(rig.mounted)}
    known = b64encode(rig.key_file.read_bytes()).decode()
    wrong = {"secret": SECRET, "kind": "key file"}
    changed = {"new_secret": known, "new_kind": "key file", "salt": SALT}
    inode = rig.file.stat().st_ino
    asked: list[tuple[str, dict[str, Any]]] = [
        ("key-list", {}),
        ("key-find", {"name": "work"}),
        ("key-find", {"inode": inode, "path": "file"}),
        ("key-ways", {"name": "work", **wrong}),
        # This unlocks the key already.
        ("key-add", {"name": "work", "secret": known, "kind": "key file", "salt": SALT}),
        ("key-add", {"name": "locked", **wrong, "salt": SALT}),
        ("key-change", {"name": "work", **wrong, **changed}),
        # The last way.
        *(("key-remove", {"name": name, "key_id": keys[name]["key_id"],
                          "ways": keys[name]["ways"], "is_forced": False})
          for name in ("lone", "locked")),
        ("encrypt", {"inode": inode, "name": "work", "path": "file"}),
        ("unlock", {"name": "locked", **wrong}),
        ("unlock", {"name": "none", **wrong}),
        ("unlock", {"inode": 1, "path": "x", **wrong}),
        ("lock", {"name": "locked", "is_forced": True}),
        ("lock", {"inode": 1, "path": "x"}),
    ]  # fmt: skip
    return [{"method": method, "params": params} for method, params in asked]


def all_ways(rig: Rig) -> bytes:
    """To remove all ways to unlock a key, but not by force."""
    (key,) = (key for key in keys_of(rig.mounted) if key["name"] == "work")
    params = {name: key[name] for name in ("name", "key_id", "ways")}
    return json.dumps({"method": "key-remove", "params": params}).encode()


def with_wrong_parts(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The request with something else in one place, with a place less, or with one more."""
    for way in places(request["params"]):
        for wrong in (*WRONG, *(NO_NAMES if way == ("name",) else ())):
            # To force is no mistake.
            if (way, wrong) != (("is_forced",), True):
                yield {**request, "params": with_another(request["params"], way, wrong)}
        if way and way != ("name",):
            yield {**request, "params": with_another(request["params"], way, ...)}
    yield {**request, "params": {**request["params"], "peer": 0, "": None}}
    yield {**request, "method": request["method"] + "\0"}


def lines_of(rig: Rig) -> list[bytes]:
    """All that is said, each a line or what should be one."""
    asked, chance = requests(rig), random.Random(5)
    whole = [json.dumps(request).encode() for request in asked]
    lines = [*whole, *whole, all_ways(rig)]
    lines += [json.dumps(r).encode() for request in asked for r in with_wrong_parts(request)]
    lines += [line[: chance.randrange(len(line))] for line in whole for _ in range(3)]
    # Whoever garbles an addition of a way may well add another.
    garbled = [line for line in whole if b"key-add" not in line and b"encrypt" not in line]
    for _ in range(ROUNDS):
        line = bytearray(chance.choice(garbled))
        for at in chance.choices(range(len(line)), k=chance.randrange(1, 4)):
            line[at] = chance.randrange(256)
        lines.append(bytes(line).replace(b"\n", b" "))
    long = {
        "method": "unlock",
        "params": {"name": "x" * REQUEST_LIMIT_BYTES, "secret": "", "kind": ""},
    }
    lines += [json.dumps(long).encode(), b"[" * 50_000, b"\xff" * 100, b"", b"\0"]
    chance.shuffle(lines)
    return lines


def is_answer(answer: dict[str, Any]) -> bool:
    """Whether it is a result, or a sentence that says what is wrong with the request."""
    if "result" in answer:
        return True
    message = str(answer["error"]["message"])
    return bool(message) and "its log says why" not in message


def test_no_request_about_keys_does_harm(pools: PoolMaker, rig: Rig) -> None:
    before = keys_of(rig.mounted)
    lines = lines_of(rig)
    with opened(rig.file) as fd, ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda line: rig.ask(line + b"\n"), lines))
        assert fd
    wrong = [
        (line, said) for line, said in zip(lines, answers, strict=True)
        if not all(map(is_answer, said))
    ]  # fmt: skip
    assert wrong == []
    assert sum(len(said) for said in answers) >= len(lines) - 1, "only the long line has none"
    assert keys_of(rig.mounted) == before
    assert "Traceback" not in rig.log
    assert SECRET not in rig.log
    assert rig.file.read_bytes() == CONTENT
    pmemfs_ok("lock", rig.file.parent)
    pmemfs_ok("unlock", rig.file.parent, "--key-file", rig.key_file)
    assert rig.file.read_bytes() == CONTENT
    pools.umount(rig.mounted)
    assert "3 keys, 4 ways to unlock, 0 damaged" in pmemfs_ok("check", rig.mounted.pool)


def test_many_who_say_half_of_a_request_keep_nobody_from_his_keys(rig: Rig) -> None:
    half = json.dumps({"method": "unlock", "params": {"name": "locked"}}).encode()[:-1]
    before = keys_of(rig.mounted)
    with ExitStack() as connections:
        for _ in range(AT_ONCE):
            connection = connections.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(rig.path))
            connection.sendall(half)
        assert keys_of(rig.mounted) == before
        pmemfs_ok("lock", rig.file.parent)
        pmemfs_ok("unlock", rig.file.parent, "--key-file", rig.key_file)
    assert keys_of(rig.mounted) == before
    assert "Traceback" not in rig.log
    assert rig.file.read_bytes() == CONTENT
