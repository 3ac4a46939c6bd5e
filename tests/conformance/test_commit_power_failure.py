"""The power fails while a program commits a new file that it has filled through an array.

The steps are those of `client/newfile`, on a volume over a medium that knows what is durable.
Stores go to the pool's frames past the volume, as those of an array do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kit.fs_crash import FILE, FRAME, PlainMedium, World, built, on_medium, template
from pmemfs.media.inode import ROOT
from pmemfs.medium.base import Durability
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs.filesystem import FileSystem

pytestmark = pytest.mark.slow

OLD, NEW = b"old file" * 100, bytes(range(1, 251)) * 6
LIMIT = 20


class Step(NamedTuple):
    """What one system call, or a part of the client, does."""

    name: str
    run: Callable[[World], object]


def number(world: World) -> int:
    return world.held[-1]


def make(world: World) -> None:
    world.fs.hold(made := world.fs.make_unnamed(ROOT, FILE))
    world.held.append(made)
    world.fs.allocate(made, 0, len(NEW), keep_size=False)


def frames(world: World) -> list[tuple[int, int, int]]:
    """Where the file lies: (offset in it, offset in the pool, length in bytes)."""
    return [
        (each.index * FRAME, each.pfn * FRAME, each.frame_count * FRAME)
        for each in world.fs.extents(number(world))
    ]


def store(world: World) -> None:
    for at, start, length in frames(world):
        world.medium.store(start, NEW[at : at + length])


def flush(world: World) -> None:
    """What `make_durable` does, and what the daemon does when it is told of that."""
    for _, start, length in frames(world):
        world.medium.flush(start, length)
    world.medium.fence()
    world.fs.note_stores(number(world))
    world.fs.write_back(number(world))


def fsync(world: World) -> None:
    world.fs.persist(number(world))


def link(world: World) -> None:
    world.fs.link(number(world), ROOT, b"name")


def link_hidden(world: World) -> None:
    world.fs.link(number(world), ROOT, b".pmemfs-new-1")


def replace(world: World) -> None:
    world.fs.rename(ROOT, b".pmemfs-new-1", ROOT, b"name")


BEGINNING = [Step(each.__name__, each) for each in (make, store, flush, fsync)]
ENDS = {
    "a new name": [Step("link", link)],
    "a name that is taken": [Step("link hidden", link_hidden), Step("replace", replace)],
}


def found(image: bytes) -> bytes | None:
    """What the name has after a power failure."""
    fs = FileSystem(on_medium(template(len(image)), PlainMedium(image)), NoMemmap())
    if b"name" not in fs.names(ROOT):
        return None
    inode = fs.lookup(ROOT, b"name")
    return bytes(fs.read(inode, 0, fs.attributes(inode).size_bytes))


@pytest.mark.parametrize("durability", [Durability.CACHE_LINES, Durability.MSYNC], ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_a_commit_is_all_or_nothing(end: str, durability: Durability) -> None:
    before = None if end == "a new name" else OLD

    def build(world: World) -> None:
        if before is not None:
            inode = world.fs.make(ROOT, b"name", FILE)
            world.fs.write(inode, 0, OLD)

    world = World(built(build, durability=durability), durability=durability)
    seen = set()

    def look(legal: tuple[bytes | None, ...]) -> None:
        for image in world.medium.after_power_failure(LIMIT):
            content = found(image)
            assert content in legal, f"{content and content[:20]!r} of {len(content or b'')}"
            seen.add(content)

    world.medium.at_each_fence = lambda: look((before, NEW))
    for step in (*BEGINNING, *ENDS[end]):
        assert seen <= {before}, f"before {step.name} nobody sees the new file"
        step.run(world)
    assert seen == {before, NEW}
    world.medium.at_each_fence = lambda: None
    # What was committed stays.
    look((NEW,))


def test_without_its_flush_a_commit_would_not_be() -> None:
    world = World(built(lambda world: None))
    torn = []
    for step in (
        Step("make", make),
        Step("store", store),
        Step("fsync", fsync),
        *ENDS["a new name"],
    ):
        step.run(world)
    for image in world.medium.after_power_failure(LIMIT):
        torn.append(found(image) not in (None, NEW))
    assert any(torn)


def test_what_a_flush_has_answered_is_there() -> None:
    def build(world: World) -> None:
        world.fs.write(world.fs.make(ROOT, b"name", FILE), 0, bytes(len(NEW)))

    world = World(built(build))
    world.held.append(world.fs.lookup(ROOT, b"name"))
    store(world)
    flush(world)
    images = list(world.medium.after_power_failure(LIMIT))
    assert images
    assert all(found(image) == NEW for image in images)
