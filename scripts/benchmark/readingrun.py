"""Takes the readings of a part of the benchmark, cell by cell.

What this machine lacks for a cell is named in its reading, and so is what fails.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from benchmark import fio
from benchmark.errors import BenchError, SubjectUnavailable
from benchmark.mountrun import ReadingCell
from benchmark.report import Reading
from benchmark.stage import Interrupts, Settings
from benchmark.turns import Turns
from pmemfs.errors import PmemfsError


class ReadingBench(ABC):
    """Takes the readings. ``say`` and ``warn`` as in `Stage`."""

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
        self._turns = Turns(settings, tool)

    def measure(
        self, cells: list[ReadingCell], interrupts: Interrupts, advance: Callable[[], None]
    ) -> list[Reading]:
        """All readings of these cells."""
        readings: list[Reading] = []
        for cell in cells:
            self._say(cell.caption)
            interrupts.arm()
            here = Reading(cell.name, cell.name, cell.caption, "ratio")
            try:
                readings += self._take(cell, interrupts)
            except SubjectUnavailable as problem:
                self._warn(f"{cell.name} is left out: {problem}")
                readings.append(replace(here, lacking=str(problem)))
            except (BenchError, OSError, PmemfsError) as problem:
                self.failed = True
                self._warn(f"{cell.name}: {problem}")
                readings.append(replace(here, error=str(problem)))
            interrupts.disarm()
            advance()
        return readings

    @abstractmethod
    def _take(self, cell: ReadingCell, interrupts: Interrupts) -> list[Reading]:
        """The readings of one cell."""
