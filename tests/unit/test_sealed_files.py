"""Encrypted files in the data plane: what lies in the pool, edges that two write, locks, faults."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kit.data_plane import READ, WRITE, Tables, extent, read_in, some_tables, write_in
from kit.poison import in_child, poisoner
from kit.processes import readable_memory
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import CONTROL_HOLDER, Extent, Presence
from pmemfs.dataplane.native import PageLocks, Responder, load_word, store_word
from pmemfs.media.inode import LIVE_OFFSET
from pmemfs.media.live import LIVE_LINE, SIZE_SHIFT, line_key, redo_check, size_word
from pmemfs.medium.base import Durability, Medium
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.transform.secrets import Secrets, create_secrets
from pmemfs.volume.fs.encryptedio import EncryptedIO
from pmemfs.volume.fs.inode import Inode, State
from pmemfs.volume.fs.livelines import LiveLines
from pmemfs.volume.fs.log import Log

INODE = 0x4321_5678
SLOT = 7
KEY = hashlib.sha512(b"no text of any program").digest()
FORWARDED = ("forward", 0, b"")
FRAMES = 24
SIZE = FRAMES * FRAME_BYTES
ROUNDS = 400


@dataclass
class Sealed:
    """An encrypted file of two runs, its key, and its workers."""

    tables: Tables
    secrets: Secrets
    live_offset: int
    workers: list[Responder] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workers = [self.worker(number) for number in range(2)]

    def worker(self, number: int) -> Responder:
        shared = self.tables.shared.fd
        flags = self.tables.map_flags
        return Responder(
            shared, self.tables.fd, flags, 1 << 20, number=number, points=bool(number),
            secrets_fd=self.secrets.fd,
        )  # fmt: skip

    @property
    def extents(self) -> list[Extent]:
        first = int(self.tables.pool.first_data_pfn) + 2
        return [extent(0, first + 40, 9), extent(9, first, FRAMES - 9)]

    def publish(self, size: int = SIZE, *, key_slot: int = SLOT + 1) -> None:
        store_word(self._line(), 0, size_word(size, line_key(INODE, 1, 1)))
        self.tables.shared.publish(
            INODE, size, self.extents, live_offset=self.live_offset, limit_bytes=SIZE,
            key_slot=key_slot,
        )  # fmt: skip

    def place_of(self, offset: int) -> int:
        """Where a byte of the file lies in the pool."""
        index, inside = divmod(offset, FRAME_BYTES)
        run = self.extents[index >= 9]
        return (run.pfn + index - run.index) * FRAME_BYTES + inside

    def write(self, offset: int, data: bytes, worker: int = 0) -> tuple[str, int, bytes]:
        return self.workers[worker].answer(
            write_in(offset, len(data)), opcode=WRITE, inode=INODE, payload=data
        )

    def read(self, offset: int, length: int, worker: int = 0) -> tuple[str, int, bytes]:
        return self.workers[worker].answer(read_in(offset, length), opcode=READ, inode=INODE)

    def stored(self) -> bytes:
        """All bytes of the file as they lie in the pool."""
        medium = self.tables.pool.medium
        return b"".join(
            bytes(medium.read(run.pfn * FRAME_BYTES, run.frame_count * FRAME_BYTES))
            for run in self.extents
        )

    @property
    def size(self) -> int:
        return load_word(self._line(), 0) >> SIZE_SHIFT

    def line(self) -> bytes:
        return bytes(self._line())

    def locks(self) -> PageLocks:
        medium = self.tables.pool.medium
        return PageLocks(self.tables.shared.memory, medium.view(0, medium.size_bytes))

    def _line(self) -> memoryview:
        view = self.tables.pool.medium.view(self.live_offset, LIVE_LINE.size_bytes)
        assert isinstance(view, memoryview)
        return view


def seal(plain: bytes) -> bytes:
    """What lies in the pool of a file with this content, by another implementation."""
    sealed = b""
    for unit in range(0, len(plain), FRAME_BYTES):
        tweak = (unit // FRAME_BYTES).to_bytes(16, "little")
        encryptor = Cipher(algorithms.AES(KEY), modes.XTS(tweak)).encryptor()
        sealed += encryptor.update(plain[unit : unit + FRAME_BYTES])
    return sealed


def wrapped_key() -> bytes:
    """The key, by a key file of these bytes."""
    wrapping = HKDF(SHA512(), 64, None, b"pmemfs key file").derive(b"file")
    return AESSIV(wrapping).encrypt(KEY, None)


@contextmanager
def a_sealed_file(directory: Path, durability: Durability, *, is_whole: bool) -> Iterator[Sealed]:
    fd = create_secrets()
    secrets = Secrets(fd)
    assert secrets.unwrap(SLOT, b"file", b"", 0, 0, 0, wrapped_key(), b"")
    with some_tables(directory, has_files=True) as tables:
        number = list(Durability).index(durability)
        tables.shared.set_header_word("durability", number)
        if is_whole:
            os.posix_fallocate(tables.fd, 0, tables.pool.medium.size_bytes)
            for chunk in range(tables.pool.medium.size_bytes >> layouts.CHUNK_SHIFT):
                tables.shared.set_presence(chunk, Presence.WHOLE)
        yield Sealed(tables, secrets, (int(tables.pool.first_data_pfn) + 1) * FRAME_BYTES + 64)
    os.close(fd)


KINDS = [
    (durability, is_whole) for durability in (Durability.VOLATILE, Durability.CACHE_LINES)
    for is_whole in (False, True)
]  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].name.lower()}-{kind[1]}")
def file(request: pytest.FixtureRequest, shm: Path) -> Iterator[Sealed]:
    durability, is_whole = request.param
    with a_sealed_file(shm, durability, is_whole=is_whole) as made:
        yield made


def filled(file: Sealed, seed: int = 1) -> bytearray:
    """Content that was written through the key."""
    plain = random.Random(seed).randbytes(SIZE)
    file.publish()
    verdict, error, _ = file.write(0, plain)
    assert (verdict, error) == ("answer", 0)
    return bytearray(plain)


def test_what_lies_in_the_pool_is_aes_xts_with_the_frame_in_the_file_as_tweak(file: Sealed) -> None:
    plain = filled(file)
    assert file.stored() == seal(bytes(plain))
    assert file.read(0, SIZE) == ("answer", 0, bytes(plain))
    assert file.read(0, SIZE, worker=1) == ("answer", 0, bytes(plain))


def test_reads_and_writes_of_any_bytes_are_those_of_a_plain_file(file: Sealed) -> None:
    plain = filled(file)
    choose = random.Random(2)
    for _ in range(ROUNDS):
        length = choose.choice([1, 3, 15, 16, 17, 100, 4095, 4096, 4097, 20000])
        offset = choose.choice([0, 16, 4096, choose.randrange(SIZE)])
        length = min(length, SIZE - offset)
        data = choose.randbytes(length)
        worker = choose.randrange(2)
        assert file.write(offset, data, worker)[:2] == ("answer", 0)
        plain[offset : offset + length] = data
        offset = choose.randrange(SIZE)
        length = choose.randrange(1, 9000)
        expected = bytes(plain[offset : offset + length])
        assert file.read(offset, length, 1 - worker) == ("answer", 0, expected)
    assert file.stored() == seal(bytes(plain))
    assert file.locks().holders() == []
    assert file.line()[24:32] == bytes(8), "no redo record is left"


def test_appends_of_any_length_follow_each_other(file: Sealed) -> None:
    file.publish(0)
    plain = b""
    choose = random.Random(3)
    while len(plain) < SIZE - 5000:
        data = choose.randbytes(choose.choice([1, 7, 16, 100, 333, 4096, 4999]))
        assert file.write(len(plain), data)[:2] == ("answer", 0)
        plain += data
        assert file.size == len(plain)
    assert file.read(0, SIZE) == ("answer", 0, plain)
    whole = len(plain) & -16
    assert file.stored()[:whole] == seal(plain + bytes(-len(plain) % 16))[:whole]


def test_what_no_extent_covers_reads_as_zeroes(file: Sealed) -> None:
    filled(file)
    shared = file.tables.shared
    shared.publish(INODE, SIZE, [file.extents[1]], live_offset=file.live_offset, key_slot=SLOT + 1)
    assert file.read(100, 1000) == ("answer", 0, bytes(1000))
    assert file.write(100, b"x") == FORWARDED


def test_without_its_key_a_file_is_forwarded_and_nothing_is_stored(file: Sealed) -> None:
    plain = filled(file)
    keyless = Responder(file.tables.shared.fd, file.tables.fd, file.tables.map_flags, 1 << 20)
    for worker in (keyless, file.workers[0]):
        asked = worker.answer(read_in(0, 100), opcode=READ, inode=INODE)
        if worker is keyless:
            assert asked == FORWARDED
        asked = keyless.answer(write_in(0, 3), opcode=WRITE, inode=INODE, payload=b"abc")
        assert asked == FORWARDED
    for slot in (SLOT + 2, 5000):
        file.publish(key_slot=slot)
        assert file.read(0, 100) == FORWARDED
        assert file.write(0, b"abc") == FORWARDED
    file.publish()
    file.secrets.wipe(SLOT)
    assert file.read(0, 100) == FORWARDED
    assert file.stored() == seal(bytes(plain))


def test_a_page_that_another_has_locked_is_forwarded_whole_or_read_once_it_is_free(
    file: Sealed,
) -> None:
    plain = filled(file)
    locks = file.locks()
    pfn = file.place_of(FRAME_BYTES) // FRAME_BYTES
    locks.lock(pfn)
    assert locks.holders() == [CONTROL_HOLDER]
    assert file.write(0, bytes(2 * FRAME_BYTES)) == FORWARDED
    assert file.write(FRAME_BYTES + 5, b"edge") == FORWARDED
    assert file.read(FRAME_BYTES + 5, 4) == FORWARDED
    assert file.read(0, 16)[:2] == ("answer", 0)
    locks.unlock(pfn)
    assert locks.holders() == []
    plain[:FRAME_BYTES] = bytes(FRAME_BYTES)
    assert file.read(0, 2 * FRAME_BYTES) == ("answer", 0, bytes(plain[: 2 * FRAME_BYTES]))


def test_a_redo_record_that_another_has_locked_forwards_edges_only(shm: Path) -> None:
    with a_sealed_file(shm, Durability.CACHE_LINES, is_whole=True) as file:
        plain = filled(file)
        locks = file.locks()
        locks.lock_redo(file.live_offset)
        assert file.write(5, b"edge") == FORWARDED
        assert file.write(16, bytes(16))[:2] == ("answer", 0)
        locks.unlock_redo(file.live_offset)
        assert file.write(5, b"edge")[:2] == ("answer", 0)
        plain[16:32] = bytes(16)
        plain[5:9] = b"edge"
        assert file.stored() == seal(bytes(plain))


def test_two_who_write_one_page_at_unaligned_offsets_lose_nothing(file: Sealed) -> None:
    filled(file)
    # Each writes every other stretch of seven bytes, so most blocks belong to both.
    turns, width, room = 40, 7, FRAME_BYTES - FRAME_BYTES % 14
    forwarded = [0, 0]

    def hammer(number: int) -> None:
        offsets = list(range(number * width, room, 2 * width))
        for turn in range(turns):
            operations = [write_in(offset, width) for offset in offsets]
            payloads = [bytes([turn, number]) + struct.pack("<IB", at, turn) for at in offsets]
            while operations:
                _, answers = file.workers[number].answer_series(
                    operations, opcode=WRITE, inode=INODE, payloads=payloads
                )
                # What finds a lock taken for long is the control plane's; here it is asked again.
                again = [at for at, answer in enumerate(answers) if answer[0] == "forward"]
                forwarded[number] += len(again)
                assert all(answer[:2] == ("answer", 0) for at, answer in enumerate(answers)
                           if at not in again)  # fmt: skip
                operations = [operations[at] for at in again]
                payloads = [payloads[at] for at in again]

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, _, data = file.read(0, room)
    last = turns - 1
    for at in range(0, room, width):
        expected = bytes([last, at // width % 2]) + struct.pack("<IB", at, last)
        assert data[at : at + width] == expected
    assert file.locks().holders() == []


def io_of_the_daemon(file: Sealed, locks: PageLocks | None) -> EncryptedIO:
    """What the control plane loads and stores the same file with."""
    medium = file.tables.pool.medium
    state = State(stat.S_IFREG, 1, 0, 0, SIZE, 0, 0, 0, 0, 1, 0)
    inode = Inode(INODE, file.live_offset - LIVE_OFFSET, 1, 0, Log(0, 0), state)
    lines = LiveLines(Ground(medium), locks)  # type: ignore[arg-type]
    return EncryptedIO(medium, NoMemmap(), lines, inode, file.secrets, SLOT, is_new=False)


@dataclass
class Ground:
    """All that live lines need of a file system."""

    medium: Medium


def test_both_planes_write_one_page_at_unaligned_offsets_and_lose_nothing(file: Sealed) -> None:
    filled(file)
    turns, width, room = 20, 7, FRAME_BYTES - FRAME_BYTES % 14
    io, wrong = io_of_the_daemon(file, file.locks()), []
    # Of a worker that does not live the control plane would take the lock.
    shared = file.tables.shared
    slot = shared.areas.slots + layouts.SLOT_HEAD.offset_of("thread_id")
    store_word(shared.memory, slot, threading.get_native_id())
    is_over = threading.Event()

    def word(at: int, turn: int) -> bytes:
        return bytes([turn, at // width % 2]) + struct.pack("<IB", at, turn)

    def hammer() -> None:
        offsets = list(range(0, room, 2 * width))
        turn = 0
        while not is_over.is_set():
            turn = (turn + 1) % 256
            operations = [write_in(offset, width) for offset in offsets]
            _, answers = file.workers[0].answer_series(
                operations, opcode=WRITE, inode=INODE, payloads=[word(at, turn) for at in offsets]
            )
            for at, answer in zip(offsets, answers, strict=True):
                # What finds a lock taken for long is left to the control plane.
                found = file.read(at, width)
                if (answer[0], found[0]) == ("answer", "answer") and found[2] != word(at, turn):
                    wrong.append(at)

    worker = threading.Thread(target=hammer)
    worker.start()
    for turn in range(turns):
        for at in range(width, room, 2 * width):
            io.store(INODE, at, file.place_of(at), word(at, turn))
        for at in range(width, room, 2 * width):
            if bytes(io.load(INODE, at, file.place_of(at), width)) != word(at, turn):
                wrong.append(at)
    is_over.set()
    worker.join()
    assert wrong == []
    assert file.locks().holders() == []


def test_readers_never_see_a_torn_block(file: Sealed) -> None:
    filled(file)
    pages = [bytes([value]) * FRAME_BYTES for value in (0x11, 0x22)]
    assert file.write(0, pages[0])[:2] == ("answer", 0)
    is_over = threading.Event()

    def write_on() -> None:
        operations = [write_in(0, FRAME_BYTES)] * 2
        while not is_over.is_set():
            file.workers[0].answer_series(
                operations, opcode=WRITE, inode=INODE, payloads=pages, turns=20
            )

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        seen: set[int] = set()
        rounds, deadline = 0, time.monotonic() + 60
        # A writer that stands still while it has the block lets nobody read.
        while rounds < 40 or (not seen and time.monotonic() < deadline):
            rounds += 1
            _, answers = file.workers[1].answer_series(
                [read_in(0, FRAME_BYTES), read_in(1, FRAME_BYTES - 2)] * 20,
                opcode=READ, inode=INODE,
            )  # fmt: skip
            for verdict, error, data in answers:
                assert error == 0
                if verdict == "answer":
                    values = set(data)
                    assert values <= {0x11, 0x22}
                    # More than a block: nobody sees a page while it is being stored.
                    assert len(values) == 1
                    seen |= values
    finally:
        is_over.set()
        writer.join()
    assert seen


USES_A_KEY = """
import os, sys
from pathlib import Path
from kit.data_plane import READ, WRITE, extent, read_in, some_tables, write_in
from pmemfs.dataplane.native import Responder, store_word
from pmemfs.media.live import line_key, size_word
from pmemfs.transform.secrets import Secrets, create_secrets
directory, wrapped = sys.argv[1:]
secrets = Secrets(create_secrets())
assert secrets.unwrap(7, b"file", b"", 0, 0, 0, bytes.fromhex(wrapped), b"")
with some_tables(Path(directory), has_files=True) as tables:
    os.posix_fallocate(tables.fd, 0, tables.pool.medium.size_bytes)
    first = int(tables.pool.first_data_pfn)
    line = (first + 1) * 4096 + 64
    store_word(tables.pool.medium.view(line, 64), 0, size_word(8192, line_key(9, 1, 1)))
    tables.shared.publish(9, 8192, [extent(0, first + 2, 2)], live_offset=line, key_slot=8)
    worker = Responder(
        tables.shared.fd, tables.fd, tables.map_flags, 1 << 20, secrets_fd=secrets.fd
    )
    for offset, length in ((0, 8192), (5, 100)):
        data = bytes(length)
        asked = worker.answer(write_in(offset, length), opcode=WRITE, inode=9, payload=data)
        assert asked[:2] == ("answer", 0)
        asked = worker.answer(read_in(offset, length), opcode=READ, inode=9)
        assert asked == ("answer", 0, data)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_worker_that_waits_has_nothing_of_a_key(shm: Path) -> None:
    words = [sys.executable, "-c", USES_A_KEY, str(shm), wrapped_key().hex()]
    kit = str(Path(__file__).parents[1])
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": kit}
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if "secretmem" not in Path(f"/proc/{child.pid}/maps").read_text():
            child.communicate()
            pytest.skip("this kernel has no memfd_secret")
        parts = [KEY[at : at + 16] for at in range(0, len(KEY), 16)]
        found = [part for piece in readable_memory(child.pid) for part in parts if part in piece]
        child.communicate()
    assert child.returncode == 0
    assert found == []


# Deaths and faults


def leave_locked(file: Sealed, pfn: int, holder: int, thread_id: int) -> None:
    """As a worker leaves the lock of a page that was killed while it stored there."""
    shared = file.tables.shared
    at = shared.areas.page_locks + pfn % 8192 * layouts.PAGE_LOCK.size_bytes
    store_word(shared.memory, at + 8, load_word(shared.memory, at + 8) | 1)
    store_word(shared.memory, at, holder)
    slot = shared.areas.slots + (holder - 1) * layouts.SLOT_BYTES
    if holder < CONTROL_HOLDER:
        store_word(shared.memory, slot + layouts.SLOT_HEAD.offset_of("thread_id"), thread_id)


def dead_thread() -> int:
    """The number of a thread that was there."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        return child.pid


def test_the_lock_of_a_killed_worker_is_taken_over_by_the_control_plane(file: Sealed) -> None:
    plain = filled(file)
    pfn = file.place_of(0) // FRAME_BYTES
    leave_locked(file, pfn, 2, dead_thread())
    assert file.read(0, 16) == FORWARDED
    locks = file.locks()
    locks.lock(pfn)
    locks.unlock(pfn)
    assert file.read(0, 16) == ("answer", 0, bytes(plain[:16]))


def test_the_lock_of_a_living_worker_is_waited_for(file: Sealed) -> None:
    filled(file)
    pfn = file.place_of(0) // FRAME_BYTES
    leave_locked(file, pfn, 2, threading.get_native_id())
    locks = file.locks()
    waiter = threading.Thread(target=locks.lock, args=(pfn,))
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    assert locks.holders() == [2]
    at = file.tables.shared.areas.page_locks + pfn % 8192 * layouts.PAGE_LOCK.size_bytes
    store_word(file.tables.shared.memory, at, 0)
    waiter.join()
    assert locks.holders() == [CONTROL_HOLDER]


@pytest.mark.parametrize("holder", [2, CONTROL_HOLDER])
def test_what_the_dead_have_locked_is_freed_while_no_worker_runs(file: Sealed, holder: int) -> None:
    plain = filled(file)
    pfn = file.place_of(0) // FRAME_BYTES
    if holder == CONTROL_HOLDER:
        file.locks().lock(pfn)
    else:
        leave_locked(file, pfn, holder, dead_thread())
    file.locks().free_all()
    assert file.locks().holders() == []
    assert file.read(0, 16) == ("answer", 0, bytes(plain[:16]))
    assert file.write(3, b"more")[:2] == ("answer", 0)


def leave_redo(file: Sealed, offset: int, block: bytes, holder: int) -> None:
    """As a worker leaves a redo record that was killed after its block was stored."""
    medium = file.tables.pool.medium
    record = struct.pack("<Q16sQ", offset, block, redo_check(offset, block))
    medium.store(file.live_offset + 24, record)
    shared = file.tables.shared
    place = (file.live_offset * layouts.INODE_HASH & (1 << 64) - 1) >> 56
    at = shared.areas.page_locks + (layouts.PAGE_LOCK.size_bytes << 13) + place * 16
    store_word(shared.memory, at + 8, file.live_offset)
    store_word(shared.memory, at, holder)
    slot = shared.areas.slots + (holder - 1) * layouts.SLOT_BYTES
    store_word(shared.memory, slot + layouts.SLOT_HEAD.offset_of("thread_id"), dead_thread())


@pytest.mark.parametrize("how", ["forgotten", "taken over"])
def test_a_redo_record_of_a_killed_worker_never_undoes_what_is_stored_later(
    shm: Path, how: str
) -> None:
    with a_sealed_file(shm, Durability.CACHE_LINES, is_whole=True) as file:
        plain = filled(file)
        leave_redo(file, file.place_of(0), file.stored()[:16], 2)
        locks = file.locks()
        if how == "forgotten":
            locks.free_all()
        else:
            locks.lock_redo(file.live_offset)
            locks.unlock_redo(file.live_offset)
        assert locks.holders() == []
        assert file.line()[24:32] == bytes(8)
        assert file.stored() == seal(bytes(plain))


@pytest.mark.parametrize("durability", [Durability.VOLATILE, Durability.CACHE_LINES])
@pytest.mark.parametrize("what", ["read", "edge", "page"])
def test_bad_memory_costs_the_request_alone_and_leaves_no_lock(
    shm: Path, durability: Durability, what: str
) -> None:
    def child() -> None:
        with a_sealed_file(shm, durability, is_whole=True) as file, poisoner() as poisons:
            plain = filled(file)
            bad = file.place_of(FRAME_BYTES)
            for start in mappings_of(file.tables.pool.medium.name):
                poisons.poison(start + bad)
            asked = {
                "read": lambda: file.read(FRAME_BYTES, 100),
                "edge": lambda: file.write(FRAME_BYTES + 5, b"edge"),
                "page": lambda: file.write(0, bytes(2 * FRAME_BYTES)),
            }[what]()
            assert asked == ("answer", errno.EIO, b"")
            assert file.locks().holders() == []
            assert file.read(9 * FRAME_BYTES, 100)[2] == plain[9 * FRAME_BYTES :][:100]
            assert file.write(9 * FRAME_BYTES + 1, b"on")[:2] == ("answer", 0)

    assert in_child(child) == 0


def mappings_of(path: str) -> list[int]:
    """Where this process has a file mapped."""
    with open("/proc/self/maps") as lines:
        return [int(line.split("-")[0], 16) for line in lines if line.rstrip().endswith(path)]


def test_a_redo_record_is_whole_before_its_block_is_touched(shm: Path) -> None:
    with a_sealed_file(shm, Durability.CACHE_LINES, is_whole=True) as file:
        plain = filled(file)
        place = file.place_of(FRAME_BYTES)

        def child() -> None:
            worker = file.worker(0)
            for start in mappings_of(file.tables.pool.medium.name):
                protect(start + place, mmap.PROT_READ)
            data = b"edge"
            worker.answer(write_in(FRAME_BYTES + 5, 4), opcode=WRITE, inode=INODE, payload=data)

        assert in_child(child) == signal.SIGSEGV
        offset, block, check = struct.unpack("<Q16sQ", file.line()[24:56])
        plain[FRAME_BYTES + 5 : FRAME_BYTES + 9] = b"edge"
        assert offset == place
        assert block == seal(bytes(plain))[FRAME_BYTES : FRAME_BYTES + 16]
        assert check == redo_check(offset, block)
        assert file.locks().holders() == [1, 1]
        file.locks().free_all()
        assert file.line()[24:32] == bytes(8)
        assert file.read(FRAME_BYTES, 16)[:2] == ("answer", 0)


def protect(address: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    frame = ctypes.c_size_t(FRAME_BYTES)
    assert libc.mprotect(ctypes.c_void_p(address), frame, protection) == 0
