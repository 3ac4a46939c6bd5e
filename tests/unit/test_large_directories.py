"""Directories of very many entries: nobody else waits long for what they take."""

from __future__ import annotations

import errno
import random
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import trio

from kit.data_plane import door_to
from kit.fs_crash import ROOT, World, file_system, on_medium, snapshot, template
from kit.fs_operations import IMAGES, OPERATIONS
from kit.large_directories import (
    DIRECTORY,
    RECORDS_A_FRAME,
    Stretches,
    add_names,
    forget_all,
    large_directory,
    new_pool,
    opened,
    remove_names,
)
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.engine.base import Engine
from pmemfs.fuse.handlers.directories import DirectoryHandlers
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, WireDoor
from pmemfs.media import log as media
from pmemfs.medium.recording import RecordingMedium
from pmemfs.volume.fs import inodecache
from pmemfs.volume.fs.compaction import STEP_RECORDS
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inodecache import READING_STEPS
from pmemfs.volume.fs.leaks import LeakSearch
from pmemfs.volume.fs.reading import MayWait, NotRead

COUNT = 100_000
AT_ONCE = (READING_STEPS + 1) * RECORDS_A_FRAME


@pytest.fixture(scope="module")
def large_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two large directories, `one` and `two`, and a small one."""
    path = tmp_path_factory.mktemp("large") / "pool"
    new_pool(path, 256 << 20)
    with opened(path) as fs:
        large_directory(fs, ROOT, b"one", COUNT)
        large_directory(fs, ROOT, b"two", COUNT)
        fs.make(ROOT, b"small", DIRECTORY)
    return path


@pytest.fixture
def fs(large_pool: Path) -> Iterator[FileSystem]:
    with opened(large_pool) as fs:
        yield fs


def unread(fs: FileSystem, name: bytes) -> int:
    """An inode in the root, with nothing in memory."""
    number = fs.lookup(ROOT, name)
    forget_all(fs)
    return number


async def answered(door: WireDoor, opcode: int, inode: int, operation: bytes) -> Answer:
    answer = door.answer(opcode, Request(inode, Caller(0, 0, 0), operation))
    return answer if answer is None or isinstance(answer, bytes | memoryview) else await answer


def at_once(
    fs: FileSystem, requests: list[tuple[int, int, bytes]], stretches: Stretches
) -> list[Answer | OSError]:
    """The answers to requests that come at the same time."""
    _, door = door_to(fs, Engine(fs.medium, fs.store.ground.memmap))
    answers: list[Answer | OSError] = [None] * len(requests)

    async def ask(at: int, opcode: int, inode: int, operation: bytes) -> None:
        try:
            answers[at] = await answered(door, opcode, inode, operation)
        except OSError as error:
            answers[at] = error

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for at, request in enumerate(requests):
                nursery.start_soon(ask, at, *request)

    trio.run(main, instruments=[stretches])
    print(f"the longest stretch: {stretches.longest} of {stretches.total} records, "
          f"{stretches.longest_seconds * 1000:.1f} ms")  # fmt: skip
    return answers


@pytest.mark.slow
def test_a_first_look_up_lets_others_in_after_some_records(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = unread(fs, b"one")
    stretches = Stretches()
    stretches.count_records(monkeypatch)
    [answer] = at_once(fs, [(Opcode.LOOKUP, directory, b"n777\0")], stretches)
    assert isinstance(answer, bytes)
    assert stretches.total > COUNT
    assert stretches.longest <= AT_ONCE


def test_what_needs_the_same_directory_waits_for_one_reading_of_it(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, small = unread(fs, b"one"), unread(fs, b"small")
    stretches = Stretches()
    stretches.count_records(monkeypatch)
    requests = [
        *[(Opcode.LOOKUP, directory, b"n%d\0" % at) for at in range(20)],
        (Opcode.LOOKUP, directory, b"none\0"),
        (Opcode.GETATTR, directory, b""),
        (Opcode.LOOKUP, small, b"none\0"),
    ]
    answers = at_once(fs, requests, stretches)
    assert all(isinstance(answer, bytes) for answer in answers)
    # Beside the directory, a few records of others.
    assert stretches.total < COUNT + 1000
    assert stretches.longest <= AT_ONCE


@pytest.mark.slow
def test_two_directories_that_are_wanted_are_read_one_after_the_other(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = unread(fs, b"one"), unread(fs, b"two")
    stretches = Stretches()
    stretches.count_records(monkeypatch)
    rename = two.to_bytes(8, "little") + b"n5\0moved\0"
    requests = [
        (Opcode.RENAME, one, rename),
        (Opcode.UNLINK, two, b"n6\0"),
        *[(Opcode.LOOKUP, directory, b"n7\0") for directory in (one, two) * 5],
    ]
    answers = at_once(fs, requests, stretches)
    assert not [answer for answer in answers if isinstance(answer, OSError)]
    # The end of one reading, and the begin of the next.
    assert stretches.longest <= 2 * AT_ONCE
    assert fs.lookup(two, b"moved")
    for directory, name in ((one, b"n5"), (two, b"n6")):
        with pytest.raises(OSError, match="No such file"):
            fs.lookup(directory, name)
    fs.rename(two, b"moved", one, b"n5")
    fs.link(fs.lookup(two, b"n7"), two, b"n6")


@pytest.mark.slow
def test_whoever_waits_for_a_damaged_directory_gets_an_error(fs: FileSystem) -> None:
    directory = unread(fs, b"one")
    head = fs.store.table.head(directory)
    assert head is not None
    fs.inode(directory)
    at = fs.inode(directory).log.frames[900] + 10 * 64 + 20
    before = bytes(fs.medium.read(at, 1))
    forget_all(fs)
    fs.medium.store(at, bytes([before[0] ^ 1]))
    try:
        requests = [(Opcode.LOOKUP, directory, b"n%d\0" % at) for at in range(5)]
        for answer in at_once(fs, requests, Stretches()):
            assert isinstance(answer, OSError)
            assert answer.errno == errno.EIO
        assert "wrong checksum" in fs.damage
    finally:
        fs.medium.store(at, before)


def test_a_search_for_leaks_lets_others_in_after_some_records(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    stretches = Stretches()
    stretches.count_records(monkeypatch)
    search = LeakSearch(fs.store, fs.frames)
    for _ in search._steps:
        stretches.longest = max(stretches.longest, stretches.count)
        stretches.total += stretches.count
        stretches.count = 0
    assert stretches.total > 2 * COUNT
    assert stretches.longest <= AT_ONCE
    assert search.freed_frames == 0


def test_a_large_directory_is_forgotten_in_pieces(fs: FileSystem) -> None:
    directory = unread(fs, b"one")
    entries = fs.inode(directory).entries
    fs.store.ground.clock += 100
    fs.store.housekeeping.look_for_idle()
    steps = 0
    before = len(entries)
    while fs.store.housekeeping.drop_some():
        assert before - len(entries) <= 20_000
        before = len(entries)
        steps += 1
    assert steps >= COUNT // 20_000
    assert fs.store.cached(directory) is None
    assert len(fs.inode(directory).entries) == COUNT


@pytest.mark.slow
def test_what_is_read_in_steps_is_what_is_read_at_once(fs: FileSystem) -> None:
    directory = unread(fs, b"one")
    whole = fs.store.cache.read_inode(directory)
    steps = 1
    while fs.read_on(directory, 7):
        steps += 1
    stepped = fs.inode(directory)
    assert whole is not None
    assert steps > COUNT / RECORDS_A_FRAME / 7
    for name in ("state", "entries", "parent", "subdirectory_count", "live_slots", "log"):
        assert getattr(whole, name) == getattr(stepped, name), name


def test_a_request_of_a_listing_copies_nothing_of_the_rest(fs: FileSystem) -> None:
    directory = unread(fs, b"one")
    directories = DirectoryHandlers(fs, OpenPlaces.of_this_process())
    fs.inode(directory)
    handle = directories.open(Caller(0, 0, 0), directory)
    most = 0
    tracemalloc.start()
    try:
        for start in (0, 20, COUNT // 2):
            room = iter([True] * 20 + [False])
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            directories.listing(
                handle, start, lambda _, left=room: next(left), with_attributes=True
            )
            assert next(room, None) is None
            if start:
                most = max(most, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert most < COUNT


@pytest.mark.slow
def test_an_operation_may_have_to_read_first_only_while_it_has_changed_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is not in memory is called long here, and each operation begins with nothing."""
    monkeypatch.setattr(inodecache, "READING_STEPS", 1)
    begun_again = 0
    for kind, operations in OPERATIONS.items():
        for op in operations:
            plain, patient = World(IMAGES[kind]()), World(IMAGES[kind]())
            plain.run(op)
            forget_all(patient.fs)
            tree = stored_tree(patient)
            again = run_patiently(lambda op=op, world=patient: op.run(world), patient, tree)
            begun_again += again
            assert without_times(stored_tree(patient)) == without_times(stored_tree(plain)), op.name
    assert begun_again > 100


def run_patiently(operation: Callable[[], object], world: World, before: dict[int, object]) -> int:
    """Run an operation until it needs nothing more; how often it was begun again."""
    again, counter = 0, world.counter
    while True:
        world.counter = counter
        try:
            with MayWait():
                operation()
        except NotRead as missing:
            assert stored_tree(world) == before
            again += 1
            while world.fs.read_on(missing.number, 1):
                pass
        except OSError:
            return again
        else:
            return again


def stored_tree(world: World) -> dict[int, object]:
    """What another mount would find."""
    image = bytes(world.medium.read(0, world.medium.size_bytes))
    pool = on_medium(template(len(image)), RecordingMedium(image))
    return dict(snapshot(file_system(pool)))


def without_times(tree: dict[int, object]) -> dict[int, object]:
    return {number: (node[0][:7], node[3:]) for number, node in tree.items()}  # type: ignore[index]


# Compaction


def mostly_dead(fs: FileSystem, count: int = 3000) -> int:
    """A directory whose log is mostly dead, and wished to be compacted."""
    directory = large_directory(fs, ROOT, b"d", count)
    file = fs.lookup(directory, b"n0")
    while not (fs.store.housekeeping._long_logs and fs.inode(directory).is_mostly_dead):
        remove_names(fs, directory, range(1, 300))
        add_names(fs, directory, file, range(1, 300))
    return directory


@pytest.fixture
def small(tmp_path: Path) -> Iterator[FileSystem]:
    new_pool(tmp_path / "pool", 16 << 20)
    with opened(tmp_path / "pool") as fs:
        yield fs


def listed(fs: FileSystem, directory: int) -> dict[bytes, int]:
    """What a fresh look finds, which must be what is in memory."""
    found = fs.store.cache.read_inode(directory)
    now = fs.inode(directory)
    assert found is not None
    for name in ("state", "xattrs", "entries", "parent", "live_slots", "log"):
        assert getattr(found, name) == getattr(now, name), name
    return {name: entry.inode for name, entry in found.entries.items()}


def test_a_long_log_is_compacted_in_steps_beside_operations(small: FileSystem) -> None:
    fs = small
    directory = mostly_dead(fs)
    fs.set_xattr(directory, b"user.note", b"kept" * 1000)
    file, free = fs.lookup(directory, b"n0"), fs.room().free_frames
    before = fs.inode(directory).log.slot_count
    model = listed(fs, directory)
    rng = random.Random(1)
    steps = 0
    while fs.store.housekeeping.compact_some():
        steps += 1
        for _ in range(40):
            name = b"n%d" % rng.randrange(3200)
            if name == b"n0":
                continue
            if name in model:
                fs.unlink(directory, name)
                del model[name]
            else:
                fs.link(file, directory, name)
                model[name] = file
        fs.set_xattr(directory, b"user.%d" % (steps % 5), b"value" * 500)
        assert listed(fs, directory) == model
    inode = fs.inode(directory)
    assert steps >= 3
    assert inode.log.slot_count < before * 0.6
    assert inode.log.slot_count < inode.compacted_slots * 1.3 + 500
    assert fs.get_xattr(directory, b"user.note") == b"kept" * 1000
    while fs.store.busy.collect():
        pass
    assert fs.room().free_frames > free
    nothing_is_lost(fs)


def nothing_is_lost(fs: FileSystem) -> None:
    """Every frame that is used is somebody's, and nobody's frame is free."""
    free = fs.room().free_frames
    fs.store.ground.may_have_leaks = True
    while fs.tidy():
        pass
    assert not fs.damage
    assert fs.room().free_frames == free


def test_no_operation_and_no_step_writes_very_much_of_a_long_log(
    small: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = small
    directory = mostly_dead(fs)
    file = fs.lookup(directory, b"n0")
    written = 0
    seal = media.seal

    def counted(records: Iterable[bytes], number: int, generation: int, offset: int) -> bytes:
        nonlocal written
        records = list(records)
        written += len(records)
        return seal(records, number, generation, offset)

    monkeypatch.setattr(media, "seal", counted)
    most = compactions = 0
    slots = fs.inode(directory).log.slot_count
    for at in range(200):
        for step in (
            lambda: fs.unlink(directory, b"n1"),
            lambda: fs.link(file, directory, b"n1"),
            fs.store.housekeeping.compact_some,
        )[: 3 if at % 4 == 0 else 2]:
            written = 0
            step()
            most = max(most, written)
        now = fs.inode(directory).log.slot_count
        compactions += now < slots
        slots = now
    assert compactions
    assert most <= STEP_RECORDS + 600
    assert most > STEP_RECORDS / 2
    nothing_is_lost(fs)


@pytest.mark.parametrize("when", ["removed", "forgotten", "full", "ended"])
def test_a_compaction_that_is_abandoned_gives_its_frames_back(small: FileSystem, when: str) -> None:
    fs = small
    directory = mostly_dead(fs)
    while fs.store.busy.collect():
        pass
    free = fs.room().free_frames
    assert fs.store.housekeeping.compact_some()
    assert fs.store.housekeeping.compact_some()
    assert fs.room().free_frames < free
    if when == "removed":
        log_frames = len(fs.inode(directory).log.frames)
        remove_names(fs, directory, range(1, 3000))
        fs.unlink(directory, b"n0")
        fs.rmdir(ROOT, b"d")
        free = fs.room().free_frames + log_frames
    elif when == "forgotten":
        forget_all(fs)
        fs.lookup(ROOT, b"d")
    elif when == "full":
        fs.allocator.allocate(fs.room().free_frames - fs.allocator.reserve)
        fs.store.housekeeping.take_frames(16, goal=0, whole=False, urgent=False, under_way=set())
        fs.store.ground.may_have_leaks = True
    else:
        fs.end()
        assert fs.room().free_frames == free
        return
    while fs.go_on():
        pass
    assert fs.store.housekeeping._compaction is None
    nothing_is_lost(fs) if when != "full" else None


def test_a_log_that_another_writes_anew_is_not_compacted_from_its_old_frames(
    small: FileSystem,
) -> None:
    fs = small
    directory = mostly_dead(fs)
    model = listed(fs, directory)
    assert fs.store.housekeeping.compact_some()
    assert fs.store.housekeeping.compact_some()
    with fs.store.change() as change:
        change.compact(fs.inode(directory))
    fs.link(fs.lookup(directory, b"n0"), directory, b"more")
    while fs.go_on():
        pass
    assert listed(fs, directory) == {**model, b"more": model[b"n0"]}
    nothing_is_lost(fs)


def test_a_compaction_ends_well_in_a_pool_that_becomes_full(small: FileSystem) -> None:
    fs = small
    directory = mostly_dead(fs)
    model = listed(fs, directory)
    assert fs.store.housekeeping.compact_some()
    taken = fs.allocator.allocate(fs.room().free_frames - fs.allocator.reserve - 64)
    while fs.store.housekeeping.compact_some():
        fs.set_attributes(directory, mode=0o700)
    while fs.store.busy.collect():
        pass
    assert listed(fs, directory) == model
    fs.allocator.free(taken)
    nothing_is_lost(fs)
