"""Random I/O on one file with its content kept in memory beside it, after the idea of fsx.

A `File` is a path and the bytes that must be in it. Every step is a call or two on the path and the
same on the bytes; what is read, and the size, are compared after each. So a case is a list of
steps, from a seed, and any part of it can be tried again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kit.fs_oracle import Step, pattern
from kit.fs_steps import smallest

PAGE = 4096
MIB = 1 << 20
LARGEST = 6 * MIB
KEEP_SIZE, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32

Restart = Callable[[str], None]

_libc = ctypes.CDLL(None, use_errno=True)


class File:
    """A file, open for reading and writing, and what must be in it."""

    def __init__(self, path: Path, restart: Restart | None = None) -> None:
        self.path = path
        self.restart = restart
        self.expected = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.refused: set[str] = set()
        """Steps that this file system hasn't got."""

    def close(self) -> None:
        """Close, though the mount may be dead. Once only: another thread may have the number by
        then."""
        with suppress(OSError):
            os.close(self.fd)
        self.fd = -1

    def run(self, step: Step) -> None:
        """Do a step and compare; AssertionError if the file isn't as it must be."""
        method: Callable[..., None] = getattr(self, step.name)
        try:
            method(*step.arguments)
        except OSError as error:
            is_unmapped = error.errno == errno.ENODEV and step.name.endswith("_mapped")
            if error.errno != errno.EOPNOTSUPP and not is_unmapped:
                raise
            self.refused.add(step.name)
        size = os.fstat(self.fd).st_size
        assert size == len(self.expected), f"the size is {size}, not {len(self.expected)}"

    # -- reading ---------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> None:
        self.compare(os.pread(self.fd, length, offset), offset, length)

    def read_direct(self, page: int, page_count: int) -> None:
        """O_DIRECT, into memory that begins at a page."""
        buffer = mmap.mmap(-1, page_count * PAGE)
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        try:
            count = os.preadv(fd, [buffer], page * PAGE)
        finally:
            os.close(fd)
        self.compare(buffer[:count], page * PAGE, page_count * PAGE)

    def read_mapped(self, offset: int, length: int) -> None:
        """Through a shared mapping, inside the file."""
        end = min(offset + length, len(self.expected))
        if end <= offset:
            return
        start = offset // PAGE * PAGE
        with mmap.mmap(self.fd, end - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as it:
            self.compare(it[offset - start : end - start], offset, end - offset)

    def read_all(self) -> None:
        data = bytearray()
        while piece := os.pread(self.fd, MIB, len(data)):
            data += piece
        self.compare(data, 0, len(self.expected))

    def seek(self, offset: int) -> None:
        """There is nothing but zeroes where it says that there is no data."""
        if offset >= len(self.expected):
            return
        try:
            data = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = len(self.expected)
        assert offset <= data <= len(self.expected)
        assert not any(self.expected[offset:data]), f"data between {offset} and {data}"
        hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        assert offset <= hole <= len(self.expected)

    def compare(self, data: bytes | bytearray, offset: int, length: int) -> None:
        """What was read is what must be there; else say where the first difference is."""
        wanted = self.expected[offset : offset + length]
        if data == wanted:
            return
        assert len(data) == len(wanted), f"{len(data)} bytes at {offset}, not {len(wanted)}"
        first = next(place for place in range(len(data)) if data[place] != wanted[place])
        last = next(place for place in reversed(range(len(data))) if data[place] != wanted[place])
        ours, right = bytes(data[first : first + 8]), bytes(wanted[first : first + 8])
        raise AssertionError(
            f"at {offset + first} (to {offset + last}) there is {ours!r}, not {right!r}"
        )

    # -- writing ---------------------------------------------------------------------------------

    def write(self, offset: int, length: int, seed: int) -> None:
        data = pattern(seed, length)
        assert os.pwrite(self.fd, data, offset) == length
        self.put(offset, data)
        self.read(max(0, offset - PAGE), length + 2 * PAGE)

    def append(self, length: int, seed: int) -> None:
        """O_APPEND, as much as the file may grow."""
        data = pattern(seed, min(length, LARGEST - len(self.expected)))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self.expected += data

    def append_pieces(self, length: int, count: int, seed: int) -> None:
        """Many small writes one behind the other, as of a log."""
        end = len(self.expected)
        for number in range(count):
            data = pattern(seed + number, min(length, LARGEST - end))
            assert os.pwrite(self.fd, data, end) == len(data)
            self.expected += data
            end += len(data)

    def write_direct(self, page: int, page_count: int, seed: int) -> None:
        data = pattern(seed, page_count * PAGE)
        buffer = mmap.mmap(-1, len(data))
        buffer.write(data)
        fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        try:
            assert os.pwritev(fd, [buffer], page * PAGE) == len(data)
        finally:
            os.close(fd)
        self.put(page * PAGE, data)

    def write_mapped(self, offset: int, length: int, seed: int) -> None:
        """Through a shared mapping, inside the file; msync, after which everybody sees it."""
        end = min(offset + length, len(self.expected))
        if end <= offset:
            return
        data = pattern(seed, end - offset)
        start = offset // PAGE * PAGE
        with mmap.mmap(self.fd, end - start, mmap.MAP_SHARED, offset=start) as it:
            it[offset - start : end - start] = data
            it.flush()
        self.put(offset, data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.resize(size)

    def empty(self) -> None:
        """O_TRUNC."""
        os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC))
        self.resize(0)

    def copy(self, source: int, target: int, length: int) -> None:
        """copy_file_range within the file, where the ranges don't overlap."""
        length = min(length, max(0, len(self.expected) - source), abs(source - target))
        done = 0
        while done < length:
            count = os.copy_file_range(
                self.fd, self.fd, length - done, source + done, target + done
            )
            assert count, f"copying ends after {done} of {length} bytes"
            done += count
        if length:
            self.put(target, bytes(self.expected[source : source + length]))

    def allocate(self, offset: int, length: int, keep: bool) -> None:
        self.fallocate(KEEP_SIZE if keep else 0, offset, length)
        if not keep:
            self.resize(max(len(self.expected), offset + length))
        self.read(offset, length)

    def punch(self, offset: int, length: int) -> None:
        self.fallocate(PUNCH | KEEP_SIZE, offset, length)
        self.clear(offset, length)
        self.read(max(0, offset - PAGE), length + 2 * PAGE)

    def zero(self, offset: int, length: int, keep: bool) -> None:
        mode = ZERO | (KEEP_SIZE if keep else 0)
        try:
            self.fallocate(mode, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # Holes are not zeroed, as on tmpfs: who zeroes chooses whether to map them or not.
            self.fallocate(KEEP_SIZE, offset, length)
            self.fallocate(mode, offset, length)
        if not keep:
            self.resize(max(len(self.expected), offset + length))
        self.clear(offset, length)
        self.read(max(0, offset - PAGE), length + 2 * PAGE)

    def collapse(self, page: int, page_count: int) -> None:
        """Only before the end; that others are refused is not this test's matter."""
        start, end = page * PAGE, (page + page_count) * PAGE
        if end < len(self.expected):
            self.fallocate(COLLAPSE, start, end - start)
            del self.expected[start:end]
            self.read_all()

    def insert(self, page: int, page_count: int) -> None:
        start, length = page * PAGE, page_count * PAGE
        if start < len(self.expected) and len(self.expected) + length <= LARGEST:
            self.fallocate(INSERT, start, length)
            self.expected[start:start] = bytes(length)
            self.read_all()

    # -- the rest --------------------------------------------------------------------------------

    def fsync(self, only_data: bool) -> None:
        (os.fdatasync if only_data else os.fsync)(self.fd)

    def reopen(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def remount(self, how: str) -> None:
        """A remount or a crash, whichever `how` says; everything that was answered is there."""
        if self.restart is None:
            return
        if how == "remount":
            self.close()
        self.restart(how)
        self.close()
        self.fd = os.open(self.path, os.O_RDWR)
        self.read_all()

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        far, long = ctypes.c_longlong(offset), ctypes.c_longlong(length)
        if _libc.fallocate(self.fd, mode, far, long):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def put(self, offset: int, data: bytes) -> None:
        if data:
            self.resize(max(len(self.expected), offset + len(data)))
            self.expected[offset : offset + len(data)] = data

    def clear(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.expected))
        if end > offset:
            self.expected[offset:end] = bytes(end - offset)

    def resize(self, size: int) -> None:
        del self.expected[size:]
        self.expected += bytes(size - len(self.expected))


WEIGHTS = {
    "write": 8, "append": 3, "append_pieces": 1, "write_direct": 2, "write_mapped": 3,
    "read": 4, "read_direct": 2, "read_mapped": 3, "read_all": 1, "seek": 2, "truncate": 5,
    "empty": 0.3, "copy": 3, "allocate": 3, "punch": 4, "zero": 3, "collapse": 1, "insert": 1,
    "fsync": 1, "reopen": 1,
}  # fmt: skip
RESTARTS = ("remount", "kill daemon", "kill data plane")


class Chooser:
    """Random steps for a file, around the borders of pages and of 2 MiB."""

    def __init__(self, chance: random.Random, restarts: float) -> None:
        self.chance = chance
        self.restarts = restarts

    def step(self, refused: set[str]) -> Step:
        """The next step."""
        if self.chance.random() < self.restarts:
            return Step("remount", (self.chance.choice(RESTARTS),))
        weights = {name: weight for name, weight in WEIGHTS.items() if name not in refused}
        name = self.chance.choices(list(weights), list(weights.values()))[0]
        return Step(name, self.arguments(name))

    def arguments(self, name: str) -> tuple[int | bool, ...]:
        """Arguments of one kind of step; nothing that it touches lies beyond the largest size."""
        offset = self.offset()
        length = max(1, min(self.length(), LARGEST - offset))
        page, page_count = offset // PAGE, min(length // PAGE + 1, (LARGEST - offset) // PAGE + 1)
        seed, flag = self.chance.randrange(250), self.chance.random() < 0.5
        other = min(self.offset(), LARGEST - length)
        return {
            "write": (offset, length, seed),
            "append": (length, seed),
            "append_pieces": (min(length, 5000), self.chance.randrange(1, 20), seed),
            "write_direct": (page, page_count, seed),
            "write_mapped": (offset, length, seed),
            "read": (offset, length),
            "read_direct": (page, page_count),
            "read_mapped": (offset, length),
            "seek": (offset,),
            "truncate": (offset,),
            "copy": (offset, other, length),
            "allocate": (offset, length, flag),
            "punch": (offset, length),
            "zero": (offset, length, flag),
            "collapse": (page, page_count),
            "insert": (page, page_count),
            "fsync": (flag,),
        }.get(name, ())

    def offset(self) -> int:
        border = self.chance.choice([PAGE, 16 * PAGE, 2 * MIB, 4 * MIB])
        near = border * self.chance.randrange(4) + self.chance.choice([0, 0, -1, 1, -100, 77])
        anywhere = int(LARGEST ** self.chance.random())
        return min(max(0, self.chance.choice([near, anywhere])), LARGEST - 2 * PAGE)

    def length(self) -> int:
        border = self.chance.choice([1, PAGE, 2 * PAGE, 16 * PAGE, 256 * PAGE, 2 * MIB])
        near = border + self.chance.choice([0, 0, -1, 1, 100])
        return self.chance.choice([near, int((2 * MIB) ** self.chance.random())])


class Run:
    """Cases of random I/O in a directory, and the search for the shortest that fails."""

    def __init__(
        self, directory: Path, restart: Restart | None = None, renew: Callable[[], None] = bool
    ) -> None:
        self.directory = directory
        self.restart = restart
        self.renew = renew
        """Called after a failure: a new file system, where that can be had."""
        self.count = 0
        self.step_count = 0
        self.refused: set[str] = set()

    def explore(self, seed: int, step_count: int, restarts: float = 0) -> None:
        """One case. If it fails, the AssertionError has the steps that it takes."""
        chooser = Chooser(random.Random(seed), restarts)
        done: list[Step] = []

        def next_step(file: File) -> Step | None:
            if len(done) == step_count:
                return None
            done.append(chooser.step(file.refused))
            return done[-1]

        try:
            self.attempt(next_step)
        except (AssertionError, OSError) as error:
            self.renew()
            steps = smallest(done, self.fails)
            lines = "\n".join(f"    {step!r}," for step in steps)
            raise AssertionError(
                f"seed {seed}, step {len(done)}: {error}\nsteps that fail:\n{lines}"
            ) from error

    def replay(self, steps: list[Step]) -> None:
        """A case of given steps."""
        remaining = iter(steps)
        self.attempt(lambda _: next(remaining, None))

    def fails(self, steps: list[Step]) -> bool:
        """Whether a case fails."""
        try:
            self.replay(steps)
        except (AssertionError, OSError):
            self.renew()
            return True
        return False

    def attempt(self, next_step: Callable[[File], Step | None]) -> None:
        """A new file, its steps, and a comparison of the whole in the end."""
        self.count += 1
        path = self.directory / f"fsx-{os.getpid()}-{self.count}"
        file = File(path, self.restart)
        try:
            file.refused |= self.refused
            while step := next_step(file):
                file.run(step)
                self.step_count += 1
            file.read_all()
            file.reopen()
            file.read_all()
            self.refused |= file.refused
        finally:
            file.close()
        path.unlink()
