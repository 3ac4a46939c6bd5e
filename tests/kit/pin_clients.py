"""Processes that have pages of a mount pinned and mapped, to be asked, stopped and killed."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmemfs.control.channel import Channel
from pmemfs.control.places import socket_path
from pmemfs.mountinfo import mount_at
from pmemfs.pins.words import PLACES

_PROGRAM = """
import json, os, sys
from kit.pin_clients import PinClient
client = PinClient(sys.argv[1])
pins = []
for line in sys.stdin:
    command, *words = json.loads(line)
    if command == "pin":
        pins.append(client.pin(*words))
        print(pins[-1].result["pin"], flush=True)
    elif command == "read":
        print(json.dumps(pins[words[0]].read(words[1], words[2]).hex()), flush=True)
    elif command == "store":
        pins[words[0]].memory[words[1]:words[1] + len(words[2])] = words[2].encode()
        print("1", flush=True)
"""


@dataclass
class MappedPin:
    """A pin of one file, with its first piece mapped."""

    result: dict[str, Any]
    fd: int
    memory: mmap.mmap

    def read(self, offset: int, length: int) -> bytes:
        return self.memory[offset : offset + length]

    def end(self, marks: bytes = b"d") -> None:
        self.memory.close()
        if marks:
            os.write(self.fd, marks)
        os.close(self.fd)


class PinClient:
    """Talks to the daemon of a mount."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        mount = mount_at(os.fspath(mountpoint))
        assert mount is not None
        self.channel = Channel(socket_path(mount), mount.owner_uid)
        self.pool_fds: dict[bool, int] = {}
        """The pool, by whether it is for pins that are writable."""
        self.words_fd = -1

    def ask_for_pin(self, path: str | os.PathLike[str], **params: Any) -> tuple[Any, int]:
        """A pin of a whole file, and its descriptor."""
        inode = os.stat(path).st_ino
        params.setdefault("files", [[inode, 0, -1]])
        writable = bool(params.get("writable"))
        wants_pool = writable not in self.pool_fds
        result, (fd, *more) = self.channel.ask("pin", wants_pool=wants_pool, **params)
        if wants_pool:
            self.pool_fds[writable], words_fd = more
            if self.words_fd < 0:
                self.words_fd = words_fd
            else:
                os.close(words_fd)
        return result, fd

    def pin(self, path: str, writable: bool = False, **params: Any) -> MappedPin:
        result, fd = self.ask_for_pin(path, writable=writable, paths=[path], **params)
        (_, at, length), *_ = result["files"][0]["pieces"]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = mmap.mmap(self.pool_fds[writable], length, prot=protection, offset=at)
        return MappedPin(result, fd, memory)

    def word(self, place: int) -> int:
        with mmap.mmap(self.words_fd, PLACES * 8, prot=mmap.PROT_READ) as words:
            return int.from_bytes(words[8 * place : 8 * place + 8], "little")

    def pins(self, **params: Any) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self.channel.ask("pins", **params)[0]
        return answer

    def close(self) -> None:
        self.channel.close()
        for fd in (*self.pool_fds.values(), self.words_fd):
            if fd >= 0:
                os.close(fd)
        self.pool_fds.clear()
        self.words_fd = -1


class PinningProcess:
    """Another process that pins, as a `PinClient` does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, *words: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(words) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def pinning_process(mountpoint: str | os.PathLike[str]) -> Iterator[PinningProcess]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, os.fspath(mountpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        try:
            yield PinningProcess(process)
        finally:
            process.kill()
