"""Keys of mounts: secrets, given to the program as a file, through a pipe or by typing."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pty
import secrets
import select
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kit.commands import BIN, Result, pmemfs_here
from kit.mounts import Mounted
from pmemfs.transform.secrets import SLOT_COUNT

SLOT_BYTES, KEY_BYTES = 128, 64
_PATIENCE_SECONDS = 60
_PIDFD_GETFD = 438


def new_key_file(directory: Path, name: str = "key") -> Path:
    """A file of random bytes."""
    path = directory / name
    path.write_bytes(secrets.token_bytes(64))
    return path


def add_key(mounted: Mounted, name: str = "work") -> Path:
    """Make a key; the file that unlocks it, beside the pool."""
    path = new_key_file(mounted.pool.parent, f"{name}.key")
    pmemfs_here("key", "add", mounted.mountpoint, "--name", name, "--key-file", path)
    return path


def encrypted(mounted: Mounted, name: str = "private", key: str = "work") -> Path:
    """A new directory, encrypted with a key that is there."""
    path = mounted.mountpoint / name
    path.mkdir()
    pmemfs_here("encrypt", path, "--key", key)
    return path


def keys_of(mounted: Mounted) -> list[dict[str, Any]]:
    """What `pmemfs key list` says."""
    return list(json.loads(pmemfs_here("key", "list", mounted.mountpoint, "--json")))


def states(mounted: Mounted) -> dict[str, bool]:
    """Which keys are unlocked, by name."""
    return {key["name"]: key["is_unlocked"] for key in keys_of(mounted)}


def told(lines: Sequence[str], *words: object) -> Result:
    """Run the program with these lines on its standard input, a pipe."""
    done = subprocess.run(
        [BIN / "pmemfs", *map(str, words)], input="".join(f"{line}\n" for line in lines),
        capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def typed(lines: Sequence[str], *words: object) -> Result:
    """Run the program on a terminal, and type a line at each prompt; all that the terminal shows is
    its output."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(BIN / "pmemfs", ["pmemfs", *map(str, words)])
    shown, left = b"", list(lines)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with suppress(OSError):
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.05)[0]:
                continue
            # The end of the other side is an error here.
            shown += os.read(terminal, 4096)
            if left and shown.endswith(b": "):
                os.write(terminal, f"{left.pop(0)}\n".encode())
    os.close(terminal)
    status = os.waitpid(pid, 0)[1]
    assert not left, f"nobody has asked for {left}: {shown!r}"
    return Result(os.waitstatus_to_exitcode(status), shown.decode(), "")


class SecretMemory:
    """The secret memory of a mount, as nobody but a test has it: mapped from a descriptor that was
    taken from the daemon."""

    def __init__(self, mounted: Mounted) -> None:
        """Source: pidfd_getfd(2)."""
        pid = mounted.pid
        number = self.descriptors(pid)[0]
        pidfd = os.pidfd_open(pid)
        fd = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
        os.close(pidfd)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        self._memory = mmap.mmap(fd, SLOT_COUNT * SLOT_BYTES)
        os.close(fd)

    @staticmethod
    def descriptors(pid: int) -> list[int]:
        """Those of secret memory that a process has."""
        found = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            # Others are closed meanwhile.
            with suppress(FileNotFoundError):
                if "secretmem" in os.readlink(entry):
                    found.append(int(entry.name))
        return found

    def keys(self) -> list[bytes]:
        """All keys, of slots that count and of any other."""
        raw = self._memory[:]
        slots = (raw[at : at + KEY_BYTES] for at in range(0, len(raw), SLOT_BYTES))
        return [key for key in slots if any(key)]

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()
