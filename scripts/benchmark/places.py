"""Where fio works for a cell: on the subject's own file, or in an ext4 on a loop device on it.

Invariants: an ext4 is made when a cell first wants it and kept for the later ones; what could not
be made is not tried again; `teardown` removes all that was made, however far it came, and may be
called again for what it could not remove.
"""

from benchmark import fio
from benchmark.cells import Cell
from benchmark.errors import BenchError, SubjectFailed
from benchmark.ext4 import Ext4OnLoop
from benchmark.subjects import Subject


class Places:
    """The targets of all subjects, each of ``size_bytes`` where it is the subject's own file."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._file_systems: list[tuple[str, Ext4OnLoop]] = []
        self._outcomes: dict[str, fio.Target | BenchError] = {}

    def target(self, cell: Cell, subject: Subject) -> fio.Target:
        """What fio opens, filled. Raises SubjectUnavailable or SubjectFailed with a sentence."""
        if cell.place == "subject":
            return fio.Target(subject.path, self._size_bytes, subject.direct)
        if subject.name not in self._outcomes:
            self._outcomes[subject.name] = self._make(subject)
        outcome = self._outcomes[subject.name]
        if isinstance(outcome, BenchError):
            raise outcome
        return outcome

    def _make(self, subject: Subject) -> fio.Target | BenchError:
        made = Ext4OnLoop(subject.path)
        self._file_systems.append((subject.name, made))
        try:
            target = made.setup(self._size_bytes)
        except BenchError as problem:
            return problem
        except OSError as problem:
            return SubjectFailed(f"ext4 on a loop device: {problem}")
        subject.notes.append(f"the loop device below ext4: {made.note}")
        return target

    def teardown(self) -> None:
        """Remove every file system and loop device. Raises SubjectFailed if one had to stay."""
        problems = []
        for entry in reversed(self._file_systems.copy()):
            name, made = entry
            try:
                made.teardown()
                self._file_systems.remove(entry)
            except (BenchError, OSError) as problem:
                problems.append(f"{name}: {problem}")
        if problems:
            raise SubjectFailed("; ".join(problems))
