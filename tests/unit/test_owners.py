"""Names of inodes: found wherever they are, in turns with everything else, and true when told."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import pytest
import trio

from kit.pools import MemoryMedium
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.media.pagereport import PageOwner
from pmemfs.memmap.none import NoMemmap
from pmemfs.observe import owners, pages
from pmemfs.observe.owners import Owners
from pmemfs.observe.pages import _Turns
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

FILE, DIRECTORY = NewInode(0o100644, 0, 0), NewInode(0o040755, 0, 0)


@pytest.fixture
def fs() -> FileSystem:
    """An empty file system."""
    spec = PoolSpec(name="e", alignment_bytes=4096, scheme=Scheme.NONE, mode=Mode.FS)
    pool = Pool.create(MemoryMedium(bytes(8 * MIB)), spec)
    FileSystem.format(pool)
    return FileSystem(pool, NoMemmap())


def deep(fs: FileSystem) -> int:
    """A file below several directories, most of which lead elsewhere."""
    parent = ROOT
    for name in (b"a", b"b", b"c"):
        for other in range(5):
            fs.make(parent, b"no%d" % other, DIRECTORY)
        parent = fs.make(parent, name, DIRECTORY)
    return fs.make(parent, b"file", FILE)


def ask(found: Owners, *numbers: int) -> dict[int, PageOwner]:
    """The owners of some numbers."""

    async def asked(numbers: Iterable[int]) -> dict[int, PageOwner]:
        return await found.of(numbers)

    return trio.run(asked, numbers)


def forget_all(fs: FileSystem) -> None:
    """Nothing of the file system is in memory any more."""
    for inode in list(fs.store.cache.inodes):
        fs.store.cache.forget(inode.number)


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_a_name_is_found_in_memory_and_from_the_root_down(
    fs: FileSystem, is_in_memory: bool
) -> None:
    number = deep(fs)
    top = fs.make(ROOT, b"top", FILE)
    if not is_in_memory:
        forget_all(fs)
    found = Owners(fs)
    for _ in range(2):
        assert ask(found, number, top, 0, number) == {
            number: PageOwner(number, "a/b/c/file", ""), top: PageOwner(top, "top", ""),
        }  # fmt: skip


def test_a_directory_in_memory_leads_up_to_those_that_are_not(fs: FileSystem) -> None:
    number = deep(fs)
    forget_all(fs)
    inner = ROOT
    for name in (b"a", b"b", b"c"):
        inner = fs.lookup(inner, name)
    forget_all(fs)
    fs.inode(inner)
    assert ask(Owners(fs), number)[number].path == "a/b/c/file"


def test_a_name_that_changed_is_told_as_it_is_now(fs: FileSystem) -> None:
    number = deep(fs)
    found = Owners(fs)
    assert ask(found, number)[number].path == "a/b/c/file"
    a = fs.lookup(ROOT, b"a")
    b = fs.lookup(a, b"b")
    fs.rename(b, b"c", ROOT, b"moved")
    other = fs.make(b, b"c", DIRECTORY)
    fs.make(other, b"file", FILE)
    assert ask(found, number)[number].path == "moved/file"
    fs.link(number, ROOT, b"second")
    fs.unlink(fs.lookup(ROOT, b"moved"), b"file")
    assert ask(found, number)[number].path == "second"
    fs.hold(number)
    fs.unlink(ROOT, b"second")
    assert ask(found, number)[number] == PageOwner(number, "", "unnamed")
    fs.drop(number)
    assert ask(found, number)[number] == PageOwner(number, "", "gone")


def test_numbers_that_no_inode_has_are_gone(fs: FileSystem) -> None:
    assert {owner.note for owner in ask(Owners(fs), 3, 1 << 40, (1 << 64) - 1).values()} == {"gone"}


def test_a_search_ends_and_is_not_repeated_at_once(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = deep(fs)
    forget_all(fs)
    found = Owners(fs)
    monkeypatch.setattr(owners, "SEARCH_SECONDS", 0)
    assert ask(found, number)[number] == PageOwner(number, "", "not found")
    monkeypatch.setattr(owners, "SEARCH_SECONDS", 60)

    async def asked_twice() -> list[str]:
        now = trio.current_time()
        found._missed[number] = now + 1000
        before = (await found.of([number]))[number].path
        found._missed[number] = now
        return [before, (await found.of([number]))[number].path]

    assert trio.run(asked_twice) == ["", "a/b/c/file"]


def test_a_long_directory_is_looked_through_in_parts(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [fs.make(ROOT, b"f%d" % n, FILE) for n in range(64)]
    fs.make(ROOT, b"last", DIRECTORY)
    monkeypatch.setattr(owners, "_ENTRIES_AT_ONCE", 5)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def both() -> dict[int, PageOwner]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            found = await Owners(fs).of([numbers[63], numbers[0], numbers[31]])
            nursery.cancel_scope.cancel()
        return found

    assert sorted(owner.path for owner in trio.run(both).values()) == ["f0", "f31", "f63"]
    assert turns >= 64 // 5


def test_who_looks_at_pages_gives_way_each_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 0.0004)
    monkeypatch.setattr(pages, "time", type("Time", (), {"perf_counter": lambda: next(clock)}))
    order: list[str] = []

    async def look() -> None:
        turns = _Turns()
        for _ in range(12):
            order.append("look")
            await turns.give_way()

    async def serve() -> None:
        while len(order) < 14:
            order.append("serve")
            await trio.lowlevel.checkpoint()

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            nursery.start_soon(serve)

    trio.run(both)
    assert time.perf_counter() > 0, "only the scan's clock was another"
    runs = [len(list(same)) for what, same in itertools.groupby(order) if what == "look"]
    # Of two turns one may end a round of tasks, and the other begin the next.
    assert max(runs) <= 6
    assert len(runs) >= 2
