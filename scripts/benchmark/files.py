"""The instrument for files: ``files.c``, compiled when it is needed, its command lines and figures.

A program in C, for what is measured takes microseconds, and an interpreter takes as long.
`command` and `parse` are pure functions.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmark import host, sourcetree
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed
from benchmark.filecells import CREATED_BYTES, PARTS_OF_WORKING_SET, FileCell
from benchmark.fio import Figures

SOURCE = Path(__file__).with_name("files.c")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Amount:
    """How much work one phase is: so many files, or a file that grows for so long.

    ``archive`` holds as many files, for the cells of a source tree.
    """

    files: int
    size_bytes: int
    runtime_ms: int
    archive: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """What one phase came to."""

    figures: Figures
    seconds: float
    caller_cpu_seconds: float


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """The program, until this ends. Raises BenchError if it can't be compiled."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BenchError("no C compiler was found: install gcc, for example")
    with tempfile.TemporaryDirectory(prefix="pmemfs-bench-") as folder:
        program = Path(folder) / "files"
        built = host.run([compiler, "-O2", "-o", str(program), str(SOURCE)], timeout_seconds=120)
        if built.code != 0:
            raise BenchError(f"{SOURCE.name} could not be compiled: {built.last_words}")
        yield program


def command(program: Path, cell: FileCell, folder: Path, amount: Amount, direct: bool) -> list[str]:
    """The run that measures ``cell`` in ``folder``."""
    if cell.operation in ("new", "over"):
        size_bytes = amount.size_bytes // PARTS_OF_WORKING_SET[cell.block_bytes]
        size_bytes -= size_bytes % cell.block_bytes
        path = folder / f"grown-{cell.series}"
        numbers = (size_bytes, cell.block_bytes, amount.runtime_ms, int(direct))
        return [str(program), cell.operation, str(path), *map(str, numbers)]
    if cell.operation in ("untar", "git-status", "rm"):
        run = [str(program), "run", str(amount.files)]
        return [*run, *_tree_command(cell.operation, str(folder), amount.archive)]
    words = [str(program), cell.operation, str(folder), str(amount.files), str(cell.callers)]
    writes = cell.operation in ("create", "mail", "mail-fsync")
    return [*words, str(CREATED_BYTES)] if writes else words


def _tree_command(operation: str, folder: str, archive: Path | None) -> list[str]:
    """None of these prints anything where all is well."""
    tree = f"{folder}/{sourcetree.NAME}"
    match operation:
        case "untar":
            return ["tar", "-xf", str(archive), "-C", folder]
        case "git-status":
            return ["git", "-C", tree, "status", "--porcelain"]
        case _:
            return ["rm", "-rf", tree]


def parse(code: int, stdout: str, last_words: str) -> tuple[Figures, float]:
    """Figures and seconds of a finished run, or SubjectFailed with the program's own words."""
    if code != 0:
        raise SubjectFailed(last_words)
    try:
        answer = json.loads(stdout)
        operations, seconds = float(answer["operations"]), float(answer["seconds"])
        size_bytes = int(answer["bytes"])
    except (ValueError, KeyError, TypeError):
        raise SubjectFailed(f"figures were expected, not {stdout[:80]!r}") from None
    if operations <= 0 or seconds <= 0:
        raise SubjectFailed("nothing was done in the measured time")
    rate = size_bytes / MIB / seconds if size_bytes else None
    return Figures(iops=operations / seconds, mib_per_second=rate), seconds


def run(words: list[str]) -> Measurement:
    """Run one phase to its end. Raises BenchError."""
    finished = host.run(words, timeout_seconds=TIMEOUT_SECONDS)
    figures, seconds = parse(finished.code, finished.stdout, finished.last_words)
    return Measurement(figures, seconds, finished.cpu_seconds)
