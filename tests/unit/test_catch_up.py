"""The daemon sees what workers have changed, and a worker what the daemon has."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from kit.fs_tree import DIRECTORY, FILE
from kit.second_writer import TwoWriters, described
from pmemfs.media.inode import ROOT
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.reading import read_log
from pmemfs.volume.fs.reserves import Reserves


def assert_like_its_log(fs: FileSystem) -> None:
    """Everything in memory is what a reader of the whole log would make of it."""
    for inode in list(fs.store.cache.inodes):
        stored = read_log(fs.medium, fs.store.table, inode.number)
        assert stored is not None, inode.number
        assert described(inode) == described(stored), inode.number


class Story:
    """Random operations of both writers in a few directories."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.both = TwoWriters()
        self.directories = [ROOT]
        self.count = 0

    def name(self) -> bytes:
        return b"%d" % self.chance.randrange(8) * self.chance.choice((1, 1, 60))

    def step(self, fs: FileSystem) -> None:
        chance = self.chance
        directory = chance.choice(self.directories)
        name, kind = self.name(), chance.randrange(13)
        if kind < 3:
            fs.make(directory, name, FILE)
        elif kind == 3 and len(self.directories) < 5:
            self.directories.append(fs.make(directory, name, DIRECTORY))
        elif kind == 4:
            fs.unlink(directory, name)
        elif kind == 5:
            number = fs.lookup(directory, name)
            fs.rmdir(directory, name)
            self.directories.remove(number)
        elif kind in (6, 7):
            fs.rename(directory, name, chance.choice(self.directories), self.name())
        elif kind == 8:
            number = fs.lookup(directory, name)
            fs.write(number, chance.randrange(9000), bytes([chance.randrange(256)]) * 5000)
        elif kind == 9:
            fs.set_attributes(fs.lookup(directory, name), mode=chance.randrange(0o777))
        elif kind == 10:
            fs.link(fs.lookup(directory, name), chance.choice(self.directories), self.name())
        elif kind == 11:
            # So that logs come to have several frames.
            number = fs.lookup(directory, name)
            for at in range(chance.randrange(80)):
                fs.link(number, directory, b"%d-%d" % (at, chance.randrange(4)) * 30)
        else:
            number = fs.lookup(directory, name)
            fs.set_xattr(number, b"user.x", bytes(chance.randrange(90)))

    def go_on(self, turns: int) -> None:
        for _ in range(turns):
            of_worker = self.chance.random() < 0.6
            with self.both.turn(of_worker=of_worker, lost=self.chance.random() < 0.1) as fs:
                for _ in range(self.chance.randrange(4)):
                    with suppress(OSError):
                        self.step(fs)
                    assert not fs.damage
                    self.directories = [
                        number for number in self.directories if fs.store.table.head(number)
                    ]
            if not of_worker:
                self.both.refill()
            with self.both.turn(of_worker=False) as daemon:
                assert not daemon.damage
                assert_like_its_log(daemon)


@pytest.mark.parametrize("seed", range(25))
def test_what_either_writer_knows_is_what_the_logs_say(seed: int) -> None:
    story = Story(seed)
    story.go_on(60)
    with story.both.turn(of_worker=True) as worker:
        assert_like_its_log(worker)
    with story.both.turn(of_worker=False) as daemon:
        daemon.end()
    assert story.both.tree.check().problems == []


def test_a_daemon_that_takes_over_gives_out_no_slot_that_workers_may_take() -> None:
    both = TwoWriters()
    handed_out = set(both.slots.numbers())
    assert len(handed_out) > 8
    daemon = FileSystem(both.tree.pool, NoMemmap())
    ground = daemon.store.ground
    ground.reserves = Reserves(
        ground.medium, ground.allocator, ground.table, both.slots, both.frames
    )
    while daemon.search_on():
        pass
    for at in range(2 * len(handed_out)):
        daemon.make(ROOT, b"%d" % at, FILE)
    assert set(both.slots.numbers()) == handed_out
    assert not handed_out & {inode.slot_offset for inode in daemon.store.cache.inodes}
    daemon.end()
    assert both.tree.check().problems == []


@pytest.fixture
def both() -> TwoWriters:
    return TwoWriters()


def test_what_a_worker_makes_in_a_directory_in_memory_is_there(both: TwoWriters) -> None:
    with both.turn(of_worker=False) as daemon:
        daemon.names(ROOT)
        directory = daemon.inode(ROOT)
    with both.turn(of_worker=True) as worker:
        number = worker.make(ROOT, b"new", FILE)
    with both.turn(of_worker=False) as daemon:
        assert daemon.store.cached(ROOT) is directory
        assert daemon.lookup(ROOT, b"new") == number


def test_an_inode_that_a_worker_freed_is_not_in_memory(both: TwoWriters) -> None:
    with both.turn(of_worker=False) as daemon:
        number = daemon.make(ROOT, b"new", FILE)
        daemon.write(number, 0, b"x" * 5000)
        assert number in daemon.untrimmed
    with both.turn(of_worker=True) as worker:
        worker.hold(number)
        worker.unlink(ROOT, b"new")
        worker.drop(number)
        assert number * 512 in both.slots.numbers()
    with both.turn(of_worker=False) as daemon:
        assert daemon.store.cached(number) is None
        assert number not in daemon.untrimmed
        with pytest.raises(OSError, match="no such inode"):
            daemon.attributes(number)


def test_an_inode_that_lost_its_name_to_a_worker_is_freed_with_its_last_hold(
    both: TwoWriters,
) -> None:
    with both.turn(of_worker=True) as worker:
        number = worker.make(ROOT, b"new", FILE)
        worker.write(number, 0, b"x" * 5000)
        worker.hold(number)
        worker.unlink(ROOT, b"new")
    with both.turn(of_worker=False) as daemon:
        assert daemon.store.cached(number) is None
        assert daemon.has_unnamed()
        daemon.drop(number)
        assert daemon.store.table.head(number) is None
        daemon.end()
    assert both.tree.check().problems == []


def test_a_reading_in_steps_begins_anew_when_a_worker_changes_the_inode(both: TwoWriters) -> None:
    with both.turn(of_worker=False) as daemon:
        directory = daemon.make(ROOT, b"large", DIRECTORY)
        for at in range(400):
            daemon.link(both.tree.file, directory, b"%d" % at)
        daemon.store.cache.forget(directory)
        assert daemon.read_on(directory, 1)
    with both.turn(of_worker=True) as worker:
        worker.unlink(directory, b"0")
        worker.link(both.tree.file, directory, b"new")
    with both.turn(of_worker=False) as daemon:
        while daemon.read_on(directory, 1):
            pass
        assert_like_its_log(daemon)
        assert b"0" not in daemon.names(directory)
        assert b"new" in daemon.names(directory)


def test_damage_that_a_worker_leaves_is_met_and_nothing_is_written_any_more(
    both: TwoWriters,
) -> None:
    with both.turn(of_worker=False) as daemon:
        daemon.attributes(both.tree.file)
    with both.turn(of_worker=True) as worker:
        worker.set_attributes(both.tree.file, mode=0o600)
        tail = worker.inode(both.tree.file).log.tail
        worker.medium.store(tail - 30, b"?")
    with both.turn(of_worker=False) as daemon:
        assert daemon.read_only
        assert daemon.store.cached(both.tree.file) is None
