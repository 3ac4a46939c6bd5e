"""The report as Markdown, in a section for each part: what ``docs/performance.md`` is made of."""

from collections.abc import Iterable, Sequence

from benchmark.report import Part, quantity, rate, spread, summarise
from benchmark.verdicts import Verdict, terms


def document(title: str, parts: Sequence[tuple[str, Part, Sequence[Verdict]]]) -> str:
    """All sections; ``parts`` have a heading each."""
    sections = [title]
    for heading, part, verdicts in parts:
        sections.append(f"## {heading}")
        if part.subjects:
            sections.append(_figures(part))
        if part.readings:
            sections.append(_readings(part))
        sections.append(_goals(verdicts))
    return "\n\n".join(sections) + "\n"


def _figures(part: Part) -> str:
    """A row for each cell, a column for each subject."""
    summaries = {(one.cell, one.subject): one for one in summarise(part.runs)}
    names = [one.name for one in part.subjects if any(name == one.name for _, name in summaries)]
    rows = []
    for cell in part.cells:
        row = [f"{cell.group}, {cell.caption} (`{cell.name}`)"]
        for name in names:
            summary = summaries.get((cell.name, name))
            row.append(rate(summary.iops.median) if summary else "-")
        rows.append(row)
    return _table([f"{part.look.rate}, medians", *names], rows)


def _readings(part: Part) -> str:
    rows = []
    for reading in part.readings:
        measured = spread(reading.values)
        median, between = reading.error or reading.lacking or "-", ""
        if measured:
            median = quantity(measured.median, reading.unit)
            extremes = (measured.lowest, measured.highest)
            between = "..".join(quantity(value, reading.unit) for value in extremes)
        rows.append([reading.what, median, between, str(len(reading.values))])
    return _table(["reading", "median", "lowest..highest", "n"], rows)


def _goals(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        subject, against, wanted, unit = terms(verdict.goal)
        measured = verdict.measured
        median = between = "-"
        if measured:
            median = quantity(measured.median, unit)
            extremes = (measured.lowest, measured.highest)
            between = "..".join(quantity(value, unit) for value in extremes)
        outcome = verdict.outcome if verdict.outcome == "met" else f"**{verdict.outcome}**"
        said = f"{outcome} ({verdict.remark})" if verdict.remark else outcome
        wanted = wanted.replace(">=", "≥").replace("<=", "≤")
        rows.append([verdict.goal.what, subject, against, wanted, median, between, said])
    heading = ["goal", "of", "against", "wanted", "median", "lowest..highest", ""]
    return _table(heading, rows)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_escaped(line)) + " |" for line in lines)


def _escaped(line: Sequence[str]) -> list[str]:
    return [word.replace("|", "\\|") for word in line]
