"""The parts of a run: what each measures, on what, with which goals.

Invariants: cells have names of their own across all parts; a subject of one name is the same thing
in all of them (a file of it in one, a folder in another).
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark import files, fio, sourcetree
from benchmark.cacherun import CacheBench
from benchmark.cacheshapes import CACHE_CELLS
from benchmark.cells import CELLS, choose_names
from benchmark.errors import BenchError
from benchmark.filecells import GROWTH_CELLS, METADATA_CELLS, TREE_CELLS
from benchmark.filerun import FileBench, share_readings
from benchmark.folders import FOLDERS
from benchmark.mountrun import MOUNT_CELLS, MountBench
from benchmark.pagesrun import PAGE_CELLS, PageBench
from benchmark.report import IO_LOOK, Look, Part, Workload
from benchmark.restartrun import RESTART_CELLS, RestartBench
from benchmark.run import Bench
from benchmark.stage import Interrupts, Settings
from benchmark.subjects import DEFAULT_SUBJECTS, SUBJECTS
from benchmark.transformcells import TRANSFORM_CELLS
from benchmark.transformrun import TransformBench


@dataclass(frozen=True)
class Kind:
    """A part before it is measured. ``subjects`` are those that it is for, ``usual`` those that are
    measured unless others are named. ``chart_bases`` are empty where there is no chart."""

    name: str
    what: str
    cells: Sequence[Workload]
    subjects: tuple[str, ...]
    usual: tuple[str, ...]
    look: Look
    chart_bases: tuple[str, ...] = ()


FILE_BASES = ("fuse2fs", "ext4", "tmpfs")
NAME_BASES = ("passthrough_hp", "fuse2fs", "ext4")
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "io",
            "reads and writes inside one file or device, with fio",
            *(CELLS, tuple(SUBJECTS), DEFAULT_SUBJECTS),
            look=IO_LOOK,
            chart_bases=("loop", "tmpfs"),
        ),
        Kind(
            "growth",
            "writes to new files",
            *(GROWTH_CELLS, tuple(FOLDERS), tuple(FOLDERS)),
            look=Look(bases=FILE_BASES, worker="the caller", has_server_time=True),
        ),
        Kind(
            "metadata",
            "making, finding, renaming and removing many files; a mail queue; a source tree",
            *(METADATA_CELLS, tuple(FOLDERS), tuple(FOLDERS)),
            look=Look("files/s", NAME_BASES, "the callers", has_server_time=True),
            chart_bases=("passthrough_hp", "ext4"),
        ),
        Kind(
            "mount",
            "a mount's time and memory, metadata's space",
            *(MOUNT_CELLS, ("fs",), ("fs",)),
            look=IO_LOOK,
        ),
        Kind(
            "pages",
            "arrays over pages, pins, tensors, direct transfers",
            *(PAGE_CELLS, ("fs",), ("fs",)),
            look=IO_LOOK,
        ),
        Kind(
            "cache",
            "a cache before origins: hits, misses, eviction, write-back, attaching",
            *(CACHE_CELLS, ("cache",), ("cache",)),
            look=IO_LOOK,
        ),
        Kind(
            "restart",
            "pauses when processes of a mount are killed, memory of what survives that",
            *(RESTART_CELLS, ("fs",), ("fs",)),
            look=IO_LOOK,
        ),
        Kind(
            "transform",
            "encrypted and compressed files: against plain ones, libraries, gocryptfs",
            *(TRANSFORM_CELLS, ("fs",), ("fs",)),
            look=IO_LOOK,
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """A part with what was chosen of it, neither of them empty."""

    kind: Kind
    cells: list[Any]
    names: list[str]


def choose(
    part_patterns: str | None, cell_patterns: str | None, subject_patterns: str | None
) -> list[Choice]:
    """The parts, their cells and subjects that were asked for and have something to do.

    Raises BenchError if there is none.
    """
    kinds = [KINDS[name] for name in choose_names(part_patterns, KINDS, "part")]
    every_cell = [cell.name for kind in kinds for cell in kind.cells]
    every_subject = list(dict.fromkeys(name for kind in kinds for name in kind.subjects))
    cell_names = choose_names(cell_patterns, every_cell, "cell")
    named = choose_names(subject_patterns, every_subject, "subject")
    choices = []
    for kind in kinds:
        names = [name for name in kind.subjects if name in named]
        if subject_patterns is None:
            names = list(kind.usual)
        cells = [cell for cell in kind.cells if cell.name in cell_names]
        taken = [cell for cell in cells if any(cell.takes(name) for name in names)]
        names = [name for name in names if any(cell.takes(name) for cell in taken)]
        if taken:
            choices.append(Choice(kind, taken, names))
    if not choices:
        raise BenchError(f"{', '.join(cell_names)}: not measured for {', '.join(named)}")
    return choices


@dataclass(frozen=True)
class Context:
    """What every part is measured with. ``expect`` is told how many steps there will be."""

    settings: Settings
    deep_engine: str
    interrupts: Interrupts
    say: Callable[[str], None]
    warn: Callable[[str], None]
    expect: Callable[[int], None]
    advance: Callable[[], None]


def measure(choice: Choice, context: Context) -> tuple[Part, bool]:
    """All of one part, and whether something failed. Raises BenchError where nothing works."""
    measures = {"io": _measure_io, "mount": _measure_mounts, "pages": _measure_pages,
                "cache": _measure_cache, "restart": _measure_restarts,
                "transform": _measure_transforms}  # fmt: skip
    return measures.get(choice.kind.name, _measure_files)(choice, context)


def _measure_io(choice: Choice, context: Context) -> tuple[Part, bool]:
    tool = fio.probe(context.deep_engine)
    runner = Bench(context.settings, tool, context.say, context.warn)
    subjects = [SUBJECTS[name]() for name in choice.names]
    with runner.ready(subjects, context.interrupts) as working:
        takers = sum(cell.takes(one.name) for cell in choice.cells for one in working)
        context.expect(context.settings.rounds * takers)
        runs = runner.measure(choice.cells, working, context.advance)
    part = Part(choice.kind.name, choice.kind.look, choice.cells, runner.states, runs)
    return part, runner.failed


def _measure_files(choice: Choice, context: Context) -> tuple[Part, bool]:
    subjects = [FOLDERS[name]() for name in choice.names]
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(files.compiled())
        archive = None
        if any(cell in TREE_CELLS for cell in choice.cells):
            context.say("making a source tree")
            archive = stack.enter_context(sourcetree.packed(context.settings.files))
        runner = FileBench(context.settings, program, context.say, context.warn, archive)
        working = stack.enter_context(runner.ready(subjects, context.interrupts))
        context.expect(context.settings.rounds * len(choice.cells) * len(working))
        runs = runner.measure(choice.cells, working, context.advance)
    readings = share_readings(choice.cells, runs)
    part = Part(choice.kind.name, choice.kind.look, choice.cells, runner.states, runs, readings)
    return part, runner.failed


def _measure_mounts(choice: Choice, context: Context) -> tuple[Part, bool]:
    with files.compiled() as program:
        runner = MountBench(context.settings, program, context.say, context.warn)
        context.expect(len(choice.cells))
        readings = runner.measure(choice.cells, context.interrupts, context.advance)
    return Part(choice.kind.name, choice.kind.look, choice.cells, readings=readings), runner.failed


def _measure_pages(choice: Choice, context: Context) -> tuple[Part, bool]:
    runner = PageBench(context.settings, context.say, context.warn)
    context.expect(len(choice.cells))
    readings = runner.measure(choice.cells, context.interrupts, context.advance)
    return Part(choice.kind.name, choice.kind.look, choice.cells, readings=readings), runner.failed


def _measure_cache(choice: Choice, context: Context) -> tuple[Part, bool]:
    tool = fio.probe(context.deep_engine)
    runner = CacheBench(context.settings, tool, context.say, context.warn)
    context.expect(len(choice.cells))
    readings = runner.measure(choice.cells, context.interrupts, context.advance)
    return Part(choice.kind.name, choice.kind.look, choice.cells, readings=readings), runner.failed


def _measure_restarts(choice: Choice, context: Context) -> tuple[Part, bool]:
    runner = RestartBench(context.settings, context.say, context.warn)
    context.expect(len(choice.cells))
    readings = runner.measure(choice.cells, context.interrupts, context.advance)
    return Part(choice.kind.name, choice.kind.look, choice.cells, readings=readings), runner.failed


def _measure_transforms(choice: Choice, context: Context) -> tuple[Part, bool]:
    tool = fio.probe(context.deep_engine)
    runner = TransformBench(context.settings, tool, context.say, context.warn)
    context.expect(len(choice.cells))
    readings = runner.measure(choice.cells, context.interrupts, context.advance)
    return Part(choice.kind.name, choice.kind.look, choice.cells, readings=readings), runner.failed
