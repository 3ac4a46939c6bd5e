"""The daemon's end of its start: it says how the start went, and hears if its mount should stay.

    daemon -> command   {"waiting": SENTENCE}  the mount can't be made yet; any number of these
    daemon -> command   {"ready": DEVICE}      the mount is made, and answers
    command -> daemon   keep                   the command has seen that, and the mount should stay
    daemon -> command   {"kept": DEVICE}       it stays: the command succeeds
    daemon -> command   {"error": SENTENCE}    there is no mount, and nothing is left of one; with
                                               "busy" another process has the pool, with "usage"
                                               the user asked for something impossible

These are messages of a SOCK_SEQPACKET socket; `control/launch` is the command's end. Invariant: a
mount stays only if the command has said so. A command that was killed, or that does not like what
it sees, just closes the socket. The daemon then sends itself SIGTERM, so it ends as it would end by
any user's signal, however far it has come.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pmemfs.errors import EXIT_USAGE, Interrupted, PmemfsError
from pmemfs.mountinfo import Mount

log = logging.getLogger(__name__)

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KEEP = b"keep"


class Starter:
    """The command that started this process, and systemd. Without a socket the mount just stays."""

    def __init__(self, fd: int | None, *, is_kept: bool = False) -> None:
        self._socket = None if fd is None else socket.socket(fileno=fd)
        self.is_kept = is_kept
        """Whether the mount was kept: only then its end is not a failure."""
        self.ended_by: int | None = None
        """The signal that has ended the mount."""
        self._has_failed = False
        self._is_over = False
        self._lock = threading.Lock()
        self._device = ""
        self._may_raise = False
        # It stays there for successors, which may have another keeper to report.
        self._systemd = os.environ.get("NOTIFY_SOCKET", "")
        self._when_kept: Callable[[], None] | None = None
        if self._socket is not None:
            threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def say_waiting(self, sentence: str) -> None:
        """Report what keeps the mount from being made for a while."""
        self._say({"waiting": sentence})

    def say_ready(self, mount: Mount) -> None:
        """Report that the mount is made and answers."""
        if not self.is_kept:
            self._notify_systemd("READY=1")
        if self._socket is None:
            with self._lock:
                self.is_kept = True
            if self._when_kept:
                self._when_kept()
        else:
            self._device = mount.device
            self._say({"ready": mount.device})

    def say_keeper(self, pid: int) -> None:
        """Report the process that the mount lasts as long as, in place of this one."""
        # A unit is over as soon as its main process is.
        self._notify_systemd(f"MAINPID={pid}")

    def when_kept(self, call: Callable[[], None]) -> None:
        """Call something once the mount is kept, in whatever thread. The command waits for
        `say_kept` then."""
        with self._lock:
            if not self.is_kept:
                self._when_kept = call
                return
        call()

    def say_kept(self) -> None:
        """Report that the mount stays, whatever dies of its processes."""
        with self._lock:
            connection, self._socket = self._socket, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.send(json.dumps({"kept": self._device}).encode())
            connection.close()
            _say_no_more()

    def end(self) -> None:
        """The mount is about to end: if it is not kept by now, it never will be."""
        with self._lock:
            self._is_over = True
        if self.is_kept:
            # It may have ended before anything was there to outlive its processes.
            self.say_kept()

    def say_failed(self, sentence: str, cause: PmemfsError | None = None) -> None:
        """Report that there is no mount, and why; `cause` is the error, if it is one of ours."""
        self._has_failed = True
        kind: dict[str, str] = {}
        if cause is not None:
            kind = {"kind": cause.kind, "errno": str(cause.errno)}
            if cause.exit_code == EXIT_USAGE:
                kind["usage"] = "yes"
        self._say({"error": sentence, **kind})

    def note_signals(self) -> None:
        """From now on note an ending signal in `ended_by`."""
        # Ignoring them instead would lose some. An imported library may have a thread that does not
        # block these signals, and such a thread would take an ignored signal and drop it.
        for number in ENDING_SIGNALS:
            signal.signal(number, self._note)

    @contextlib.contextmanager
    def endable(self) -> Iterator[None]:
        """While this lasts, an ending signal raises Interrupted wherever the main thread is.

        A signal that came before raises at once. In a daemon that takes a mount over none does:
        first it has to have what it is to end.
        """
        if self.is_kept:
            yield
            return
        self._may_raise = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        try:
            self.check()
            yield
        finally:
            self._may_raise = False
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        # Python drops what is raised in a finalizer, for example, so ask once more.
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.ended_by is not None:
            raise Interrupted(self.ended_by)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Only the first: a second signal must not break off what the first one has begun to end.
        if self.ended_by is None:
            self.ended_by = number
            if self._may_raise:
                raise Interrupted(number)

    def _listen(self, connection: socket.socket) -> None:
        """Listen in a thread of its own, because the main thread may be busy for long."""
        with contextlib.suppress(OSError):
            if connection.recv(len(KEEP)) == KEEP:
                with self._lock:
                    if self._is_over:
                        # The mount has ended, so it can't be kept: `say_failed` says why.
                        return
                    self.is_kept = True
                if self._when_kept:
                    self._when_kept()
                else:
                    self.say_kept()
                return
        if not self._has_failed:
            log.warning("the command that started this daemon has gone, or does not keep the mount")
            os.kill(os.getpid(), signal.SIGTERM)

    def _notify_systemd(self, said: str) -> None:
        """See sd_notify(3)."""
        if self._systemd:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.sendto(said.encode(), self._systemd.replace("@", "\0", 1))

    def _say(self, message: dict[str, str]) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(json.dumps(message).encode())


def _say_no_more() -> None:
    """Let go of the standard error, which the command reads only if this process dies early."""
    fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(fd, 2)
    os.close(fd)
