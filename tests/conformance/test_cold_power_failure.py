"""The power fails, or there is no room, at every moment of compressing, warming and rewriting.

See `fs_crash` for what may be left then.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from kit.compressible import PIECE, text
from kit.fs_crash import FILE, FRAME, ROOT, Judge, Op, Tree, World, built, template
from kit.fs_operations import (
    allocated,
    attributed,
    collapsed,
    inserted,
    persisted,
    punched,
    truncated,
    unlink,
    written,
    zeroed,
)
from pmemfs.media.transform import Transformation
from pmemfs.medium.base import Durability
from pmemfs.medium.recording import RecordingMedium

pytestmark = [pytest.mark.slow]

FRAMES = 420
DATA = text(2 * PIECE + 3 * FRAME + 100)


def rewritten(path: str) -> Op:
    # One transaction of many, so blocks differ while the bytes are the same.
    return Op(
        f"rewrite {path}",
        lambda w: trio.run(w.fs.cooler.rewrite, w.ino(path)),
        changes=path,
        blocks=False,
    )


def made_plain(path: str, offset: int, length: int) -> Op:
    return Op(
        f"make plain {path} {offset} {length}",
        lambda w: w.fs.make_plain(w.ino(path), offset, length),
        changes=path,
        blocks=False,
    )


def set_to(path: str, kind: Transformation) -> Op:
    return Op(f"set {path} {kind}", lambda w: w.fs.properties.set_transform(w.ino(path), kind))


def rewritten_as(path: str, kind: Transformation) -> Op:
    def run(w: World) -> None:
        w.fs.properties.set_transform(w.ino(path), kind)
        trio.run(w.fs.cooler.rewrite, w.ino(path))

    return Op(f"rewrite {path} as {kind}", run, changes=path, blocks=False)


@functools.cache
def plain_image() -> bytes:
    """A file that is to be compressed, and a hole in another one."""

    def build(w: World) -> None:
        number = w.fs.make(ROOT, b"file", FILE)
        w.fs.properties.set_transform(number, Transformation.ZSTD)
        w.fs.write(number, 0, DATA)
        other = w.fs.make(ROOT, b"other", FILE)
        w.fs.properties.set_transform(other, Transformation.LZ4)
        w.fs.write(other, PIECE, DATA[: 10 * FRAME])

    return built(build, FRAMES)


@functools.cache
def packed_image() -> bytes:
    """The same, compressed."""

    def build(w: World) -> None:
        for name, at in ((b"file", 0), (b"other", PIECE)):
            number = w.fs.make(ROOT, name, FILE)
            w.fs.properties.set_transform(number, Transformation.ZSTD)
            w.fs.write(number, at, DATA[: len(DATA) - at])
            trio.run(w.fs.cooler.rewrite, number)
            assert w.fs.inode(number).pieces

    return built(build, FRAMES)


def loose(op: Op) -> Op:
    """An operation before whose commit a piece is made plain."""
    return replace(op, blocks=False)


OPERATIONS: list[tuple[Callable[[], bytes], Op]] = [
    (plain_image, rewritten("file")),
    (plain_image, rewritten("other")),
    (plain_image, rewritten_as("file", Transformation.LZ4)),
    (plain_image, set_to("file", Transformation.NONE)),
    *((packed_image, op) for op in (
        rewritten("file"),
        rewritten_as("file", Transformation.LZ4),
        rewritten_as("file", Transformation.NONE),
        set_to("file", Transformation.LZ4),
        made_plain("file", 0, 3 * PIECE),
        made_plain("file", PIECE, 1),
        unlink("file"),
        attributed("file", mode=0o600),
        truncated("file", 0),
        truncated("file", PIECE),
        truncated("file", PIECE + 99),
        loose(truncated("file", 3 * PIECE)),
        loose(truncated("file", 2 * PIECE + FRAME)),
        loose(punched("file", 100, 2 * FRAME)),
        punched("file", PIECE, PIECE),
        loose(punched("file", PIECE - 9, 2 * PIECE)),
        loose(zeroed("file", PIECE - 9, 99, keep_size=True)),
        loose(allocated("file", 0, 3 * PIECE, keep_size=False)),
        collapsed("file", 0, 32),
        loose(collapsed("file", 1, 2)),
        inserted("file", 32, 32),
        loose(inserted("file", 3, 1)),
        loose(written("file", PIECE + 7, 9)),
        loose(written("file", 2 * PIECE + 3 * FRAME + 100, 5000)),
        loose(written("file", 4 * PIECE, 10)),
        loose(written("other", 5, 10)),
        persisted("file"),
    )),
]  # fmt: skip


def name_of(case: tuple[Callable[[], bytes], Op]) -> str:
    return f"{case[0].__name__}, {case[1].name}"


@pytest.mark.parametrize("case", OPERATIONS, ids=name_of)
@pytest.mark.parametrize("durability", [Durability.CACHE_LINES, Durability.MSYNC])
def test_a_power_failure_leaves_the_one_or_the_other(
    case: tuple[Callable[[], bytes], Op], durability: Durability
) -> None:
    build, op = case
    judge = Judge(template(len(build())), deep_every=11)
    world = World(build(), limit=10, judge=judge, durability=durability)
    world.run(op)
    assert world.error is None
    assert world.violations == []
    assert judge.states > 2 or op.name.startswith(("persist", "rewrite file", "set"))


@pytest.mark.parametrize("then", [rewritten("file"), made_plain("file", 0, PIECE)])
def test_a_power_failure_after_many_changes_leaves_the_one_or_the_other(then: Op) -> None:
    image = packed_image()
    judge = Judge(template(len(image)), deep_every=11)
    world = World(image, limit=8, judge=judge)
    for op in (
        loose(written("file", PIECE, 100)), rewritten("file"), truncated("file", PIECE + 99),
        loose(truncated("file", 2 * PIECE)), rewritten("file"), loose(punched("file", 0, FRAME)),
        rewritten("file"), then,
    ):  # fmt: skip
        world.run(op)
    assert world.violations == []


class NoRoomAt:
    """An allocator that finds no room once, the given time."""

    def __init__(self, world: World, count: int) -> None:
        allocator = world.fs.allocator
        self.left, self.was_met = count, False
        for name in ("allocate", "allocate_run"):
            setattr(allocator, name, functools.partial(self.ask, getattr(allocator, name)))

    def ask(self, real: Callable[..., object], *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            self.was_met = True
            raise OSError(errno.ENOSPC, "no room")
        return real(*args, **kwargs)


TAKE_ROOM = {"rewrite", "make", "write", "allocate", "zero", "collapse", "insert", "set"}


def contents(tree: Tree) -> dict[int, bytes]:
    return {number: node.content for number, node in tree.items()}


@pytest.mark.parametrize("case", OPERATIONS, ids=name_of)
def test_an_operation_that_finds_no_room_leaves_the_bytes_and_can_be_done_again(
    case: tuple[Callable[[], bytes], Op],
) -> None:
    build, op = case
    done = World(build())
    done.run(op)
    for count in range(1, 100):
        world = World(build(), medium=RecordingMedium(build()))
        counted = NoRoomAt(world, count)
        before = world.tree
        world.run(op)
        if not counted.was_met:
            break
        if world.error is not None:
            assert world.error.errno == errno.ENOSPC
            # Some pieces may be plain by now, which changes no more than the blocks.
            assert contents(world.tree) == contents(before)
            assert op.name.split()[0] in TAKE_ROOM
            world.run(op)
        assert world.error is None
        if not op.writes:
            assert contents(world.tree) == contents(done.tree)
    else:
        raise AssertionError("it allocates for ever")
