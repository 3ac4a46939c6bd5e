"""Every mode's volume, by plain calls and through each door: one suite, the same answers."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kit.doors import O_FLAGS, Pyfuse3Way, WireWay, outcome
from kit.volumes import MODES, Mode, mode
from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.notices import Told
from pmemfs.media.filesystem import FIRST_INODES_FRAME
from pmemfs.media.inode import ROOT, SLOT_BYTES
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

NOBODY_HAS = (0, 3, 77_777, 1 << 40, (1 << 64) - 1)


@pytest.fixture(params=MODES)
def served(request: pytest.FixtureRequest, shm: Path) -> Iterator[Mode]:
    with mode(request.param, shm) as made:
        yield made


def number_of(attempt: Callable[[], object]) -> int:
    """The errno of what fails."""
    with pytest.raises(OSError, match=r"\w") as caught:
        attempt()
    assert caught.value.errno is not None
    return caught.value.errno


# By plain calls


def test_the_root_leads_to_the_file_however_it_is_asked(served: Mode) -> None:
    volume = served.volume
    assert volume.lookup(ROOT, served.name) == served.ino
    assert volume.names(ROOT) == [served.name]
    entries = [volume.listed(ROOT, key) for key in volume.listing(ROOT)]
    assert entries == [(served.name, served.ino, stat.S_IFREG >> 12)]
    assert volume.has_entry(ROOT, served.name) == served.ino
    assert volume.parent(ROOT) == ROOT
    assert number_of(lambda: volume.lookup(ROOT, b"none")) == errno.ENOENT
    assert number_of(lambda: volume.lookup(ROOT, b"x" * 256)) == errno.ENAMETOOLONG
    assert volume.listed(ROOT, b"none") is None
    for attempt in (
        lambda: volume.lookup(served.ino, b"x"),
        lambda: volume.names(served.ino),
        lambda: volume.parent(served.ino),
    ):
        assert number_of(attempt) == errno.ENOTDIR


@pytest.mark.parametrize("number", NOBODY_HAS)
def test_what_nobody_has_is_stale(served: Mode, number: int) -> None:
    volume = served.volume
    for attempt in (
        lambda: volume.attributes(number),
        lambda: volume.lookup(number, b"x"),
        lambda: volume.set_attributes(number, mode=0o600),
        lambda: volume.read(number, 0, 1),
        lambda: volume.write(number, 0, b"x"),
        lambda: volume.check_open(number, os.O_RDONLY),
    ):
        assert number_of(attempt) == errno.ESTALE


def test_the_number_that_the_root_would_have_by_its_place_is_stale(shm: Path) -> None:
    with mode("fs", shm) as served:
        fs = served.volume
        assert isinstance(fs, FileSystem)
        number = fs.geometry.offset_of(FIRST_INODES_FRAME) // SLOT_BYTES
        assert number_of(lambda: fs.attributes(number)) == errno.ESTALE
        assert not fs.damage
        assert not fs.read_only


def test_what_is_written_is_read(served: Mode) -> None:
    volume, ino = served.volume, served.ino
    for offset in (0, 5, 4095, 4096, MIB):
        data = bytes([offset % 251 + 1]) * 5000
        assert volume.write(ino, offset, data) == len(data)
        assert bytes(volume.read(ino, offset, len(data))) == data
    assert bytes(volume.read(ino, volume.attributes(ino).size_bytes, 10)) == b""
    assert volume.copy(ino, MIB, ino, 0, 5000) == 5000
    assert bytes(volume.read(ino, 0, 5000)) == bytes(volume.read(ino, MIB, 5000))


def run(answer: Any) -> None:
    """See an answer to its end."""
    if answer is not None:

        async def wait() -> None:
            await answer

        trio.run(wait)


def test_what_is_punched_reads_as_zeroes(served: Mode) -> None:
    volume, ino = served.volume, served.ino
    volume.write(ino, 0, b"x" * 64 * KIB)
    run(volume.punch(ino, 5000, 20_000))
    wanted = b"x" * 5000 + bytes(20_000) + b"x" * (64 * KIB - 25_000)
    assert bytes(volume.read(ino, 0, 64 * KIB)) == wanted
    run(volume.allocate(ino, 0, 32 * KIB, keep_size=True))
    run(volume.zero(ino, 0, 5000, keep_size=True))
    assert bytes(volume.read(ino, 0, 64 * KIB)) == bytes(5000) + wanted[5000:]


def test_attributes_are_kept(served: Mode) -> None:
    volume = served.volume
    for number in (ROOT, served.ino):
        before = volume.attributes(number)
        volume.set_attributes(number, mode=0o640, uid=5, gid=6, atime_ns=7, mtime_ns=8)
        after = volume.attributes(number)
        kept = before._replace(mode=stat.S_IFMT(before.mode) | 0o640, uid=5, gid=6, atime_ns=7,
                               mtime_ns=8, ctime_ns=after.ctime_ns,
                               size_bytes=after.size_bytes)  # fmt: skip
        assert after == kept
        volume.set_xattrs_and_mode(number, {}, 0o600)
        assert stat.S_IMODE(volume.attributes(number).mode) == 0o600


def test_a_directory_is_not_opened_read_or_written(served: Mode) -> None:
    volume = served.volume
    for attempt in (lambda: volume.read(ROOT, 0, 1), lambda: volume.write(ROOT, 0, b"x")):
        assert number_of(attempt) in (errno.EISDIR, errno.EINVAL)


def test_there_is_room(served: Mode) -> None:
    room = served.volume.room()
    assert 0 <= room.reserved_frames <= room.free_frames <= room.total_frames
    assert 0 < room.total_frames <= 32 * MIB // 4096


def test_what_a_device_cannot_do_is_refused_in_one_place(shm: Path) -> None:
    with mode("block", shm) as served:
        volume, ino = served.volume, served.ino
        new = NewInode(stat.S_IFREG, 0, 0)
        refused: dict[int, list[Callable[[], object]]] = {
            errno.EPERM: [
                lambda: volume.make(ROOT, b"x", new),
                lambda: volume.link(ino, ROOT, b"x"),
                lambda: volume.unlink(ROOT, served.name),
                lambda: volume.rmdir(ROOT, b"x"),
                lambda: volume.rename(ROOT, served.name, ROOT, b"x"),
            ],
            errno.ENOSYS: [
                lambda: volume.list_xattrs(ino),
                lambda: volume.set_xattr(ino, b"user.x", b""),
                lambda: volume.remove_xattr(ino, b"user.x"),
                lambda: volume.seek(ino, 0, for_data=True),
            ],
            errno.EOPNOTSUPP: [
                lambda: volume.make_unnamed(ROOT, new),
                lambda: volume.collapse(ino, 0, 4096),
                lambda: volume.insert(ino, 0, 4096),
            ],
            errno.EINVAL: [lambda: volume.target(ino)],
            errno.ENOTTY: [lambda: volume.set_flags(ino, volume.attributes(ino).flags)],
            errno.ENOSPC: [lambda: volume.write(ino, volume.attributes(ino).size_bytes, b"x")],
        }
        for number, attempts in refused.items():
            for attempt in attempts:
                assert number_of(attempt) == number


# Through the doors


class Pair:
    """Two volumes of one shape, one behind each door."""

    def __init__(self, wire: Mode, other: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wire = WireWay(wire.door)
        self.other = Pyfuse3Way(other.handlers, monkeypatch)
        self.inos = [ROOT, wire.ino, 77_777]
        self.handles: list[int] = [1 << 40]
        assert wire.ino == other.ino

    def both(self, call: str, *arguments: Any) -> Any:
        answers = [outcome(way, call, arguments) for way in (self.wire, self.other)]
        assert answers[0] == answers[1], (call, arguments)
        return answers[0]


def choose(chance: random.Random, pair: Pair) -> tuple[Any, ...]:
    """A call with arguments that often fit."""
    ino = chance.choice(pair.inos)
    name = chance.choice([b"a", b"b", b"c", b"file", b"small", b".", b"..", b"x" * 256, b""])
    other = chance.choice([b"a", b"b", b"c"])
    handle = chance.choice(pair.handles)
    offset = chance.choice([0, 1, 4096, 70_000, 1 << 62, (1 << 63) - 1])
    xattr = chance.choice(
        [b"user.a", b"user.b", b"trusted.t", b"user.", b"bad.x", b"system.posix_acl_access"]
    )
    change = chance.choice(
        [{"mode": 0o6755}, {"mode": 0o600, "uid": 3}, {"size": 0}, {"size": 9000},
         {"atime": 5, "mtime": 6}, {}, {"gid": 9}, {"size": 1 << 62}]
    )  # fmt: skip
    return chance.choice(
        [
            ("lookup", ino, name), ("getattr", ino), ("setattr", ino, change),
            ("mknod", ino, name, stat.S_IFIFO | 0o666, 0),
            ("mknod", ino, name, stat.S_IFCHR | 0o666, 0x0103),
            ("mkdir", ino, name, 0o777), ("symlink", ino, name, other),
            ("link", ino, name, chance.choice(pair.inos)), ("unlink", ino, name),
            ("rmdir", ino, name),
            ("rename", ino, name, chance.choice(pair.inos), other,
             chance.choice([0, 0, 1, 2, 4, 8])),
            ("readlink", ino), ("statfs",), ("setxattr", ino, xattr, b"value"),
            ("getxattr", ino, xattr), ("listxattr", ino), ("removexattr", ino, xattr),
            ("open", ino, chance.choice(O_FLAGS)),
            ("create", ino, name, stat.S_IFREG | 0o666, chance.choice(O_FLAGS)),
            ("read", handle, offset, 5000), ("write", handle, offset, b"x" * 5000),
            ("fsync", handle), ("release", handle), ("listing", ino, chance.choice([1, 3, 100])),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", MODES)
def test_both_doors_answer_the_same_requests_alike(
    shm: Path, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    with mode(kind, shm / "one") as one, mode(kind, shm / "other") as other:
        pair = Pair(one, other, monkeypatch)
        for _ in range(300):
            call, *arguments = choose(chance, pair)
            answer = pair.both(call, *arguments)
            if call in ("lookup", "mknod", "mkdir", "symlink") and isinstance(answer, tuple):
                pair.inos.append(answer[0])
            elif call == "create" and isinstance(answer, tuple):
                pair.inos.append(answer[0][0])
                pair.handles.append(answer[1])
            elif call == "open" and isinstance(answer, int):
                pair.handles.append(answer)
            elif call == "release" and answer == b"":
                pair.handles.remove(arguments[0])
        for ino in (ROOT, one.ino):
            pair.both("getattr", ino)


# What is told to the kernel


def test_a_copy_is_answered_when_the_kernel_knows_that_its_source_was_read(shm: Path) -> None:
    with mode("fs", shm) as served:
        served.volume.write(served.ino, 0, b"content")
        served.volume.set_attributes(served.ino, atime_ns=1)
        told: list[Told] = []

        def tell(ino: int) -> Told:
            assert ino == served.ino
            told.append(Told(b""))
            return told[-1]

        served.handlers.notifier.tell = tell
        files, caller = served.handlers.files, Caller(0, 0, 0)
        source = files.open(caller, served.ino, os.O_RDONLY)
        made, target = files.create(caller, ROOT, b"copy", 0o600, os.O_RDWR, umask=0)
        answered: list[int] = []

        async def copy() -> None:
            answered.append(
                await served.handlers.ranges.copy(
                    caller, served.ino, source.handle, 0, made.ino, target.handle, 0, 7  # type: ignore[union-attr]
                )
            )  # fmt: skip

        async def look() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy)
                await trio.testing.wait_all_tasks_blocked()
                assert len(told) == 1
                assert answered == []
                told[0].end()

        trio.run(look)
        assert answered == [7]
        assert isinstance(served.handlers.notifier, Notifier)


@pytest.mark.parametrize("how", ["write", "open", "fallocate"])
def test_who_takes_privileges_is_answered_when_the_kernel_knows(shm: Path, how: str) -> None:
    with mode("fs", shm) as served:
        volume, handlers = served.volume, served.handlers
        volume.set_attributes(served.ino, mode=0o6777)
        told: list[Told] = []

        def tell(ino: int) -> Told:
            told.append(Told(b""))
            return told[-1]

        handlers.notifier.tell = tell
        other = Caller(1000, 1000, 0)
        opened: Any = handlers.files.open(other, served.ino, os.O_RDWR)
        answer: Any
        if how == "write":
            answer = handlers.files.write(other, opened.handle, 0, b"x", may_keep=False)
        elif how == "open":
            answer = handlers.files.open(other, served.ino, os.O_RDWR | os.O_TRUNC, may_keep=False)
        else:
            answer = handlers.ranges.allocate(other, served.ino, 0, 4096, 0)
        answered: list[object] = []

        async def wait() -> None:
            answered.append(await answer)

        async def look() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                assert (len(told), answered) == (1, [])
                told[0].end()

        trio.run(look)
        assert len(answered) == 1
        assert not volume.attributes(served.ino).mode & 0o6000


# A name that was unlocked since the kernel has looked it up


def test_a_file_that_is_there_after_all_is_looked_up_again_unless_it_must_be_new(shm: Path) -> None:
    with mode("fs", shm) as served:
        files, caller = served.handlers.files, Caller(0, 0, 0)
        files.create(caller, ROOT, b"there", 0o600, os.O_RDWR, umask=0)
        for flags, number in ((os.O_CREAT, errno.ESTALE), (os.O_CREAT | os.O_EXCL, errno.EEXIST)):
            with pytest.raises(OSError, match=r".") as raised:
                files.create(caller, ROOT, b"there", 0o600, os.O_RDWR | flags, umask=0)
            assert raised.value.errno == number
