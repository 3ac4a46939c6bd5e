"""What only NBD's servers do: they slow down, fail, hang, die, and come back as something else."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from kit.lying_nbd import WRITE, LyingServer, reply
from kit.origins import SIZE_BYTES, NbdServer
from kit.processes import wait_until
from kit.sources import sparse_file
from pmemfs.errors import NeedsPackage, OriginGone, UnusableOrigin
from pmemfs.origin import nbd
from pmemfs.origin.opening import open_origin
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache.link import LinkState, OriginLink

PAGE = 4 * KIB


@pytest.fixture
def memory() -> memoryview:
    """Pages that are aligned as those of a pool are."""
    return memoryview(mmap.mmap(-1, MIB))


class Server:
    """Starts servers of one file on one socket, and ends them."""

    def __init__(self, shm: Path) -> None:
        self.file = sparse_file(shm / "origin", SIZE_BYTES)
        self.socket = shm / "socket"
        self.running: NbdServer | None = None

    def start(self, *options: object, words: tuple[object, ...] = ()) -> NbdServer:
        """Start nbdkit with filters and settings."""
        if self.running is not None:
            self.running.end()
        plugin = (*options, "file", f"file={self.file}", *words)
        self.running = NbdServer(*plugin, socket_path=self.socket)
        return self.running


@pytest.fixture
def server(shm: Path) -> Iterator[Server]:
    made = Server(shm)
    yield made
    if made.running is not None:
        made.running.end()


def test_what_was_under_way_is_lost_with_the_server_and_the_next_call_finds_the_new_one(
    server: Server, memory: memoryview
) -> None:
    slow = server.start("--filter=delay", words=("rdelay=60",))

    async def main() -> None:
        origin = await open_origin(slow.text)
        await origin.write(0, [memory[:PAGE]])
        lost = []

        async def read(page: int) -> None:
            with pytest.raises(OriginGone):
                await origin.read(page * PAGE, [memory[page * PAGE : (page + 1) * PAGE]])
            lost.append(page)

        async with trio.open_nursery() as nursery:
            for page in range(16):
                nursery.start_soon(read, page)
            await trio.sleep(0.2)
            slow.end()
        assert len(lost) == 16
        with pytest.raises(OriginGone) as alone:
            await origin.read(0, [memory[:PAGE]])
        assert alone.value.errno == errno.ENOTCONN
        server.start()
        memory[:PAGE] = os.urandom(PAGE)
        await origin.write(0, [memory[:PAGE]])
        await origin.read(0, [memory[PAGE : 2 * PAGE]])
        assert memory[:PAGE] == memory[PAGE : 2 * PAGE]
        await origin.close()

    trio.run(main)


def test_a_flush_tells_that_writes_were_lost_with_the_server(
    server: Server, memory: memoryview
) -> None:
    first = server.start()

    async def main() -> None:
        origin = await open_origin(first.text)
        losses = origin.losses
        await origin.write(0, [memory[:PAGE]])
        await origin.flush(losses)
        server.start()
        # All was durable, so nothing is lost; the first call only learns that its server is gone.
        with pytest.raises(OriginGone):
            await origin.read(0, [memory[:PAGE]])
        assert origin.losses == losses
        await origin.write(0, [memory[:PAGE]])
        server.start()
        with pytest.raises(OriginGone):
            await origin.read(0, [memory[:PAGE]])
        assert origin.losses == losses + 1
        # Whoever wrote before learns it, although others have written and flushed since.
        now = origin.losses
        await origin.write(PAGE, [memory[:PAGE]])
        await origin.flush(now)
        with pytest.raises(OriginGone, match="not flushed"):
            await origin.flush(losses)
        await origin.write(0, [memory[:PAGE]])
        await origin.flush(now)
        await origin.flush()
        await origin.close()

    trio.run(main)


def test_a_server_that_hangs_is_cut_off_and_touches_no_page_afterwards(
    server: Server, memory: memoryview
) -> None:
    running = server.start()

    async def main() -> None:
        origin = await open_origin(running.text)
        running.stop()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(OriginGone):
                    await origin.read(0, [memory[:PAGE]])

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await origin.cut()
        memory[:PAGE] = b"x" * PAGE
        os.kill(running.pid, signal.SIGCONT)
        await origin.read(PAGE, [memory[PAGE : 2 * PAGE]])
        assert memory[:PAGE] == b"x" * PAGE
        await origin.close()

    trio.run(main)


def test_an_error_of_the_server_is_the_errno_that_it_gave(
    server: Server, memory: memoryview
) -> None:
    words = ("error-pread-rate=100%", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    running = server.start("--filter=error", words=words)

    async def main() -> None:
        origin = await open_origin(running.text)
        for number, attempt in (
            (errno.EIO, origin.read(0, [memory[:PAGE]])),
            (errno.ENOSPC, origin.write(0, [memory[:PAGE]])),
        ):
            with pytest.raises(OSError, match=r"\w") as caught:
                await attempt
            assert not isinstance(caught.value, OriginGone)
            assert caught.value.errno == number
        await origin.close()

    trio.run(main)


def test_a_cache_gets_through_errors_that_pass(server: Server, memory: memoryview) -> None:
    running = server.start("--filter=error", words=("error-pread-rate=20%",))

    async def main() -> None:
        origin = await open_origin(running.text)
        link, failed = OriginLink(origin, timeout_seconds=30), 0
        for number in range(100):
            try:
                await link.read(number * PAGE, [memory[:PAGE]])
            except OSError:
                failed += 1
        # Three attempts fail together in one of 125.
        assert failed < 20
        assert link.errors >= link.retries > 0
        assert link.read_bytes == (100 - failed) * PAGE
        await origin.close()

    trio.run(main)


def test_a_cache_waits_for_a_server_that_comes_back(server: Server, memory: memoryview) -> None:
    running = server.start()

    async def main() -> None:
        origin = await open_origin(running.text)
        link = OriginLink(origin, timeout_seconds=30)
        await link.read(0, [memory[:PAGE]])
        running.end()
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(link.read, 0, [memory[:PAGE]])
            with trio.fail_after(60):
                while link.state is not LinkState.AWAY:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert "is away" in link.last_error
            server.start()
        assert link.state is LinkState.PRESENT
        assert link.read_bytes == 9 * PAGE
        await origin.close()

    trio.run(main)


def test_a_server_that_comes_back_smaller_stays_away(server: Server, memory: memoryview) -> None:
    running = server.start()

    async def main() -> None:
        origin = await open_origin(running.text)
        running.end()
        os.truncate(server.file, SIZE_BYTES // 2)
        server.start()
        with pytest.raises(OriginGone):
            await origin.read(0, [memory[:PAGE]])
        with pytest.raises(OriginGone, match=f"has {SIZE_BYTES // 2} bytes"):
            await origin.read(0, [memory[:PAGE]])
        await origin.close()

    trio.run(main)


@pytest.mark.parametrize(
    ("options", "words", "why"),
    [
        (("-r",), (), "for reading only"),
        (("--filter=truncate",), ("truncate=1000",), "not a multiple of 512"),
        (("--filter=truncate",), ("truncate=0",), "it is empty"),
        (("--filter=blocksize-policy",), ("blocksize-minimum=64K", "blocksize-preferred=64K"),
         "smaller than 65536"),
        (("--filter=blocksize-policy",), ("blocksize-maximum=64K",), "larger than 65536"),
    ],
)  # fmt: skip
def test_an_export_that_can_not_be_an_origin_is_refused_with_the_reason(
    server: Server, options: tuple[str, ...], words: tuple[str, ...], why: str
) -> None:
    running = server.start(*options, words=words)
    with pytest.raises(UnusableOrigin, match=why):
        trio.run(open_origin, running.text)


@pytest.mark.parametrize(("says", "most"), [("multi-conn-mode=unsafe", 4),
                                            ("multi-conn-mode=disable", 1)])  # fmt: skip
def test_as_many_connections_are_made_as_the_server_takes_together(
    server: Server, memory: memoryview, says: str, most: int
) -> None:
    running = server.start("--filter=multi-conn", "--filter=delay", words=("rdelay=50ms", says))

    async def main() -> None:
        origin = await open_origin(running.text)
        # Who asked whether it listens may have been seen after us, and is gone soon.
        wait_until(lambda: sockets_of(running.pid) == 1, "the server has the one connection")
        # One more is made in a round at least, if it is wanted.
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for page in range(128):
                    view = memory[page * PAGE : (page + 1) * PAGE]
                    nursery.start_soon(origin.read, page * PAGE, [view])
        assert sockets_of(running.pid) == most
        await origin.close()

    trio.run(main)


def sockets_of(pid: int) -> int:
    """How many connections a server has, without the socket that it listens on."""
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            count += os.readlink(fd).startswith("socket:")
    return count - 1


def test_a_server_that_takes_one_connection_gets_one(server: Server, memory: memoryview) -> None:
    running = server.start("--filter=limit", "--filter=delay", words=("limit=1", "rdelay=10ms"))

    async def main() -> None:
        origin = await open_origin(running.text)
        async with trio.open_nursery() as nursery:
            for page in range(64):
                view = memory[page * PAGE : (page + 1) * PAGE]
                nursery.start_soon(origin.read, page * PAGE, [view])
        await origin.close()

    trio.run(main)


def test_a_server_may_want_tls_as_the_uri_says(shm: Path, memory: memoryview) -> None:
    file, keys, path = sparse_file(shm / "origin", SIZE_BYTES), shm / "keys", shm / "socket"
    keys.write_text(f"alice:{os.urandom(16).hex()}\n")
    keys.chmod(0o600)
    secret = NbdServer("file", f"file={file}", "--tls=require", f"--tls-psk={keys}",
                       socket_path=path)  # fmt: skip

    async def main() -> None:
        with pytest.raises(OriginGone):
            await open_origin(secret.text)
        origin = await open_origin(f"nbds+unix://alice@/?socket={path}&tls-psk-file={keys}")
        async with trio.open_nursery() as nursery:
            for page in range(128):
                view = memory[page * PAGE : (page + 1) * PAGE]
                view[:] = bytes([page]) * PAGE
                nursery.start_soon(origin.write, page * PAGE, [view])
        await origin.flush()
        async with trio.open_nursery() as nursery:
            for page in range(128):
                view = memory[(127 - page) * PAGE : (128 - page) * PAGE]
                nursery.start_soon(origin.read, page * PAGE, [view])
        for page in range(128):
            assert memory[(127 - page) * PAGE : (128 - page) * PAGE] == bytes([page]) * PAGE
        await origin.close()

    trio.run(main)
    secret.end()


def test_where_nobody_listens_the_origin_is_away(shm: Path) -> None:
    with pytest.raises(OriginGone, match="is away") as caught:
        trio.run(open_origin, f"nbd+unix:///?socket={shm}/none")
    assert "\n" not in str(caught.value)
    assert "nbd_" not in str(caught.value)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "LIBRARY", "libnbd-that-nobody-has.so.0")
    with pytest.raises(NeedsPackage) as caught:
        trio.run(open_origin, "nbd://host/x")
    assert "libnbd0" in str(caught.value)
    assert "scripts/install-origins" in str(caught.value)


def test_a_write_whose_answer_comes_with_the_end_of_the_connection_may_be_lost(
    memory: memoryview,
) -> None:
    def answer_and_die(server: LyingServer, end: socket.socket, handle: bytes) -> None:
        server.lies.clear()
        server.crash()
        # Kept back by the kernel until the end follows.
        end.send(reply(handle), socket.MSG_MORE)
        end.shutdown(socket.SHUT_RDWR)

    async def main() -> None:
        liar = LyingServer(MIB)
        origin = await open_origin(liar.text)
        losses = origin.losses
        liar.lies[WRITE] = answer_and_die
        await origin.write(0, [memory[:PAGE]])
        with pytest.raises(OriginGone, match="not flushed"):
            await origin.flush(losses)
        await origin.write(0, [memory[:PAGE]])
        await origin.flush(origin.losses)
        await origin.close()
        liar.close()

    trio.run(main)
