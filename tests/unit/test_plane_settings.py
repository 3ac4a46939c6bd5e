"""What a data plane is started with, on machines of any size and for users of any rights."""

from __future__ import annotations

import pytest

from pmemfs.fuse import planes
from pmemfs.fuse.planes import Sockets, choose_settings
from pmemfs.units import KIB, MIB


@pytest.mark.parametrize("transport", ["uring", "fd"])
@pytest.mark.parametrize(
    ("message_bytes", "max_write"),
    [(212_960, 128 * KIB), (MIB, 128 * KIB), (MIB + 4 * KIB, MIB), (16 * MIB, MIB)],
)
def test_requests_are_as_large_as_a_message_of_the_sockets_allows(
    transport: str, message_bytes: int, max_write: int
) -> None:
    settings = choose_settings(transport, message_bytes)
    assert settings.max_write == max_write
    assert settings.max_write + 4 * KIB <= message_bytes


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64, 256])
def test_every_possible_cpu_has_a_queue_and_they_share_the_memory(
    monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    monkeypatch.setattr(planes, "possible_cpu_count", lambda: cpus)
    settings = choose_settings("uring", 16 * MIB)
    assert settings.queue_count == cpus
    assert settings.worker_count == cpus + 1
    assert 4 <= settings.depth <= 32
    assert settings.queue_count * settings.depth * settings.max_write <= 64 * MIB
    assert settings.max_write == (MIB if cpus <= 16 else 64 * MIB // cpus // 4)


def test_the_other_transport_has_a_reader_for_each_cpu_and_no_queue() -> None:
    settings = choose_settings("fd", 16 * MIB)
    assert settings.queue_count == 0
    assert settings.worker_count == settings.reader_count >= 1


def test_a_message_of_the_promised_size_passes_the_sockets_whole() -> None:
    sockets = Sockets()
    try:
        data = b"x" * min(sockets.message_bytes, MIB + 4 * KIB)
        assert sockets.forwarded[0].send(data) == len(data)
        assert sockets.their_forwarded[0].recv(2 * MIB) == data
    finally:
        sockets.close()
        sockets.close_theirs()
