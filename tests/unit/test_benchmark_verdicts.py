"""What the benchmark promises about goals, verdicts and its chart: scripts/benchmark/verdicts …"""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmark import chart, report, verdicts  # noqa: E402
from benchmark.cells import CELLS, MIB  # noqa: E402
from benchmark.errors import BenchError  # noqa: E402
from benchmark.fio import Figures  # noqa: E402
from benchmark.goals import GOALS, SUBJECT, MemoryGoal, RatioGoal  # noqa: E402
from benchmark.report import Run, Spread, SubjectState  # noqa: E402
from benchmark.subjects import SUBJECTS  # noqa: E402
from benchmark.verdicts import Verdict  # noqa: E402

CELL = {cell.name: cell for cell in CELLS}
GOAL = RatioGoal("reads", ("seqread",), ("loop",), 1.2)


def runs_of(subject: str, all_iops: Sequence[float | None], cell: str = "seqread") -> list[Run]:
    """One run for each round; None stands for a failed one."""
    return [
        Run(cell, subject, number, 0, ["fio"], Figures(iops, iops, 10.0, 20.0))
        if iops is not None
        else Run(cell, subject, number, 0, ["fio"], error="fio: it broke")
        for number, iops in enumerate(all_iops)
    ]


def states_of(*names: str, private_bytes: int | None = None) -> list[SubjectState]:
    return [SubjectState(name, name, (), True, private_bytes=private_bytes) for name in names]


def verdict_on(
    goal: RatioGoal | MemoryGoal, states: Sequence[SubjectState], runs: Sequence[Run] = ()
) -> Verdict:
    (verdict,) = verdicts.judge([goal], states, runs)
    return verdict


# -- the goals themselves -----------------------------------------------------------------------


def test_goals_name_cells_and_subjects_that_there_are_and_meet_in_them() -> None:
    for goal in GOALS:
        if isinstance(goal, RatioGoal):
            assert goal.cells
            assert SUBJECT not in goal.bases
            for cell in goal.cells:
                assert all(CELL[cell].takes(name) for name in (SUBJECT, *goal.bases))
                assert set(goal.bases) <= set(SUBJECTS)


def test_reads_and_writes_have_the_same_goals() -> None:
    def wanted(direction: str) -> list[tuple[str, tuple[str, ...], float]]:
        return [
            (goal.what.replace(direction, "x"), goal.bases, goal.at_least)
            for goal in GOALS
            if isinstance(goal, RatioGoal) and direction in goal.what
        ]

    assert wanted("read") == wanted("write")
    assert len(wanted("read")) + len(wanted("write")) == len(GOALS) - 1


def test_every_cell_has_a_goal() -> None:
    named = {cell for goal in GOALS if isinstance(goal, RatioGoal) for cell in goal.cells}
    assert named == set(CELL)


# -- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("iops", "outcome"), [(120.0, "met"), (119.0, "missed")])
def test_a_goal_is_met_from_its_bound_on(iops: float, outcome: str) -> None:
    runs = runs_of(SUBJECT, [iops] * 5) + runs_of("loop", [100.0] * 5)
    verdict = verdict_on(GOAL, states_of(SUBJECT, "loop"), runs)
    assert (verdict.outcome, verdict.count, verdict.remark) == (outcome, 5, "")


def test_the_median_of_the_rounds_ratios_decides_and_the_extremes_are_told() -> None:
    runs = runs_of(SUBJECT, [100.0, 130.0, 125.0, 900.0, 110.0]) + runs_of("loop", [100.0] * 5)
    verdict = verdict_on(GOAL, states_of(SUBJECT, "loop"), runs)
    assert verdict.outcome == "met"
    assert verdict.measured == Spread(1.25, 1.0, 9.0)


def test_of_several_peers_the_best_in_each_round_is_the_one_to_beat() -> None:
    goal = RatioGoal("reads", ("seqread",), ("nbdfuse", "qsd"), 4.0)
    runs = runs_of(SUBJECT, [400.0, 400.0]) + runs_of("nbdfuse", [10.0, 200.0])
    runs += runs_of("qsd", [100.0, 20.0])
    verdict = verdict_on(goal, states_of(SUBJECT, "nbdfuse", "qsd"), runs)
    assert verdict.measured == Spread(3.0, 2.0, 4.0)


def test_a_peer_that_is_missing_is_told_beside_the_verdict() -> None:
    goal = RatioGoal("reads", ("seqread",), ("nbdfuse", "qsd"), 4.0)
    runs = runs_of(SUBJECT, [400.0] * 5) + runs_of("qsd", [100.0] * 5)
    verdict = verdict_on(goal, states_of(SUBJECT, "qsd"), runs)
    assert (verdict.outcome, verdict.remark) == ("met", "without nbdfuse")


def test_a_goal_over_several_cells_takes_all_their_rounds_and_tells_if_a_cell_is_missing() -> None:
    goal = RatioGoal("cost", ("seqread", "seqwrite"), ("none",), 0.95)
    states = states_of(SUBJECT, "none")
    runs = runs_of(SUBJECT, [90.0] * 5) + runs_of("none", [100.0] * 5)
    partly = verdict_on(goal, states, runs)
    assert (partly.outcome, partly.count, partly.remark) == ("missed", 5, "in 1 of 2 cells")
    runs += runs_of(SUBJECT, [50.0] * 5, "seqwrite") + runs_of("none", [50.0] * 5, "seqwrite")
    both = verdict_on(goal, states, runs)
    assert (both.count, both.measured, both.remark) == (10, Spread(0.95, 0.9, 1.0), "")


def test_too_few_rounds_are_told_beside_the_verdict() -> None:
    runs = runs_of(SUBJECT, [400.0] * 2) + runs_of("loop", [100.0] * 5)
    assert verdict_on(GOAL, states_of(SUBJECT, "loop"), runs).remark == "2 of 5 rounds"


def test_a_subject_that_failed_has_missed_the_goal_whatever_its_other_rounds_say() -> None:
    runs = runs_of(SUBJECT, [400.0, None]) + runs_of("loop", [100.0] * 2)
    verdict = verdict_on(GOAL, states_of(SUBJECT, "loop"), runs)
    assert (verdict.outcome, verdict.remark) == ("missed", f"{SUBJECT} failed: fio: it broke")


@pytest.mark.parametrize(
    ("states", "runs", "remark"),
    [
        (states_of("loop"), runs_of("loop", [1.0]), "pmemfs was not chosen"),
        (
            [*states_of("loop"), SubjectState(SUBJECT, "", (), None, skipped="no")],
            runs_of("loop", [1.0]),
            "pmemfs was skipped",
        ),
        (states_of(SUBJECT), runs_of(SUBJECT, [1.0]), "loop was not chosen"),
        (states_of(SUBJECT, "loop"), runs_of("loop", [1.0], "seqwrite"), "no run of seqread"),
        (
            states_of(SUBJECT, "loop"),
            runs_of(SUBJECT, [1.0]) + runs_of("loop", [None]),
            "no round that worked on both sides",
        ),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed_and_says_why(
    states: list[SubjectState], runs: list[Run], remark: str
) -> None:
    assert verdict_on(GOAL, states, runs) == Verdict(GOAL, "not measured", remark=remark)


@pytest.mark.parametrize(
    ("used_bytes", "outcome"),
    [(150 * MIB, "met"), (150 * MIB + 1, "missed"), (None, "not measured")],
)
def test_memory_is_judged_by_its_bytes(used_bytes: int | None, outcome: str) -> None:
    goal = MemoryGoal("memory", 150 * MIB)
    assert verdict_on(goal, states_of(SUBJECT, private_bytes=used_bytes)).outcome == outcome


# -- what is shown ------------------------------------------------------------------------------


def shown(judged: Sequence[Verdict]) -> str:
    written = io.StringIO()
    report.show(Console(file=written), verdicts.table(judged))
    return written.getvalue()


def test_the_table_shows_the_bound_the_median_and_the_extremes() -> None:
    runs = runs_of(SUBJECT, [100.0, 130.0, 125.0]) + runs_of("loop", [100.0] * 3)
    states = states_of(SUBJECT, "loop", private_bytes=90 * MIB)
    text = shown(verdicts.judge(GOALS, states, runs))
    for part in (">= 1.2", "1.25", "1.00..1.30", "<= 150 MiB", "90 MiB", "3 of 5 rounds"):
        assert part in text
    assert "2 met, 0 missed, 21 not measured" in text


def test_without_any_measurement_one_line_says_so() -> None:
    text = shown(verdicts.judge(GOALS, states_of("loop"), runs_of("loop", [1.0])))
    assert text.splitlines() == [
        f"goals for pmemfs: 0 met, 0 missed, {len(GOALS)} not measured (pmemfs was not chosen)"
    ]


def test_verdicts_survive_json() -> None:
    runs = runs_of(SUBJECT, [130.0]) + runs_of("loop", [100.0])
    judged = verdicts.judge(GOALS, states_of(SUBJECT, "loop", private_bytes=MIB), runs)
    read_back = json.loads(json.dumps([asdict(verdict) for verdict in judged]))
    assert read_back[-1]["goal"]["at_most_bytes"] == 150 * MIB
    assert {one["outcome"] for one in read_back} == {"met", "not measured"}


# -- the chart ----------------------------------------------------------------------------------


def test_a_cell_without_the_loop_device_is_compared_with_tmpfs() -> None:
    runs = runs_of("tmpfs", [1.0]) + runs_of("loop", [1.0]) + runs_of(SUBJECT, [1.0], "seqwrite")
    runs += runs_of("tmpfs", [1.0], "ext4-loop-read") + runs_of("loop", [None], "ext4-loop-read")
    assert chart.cell_bases(runs) == {"seqread": "loop", "ext4-loop-read": "tmpfs"}


@pytest.mark.skipif(not chart.available(), reason="matplotlib is not installed")
def test_a_chart_is_drawn_or_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    cells, states = [CELL["ext4-loop-read"]], states_of("tmpfs", SUBJECT)
    alone = runs_of("tmpfs", [2.0, 3.0], "ext4-loop-read")
    with pytest.raises(BenchError, match="no chart"):
        chart.draw(path, cells, states, alone, "title")
    chart.draw(path, cells, states, alone + runs_of(SUBJECT, [1.0, 1.0], cells[0].name), "title")
    assert path.read_bytes().startswith(b"\x89PNG")
