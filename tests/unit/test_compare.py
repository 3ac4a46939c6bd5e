"""`pmemfs compare` without a mount: turns, verdicts, tables, the report, and fio's words."""

from __future__ import annotations

import functools
import json
import mmap
import os
import re
import signal
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.cli.commands import pmemfs, run
from pmemfs.cli.compare import as_json_values
from pmemfs.compare import plots
from pmemfs.compare.device import opened_device
from pmemfs.compare.plots import require_matplotlib
from pmemfs.compare.programs import Finished, Interrupts, run_program
from pmemfs.compare.report import html_report
from pmemfs.compare.rows import (
    ANSWERS,
    BASE,
    ROWS,
    VERDICT_ROUNDS,
    Reading,
    Spread,
    cell_of,
    failures,
    quantity,
    verdicts,
    with_spread,
)
from pmemfs.compare.run import Comparison, Fact, Settings, check_settings, order, room_bytes
from pmemfs.compare.workload import TASKS, Fio, Loop, choose_tool, parse_fio
from pmemfs.errors import (
    CannotTransfer,
    Interrupted,
    NeedsPackage,
    NoPageStructures,
    NoSpace,
    WorkloadFailed,
)
from pmemfs.units import GIB, MIB

ROUNDS = VERDICT_ROUNDS
SENTENCE = str(NoPageStructures(what="a pin"))


def readings_of(row: str, values: dict[str, Iterable[float]]) -> list[Reading]:
    """Readings of one row: for each answer its values, round by round."""
    return [
        Reading(row, answer, number, value)
        for answer, of_rounds in values.items()
        for number, value in enumerate(of_rounds)
    ]


def says(row: str, base: list[float], other: list[float]) -> str:
    (verdict,) = verdicts(readings_of(row, {BASE: base, "none": other}))
    return verdict.says


SETTINGS = Settings("/dev/shm", 64 * MIB, ROUNDS, 0.5, 0)


def comparison() -> Comparison:
    """One in which every row was read of every answer; none can't pin."""
    readings = [
        Reading(row.key, answer.name, number, 1000.0 + number)
        for number in range(ROUNDS)
        for row in ROWS
        for answer in ANSWERS
        if (row.key, answer.name) != ("pin", "none")
    ]
    readings += [Reading("pin", "none", number, None, SENTENCE) for number in range(ROUNDS)]
    facts = (Fact("machine", "a <b>bold</b> one\x1b[2J"),)
    return Comparison(SETTINGS.command, facts, ANSWERS, ("pmemfs create POOL",), tuple(readings))


# -- whose turn it is, and what may be said ------------------------------------------------------


@given(st.integers(1, 12))
def test_each_answer_has_one_turn_in_each_round(rounds: int) -> None:
    turns = order(rounds)
    for number in range(rounds):
        names = [answer.name for turn, answer in turns if turn == number]
        assert sorted(names) == sorted(answer.name for answer in ANSWERS)
    assert [number for number, _ in turns] == sorted(number for number, _ in turns)


def test_no_answer_always_comes_before_another() -> None:
    turns = order(10)
    for one in ANSWERS:
        for other in ANSWERS:
            firsts = [
                next(a for turn, a in turns if turn == number and a in (one, other))
                for number in range(10)
            ]
            assert set(firsts) == {one, other}


def test_a_verdict_needs_every_round_on_one_side() -> None:
    assert says("mount", [1, 2, 3, 2, 1], [4, 5, 4, 5, 4]) == "worse"
    assert says("random-read", [1, 2, 3, 2, 1], [4, 5, 4, 5, 4]) == "better"
    assert says("random-read", [1, 2, 3, 2, 1], [4, 5, 3, 5, 4]) == "no difference seen"


def test_a_verdict_does_not_follow_the_ratios_alone() -> None:
    """What made all of them slower from round to round is no reason to call one better."""
    base = [10.0, 8.0, 6.0, 4.0, 2.0]
    assert says("random-read", base, [one * 1.1 for one in base]) == "no difference seen"


def test_too_few_rounds_give_no_verdict_however_far_apart() -> None:
    few = ROUNDS - 1
    assert says("mount", [1.0] * few, [100.0] * few) == "too few rounds"


def test_what_follows_from_geometry_is_not_judged() -> None:
    assert verdicts(readings_of("in-pool", {BASE: [1.0] * 9, "none": [2.0] * 9})) == []


def test_a_round_in_which_one_failed_is_no_ratio() -> None:
    readings = readings_of("mount", {BASE: [1.0, 2.0], "none": [2.0]})
    readings.append(Reading("mount", "none", 1, None, "no"))
    (verdict,) = verdicts(readings)
    assert verdict.ratio == Spread(2.0, 2.0, 2.0, 1)


def test_a_failure_counts_more_than_the_rounds_that_went_well() -> None:
    readings = [Reading("pin", "pmem", 0, 1.0), Reading("pin", "pmem", 1, None, "no")]
    assert cell_of(readings, "pin", "pmem").error == "no"


def test_each_sentence_is_said_once_with_all_who_fail_by_it() -> None:
    readings = [Reading(row, name, number, None, SENTENCE)
                for row in ("truncate", "pin") for name in ("none", "pmem 1G")
                for number in (0, 1)]  # fmt: skip
    ((sentence, rows, answers),) = failures(readings)
    assert sentence == SENTENCE
    assert [row.key for row in rows] == ["pin", "truncate"]
    assert answers == ["none", "pmem 1G"]


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [(0.0000123, "seconds", "12.3 µs"), (0.5, "seconds", "500 ms"), (2.25, "seconds", "2.25 s"),
     (0, "bytes", "0B"), (64, "bytes", "64B"), (36 * MIB, "bytes", "36MiB"),
     (589311, "count", "589,311"), (431_900, "per second", "431.9k/s"),
     (950, "per second", "950/s"), (2542.4, "MiB/s", "2542 MiB/s"),
     (1103, "ms/GiB", "1103 ms/GiB")],
)  # fmt: skip
def test_quantities_are_written_with_their_units(value: float, unit: str, said: str) -> None:
    assert quantity(value, unit) == said  # type: ignore[arg-type]


def test_a_spread_is_said_where_there_is_one() -> None:
    assert with_spread(Spread.of([1.0, 1.2, 1.1]), "seconds") == "1.1 s ±9%"
    assert with_spread(Spread.of([2.0]), "seconds") == "2 s"
    assert with_spread(Spread.of([0.0, 0.0]), "bytes") == "0B"


# -- the workload --------------------------------------------------------------------------------

FIGURES = {"total_ios": 12, "iops": 34.5}


def fio_says(*, text: str = "", code: int = 0, err: str = "", **job: object) -> Finished:
    report = json.dumps({"jobs": [{"error": 0, "read": FIGURES, **job}]}, indent=1)
    return Finished(code, f"{text}{report}\n", err)


def test_fios_figures_are_found_behind_lines_of_text() -> None:
    assert parse_fio(fio_says(), "read") == 34.5
    assert parse_fio(fio_says(text="note: {both iodepth >= 1}\n"), "read") == 34.5


@pytest.mark.parametrize(
    ("finished", "words"),
    [(fio_says(code=1, err="fio: file is gone\n"), "fio: file is gone"),
     (fio_says(error=5, text="fio: io_u error\n"), "io_u error"),
     (fio_says(read={"total_ios": 0, "iops": 0}), "it did nothing"),
     (fio_says(read=None), "it did nothing"),
     (Finished(0, '{"jobs": []}', ""), "no word"),
     (Finished(1, "{ no json", "bad option\n"), "bad option"),
     (Finished(0, "", ""), "exit code 0")],
)  # fmt: skip
def test_what_fio_did_not_do_is_no_figure(finished: Finished, words: str) -> None:
    with pytest.raises(WorkloadFailed, match=re.escape(words)):
        parse_fio(finished, "read")


def test_fio_is_told_never_to_make_the_file_and_to_use_direct_io() -> None:
    for task in TASKS:
        command = Fio("fio", "fio-3", "io_uring").command(task, "/m:n/data", MIB, 0.5, 3)
        assert {"--direct=1", "--allow_file_create=0", r"--filename=/m\:n/data"} <= set(command)
        assert ("--iodepth=32" in command) == task.is_random


def a_fio(directory: Path, script: str) -> str:
    (directory / "fio").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "fio").chmod(0o755)
    return str(directory)


def test_the_best_engine_that_fio_can_use_here_is_chosen(tmp_path: Path) -> None:
    script = 'case "$*" in *version*) echo fio-9 ;; *io_uring*) exit 1 ;; esac'
    tool = choose_tool(a_fio(tmp_path, script))
    assert isinstance(tool, Fio)
    assert tool.description == "fio-9, 32 requests of 4 KiB under way (libaio), 1 of 1 MiB"


def test_without_a_fio_that_works_our_own_loop_does_the_work(tmp_path: Path) -> None:
    assert isinstance(choose_tool(str(tmp_path)), Loop)
    assert isinstance(choose_tool(a_fio(tmp_path, "exit 1")), Loop)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.key))
def test_the_loop_stays_within_the_file(task: object, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4 * MIB))
    assert Loop().requests_per_second(task, str(path), 4 * MIB, 0.001, 1) > 0  # type: ignore[arg-type]
    assert path.stat().st_size == 4 * MIB
    with pytest.raises(WorkloadFailed, match="no such file"):
        Loop().requests_per_second(task, str(tmp_path / "none"), MIB, 0.001, 1)  # type: ignore[arg-type]


# -- programs and signals ------------------------------------------------------------------------


def test_a_program_that_does_not_end_is_ended() -> None:
    with pytest.raises(WorkloadFailed, match="it has not ended"):
        run_program(["sleep", "100"], 0.05)
    with pytest.raises(WorkloadFailed, match="no such file"):
        run_program(["/no/such/program"], 1)


def interrupted(work: Callable[[Interrupts, list[str]], None]) -> tuple[list[str], Interrupted]:
    """What some work that a signal breaks off has done, and how it ends."""
    interrupts, done = Interrupts(), list[str]()
    with pytest.raises(Interrupted) as caught, interrupts.taken():
        work(interrupts, done)
    return done, caught.value


def test_a_signal_breaks_off_the_work_and_not_the_cleaning_up() -> None:
    def work(interrupts: Interrupts, done: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("more work")
        finally:
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("cleaned up")

    done, error = interrupted(work)
    assert done == ["cleaned up"]
    assert error.exit_code == 128 + signal.SIGTERM


def test_a_signal_that_comes_while_something_is_made_counts_when_it_is_made() -> None:
    def work(interrupts: Interrupts, done: list[str]) -> None:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGHUP)
            done.append("made")
        done.append("more work")

    done, error = interrupted(work)
    assert done == ["made"]
    assert "SIGHUP" in str(error)


# -- settings ------------------------------------------------------------------------------------


def test_the_command_repeats_the_run_with_all_that_was_left_to_defaults() -> None:
    settings = Settings("/a dir", 64 * MIB + 4096, 2, 0.25, 0, "/dev/x", "r.html")
    assert settings.command == (
        "pmemfs compare --medium '/a dir' --size 65540K --rounds 2 --seconds 0.25 --idle 0 "
        "--device /dev/x --report r.html"
    )


def test_the_file_of_the_workload_fits_into_a_pool_with_one_page_of_1g() -> None:
    assert Settings("/dev/shm", 2304 * MIB, 1, 1, 0).file_bytes < GIB * 3 // 4
    assert Settings("/dev/shm", 1 << 50, 1, 1, 0).file_bytes == GIB


def test_room_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    settings = Settings(str(tmp_path), 1 << 50, 1, 1, 0)
    with pytest.raises(NoSpace, match=r"1.02PiB|1040.*TiB|is free; give a smaller --size"):
        check_settings(settings)
    assert not list(tmp_path.iterdir())
    assert room_bytes(settings) > settings.size_bytes


def has_direct_io(directory: Path) -> bool:
    """Whether files there can be opened with O_DIRECT."""
    (directory / "try").touch()
    try:
        os.close(os.open(directory / "try", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (directory / "try").unlink()
    return True


def test_a_file_of_our_own_has_no_name_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("no direct I/O here")
    monkeypatch.setattr("pmemfs.compare.device.DEFAULT_DIRECTORY", str(tmp_path))
    with opened_device(None, MIB) as device:
        buffer = mmap.mmap(-1, MIB)
        device.read_into(memoryview(buffer), 0)
        assert any(buffer[:])
        assert not list(tmp_path.iterdir())


def test_a_device_that_is_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(4096))
    with pytest.raises(CannotTransfer, match=r"small: it has 4KiB|no direct I/O"):
        opened_device(str(tmp_path / "small"), MIB).__enter__()
    with pytest.raises(CannotTransfer, match="no such file"):
        opened_device(str(tmp_path / "none"), MIB).__enter__()


# -- what is shown -------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a report: its text, its elements, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.fetched += [
            value for name, value in attrs
            if value and name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]  # fmt: skip

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@functools.cache
def report() -> str:
    """The report of `comparison`; drawing takes its time."""
    pytest.importorskip("matplotlib")
    return html_report(comparison())


def test_the_report_shows_every_row_and_answer_and_fetches_nothing() -> None:
    text = report()
    page = Page(text)
    shown = " ".join(page.words)
    for row in ROWS:
        assert row.name in shown
        assert row.about in shown
    for answer in ANSWERS:
        assert answer.whose in shown
    assert SENTENCE in shown
    assert SETTINGS.command in shown
    assert page.elements.count("svg") == 3
    assert page.fetched == []
    assert "url(http" not in text
    assert "script" not in page.elements


def test_what_a_machine_is_called_is_no_markup() -> None:
    page = Page(report())
    assert "b" not in page.elements
    assert r"a <b>bold</b> one\x1b[2J" in " ".join(page.words)


def test_the_same_figures_make_the_same_report() -> None:
    assert report() == html_report(comparison())


def test_a_report_of_a_pool_that_could_not_be_made_says_so() -> None:
    pytest.importorskip("matplotlib")
    readings = [Reading("create", "pmem 1G", 0, None, "too small"), Reading("mount", BASE, 0, 1.0)]
    page = Page(html_report(comparison()._replace(readings=tuple(readings))))
    assert "fails [1]" in page.words
    assert "too small" in page.words


def test_json_has_every_reading_of_every_round() -> None:
    made = comparison()
    values = json.loads(json.dumps(as_json_values(made)))
    assert len(values["readings"]) == len(made.readings)
    assert {reading["error"] for reading in values["readings"]} == {None, SENTENCE}
    assert values["command"] == made.command
    assert {one["says"] for one in values["verdicts"]} == {"no difference seen"}


def test_without_matplotlib_a_report_is_refused_by_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NeedsPackage):
        require_matplotlib()
    assert plots.require_matplotlib is require_matplotlib
    words = ["compare", "--size", "64M", "--report", str(tmp_path / "r.html")]
    assert run(pmemfs, words) == 1
    said = capsys.readouterr()
    assert 'pip install "pmemfs[bench]"' in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(("load", "is_said"), [(0.0, False), (1000.0, True)])
def test_a_busy_machine_is_warned_of(
    load: float, is_said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("pmemfs.compare.run.compare", lambda *_: comparison())
    assert run(pmemfs, ["compare", "--size", "64M"]) == 0
    shown = capsys.readouterr()
    assert ("the machine is busy (a load of 1000.0" in shown.err) == is_said
    assert f"[1] none: {SENTENCE}" in shown.out
    assert "pmem 2M: no difference seen" in shown.out
    assert SETTINGS.command in shown.out
