"""The power fails everywhere in what a file system of mode `fs` does; see `fs_crash` for the rules.

One operation at a time is looked at closely, on two trees; of sequences of two a sample that meets
every operation as first and as second, and longer ones at random. PMEMFS_POWER_FAILURE multiplies
what is tried: 1 in the suite, 100 is hours. The last part removes flushes and fences in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import sys
from collections.abc import Iterator, Sequence

import pytest

from kit.fs_crash import (
    DIRECTORY,
    FILE,
    FRAME,
    ROOT,
    Judge,
    Moment,
    Op,
    World,
    file_system,
    on_medium,
    snapshot,
    template,
)
from kit.fs_operations import (
    BIG_XATTR,
    IMAGES,
    OPERATIONS,
    allocated,
    attributed,
    link,
    make,
    native,
    persisted,
    punched,
    rename,
    sealed_image,
    standard_image,
    trimmed,
    truncated,
    unlink,
    written,
    xattr,
    zeroed,
)
from kit.large_directories import add_names, large_directory, remove_names
from pmemfs.media import log as log_media
from pmemfs.medium.base import Durability
from pmemfs.medium.recording import RecordingMedium
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs import compaction, table, transaction
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.livelines import LiveLines

SCALE = float(os.environ.get("PMEMFS_POWER_FAILURE", "1"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(300, int(SCALE * 3600)))]


def scaled(count: int) -> int:
    return max(1, int(count * SCALE))


def judge_of(image: bytes, deep_every: int = 0) -> Judge:
    return Judge(template(len(image)), deep_every=deep_every)


def explored(
    image: bytes, ops: Sequence[Op], judge: Judge, *, limit: int, all_of_them: bool = False,
    durability: Durability = Durability.CACHE_LINES,
) -> list[str]:  # fmt: skip
    """The violations in a sequence, of which by default only the last operation is looked at."""
    world = World(image, limit=limit, judge=judge, durability=durability)
    for op in ops[:-1]:
        world.run(op, explore=all_of_them)
    world.run(ops[-1])
    return [f"{', '.join(op.name for op in ops)}: {why}" for why in world.violations]


def said(what: str, judge: Judge) -> None:
    print(f"{what}: {judge.states} states, {judge.deep_states} of them went on to a leak search")


@pytest.mark.parametrize("kind", IMAGES)
def test_each_operation_is_there_wholly_or_not_at_all(kind: str) -> None:
    image = IMAGES[kind]()
    judge = judge_of(image, deep_every=29)
    violations = []
    for op in OPERATIONS[kind]:
        violations += explored(image, [op], judge, limit=scaled(24))
    said(f"single operations, {kind}", judge)
    assert violations == []
    assert judge.states > 20 * len(OPERATIONS[kind])


EDGES_OF_BLOCKS = [
    written("a", 1, 1),
    written("b", 37, 11),
    written("b", 40, 20),
    written("b", 9995, 5),
    written("d/x", 4090, 10),
    written("d/t", 60, 20),
    truncated("a", 17),
    truncated("b", 20000),
    punched("b", 7, 20),
    zeroed("b", 35, 10, keep_size=True),
]
"""No block of 16 bytes is written as a whole, so no byte may be lost with the power."""


def edges_torn(op: Op) -> list[str]:
    image = sealed_image()
    judge = judge_of(image)
    violations = explored(image, [op], judge, limit=scaled(200))
    said(op.name, judge)
    assert judge.states > 3
    return violations


@pytest.mark.parametrize("op", EDGES_OF_BLOCKS, ids=lambda op: op.name)
def test_a_torn_block_of_an_encrypted_file_takes_no_other_bytes_with_it(op: Op) -> None:
    assert edges_torn(op) == []


def test_a_torn_block_that_was_not_noted_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveLines, "note_redo", lambda *_: None)
    seen = [op for op in EDGES_OF_BLOCKS if edges_torn(op)]
    assert len(seen) > len(EDGES_OF_BLOCKS) // 2


def pairs(kind: str, count: int) -> Iterator[tuple[Op, Op]]:
    """Sequences of two: all of them, or so many that each comes first and second about as often."""
    ops = OPERATIONS[kind]
    everything = [(first, second) for first in ops for second in ops]
    if count >= len(everything):
        yield from everything
        return
    rng = random.Random(5)
    for _ in range(-(-count // len(ops))):
        seconds = list(ops)
        rng.shuffle(seconds)
        yield from zip(ops, seconds, strict=True)


@pytest.mark.parametrize("kind", IMAGES)
def test_of_two_operations_the_first_stays_while_the_second_is_under_way(kind: str) -> None:
    image = IMAGES[kind]()
    judge = judge_of(image, deep_every=41)
    violations = []
    count = 0
    for pair in pairs(kind, scaled(len(OPERATIONS[kind]) * 2)):
        violations += explored(image, pair, judge, limit=scaled(5))
        count += 1
    said(f"{count} sequences of two, {kind}", judge)
    assert violations == []


def test_random_sequences_survive_a_power_failure_anywhere() -> None:
    rng = random.Random(7)
    states = 0
    for kind in IMAGES:
        image = IMAGES[kind]()
        judge = judge_of(image, deep_every=37)
        for _ in range(scaled(5)):
            ops = rng.choices(OPERATIONS[kind], k=12)
            assert explored(image, ops, judge, limit=4, all_of_them=True) == []
        states += judge.states
        said(f"random sequences of 12, {kind}", judge)
    assert states > 500


def test_what_a_power_failure_left_survives_a_second_one() -> None:
    rng = random.Random(11)
    image = IMAGES["standard"]()
    first = judge_of(image, deep_every=23)
    for op in rng.sample(OPERATIONS["standard"], 20):
        explored(image, [op], first, limit=6)
    second = judge_of(image, deep_every=19)
    left = rng.sample(first.left, min(len(first.left), scaled(12)))
    assert len(left) > 5
    for image in left:
        ops = [REMOUNT, *rng.choices(OPERATIONS["standard"], k=4), TIDY]
        assert explored(image, ops, second, limit=3, all_of_them=True) == []
    said(f"after {len(left)} power failures", second)


REMOUNT = next(op for op in OPERATIONS["standard"] if op.name == "remount")
TIDY = next(op for op in OPERATIONS["standard"] if op.name == "tidy")


def test_no_checksum_hides_that_a_fence_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal's own is what makes it one, so that one stays."""
    monkeypatch.setattr(log_media, "is_sound", lambda *_: True)
    monkeypatch.setattr(log_media, "is_frame_of", lambda *_: True)
    for kind in IMAGES:
        image = IMAGES[kind]()
        judge = judge_of(image)
        violations = []
        for op in OPERATIONS[kind][::3]:
            violations += explored(image, [op], judge, limit=scaled(8))
        said(f"checksums ignored, {kind}", judge)
        assert violations == []


WRITES = [op for op in OPERATIONS["standard"] if op.writes]


@pytest.mark.parametrize(
    "op", [op for op in WRITES if "native" not in op.name], ids=lambda o: o.name
)
def test_where_msync_makes_durable_no_stale_frame_shows_through_either(op: Op) -> None:
    """There the data plane doesn't order bytes and size, and the kernel writes back as it likes."""
    image = standard_image(Durability.MSYNC)
    judge = judge_of(image)
    path = op.writes
    for ops in ([op], [op, native_append(path)]):
        assert explored(image, ops, judge, limit=scaled(8), durability=Durability.MSYNC) == []


@pytest.mark.parametrize("keep_size", [True, False])
def test_with_msync_frames_that_were_reserved_are_zeroes_too(keep_size: bool) -> None:
    image = standard_image(Durability.MSYNC)
    ops = [allocated("a", 0, 3 * FRAME, keep_size=keep_size), native_append("a")]
    judge = judge_of(image)
    assert explored(image, ops, judge, limit=60, durability=Durability.MSYNC) == []


def native_append(path: str) -> Op:
    def run(w: World) -> None:
        number = w.ino(path)
        size = w.fs.attributes(number).size_bytes
        length = min(6000, w.fs.append_limit(number) - size)
        native(path, size, length).run(w)

    return Op(f"native append to {path}", run, writes=path)


# Bugs of others: issues of linux-nova that Chipmunk found (LeBlanc et al., EuroSys 2023), and ours.

BAR = [make("bar", FILE), make("A", DIRECTORY)]
BUGS: dict[str, list[Op]] = {
    "a directory has its log as soon as it has its name (linux-nova 91)": [
        make("A", DIRECTORY),
        make("A/foo", FILE),
    ],
    "head and tail of a log move together (linux-nova 94)": [
        make("A", DIRECTORY),
        *[link("a", f"A/{at}") for at in range(6)],
        rename("A", "B"),
    ],
    "a rename over a name loses neither file (linux-nova 116)": [rename("b", "a")],
    "a reservation leaves what was written (linux-nova 118)": [
        make("foo", FILE),
        written("foo", 0, 4096),
        allocated("foo", 0, 1024, keep_size=True),
        persisted("foo"),
    ],
    "a link and its count come together (linux-nova 119)": [
        *BAR,
        rename("bar", "A/bar"),
        link("A/bar", "bar"),
    ],
    "a name and its count go together (linux-nova 120)": [
        make("foo", FILE),
        link("foo", "bar"),
        unlink("bar"),
    ],
    "an append that is interrupted leaves what was there (linux-nova 121)": [
        make("foo", FILE),
        written("foo", 0, 4),
        persisted("foo"),
        written("foo", 4, 24),
    ],
    "a truncation leaves the link count (linux-nova 127)": [
        make("foo", FILE),
        link("foo", "bar"),
        truncated("foo", 0),
    ],
    "a truncated file can be read (linux-nova 131)": [
        make("foo", FILE),
        written("foo", 0, 32),
        truncated("foo", 1),
        truncated("foo", 4096),
    ],
    "a journal is used anew while the words of the one before are under way": [
        rename("a", "e/a"),
        rename("e/a", "a"),
        rename("a", "b"),
        make("e/a", FILE),
    ],
    "a slot that was freed and given out again is one inode": [
        unlink("d/t"),
        make("t", NewInode(0o100600, 1, 1)),
        written("t", 0, 100),
        truncated("t", 10),
    ],
    "frames that were freed and given out again show nothing of their file": [
        truncated("b", 0),
        written("a", 3, 20000),
        unlink("a"),
        written("b", 0, 9000),
    ],
    "sizes of before a truncation don't come back": [
        native("b", 10000, 2000),
        truncated("b", 100),
        written("b", 100, 50),
        truncated("b", 3000),
        native("b", 3000, 1000),
        persisted("b"),
        native("b", 4000, 96),
        truncated("b", 4000),
    ],
    "an attribute of 64 KiB is replaced": [
        xattr("a", b"user.big", BIG_XATTR),
        xattr("a", b"user.big", BIG_XATTR[::-1]),
        attributed("a", mode=0o600),
    ],
}


@pytest.mark.parametrize("bug", BUGS)
def test_what_others_got_wrong(bug: str) -> None:
    image = IMAGES["standard"]()
    judge = judge_of(image, deep_every=13)
    assert explored(image, BUGS[bug], judge, limit=scaled(20), all_of_them=True) == []
    said(bug, judge)


def test_a_power_failure_during_recovery_is_recovered_from() -> None:
    image = IMAGES["edges"]()
    judge = judge_of(image, deep_every=1)
    ops = [rename("c/1", "m/1"), rename("c", "m", 2)]
    assert explored(image, ops, judge, limit=40) == []
    second = judge_of(image)
    for left in judge.left:
        assert mounted_under_failure(left, second) == []
    print(f"{len(judge.left)} images, {second.states} states during recovery")
    assert second.states > len(judge.left)


def mounted_under_failure(image: bytes, judge: Judge) -> list[str]:
    """What is wrong where the power fails again while an image is mounted, or after it."""
    moments: list[Moment] = []
    medium = RecordingMedium(image)
    medium.at_each_fence = lambda: moments.append(Moment.of(medium))
    pool = on_medium(template(len(image)), medium)
    fs = file_system(pool)
    tree = snapshot(fs)
    medium.at_each_fence = lambda: None
    moments.append(Moment.of(medium))
    return [why for m in moments for why in judge.why_not(m, (tree,), {}, True, 20)]


def test_a_journal_is_not_redone_when_a_log_comes_back_to_a_frame_that_it_had() -> None:
    image = IMAGES["edges"]()
    judge = judge_of(image)
    world = World(image, limit=2, judge=judge)
    number = world.ino("h")
    before = set(world.fs.inode(number).log.frames)
    came_back = False
    for at in range(200):
        world.run(attributed("h", mode=0o600 + at % 8))
        came_back = came_back or (at > 0 and world.fs.inode(number).log.frames[-1] in before)
    assert came_back
    assert world.violations == []


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are long, and steps small, by the measure of a small pool."""
    monkeypatch.setattr(transaction, "_MOST_SLOTS_AT_ONCE", 20)
    monkeypatch.setattr(compaction, "STEP_RECORDS", 20)
    monkeypatch.setattr(compaction, "_FEW_SLOTS", 4)
    monkeypatch.setattr(compaction, "_FRAMES_AT_ONCE", 2)


def world_of_long_log(medium: RecordingMedium | None = None, **options: object) -> World:
    """A world with a directory whose log is mostly dead, and is going to be compacted."""
    image = IMAGES["standard"]()
    world = World(image, medium=medium, judge=judge_of(image, deep_every=31), **options)  # type: ignore[arg-type]
    fs = world.fs
    fs.store.ground.may_have_leaks = False
    directory = large_directory(fs, ROOT, b"long", 50)
    file = fs.lookup(directory, b"n0")
    while not (fs.store.housekeeping._long_logs and fs.inode(directory).is_mostly_dead):
        remove_names(fs, directory, range(1, 25))
        add_names(fs, directory, file, range(1, 25))
    fs.medium.fence()
    world.tree = snapshot(fs)
    return world


COMPACT = Op("a step of a compaction", lambda w: w.fs.store.housekeeping.compact_some())
WHILE_COMPACTED: list[Op] = [
    op
    for at in range(6)
    for op in (
        COMPACT,
        unlink(f"long/n{at + 20}"),
        link("long/n0", f"long/new{at}"),
        rename(f"long/n{at + 30}", f"long/moved{at}"),
        xattr("long", b"user.x", b"x" * (100 + 700 * at)),
        attributed("long", mode=0o700 + at),
    )
]


@pytest.mark.usefixtures("stepwise")
def test_a_power_failure_leaves_the_old_log_or_the_new_one_of_a_compaction() -> None:
    world = world_of_long_log(limit=scaled(6))
    number = world.ino("long")
    before = world.fs.inode(number).log.head
    for op in WHILE_COMPACTED:
        world.run(op)
    while world.fs.store.housekeeping._compaction:
        world.run(COMPACT)
    assert world.violations == []
    assert world.fs.inode(number).log.head != before
    assert world.judge is not None
    said("a compaction beside operations", world.judge)


@pytest.mark.usefixtures("stepwise")
def test_without_a_flush_of_a_compaction_something_goes_wrong() -> None:
    medium = SiteMedium(IMAGES["standard"]())
    world = world_of_long_log(medium)
    start = medium.call_count
    while world.fs.store.housekeeping.compact_some():
        pass
    calls = [
        number
        for number, site in enumerate(medium.sites[start:], start)
        if "flush" in site and "_write <" in site
    ]
    assert calls
    for call in calls:
        broken = world_of_long_log(limit=10, ignored={call})
        for _ in range(8):
            broken.run(COMPACT)
        assert broken.violations


def test_what_was_fsynced_stays_although_its_inode_was_not_in_memory() -> None:
    """The data plane writes to open files, of which the control plane may have forgotten all."""
    image = IMAGES["standard"]()
    judge = judge_of(image)

    def forget_and_persist(w: World) -> None:
        number = w.ino("b")
        native("b", 10000, 2000).run(w)
        w.fs.hold(number)
        for _ in range(30):
            w.fs.store.ground.clock += 1
            w.fs.store.housekeeping.drop_idle()
        assert w.fs.store.cached(number) is None
        w.fs.persist(number)

    op = Op("append, forget, persist", forget_and_persist, writes="b", persists="b")
    assert explored(image, [op], judge, limit=200) == []


def test_a_file_system_can_be_mounted_after_frames_of_inodes_were_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last journal may be about a slot in one of them."""
    monkeypatch.setattr(table, "_KEPT_SLOTS", 16)
    image = IMAGES["standard"]()
    world = World(image)
    fs = world.fs
    numbers = {fs.make(ROOT, b"%d" % at, FILE): b"%d" % at for at in range(80)}
    frames: dict[int, list[int]] = {}
    for number in numbers:
        frames.setdefault(number // 8, []).append(number)
    whole = [members for members in frames.values() if len(members) == 8]
    # One that is emptied first but for its last inode, which is the last of all to go.
    last = whole[0][-1]
    for number in [*whole[0][:-1], *(n for n in numbers if n not in whole[0]), last]:
        fs.unlink(ROOT, numbers[number])
    fs.tidy()
    assert not fs.store.table.has_inodes(Run(last // 8, 1))
    fs.write(world.ino("a"), 3, b"\xff" * 80 * FRAME)
    tree = snapshot(fs)
    world.remount()
    assert snapshot(world.fs) == tree
    assert judge_of(image).checker.check(world.medium.durable).problems == []


# The gate


class SiteMedium(RecordingMedium):
    """Remembers who called for each flush and fence."""

    def __init__(self, image: bytes) -> None:
        super().__init__(image)
        self.sites: list[str] = []

    def _counts(self) -> bool:
        frame = sys._getframe(1)
        names = [frame.f_code.co_name]
        while len(names) < 4 and frame.f_back is not None:
            frame = frame.f_back
            # The metadata's medium only passes on what it is asked for.
            if "/pmemfs/volume/" in frame.f_code.co_filename and not (
                frame.f_code.co_filename.endswith("/metadata.py")
            ):
                names.append(frame.f_code.co_name)
        self.sites.append(" < ".join(name for name in names if name != "persist"))
        return super()._counts()


AFTER = [make("after1", FILE), link("after1", "after2"), attributed("after1", mode=0o600)]
"""What follows uses the journal and the slots anew, where what went before must be durable."""


def punch_twice(w: World) -> None:
    """An edge of a block first, and then the whole block, which no note may undo."""
    w.fs.punch(w.ino("b"), 35, 10)
    w.fs.punch(w.ino("b"), 32, 16)


PUNCHED_TWICE = dataclasses.replace(punched("b", 32, 16), name="punch twice", run=punch_twice)
END, READ_ONLY_AND_BACK = (
    next(op for op in OPERATIONS["standard"] if op.name == name)
    for name in ("end", "read-only and back")
)
GATED: list[tuple[str, list[Op], Op]] = [
    ("standard", [native("b", 10000, 2000)], persisted("b")),
    ("standard", [native("b", 10000, 2000)], trimmed("b")),
    ("standard", [native("b", 10000, 2000)], END),
    ("standard", [unlink("d/t")], END),
    ("standard", [native("b", 10000, 2000)], READ_ONLY_AND_BACK),
    ("standard", [unlink("d/t")], READ_ONLY_AND_BACK),
    ("standard", [native("b", 0, 10), persisted("b")], attributed("b", mtime_ns=-6)),
    ("sealed", [], PUNCHED_TWICE),
    *[(kind, [], op) for kind, ops in OPERATIONS.items() for op in ops],
]

UNNEEDED = {
    "flush < _store < free < _free": "a bit that stays set is a leak, which is found",
    "flush < store_clean < leave_clean < end": "what isn't marked clean is searched for leaks",
    "fence < store_clean < leave_clean < end": "what isn't marked clean is searched for leaks",
    "flush < store_clean < leave_clean": "what isn't marked clean is searched for leaks",
    "fence < store_clean < leave_clean": "what isn't marked clean is searched for leaks",
    "flush < note_log_frames < keep_reserve < _commit": "a shorter reserve loses nothing",
    "flush < set_live_size < apply < _commit": "without it, the record's size counts",
    "flush < set_live_size < write": "`persist` flushes the live line",
    "flush < set_written_ns < write": "`persist` flushes the live line",
}
"""What no power failure can tell from its absence, and why."""


@functools.cache
def sites() -> dict[str, list[tuple[int, int]]]:
    """All flushes and fences, by who calls: where in `GATED`, and the numbers of the calls."""
    found: dict[str, list[tuple[int, int]]] = {}
    for at, (kind, before, op) in enumerate(GATED):
        image = IMAGES[kind]()
        medium = SiteMedium(image)
        world = World(image, medium=medium)
        for step in before:
            world.run(step)
        start = medium.call_count
        world.run(op)
        here: dict[str, list[int]] = {}
        for number, site in enumerate(medium.sites[start:], start):
            if "<" in site:
                here.setdefault(site, []).append(number)
        for site, calls in here.items():
            found.setdefault(site, []).extend((at, call) for call in {calls[0], calls[-1]})
    return found


def is_noticed(at: int, call: int) -> bool:
    """Whether anything goes wrong where one call does nothing."""
    kind, before, op = GATED[at]
    image = IMAGES[kind]()
    # A block and its note lie in two lines, of which each may have several contents.
    limit = 40 if kind == "sealed" else 10
    world = World(image, limit=limit, judge=judge_of(image), ignored={call})
    for step in before:
        world.run(step, explore=False)
    path = op.writes
    for step in [op, *([persisted(path)] if path else []), *AFTER]:
        world.run(step)
        if world.violations:
            return True
    return False


def test_without_any_one_flush_or_fence_something_goes_wrong() -> None:
    unnoticed = {}
    for site, places in sites().items():
        tried = places[:: max(1, len(places) // scaled(5))]
        if site not in UNNEEDED:
            # The sample may miss the few operations that it matters to.
            tried += [place for place in places if place not in tried]
        if not any(is_noticed(*place) for place in tried):
            unnoticed[site] = len(tried)
    print(f"{len(sites())} places that flush or fence, unnoticed: {unnoticed}")
    assert unnoticed.keys() == UNNEEDED.keys()


def test_without_a_flush_in_the_recovery_something_goes_wrong() -> None:
    """Its fence isn't needed: the next commit has one before it uses the journal."""
    image = IMAGES["edges"]()
    judge = judge_of(image, deep_every=1)
    explored(image, [rename("c", "m", 2)], judge, limit=20)
    noticed = 0
    for left in judge.left[::4]:
        medium = RecordingMedium(left)
        file_system(on_medium(template(len(left)), medium))
        for call in range(medium.call_count - 1):
            world = World(left, limit=10, judge=judge_of(image), ignored={call})
            for step in AFTER:
                world.run(step)
            noticed += bool(world.violations)
    assert noticed > 2
