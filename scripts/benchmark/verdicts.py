"""Each goal against the figures: met, missed or not measured, and by how much.

Invariants: a verdict rests on ratios within one round only, as the report's do; a goal's own
subject that failed in one of its cells has missed it, whatever the other rounds say; what was not
measured is never called met, and its verdict says what was lacking.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmark.goals import (
    SUBJECT,
    WANTED_ROUNDS,
    Goal,
    LimitGoal,
    MemoryGoal,
    RatioGoal,
)
from benchmark.report import (
    Reading,
    Run,
    Spread,
    SubjectState,
    Unit,
    quantity,
    round_ratios,
    spread,
)

Outcome = Literal["met", "missed", "not measured"]
STYLES: dict[Outcome, str] = {"met": "green", "missed": "red", "not measured": "yellow"}


@dataclass(frozen=True)
class Verdict:
    """What came of ``goal``. ``measured`` is a ratio of IOPS, or what the goal's unit says.

    ``count`` is the number of ratios behind it: rounds, times cells where a goal takes several.
    """

    goal: Goal
    outcome: Outcome
    measured: Spread | None = None
    count: int = 0
    remark: str = ""


def judge(
    goals: Iterable[Goal],
    subjects: Sequence[SubjectState],
    runs: Sequence[Run],
    readings: Sequence[Reading] = (),
) -> list[Verdict]:
    """A verdict for each goal, in their order."""
    states = {state.name: state for state in subjects}
    verdicts = []
    for goal in goals:
        match goal:
            case RatioGoal():
                verdicts.append(_judge_ratio(goal, states, runs))
            case MemoryGoal():
                verdicts.append(_judge_memory(goal, states))
            case LimitGoal():
                verdicts.append(_judge_limit(goal, readings))
    return verdicts


def _judge_ratio(goal: RatioGoal, states: dict[str, SubjectState], runs: Sequence[Run]) -> Verdict:
    own, others, ratios = [], [], []
    for cell, base_cell in goal.pairs:
        own_here = [run for run in runs if (run.subject, run.cell) == (goal.subject, cell)]
        others_here = [run for run in runs if run.subject in goal.bases and run.cell == base_cell]
        ratios += round_ratios(own_here, others_here)
        own += own_here
        others += others_here
    measured = spread(ratios)
    if error := next((run.error for run in own if run.error), None):
        return Verdict(goal, "missed", measured, len(ratios), f"{goal.subject} failed: {error}")
    if measured is None:
        return Verdict(goal, "not measured", remark=_lacking(goal, states, runs))
    outcome: Outcome = "met" if measured.median >= goal.at_least else "missed"
    return Verdict(goal, outcome, measured, len(ratios), _reservations(goal, own, others))


def _judge_limit(goal: LimitGoal, readings: Sequence[Reading]) -> Verdict:
    here = [one for one in readings if one.cell == goal.cell]
    if error := next((one.error for one in here if one.error), None):
        return Verdict(goal, "missed", remark=f"{goal.subject} failed: {error}")
    values = [value for one in here if one.key == goal.reading for value in one.values]
    measured = spread(values)
    if measured is None:
        lacking = next((one.lacking for one in here if one.lacking), None)
        remark = lacking or f"no reading of {goal.cell}"
        return Verdict(goal, "not measured", remark=remark)
    outcome: Outcome = "met" if goal.takes(measured.median) else "missed"
    return Verdict(goal, outcome, measured, len(values))


def _judge_memory(goal: MemoryGoal, states: dict[str, SubjectState]) -> Verdict:
    state = states.get(SUBJECT)
    if state is None or state.private_bytes is None:
        remark = _absence(SUBJECT, states) or f"the processes of {SUBJECT} were not found"
        return Verdict(goal, "not measured", remark=remark)
    used_bytes = state.private_bytes
    outcome: Outcome = "met" if used_bytes <= goal.at_most_bytes else "missed"
    return Verdict(goal, outcome, Spread(used_bytes, used_bytes, used_bytes), 1)


def _lacking(goal: RatioGoal, states: dict[str, SubjectState], runs: Sequence[Run]) -> str:
    """Why there is not a single ratio for the goal."""
    if absence := _absence(goal.subject, states):
        return absence
    absences = [_absence(base, states) for base in goal.bases]
    if all(absences):
        return "; ".join(filter(None, absences))
    if not any(run.cell in goal.cells for run in runs):
        return f"no run of {goal.cells[0] if len(goal.cells) == 1 else 'its cells'}"
    return "no round that worked on both sides"


def _absence(name: str, states: dict[str, SubjectState]) -> str | None:
    if name not in states:
        return f"{name} was not chosen"
    return f"{name} was skipped" if states[name].skipped else None


def _reservations(goal: RatioGoal, own: Sequence[Run], others: Sequence[Run]) -> str:
    """What the reader must know before relying on a verdict that there is."""
    said = []
    measured = {run.subject for run in others if run.figures}
    if missing := [base for base in goal.bases if base not in measured]:
        said.append(f"without {', '.join(missing)}")
    measured_cells = {run.cell for run in own if run.figures}
    base_cells = {run.cell for run in others if run.figures}
    count = sum(one in measured_cells and base in base_cells for one, base in goal.pairs)
    if count < len(goal.cells):
        said.append(f"in {count} of {len(goal.cells)} cells")
    rounds = {run.round for run in own if run.figures} & {run.round for run in others}
    if len(rounds) < WANTED_ROUNDS:
        said.append(f"{len(rounds)} of {WANTED_ROUNDS} rounds")
    return "; ".join(said)


# -- the table ------------------------------------------------------------------------------------


def table(verdicts: Sequence[Verdict]) -> Group:
    """One row for each verdict, then a line that counts them; if nothing was measured only that."""
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = ", ".join(f"{outcomes.count(one)} {one}" for one in STYLES)
    summary = f"goals: {counts}"
    if not any(outcome != "not measured" for outcome in outcomes):
        reasons = dict.fromkeys(verdict.remark for verdict in verdicts)
        return Group(Text(f"{summary} ({next(iter(reasons), 'there are none')})"))
    result = Table(title="goals", title_justify="left", title_style="bold")
    result.add_column("goal", overflow="fold")
    result.add_column("of", no_wrap=True)
    result.add_column("against", overflow="fold")
    for heading in ("wanted", "median", "min..max", "n"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("verdict", no_wrap=True)
    result.add_column("remark", overflow="fold")
    for verdict in verdicts:
        result.add_row(*_row(verdict))
    return Group(result, Text(summary))


def _row(verdict: Verdict) -> list[Text]:
    goal, measured = verdict.goal, verdict.measured
    subject, against, wanted, unit = terms(goal)
    between = ""
    if measured:
        between = f"{quantity(measured.lowest, unit)}..{quantity(measured.highest, unit)}"
    return [
        Text(goal.what),
        Text(subject),
        Text(against),
        Text(wanted),
        Text(quantity(measured.median, unit) if measured else "-"),
        Text(between or "-"),
        Text(str(verdict.count) if measured else "-"),
        Text(verdict.outcome, style=STYLES[verdict.outcome]),
        Text(verdict.remark),
    ]


def terms(goal: Goal) -> tuple[str, str, str, Unit]:
    """Whom a goal is for, what that is compared with, what is wanted, and in which unit."""
    match goal:
        case RatioGoal():
            best_of = "best of " if len(goal.bases) > 1 else ""
            against = best_of + ", ".join(goal.bases)
            return goal.subject, against, f">= {goal.at_least:g}", "ratio"
        case MemoryGoal():
            return SUBJECT, "-", f"<= {quantity(goal.at_most_bytes, 'bytes')}", "bytes"
        case LimitGoal():
            sign = ">=" if goal.is_least else "<="
            return goal.subject, "-", f"{sign} {quantity(goal.bound, goal.unit)}", goal.unit
