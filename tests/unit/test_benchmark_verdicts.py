"""What the benchmark promises about goals, verdicts and its chart: scripts/benchmark/verdicts …"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from benchmark import chart, report, verdicts
from benchmark.cells import CELLS, MIB
from benchmark.errors import BenchError
from benchmark.fio import Figures
from benchmark.goals import FILE, GOALS, SUBJECT, LimitGoal, MemoryGoal, RatioGoal
from benchmark.parts import KINDS
from benchmark.report import Reading, Run, Spread, SubjectState
from benchmark.verdicts import Verdict

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
    goal: RatioGoal | MemoryGoal | LimitGoal,
    states: Sequence[SubjectState],
    runs: Sequence[Run] = (),
    readings: Sequence[Reading] = (),
) -> Verdict:
    (verdict,) = verdicts.judge([goal], states, runs, readings)
    return verdict


# -- the goals themselves -----------------------------------------------------------------------


def test_goals_name_cells_and_subjects_that_there_are_and_meet_in_them() -> None:
    for part, wanted in GOALS.items():
        cells = {cell.name: cell for cell in KINDS[part].cells}
        for goal in wanted:
            if isinstance(goal, RatioGoal):
                assert goal.cells
                assert {goal.subject, *goal.bases} <= set(KINDS[part].subjects)
                for cell, base_cell in goal.pairs:
                    assert cells[cell].takes(goal.subject)
                    assert all(cells[base_cell].takes(name) for name in goal.bases)
                    assert cell != base_cell or goal.subject not in goal.bases
            if isinstance(goal, LimitGoal):
                assert goal.cell in cells


def test_reads_and_writes_have_the_same_goals() -> None:
    def wanted(direction: str) -> list[tuple[str, str, tuple[str, ...], float]]:
        return [
            (goal.what.replace(direction, "x"), goal.subject, goal.bases, goal.at_least)
            for goal in GOALS["io"]
            if isinstance(goal, RatioGoal) and direction in goal.what
        ]

    assert wanted("read") == wanted("write")
    assert len(wanted("read")) + len(wanted("write")) == len(GOALS["io"]) - 1


def test_every_cell_has_a_goal() -> None:
    for part, kind in KINDS.items():
        named = set()
        for goal in GOALS[part]:
            if isinstance(goal, RatioGoal):
                named |= {cell for pair in goal.pairs for cell in pair}
            if isinstance(goal, LimitGoal):
                named.add(goal.cell)
        assert named == {cell.name for cell in kind.cells}


def test_a_file_in_mode_fs_is_held_against_mode_block_in_every_cell() -> None:
    compared = {
        goal.cells
        for goal in GOALS["io"]
        if isinstance(goal, RatioGoal) and (goal.subject, goal.bases) == (FILE, (SUBJECT,))
    }
    assert compared == {(cell.name,) for cell in CELLS}


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


def test_new_files_are_compared_with_what_is_there_on_the_same_file_system() -> None:
    goal = RatioGoal("new", ("new-1M",), (FILE,), 0.7, subject=FILE, base_cells=("over-1M",))
    runs = runs_of(FILE, [70.0] * 5, "new-1M") + runs_of(FILE, [100.0] * 5, "over-1M")
    runs += runs_of("ext4", [500.0] * 5, "over-1M")
    verdict = verdict_on(goal, states_of(FILE, "ext4"), runs)
    assert (verdict.outcome, verdict.measured, verdict.remark) == ("met", Spread(0.7, 0.7, 0.7), "")
    alone = verdict_on(goal, states_of(FILE), runs_of(FILE, [70.0] * 5, "new-1M"))
    assert alone.outcome == "not measured"


def test_a_goal_is_judged_by_the_subject_it_is_for() -> None:
    goal = RatioGoal("stat", ("stat-1",), ("fuse2fs",), 2.0, subject=FILE)
    runs = runs_of("fuse2fs", [100.0] * 5, "stat-1") + runs_of(FILE, [190.0] * 5, "stat-1")
    assert verdict_on(goal, states_of(FILE, "fuse2fs"), runs).outcome == "missed"
    absent = verdict_on(goal, states_of("fuse2fs"), runs[:5])
    assert (absent.outcome, absent.remark) == ("not measured", "fs was not chosen")


LIMIT = LimitGoal("mounting", "mount", "ratio", "ratio", 1.2)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [((9.0, 1.2, 1.0), "met"), ((1.3, 1.3, 1.0), "missed"), ((), "not measured")],
)
def test_the_median_of_a_reading_must_not_be_above_its_limit(
    values: tuple[float, ...], outcome: str
) -> None:
    readings = [
        Reading("mount", "seconds", "", "s", (99.0,)),
        Reading("mount", "ratio", "", "ratio", values),
    ]
    verdict = verdict_on(LIMIT, (), readings=readings)
    assert (verdict.outcome, verdict.count) == (outcome, len(values))


def test_a_reading_that_failed_has_missed_its_goal_and_says_why() -> None:
    failed = Reading("mount", "mount", "", "ratio", error="mount: no")
    verdict = verdict_on(LIMIT, (), readings=[failed])
    assert (verdict.outcome, verdict.remark) == ("missed", "fs failed: mount: no")


# -- what is shown ------------------------------------------------------------------------------


def shown(judged: Sequence[Verdict]) -> str:
    written = io.StringIO()
    report.show(Console(file=written), verdicts.table(judged))
    return written.getvalue()


def test_the_table_shows_the_bound_the_median_and_the_extremes() -> None:
    runs = runs_of(SUBJECT, [100.0, 130.0, 125.0]) + runs_of("loop", [100.0] * 3)
    states = states_of(SUBJECT, "loop", private_bytes=90 * MIB)
    text = shown(verdicts.judge(GOALS["io"], states, runs))
    for part in (">= 1.2", "1.25", "1.00..1.30", "<= 150 MiB", "90 MiB", "3 of 5 rounds"):
        assert part in text
    assert f"2 met, 0 missed, {len(GOALS['io']) - 2} not measured" in text


def test_without_any_measurement_one_line_says_so() -> None:
    text = shown(verdicts.judge(GOALS["io"], states_of("loop"), runs_of("loop", [1.0])))
    assert text.splitlines() == [
        f"goals: 0 met, 0 missed, {len(GOALS['io'])} not measured (pmemfs was not chosen)"
    ]


def test_verdicts_survive_json() -> None:
    runs = runs_of(SUBJECT, [130.0]) + runs_of("loop", [100.0])
    judged = verdicts.judge(GOALS["io"], states_of(SUBJECT, "loop", private_bytes=MIB), runs)
    read_back = json.loads(json.dumps([asdict(verdict) for verdict in judged]))
    assert 150 * MIB in [one["goal"].get("at_most_bytes") for one in read_back]
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
