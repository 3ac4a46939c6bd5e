"""Writers of records that say which they are: what was acknowledged must be there later."""

from __future__ import annotations

import os
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.posix import opened

RECORD_BYTES = 4096
SLOTS_PER_WRITER = 400
WRITERS = 4
_HEAD = struct.Struct("<QQI")


def record(slot: int, number: int) -> bytes:
    """A record that says where it belongs and which one it is, with a checksum over all of it."""
    body = random.Random(slot << 32 | number).randbytes(RECORD_BYTES - _HEAD.size)
    return _HEAD.pack(slot, number, zlib.crc32(body)) + body


def number_of(raw: bytes, slot: int) -> int:
    """The number of the record in a slot, which must be whole; 0 where none was written."""
    stored_slot, number, checksum = _HEAD.unpack_from(raw)
    if number == 0:
        assert raw == bytes(RECORD_BYTES)
        return 0
    assert stored_slot == slot
    assert checksum == zlib.crc32(raw[_HEAD.size :])
    return int(number)


class Writer(threading.Thread):
    """Writes numbered records to random slots of its own, and knows what was acknowledged."""

    def __init__(self, name: int) -> None:
        super().__init__(daemon=True)
        self.first_slot = name * SLOTS_PER_WRITER
        self.random = random.Random(name)
        self.acknowledged = [0] * SLOTS_PER_WRITER
        self.under_way: int | None = None
        self.number = 0
        self.count = 0
        self.error: OSError | None = None

    def prepare(self, device: Path) -> None:
        """Begin another round."""
        super().__init__(daemon=True)
        self.device = device
        self.under_way = None
        self.error = None
        self.count = 0

    def run(self) -> None:
        try:
            with opened(self.device, os.O_RDWR) as fd:
                while True:
                    slot = self.random.randrange(SLOTS_PER_WRITER)
                    self.number += 1
                    self.under_way = slot
                    data = record(self.first_slot + slot, self.number)
                    written = os.pwrite(fd, data, (self.first_slot + slot) * RECORD_BYTES)
                    assert written == RECORD_BYTES
                    self.acknowledged[slot] = self.number
                    self.under_way = None
                    self.count += 1
        except OSError as error:
            self.error = error

    def check(self, fd: int) -> None:
        """Every acknowledged record is there; the one that was under way may be, or not."""
        for slot, acknowledged in enumerate(self.acknowledged):
            here = self.first_slot + slot
            raw = os.pread(fd, RECORD_BYTES, here * RECORD_BYTES)
            if slot == self.under_way:
                # Whatever is there now must be overwritten whole before it counts again.
                os.pwrite(fd, record(here, acknowledged or 1), here * RECORD_BYTES)
                self.acknowledged[slot] = acknowledged or 1
                if raw[: _HEAD.size] == record(here, self.number)[: _HEAD.size]:
                    continue
                if raw == bytes(RECORD_BYTES):
                    assert acknowledged == 0
                    continue
            assert number_of(raw, here) == acknowledged


@contextmanager
def writing(writers: list[Writer], device: Path) -> Iterator[None]:
    for writer in writers:
        writer.prepare(device)
        writer.start()
    yield
    for writer in writers:
        writer.join(timeout=30)
        assert not writer.is_alive(), "a write waits for a daemon that is dead"
        assert writer.error is not None
