"""The structures of mode `fs`, each against a model that is simpler than it."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.fs_checker import Checker
from kit.fs_crash import (
    FILE,
    FRAME,
    ROOT,
    PlainMedium,
    World,
    blank_image,
    difference,
    on_medium,
    snapshot,
    template,
)
from kit.fs_operations import OPERATIONS, standard_image
from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as log_media
from pmemfs.media.filesystem import CHUNK_FRAMES, GROUP_FRAMES, Geometry
from pmemfs.media.journal import JournalEntry, pack_journal, read_journal
from pmemfs.media.log import RecordKind
from pmemfs.memmap.none import NoMemmap
from pmemfs.memmap.on_demand import OnDemandMemmap
from pmemfs.pfn import PageGeometry
from pmemfs.volume.fs import leaks, table
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.extents import ExtentMap, Run
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.masks import runs_of
from pmemfs.volume.fs.publication import NoTables, Tables
from pmemfs.volume.fs.replay import Replay

# Extents

RANGES = st.tuples(st.integers(0, 40), st.integers(1, 12))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("map"), RANGES, st.integers(100, 130)),
            st.tuples(st.just("unmap"), RANGES, st.just(0)),
        ),
        max_size=25,
    )
)
def test_an_extent_map_is_a_map_of_frames(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    extents, model = ExtentMap(), dict[int, int]()
    for what, (index, count), pfn in steps:
        there = [model[at] for at in range(index, index + count) if at in model]
        if what == "map":
            assert frames_of(extents.map(index, pfn, count)) == there
            model.update({index + at: pfn + at for at in range(count)})
        else:
            assert frames_of(extents.unmap(index, count)) == there
            model = {at: pfn for at, pfn in model.items() if not index <= at < index + count}
        assert_is(extents, model)


def frames_of(runs: list[Run]) -> list[int]:
    return [pfn + at for pfn, count in runs for at in range(count)]


def assert_is(extents: ExtentMap, model: dict[int, int]) -> None:
    found = [(e.index + at, e.pfn + at) for e in extents for at in range(e.frame_count)]
    assert found == sorted(model.items())
    assert extents.frame_count == len(model)
    assert extents.end == max(model, default=-1) + 1
    neighbours = zip(list(extents), list(extents)[1:], strict=False)
    for left, right in neighbours:
        joins = left.index + left.frame_count == right.index
        assert not (joins and left.pfn + left.frame_count == right.pfn)
    for index in range(60):
        pfn, count = extents.find(index)
        assert pfn == model.get(index, -1)
        assert all((index + at in model) == (pfn >= 0) for at in range(min(count, 60)))
    pieces = [(p.index + at, p.pfn + at if p.pfn >= 0 else -1)
              for p in extents.pieces(0, 60) for at in range(p.frame_count)]  # fmt: skip
    assert pieces == [(at, model.get(at, -1)) for at in range(60)]


# Frames

FIRST = 16
FRAMES = GROUP_FRAMES + 700
LONGER = 2 * GROUP_FRAMES + 1300


class FrameMedium(PlainMedium):
    """Memory for the frames that were stored to alone."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.frames: dict[int, bytearray] = {}
        self.size_bytes = 1 << 50

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        frame, at = divmod(offset_bytes, FRAME)
        return bytes(self.frames.get(frame, bytearray(FRAME))[at : at + length_bytes])

    def store(self, offset_bytes: int, data: bytes) -> None:  # type: ignore[override]
        frame, at = divmod(offset_bytes, FRAME)
        self.frames.setdefault(frame, bytearray(FRAME))[at : at + len(data)] = data

    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        return offset_bytes // FRAME not in self.frames


def usable(geometry: Geometry) -> set[int]:
    return {
        geometry.group_pfn(group) + at
        for group in range(geometry.group_count)
        for at in range(geometry.kept_of(group), geometry.frames_of(group))
    }


COUNTS = st.one_of(st.integers(1, 70), st.integers(400, 2100), st.just(512), st.just(30_000))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_allocator_gives_each_frame_once_and_what_it_remembers_is_stored(
    data: st.DataObject,
) -> None:
    medium = FrameMedium()
    geometry = Geometry(FIRST, FRAMES)
    allocator = Allocator(medium, geometry)
    free, held = usable(geometry), list[Run]()
    for _ in range(data.draw(st.integers(1, 14))):
        step = data.draw(st.sampled_from(["take", "take", "take", "free", "grow", "read again"]))
        if step == "take":
            count, whole, urgent = data.draw(COUNTS), data.draw(st.booleans()), data.draw(
                st.booleans()
            )  # fmt: skip
            goal = data.draw(st.sampled_from([0, FIRST + 600, FIRST + CHUNK_FRAMES * 3, 1 << 40]))
            room = len(free) - (0 if urgent else allocator.reserve)
            if count > room:
                with pytest.raises(OSError, match="space") as refused:
                    allocator.allocate(count, goal=goal, whole=whole, urgent=urgent)
                assert refused.value.errno == errno.ENOSPC
            else:
                runs = allocator.allocate(count, goal=goal, whole=whole, urgent=urgent)
                got = frames_of(runs)
                assert len(got) == count == len(set(got))
                assert set(got) <= free
                free -= set(got)
                held += runs
        elif step == "free" and held:
            run = held.pop(data.draw(st.integers(0, len(held) - 1)))
            cut = data.draw(st.integers(0, run.frame_count - 1))
            allocator.free([Run(run.pfn + cut, run.frame_count - cut)])
            free |= set(range(run.pfn + cut, run.pfn + run.frame_count))
            if cut:
                held.append(Run(run.pfn, cut))
        elif step == "grow" and geometry.frame_count == FRAMES:
            free |= usable(Geometry(FIRST, LONGER)) - usable(geometry)
            geometry = Geometry(FIRST, LONGER)
            allocator.set_geometry(geometry)
        elif step == "read again":
            allocator = Allocator(medium, geometry)
        assert allocator.free_count() == len(free)
    fresh = Allocator(medium, geometry)
    for one in (allocator, fresh):
        assert {f for g in range(geometry.group_count) for f in free_in(one, g)} == free
    assert fresh.largest_run() == allocator.largest_run() == longest(free)


def free_in(allocator: Allocator, group: int) -> Iterator[int]:
    start = allocator.geometry.group_pfn(group)
    for chunk, mask in enumerate(allocator.group(group).masks):
        for bit, count in runs_of(mask):
            yield from range(start + chunk * CHUNK_FRAMES + bit, start + chunk * CHUNK_FRAMES
                             + bit + count)  # fmt: skip


def longest(frames: set[int]) -> int:
    best = current = 0
    last = (-1, -2)
    for frame in sorted(frames):
        # A run ends with its group, whose bitmaps lie between it and the next.
        group = (frame - FIRST) // GROUP_FRAMES
        current = current + 1 if last == (group, frame - 1) else 1
        best, last = max(best, current), (group, frame)
    return best


def test_what_is_large_begins_where_a_chunk_does_however_old_the_pool() -> None:
    allocator = Allocator(FrameMedium(), Geometry(FIRST, FRAMES))
    small = [allocator.allocate(1)[0] for _ in range(3000)]
    allocator.free(small[::3])
    for count in (512, 1024, 4096):
        runs = allocator.allocate(count, whole=True)
        assert all((run.pfn - FIRST) % CHUNK_FRAMES == 0 for run in runs)


@pytest.mark.parametrize("length", [16, 511, 512, 700, 4096])
def test_a_short_zone_has_only_the_frames_that_it_has(length: int) -> None:
    geometry = Geometry(FIRST, length)
    allocator = Allocator(FrameMedium(), geometry)
    got = frames_of(allocator.allocate(allocator.free_count(), urgent=True))
    assert set(got) == usable(geometry)


def test_no_more_bitmaps_are_read_than_tell_whether_there_is_enough() -> None:
    geometry = Geometry(FIRST, 5 * GROUP_FRAMES)
    medium = FrameMedium()
    read: list[int] = []
    plain_read = medium.read

    def watched_read(offset_bytes: int, length_bytes: int) -> bytes:
        read.append((offset_bytes // FRAME - FIRST) // GROUP_FRAMES)
        return plain_read(offset_bytes, length_bytes)

    medium.read = watched_read  # type: ignore[method-assign]
    allocator = Allocator(medium, geometry)
    assert allocator.free_up_to(GROUP_FRAMES // 2) >= GROUP_FRAMES // 2
    assert read == [0]
    assert allocator.free_up_to(2 * GROUP_FRAMES) >= 2 * GROUP_FRAMES
    assert read == [0, 1, 2]
    assert allocator.free_up_to(10 * GROUP_FRAMES) == len(usable(geometry))
    assert allocator.free_up_to(10 * GROUP_FRAMES) == len(usable(geometry))
    assert read == [0, 1, 2, 3, 4]


@given(st.integers(0, 3 * GROUP_FRAMES), st.integers(0, 40), st.integers(0, 40))
def test_a_run_is_usable_if_each_of_its_frames_is(frames: int, count: int, near: int) -> None:
    geometry = Geometry(FIRST, frames)
    good = usable_near(geometry)
    for edge in (FIRST, FIRST + GROUP_FRAMES, FIRST + frames):
        pfn = edge + near - 20
        wanted = range(pfn, pfn + count)
        one_group = (
            count > 0 and (pfn - FIRST) // GROUP_FRAMES == (wanted[-1] - FIRST) // GROUP_FRAMES
        )
        expected = one_group and all(good(frame) for frame in wanted)
        assert geometry.is_usable(pfn, count) == expected


def usable_near(geometry: Geometry):  # type: ignore[no-untyped-def]
    def is_good(pfn: int) -> bool:
        start = pfn - FIRST
        if not 0 <= start < geometry.frame_count:
            return False
        group, position = divmod(start, GROUP_FRAMES)
        return position >= geometry.kept_of(group)

    return is_good


# Records and the journal

NAMES = st.binary(min_size=1, max_size=255)
PLACE = 1234, 2, 5 << 12
"""Number and generation of an inode, and an offset."""


@given(NAMES, st.integers(1, (1 << 64) - 1), st.integers(1, 15), st.integers(-(1 << 63), 1 << 62))
def test_an_entry_is_read_as_it_was_written(
    name: bytes, number: int, type_: int, time_ns: int
) -> None:
    raw = log_media.seal([log_media.pack_entry(name, number, type_, time_ns)], *PLACE)
    assert len(raw) % 64 == 0
    assert log_media.is_sound(raw, *PLACE)
    assert log_media.unpack_entry(raw) == (name, number, type_, time_ns)


@given(NAMES, st.one_of(st.binary(max_size=300), st.integers(0, 65536).map(lambda n: b"v" * n)))
def test_a_value_is_read_as_it_was_written(name: bytes, value: bytes) -> None:
    whole = b""
    for raw in log_media.pack_values(RecordKind.XATTR, name, value):
        own, part, offset, total = log_media.unpack_value(raw)
        assert (own, offset, total) == (name, len(whole), len(value))
        whole += part
    assert whole == value


@given(NAMES, st.data())
def test_any_byte_that_changes_in_a_record_is_noticed(name: bytes, data: st.DataObject) -> None:
    raw = bytearray(log_media.seal([log_media.pack_entry(name, 77, 8, 5)], *PLACE))
    at, xor = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
    raw[at] ^= xor
    assert not log_media.is_sound(bytes(raw), *PLACE)


@given(NAMES, st.integers(0, 2), st.integers(1, (1 << 64) - 1))
def test_a_record_is_one_of_its_inode_at_its_place_only(name: bytes, which: int, xor: int) -> None:
    raw = log_media.seal([log_media.pack_entry(name, 77, 8, 5)], *PLACE)
    other = list(PLACE)
    other[which] ^= xor
    assert not log_media.is_sound(raw, *other)


@given(st.lists(NAMES, min_size=1, max_size=9))
def test_records_are_sealed_one_behind_the_other(names: list[bytes]) -> None:
    number, generation, offset = PLACE
    records = [log_media.pack_entry(name, 77, 8, 5) for name in names]
    raw = log_media.seal(records, *PLACE)
    at = 0
    for record in records:
        sealed = raw[at : at + len(record)]
        assert log_media.is_sound(sealed, number, generation, offset + at)
        assert sealed[8:] == record[8:]
        at += len(record)
    assert at == len(raw)


@given(st.integers(0, 2), st.integers(1, (1 << 64) - 1))
def test_a_frame_of_a_log_is_one_of_its_inode_at_its_place_only(which: int, xor: int) -> None:
    raw = log_media.pack_frame_head(*PLACE, 1 << 20)
    assert log_media.is_frame_of(raw, *PLACE)
    other = list(PLACE)
    other[which] ^= xor
    assert not log_media.is_frame_of(raw, *other)


WORDS = st.lists(
    st.tuples(st.integers(0, 1 << 50), st.integers(0, 1 << 60), st.integers(0, 1 << 60)),
    min_size=1,
    max_size=8,
)


@given(WORDS, WORDS, st.integers(0, 1 << 32))
def test_of_a_torn_journal_nothing_is_redone(
    old: list[tuple[int, int, int]], new: list[tuple[int, int, int]], seed: int
) -> None:
    rng = random.Random(seed)
    before = pack_journal(old).ljust(FRAME, b"\0")
    after = pack_journal(new) + before[len(pack_journal(new)) :]
    words = [(before if rng.random() < 0.5 else after)[at : at + 8] for at in range(0, FRAME, 8)]
    torn = b"".join(words)
    legal = ([], [JournalEntry(*word) for word in old], [JournalEntry(*word) for word in new])
    assert read_journal(before) == legal[1]
    assert read_journal(after) == legal[2]
    assert read_journal(torn) in legal


# Inodes


def test_a_compacted_log_says_what_the_whole_one_does() -> None:
    rng = random.Random(3)
    compared = 0
    for _ in range(30):
        world = World(standard_image())
        for op in rng.choices(OPERATIONS["standard"], k=25):
            world.run(op)
        for number in world.tree:
            inode = world.fs.inode(number)
            again = Inode(number, inode.slot_offset, inode.generation, inode.birth_ns, inode.log)
            replay = Replay(again, world.fs.geometry)
            slots = 0
            for raw in inode.records():
                replay.apply([(raw[0], raw)])
                slots += raw[1]
            replay.finish()
            for name in ("state", "xattrs", "entries", "target", "parent", "subdirectory_count",
                         "live_slots", "transform", "pieces"):  # fmt: skip
                assert getattr(again, name) == getattr(inode, name), name
            assert list(again.xattrs) == list(inode.xattrs)
            assert list(again.extents) == list(inode.extents)
            assert slots == inode.compacted_slots
            compared += 1
    assert compared > 200


class Readers(Tables):
    """Somebody may see what went, until told otherwise."""

    def __init__(self) -> None:
        self.over: set[object] = set()

    def touched(self, number: int, changed_ns: int) -> None:
        """Nobody asked."""

    def changed(self, number: int) -> object:
        return object()

    gone = changed

    def is_over(self, token: object) -> bool:
        return token in self.over or bool(self.all_over)

    all_over = False


def test_a_slot_is_not_given_out_while_somebody_may_write_to_its_live_line() -> None:
    image = standard_image()
    medium = PlainMedium(image)
    readers = Readers()
    fs = FileSystem(on_medium(template(len(image)), medium), NoMemmap(), readers)
    gone = fs.lookup(ROOT, b"a")
    fs.unlink(ROOT, b"a")
    made = {fs.make(ROOT, b"new%d" % at, FILE) for at in range(30)}
    assert gone not in made
    readers.all_over = True
    fs.tidy()
    made = {fs.make(ROOT, b"more%d" % at, FILE) for at in range(30)}
    assert gone in made


def test_a_frame_that_became_a_files_is_none_of_inodes_to_whoever_was_looking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "_KEPT_SLOTS", 16)
    image = standard_image()
    medium = PlainMedium(image)
    fs = FileSystem(on_medium(template(len(image)), medium), NoMemmap())
    names = {fs.make(ROOT, b"%d" % at, FILE): b"%d" % at for at in range(200)}
    fs = FileSystem(on_medium(template(len(image)), medium), NoMemmap())
    looking = fs.store.table.frames()
    next(looking)
    for name in names.values():
        fs.unlink(ROOT, name)
    fs.tidy()
    number = fs.lookup(ROOT, b"a")
    with suppress(OSError):
        for at in range(1000):
            fs.write(number, at * FRAME, b"\xff" * FRAME)
    mapped = {e.pfn + at for e in fs.extents(number) for at in range(e.frame_count)}
    assert mapped & {name // 8 for name in names}
    assert not mapped & set(looking)
    with suppress(OSError):
        for at in range(300):
            fs.make(ROOT, b"again%d" % at, FILE)
    assert not fs.read_only


# Pages in use


def pages_of(fs_pool_bytes: int) -> OnDemandMemmap:
    pool = template(fs_pool_bytes)
    geometry = PageGeometry(pool.first_data_pfn, pool.data_pfn_count, 0, FRAME)
    return OnDemandMemmap(geometry, 1)


@pytest.mark.parametrize("how", ["truncate", "punch", "unlink", "rename over"])
def test_a_page_that_is_held_is_not_given_out_before_it_is_put(how: str) -> None:
    image = standard_image()
    memmap = pages_of(len(image))
    fs = FileSystem(on_medium(template(len(image)), PlainMedium(image)), memmap, NoTables())
    number = fs.lookup(ROOT, b"b")
    for name in (b"b2",):
        fs.unlink(fs.lookup(ROOT, b"d"), name)
    for name in b"012345":
        fs.unlink(fs.lookup(ROOT, b"n"), bytes([name]))
    content = bytes(fs.read(number, 0, 10000))
    [extent] = fs.extents(number)
    memmap.get_page(extent.pfn + 1)
    if how == "truncate":
        fs.set_attributes(number, size_bytes=0)
    elif how == "punch":
        fs.punch(number, 0, 3 * FRAME)
    elif how == "unlink":
        fs.unlink(ROOT, b"b")
    else:
        fs.rename(ROOT, b"a", ROOT, b"b")
    other = fs.make(ROOT, b"other", FILE)
    with suppress(OSError):
        for at in range(1000):
            fs.write(other, at * FRAME, b"o" * FRAME)
    assert fs.store.busy.frame_count > 0
    assert fs.space().busy_frames == fs.store.busy.frame_count
    held = fs.medium.read((extent.pfn + 1) * FRAME, FRAME)
    assert bytes(held) == content[FRAME : 2 * FRAME]
    assert not fs.allocator.is_free(extent.pfn + 1)
    memmap.put_page(extent.pfn + 1)
    fs.tidy()
    assert fs.store.busy.frame_count == 0
    assert fs.allocator.is_free(extent.pfn + 1)
    fs.write(other, fs.attributes(other).size_bytes, b"o" * FRAME)


def test_a_crash_forgets_who_held_a_page() -> None:
    image = standard_image()
    memmap = pages_of(len(image))
    medium = PlainMedium(image)
    pool = on_medium(template(len(image)), medium)
    fs = FileSystem(pool, memmap)
    free = fs.space().free_frames
    number = fs.lookup(ROOT, b"s")
    mapped = sum(e.frame_count for e in fs.extents(number))
    memmap.get_pages(fs.extents(number)[0].pfn, 1)
    fs.unlink(ROOT, b"s")
    assert fs.space().free_frames < free + mapped
    again = FileSystem(pool, NoMemmap())
    while again.tidy():
        pass
    assert again.space().free_frames == free + mapped


# Leaks


@pytest.mark.slow
def test_a_search_for_leaks_beside_the_work_frees_leaks_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leaks, "_STEP_SECONDS", 2e-5)
    rng = random.Random(9)
    searched = 0
    for _ in range(40):
        world = World(standard_image())
        for op in rng.choices(OPERATIONS["standard"], k=6):
            world.run(op)
        # The power fails, and nothing that wasn't durable survives.
        world = World(world.medium.durable)
        checker = Checker(int(world.pool.first_data_pfn), world.pool.data_pfn_count)
        while world.fs.tidy():
            searched += 1
            world.tree = snapshot(world.fs)
            ops = [op for op in OPERATIONS["standard"] if op.name not in ("remount", "end", "tidy")]
            if searched % 3 == 0:
                world.run(rng.choice(ops))
            report = checker.check(bytes(world.medium.read(0, world.medium.size_bytes)))
            assert report.problems == []
        while world.held:
            world.fs.drop(world.held.pop())
        report = checker.check(bytes(world.medium.read(0, world.medium.size_bytes)))
        assert (report.problems, report.leaked, report.orphans) == ([], [], [])
        assert difference(snapshot(world.fs), world.tree, {}, blocks=False) == ""
    assert searched > 100


def test_an_inode_that_was_removed_is_not_read() -> None:
    image = standard_image()
    fs = FileSystem(on_medium(template(len(image)), PlainMedium(image)), NoMemmap())
    number = fs.lookup(ROOT, b"a")
    fs.unlink(ROOT, b"a")
    with pytest.raises(OSError, match="no such inode") as stale:
        fs.attributes(number)
    assert stale.value.errno == errno.ESTALE
    with pytest.raises(DamagedFileSystem):
        FileSystem(on_medium(template(len(image)), PlainMedium(blank_image())), NoMemmap())
