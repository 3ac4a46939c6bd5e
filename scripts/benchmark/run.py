"""The order of measurement: for each cell, for each round, each subject that the cell is for once,
the order rotated.

So the noise of a shared machine, which comes and goes within seconds, hits all subjects alike.
"""

import contextlib
from collections.abc import Callable, Sequence

from benchmark import fio, host
from benchmark.cells import Cell
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable
from benchmark.places import Places
from benchmark.report import Run
from benchmark.stage import Settings, Stage, rotated
from benchmark.subjects import Subject

FIO_GRACE_SECONDS = 60.0
SETTLING = fio.Timing(ramp_ms=0, runtime_ms=200)


class Bench(Stage[Subject]):
    """Measures files and devices with fio."""

    def __init__(
        self,
        settings: Settings,
        tool: fio.Fio,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(settings.size_bytes, say, warn)
        self._settings = settings
        self._tool = tool
        self._places = Places(settings.size_bytes)

    def measure(
        self, cells: Sequence[Cell], subjects: Sequence[Subject], advance: Callable[[], None]
    ) -> list[Run]:
        """All runs. A subject that fails in a cell is left out of that cell's later rounds.

        Afterwards `states` know how much memory the subjects' processes came to use.
        """
        runs = []
        for cell_index, cell in enumerate(cells):
            left_out = set()
            takers = [subject for subject in subjects if cell.takes(subject.name)]
            for round_number in range(self._settings.rounds if takers else 0):
                order = rotated(takers, cell_index + round_number)
                for position, subject in enumerate(order):
                    if subject.name not in left_out:
                        self._say(f"{cell.name}, round {round_number + 1}: {subject.name}")
                        run = self._attempt(cell, subject, round_number, position)
                        if run is not None:
                            runs.append(run)
                        if run is None or run.error:
                            left_out.add(subject.name)
                    advance()
        for subject in subjects:
            self._look_again(subject)
        return runs

    def _attempt(
        self, cell: Cell, subject: Subject, round_number: int, position: int
    ) -> Run | None:
        """One run, whatever came of it; None if this machine can't make what the cell works on."""
        try:
            target = self._places.target(cell, subject)
        except SubjectUnavailable as problem:
            self._warn(f"{cell.name}: {subject.name} is left out: {problem}")
            return None
        except BenchError as problem:
            self.failed = True
            self._warn(f"{cell.name}: {subject.name}: {problem}")
            return Run(cell.name, subject.name, round_number, position, (), error=str(problem))
        return self._run_once(cell, subject, target, round_number, position)

    def _run_once(
        self, cell: Cell, subject: Subject, target: fio.Target, round_number: int, position: int
    ) -> Run:
        timing = self._settings.timing
        cpu = host.pinning_cpu() if cell.pinned else None
        command = fio.measure_command(
            cell, target, timing, self._tool.deep_engine, cpu, seed=round_number + 1
        )
        pids = subject.daemon_pids()
        if cpu is not None:
            self._settle(cell, target)
        pin = host.pinned(pids, cpu) if cpu is not None else contextlib.nullcontext()
        figures, error, fio_seconds = None, None, 0.0
        with pin:
            before_seconds = host.cpu_seconds(pids)
            try:
                figures, fio_seconds = fio.run(
                    command, cell, timing.total_seconds + FIO_GRACE_SECONDS
                )
            except BenchError as problem:
                self.failed = True
                error = str(problem)
                self._warn(f"{cell.name}: {subject.name}: {error}")
            daemon_seconds = host.cpu_seconds(pids) - before_seconds
        fio_seconds = max(0.0, fio_seconds - self._tool.startup_cpu_seconds)
        return Run(
            cell=cell.name,
            subject=subject.name,
            round=round_number,
            position=position,
            command=command,
            figures=figures,
            fio_cpu_percent=None if error else 100 * fio_seconds / timing.total_seconds,
            daemon_cpu_percent=100 * daemon_seconds / timing.total_seconds if pids else None,
            error=error,
        )

    def _settle(self, cell: Cell, target: fio.Target) -> None:
        """A moment of the same work, so that a server that moves its threads to suit the work has
        done so before they are pinned: what it has not chosen itself it then leaves alone."""
        command = fio.measure_command(cell, target, SETTLING, self._tool.deep_engine, None, seed=0)
        with contextlib.suppress(BenchError):
            fio.run(command, cell, SETTLING.total_seconds + FIO_GRACE_SECONDS)

    def _prepare(self, subject: Subject) -> None:
        """Set up one subject and write all of it once."""
        super()._prepare(subject)
        size_bytes = self._size_bytes
        # fio removes a file that is too small for it and makes a new one: never let it come to that
        if (held_bytes := _held_bytes(subject)) < size_bytes:
            raise SubjectFailed(f"it holds {held_bytes} bytes, {size_bytes} are needed")
        fio.prefill(fio.Target(subject.path, size_bytes, subject.direct))

    def _clear(self, is_last_try: bool) -> None:
        self._say("removing file systems")
        try:
            self._places.teardown()
        except BenchError as problem:
            self.failed = True
            outlook = "could not be removed" if is_last_try else "can not be removed yet"
            self._warn(f"a file system {outlook}: {problem}")


def _held_bytes(subject: Subject) -> int:
    """The size of the file or block device; its end is where a seek to the end leads."""
    with open(subject.path, "rb", buffering=0) as opened:
        return opened.seek(0, 2)
