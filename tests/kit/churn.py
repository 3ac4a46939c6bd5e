"""A program that makes, moves and removes names as fast as it can; each call has one right answer.

Run as `python churn.py DIRECTORY`, it works until its standard input ends, and says how often it
has gone round and what was wrong, as one line of JSON. It loads next to nothing, so that the daemon
has more to do than this does, and a kill finds the daemon in the midst of an operation.
"""

from __future__ import annotations

import errno
import json
import os
import select
import sys
from collections.abc import Callable

_MOST_WRONG = 20


class Churn:
    """One directory, which nobody else touches."""

    def __init__(self, directory: str) -> None:
        self.wrong: list[str] = []
        self.rounds = 0
        self.at = os.path.join(directory, "")

    def expect(self, error: int, call: Callable[..., object], *arguments: object) -> None:
        """Call; the answer must be this errno, or success."""
        got = 0
        try:
            call(*arguments)
        except OSError as failure:
            got = failure.errno or -1
        if got != error:
            self.wrong.append(f"{call.__name__}{arguments}: {got}, not {error}")

    def go_round(self) -> None:
        """All operations, each of which fails or leaves something if it is done twice."""
        one, two, expect = f"{self.at}one", f"{self.at}two", self.expect
        expect(0, os.mkdir, one)
        expect(errno.EEXIST, os.mkdir, one)
        expect(0, os.rename, one, two)
        expect(0, os.rmdir, two)
        expect(errno.ENOENT, os.rmdir, two)
        expect(0, self.make, one)
        expect(errno.EEXIST, self.make, one)
        expect(0, os.link, one, two)
        expect(0, os.setxattr, one, "user.a", b"1", os.XATTR_CREATE)
        expect(errno.EEXIST, os.setxattr, two, "user.a", b"2", os.XATTR_CREATE)
        expect(0, os.removexattr, two, "user.a")
        expect(0, os.unlink, one)
        expect(0, os.symlink, "target", one)
        expect(0, os.rename, two, one)
        expect(errno.ENOENT, os.unlink, two)
        expect(0, os.truncate, one, 5)
        expect(0, os.mkfifo, two)
        expect(0, os.unlink, two)
        expect(0, os.unlink, one)
        if left := os.listdir(self.at):
            self.wrong.append(f"{left} is left")
        self.rounds += 1

    def make(self, path: str) -> None:
        """Make a file that is not there."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def main() -> None:
    churn = Churn(sys.argv[1])
    while not select.select([sys.stdin], [], [], 0)[0] and len(churn.wrong) < _MOST_WRONG:
        churn.go_round()
    print(json.dumps([churn.rounds, churn.wrong]))


if __name__ == "__main__":
    main()
