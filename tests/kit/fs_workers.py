"""Processes at work in the same directories, each of which checks all that it reads.

Every file has a number of its own, which is an extended attribute before the file has its name,
and every 16 bytes that anybody writes into it are that number and their offset. So whoever reads a
file knows which bytes may be there, whoever wrote them and whenever: those, or zeroes. Anything
else is another file's, or another place's.

Run as a program it is one process; the answer is one line of JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
UNIT = 16
IDENTITY = "user.identity"
NO_OVERWRITE, EXCHANGE = 1, 2
SLOT_COUNT = 8
OWN_COUNT = 12
PLACES = ("d0", "d1", "d2/deep")
MIB = 1 << 20
LEAST = {
    "all": dict.fromkeys(("own_rename", "slot_put", "slot_read", "count_rename", "tree_rename"), 3),
    "churn": {"bytes written": 48 * MIB},
    "read": {"bytes read": 12 * MIB},
}
"""What one worker does at least, whatever the time."""
PATIENCE_SECONDS = 120

_libc = ctypes.CDLL(None, use_errno=True)


def words(identity: int, offset: int, length: int) -> bytes:
    """What belongs at an offset, which is a multiple of 16, as is the length."""
    pairs = np.empty((length // UNIT, 2), "<u8")
    pairs[:, 0] = identity
    pairs[:, 1] = offsets_of(offset, length // UNIT)
    return pairs.tobytes()


def offsets_of(offset: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The second word of each unit. Its highest bit tells it from a zero."""
    return np.arange(offset, offset + count * UNIT, UNIT, dtype="<u8") | np.uint64(1 << 63)


def strange(data: bytes, identity: int, offset: int) -> str | None:
    """What is in the data that can't be in the file; None if all is well."""
    found = np.frombuffer(data, np.uint8)
    length = (len(data) + UNIT - 1) // UNIT * UNIT
    right = np.frombuffer(words(identity, offset, length), np.uint8)[: len(data)]
    # Truncation cuts anywhere, and a torn write may be the start of what was written.
    is_wrong = (found != right) & (found != 0)
    if not is_wrong.any():
        return None
    first = int(np.argmax(is_wrong)) // UNIT * UNIT
    return (
        f"file {identity:#x} has at {offset + first} {data[first : first + UNIT].hex(' ', 8)}"
        f" ({int(is_wrong.sum())} such bytes of {len(data)})"
    )


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def rename(path: str, new_path: str, flags: int) -> None:
    """renameat2."""
    if _libc.renameat2(-100, path.encode(), -100, new_path.encode(), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass
class Own:
    """A file that only one process changes, and what must be in it."""

    identity: int
    path: str
    content: bytearray = field(default_factory=bytearray)


class Worker:
    """One process."""

    def __init__(self, root: Path, number: int, seed: int) -> None:
        self.root = root
        self.number = number
        self.chance = random.Random(seed * 1000 + number)
        self.made = 0
        self.own: list[Own] = []
        self.tally: Counter[str] = Counter()
        self.wrong: list[str] = []

    # -- what all kinds of work are made of ------------------------------------------------------

    def at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def new_identity(self) -> int:
        self.made += 1
        return (self.number + 1) << 40 | self.made

    def new_file(self, largest: int) -> tuple[int, str]:
        """A file with its number and some content, under a name that nobody else uses."""
        identity = self.new_identity()
        path = self.at(f"{self.chance.choice(PLACES)}/new-{identity:x}")
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            os.setxattr(fd, IDENTITY, str(identity).encode())
            self.write(fd, identity, largest)
        return identity, path

    def write(self, fd: int, identity: int, largest: int) -> tuple[int, int]:
        """Write what belongs to a random range; the range."""
        offset = self.chance.randrange(largest) // UNIT * UNIT
        length = int(largest ** self.chance.random()) // UNIT * UNIT + UNIT
        if self.chance.random() < 0.5:
            offset, length = offset // PAGE * PAGE, (length + PAGE - 1) // PAGE * PAGE
        count = os.pwrite(fd, words(identity, offset, length), offset)
        self.tally["bytes written"] += count
        return offset, count

    def read(self, fd: int, identity: int, largest: int, rounds: int) -> None:
        """Read here and there, and check each word."""
        for _ in range(rounds):
            offset = self.chance.randrange(largest) // UNIT * UNIT
            data = os.pread(fd, int(largest ** self.chance.random()) + UNIT, offset)
            self.tally["bytes read"] += len(data)
            if what := strange(data, identity, offset):
                self.wrong.append(what)

    def identity(self, fd: int) -> int:
        return int(os.getxattr(fd, IDENTITY))

    # -- files of its own: it knows all about them -----------------------------------------------

    def own_create(self) -> None:
        if len(self.own) < OWN_COUNT:
            identity = self.new_identity()
            path = self.at(f"{self.chance.choice(PLACES)}/own-{identity:x}")
            with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                os.setxattr(fd, IDENTITY, str(identity).encode())
            self.own.append(Own(identity, path))

    def own_write(self) -> None:
        if self.own:
            own = self.chance.choice(self.own)
            with opened(own.path, os.O_WRONLY) as fd:
                offset, count = self.write(fd, own.identity, 60_000)
            end = offset + count
            own.content += bytes(max(0, end - len(own.content)))
            own.content[offset:end] = words(own.identity, offset, count)

    def own_truncate(self) -> None:
        if self.own:
            own = self.chance.choice(self.own)
            size = self.chance.randrange(100_000)
            os.truncate(own.path, size)
            del own.content[size:]
            own.content += bytes(size - len(own.content))

    def own_rename(self) -> None:
        if self.own:
            own = self.chance.choice(self.own)
            new = self.at(f"{self.chance.choice(PLACES)}/{os.path.basename(own.path)}")
            os.rename(own.path, new)
            own.path = new

    def own_unlink(self) -> None:
        if len(self.own) > OWN_COUNT // 2:
            own = self.own.pop(self.chance.randrange(len(self.own)))
            os.unlink(own.path)

    def own_verify(self) -> None:
        if self.own:
            self.verify(self.chance.choice(self.own))

    def verify(self, own: Own) -> None:
        with open(own.path, "rb") as file:
            data = file.read()
        if data != own.content:
            what = strange(data, own.identity, 0) or "zeroes where data was, or the reverse"
            self.wrong.append(f"own file: {what}; {len(data)} of {len(own.content)} bytes")

    # -- files of all: only the words in them are known ------------------------------------------

    def slot(self) -> str:
        return self.at(f"slots{self.chance.randrange(2)}/{self.chance.randrange(SLOT_COUNT)}")

    def slot_put(self) -> None:
        """A new file in the place of an old one, which others may have open."""
        _, path = self.new_file(60_000)
        os.rename(path, self.slot())

    def slot_write(self) -> None:
        with opened(self.slot(), os.O_WRONLY) as fd:
            self.write(fd, self.identity(fd), 100_000)

    def slot_read(self) -> None:
        with opened(self.slot(), os.O_RDONLY) as fd:
            self.read(fd, self.identity(fd), 100_000, rounds=4)

    def slot_truncate(self) -> None:
        os.truncate(self.slot(), self.chance.choice([0, self.chance.randrange(100_000)]))

    def slot_unlink(self) -> None:
        os.unlink(self.slot())

    def slot_exchange(self) -> None:
        rename(self.slot(), self.slot(), EXCHANGE)

    # -- names of all, of which each process counts what it made and took away -------------------

    def counted(self) -> str:
        return self.at(f"counted{self.chance.randrange(2)}/{self.chance.randrange(24)}")

    def count_create(self) -> None:
        with opened(self.counted(), os.O_WRONLY | os.O_CREAT | os.O_EXCL):
            self.tally["names"] += 1

    def count_link(self) -> None:
        os.link(self.counted(), self.counted())
        self.tally["names"] += 1

    def count_unlink(self) -> None:
        os.unlink(self.counted())
        self.tally["names"] -= 1

    def count_rename(self) -> None:
        rename(self.counted(), self.counted(), self.chance.choice([NO_OVERWRITE, EXCHANGE]))

    def list_names(self) -> None:
        """A listing has no name twice, and no name that nobody gave."""
        names = os.listdir(self.at(f"counted{self.chance.randrange(2)}"))
        known = {str(number) for number in range(24)}
        if len(set(names)) != len(names) or not set(names) <= known:
            self.wrong.append(f"a listing has {sorted(names)}")

    def tree(self) -> str:
        depth = self.chance.randint(1, 3)
        return self.at("/".join(["tree", *(self.chance.choice("abc") for _ in range(depth))]))

    def tree_mkdir(self) -> None:
        os.mkdir(self.tree())
        self.tally["directories"] += 1

    def tree_rmdir(self) -> None:
        os.rmdir(self.tree())
        self.tally["directories"] -= 1

    def tree_rename(self) -> None:
        """Directories go into each other; the kernel must see to it that none goes into itself."""
        rename(self.tree(), self.tree(), self.chance.choice([NO_OVERWRITE, EXCHANGE]))

    # -- page reuse ------------------------------------------------------------------------------

    def churn_slot(self) -> str:
        return self.at(f"slots0/{self.chance.randrange(SLOT_COUNT)}")

    def churn_read(self) -> None:
        """Read a file for a while, whatever becomes of it meanwhile."""
        with opened(self.churn_slot(), os.O_RDONLY) as fd:
            self.read(fd, self.identity(fd), 1 << 20, rounds=12)

    def churn_put(self) -> None:
        _, path = self.new_file(1 << 20)
        try:
            os.rename(path, self.churn_slot())
        except OSError:
            os.unlink(path)
            raise

    def churn_rewrite(self) -> None:
        """Cut off and write again, through one open file that others may cut off or unlink."""
        with opened(self.churn_slot(), os.O_RDWR) as fd:
            identity = self.identity(fd)
            for _ in range(4):
                os.ftruncate(fd, self.chance.choice([0, 100, self.chance.randrange(1 << 20)]))
                self.write(fd, identity, 1 << 20)

    def churn_unlink(self) -> None:
        os.unlink(self.churn_slot())

    # -- a process -------------------------------------------------------------------------------

    def kinds(self, work: str) -> dict[Callable[[], None], int]:
        """The calls of a kind of work, with their weights."""
        if work == "read":
            return {self.churn_read: 1}
        if work == "churn":
            return {self.churn_put: 4, self.churn_rewrite: 4, self.churn_unlink: 1}
        own = {self.own_create: 3, self.own_write: 6, self.own_truncate: 2, self.own_rename: 4,
               self.own_unlink: 2, self.own_verify: 4}  # fmt: skip
        slots = {self.slot_put: 5, self.slot_write: 5, self.slot_read: 8, self.slot_truncate: 2,
                 self.slot_unlink: 1, self.slot_exchange: 2}  # fmt: skip
        names = {self.count_create: 4, self.count_link: 1, self.count_unlink: 3,
                 self.count_rename: 4, self.list_names: 1}  # fmt: skip
        tree = {self.tree_mkdir: 3, self.tree_rmdir: 1, self.tree_rename: 3}
        return {**own, **slots, **names, **tree}

    def run(self, work: str, seconds: float) -> None:
        """Work until the time is up. What another process was faster with is no error.

        On a slow machine it takes longer, until what there should be of the work has been done.
        """
        kinds = self.kinds(work)
        allowed = {errno.ENOENT, errno.EEXIST}
        start = time.monotonic()

        def is_done() -> bool:
            spent = time.monotonic() - start
            has_enough = all(self.tally[name] >= count for name, count in LEAST[work].items())
            return spent >= seconds and (has_enough or spent >= PATIENCE_SECONDS)

        while not is_done() and len(self.wrong) < 20:
            kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
            name = kind.__name__
            also = {errno.ENOTEMPTY, errno.EINVAL} if name.startswith("tree") else set()
            also |= {errno.ENOSPC} if name.startswith("churn") else set()
            try:
                kind()
                self.tally[name] += 1
            except OSError as error:
                self.tally[f"{name} {errno.errorcode[error.errno or 0]}"] += 1
                if error.errno not in allowed | also:
                    self.wrong.append(f"{name}: {error}")
        for own in self.own:
            self.verify(own)

    def answer(self) -> dict[str, Any]:
        """What it believes."""
        root = f"{self.root}/"
        return {
            "wrong": self.wrong,
            "tally": self.tally,
            "own": {
                it.path.removeprefix(root): [it.identity, len(it.content), zlib.crc32(it.content)]
                for it in self.own
            },
        }


@dataclass
class Outcome:
    """What all processes believe."""

    wrong: list[str]
    tally: Counter[str]
    own: dict[str, list[int]]


def prepare(root: Path) -> None:
    """The directories that they work in."""
    for name in (*PLACES, "slots0", "slots1", "counted0", "counted1", "tree"):
        (root / name).mkdir(parents=True)


def work(root: Path, kinds: list[str], seconds: float, seed: int) -> Outcome:
    """Run a process for each kind of work and put together what they answer."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(root), str(number), kind, str(seconds), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, kind in enumerate(kinds)
    ]
    outcome = Outcome([], Counter(), {})
    try:
        for process in processes:
            line, _ = process.communicate(timeout=seconds * 3 + 60 + PATIENCE_SECONDS)
            assert process.returncode == 0, f"a worker ended with {process.returncode}"
            answer = json.loads(line)
            outcome.wrong += answer["wrong"]
            outcome.tally.update(answer["tally"])
            outcome.own.update(answer["own"])
    finally:
        for process in processes:
            process.kill()
    return outcome


def differences(root: Path, outcome: Outcome) -> list[str]:
    """Where the directories are not what the processes believe."""
    found = []
    names = sum(len(os.listdir(root / f"counted{number}")) for number in range(2))
    if names != outcome.tally["names"]:
        found.append(f"{names} names, where {outcome.tally['names']} were made and not taken away")
    directories = sum(len(inner) for _, inner, _ in os.walk(root / "tree"))
    if directories != outcome.tally["directories"]:
        found.append(f"{directories} directories, not {outcome.tally['directories']}")
    there = {f"{place}/{name}" for place in PLACES for name in os.listdir(root / place)}
    if there != set(outcome.own):
        found.append(f"files of one owner: {sorted(there ^ set(outcome.own))}")
    for path, (identity, size, checksum) in outcome.own.items():
        data = (root / path).read_bytes()
        if (len(data), zlib.crc32(data)) != (size, checksum):
            found.append(f"{path} of {size} bytes has {len(data)}: {strange(data, identity, 0)}")
    for place in ("slots0", "slots1"):
        for entry in os.scandir(root / place):
            identity = int(os.getxattr(entry.path, IDENTITY))
            found += filter(None, [strange(Path(entry.path).read_bytes(), identity, 0)])
    return found


def main() -> None:
    root, number, kind, seconds, seed = sys.argv[1:]
    worker = Worker(Path(root), int(number), int(seed))
    worker.run(kind, float(seconds))
    print(json.dumps(worker.answer()))


if __name__ == "__main__":
    main()
