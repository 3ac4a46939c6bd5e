"""Words of a command line that are wrong: what its user may have meant stands in one sentence."""

from __future__ import annotations

import json

import pytest

from pmemfs.cli import output
from pmemfs.cli.commands import pmemfs, run
from pmemfs.cli.mount_type import run_helper
from pmemfs.errors import BadMountOption
from pmemfs.mount.options import MountOptions
from pmemfs.text import did_you_mean

MISTAKES = [
    ("", "a command is missing; 'pmemfs --help' lists them"),
    ("creat", "there is no command 'creat'; did you mean 'create'?"),
    ("unmount", "did you mean 'umount'?"),
    ("ls", "did you mean 'list'?"),
    ("mkfs", "did you mean 'create'?"),
    ("FSCK", "did you mean 'check'?"),
    ("delete", "remove the file with 'rm'"),
    ("help", "'pmemfs --help' lists the commands"),
    ("quux", "there is no command 'quux'; 'pmemfs --help' lists them"),
    ("cache flush m", "there is no command 'flush'; did you mean 'pmemfs flush'?"),
    ("cache sett m", "did you mean 'set'?"),
    ("drop m", "did you mean 'cache drop'?"),
    ("decrypt m", "copy it to a directory that is not"),
    ("compress f", "'pmemfs set PATH compression=zstd'"),
    ("set f", "compression is missing; usage: pmemfs set [OPTIONS] PATH compression={zstd["),
    ("set f compression", "compression: say which: compression=zstd, lz4 or none"),
    ("set f compression=zstd:23", "'23' is not a level of zstd, which has 1 to 22"),
    ("set f compression=lz4:13", "'13' is not a level of lz4, which has 1 to 12"),
    ("set f compression=zstd:0", "'0' is not a level of zstd, which has 1 to 22"),
    ("set f compression=none:1", "none has no levels"),
    ("umount", "MOUNTPOINT or POOL is missing; usage: pmemfs umount [OPTIONS]"),
    ("create", "PATH is missing; usage: pmemfs create [OPTIONS] PATH"),
    ("create p --sizes 4G", "there is no option --sizes; did you mean '--size'?"),
    ("create p --page_size 4K", "did you mean '--page-size'?"),
    ("create p --capacity 4G", "did you mean '--size'?"),
    ("create p --size", "--size needs a value"),
    ("list --all=1", "--all takes no value"),
    ("create p -Z", "there is no option -Z; 'pmemfs create --help' lists them"),
    ("create p --scheme ondemand", "did you mean 'on-demand'?"),
    ("create p --mode=filesystem", "did you mean 'fs'?"),
    ("create p --page-size 3M", "--page-size: '3M' is none of 4K, 2M, 1G"),
    ("info", "TARGET is missing"),
    ("info a b", "there is no place for 'b'; usage: pmemfs info [OPTIONS] TARGET"),
    ("list all", "there is no place for 'all'"),
    ("mount p", "MOUNTPOINT is missing; usage: pmemfs mount [OPTIONS] POOL MOUNTPOINT"),
    ("mount p m --engine=natve", "--engine: 'natve' is none of native, python; did you mean"),
    ("mount p m --foreground --json", "give one of them"),
    ("pages m --hottest=5000", "--hottest: 5000 is not from 0 to 1000"),
    ("pages m --hottest=many", "--hottest: 'many' is not a whole number"),
    ("stat m --count 3", "give --watch, too"),
    ("stat m --watch=soon", "--watch: 'soon' is not a number of seconds"),
    ("set p compression=zip", "compression: 'zip' is none of zstd, lz4, none"),
    ("set p compression=zstd:x", "compression: 'x' is not a level of zstd"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_wrong_word_is_one_sentence_that_says_what_to_do(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pmemfs, line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    if "--json" not in line:
        assert shown.err.startswith("pmemfs: ")
        assert shown.err.count("\n") == 1
        assert words in shown.err
        assert run(pmemfs, ["--json", *line.split()]) == 2
        shown = capsys.readouterr()
    error = json.loads(shown.err)
    assert words in error.pop("message")
    assert error == {"error": "BadUsage", "exit_code": 2, "errno": "EINVAL"}


def test_the_helper_of_mount_speaks_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_helper(["/dev/shm/none"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pmemfs: DIRECTORY is missing; usage: mount.pmemfs ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "meant"),
    [("readonly", "ro"), ("read-write", "rw"), ("allow-other", "allow_other"),
     ("hugepages", "huge_pages"), ("noatme", "noatime"), ("modes=600", "mode"), ("ro=1", "ro"),
     ("engine=natve", "native"), ("transport=io_uring", "uring")],
)  # fmt: skip
def test_a_mount_option_that_is_nearly_right_is_said_right(text: str, meant: str) -> None:
    with pytest.raises(BadMountOption, match=f"did you mean '{meant}'"):
        MountOptions.parse(text)


def test_what_is_near_nothing_gets_no_advice() -> None:
    assert did_you_mean("zzz", ["create", "mount"]) == ""


@pytest.mark.parametrize(
    "line", ["list -q", "-q list", "list --quiet --json", "--json -q list", "doctor -q"]
)
def test_the_quiet_say_nothing(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(pmemfs, line.split())
    assert capsys.readouterr() == ("", "")


def test_the_quiet_say_what_failed_and_are_no_longer_quiet_next_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(pmemfs, ["-q", "info", "/dev/null"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "/dev/null" in shown.err
    assert run(pmemfs, ["list"]) == 0
    assert capsys.readouterr().out


def test_who_wants_more_is_told_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("-v info /dev/null", "info /dev/null --verbose"):
        assert run(pmemfs, line.split()) == 1
        assert "pmemfs: /dev/null: no mount of pmemfs has it\n" in capsys.readouterr().err
    assert run(pmemfs, ["-v", "--json", "info", "/dev/null"]) == 1
    notes = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert notes[0] == {"note": "/dev/null: no mount of pmemfs has it"}
    assert notes[-1]["error"] == "UnusableSource"


def test_warnings_are_lines_of_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with output.speaking(as_json=True):
        output.warn("it is slow")
    assert json.loads(capsys.readouterr().err) == {"warning": "it is slow"}


@pytest.mark.parametrize("line", ["-V", "--version", "mount -V", "list --version"])
def test_every_command_says_its_version(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pmemfs, line.split()) == 0
    assert capsys.readouterr().out.startswith("pmemfs 0.")


def test_an_error_of_the_system_has_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pmemfs, ["info", "/dev/shm/not/there", "--json"]) == 1
    error = json.loads(capsys.readouterr().err)
    assert (error["error"], error["errno"]) == ("NoSuchSource", "ENOENT")
