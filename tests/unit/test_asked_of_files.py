"""A command for keys or files asks its daemon only that, and for the mode only where it must."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.control_socket import STATUS, answering, exchange, in_thread, served
from pmemfs.cli import find
from pmemfs.cli.place import ask_of_files
from pmemfs.control.client import RemoteError
from pmemfs.errors import NoKeysHere
from pmemfs.media.keyreport import KeyReports
from pmemfs.mountinfo import FUSE_TYPE, Mount

Answer = dict[str, Any]
NO_KEYS: Answer = {"result": {"keys": []}}
LOCKED: Answer = {"error": {"message": "it is locked", "exit_code": 3, "kind": "NoKey"}}
MOUNT = Mount("0:57", "/mnt", FUSE_TYPE, "/dev/shm/pmem0", f"user_id={os.geteuid()}")


@pytest.fixture
def path(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = shm / "run"
    directory.mkdir(mode=0o700)
    path = directory / "0:57.sock"
    monkeypatch.setattr(find, "socket_path", lambda *_: str(path))
    return path


@contextmanager
def daemon(path: Path, answers: dict[str, Answer]) -> Iterator[list[str]]:
    """One that says this; what it was asked."""
    asked = []

    def answer(connection: socket.socket) -> None:
        method = json.loads(connection.recv(65536))["method"]
        asked.append(method)
        connection.sendall(json.dumps(answers[method]).encode() + b"\n")

    with answering(path, answer):
        yield asked


def ask_for_keys() -> KeyReports:
    return ask_of_files(MOUNT, NoKeysHere, "key-list", KeyReports)


def test_whoever_is_answered_has_asked_for_nothing_else(path: Path) -> None:
    with daemon(path, {"key-list": NO_KEYS}) as asked:
        assert ask_for_keys() == KeyReports(())
    assert asked == ["key-list"]


def test_a_refusal_is_passed_on_at_once(path: Path) -> None:
    with daemon(path, {"key-list": LOCKED}) as asked, pytest.raises(RemoteError, match="locked"):
        ask_for_keys()
    assert asked == ["key-list"]


@pytest.mark.parametrize(
    ("mode", "error", "words"),
    [("block", NoKeysHere, "pool of mode block"), ("fs", RemoteError, "does not understand")],
)
def test_where_a_daemon_does_not_understand_its_mode_says_why(
    path: Path, mode: str, error: type[Exception], words: str
) -> None:
    status = {**STATUS, "pool": {**STATUS["pool"], "mode": mode}}
    answers = {"key-list": not_understood(path), "info": {"result": status}}
    with daemon(path, answers) as asked, pytest.raises(error, match=words):
        ask_for_keys()
    assert asked == ["key-list", "info"]


def not_understood(path: Path) -> Answer:
    """What a real daemon says to a method that it does not know."""
    said: list[Answer] = []

    async def client(path: Path) -> None:
        said.extend(await in_thread(exchange, path, b'{"method": "key-list", "params": {}}\n'))

    served(path, client)
    return said[0]
