"""fio on several targets, which take turns: what a reading compares was measured moments apart."""

from collections.abc import Mapping

from benchmark import fio
from benchmark.cells import Cell
from benchmark.fio import Figures, Target
from benchmark.run import FIO_GRACE_SECONDS
from benchmark.stage import Settings, rotated


class Turns:
    """Runs fio with the settings of one run of the benchmark."""

    def __init__(self, settings: Settings, tool: fio.Fio) -> None:
        self._settings = settings
        self._tool = tool

    def each(self, cell: Cell, sides: Mapping[str, Target]) -> dict[str, list[Figures]]:
        """Each side once in each round, the order rotated."""
        figures: dict[str, list[Figures]] = {name: [] for name in sides}
        for number in range(self._settings.rounds):
            for name in rotated(tuple(sides), number):
                figures[name].append(self.run(cell, sides[name], number))
        return figures

    def run(self, cell: Cell, target: Target, seed: int) -> Figures:
        """One side once; one ``seed`` gives one sequence of offsets."""
        timing = self._settings.timing
        engine = self._tool.deep_engine
        command = fio.measure_command(cell, target, timing, engine, None, seed + 1)
        return fio.run(command, cell, timing.total_seconds + FIO_GRACE_SECONDS)[0]


def ratios_of(ours: list[Figures], others: list[Figures]) -> list[float]:
    """Ours over others, round by round."""
    return [one.iops / other.iops for one, other in zip(ours, others, strict=True)]
