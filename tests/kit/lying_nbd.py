"""An NBD server that does what no server should: it is told what to do instead of an answer."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

_MAGIC, _OPTION, _OPTION_REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_GO, _ACK, _INFO, _UNSUPPORTED = 7, 1, 3, 0x80000001
_FLAGS = 0b1_0110_1101
"""It has flags, flushes, trims, zeroes, and its connections see each other's writes."""
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZERO = 0, 1, 2, 3, 4, 6

Lie = Callable[["LyingServer", socket.socket, bytes], None]
"""Answers a request, whose handle it is given, in its own way, and ends the connection."""


class LyingServer:
    """An export in memory. What was not flushed is forgotten by `crash`."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.stored = bytearray(size_bytes)
        self._durable = bytearray(size_bytes)
        self.lies: dict[int, Lie] = {}
        """By the command."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def text(self) -> str:
        """Its export as an origin."""
        return f"nbd://127.0.0.1:{self._listener.getsockname()[1]}/"

    def crash(self) -> None:
        """Forget what was not flushed."""
        self.stored[:] = self._durable

    def close(self) -> None:
        """End it."""
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            self._ends.append(end)
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        try:
            with end:
                self._shake_hands(end)
                while self._answer(end):
                    pass
        except (OSError, EOFError):
            pass

    def _shake_hands(self, end: socket.socket) -> None:
        end.sendall(_MAGIC + _OPTION + struct.pack(">H", 0b11))
        _received(end, 4)
        while True:
            _, option, length = struct.unpack(">8sII", _received(end, 16))
            _received(end, length)
            if option != _GO:
                end.sendall(_option_reply(option, _UNSUPPORTED))
                continue
            info = struct.pack(">HQH", 0, self.size_bytes, _FLAGS)
            end.sendall(_option_reply(option, _INFO, info) + _option_reply(option, _ACK))
            return

    def _answer(self, end: socket.socket) -> bool:
        _, _, command, handle, offset, length = struct.unpack(">IHH8sQI", _received(end, 28))
        data = _received(end, length) if command == WRITE else b""
        if command == DISCONNECT:
            return False
        if command == WRITE:
            self.stored[offset : offset + length] = data
        elif command in (TRIM, ZERO):
            self.stored[offset : offset + length] = bytes(length)
        elif command == FLUSH:
            self._durable[:] = self.stored
        lie = self.lies.get(command)
        if lie is not None:
            lie(self, end, handle)
            return False
        answer = self.stored[offset : offset + length] if command == READ else b""
        end.sendall(reply(handle) + answer)
        return True


def reply(handle: bytes, error: int = 0) -> bytes:
    """The head of a simple reply."""
    return struct.pack(">II8s", _REPLY, error, handle)


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data


def _received(end: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = end.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
