"""On a full pool, whatever takes no more room in the end goes on working: chmod, rename, unlink."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.fs_checker import Checker
from kit.fs_crash import DIRECTORY, FILE, FRAME, ROOT, PlainMedium, blank_image, on_medium, template
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.filesystem import FileSystem

FRAMES = 700


class Full:
    """A small file system that is filled, used and mounted again."""

    def __init__(self, frames: int = FRAMES) -> None:
        image = blank_image(frames)
        self.medium = PlainMedium(image)
        self.pool = on_medium(template(len(image)), self.medium)
        FileSystem.format(self.pool)
        self.mount()

    def mount(self) -> None:
        self.fs = FileSystem(self.pool, NoMemmap())

    def remount(self) -> None:
        self.fs.end()
        self.mount()

    def fill(self, make_one: Callable[[int], object]) -> int:
        """Do it until there is no room; how often."""
        for at in itertools.count():
            try:
                make_one(at)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                return at
        raise AssertionError

    def check(self) -> None:
        """What is stored is a sound file system."""
        self.remount()
        image = bytes(self.medium.read(0, self.medium.size_bytes))
        report = Checker(int(self.pool.first_data_pfn), self.pool.data_pfn_count).check(image)
        assert report.problems == []


@pytest.fixture
def full() -> Full:
    return Full()


def write_one(full: Full, number: int) -> Callable[[int], object]:
    return lambda at: full.fs.write(number, at * FRAME, b"x" * FRAME)


def test_attributes_change_for_ever_on_a_full_pool(full: Full) -> None:
    fs = full.fs
    files = [fs.make(ROOT, b"%d" % at, FILE) for at in range(300)]
    full.fill(write_one(full, files[0]))
    for mode in range(20):
        for number in files:
            fs.set_attributes(number, mode=0o600 | mode)
        fs.set_attributes(files[0], atime_ns=mode, mtime_ns=mode)
    assert all(fs.attributes(number).mode & 0o77 == 19 for number in files)
    full.check()


def test_names_change_for_ever_on_a_full_pool(full: Full) -> None:
    fs = full.fs
    directories = [fs.make(ROOT, b"d%d" % at, DIRECTORY) for at in range(20)]
    files = [fs.make(directories[at % 20], b"%d" % at, FILE) for at in range(300)]
    full.fill(write_one(full, files[0]))
    for step in range(1, 9):
        for at in range(300):
            old, new = directories[(at * step) % 20], directories[(at * (step + 1)) % 20]
            fs.rename(old, b"%d" % at, new, b"%d" % at)
    assert sum(len(fs.names(directory)) for directory in directories) == 300
    full.check()


@pytest.mark.parametrize("is_mounted_again", [False, True])
def test_a_pool_full_of_links_can_be_emptied_in_any_order(*, is_mounted_again: bool) -> None:
    """A link that goes gives nothing back but what its directory's log can do without."""
    full = Full(200)
    fs = full.fs
    directory = fs.make(ROOT, b"d", DIRECTORY)
    number = fs.make(ROOT, b"a", FILE)
    other = fs.make(ROOT, b"b", FILE)
    count = 0

    def link(at: int) -> None:
        nonlocal count
        fs.link(number, directory, b"%d" % at)
        count += 1

    full.fill(link)
    if is_mounted_again:
        full.remount()
        fs = full.fs
    # What frees must be able to, whatever came after that had more room.
    full.fill(write_one(full, other))
    assert count > 4000
    names = [b"%d" % at for at in range(count)]
    random.Random(0).shuffle(names)
    for name in names:
        fs.unlink(directory, name)
    fs.rmdir(ROOT, b"d")
    full.check()


def test_what_was_filled_before_another_mount_keeps_room_for_the_longest_log(full: Full) -> None:
    fs = full.fs
    directory = fs.make(ROOT, b"d", DIRECTORY)
    number, other = fs.make(ROOT, b"a", FILE), fs.make(ROOT, b"b", FILE)
    count = 8000
    for at in range(count):
        fs.link(number, directory, b"%d" % at)
    full.remount()
    # Nobody has looked at the directory yet.
    fs = full.fs
    full.fill(write_one(full, other))
    names = [b"%d" % at for at in range(count)]
    random.Random(1).shuffle(names)
    for name in names:
        fs.unlink(directory, name)
    full.check()


def test_removing_what_is_set_and_cutting_off_work_on_a_full_pool(full: Full) -> None:
    fs = full.fs
    files = [fs.make(ROOT, b"%d" % at, FILE) for at in range(200)]
    for number in files:
        fs.set_xattr(number, b"user.a", b"x" * 40)
        fs.set_xattr(number, b"user.b", b"x" * 200)
        fs.write(number, 0, b"x" * 5000)
    full.fill(write_one(full, files[0]))
    for number in files[1:]:
        fs.set_xattr(number, b"user.b", b"y" * 200)
        fs.set_attributes(number, size_bytes=10_000)
        fs.remove_xattr(number, b"user.a")
        fs.set_attributes(number, size_bytes=4000)
        fs.set_attributes(number, size_bytes=0)
    full.check()


STEPS = ["chmod", "rename", "move", "over", "exchange", "unlink", "unset", "cut", "punch", "fill",
         "remount", "many"]  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 30), st.lists(st.sampled_from(STEPS), min_size=5, max_size=40))
def test_nothing_that_takes_no_room_is_refused_for_want_of_room(
    seed: int, steps: list[str]
) -> None:
    chance = random.Random(seed)
    full = Full(chance.choice([200, 400]))
    directories = [full.fs.make(ROOT, b"d%d" % at, DIRECTORY) for at in range(3)]
    names: dict[tuple[int, bytes], int] = {}
    count = itertools.count()

    def fill(_: int) -> None:
        fs, directory, name = full.fs, chance.choice(directories), b"%06d" % next(count)
        if names and chance.random() < 0.5:
            number = chance.choice(list(names.values()))
            fs.link(number, directory, name)
        else:
            number = fs.make(directory, name, FILE)
        names[directory, name] = number
        fs.write(number, chance.randrange(400) * FRAME, b"x" * FRAME * chance.randrange(1, 9))
        if chance.random() < 0.3:
            fs.set_xattr(number, b"user.x", bytes(chance.randrange(300)))

    def one(step: str) -> None:
        fs = full.fs
        (directory, name), number = chance.choice(list(names.items()))
        if step == "chmod":
            fs.set_attributes(number, mode=chance.randrange(0o1000))
        elif step in ("rename", "move"):
            new = chance.choice(directories) if step == "move" else directory
            to = b"%06d" % next(count)
            fs.rename(directory, name, new, to)
            del names[directory, name]
            names[new, to] = number
        elif step == "over":
            (onto, old), other = chance.choice(list(names.items()))
            fs.rename(directory, name, onto, old)
            if other != number:
                del names[directory, name]
                names[onto, old] = number
        elif step == "exchange":
            (onto, old), other = chance.choice(list(names.items()))
            fs.rename(directory, name, onto, old, 2)
            names[directory, name], names[onto, old] = other, number
        elif step == "unlink":
            fs.unlink(directory, name)
            del names[directory, name]
        elif step == "unset":
            if fs.list_xattrs(number):
                fs.remove_xattr(number, b"user.x")
        elif step == "cut":
            fs.set_attributes(number, size_bytes=chance.randrange(10 * FRAME))
        elif step == "punch":
            fs.punch(number, chance.randrange(400) * FRAME, FRAME)

    full.fill(fill)
    for step in steps:
        if step == "remount":
            full.remount()
        elif step == "fill":
            full.fill(fill)
        elif len(names) > 1:
            kinds = [step] if step != "many" else STEPS[:8]
            for _ in range(chance.choice([1, 20, 200])):
                if len(names) > 1:
                    one(chance.choice(kinds))
    full.check()
    for directory, name in list(names):
        full.fs.unlink(directory, name)
    full.check()
    with suppress(OSError):
        full.fs.make(ROOT, b"room again", FILE)
