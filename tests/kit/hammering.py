"""Programs that write the same pages of a file at once, each of them bytes of its own.

Each writes every other stretch of seven bytes, so most of the blocks of 16 bytes that encryption
knows belong to both. A stretch says who wrote it, when and where, so nothing can be lost unseen.
Run as a program: `hammering.py FILE NUMBER BYTES` says when it begins, writes until its standard
input ends, and says how many turns that was.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import subprocess
import sys
from pathlib import Path

WIDTH = 7
WRITERS = 2


def stretch(number: int, turn: int, at: int) -> bytes:
    """What a writer writes at a place in a turn."""
    return struct.pack("<BIH", number, turn, at // WIDTH & 0xFFFF)


def places(number: int, length: int) -> range:
    """Where a writer writes."""
    return range(number * WIDTH, length - WIDTH, WRITERS * WIDTH)


class Hammers:
    """The writers of a file."""

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.length = length
        # From the first byte to the last through the key, or as zeroes.
        path.write_bytes(bytes(length))
        words = [sys.executable, __file__, str(path)]
        self._writers = [
            subprocess.Popen(
                [*words, str(number), str(length)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for number in range(WRITERS)
        ]
        for writer in self._writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"

    def wrong(self) -> list[str]:
        """What can't be there while they write: a stretch that nobody has written."""
        data = self.path.read_bytes()
        found = []
        for number in range(WRITERS):
            for at in places(number, self.length):
                who, turn, where = struct.unpack_from("<BIH", data, at)
                if turn and (who, where) != (number, at // WIDTH & 0xFFFF):
                    found.append(f"{at}: {data[at : at + WIDTH].hex()}")
        return found

    def begun_turns(self) -> int:
        """How many turns the slower one has begun, by its first stretch."""
        data = self.path.read_bytes()
        firsts = (places(number, self.length)[0] for number in range(WRITERS))
        return min(int(struct.unpack_from("<BIH", data, at)[1]) for at in firsts)

    def end(self) -> int:
        """Let them end; how many turns the slower one has done. Fails if anything is lost."""
        turns = []
        for writer in self._writers:
            said, _ = writer.communicate(timeout=60)
            assert writer.returncode == 0
            turns.append(int(said))
        data = self.path.read_bytes()
        for number in range(WRITERS):
            lost = [
                at
                for at in places(number, self.length)
                if data[at : at + WIDTH] != stretch(number, turns[number], at)
            ]
            assert lost == [], f"writer {number} has lost stretches in turn {turns[number]}"
        return min(turns)


def main() -> None:
    """One writer."""
    path, number, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    fd = os.open(path, os.O_RDWR)
    print("begun", flush=True)
    turn = 0
    while turn == 0 or not select.select([sys.stdin], [], [], 0)[0]:
        turn += 1
        for at in places(number, length):
            write(fd, stretch(number, turn, at), at)
    print(turn)


def write(fd: int, data: bytes, at: int) -> None:
    """A write that is repeated if it was cancelled, as requests may be that a ring has when its
    process is killed."""
    while True:
        try:
            assert os.pwrite(fd, data, at) == WIDTH
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        else:
            return


if __name__ == "__main__":
    main()
