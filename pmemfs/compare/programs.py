"""Running programs so that an interrupt reaches us alone, and we end them in our own order."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

from pmemfs.errors import Interrupted, WorkloadFailed

_ENDING_SECONDS = 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Finished(NamedTuple):
    """A program that ended by itself."""

    code: int
    out: str
    err: str


def run_program(command: Sequence[str], timeout_seconds: float) -> Finished:
    """Run a program to its end. Raises WorkloadFailed if it doesn't end in time.

    It has a session of its own: Ctrl-C at a terminal is for us, and `pmemfs mount` must not be
    interrupted between the mount and our knowing of it. Output goes to files, because a daemon that
    keeps its starter's standard output would keep a pipe open.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                cwd=tempfile.gettempdir(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise WorkloadFailed(what=command[0], why=(error.strerror or "").lower()) from None
        try:
            code = process.wait(timeout_seconds)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                why = f"it has not ended after {timeout_seconds:.0f} s"
                raise WorkloadFailed(what=command[0], why=why) from None
            raise
        out.seek(0)
        err.seek(0)
        return Finished(code, out.read(), err.read())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it has started and not given a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_SECONDS)
            return


class Interrupts:
    """Lets the first SIGINT, SIGTERM or SIGHUP break off the work, and nothing the cleaning up.

    A signal raises KeyboardInterrupt, which no code takes for a result of the comparison; at the
    end of `taken` it is Interrupted, with the signal's name.
    """

    def __init__(self) -> None:
        self._number = 0
        self._is_held = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals over. Raises Interrupted if one came."""
        # What our caller ignores, as nohup(1) does with SIGHUP, stays ignored.
        mine = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in mine}
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(self._number or signal.SIGINT) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is done meanwhile is done to its end; a signal that came counts after it."""
        was_held, self._is_held = self._is_held, True
        number_before = self._number
        try:
            yield
        finally:
            self._is_held = was_held
        if self._number and not number_before and not was_held:
            raise KeyboardInterrupt

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._number:
            return
        self._number = number
        if not self._is_held:
            raise KeyboardInterrupt
