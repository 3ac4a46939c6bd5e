"""Where a daemon's log goes."""

from __future__ import annotations

import logging
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmemfs import logs


@pytest.fixture(autouse=True)
def _own_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = before
    root.setLevel(level)


def started(*, foreground: bool = False) -> str:
    """Start logging as in a process of its own: without the handlers of pytest."""
    logging.getLogger().handlers = []
    return logs.start_logging("pmem0", foreground=foreground)


@pytest.fixture
def _no_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "JOURNAL", str(tmp_path / "no-journal"))


def test_with_a_journal_it_goes_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = tmp_path / "dev-log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(journal))
        listener.settimeout(5)
        monkeypatch.setattr(logs, "JOURNAL", str(journal))
        assert "journal" in started()
        logging.getLogger("pmemfs").warning("the label is torn")
        received = listener.recv(4096)
    assert received.startswith(b"<28>pmemfs[")
    assert b"the label is torn" in received


@pytest.mark.usefixtures("_no_journal")
def test_without_a_journal_it_goes_to_a_file_that_two_daemons_may_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "pmem0.log"
    monkeypatch.setattr(logs, "log_file", lambda _name: path)
    for number in range(2):
        assert started() == str(path)
        logging.getLogger("pmemfs").info("daemon %d, of a pool named \udcff", number)
    lines = path.read_text().splitlines()
    assert [line.split("INFO: ")[1] for line in lines] == [
        "daemon 0, of a pool named \\udcff",
        "daemon 1, of a pool named \\udcff",
    ]


@pytest.mark.usefixtures("_no_journal")
def test_where_no_file_can_be_the_daemon_goes_on_without_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(logs, "log_file", lambda _name: tmp_path / "file" / "pmem0.log")
    assert started().startswith("nowhere")
    logging.getLogger("pmemfs").info("nobody hears this")


def test_no_name_of_a_pool_is_too_long_for_the_name_of_its_log() -> None:
    assert len(logs.log_file("/" + "x" * 255).name.encode()) < 255
    assert len(logs.log_file("/" + "ö" * 127).name.encode()) < 255


def test_pools_of_one_name_have_logs_of_their_own() -> None:
    paths = [logs.log_file(f"/dev/shm{directory}/pool") for directory in ("", "/a", "/b")]
    assert len(set(paths)) == 3
    assert all(path.name.startswith("pool-") for path in paths)


@pytest.mark.usefixtures("_no_journal")
def test_a_full_log_is_moved_aside_once_and_no_line_is_lost_of_the_last_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logs, "log_file", lambda _pool: tmp_path / "pool.log")
    monkeypatch.setattr(logs, "LIMIT_BYTES", 4000)
    started()
    # Another daemon, which ends while this one of the same pool begins.
    other = logs.LogFile(tmp_path / "pool.log")
    for number in range(200):
        logging.getLogger("pmemfs").info("line %d", number)
        other.emit(logging.makeLogRecord({"msg": f"other line {number}"}))
    other.close()
    files = sorted(tmp_path.glob("pool.log*"))
    assert [path.name for path in files] == ["pool.log", "pool.log.1"]
    assert all(path.stat().st_size < 4200 for path in files)
    lines = (tmp_path / "pool.log.1").read_text().splitlines()
    lines += (tmp_path / "pool.log").read_text().splitlines()
    found = [int(line.split()[-1]) for line in lines if "other" not in line]
    assert found == list(range(found[0], 200))
    assert len(found) > 40


@pytest.mark.usefixtures("_no_journal")
def test_a_log_that_can_not_be_moved_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logs, "log_file", lambda _pool: tmp_path / "pool.log")
    monkeypatch.setattr(logs, "LIMIT_BYTES", 100)
    (tmp_path / "pool.log.1").mkdir()
    started()
    for number in range(20):
        logging.getLogger("pmemfs").info("line %d", number)
    assert (tmp_path / "pool.log").read_text().count("line") == 20


@pytest.mark.usefixtures("_no_journal")
def test_a_daemon_goes_on_where_its_log_was_taken_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = tmp_path / "logs"
    monkeypatch.setattr(logs, "log_file", lambda _pool: directory / "pool.log")
    started()
    say = logging.getLogger("pmemfs").info
    say("before")
    shutil.rmtree(directory)
    say("into a new directory")
    assert (directory / "pool.log").read_text().count("\n") == 1
    shutil.rmtree(directory)
    directory.write_text("something else is there")
    say("nowhere")
    say("nowhere, again")
    directory.unlink()
    say("there again")
    assert "there again" in (directory / "pool.log").read_text()


@pytest.mark.usefixtures("_no_journal")
def test_a_daemon_without_a_descriptor_for_its_log_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logs, "log_file", lambda _pool: tmp_path / "pool.log")
    started()
    (tmp_path / "pool.log").rename(tmp_path / "rotated")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        logging.getLogger("pmemfs").info("nowhere")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    logging.getLogger("pmemfs").info("there again")
    assert "there again" in (tmp_path / "pool.log").read_text()


def test_in_the_foreground_it_goes_to_standard_error() -> None:
    assert started(foreground=True) == "standard error"


def test_no_name_in_a_message_forges_a_line_or_reaches_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    started(foreground=True)
    name = "a\x1b[2J\npmemfs: ERROR: forged\u202e"
    logging.getLogger("pmemfs").warning("%s is damaged", name)
    try:
        raise ValueError(name)
    except ValueError:
        logging.getLogger("pmemfs").exception("it failed")
    lines = capsys.readouterr().err.split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[0] == r"pmemfs: WARNING: a\x1b[2J\npmemfs: ERROR: forged\u202e is damaged"
    assert not any(line.startswith("pmemfs: ERROR: forged") for line in lines)
