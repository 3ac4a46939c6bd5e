"""A tree of source files under git, as an archive: what untar, git and rm work on.

Invariants: one number of files gives one archive, byte for byte, with one version of git; all of
the tree is committed, so that git has nothing to say of it; the history is one pack, so that the
tree has hardly more files than were asked for.
"""

import contextlib
import io
import math
import os
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmark import backing, host
from benchmark.cells import KIB
from benchmark.errors import BenchError

NAME = "tree"
# what a file takes: its pages, its share of the pack, its inode and its name
FILE_COST_BYTES = 16 * KIB
MADE_SECONDS = 1_700_000_000
# half of the files are smaller than this; the mean is twice as much
MEDIAN_BYTES = 3 * KIB
LARGEST_BYTES = 256 * KIB
FILES_IN_DIRECTORY = 16
DIRECTORIES_IN_GROUP = 32
GIT_SECONDS = 120
_WORDS = ("static", "return", "int", "struct", "if", "else", "const", "size", "buffer", "node",
          "length", "(void)", "= 0;", "!= NULL", "->next", "{", "}", "/* see below */")  # fmt: skip
_TEXT_BYTES = 1024 * KIB


@contextlib.contextmanager
def packed(file_count: int) -> Iterator[Path]:
    """The archive, in /dev/shm until this ends. Raises BenchError where git is missing or fails."""
    host.require_tool("git", "install git")
    with tempfile.TemporaryDirectory(dir=host.SHM, prefix=backing.PREFIX) as name:
        folder = Path(name)
        history = folder / "history"
        with open(folder / "commit", "wb") as commit:
            _write_commit(commit, file_count)
        _git(["init", "--quiet", "--template=", "--initial-branch=main", str(history)])
        # The log of refs has the time of the day.
        _git(["-C", str(history), "config", "core.logAllRefUpdates", "false"])
        with open(folder / "commit", "rb") as commit:
            _git(["-C", str(history), "fast-import", "--quiet"], commit)
        _git(["-C", str(history), "read-tree", "HEAD"])
        archive = folder / "tree.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(history / ".git", f"{NAME}/.git", filter=_dated)
            for path, content in files(file_count):
                entry = _dated(tarfile.TarInfo(f"{NAME}/{path}"))
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        (folder / "commit").unlink()
        yield archive


def files(count: int) -> Iterator[tuple[str, bytes]]:
    """Paths and contents. Sizes are spread as those of source files are: log-normally."""
    chance = random.Random(count)
    text = _text(chance)
    for number in range(count):
        size_bytes = min(int(chance.lognormvariate(math.log(MEDIAN_BYTES), 1.2)), LARGEST_BYTES)
        start = chance.randrange(len(text) - LARGEST_BYTES)
        directory = number // FILES_IN_DIRECTORY
        path = (
            f"group-{directory // DIRECTORIES_IN_GROUP:03}/"
            f"module-{directory % DIRECTORIES_IN_GROUP:02}/source-{number:06}.c"
        )
        yield path, b"/* file %d */\n" % number + text[start : start + size_bytes]


def _text(chance: random.Random) -> bytes:
    lines, written = [], 0
    while written < _TEXT_BYTES:
        lines.append("    " + " ".join(chance.choices(_WORDS, k=chance.randrange(1, 12))))
        written += len(lines[-1]) + 1
    return "\n".join(lines).encode()


def _write_commit(commit: io.BufferedWriter, file_count: int) -> None:
    """What git fast-import reads: a commit of all files."""
    commit.write(b"commit refs/heads/main\n")
    commit.write(b"committer bench <bench@localhost> %d +0000\ndata 0\n" % MADE_SECONDS)
    for path, content in files(file_count):
        commit.write(b"M 100644 inline %s\ndata %d\n" % (path.encode(), len(content)))
        commit.write(content + b"\n")


def _dated(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = MADE_SECONDS
    entry.uid, entry.gid, entry.uname, entry.gname = os.getuid(), os.getgid(), "", ""
    return entry


def _git(words: list[str], read: io.BufferedReader | None = None) -> None:
    finished = subprocess.run(
        ["git", *words], stdin=read or subprocess.DEVNULL, capture_output=True, text=True,
        timeout=GIT_SECONDS,
    )  # fmt: skip
    if finished.returncode != 0:
        raise BenchError(f"git could not make a source tree: {finished.stderr.strip()}")
