"""What the benchmark promises about files, folders and mounts: scripts/benchmark/files …"""

import io
import json
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmark import (
    backing,
    filerun,
    files,
    fio,
    host,
    markdown,
    mountrun,
    parts,
    report,
    sourcetree,
    verdicts,
)
from benchmark.cells import KIB, MIB
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable
from benchmark.filecells import (
    GROWTH_CELLS,
    MEMFS,
    METADATA_CELLS,
    PASSTHROUGH,
    FileCell,
    series_of,
)
from benchmark.filerun import FileBench
from benchmark.folders import FOLDERS, TmpfsFolder
from benchmark.goals import GOALS
from benchmark.pmemfsmount import Requests, requests_of
from benchmark.report import Look, Part, Reading, Run, SubjectState
from benchmark.stage import Interrupts, Settings

CELL: dict[str, FileCell] = {cell.name: cell for cell in (*GROWTH_CELLS, *METADATA_CELLS)}
SETTINGS = Settings(16 * MIB, rounds=2, timing=fio.Timing(0, 1), files=20)
AMOUNT = files.Amount(files=10, size_bytes=16 * MIB, runtime_ms=1)


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    with files.compiled() as made:
        yield made


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    with sourcetree.packed(AMOUNT.files) as made:
        yield made


# -- the instrument -----------------------------------------------------------------------------


def test_a_series_does_what_it_says_and_leaves_nothing(program: Path, tmp_path: Path) -> None:
    there: dict[str, list[str]] = {}
    (series,) = series_of([CELL["create-2"]])
    for cell in series:
        done = files.run(files.command(program, cell, tmp_path, AMOUNT, direct=False))
        assert done.figures.iops == pytest.approx(AMOUNT.files / done.seconds)
        there[cell.operation] = sorted(path.name for path in tmp_path.rglob("*.dat"))
        sizes = {path.stat().st_size for path in tmp_path.rglob("*.dat")}
        assert sizes <= {4 * KIB}
    assert there["create"] == there["stat"] == there["list"] == names("file")
    assert there["rename"] == there["rmdir"] == names("moved")
    assert there["mkdir"] == names("directory") + names("moved")
    assert there["link"] == names("hard") + names("moved") + names("symbolic")
    assert list(tmp_path.iterdir()) == []


def names(stem: str) -> list[str]:
    return [f"{stem}-{number:07d}.dat" for number in range(AMOUNT.files)]


def test_callers_have_a_directory_each_and_share_the_files(program: Path, tmp_path: Path) -> None:
    files.run(files.command(program, CELL["create-2"], tmp_path, AMOUNT, direct=False))
    counts = {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir()}
    assert counts == {"caller-0": 5, "caller-1": 5}


@pytest.mark.parametrize(("suffix", "size_mib"), [("1M", 4), ("4K", 1)])
def test_a_file_that_grows_is_new_and_one_written_over_is_the_same(
    program: Path, tmp_path: Path, suffix: str, size_mib: int
) -> None:
    path = tmp_path / f"grown-{suffix}"
    new, over = (
        files.command(program, CELL[f"{way}-{suffix}"], tmp_path, AMOUNT, direct=False)
        for way in ("new", "over")
    )
    with pytest.raises(SubjectFailed, match="No such file"):
        files.run(over)
    path.write_bytes(b"old")
    with open(path, "rb") as opened:
        assert files.run(new).figures.mib_per_second
        assert opened.read() == b"old"
    inode = path.stat().st_ino
    files.run(over)
    assert (path.stat().st_ino, path.stat().st_size) == (inode, size_mib * MIB)


@pytest.mark.parametrize(("operation", "said"), [("create", "mkdir"), ("stat", "stat file-")])
def test_what_the_program_could_not_do_it_says(
    program: Path, tmp_path: Path, operation: str, said: str
) -> None:
    (tmp_path / "caller-0").mkdir()
    words = files.command(program, CELL[f"{operation}-1"], tmp_path, AMOUNT, direct=False)
    with pytest.raises(SubjectFailed, match=said):
        files.run(words)


def test_a_listing_that_lacks_a_file_is_a_failure(program: Path, tmp_path: Path) -> None:
    files.run(files.command(program, CELL["create-1"], tmp_path, AMOUNT, direct=False))
    (tmp_path / "caller-0" / "file-0000003.dat").unlink()
    with pytest.raises(SubjectFailed, match="9 files listed, 10 are there"):
        files.run(files.command(program, CELL["list-1"], tmp_path, AMOUNT, direct=False))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("name", "fsyncs"), [("mail-1", 0), ("mail-fsync-1", AMOUNT.files)])
def test_a_mail_is_written_moved_to_another_directory_and_removed(
    program: Path, tmp_path: Path, name: str, fsyncs: int
) -> None:
    queue, trace = tmp_path / "queue", tmp_path / "trace"
    queue.mkdir()
    words = files.command(program, CELL[name], queue, AMOUNT, direct=False)
    calls = "trace=openat,write,fsync,renameat,unlinkat"
    done = files.run(["strace", "-f", "-qq", "-e", calls, "-o", str(trace), *words])
    assert done.figures.mib_per_second
    said = trace.read_text()
    for number in range(AMOUNT.files):
        mail = f"message-{number:07d}.dat"
        assert f'"tmp/{mail}", O_WRONLY|O_CREAT|O_EXCL' in said
        assert re.search(rf'renameat\(\d+, "tmp/{mail}", \d+, "new/{mail}"\) = 0', said)
        assert re.search(rf'unlinkat\(\d+, "new/{mail}", 0\) = 0', said)
    assert said.count(", 4096) = 4096") == AMOUNT.files
    assert said.count(" fsync(") == fsyncs
    assert list(queue.iterdir()) == []


def test_a_source_tree_is_unpacked_looked_through_and_removed(
    program: Path, tmp_path: Path, archive: Path
) -> None:
    (series,) = series_of([CELL["untar"]])
    for cell in series:
        words = files.command(program, cell, tmp_path, replace(AMOUNT, archive=archive), False)
        done = files.run(words)
        assert done.figures.iops == pytest.approx(AMOUNT.files / done.seconds)
        if cell.operation != "rm":
            assert len(list(tmp_path.rglob("*.c"))) == AMOUNT.files
    assert list(tmp_path.iterdir()) == []


def test_a_tree_that_git_has_something_to_say_of_is_a_failure(
    program: Path, tmp_path: Path, archive: Path
) -> None:
    amount = replace(AMOUNT, archive=archive)
    files.run(files.command(program, CELL["untar"], tmp_path, amount, direct=False))
    next(tmp_path.rglob("*.c")).write_text("not what was committed")
    with pytest.raises(SubjectFailed, match=r"figures were expected, not ' M group-000"):
        files.run(files.command(program, CELL["git-status"], tmp_path, amount, direct=False))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["false"], "exit code 1"),
        (["/no/such"], "No such file"),
        (["sh", "-c", "kill -7 $$"], "Bus"),
    ],
)
def test_a_program_that_fails_is_a_failure(program: Path, command: list[str], said: str) -> None:
    with pytest.raises(SubjectFailed, match=said):
        files.run([str(program), "run", "10", *command])


def test_figures_are_rates_and_bytes_only_where_there_are_any() -> None:
    answer = {"operations": 100, "seconds": 0.5, "bytes": 4 * MIB}
    figures, seconds = files.parse(0, json.dumps(answer), "")
    assert (figures.iops, figures.mib_per_second, seconds) == (200.0, 8.0, 0.5)
    figures, _ = files.parse(0, json.dumps(answer | {"bytes": 0}), "")
    assert (figures.mib_per_second, figures.p99_us) == (None, None)


@pytest.mark.parametrize(
    ("code", "stdout", "said"),
    [
        (1, "", "last words"),
        (0, "", "figures were expected"),
        (0, '{"operations": 1}', "figures were expected"),
        (0, '{"operations": 0, "seconds": 1, "bytes": 0}', "nothing was done"),
    ],
)
def test_output_without_figures_is_a_failure(code: int, stdout: str, said: str) -> None:
    with pytest.raises(SubjectFailed, match=said):
        files.parse(code, stdout, "last words")


# -- the source tree ----------------------------------------------------------------------------


def test_one_number_of_files_gives_one_archive_on_any_day(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2001-01-01T00:00:00")
    with sourcetree.packed(AMOUNT.files) as again:
        assert again.read_bytes() == archive.read_bytes()
    assert not again.exists()


def test_sizes_are_as_those_of_source_files() -> None:
    sizes = sorted(len(content) for _, content in sourcetree.files(2000))
    assert 2 * KIB < sizes[1000] < 4 * KIB
    assert 5 * KIB < sum(sizes) / 2000 < sourcetree.FILE_COST_BYTES / 2
    assert sizes[-1] <= sourcetree.LARGEST_BYTES + KIB


def test_without_git_there_is_no_tree_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="git was not found"), sourcetree.packed(1):
        pass


# -- what the daemon answers ----------------------------------------------------------------------


def counted(requests: int, forwarded: int | None) -> dict[str, object]:
    return {"requests": requests, "forwarded": forwarded}


def test_requests_of_all_operations_count_and_of_some_engines_none() -> None:
    answer = {"operations": {"read": counted(10, 1), "other": counted(90, 30)}}
    assert requests_of(answer) == Requests(count=100, forwarded=31)
    assert requests_of({"operations": {"read": counted(10, None)}}) is None
    for wrong in ({}, {"operations": 1}, {"operations": {"read": {}}}):
        with pytest.raises(SubjectFailed, match="no counts of requests"):
            requests_of(wrong)


def test_the_share_is_of_the_requests_meanwhile() -> None:
    before = Requests(count=100, forwarded=90)
    assert filerun.forwarded_share(before, Requests(200, 95)) == 0.05
    assert filerun.forwarded_share(before, before) is None
    assert filerun.forwarded_share(None, before) is None


def test_shares_become_readings_of_the_cells_that_have_some() -> None:
    runs = [
        Run("stat-1", "fs", number, 0, [], forwarded_share=share)
        for number, share in enumerate((0.5, 0.25))
    ]
    runs.append(Run("stat-1", "ext4", 0, 1, []))
    (reading,) = filerun.share_readings([CELL["stat-1"], CELL["stat-2"]], runs)
    assert (reading.cell, reading.unit, reading.values) == ("stat-1", "share", (0.5, 0.25))


# -- cells and file systems ---------------------------------------------------------------------


def test_cells_of_all_parts_have_names_of_their_own() -> None:
    every = [cell.name for kind in parts.KINDS.values() for cell in kind.cells]
    assert len(every) == len(set(every))


def test_a_cell_brings_those_with_it_that_it_needs() -> None:
    (series,) = series_of([CELL["unlink-2"]])
    assert [cell.operation for cell in series] == [
        *("create", "stat", "stat", "list", "rename", "mkdir", "rmdir", "symlink", "link", "unlink")
    ]
    assert {cell.callers for cell in series} == {2}


def test_every_file_system_has_the_name_that_it_is_chosen_by() -> None:
    for name, make in FOLDERS.items():
        assert make().name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("fuse2fs", "not found"), ("fs", "pmemfs"), ("ext4", "not found")),
        *((name, "not found: run scripts/install-peers") for name in (*PASSTHROUGH, *MEMFS)),
    ],
)
def test_a_file_system_that_can_not_be_had_says_so_and_leaves_nothing(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise SubjectUnavailable("the pmemfs command was not found")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(backing, "require_fuse", lambda: None)
    monkeypatch.setattr(backing, "require_loop_devices", lambda: None)
    monkeypatch.setattr(host, "find_pmemfs", missing)
    one = FOLDERS[name]()
    with pytest.raises(SubjectUnavailable, match=said):
        one.setup(64 * MIB)
    one.teardown()
    assert one.daemon_pids() == ()


# -- the order of measurement -------------------------------------------------------------------


class PlainFolder(TmpfsFolder):
    """A folder where the test wants it."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self.name = name
        self._folder = folder

    def setup(self, size_bytes: int) -> None:
        self.folder.mkdir(parents=True)
        self.direct = False

    def teardown(self) -> None:
        pass


@pytest.fixture
def two_folders(tmp_path: Path) -> list[PlainFolder]:
    return [PlainFolder("fs", tmp_path / "a"), PlainFolder("tmpfs", tmp_path / "b")]


def bench_of(program: Path, monkeypatch: pytest.MonkeyPatch) -> FileBench:
    monkeypatch.setattr(host, "drop_name_caches", lambda folder: False)
    monkeypatch.setattr(host, "shm_free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(filerun, "room_bytes", lambda settings: MIB)
    return FileBench(SETTINGS, program, lambda text: None, lambda text: None)


def test_a_subject_does_a_whole_series_and_only_what_was_asked_for_is_told(
    program: Path, monkeypatch: pytest.MonkeyPatch, two_folders: list[PlainFolder]
) -> None:
    bench = bench_of(program, monkeypatch)
    steps: list[None] = []
    with bench.ready(two_folders, Interrupts()) as working:
        wanted = [CELL["stat-cold-1"], CELL["rename-1"]]
        runs = bench.measure(wanted, working, lambda: steps.append(None))
    assert [(run.round, run.subject, run.cell) for run in runs] == [
        (number, subject, cell.name)
        for number, order in enumerate((("fs", "tmpfs"), ("tmpfs", "fs")))
        for subject in order
        for cell in wanted
    ]
    assert len(steps) == len(runs)
    assert not bench.failed
    assert "the kernel's caches could not be dropped" in bench.states[0].notes


def test_a_subject_that_fails_is_left_out_from_there_on(
    program: Path, monkeypatch: pytest.MonkeyPatch, two_folders: list[PlainFolder]
) -> None:
    bench = bench_of(program, monkeypatch)
    with bench.ready(two_folders, Interrupts()) as working:
        (two_folders[0].folder / "caller-0").mkdir()
        runs = bench.measure([CELL["unlink-1"]], working, lambda: None)
    failed = [run for run in runs if run.error]
    assert [(run.cell, run.subject) for run in failed] == [("create-1", "fs")]
    assert [run.subject for run in runs if not run.error] == ["tmpfs", "tmpfs"]
    assert bench.failed


def test_there_is_room_for_what_grows_twice_for_the_small_files_and_a_tree() -> None:
    settings = Settings(1024 * MIB, 1, fio.Timing(0, 1), files=20_000)
    assert filerun.room_bytes(settings) >= 2 * 320 * MIB + 20_000 * (8 + 12) * KIB
    assert filerun.room_bytes(settings) % MIB == 0


def test_an_interrupt_while_something_is_removed_is_kept_for_the_next_part() -> None:
    interrupts = Interrupts()
    interrupts.disarm()
    interrupts.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupts.arm()
    calm = Interrupts()
    calm.disarm()
    calm.arm()
    with pytest.raises(KeyboardInterrupt):
        calm.receive(signal.SIGINT, None)


# -- mounts -------------------------------------------------------------------------------------


def test_metadata_is_what_is_used_beyond_the_data_with_its_part_of_what_is_not_offered() -> None:
    # a pool of 110, of which 100 are offered: a tenth goes with each frame that is used
    share = mountrun.metadata_share(110, offered_bytes=100, used_bytes=42, data_bytes=40)
    assert share == pytest.approx((2 + 4.2) / 40)
    assert mountrun.metadata_share(100, 100, 40, 40) == 0


# -- what is shown ------------------------------------------------------------------------------


def shown(part: Part) -> str:
    written = io.StringIO()
    report.show(Console(file=written), report.show_part(part))
    return written.getvalue()


def runs_of(subject: str, rates: Sequence[float], percent: float | None) -> list[Run]:
    return [
        Run("stat-1", subject, number, 0, ["files"], fio.Figures(rate), 10.0, percent)
        for number, rate in enumerate(rates)
    ]


def test_a_table_has_no_columns_for_what_no_run_tells() -> None:
    states = [SubjectState(name, name, (), True) for name in ("fs", "fuse2fs")]
    runs = runs_of("fs", [4000.0, 6000.0], 20.0) + runs_of("fuse2fs", [1000.0, 1000.0], None)
    look = Look("files/s", ("fuse2fs",), "the callers", has_server_time=True)
    text = shown(Part("metadata", look, [CELL["stat-1"]], states, runs))
    assert "files/s" in text
    assert "MiB/s" not in text
    assert "p99" not in text
    row = next(line for line in text.splitlines() if "│ fs " in line)
    # 0.2 s of CPU for 4000 and for 6000 files: 50 and 33 µs
    assert [word.strip() for word in row.split("│")[3:-1]] == [
        *("5,000", "4,000..6,000", "5.00", "10+20", "42")
    ]


def test_readings_are_shown_with_their_units_and_why_there_is_none() -> None:
    readings = [
        Reading("mount", "full", "full", "s", (0.5, 0.7, 0.6)),
        Reading("walk", "idle", "idle", "bytes", (200 * MIB,)),
        Reading("space", "share", "share", "share", (0.025,)),
        Reading("space", "space", "space", "ratio", error="no room"),
    ]
    text = shown(Part("mount", Look(), mountrun.MOUNT_CELLS, readings=readings))
    for part in ("0.6 s", "0.5 s..0.7 s", "200 MiB", "2.50 %", "space: failed: no room"):
        assert part in text


def test_readings_survive_json() -> None:
    part = Part(
        "mount", Look(), mountrun.MOUNT_CELLS, readings=[Reading("a", "b", "c", "s", (1.0,))]
    )
    read_back = json.loads(json.dumps(report.document({}, {}, [part])))
    assert read_back["parts"]["mount"]["readings"][0]["values"] == [1.0]


def test_markdown_has_a_section_for_each_part_with_figures_and_verdicts() -> None:
    states = [SubjectState(name, name, (), True) for name in ("fs", "fuse2fs")]
    runs = runs_of("fs", [19000.0] * 5, 20.0) + runs_of("fuse2fs", [10000.0] * 5, 20.0)
    part = Part("metadata", Look("files/s"), [CELL["stat-1"], CELL["stat-2"]], states, runs)
    judged = verdicts.judge(GOALS["metadata"], states, runs)
    lines = markdown.document("a title", [("many files", part, judged)]).splitlines()
    assert lines[0] == "a title"
    assert "## many files" in lines
    assert "| files/s, medians | fs | fuse2fs |" in lines
    (row,) = (line for line in lines if "(`stat-1`)" in line)
    assert row.endswith("| 19.0k | 10.0k |")
    (row,) = (line for line in lines if "(`stat-2`)" in line)
    assert row.endswith("| - | - |")
    (row, _) = (line for line in lines if "stat of files just made; 1 caller" in line)
    assert row.endswith("| fs | fuse2fs | ≥ 2 | 1.90 | 1.90..1.90 | **missed** |")


def test_markdown_tells_readings_and_those_that_failed() -> None:
    readings = [
        Reading("space", "share", "the share", "share", (0.02, 0.03, 0.04)),
        Reading("walk", "walk", "the walk", "ratio", error="no room"),
    ]
    part = Part("mount", Look(), mountrun.MOUNT_CELLS, readings=readings)
    text = markdown.document("", [("mounts", part, [])])
    assert "| the share | 3.00 % | 2.00 %..4.00 % | 3 |" in text
    assert "| the walk | no room |  | 0 |" in text
