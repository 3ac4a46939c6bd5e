"""Starting a guest and attending to it until it is off.

Holds:
- the command's stdout and stderr are passed on live, each byte of theirs and no other. They have a
  virtio port each, away from the kernel's messages on the serial line;
- each ends with a marker that can't be guessed. Without both markers and the status the run is a
  failure, never a short output with a good status;
- when this returns or raises, QEMU is dead.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO

from failures import GuestError, Status, say
from machine import port_arguments

POWER_OFF_SECONDS = 30
CONSOLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Orders:
    """How to attend: what ends the streams, and what ends the guest early."""

    marker: bytes
    timeout_seconds: float | None
    kill_line: bytes | None
    verbose: bool


class CommandStream:
    """Passes on one stream of the command, as it comes, up to the marker that ends it.

    After a line equal to `kill_line`, `killed` is true and nothing more is passed on.
    """

    def __init__(self, sink: BinaryIO, marker: bytes, kill_line: bytes | None = None) -> None:
        self.ended = False
        self.killed = False
        self._sink = sink
        self._marker = marker
        self._kill_line = kill_line
        self._held = b""
        self._line = b""

    def feed(self, data: bytes) -> None:
        """Take what has come, and hold back only what may be the beginning of the marker."""
        body, found, _ = (self._held + data).partition(self._marker)
        self.ended = bool(found)
        held_length = 0 if found else self._marker_beginning_in(body)
        passed_length = len(body) - held_length
        self._held = body[passed_length:]
        self._pass_on(body[:passed_length])

    def _marker_beginning_in(self, body: bytes) -> int:
        """The length of the longest end of `body` that the marker begins with."""
        longest = min(len(body), len(self._marker) - 1)
        return next((n for n in range(longest, 0, -1) if body.endswith(self._marker[:n])), 0)

    def _pass_on(self, body: bytes) -> None:
        if self._kill_line is not None:
            body = self._up_to_kill_line(body, self._kill_line)
        self._sink.write(body)
        self._sink.flush()

    def _up_to_kill_line(self, body: bytes, kill_line: bytes) -> bytes:
        """`body`, cut after the kill line if that is complete now."""
        begun = self._line
        text = begun + body
        # A line begins where the text begins: a newline before it makes all lines alike.
        start = (b"\n" + text).find(b"\n" + kill_line + b"\n")
        if start >= 0:
            self.killed = True
            return text[len(begun) : start + len(kill_line) + 1]
        self._line = text.rpartition(b"\n")[2]
        return body


class ControlLine:
    """What `inside` says of the run; the words are listed there."""

    def __init__(self, port: socket.socket) -> None:
        self.ready_at: float | None = None
        self.failure: str | None = None
        self.status: int | None = None
        self._port = port
        self._begun = b""

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            match word:
                case "ready":
                    self.ready_at = time.monotonic()
                case "note":
                    say(text)
                case "failed":
                    self.failure = text
                case "exit":
                    self.status = int(text)

    def let_power_off(self) -> None:
        """Answer that everything has been read."""
        # A guest that has just died needs no answer.
        with contextlib.suppress(OSError):
            self._port.sendall(b"\n")


class Attendance:
    """One guest, from its first boot message to its end."""

    def __init__(
        self, process: subprocess.Popen[bytes], ports: Mapping[str, socket.socket], orders: Orders
    ) -> None:
        self.console = b""
        self.stdout = CommandStream(sys.stdout.buffer, orders.marker, orders.kill_line)
        self.stderr = CommandStream(sys.stderr.buffer, orders.marker)
        self.control = ControlLine(ports["control"])
        self.done_at: float | None = None
        self._started_at = time.monotonic()
        self._process = process
        self._orders = orders
        self._selector = selectors.DefaultSelector()
        assert process.stdout is not None
        sources: dict[IO[bytes] | socket.socket, Callable[[bytes], None]] = {
            process.stdout: self._feed_console,
            ports["stdout"]: self.stdout.feed,
            ports["stderr"]: self.stderr.feed,
            ports["control"]: self.control.feed,
        }
        for source, feed in sources.items():
            self._selector.register(source, selectors.EVENT_READ, feed)

    def exit_status(self) -> int:
        """Attend to the end; the command's exit status, or GuestError."""
        while self._selector.get_map() and not self.stdout.killed:
            if self._is_overdue():
                break
            self._serve_what_has_come()
        else:
            # All four ends of QEMU are closed, or it was killed.
            self._process.wait()
        if self.stdout.killed:
            return Status.KILLED
        if self._orders.verbose:
            self._tell_times()
        return self._outcome()

    def _outcome(self) -> int:
        if self.control.failure is not None:
            raise GuestError(Status.GUEST_FAILED, self.control.failure, self.console)
        if self.done_at is not None and self.control.status is not None:
            return self.control.status
        if self._process.returncode is None:
            raise self._timeout()
        raise GuestError(
            Status.GUEST_FAILED, "the guest stopped before the command had ended", self.console
        )

    def _serve_what_has_come(self) -> None:
        deadline = self._deadline()
        wait_seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(wait_seconds):
            try:
                data = os.read(key.fd, 1 << 16)
            except ConnectionResetError:
                data = b""
            if data:
                key.data(data)
            else:
                self._selector.unregister(key.fileobj)
            if self.stdout.killed:
                # At once: every further instruction of the guest is one after the power failure.
                self._process.kill()
                return
        if self.done_at is None and self._is_done():
            self.done_at = time.monotonic()
            self.control.let_power_off()

    def _is_done(self) -> bool:
        ended = self.stdout.ended and self.stderr.ended and self.control.status is not None
        return ended or self.control.failure is not None

    def _deadline(self) -> float | None:
        """The end of the time limit, or sooner once there is only power-off to wait for."""
        if self.done_at is not None:
            return self.done_at + POWER_OFF_SECONDS
        if self._orders.timeout_seconds is None:
            return None
        return self._started_at + self._orders.timeout_seconds

    def _is_overdue(self) -> bool:
        deadline = self._deadline()
        return deadline is not None and time.monotonic() >= deadline

    def _timeout(self) -> GuestError:
        limit = f"{self._orders.timeout_seconds:g} s"
        if self.control.ready_at is None:
            sentence = f"the guest had not booted after {limit}"
            return GuestError(Status.TIMEOUT, sentence, self.console)
        return GuestError(Status.TIMEOUT, f"the command was still running after {limit}, killed")

    def _feed_console(self, data: bytes) -> None:
        if self._orders.verbose:
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        else:
            self.console = (self.console + data)[-CONSOLE_BYTES:]

    def _tell_times(self) -> None:
        instants = (self._started_at, self.control.ready_at, self.done_at, time.monotonic())
        names = ("boot", "command", "power-off")
        times = [
            f"{name} {end - start:.1f} s"
            for name, start, end in zip(names, instants, instants[1:], strict=False)
            if start is not None and end is not None
        ]
        say(", ".join(times))


def attend(command: list[str], descriptors: Sequence[int], orders: Orders) -> int:
    """Start QEMU with the ports and attend to it; the command's exit status."""
    with contextlib.ExitStack() as stack:
        host_ends, guest_ends = {}, {}
        for name in ("stdout", "stderr", "control"):
            host_end, guest_end = socket.socketpair()
            host_ends[name] = stack.enter_context(host_end)
            guest_ends[name] = stack.enter_context(guest_end)
        process = stack.enter_context(
            started(
                [*command, "-serial", "stdio", *port_arguments(guest_ends)],
                [*descriptors, *(end.fileno() for end in guest_ends.values())],
            )
        )
        # QEMU has them now; a copy here would keep them from ending with it.
        for guest_end in guest_ends.values():
            guest_end.close()
        return Attendance(process, host_ends, orders).exit_status()


@contextlib.contextmanager
def started(command: list[str], descriptors: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU, with its own complaints among the boot messages; dead in the end, in every case.

    In a session of its own, so that Ctrl-C reaches this process first.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
