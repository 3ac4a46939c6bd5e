"""The order of measurement: for each cell, for each round, each subject that the cell is for once,
the order rotated.

So the noise of a shared machine, which comes and goes within seconds, hits all subjects alike.
Whatever happens, what `Bench` set up is torn down; the first interrupt stops the run, later ones
can't stop that.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType

from benchmark import fio, host
from benchmark.cells import MIB, Cell
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable
from benchmark.places import Places
from benchmark.report import Run, SubjectState
from benchmark.subjects import Subject

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FIO_GRACE_SECONDS = 60.0
SETTLING = fio.Timing(ramp_ms=0, runtime_ms=200)
# page tables, fio's buffers and the machine's own needs
SPARE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    size_bytes: int
    rounds: int
    timing: fio.Timing


class Interrupts:
    """Turns the first of SIGINT, SIGTERM, SIGHUP into KeyboardInterrupt and ignores later ones."""

    def __init__(self) -> None:
        self._armed = True

    def install(self) -> None:
        """Take the signals over."""
        for signal_number in SIGNALS:
            signal.signal(signal_number, self.receive)

    def disarm(self) -> None:
        """From here on nothing is interrupted: cleaning up has begun."""
        self._armed = False

    def receive(self, _signal_number: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


class Bench:
    """Sets subjects up, measures them in turn, tears them down.

    ``say`` gets a sentence on what is being done, ``warn`` one on what went wrong but did not stop
    it.
    """

    def __init__(
        self,
        settings: Settings,
        tool: fio.Fio,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.failed = False
        self._settings = settings
        self._tool = tool
        self._say = say
        self._warn = warn
        self._places = Places(settings.size_bytes)
        self._states: dict[str, SubjectState] = {}

    @property
    def states(self) -> list[SubjectState]:
        """What became of each subject, in the order asked for."""
        return list(self._states.values())

    @contextlib.contextmanager
    def ready(self, subjects: Sequence[Subject], interrupts: Interrupts) -> Iterator[list[Subject]]:
        """The subjects that can be measured, set up and filled; torn down afterwards.

        Raises BenchError if memory is short or no subject is left.
        """
        self._require_memory(subjects)
        with contextlib.ExitStack() as stack:
            # a second time after the subjects: a file system on one that hung is free only then
            stack.callback(self._tear_down_places, is_last_try=True)
            working = []
            for subject in subjects:
                stack.callback(self._tear_down, subject, interrupts)
                if self._set_up(subject):
                    working.append(subject)
            if not working:
                reasons = "; ".join(f"{one.name}: {one.skipped}" for one in self.states)
                raise BenchError(f"nothing can be measured here: {reasons}")
            stack.callback(self._tear_down_places, is_last_try=False)
            stack.callback(interrupts.disarm)
            yield working

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

    def _require_memory(self, subjects: Sequence[Subject]) -> None:
        size_bytes = self._settings.size_bytes
        needed_bytes = SPARE_BYTES + sum(one.memory_bytes(size_bytes) for one in subjects)
        free_bytes = host.shm_free_bytes()
        if needed_bytes > free_bytes:
            raise BenchError(
                f"a working set of {size_bytes // MIB} MiB takes {needed_bytes // MIB} MiB for all "
                f"subjects and {host.SHM} can take {free_bytes // MIB} MiB: use a smaller --size"
            )

    def _set_up(self, subject: Subject) -> bool:
        """Set up and fill one subject; False, with the reason recorded, if that did not work."""
        self._say(f"setting up {subject.name}")
        size_bytes = self._settings.size_bytes
        skipped = None
        try:
            subject.setup(size_bytes)
            # fio removes a file that is too small for it and makes a new one: never let it come to
            # that
            if (held_bytes := _held_bytes(subject)) < size_bytes:
                raise SubjectFailed(f"it holds {held_bytes} bytes, {size_bytes} are needed")
            fio.prefill(fio.Target(subject.path, size_bytes, subject.direct))
        except (BenchError, OSError) as problem:
            self.failed = self.failed or not isinstance(problem, SubjectUnavailable)
            skipped = str(problem)
            self._warn(f"{subject.name} is skipped: {skipped}")
        direct = None if skipped else subject.direct
        self._states[subject.name] = SubjectState(
            subject.name, subject.description, tuple(subject.notes), direct, skipped
        )
        return skipped is None

    def _look_again(self, subject: Subject) -> None:
        """Add to the subject's state what is known only after its cells."""
        used_bytes = None
        try:
            used_bytes = subject.private_bytes()
        except OSError as problem:
            self._warn(f"the memory of {subject.name} could not be read: {problem}")
        state = self._states[subject.name]
        self._states[subject.name] = replace(
            state, notes=tuple(subject.notes), private_bytes=used_bytes
        )

    def _tear_down_places(self, is_last_try: bool) -> None:
        self._say("removing file systems")
        try:
            self._places.teardown()
        except BenchError as problem:
            self.failed = True
            outlook = "could not be removed" if is_last_try else "can not be removed yet"
            self._warn(f"a file system {outlook}: {problem}")

    def _tear_down(self, subject: Subject, interrupts: Interrupts) -> None:
        interrupts.disarm()
        self._say(f"removing {subject.name}")
        try:
            subject.teardown()
        except (BenchError, OSError) as problem:
            self.failed = True
            self._warn(f"{subject.name} could not be removed: {problem}")


def rotated(subjects: Sequence[Subject], by: int) -> list[Subject]:
    """The subjects in their order, begun ``by`` places further on."""
    start = by % len(subjects)
    return [*subjects[start:], *subjects[:start]]


def _held_bytes(subject: Subject) -> int:
    """The size of the file or block device; its end is where a seek to the end leads."""
    with open(subject.path, "rb", buffering=0) as opened:
        return opened.seek(0, 2)
