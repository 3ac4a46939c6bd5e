"""What the benchmark promises about its figures: scripts/benchmark, without running fio."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from benchmark import fio, host, places, report
from benchmark.cells import CELLS, MIB, choose_names, parse_size_bytes
from benchmark.errors import BenchError, FioError, SubjectFailed, SubjectUnavailable
from benchmark.report import IO_LOOK, Part, Run, Spread, SubjectState
from benchmark.run import Bench
from benchmark.stage import Interrupts, Settings, rotated

CELL = {cell.name: cell for cell in CELLS}
TIMING = fio.Timing(ramp_ms=500, runtime_ms=3000)
TARGET = fio.Target(Path("/dev/shm/file"), 64 * MIB, direct=True)


def figures(iops: float) -> fio.Figures:
    return fio.Figures(iops=iops, mib_per_second=iops / 256, p50_us=10.0, p99_us=20.0)


def runs_of(
    subject: str, iops_by_round: dict[int, float | None], cell: str = "seqread"
) -> list[Run]:
    """One run for each round; None stands for a failed one."""
    return [
        Run(cell, subject, round_number, 0, ["fio"], figures(iops), 90.0)
        if iops is not None
        else Run(cell, subject, round_number, 0, ["fio"], error="fio: it broke")
        for round_number, iops in iops_by_round.items()
    ]


def fio_output(direction: str = "read", **changes: Any) -> str:
    """What fio prints for one group, with figures in one direction only."""
    idle = {"iops": 0.0, "bw_bytes": 0, "total_ios": 0, "lat_ns": {"min": 0}}
    busy = {
        "iops": 1000.5,
        "bw_bytes": 3 * MIB,
        "total_ios": 3000,
        "lat_ns": {"max": 90000, "percentile": {"50.000000": 1500, "99.000000": 72192}},
    }
    job = {"error": 0, "usr_cpu": 1.0, "sys_cpu": 2.0, "read": idle, "write": idle, direction: busy}
    return json.dumps({"fio version": "fio-3.33", "jobs": [job | changes]}, indent=2)


# -- ratios and medians -------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() -> None:
    mine = runs_of("pmemfs", {0: 10.0, 1: 300.0, 2: 40.0})
    base = runs_of("loop", {0: 10.0, 1: 100.0, 2: 80.0})
    # rounds: 1, 3, 0.5; the medians 40 and 80 would give 0.5
    assert report.ratio_spread(mine, base) == Spread(median=1.0, lowest=0.5, highest=3.0)


def test_a_ratio_pairs_rounds_by_number_whatever_the_order_of_the_runs() -> None:
    mine = runs_of("pmemfs", {2: 40.0, 0: 10.0, 1: 300.0})
    base = runs_of("loop", {0: 10.0, 1: 100.0, 2: 80.0})
    assert report.ratio_spread(mine, base) == Spread(1.0, 0.5, 3.0)


def test_a_round_that_failed_on_either_side_enters_no_ratio() -> None:
    mine = runs_of("pmemfs", {0: 10.0, 1: None, 2: 30.0})
    base = runs_of("loop", {0: None, 1: 10.0, 2: 10.0})
    assert report.ratio_spread(mine, base) == Spread(3.0, 3.0, 3.0)


def test_of_several_bases_the_best_of_each_round_counts() -> None:
    mine = runs_of("pmemfs", {0: 100.0, 1: 100.0, 2: 100.0})
    bases = runs_of("nbdfuse", {0: 10.0, 1: 50.0}) + runs_of("qsd", {0: 20.0, 1: 25.0, 2: None})
    assert report.round_ratios(mine, bases) == [5.0, 2.0]


def test_without_a_common_round_there_is_no_ratio() -> None:
    assert report.ratio_spread(runs_of("pmemfs", {0: 1.0}), runs_of("loop", {1: 1.0})) is None
    assert report.ratio_spread(runs_of("pmemfs", {0: 1.0}), []) is None


def test_the_median_of_an_even_number_of_rounds_lies_halfway() -> None:
    assert report.spread([4.0, 1.0, 2.0, 100.0]) == Spread(3.0, 1.0, 100.0)
    assert report.spread([]) is None


def test_a_base_is_compared_with_within_its_own_cell_only() -> None:
    runs = runs_of("loop", {0: 1.0}, "seqread") + runs_of("pmemfs", {0: 5.0}, "seqwrite")
    summaries = {(one.cell, one.subject): one for one in report.summarise(runs)}
    assert set(summaries["seqwrite", "pmemfs"].ratios) == {"pmemfs"}
    assert summaries["seqread", "loop"].ratios == {"loop": Spread(1.0, 1.0, 1.0)}


def test_a_failed_run_enters_no_median_and_an_all_failed_subject_has_no_summary() -> None:
    runs = runs_of("loop", {0: 100.0, 1: None}) + runs_of("pmemfs", {0: None})
    (only,) = report.summarise(runs)
    assert (only.subject, only.iops) == ("loop", Spread(100.0, 100.0, 100.0))


# -- what fio said ------------------------------------------------------------------------------


def test_latencies_are_microseconds_and_throughput_is_mebibytes() -> None:
    read = fio.parse(0, fio_output(), "", CELL["randread-free"])
    assert (read.iops, read.mib_per_second) == (1000.5, 3.0)
    assert (read.p50_us, read.p99_us) == (1.5, 72.192)


def test_figures_are_those_of_the_cells_direction() -> None:
    assert fio.parse(0, fio_output("write"), "", CELL["randwrite-free"]).iops == 1000.5
    with pytest.raises(FioError, match="without doing any I/O"):
        fio.parse(0, fio_output("write"), "", CELL["randread-free"])


def test_notes_that_fio_prints_before_its_json_are_passed_over() -> None:
    notes = "note: both iodepth >= 1 and synchronous I/O engine are selected {really}\n"
    assert fio.parse(0, notes + fio_output(), "", CELL["randread-free"]).iops == 1000.5


def test_a_failed_run_surfaces_what_fio_said() -> None:
    said = "fio: io_u error on file /mnt/bench: Input/output error: read offset=0, buflen=4096\n"
    with pytest.raises(FioError, match=r"/mnt/bench: Input/output error"):
        fio.parse(1, fio_output(error=5), said, CELL["randread-free"])


def test_an_error_that_is_only_in_stdout_surfaces_too() -> None:
    said = "fio: pid=1, err=28/file:io_u.c:1876, func=io_u error, error=No space left on device\n"
    with pytest.raises(FioError, match="No space left on device"):
        fio.parse(0, said + fio_output(error=28), "", CELL["randread-free"])


@pytest.mark.parametrize("stdout", ["", "{", '{"jobs": []}', "[]"])
def test_output_without_figures_is_a_failure_even_with_exit_code_0(stdout: str) -> None:
    with pytest.raises(FioError, match="exit code 0 and no message"):
        fio.parse(0, stdout, "", CELL["randread-free"])


# -- what fio is told ---------------------------------------------------------------------------


def test_fio_never_makes_the_file_it_measures() -> None:
    for command in (
        fio.prefill_command(TARGET),
        fio.measure_command(CELL["seqread"], TARGET, TIMING, "libaio", None, 1),
    ):
        assert "--allow_file_create=0" in command


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_caller_is_pinned_where_the_cell_is_and_uses_one_engine_for_its_depth(cell: Any) -> None:
    command = fio.measure_command(cell, TARGET, TIMING, "io_uring", 3 if cell.pinned else None, 1)
    assert ("--cpus_allowed=3" in command) == cell.pinned
    engine = "psync" if cell.depth == 1 else cell.engine or "io_uring"
    assert [word for word in command if word.startswith("--ioengine")] == [f"--ioengine={engine}"]


def test_every_subject_of_a_round_gets_the_same_offsets_and_the_next_round_others() -> None:
    def command(path: str, seed: int) -> list[str]:
        target = fio.Target(Path(path), 64 * MIB, direct=True)
        built = fio.measure_command(CELL["randread-deep"], target, TIMING, "libaio", None, seed)
        return [word for word in built if not word.startswith("--filename")]

    assert command("/a", 1) == command("/b", 1)
    assert command("/a", 1) != command("/a", 2)


# -- order, choice and words --------------------------------------------------------------------


def test_over_as_many_rounds_as_subjects_each_has_every_position_once() -> None:
    subjects: Any = ["a", "b", "c"]
    orders = [rotated(subjects, by) for by in range(3)]
    for position in range(3):
        assert sorted(str(order[position]) for order in orders) == ["a", "b", "c"]


def test_names_and_patterns_choose_in_the_known_order() -> None:
    known = ["randread-free", "randread-deep", "seqread"]
    assert choose_names("seqread, randread-*", known, "cell") == known
    assert choose_names(None, known, "cell") == known
    with pytest.raises(BenchError, match=r"no cell is called 'nothing'.*seqread"):
        choose_names("seqread,nothing", known, "cell")


@pytest.mark.parametrize(
    ("text", "size_mib"),
    [("64M", 64), ("1G", 1024), ("32mib", 32), ("16777216", 16), ("1T", 2**20)],
)
def test_sizes_are_binary(text: str, size_mib: int) -> None:
    assert parse_size_bytes(text) == size_mib * MIB


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1G", "8M", "17000001", "big"])
def test_a_size_that_cannot_be_used_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(BenchError, match="size"):
        parse_size_bytes(text)


def test_the_table_shows_ratios_errors_and_why_a_subject_is_missing() -> None:
    states = [
        SubjectState("loop", "the loop device", ("direct-io=on",), True),
        SubjectState("pmemfs", "pmemfs", (), True),
        SubjectState("other", "another", (), None, skipped="it needs [root]"),
    ]
    cells = [CELL["seqread"], CELL["seqwrite"]]
    runs = [
        *runs_of("loop", {0: 100.0}, "seqread"),
        *runs_of("pmemfs", {0: 25.0}, "seqread"),
        *runs_of("loop", {0: 100.0}, "seqwrite"),
        *runs_of("pmemfs", {0: None}, "seqwrite"),
    ]
    written = io.StringIO()
    report.show(Console(file=written), report.table(cells, states, runs))
    text = written.getvalue()
    assert "0.25" in text
    assert "failed: fio: it broke" in text
    assert "other: skipped: it needs [root]" in text


def test_the_table_has_no_row_for_a_subject_that_a_cell_is_not_for() -> None:
    states = [
        SubjectState("tmpfs", "a file", (), True),
        SubjectState("loop", "the loop device", (), True),
        SubjectState("nbdfuse", "a peer", (), None, skipped="it is not installed"),
        SubjectState("pmemfs", "pmemfs", (), True, private_bytes=85 * MIB),
    ]
    runs = runs_of("tmpfs", {0: 50.0}, "ext4-loop-read")
    written = io.StringIO()
    shown = report.table([CELL["ext4-loop-read"]], states, runs)
    report.show(Console(file=written), shown)
    table, _, notes = written.getvalue().partition("CPU %: ")
    assert "tmpfs" in table
    assert "pmemfs" in table
    assert "nbdfuse" not in table
    assert not [line for line in table.splitlines() if "│ loop " in line]
    assert "private memory afterwards: 85.0 MiB" in notes


def test_the_json_document_holds_every_run_and_survives_json() -> None:
    states = [SubjectState("loop", "the loop device", (), True)]
    runs = runs_of("loop", {0: 100.0, 1: None})
    part = Part("io", IO_LOOK, [CELL["seqread"]], states, runs)
    made = report.document({"kernel": "6"}, {"rounds": 2}, [part])
    read_back = json.loads(json.dumps(made))["parts"]["io"]
    assert [run["error"] for run in read_back["runs"]] == [None, "fio: it broke"]
    assert read_back["runs"][0]["command"] == ["fio"]
    assert read_back["summaries"][0]["ratios"]["loop"]["median"] == 1.0


# -- setting up and cleaning up -----------------------------------------------------------------


class FakeSubject:
    """A subject whose setup fails as told and which remembers what was done to it."""

    direct = True
    description = "a fake"

    def __init__(self, path: Path, name: str, problem: Exception | None = None) -> None:
        self.name = name
        self.notes: list[str] = []
        self.path = path / name
        self.torn_down = 0
        self._problem = problem

    def memory_bytes(self, size_bytes: int) -> int:
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        if self._problem:
            raise self._problem
        self.path.write_bytes(b"")
        os.truncate(self.path, size_bytes)

    def teardown(self) -> None:
        self.torn_down += 1

    def daemon_pids(self) -> tuple[int, ...]:
        return ()

    def private_bytes(self) -> int | None:
        return 7 * MIB


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(fio, "prefill", lambda target: None)
    monkeypatch.setattr(host, "shm_free_bytes", lambda: 1024 * MIB)
    settings = Settings(16 * MIB, rounds=2, timing=TIMING)
    return Bench(settings, fio.Fio("fio-3", "libaio", 0.0), lambda text: None, lambda text: None)


def test_every_subject_is_torn_down_once_also_when_interrupted(
    bench: Bench, tmp_path: Path
) -> None:
    subjects = [
        FakeSubject(tmp_path, "good"),
        FakeSubject(tmp_path, "half", SubjectFailed("it broke halfway")),
    ]
    with pytest.raises(KeyboardInterrupt), bench.ready(subjects, Interrupts()):
        raise KeyboardInterrupt
    assert [subject.torn_down for subject in subjects] == [1, 1]


@pytest.mark.parametrize(
    ("problem", "failed"), [(SubjectUnavailable("needs root"), False), (SubjectFailed("x"), True)]
)
def test_a_subject_that_cannot_run_is_skipped_and_only_a_failure_fails_the_run(
    bench: Bench, tmp_path: Path, problem: Exception, failed: bool
) -> None:
    subjects = [FakeSubject(tmp_path, "good"), FakeSubject(tmp_path, "bad", problem)]
    with bench.ready(subjects, Interrupts()) as working:
        assert [subject.name for subject in working] == ["good"]
    assert [state.skipped for state in bench.states] == [None, str(problem)]
    assert bench.failed is failed


def test_a_file_smaller_than_the_working_set_is_never_given_to_fio(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FakeSubject(tmp_path, "small")
    monkeypatch.setattr(small, "setup", lambda size_bytes: small.path.write_bytes(b"few"))
    with (
        pytest.raises(BenchError, match="it holds 3 bytes"),
        bench.ready([small], Interrupts()),
    ):
        pytest.fail("nothing was left to measure")
    assert small.torn_down == 1


def test_too_little_memory_is_said_before_anything_is_set_up(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "shm_free_bytes", lambda: 20 * MIB)
    subject = FakeSubject(tmp_path, "any")
    with (
        pytest.raises(BenchError, match="use a smaller --size"),
        bench.ready([subject], Interrupts()),
    ):
        pytest.fail("there was too little memory")
    assert not subject.path.exists()


def test_a_subject_that_fails_in_a_cell_is_left_out_of_its_later_rounds_only(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], cell: Any, timeout_seconds: float) -> tuple[fio.Figures, float]:
        if cell.name == "seqread" and str(tmp_path / "bad") in " ".join(command):
            raise FioError("fio: it broke")
        return figures(1.0), 1.0

    monkeypatch.setattr(fio, "run", run)
    subjects = [FakeSubject(tmp_path, "good"), FakeSubject(tmp_path, "bad")]
    with bench.ready(subjects, Interrupts()) as working:
        runs = bench.measure([CELL["seqread"], CELL["seqwrite"]], working, lambda: None)
    done = [(run.cell, run.subject) for run in runs]
    assert done.count(("seqread", "bad")) == 1
    assert done.count(("seqread", "good")) == done.count(("seqwrite", "bad")) == 2
    assert [run.error for run in runs if run.error] == ["fio: it broke"]
    assert bench.failed


class FakeExt4:
    """Stands for `Ext4OnLoop`: ``problem`` is what its setup raises."""

    problem: Exception | None = None
    note = "direct-io=on"

    def __init__(self, below: Path) -> None:
        self.calls: list[str] = []
        self.below = below
        FakeExt4.made.append(self)

    made: ClassVar[list["FakeExt4"]] = []

    def setup(self, size_bytes: int) -> fio.Target:
        self.calls.append("setup")
        if self.problem:
            raise self.problem
        return fio.Target(self.below.with_suffix(".ext4"), size_bytes // 2, True)

    def teardown(self) -> None:
        self.calls.append("teardown")


@pytest.fixture
def ext4(monkeypatch: pytest.MonkeyPatch) -> type[FakeExt4]:
    monkeypatch.setattr(places, "Ext4OnLoop", FakeExt4)
    monkeypatch.setattr(FakeExt4, "made", [])
    monkeypatch.setattr(fio, "run", lambda command, cell, timeout_seconds: (figures(1.0), 1.0))
    return FakeExt4


EXT4_CELLS = [CELL["ext4-loop-read"], CELL["ext4-loop-write"]]


def test_ext4_is_made_once_for_each_subject_of_its_cells_and_removed_before_the_subject(
    bench: Bench, tmp_path: Path, ext4: type[FakeExt4]
) -> None:
    subjects = [FakeSubject(tmp_path, "tmpfs"), FakeSubject(tmp_path, "loop")]
    order = []
    subjects[0].teardown = lambda: order.append(list(ext4.made[0].calls))  # type: ignore[method-assign]
    with bench.ready(subjects, Interrupts()) as working:
        runs = bench.measure([CELL["seqread"], *EXT4_CELLS], working, lambda: None)
    assert [one.below for one in ext4.made] == [tmp_path / "tmpfs"]
    assert order == [["setup", "teardown"]]
    assert {run.subject for run in runs if run.cell.startswith("ext4")} == {"tmpfs"}
    filenames = {word for run in runs for word in run.command if word.startswith("--filename")}
    assert f"--filename={tmp_path / 'tmpfs.ext4'}" in filenames
    assert "the loop device below ext4: direct-io=on" in bench.states[0].notes


@pytest.mark.parametrize(
    ("problem", "errors", "failed"),
    [
        (SubjectUnavailable("needs root"), [], False),
        (SubjectFailed("mkfs.ext4: no"), ["mkfs.ext4: no"] * 2, True),
    ],
)
def test_an_ext4_that_can_not_be_made_is_not_tried_again_and_still_removed(
    bench: Bench,
    tmp_path: Path,
    ext4: type[FakeExt4],
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    errors: list[str],
    failed: bool,
) -> None:
    monkeypatch.setattr(ext4, "problem", problem)
    with bench.ready([FakeSubject(tmp_path, "tmpfs")], Interrupts()) as working:
        runs = bench.measure(EXT4_CELLS, working, lambda: None)
    assert [run.error for run in runs] == errors
    assert [one.calls for one in ext4.made] == [["setup", "teardown"]]
    assert bench.failed is failed


def test_a_file_system_on_a_subject_that_hangs_is_removed_after_the_subject(
    bench: Bench, tmp_path: Path, ext4: type[FakeExt4], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = FakeSubject(tmp_path, "tmpfs")

    def remove(made: FakeExt4) -> None:
        made.calls.append("teardown")
        if not subject.torn_down:
            raise SubjectFailed("the loop device stays attached")

    monkeypatch.setattr(ext4, "teardown", remove)
    with bench.ready([subject], Interrupts()) as working:
        bench.measure(EXT4_CELLS[:1], working, lambda: None)
    assert [one.calls for one in ext4.made] == [["setup", "teardown", "teardown"]]
    assert bench.failed


def test_memory_is_read_after_the_cells_also_if_it_can_not_be(
    bench: Bench, tmp_path: Path, ext4: type[FakeExt4], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise PermissionError(13, "Permission denied")

    subjects = [FakeSubject(tmp_path, "good"), FakeSubject(tmp_path, "other")]
    monkeypatch.setattr(subjects[1], "private_bytes", refuse)
    with bench.ready(subjects, Interrupts()) as working:
        assert [state.private_bytes for state in bench.states] == [None, None]
        bench.measure([CELL["seqread"]], working, lambda: None)
    assert [state.private_bytes for state in bench.states] == [7 * MIB, None]


def test_only_the_first_interrupt_interrupts() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        interrupts.receive(signal.SIGINT, None)
    interrupts.receive(signal.SIGINT, None)


# -- the machine --------------------------------------------------------------------------------


def test_a_pinned_process_gets_back_the_cpus_it_had() -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        before = os.sched_getaffinity(process.pid)
        with host.pinned([process.pid], host.pinning_cpu()):
            assert os.sched_getaffinity(process.pid) == {host.pinning_cpu()}
        assert os.sched_getaffinity(process.pid) == before
    finally:
        process.kill()
        process.wait()


def test_a_thread_that_its_program_holds_on_one_cpu_stays_there() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is only one CPU")
    other = next(iter(allowed - {host.pinning_cpu()}))
    process = subprocess.Popen(["taskset", "-c", str(other), "sleep", "100"])
    try:
        deadline = time.monotonic() + 60
        while os.sched_getaffinity(process.pid) != {other}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with host.pinned([process.pid], host.pinning_cpu()):
            assert os.sched_getaffinity(process.pid) == {other}
        assert os.sched_getaffinity(process.pid) == {other}
    finally:
        process.kill()
        process.wait()


MAPPER = """
import mmap, os, sys
memfd, file = os.memfd_create("shared"), os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
held = []
for descriptor in (-1, memfd, file):
    if descriptor >= 0:
        os.ftruncate(descriptor, 64 << 20)
    held.append(mmap.mmap(descriptor, 64 << 20))
    for at in range(0, 64 << 20, 4096):
        held[-1][at] = 1
print("ready", flush=True)
sys.stdin.read()
"""


def test_private_memory_is_neither_the_pool_nor_a_memfd(tmp_path: Path) -> None:
    pool = tmp_path / "a pool"
    command = [sys.executable, "-c", MAPPER, str(pool)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        used_bytes = host.private_bytes(process.pid, pool)
        with_pool_bytes = host.private_bytes(process.pid, tmp_path / "another")
    assert 64 * MIB <= used_bytes < 96 * MIB
    assert 128 * MIB <= with_pool_bytes < 160 * MIB
    assert host.private_bytes(process.pid, pool) == 0


def test_a_command_that_hangs_is_ended_at_its_timeout() -> None:
    with pytest.raises(BenchError, match="sh did not end within"):
        host.run(["sh", "-c", "sleep 30 & wait"], timeout_seconds=0.2)


def test_a_daemon_that_keeps_its_starters_output_does_not_hold_us_up() -> None:
    finished = host.run(["sh", "-c", "sleep 100 & echo $!"], timeout_seconds=30)
    os.kill(int(finished.stdout), signal.SIGKILL)
    assert finished.code == 0
