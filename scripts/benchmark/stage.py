"""What all parts of a run have in common: subjects set up, measured in turn, and torn down.

Whatever happens, what a `Stage` set up is torn down; the first interrupt stops the run, later ones
can't stop that.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Generic, Protocol, TypeVar

from benchmark import fio, host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectUnavailable
from benchmark.report import SubjectState

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# page tables, the instruments' buffers and the machine's own needs
SPARE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    ``size_bytes`` is the working set of each subject in I/O cells, ``files`` how many the cells of
    metadata work on, ``many_files`` how many a pool holds whose mount is timed, ``cache_bytes`` how
    large the cache is whose mount is timed.
    """

    size_bytes: int
    rounds: int
    timing: fio.Timing
    files: int = 20_000
    many_files: int = 1_000_000
    idle_seconds: float = 30.0
    cache_bytes: int = 1 << 40


class Interrupts:
    """Turns the first of SIGINT, SIGTERM, SIGHUP into KeyboardInterrupt and ignores later ones.

    One that comes while something is being removed interrupts when that is done.
    """

    def __init__(self) -> None:
        self._armed = True
        self._has_missed = False

    def install(self) -> None:
        """Take the signals over."""
        for signal_number in SIGNALS:
            signal.signal(signal_number, self.receive)

    def arm(self) -> None:
        """From here on there is something to interrupt."""
        if self._has_missed:
            raise KeyboardInterrupt
        self._armed = True

    def disarm(self) -> None:
        """From here on nothing is interrupted: cleaning up has begun."""
        self._armed = False

    def receive(self, _signal_number: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt
        self._has_missed = True


class Measured(Protocol):
    """What a stage must know of a subject, whatever it offers to be measured.

    ``notes`` tell the reader what must be known to judge its figures.
    """

    name: str
    description: str
    notes: list[str]

    @property
    def direct(self) -> bool:
        """Whether it is opened with O_DIRECT."""

    def memory_bytes(self, size_bytes: int) -> int:
        """How much of /dev/shm it takes to offer ``size_bytes``."""

    def setup(self, size_bytes: int) -> None:
        """Make it. Raises SubjectUnavailable or SubjectFailed with a sentence."""

    def teardown(self) -> None:
        """Remove it. Raises SubjectFailed if something had to stay behind."""

    def daemon_pids(self) -> tuple[int, ...]:
        """The processes that serve it, which a pinned cell pins; empty where the kernel serves."""

    def private_bytes(self) -> int | None:
        """Memory of these processes beside what is offered; None where that is of no interest."""


S = TypeVar("S", bound=Measured)
T = TypeVar("T")


class Stage(Generic[S]):
    """Sets subjects up and tears them down; what is done with them in between is the subclasses'.

    ``size_bytes`` is what each subject shall offer. ``say`` gets a sentence on what is being done,
    ``warn`` one on what went wrong but did not stop it.
    """

    def __init__(
        self, size_bytes: int, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.failed = False
        self._size_bytes = size_bytes
        self._say = say
        self._warn = warn
        self._states: dict[str, SubjectState] = {}

    @property
    def states(self) -> list[SubjectState]:
        """What became of each subject, in the order asked for."""
        return list(self._states.values())

    @contextlib.contextmanager
    def ready(self, subjects: Sequence[S], interrupts: Interrupts) -> Iterator[list[S]]:
        """The subjects that can be measured, set up; torn down afterwards.

        Raises BenchError if memory is short or no subject is left.
        """
        interrupts.arm()
        self._require_memory(subjects)
        with contextlib.ExitStack() as stack:
            # a second time after the subjects: a file system on one that hung is free only then
            stack.callback(self._clear, is_last_try=True)
            working = []
            for subject in subjects:
                stack.callback(self._tear_down, subject, interrupts)
                if self._set_up(subject):
                    working.append(subject)
            if not working:
                reasons = "; ".join(f"{one.name}: {one.skipped}" for one in self.states)
                raise BenchError(f"nothing can be measured here: {reasons}")
            stack.callback(self._clear, is_last_try=False)
            stack.callback(interrupts.disarm)
            yield working

    def _prepare(self, subject: S) -> None:
        """Make a subject, and whatever is needed to measure it."""
        subject.setup(self._size_bytes)

    def _clear(self, is_last_try: bool) -> None:
        """Remove what was made on the subjects."""

    def _require_memory(self, subjects: Sequence[S]) -> None:
        needed_bytes = SPARE_BYTES + sum(one.memory_bytes(self._size_bytes) for one in subjects)
        free_bytes = host.shm_free_bytes()
        if needed_bytes > free_bytes:
            raise BenchError(
                f"a working set of {self._size_bytes // MIB} MiB takes {needed_bytes // MIB} MiB "
                f"for all subjects and {host.SHM} can take {free_bytes // MIB} MiB: use a smaller "
                "--size"
            )

    def _set_up(self, subject: S) -> bool:
        """Set up one subject; False, with the reason recorded, if that did not work."""
        self._say(f"setting up {subject.name}")
        skipped = None
        try:
            self._prepare(subject)
        except (BenchError, OSError) as problem:
            self.failed = self.failed or not isinstance(problem, SubjectUnavailable)
            skipped = str(problem)
            self._warn(f"{subject.name} is skipped: {skipped}")
        direct = None if skipped else subject.direct
        self._states[subject.name] = SubjectState(
            subject.name, subject.description, tuple(subject.notes), direct, skipped
        )
        return skipped is None

    def _look_again(self, subject: S) -> None:
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

    def _tear_down(self, subject: S, interrupts: Interrupts) -> None:
        interrupts.disarm()
        self._say(f"removing {subject.name}")
        try:
            subject.teardown()
        except (BenchError, OSError) as problem:
            self.failed = True
            self._warn(f"{subject.name} could not be removed: {problem}")


def rotated(subjects: Sequence[T], by: int) -> list[T]:
    """The subjects in their order, begun ``by`` places further on."""
    start = by % len(subjects)
    return [*subjects[start:], *subjects[:start]]
