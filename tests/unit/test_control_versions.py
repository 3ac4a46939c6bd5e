"""A command of one version and a daemon of another: what they have in common works."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.control_socket import STATUS, answering, exchange, in_thread, saying, with_another
from pmemfs.cli.output import print_json
from pmemfs.control.client import Question, call, call_all
from pmemfs.control.server import listening, serve
from pmemfs.control.shape import decode
from pmemfs.engine.statistics import EngineStatistics
from pmemfs.errors import NoAnswer
from pmemfs.observe.answers import MountStatus
from pmemfs.unsaid import json_values
from pmemfs.version import VERSION

OLDER, NEWER = "0.0.1", "99.0"

# The process is the one that the kernel names, whatever the answer says.
UNDERSTOOD = decode(MountStatus, {**STATUS, "pid": os.getpid()})


@pytest.fixture
def path(shm: Path) -> Path:
    directory = shm / "run"
    directory.mkdir(mode=0o700)
    return directory / "0:57.sock"


def ask(path: Path, answer: dict[str, Any]) -> MountStatus:
    """What a command makes of a daemon's answer."""
    with answering(path, saying(json.dumps(answer).encode())):
        status: MountStatus = call(path, "info", lambda value: decode(MountStatus, value))
        return status


def test_what_a_newer_daemon_says_besides_is_left_out(path: Path) -> None:
    more = {**STATUS, "weather": "fair", "pool": {**STATUS["pool"], "colour": [1, 2]}}
    answer = {"result": more, "version": NEWER, "elsewhere": {"a": 1}}
    assert ask(path, answer) == UNDERSTOOD


def test_an_older_daemon_that_says_no_version_is_understood(path: Path) -> None:
    assert ask(path, {"result": STATUS}) == UNDERSTOOD


def asked_of_another(path: Path, answer: dict[str, Any]) -> tuple[Any, list[str]]:
    """What a command makes of a daemon's answer, and its warnings."""
    warnings: list[str] = []
    question = Question(path, os.geteuid(), "info", {})
    with answering(path, saying(json.dumps(answer).encode())):
        (status,) = call_all(
            [question],
            partial(decode, MountStatus),
            warn=lambda position, sentence: warnings.append(sentence),
        )
    return status, warnings


OTHERS = [
    ({"version": OLDER}, f"the daemon is of pmemfs {OLDER}, this command of {VERSION}"),
    ({"version": NEWER}, f"the daemon is of pmemfs {NEWER}, this command of {VERSION}"),
    ({}, "the daemon is of another version of pmemfs"),
    ({"version": 7}, "the daemon is of another version of pmemfs"),
]


@pytest.mark.parametrize(("said", "named"), OTHERS)
def test_what_another_version_does_not_say_is_missing_alone(
    path: Path, said: dict[str, Any], named: str
) -> None:
    less = STATUS
    for way in (("pool", "kind"), ("io",), ("engine",), ("space",), ("fault_count",)):
        less = with_another(less, way, ...)
    status, (warning,) = asked_of_another(path, {"result": less, **said})
    assert (status.mountpoint, status.pool.name) == ("/mnt", "pmem0")
    assert (status.pool.kind, status.engine, status.space, status.fault_count) == ("", "", None, 0)
    assert status.io == EngineStatistics(0, 0, 0, 0, 0)
    for name in ("pool.kind", "io", "engine", "space", "fault_count"):
        assert name in warning
    assert named in warning
    assert "\n" not in warning


def at(value: Any, way: tuple[str, ...]) -> Any:
    """A member of nested reports."""
    for name in way:
        value = value[name]
    return value


WAYS = [(name,) for name in STATUS if name != "space"] + [
    (name, member) for name in ("pool", "io") for member in STATUS[name]
]


@pytest.mark.parametrize("way", WAYS, ids=".".join)
def test_what_another_version_does_not_say_is_null_in_json(
    way: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    missing: list[str] = []
    status = decode(MountStatus, with_another(STATUS, way, ...), missing)
    assert missing == [".".join(way)]
    print_json(json_values(status))
    said = json.loads(capsys.readouterr().out)
    values = at(said, way)
    assert values is None or set(values.values()) <= {None}, values
    assert at(said, ("mountpoint",) if way != ("mountpoint",) else ("device",))
    other = "uuid" if way == ("pool", "name") else "name"
    assert way == ("pool",) or said["pool"][other]


@pytest.mark.parametrize(("said", "named"), OTHERS)
@pytest.mark.parametrize(
    ("way", "other", "what"),
    [
        ((), {}, "pid is missing"),
        (("pool",), {}, "pool.path is missing"),
        (("engine",), "quantum", "engine is not what it should be"),
    ],
)
def test_what_can_not_be_read_is_one_sentence_that_names_both_versions(
    path: Path, said: dict[str, Any], named: str, way: tuple[str, ...], other: Any, what: str
) -> None:
    answer, warnings = asked_of_another(path, {"result": with_another(STATUS, way, other), **said})
    assert isinstance(answer, NoAnswer)
    sentence = str(answer)
    assert what in sentence
    assert named in sentence
    assert "\n" not in sentence
    assert warnings == []


def test_nonsense_of_the_same_version_is_not_blamed_on_versions(path: Path) -> None:
    broken = with_another(STATUS, ("pool", "kind"), ...)
    with pytest.raises(NoAnswer, match=r"is missing$"):
        ask(path, {"result": broken, "version": VERSION})


async def grow(size_bytes: int, unit: str | None = None) -> list[Any]:
    return [size_bytes, unit]


def asked(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What a daemon answers to a request."""
    answers: list[Any] = []

    async def main() -> None:
        with trio.fail_after(20), listening(path) as (listener, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, listener, lambda: {"grow": grow})
                answers.extend(
                    await in_thread(exchange, path, json.dumps(request).encode() + b"\n")
                )
                nursery.cancel_scope.cancel()

    trio.run(main)
    (answer,) = answers
    assert answer["version"] == VERSION
    return dict(answer)


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "grow", "params": {"size_bytes": 5}},
        {"method": "grow", "params": {"size_bytes": 5}, "version": OLDER},
        {"method": "grow", "params": {"size_bytes": 5, "speed": None}, "version": NEWER},
        {"method": "grow", "params": {"size_bytes": 5}, "version": NEWER, "priority": "high"},
    ],
)
def test_what_a_command_of_another_version_asks_is_done(
    path: Path, request_: dict[str, Any]
) -> None:
    assert asked(path, request_)["result"] == [5, None]


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "shrink", "params": {}, "version": NEWER},
        {"method": "grow", "params": {"size_bytes": 5, "dry_run": True}, "version": NEWER},
        {"method": "grow", "params": {}, "version": NEWER},
        {"method": "grow", "params": {"size_bytes": {"bytes": 5}}, "version": NEWER},
    ],
    ids=["another method", "a parameter that asks for more", "one less", "another shape"],
)
def test_what_a_daemon_does_not_know_is_not_done_and_said_with_both_versions(
    path: Path, request_: dict[str, Any]
) -> None:
    sentence = asked(path, request_)["error"]["message"]
    assert f"it is of pmemfs {VERSION}, the command of pmemfs {NEWER}" in sentence


def test_nonsense_from_the_same_version_is_a_plain_sentence(path: Path) -> None:
    error = asked(path, {"method": "shrink", "version": VERSION})["error"]
    assert error["message"] == "the daemon does not understand this request"
