"""What the benchmark promises about its workloads and subjects: scripts/benchmark/cells, peers …"""

from pathlib import Path

import pytest

from benchmark import backing, parts
from benchmark.cells import CELLS, Cell
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable
from benchmark.pmemfsmount import offered_choices, served_as
from benchmark.subjects import DEFAULT_SUBJECTS, SUBJECTS

CELL = {cell.name: cell for cell in CELLS}

MOUNT_HELP = """
Options:
  -o OPTIONS              Mount options, see below.
  --engine [native|python]
                          Who answers reads and writes.  [default: native]
  --transport [auto|uring|fd]  How requests get there.  [default: auto]
"""


def test_cells_have_names_of_their_own() -> None:
    assert len(CELL) == len(CELLS)


def test_cells_in_a_file_system_of_their_own_come_last() -> None:
    places = [cell.place for cell in CELLS]
    assert places == sorted(places, key=lambda place: place != "subject")


def test_a_cell_names_only_subjects_that_there_are() -> None:
    for cell in CELLS:
        assert {*cell.subjects, *cell.not_subjects} <= set(SUBJECTS)


def test_a_cell_takes_all_subjects_or_those_it_names_but_never_those_it_rules_out() -> None:
    def cell(**changes: tuple[str, ...]) -> Cell:
        return Cell("c", "g", "c", "read", True, 4096, **changes)  # type: ignore[arg-type]

    assert cell().takes("any")
    assert cell(subjects=("a", "b")).takes("b")
    assert not cell(subjects=("a", "b")).takes("c")
    assert cell(not_subjects=("a",)).takes("b")
    assert not cell(not_subjects=("a",)).takes("a")


def test_every_subject_has_the_name_that_it_is_chosen_by() -> None:
    for name, make in SUBJECTS.items():
        assert make().name == name
    assert set(DEFAULT_SUBJECTS) <= set(SUBJECTS)


def test_only_cells_and_subjects_that_have_to_do_with_each_other_are_chosen() -> None:
    (one,) = parts.choose("io", "ext4-loop-*,seqread", "tmpfs,qsd-buffered,loop")
    assert [cell.name for cell in one.cells] == ["seqread", "ext4-loop-read", "ext4-loop-write"]
    assert one.names == ["tmpfs", "loop"]


def test_a_part_without_a_chosen_cell_or_subject_is_left_out() -> None:
    chosen = parts.choose(None, "seqread,stat-*,walk", None)
    assert [one.kind.name for one in chosen] == ["io", "metadata", "mount"]
    assert [cell.name for cell in chosen[1].cells] == [
        *("stat-1", "stat-cold-1", "stat-2", "stat-cold-2")
    ]
    assert chosen[0].names == [name for name in DEFAULT_SUBJECTS if name != "qsd-buffered"]
    chosen = parts.choose(None, None, "ext4,loop")
    assert [(one.kind.name, one.names) for one in chosen] == [
        ("io", ["loop"]),
        ("growth", ["ext4"]),
        ("metadata", ["ext4"]),
    ]


def test_a_part_that_there_is_not_is_refused_with_a_sentence() -> None:
    with pytest.raises(BenchError, match="no part is called 'disk'"):
        parts.choose("disk", None, None)


def test_a_choice_with_nothing_to_measure_is_refused_with_a_sentence() -> None:
    with pytest.raises(BenchError, match="ext4-loop-read: not measured for loop"):
        parts.choose(None, "ext4-loop-read", "loop")


def test_choices_are_read_from_the_help_of_mount() -> None:
    assert offered_choices(MOUNT_HELP, "--engine") == {"native", "python"}
    assert offered_choices(MOUNT_HELP, "--transport") == {"auto", "uring", "fd"}
    assert offered_choices(MOUNT_HELP, "--scheme") == set()


def test_a_mount_that_serves_otherwise_than_asked_is_never_measured() -> None:
    answer = {"engine": "native", "transport": "fd"}
    assert served_as(answer, "native", "auto") == served_as(answer, "native", "fd")
    assert "over fd" in served_as(answer, "native", "auto")
    with pytest.raises(SubjectFailed, match="transport uring was asked for and fd serves"):
        served_as(answer, "native", "uring")
    with pytest.raises(SubjectFailed, match="engine python was asked for and native serves"):
        served_as(answer, "python", "auto")


@pytest.mark.parametrize("name", ["nbdfuse", "qsd", "qsd-buffered"])
def test_a_peer_that_is_not_installed_says_what_installs_it_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(backing, "require_fuse", lambda: None)
    peer = SUBJECTS[name]()
    with pytest.raises(SubjectUnavailable, match="not found: run scripts/install-peers"):
        peer.setup(16 << 20)
    peer.teardown()
    assert peer.daemon_pids() == ()
