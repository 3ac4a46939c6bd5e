"""The command's end of starting a daemon: wait, look at the mount, and keep it or end everything.

`control/starter` describes the protocol. Invariants:
- a launch ends by `keep` or by `abandon`. After `keep` the command succeeds, so signals count no
  more. After `abandon` there is no process and no mount;
- a signal only leaves a note, which is read wherever this waits. If signals raised, one could come
  between the start of a process and the line that remembers it, and the process would be left over.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypeVar

from pmemfs.control import prepared
from pmemfs.control.starter import ENDING_SIGNALS, KEEP
from pmemfs.errors import EXIT_USAGE, DaemonDied, Interrupted, MountFailed, PmemfsError, SourceBusy
from pmemfs.mount.options import MountOptions
from pmemfs.units import KIB

_PATIENCE_SECONDS = 60
"""How long a daemon has for ending by itself; after that it is killed."""
_REST_SECONDS = 10
_POLL_SECONDS = 0.01
_MESSAGE_BYTES = 64 * KIB

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to mount where, and how. The paths are absolute and without symbolic links."""

    pool: str
    mountpoint: str
    options: MountOptions


class Said(PmemfsError):
    """{error}"""

    def __init__(self, answer: Mapping[str, str]) -> None:
        super().__init__(error=answer["error"])
        if "usage" in answer:
            self.exit_code = EXIT_USAGE
        self.errno = int(answer.get("errno", self.errno))
        self._kind = answer.get("kind")

    @property
    def kind(self) -> str:
        """As the daemon calls it, where it is an error of ours."""
        return self._kind or MountFailed.__name__

    def and_more(self, more: str) -> Said:
        """The same with more at the end of its sentence."""
        facts = {"error": f"{self}; {more}", "errno": str(self.errno), "kind": self.kind}
        said = Said(facts)
        said.exit_code = self.exit_code
        return said

    @property
    def is_busy(self) -> bool:
        """Whether another process has the pool."""
        return self.kind == SourceBusy.__name__


class NotedSignals:
    """The first ending signal since this was made; signals that were ignored stay ignored.

    The signals are never obeyed again, because the command ends by `Interrupted` or succeeds.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def ignore(self) -> None:
        """The command has succeeded: from now on no signal counts.

        This holds even while Python ends, when it gives signals their default back.
        """
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._reader

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._number is not None:
            raise Interrupted(self._number)

    def wait_readable(self, *fds: int) -> set[int]:
        """Which of some descriptors are readable, once one is. Raises Interrupted."""
        poll = select.poll()
        for fd in (*fds, self._reader):
            poll.register(fd, select.POLLIN)
        found = {fd for fd, _ in poll.poll()}
        self.check()
        return found

    def wait_for(self, work: Callable[[], T]) -> T:
        """Do work that may take long in a thread. Raises Interrupted, and what `work` raises."""
        task = Task(work)
        self.wait_readable(task.fileno())
        return task.result()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number


class Task(Generic[T]):
    """Work in a thread of its own, which goes on alone if the command waits for it no more."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._problem: Exception | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._run, daemon=True).start()

    def fileno(self) -> int:
        """Readable once the work is done."""
        return self._reader

    def result(self) -> T:
        """The result of the work. Raises what it has raised."""
        if self._problem:
            raise self._problem
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except Exception as error:
            self._problem = error
        finally:
            os.close(self._writer)


class Launch:
    """A daemon that was started, and whose mount is not kept yet."""

    def __init__(self, words: Sequence[str], signals: NotedSignals) -> None:
        self._signals = signals
        started = prepared.started(words)
        self._daemon, self._socket = started.process, started.socket
        self._stderr = started.stderr_fd

    def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Return once the mount is made; `tell` is told what keeps it from being made.

        Raises Said, DaemonDied and Interrupted.
        """
        answer: dict[str, str] = {}
        while "ready" not in answer:
            self._signals.wait_readable(self._socket.fileno())
            answer = self._hear()
            if "waiting" in answer:
                tell(answer["waiting"])

    def look(self, work: Callable[[], object]) -> None:
        """Do something that asks the daemon's mount.

        Raises OSError as `work` does, and what `wait_until_ready` raises.
        """
        task = Task(work)
        found = self._signals.wait_readable(task.fileno(), self._socket.fileno())
        if task.fileno() in found:
            task.result()
        else:
            self._hear()

    def keep(self) -> None:
        """Let the mount stay. Raises what `wait_until_ready` raises."""
        self._signals.check()
        # If the daemon has ended meanwhile, it has said why, and `_hear` raises that.
        with contextlib.suppress(OSError):
            self._socket.send(KEEP)
        self._hear()
        self._socket.close()
        self._signals.ignore()

    def abandon(self) -> bool:
        """Return once no process of the daemon is left; whether it ended by itself."""
        self._socket.close()
        by_itself = True
        try:
            self._daemon.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            by_itself = False
            os.killpg(self._daemon.pid, signal.SIGKILL)
            self._daemon.wait()
        # The rest of its process group, such as a data plane, ends because the daemon has ended.
        deadline = time.monotonic() + _REST_SECONDS
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                with contextlib.suppress(PermissionError):
                    os.killpg(self._daemon.pid, 0)
                time.sleep(_POLL_SECONDS)
        return by_itself

    def _hear(self) -> dict[str, str]:
        try:
            message = self._socket.recv(_MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            raise self._died()
        answer: dict[str, str] = json.loads(message)
        if "error" in answer:
            raise Said(answer)
        return answer

    def _died(self) -> DaemonDied:
        """The daemon has closed its end of the socket without a word."""
        status = self._daemon.wait()
        lines = os.pread(self._stderr, _MESSAGE_BYTES, 0).decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return DaemonDied(how=how + (f": {said[-1]}" if said else ""))
