"""What is compared: the answers of 2015, the rows of the table, and what is made of the figures.

Invariants:
- the answers take turns, in rounds, and a verdict rests on ratios within one round only: what else
  the machine does comes and goes, and two figures of one round share most of it;
- a verdict needs `VERDICT_ROUNDS` rounds, and every value of the one answer on the same side of
  every value of the other. By chance that comes in less than one row of a hundred (2 of 252 orders
  of ten values); a table has fifty such comparisons, and fewer rounds or a milder rule would find
  differences in noise;
- what an answer can't do is a result: it stands in the table with the program's own sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal, NamedTuple

from pmemfs.units import format_size

VERDICT_ROUNDS = 5


class Answer(NamedTuple):
    """One answer to the question where page structures of persistent memory live."""

    name: str
    whose: str
    says: str
    scheme: str
    page_size: str = "4K"

    @property
    def options(self) -> list[str]:
        """Options of `pmemfs create` that make its pool."""
        return ["--scheme", self.scheme, "--page-size", self.page_size]


BASE = "pmem"
"""The answer that the others are compared with."""

ANSWERS = (
    Answer(BASE, "Ingo Molnar", "a structure for every page, in the persistent memory itself",
           "pmem"),
    Answer("on-demand", "Linus Torvalds", "structures in DRAM, made when somebody needs them",
           "on-demand"),
    Answer("none", "Dan Williams", "no structures: page-frame numbers alone", "none"),
    Answer("pmem 2M", "a reader's comment", "one structure for 2 MiB", "pmem", "2M"),
    Answer("pmem 1G", "a reader's comment", "one structure for 1 GiB", "pmem", "1G"),
)  # fmt: skip

Unit = Literal["bytes", "count", "seconds", "per second", "MiB/s", "ms/GiB"]


class Row(NamedTuple):
    """One thing that is read of each answer, in each round."""

    key: str
    group: str
    name: str
    unit: Unit
    about: str
    """A sentence for whoever has not seen it measured."""
    better: Literal["less", "more", ""] = ""
    """Which direction is better, where a verdict is wanted; "" for what follows from geometry."""


MEMORY, TIME, IO, PAGES = "memory", "time", "reads and writes", "pages in use"
GROUPS = (MEMORY, TIME, IO, PAGES)

ROWS = (
    Row("structures", MEMORY, "page structures", "count", "How many pages have a structure."),
    Row("in-pool", MEMORY, "room for them in the pool", "bytes",
        "The part of the pool that is set aside for page structures."),
    Row("filled", MEMORY, "filled by the workload", "bytes",
        "Structures that were initialised since the mount: those of pages that were touched."),
    Row("in-dram", MEMORY, "of DRAM, at work", "bytes",
        "DRAM that page structures take when the workload is done."),
    Row("in-dram-idle", MEMORY, "of DRAM, idle again", "bytes",
        "The same after nobody has used the mount for a while; read once, where there was any."),
    Row("unusable", MEMORY, "lost to labels and alignment", "bytes",
        "What of the pool holds neither data nor page structures."),
    Row("create", TIME, "pmemfs create", "seconds",
        "The whole command, which gets the memory from the medium.", "less"),
    Row("mount", TIME, "pmemfs mount", "seconds",
        "The whole command, until the mount answers; the file is there already.", "less"),
    Row("first-touch", TIME, "first touch of a page", "seconds",
        "The first direct read of 4 KiB after the mount: whatever its structure needs is done.",
        "less"),
    Row("again", TIME, "the same page again", "seconds",
        "The middle one of a hundred direct reads of the same page.", "less"),
    Row("random-read", IO, "random 4 KiB, read", "per second",
        "Direct reads of 4 KiB all over the file.", "more"),
    Row("random-write", IO, "random 4 KiB, write", "per second",
        "Direct writes of 4 KiB all over the file.", "more"),
    Row("sequential-read", IO, "sequential 1 MiB, read", "MiB/s",
        "Direct reads of 1 MiB, one after the other.", "more"),
    Row("sequential-write", IO, "sequential 1 MiB, write", "MiB/s",
        "Direct writes of 1 MiB, one after the other.", "more"),
    Row("pin", PAGES, "map, pin and unpin 1 MiB", "seconds",
        "A Python program gets a file of 1 MiB as an array over its pages, and lets go of it.",
        "less"),
    Row("direct", PAGES, "device to pinned pages", "MiB/s",
        "The device's own transfer (O_DIRECT) goes into the pages of the file. The second of two.",
        "more"),
    Row("direct-cpu", PAGES, "CPU time into pinned pages", "ms/GiB",
        "CPU time of all processes that take part.", "less"),
    Row("buffered", PAGES, "device to file by a buffer", "MiB/s",
        "What is left without page structures: into a buffer, then written to the file. The second "
        "of two.", "more"),
    Row("buffered-cpu", PAGES, "CPU time by a buffer", "ms/GiB",
        "CPU time of all processes that take part.", "less"),
    Row("truncate", PAGES, "truncate while pinned", "seconds",
        "A file of 1 MiB is cut to nothing while its first 4 KiB are pinned, and the array that "
        "pins them goes on showing what it showed.", "less"),
    Row("kept-busy", PAGES, "kept back by that pin", "bytes",
        "Of that file and a removed neighbour as large: what can't be given out again until the "
        "pin of 4 KiB ends."),
)  # fmt: skip


class Reading(NamedTuple):
    """What was read of one answer in one round: a value, or the sentence by which it failed."""

    row: str
    answer: str
    round: int
    value: float | None
    error: str = ""


class Spread(NamedTuple):
    """The values of several rounds."""

    median: float
    lowest: float
    highest: float
    round_count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values), len(values))

    @property
    def percent(self) -> float:
        """How far the value farthest from the median is away from it."""
        if not self.median:
            return 0.0
        far = max(self.highest - self.median, self.median - self.lowest)
        return 100 * far / abs(self.median)


class Cell(NamedTuple):
    """What all rounds say of one answer in one row; neither if nobody has looked."""

    spread: Spread | None
    error: str = ""


class Verdict(NamedTuple):
    """How an answer stands to the base in one row."""

    row: str
    answer: str
    ratio: Spread
    """Of the answer's value to the base's, within one round."""
    says: Literal["better", "worse", "no difference seen", "too few rounds"]


def cell_of(readings: Iterable[Reading], row: str, answer: str) -> Cell:
    """What is known of one answer in one row. One failure counts more than all that went well."""
    found = [one for one in readings if (one.row, one.answer) == (row, answer)]
    values = [one.value for one in found if one.value is not None]
    spread = Spread.of(values) if values else None
    return Cell(spread, next((one.error for one in found if one.error), ""))


def failures(readings: Sequence[Reading]) -> list[tuple[str, list[Row], list[str]]]:
    """Each sentence by which something failed: the rows where it did, and the answers."""
    by_sentence: dict[str, set[tuple[str, str]]] = {}
    for one in readings:
        if one.error:
            by_sentence.setdefault(one.error, set()).add((one.row, one.answer))
    return [
        (
            sentence,
            [row for row in ROWS if any(key == row.key for key, _ in where)],
            [answer.name for answer in ANSWERS if any(name == answer.name for _, name in where)],
        )
        for sentence, where in by_sentence.items()
    ]


def verdicts(readings: Sequence[Reading]) -> list[Verdict]:
    """How the other answers stand to the base, wherever both were measured in the same rounds."""
    values = {(r.row, r.answer, r.round): r.value for r in readings if r.value is not None}
    rounds = sorted({one.round for one in readings})
    found = []
    for row in ROWS:
        for answer in ANSWERS if row.better else ():
            pairs = [
                (own, base)
                for number in rounds
                if (own := values.get((row.key, answer.name, number))) is not None
                and (base := values.get((row.key, BASE, number)))
            ]
            if answer.name != BASE and pairs:
                found.append(_verdict(row, answer.name, pairs))
    return found


def _verdict(row: Row, answer: str, pairs: Sequence[tuple[float, float]]) -> Verdict:
    ratio = Spread.of([own / base for own, base in pairs])
    if len(pairs) < VERDICT_ROUNDS:
        return Verdict(row.key, answer, ratio, "too few rounds")
    own, base = (Spread.of(values) for values in zip(*pairs, strict=True))
    if own.lowest <= base.highest and base.lowest <= own.highest:
        return Verdict(row.key, answer, ratio, "no difference seen")
    is_more = ratio.lowest > 1
    return Verdict(
        row.key, answer, ratio, "better" if is_more == (row.better == "more") else "worse"
    )


def quantity(value: float, unit: Unit) -> str:
    """A value for people, with its unit where the name of the row doesn't say it."""
    match unit:
        case "bytes":
            return format_size(round(value))
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            return _duration(value)
        case "per second":
            return f"{value / 1000:.1f}k/s" if value >= 10_000 else f"{value:.0f}/s"
        case "MiB/s":
            return f"{value:.0f} MiB/s"
        case "ms/GiB":
            return f"{value:.0f} ms/GiB"


def _duration(seconds: float) -> str:
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, factor = next((each for each in units if seconds >= each[1]), units[-1])
    value = seconds / factor
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def from_to(spread: Spread, unit: Unit) -> str:
    """From the lowest to the highest of the rounds; empty where nobody would see a difference."""
    lowest, highest = quantity(spread.lowest, unit), quantity(spread.highest, unit)
    if lowest == highest:
        return ""
    number, _, named = lowest.partition(" ")
    # A unit that both have is said once.
    return f"{number if highest.endswith(f' {named}') else lowest} … {highest}"


def with_spread(spread: Spread, unit: Unit) -> str:
    """A median, and how far the rounds lie from it, where there are several that differ."""
    said = quantity(spread.median, unit)
    return f"{said} ±{spread.percent:.0f}%" if round(spread.percent) else said
