"""The order of measurement where files are the subject: for each round, for each series of cells,
each subject once, the order rotated; a subject does all cells of a series in one go.

So what noise there is hits a series as a whole, and what a cell leaves in the kernel's caches for
the next one is the same for every subject.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark import backing, files, host, sourcetree
from benchmark.cells import KIB, MIB
from benchmark.errors import BenchError
from benchmark.filecells import CREATED_BYTES, PARTS_OF_WORKING_SET, FileCell, series_of
from benchmark.folders import Folder
from benchmark.pmemfsmount import Requests
from benchmark.report import Reading, Run
from benchmark.stage import Settings, Stage, rotated

# for a file of 4 KiB with its inode and its name, wherever it is made
FILE_COST_BYTES = CREATED_BYTES + 4 * KIB


class FileBench(Stage[Folder]):
    """Measures file systems with ``files.c``; ``archive`` is what the cells of a tree unpack."""

    def __init__(
        self,
        settings: Settings,
        program: Path,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        archive: Path | None = None,
    ) -> None:
        super().__init__(room_bytes(settings), say, warn)
        self._rounds = settings.rounds
        self._program = program
        self._amount = files.Amount(
            settings.files, settings.size_bytes, settings.timing.runtime_ms, archive
        )
        self._left_out: set[str] = set()

    def measure(
        self, cells: Sequence[FileCell], subjects: Sequence[Folder], advance: Callable[[], None]
    ) -> list[Run]:
        """All runs of the cells. A subject that fails is left out from there on."""
        wanted = {cell.name for cell in cells}
        runs = []
        for round_number in range(self._rounds):
            for index, series in enumerate(series_of(cells)):
                order = rotated(subjects, round_number + index)
                for position, subject in enumerate(order):
                    for cell in series:
                        if subject.name not in self._left_out and cell.takes(subject.name):
                            self._say(f"{cell.name}, round {round_number + 1}: {subject.name}")
                            runs.append(self._run_once(cell, subject, round_number, position))
                        if cell.name in wanted:
                            advance()
        for subject in subjects:
            self._look_again(subject)
        return [run for run in runs if run.cell in wanted or run.error]

    def _prepare(self, subject: Folder) -> None:
        """Set up one file system, fill most of it once and empty it: memory that was never touched
        costs its first user more, which is no matter of the file system."""
        super()._prepare(subject)
        path = subject.folder / "everything"
        # a part is left for inode tables, and fuse2fs keeps a tenth back
        backing.write_new(path, self._size_bytes // MIB * 3 // 4 * MIB)
        path.unlink()

    def _run_once(self, cell: FileCell, subject: Folder, round_number: int, position: int) -> Run:
        words = files.command(
            self._program, cell, subject.folder, self._amount, direct=subject.direct
        )
        if cell.is_cold and not host.drop_name_caches(subject.folder):
            self._note(subject, "the kernel's caches could not be dropped")
        pids = subject.daemon_pids()
        before_seconds = host.cpu_seconds(pids)
        try:
            before = subject.requests()
            done = files.run(words)
            share = forwarded_share(before, subject.requests())
        except BenchError as problem:
            self.failed = True
            self._left_out.add(subject.name)
            self._warn(f"{cell.name}: {subject.name}: {problem}")
            return Run(cell.name, subject.name, round_number, position, words, error=str(problem))
        daemon_seconds = host.cpu_seconds(pids) - before_seconds
        return Run(
            cell=cell.name,
            subject=subject.name,
            round=round_number,
            position=position,
            command=words,
            figures=done.figures,
            fio_cpu_percent=100 * done.caller_cpu_seconds / done.seconds,
            daemon_cpu_percent=100 * daemon_seconds / done.seconds if pids else None,
            forwarded_share=share,
        )

    def _note(self, subject: Folder, note: str) -> None:
        if note not in subject.notes:
            subject.notes.append(note)


def forwarded_share(before: Requests | None, after: Requests | None) -> float | None:
    """Of the requests between two counts, what the daemon answered; None without a request."""
    if before is None or after is None or after.count <= before.count:
        return None
    return (after.forwarded - before.forwarded) / (after.count - before.count)


def share_readings(cells: Sequence[FileCell], runs: Sequence[Run]) -> list[Reading]:
    """For each cell, how much the daemon answered in its runs; for those where that was counted."""
    readings = []
    for cell in cells:
        shares = [run.forwarded_share for run in runs if run.cell == cell.name]
        counted = tuple(share for share in shares if share is not None)
        if counted:
            what = f"{cell.group}, {cell.caption}: requests that the daemon answered"
            readings.append(Reading(cell.name, share_name(cell), what, "share", counted))
    return readings


def share_name(cell: FileCell) -> str:
    """The reading of a cell that tells how much the daemon answered."""
    return f"{cell.name}-daemon"


def room_bytes(settings: Settings) -> int:
    """What a file system must hold: the files that grow, twice where what was removed is given back
    later, the many small ones, and the source tree; a whole number of MiB."""
    grown_bytes = sum(settings.size_bytes // part for part in PARTS_OF_WORKING_SET.values())
    small_bytes = settings.files * (FILE_COST_BYTES + sourcetree.FILE_COST_BYTES)
    needed_bytes = 2 * grown_bytes + small_bytes + 64 * MIB
    return -(-needed_bytes // MIB) * MIB
