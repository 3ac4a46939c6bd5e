"""The keeper and its daemons, as real processes: what is stored, who succeeds whom, and the end."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kit.processes import is_running
from pmemfs.mount.processes import has_ended
from pmemfs.units import KIB, MIB

DAEMON = """
import json, os, signal, socket, sys, time
from pmemfs.fuse.keeping import Keeper, joined, stored

def contents(fds):
    return [os.pread(fd, 100, 0).decode() for fd in fds]

def memory(text):
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    return fd

def state():
    connection = socket.socket(fileno=int(sys.argv[-1]))
    items = stored(connection)
    return *joined(connection, items.pop("keeper")), items

test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
test.connect(sys.argv[1])
deaths, items = None, {}
if "--takeover" in sys.argv:
    keeper, deaths, items = state()
else:
    keeper = Keeper.start()
    keeper.store("arguments", data="\\0".join([sys.executable, "-P", *sys.argv[:2]]).encode())
test.send(json.dumps({"pid": os.getpid(), "keeper": keeper.pid}).encode())
while command := test.recv(65536).decode():
    answer = None
    try:
        answer = eval(command)
    except SyntaxError:
        exec(command)
    except OSError:
        answer = "no"
    test.send(json.dumps(answer).encode())
"""


class Daemon:
    """A process that plays a daemon: it does what a test says."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        said = self._hear()
        self.pid, self.keeper = said["pid"], said["keeper"]
        self.pidfd, self.keeper_pidfd = map(os.pidfd_open, (self.pid, self.keeper))

    def do(self, code: str) -> Any:
        """Run code in the process; its value, if it is an expression."""
        self.connection.send(code.encode())
        return self._hear()

    def send_code(self, code: str) -> None:
        """Run code in the process, which says nothing of it."""
        self.connection.send(code.encode())

    def stored(self, name: str) -> list[Any]:
        """Data and contents of the descriptors that it got as a successor."""
        got = self.do(f"[items['{name}'].data.decode(), contents(items['{name}'].fds)]")
        assert isinstance(got, list)
        return got

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _hear(self) -> Any:
        message = self.connection.recv(64 * KIB)
        assert message, "the process has ended"
        return json.loads(message)


class Family:
    """All daemons of one keeper, one after another."""

    def __init__(self, directory: Path) -> None:
        self.script = directory / "daemon.py"
        self.script.write_text(DAEMON)
        self.place = directory / "socket"
        self.log = directory / "log"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.place))
        self._listener.listen()
        self._daemons: list[Daemon] = []

    def first(self, *words: str) -> Daemon:
        subprocess.Popen([*words, sys.executable, "-P", self.script, self.place], cwd="/")
        return self.next()

    def next(self, within_seconds: float = 60) -> Daemon:
        """The daemon that has begun since."""
        self._listener.settimeout(within_seconds)
        connection, _ = self._listener.accept()
        connection.settimeout(60)
        self._daemons.append(Daemon(connection))
        return self._daemons[-1]

    def is_alone(self) -> bool:
        """Whether nobody else begins."""
        self._listener.settimeout(0.3)
        with suppress(TimeoutError):
            self._listener.accept()
            return False
        return True

    def end(self) -> None:
        for daemon in self._daemons:
            for pidfd in (daemon.keeper_pidfd, daemon.pidfd):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            daemon.connection.close()
        self._listener.close()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path)
    yield family
    family.end()


def test_a_successor_gets_all_that_was_stored(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.store('shared', [memory('one'), memory('two')], b'a\\0b')")
    daemon.do("keeper.store('pool', [memory('old')])")
    daemon.do("keeper.store('pool', [memory('new')], b'x')")
    daemon.do("keeper.store('gone', [memory('gone')])")
    daemon.do("keeper.drop('gone')")
    daemon.do("keeper.drop('never there')")
    daemon.kill()
    successor = family.next()
    assert successor.keeper == daemon.keeper
    assert successor.do("sorted(items)") == ["arguments", "pool", "shared"]
    assert successor.stored("shared") == ["a\0b", ["one", "two"]]
    assert successor.stored("pool") == ["x", ["new"]]
    successor.do("keeper.store('more', [memory('more')])")
    successor.kill()
    assert family.next().do("sorted(items)") == ["arguments", "more", "pool", "shared"]


def test_what_is_too_long_for_a_message_is_stored_as_well(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.store('long', [memory('one')], bytes(range(250)) * 1000)")
    daemon.kill()
    successor = family.next()
    assert successor.do("items['long'].data == bytes(range(250)) * 1000")
    assert successor.do("contents(items['long'].fds)") == ["one"]


def test_as_many_descriptors_as_a_message_takes_are_stored(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.store('sockets', [memory(str(n)) for n in range(253)])")
    daemon.kill()
    assert family.next().do("contents(items['sockets'].fds)") == [str(n) for n in range(253)]


def test_a_successor_hears_how_often_daemons_have_died(family: Family) -> None:
    daemon = family.first()
    daemon.kill()
    successor = family.next()
    times, last_ns = successor.do("deaths")
    assert times == 1
    assert 0 <= time.time_ns() - last_ns < 60e9
    successor.kill()
    assert family.next().do("deaths.times") == 1, "the first death was told already"


def test_after_the_end_nothing_is_held_and_nobody_succeeds(family: Family) -> None:
    daemon = family.first()
    daemon.do("r, w = os.pipe(); keeper.store('pipe', [w]); os.close(w)")
    daemon.do("os.set_blocking(r, False)")
    # Nobody has the other end any more when `end` returns.
    assert daemon.do("keeper.end() or len(os.read(r, 1))") == 0
    assert daemon.do("keeper.pid") is None
    assert has_ended(daemon.keeper_pidfd, 60)
    daemon.kill()
    assert family.is_alone()


def test_an_end_that_was_said_before_the_keeper_looked_counts(family: Family) -> None:
    daemon = family.first()
    os.kill(daemon.keeper, signal.SIGSTOP)
    daemon.do("keeper.store('pool', [memory('x')]); keeper._send(b'end')")
    daemon.kill()
    assert has_ended(daemon.pidfd, 60)
    os.kill(daemon.keeper, signal.SIGCONT)
    assert has_ended(daemon.keeper_pidfd, 60)
    assert family.is_alone()


def test_a_daemon_that_hangs_up_is_succeeded_when_it_has_died(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.close()")
    assert family.is_alone()
    daemon.kill()
    assert family.next().keeper == daemon.keeper


def test_a_planned_replacement_is_no_death(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.replace([sys.executable, '-P', *sys.argv[:2], 'other words'])")
    daemon.kill()
    successor = family.next()
    assert successor.do("sys.argv[2:-1]") == ["other words", "--takeover"]
    assert successor.do("deaths.times") == 0
    successor.kill()
    successor = family.next()
    assert successor.do("sys.argv[2:-1]") == ["--takeover"], "what took over has stored no words"
    assert successor.do("deaths.times") == 1


def test_a_replacement_that_can_not_be_started_leaves_the_mount_to_the_words_of_before(
    family: Family,
) -> None:
    daemon = family.first()
    daemon.do("keeper.replace(['/nowhere/python'])")
    daemon.kill()
    assert family.next().do("sys.argv[2:-1]") == ["--takeover"]


def test_the_log_says_why_a_program_can_not_be_a_daemon(family: Family) -> None:
    daemon = family.first()
    log_of(family, daemon)
    words = [sys.executable, "-c", "import nothing_of_that_name"]
    daemon.do(f"keeper.replace({words!r})")
    daemon.kill()
    family.next()
    (line,) = family.log.read_text().splitlines()
    assert line.startswith("the daemon (pid ")
    why = "ModuleNotFoundError: No module named 'nothing_of_that_name'"
    assert line.endswith(f", {sys.executable}) has ended with status 1: {why}")


def test_a_daemon_that_dies_again_and_again_is_given_up_with_a_sentence(family: Family) -> None:
    daemon = family.first()
    log = f"os.open({str(family.log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)"
    daemon.do(f"keeper.store('log', [{log}], b'{{pid}}: {{message}}\\n')")
    reader, writer = os.pipe()
    pids = [daemon.pid]
    for _ in range(5):
        daemon.kill()
        daemon = family.next()
        pids.append(daemon.pid)
    assert not has_ended(daemon.keeper_pidfd, 0)
    daemon.kill()
    assert has_ended(daemon.keeper_pidfd, 60)
    assert family.is_alone()
    # The keeper knows of its own children how they have ended.
    own = f", {sys.executable}) was ended by signal SIGKILL"
    said = [f"the daemon (pid {pids[0]}) has died"]
    said += [f"the daemon (pid {pid}{own}" for pid in pids[1:]]
    said.append("the mount ends: its daemon has died 6 times within a minute")
    assert family.log.read_text().splitlines() == [f"{daemon.keeper}: {line}" for line in said]
    os.close(reader)
    os.close(writer)


def test_a_daemon_that_has_not_stored_its_words_is_not_succeeded(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.drop('arguments')")
    daemon.kill()
    assert has_ended(daemon.keeper_pidfd, 60)
    assert family.is_alone()


def test_the_keeper_ends_by_no_signal_that_ends_others(family: Family) -> None:
    daemon = family.first()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(daemon.keeper, number)
    daemon.kill()
    assert family.next().keeper == daemon.keeper


def test_the_keeper_can_be_ended_by_no_signal_from_the_start(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.end()")
    daemon.send_code("""
before = set(os.listdir('/proc'))
keeper = Keeper.start()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(keeper.pid, number)
keeper.store('arguments', data='\\0'.join([sys.executable, '-P', *sys.argv[:2]]).encode())
os._exit(1)
""")
    assert family.next().pid != daemon.pid


LOWERED = "os.system('echo -1000 2>/dev/null > /proc/self/oom_score_adj') == 0"
"""Whether a child of the shell may lower its score."""


def test_the_keeper_is_the_last_to_be_killed_for_memory_and_its_daemons_are_not(
    family: Family,
) -> None:
    score = Path("/proc/self/oom_score_adj").read_text()
    daemon = family.first()
    daemon.do("keeper.store('pool')")
    daemon.kill()
    successor = family.next()
    # Where this user may not lower it, as in many a container, it stays as it was.
    lowest = "-1000\n" if successor.do(LOWERED) else score
    assert Path(f"/proc/{successor.keeper}/oom_score_adj").read_text() == lowest
    assert Path(f"/proc/{successor.pid}/oom_score_adj").read_text() == score


def signals_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = dict(line.split(":\t") for line in lines if line.startswith("Sig"))
    return {name: int(words[name], 16) for name in ("SigBlk", "SigIgn")}


def test_a_successor_has_the_signals_and_the_environment_of_the_first_daemon(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEMFS_TEST", "value")
    daemon = family.first()
    signals, environment = signals_of(daemon.pid), daemon.do("dict(os.environ)")
    daemon.kill()
    successor = family.next()
    assert signals_of(successor.pid) == signals
    assert successor.do("dict(os.environ)") == environment
    assert environment["PMEMFS_TEST"] == "value"


def test_a_successor_has_no_descriptor_that_it_was_not_given(family: Family) -> None:
    daemon = family.first()
    count = daemon.do("len(os.listdir('/proc/self/fd'))")
    daemon.do("keeper.store('pool', [memory('x')])")
    daemon.kill()
    assert family.next().do("len(os.listdir('/proc/self/fd'))") == count + 1


def test_the_keeper_takes_little_memory(family: Family) -> None:
    daemon = family.first()
    for number in range(100):
        daemon.do(f"keeper.store('pin-{number}', [memory('x')], b'x' * 100)")
    daemon.kill()
    family.next()
    rollup = Path(f"/proc/{daemon.keeper}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split()[0]: int(line.split()[1]) for line in rollup}
    assert (kib["Private_Clean:"] + kib["Private_Dirty:"]) * KIB < 4 * MIB


STANDBY = """
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
pid = os.fork()
if not pid:
    theirs.close()
    test.close()
    keeper.close()
    message, fds, _, _ = socket.recv_fds(ours, 100, 1)
    if not message:
        os._exit(0)
    test = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    test.connect(sys.argv[1])
    sys.argv.append(str(fds[0]))
    keeper, deaths, items = state()
    answer = {"pid": os.getpid(), "keeper": keeper.pid}
else:
    ours.close()
    pidfd = os.pidfd_open(pid)
    keeper.store("standby", [theirs.fileno(), pidfd], str(pid).encode())
    os.close(pidfd)
    theirs.close()
"""


def test_a_process_that_stands_by_becomes_the_successor(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.store('pool', [memory('x')])")
    daemon.do(STANDBY)
    waiting = daemon.do("pid")
    daemon.kill()
    successor = family.next()
    assert successor.pid == waiting
    assert successor.do("sorted(items)") == ["arguments", "pool"]
    successor.kill()
    # The next one is started by its words, because no other process stands by.
    assert family.next().do("sys.argv[2:-1]") == ["--takeover"]


def test_a_process_that_stood_by_and_has_died_is_no_successor(family: Family) -> None:
    daemon = family.first()
    daemon.do(STANDBY)
    os.kill(daemon.do("pid"), signal.SIGKILL)
    daemon.do("os.waitpid(pid, 0) and None")
    daemon.kill()
    assert family.next().do("sys.argv[2:-1]") == ["--takeover"]


@pytest.mark.slow
def test_a_process_that_stood_by_and_stands_still_is_no_successor(family: Family) -> None:
    daemon = family.first()
    log_of(family, daemon)
    daemon.do(STANDBY)
    waiting = daemon.do("pid")
    os.kill(waiting, signal.SIGSTOP)
    daemon.kill()
    successor = family.next(within_seconds=60)
    assert successor.do("sys.argv[2:-1]") == ["--takeover"]
    assert successor.do("deaths.times") == 2
    deadline = time.monotonic() + 60
    while is_running(waiting):  # It has been killed, and is ending.
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (
        f"the daemon (pid {waiting}) has said nothing for 10 s, and is killed"
        in family.log.read_text()
    )


@pytest.mark.slow
def test_a_process_that_stood_by_is_given_any_time_once_it_has_spoken(family: Family) -> None:
    daemon = family.first()
    daemon.do(STANDBY)
    daemon.kill()
    successor = family.next()
    assert not has_ended(successor.pidfd, 13)


def test_a_process_that_stands_by_is_left_alone_when_the_mount_ends(family: Family) -> None:
    daemon = family.first()
    daemon.do(STANDBY)
    waiting = os.pidfd_open(daemon.do("pid"))
    daemon.do("keeper.end()")
    assert has_ended(waiting, 60)
    os.close(waiting)


def test_a_killed_keeper_is_noticed_and_no_harm_to_its_daemon(family: Family) -> None:
    daemon = family.first()
    os.kill(daemon.keeper, signal.SIGKILL)
    assert has_ended(daemon.keeper_pidfd, 60)
    daemon.do("keeper.store('pool', [memory('x')])")
    daemon.do("import trio; trio.run(keeper.wait_until_gone)")
    assert daemon.do("keeper.pid") is None
    daemon.do("keeper.store('pool'); keeper.drop('pool'); keeper.replace(['x']); keeper.end()")
    assert not Path(f"/proc/{daemon.keeper}").exists(), "its daemon has waited for it"
    daemon.kill()
    assert family.is_alone()


def test_a_keeper_that_takes_no_messages_is_ended(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = family.first()
    os.kill(daemon.keeper, signal.SIGSTOP)
    daemon.do("keeper._connection.settimeout(0.1)")
    daemon.do("for number in range(100): keeper.store(f'pin-{number}', data=bytes(60_000))")
    assert has_ended(daemon.keeper_pidfd, 60)


@pytest.mark.slow
def test_a_keeper_that_stands_still_does_not_keep_its_mount_from_ending(family: Family) -> None:
    daemon = family.first()
    os.kill(daemon.keeper, signal.SIGSTOP)
    daemon.do("keeper._connection.settimeout(0.1)")
    daemon.do("keeper.end()")
    assert has_ended(daemon.keeper_pidfd, 60)


@pytest.mark.parametrize("place", ["pipe without a reader", "full pipe", "full disk"])
def test_a_log_that_takes_nothing_does_not_keep_the_keeper_from_its_work(
    family: Family, place: str
) -> None:
    daemon = family.first()
    daemon.do(LOGS[place])
    daemon.do("keeper.store('log', [log], b'{message}\\n')")
    daemon.kill()
    assert family.next().keeper == daemon.keeper


def test_no_zombies_are_left_of_daemons(family: Family) -> None:
    daemon = family.first()
    for _ in range(3):
        daemon.kill()
        daemon = family.next()
    children = Path(f"/proc/{daemon.keeper}/task/{daemon.keeper}/children")
    assert children.read_text().split() == [str(daemon.pid)]


LOGS = {
    "pipe without a reader": "reader, log = os.pipe(); os.close(reader)",
    "full pipe": "reader, log = os.pipe(); os.write(log, bytes(65536)); "
    "keeper.store('reader', [reader])",
    "full disk": "log = os.open('/dev/full', os.O_WRONLY)",
}


LIVING = """
import trio
async def live(seconds):
    with trio.move_on_after(seconds):
        await keeper.wait_until_gone()
    return keeper.pid
"""


def log_of(family: Family, daemon: Daemon) -> None:
    """Let the keeper write to the log."""
    log = f"os.open({str(family.log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)"
    daemon.do(f"keeper.store('log', [{log}], b'{{message}}\\n')")


def test_a_daemon_that_says_nothing_though_asked_is_killed_and_succeeded(family: Family) -> None:
    daemon = family.first()
    log_of(family, daemon)
    daemon.do("keeper.watch(0.4)")
    successor = family.next()
    assert has_ended(daemon.pidfd, 60)
    assert family.log.read_text() == (
        f"the daemon (pid {daemon.pid}) has said nothing for 0.4 s, and is killed\n"
        f"the daemon (pid {daemon.pid}) has died\n"
    )
    assert successor.do("deaths.times") == 1
    assert family.is_alone(), "a successor is watched once it says so"


@pytest.mark.slow
def test_a_daemon_that_answers_is_left_alone(family: Family) -> None:
    daemon = family.first()
    daemon.do(LIVING)
    # Slow machines get what they need: between two answers there are at least four questions.
    daemon.do("keeper.watch(2)")
    assert daemon.do("trio.run(live, 4)") == daemon.keeper
    daemon.do("keeper.watch(0)")
    assert family.is_alone()


@pytest.mark.slow
def test_a_keeper_that_stood_still_takes_no_daemon_for_dead(family: Family) -> None:
    daemon = family.first()
    daemon.do(LIVING)
    daemon.do("keeper.watch(2)")
    daemon.send_code("trio.run(live, 4)")
    os.kill(daemon.keeper, signal.SIGSTOP)
    time.sleep(2)
    os.kill(daemon.keeper, signal.SIGCONT)
    assert daemon._hear() == daemon.keeper


def test_a_keeper_of_another_program_is_asked_whether_it_is_one(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.check()")
    daemon.do("keeper.end()")
    daemon.do("keeper = Keeper.start(['/bin/sleep', '1000'])")
    daemon.do("keeper._connection.settimeout(0.2)")
    pid = daemon.do("keeper.pid")
    assert daemon.do("keeper.check()") == "no"
    assert not Path(f"/proc/{pid}").exists()


def test_a_keeper_that_can_start_no_daemon_now_tries_again(family: Family) -> None:
    daemon = family.first()
    daemon.do("keeper.check()")
    count = len(os.listdir(f"/proc/{daemon.keeper}/fd"))
    # One is closed when the daemon has died, and one is opened for the other end of its socket.
    before = resource.prlimit(daemon.keeper, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.keeper, resource.RLIMIT_NOFILE, (count - 2, before[1]))
    daemon.kill()
    assert family.is_alone()
    resource.prlimit(daemon.keeper, resource.RLIMIT_NOFILE, before)
    assert family.next().keeper == daemon.keeper
