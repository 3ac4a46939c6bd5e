"""Operations of every kind on two small trees, for tests that interrupt them.

`STANDARD` is what people have; in `EDGES` every log is about to grow, to move or to be compacted.
"""

from __future__ import annotations

import errno
import functools
from dataclasses import replace
from unittest import mock

import trio

from kit.fs_crash import (
    DIRECTORY,
    FILE,
    FRAME,
    ROOT,
    Op,
    World,
    built,
    link_to,
    native_write,
    write,
)
from pmemfs.media.transform import Transformation
from pmemfs.medium.base import Durability
from pmemfs.transform.codec import codec_of
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs import relocating

LONG = b"n" * 255
WHITEOUT = NewInode(0o020000, 1, 2)
XATTRS = ((b"user.one", b"1" * 10), (b"user.two", b"2" * 3000))
BIG_XATTR = (bytes(range(1, 256)) * 258)[:65536]


def standard(w: World) -> None:
    """Files, directories, links of all kinds."""
    fs = w.fs
    fs.make(w.home, b"a", FILE)
    write(w, "a", 0, 3)
    b = fs.make(w.home, b"b", FILE)
    write(w, "b", 0, 10000)
    d = fs.make(w.home, b"d", DIRECTORY)
    fs.make(w.home, b"e", DIRECTORY)
    n = fs.make(w.home, b"n", DIRECTORY)
    fs.link(b, d, b"b2")
    fs.make(d, b"x", FILE)
    write(w, "d/x", 0, 5000)
    fs.make(d, b"l", link_to(b"t" * 100))
    for name in b"012345":
        fs.link(b, n, bytes([name]))
    fs.make(w.home, b"s", FILE)
    write(w, "s", 0, 3 * FRAME)
    write(w, "s", 5 * FRAME, FRAME + 10)
    fs.make(d, b"t", NewInode(0o100600, 1, 2, xattrs=XATTRS))
    write(w, "d/t", 0, 64)


def fill_log(w: World, number: int, *, inline: bool = False, dead: bool = False) -> None:
    """Add records until the slot, or the log's last frame, is full, and mostly dead or not."""
    inode = w.fs.inode(number)
    for at in range(1000):
        log, live = inode.log, inode.compacted_slots
        is_dead = log.slot_count - live > live + 63
        is_full = log.tail % (512 if inline else FRAME) == 0
        if (log.is_inline, is_dead, is_full) == (inline, dead, True):
            return
        w.fs.set_attributes(number, mode=0o640 + at % 2)
    raise AssertionError("no such log")


def edges(w: World) -> None:
    """Every log is full."""
    fs = w.fs
    for name in (b"i", b"f", b"g"):
        fs.make(ROOT, name, FILE)
    write(w, "f", 0, 6000)
    h = fs.make(ROOT, b"h", NewInode(0o100600, 1, 2, xattrs=XATTRS))
    m = fs.make(ROOT, b"m", DIRECTORY)
    c = fs.make(ROOT, b"c", DIRECTORY)
    for directory in (m, c):
        for at in range(8):
            fs.link(h, directory, b"%d" % at)
    # No slot is free: the next inode needs a new frame of inodes.
    fs.make(ROOT, b"z", FILE)
    fill_log(w, w.ino("i"), inline=True)
    fill_log(w, w.ino("f"))
    fill_log(w, w.ino("g"), dead=True)
    fill_log(w, h, dead=True)
    fill_log(w, m)
    fill_log(w, c, dead=True)
    fill_log(w, ROOT, dead=True)


def packed(w: World) -> None:
    """Files that lie compressed: `p` in one piece, `q` in two, `r` and `z/in` not yet."""
    fs = w.fs
    text = b"".join(b"%06d " % at for at in range(40 * FRAME // 7 + 1))
    for directory in (b"e", b"z"):
        fs.make(ROOT, directory, DIRECTORY)
    fs.properties.set_transform(w.ino("z"), Transformation.ZSTD, 3)
    for path, frame_count in (("p", 9), ("q", 39), ("r", 7), ("z/in", 3)):
        number = fs.make(*w.at(path), FILE)
        fs.write(number, 0, text[: frame_count * FRAME])
        fs.trim_ahead(number)
    fs.properties.set_transform(w.ino("r"), Transformation.ZSTD)
    pack(w, "p", 0, 9)
    pack(w, "q", 0, 32)
    pack(w, "q", 32, 7)


@functools.cache
def standard_image(durability: Durability = Durability.CACHE_LINES) -> bytes:
    return built(standard, durability=durability)


@functools.cache
def edges_image() -> bytes:
    return built(edges)


@functools.cache
def sealed_image(durability: Durability = Durability.CACHE_LINES) -> bytes:
    return built(standard, durability=durability, is_encrypted=True)


@functools.cache
def packed_image() -> bytes:
    return built(packed)


IMAGES = {
    "standard": standard_image,
    "edges": edges_image,
    "sealed": sealed_image,
    "packed": packed_image,
}


def make(path: str, new: NewInode, name: str = "") -> Op:
    return Op(name or f"make {path[:12]}", lambda w: w.fs.make(*w.at(path), new))


def link(old: str, path: str) -> Op:
    return Op(f"link {old} {path}", lambda w: w.fs.link(w.ino(old), *w.at(path)))


def unlink(path: str) -> Op:
    return Op(f"unlink {path}", lambda w: w.fs.unlink(*w.at(path)))


def rmdir(path: str) -> Op:
    return Op(f"rmdir {path}", lambda w: w.fs.rmdir(*w.at(path)))


def rename(old: str, new: str, flags: int = 0) -> Op:
    how = {0: "", 1: " not over", 2: " exchanged", 4: " whiteout", 5: " whiteout not over"}[flags]
    left = WHITEOUT if flags & 4 else None
    return Op(
        f"rename {old} {new}{how}", lambda w: w.fs.rename(*w.at(old), *w.at(new), flags, left)
    )


def laid_out(path: str, *, step_frames: int = 2048) -> Op:
    """Lay a file out anew; every step of that may be cut off."""

    def lay_out(w: World) -> None:
        number = w.ino(path)
        with mock.patch.object(relocating, "_STEP_FRAMES", step_frames):
            trio.run(w.fs.lay_out, number)
        assert w.fs.relocator.is_laid_out(w.fs.inode(number))

    # A hole gets its frames with the step that it belongs to.
    return Op(f"lay out {path} by {step_frames}", lay_out, blocks=step_frames > 1)


def written(path: str, offset: int, length: int) -> Op:
    return Op(
        f"write {path} {offset} {length}", lambda w: write(w, path, offset, length), writes=path,
        range=(offset, length),
    )  # fmt: skip


def native(path: str, offset: int, length: int) -> Op:
    return Op(
        f"native write {path} {offset} {length}",
        lambda w: native_write(w, path, offset, length),
        writes=path,
    )


def truncated(path: str, size: int) -> Op:
    return Op(
        f"truncate {path} {size}",
        lambda w: w.fs.set_attributes(w.ino(path), size_bytes=size),
        changes=path,
        transform=lambda c: c[:size].ljust(size, b"\0"),
    )


def _zeroed(content: bytes, offset: int, length: int) -> bytes:
    end = min(offset + length, len(content))
    if offset >= end:
        return content
    return content[:offset] + bytes(end - offset) + content[end:]


def punched(path: str, offset: int, length: int) -> Op:
    return Op(
        f"punch {path} {offset} {length}",
        lambda w: w.fs.punch(w.ino(path), offset, length),
        in_place=path,
        range=(offset, length),
        transform=lambda c: _zeroed(c, offset, length),
    )


def zeroed(path: str, offset: int, length: int, *, keep_size: bool) -> Op:
    def transform(content: bytes) -> bytes:
        size = len(content) if keep_size else max(len(content), offset + length)
        return _zeroed(content.ljust(size, b"\0"), offset, length)

    return Op(
        f"zero {path} {offset} {length} {keep_size}",
        lambda w: w.fs.zero(w.ino(path), offset, length, keep_size=keep_size),
        in_place=path,
        range=(offset, length),
        transform=transform,
    )


def allocated(path: str, offset: int, length: int, *, keep_size: bool) -> Op:
    return Op(
        f"allocate {path} {offset} {length} {keep_size}",
        lambda w: w.fs.allocate(w.ino(path), offset, length, keep_size=keep_size),
        changes=path,
        transform=lambda c: c if keep_size else c.ljust(offset + length, b"\0"),
    )


def collapsed(path: str, first: int, count: int) -> Op:
    start, end = first * FRAME, (first + count) * FRAME
    return Op(
        f"collapse {path} {first} {count}",
        lambda w: w.fs.collapse(w.ino(path), start, end - start),
        changes=path,
        transform=lambda c: c[:start] + c[end:],
    )


def inserted(path: str, first: int, count: int) -> Op:
    start, length = first * FRAME, count * FRAME
    return Op(
        f"insert {path} {first} {count}",
        lambda w: w.fs.insert(w.ino(path), start, length),
        changes=path,
        transform=lambda c: c[:start] + bytes(length) + c[start:],
    )


def attributed(path: str, **changes: int) -> Op:
    return Op(
        f"set {path} {' '.join(changes)}", lambda w: w.fs.set_attributes(w.ino(path), **changes)
    )


def xattr(path: str, name: bytes, value: bytes) -> Op:
    return Op(
        f"set xattr of {len(value)} on {path}", lambda w: w.fs.set_xattr(w.ino(path), name, value)
    )


def acl(w: World) -> None:
    w.fs.set_xattrs_and_mode(w.ino("d/t"), {b"system.acl": b"A" * 44, b"user.one": None}, 0o751)


def persisted(path: str) -> Op:
    return Op(f"persist {path}", lambda w: w.fs.persist(w.ino(path)), persists=path)


def trimmed(path: str) -> Op:
    return Op(f"trim {path}", lambda w: w.fs.trim_ahead(w.ino(path)), persists=path)


def unlink_held(w: World) -> None:
    number = w.ino("b" if "a" not in names(w) else "a")
    path = "b" if "a" not in names(w) else "a"
    w.fs.hold(number)
    w.held.append(number)
    w.fs.unlink(*w.at(path))


def names(w: World) -> list[str]:
    return [name.decode(errors="replace") for name in w.fs.names(w.home)]


def make_unnamed(w: World) -> None:
    number = w.fs.make_unnamed(w.home, FILE)
    w.fs.hold(number)
    w.held.append(number)


def link_unnamed(w: World) -> None:
    make_unnamed(w)
    w.fs.write(w.held[-1], 0, w.data(100))
    w.fs.persist(w.held[-1])
    w.fs.link(w.held[-1], w.home, b"was-unnamed")


def drop_all(w: World) -> None:
    while w.held:
        w.fs.drop(w.held.pop())


def end_and_mount(w: World) -> None:
    w.fs.end()
    w.remount()


def read_only_and_back(w: World) -> None:
    """As a mount is remounted, once nothing is open for writing and nothing has lost its name."""
    drop_all(w)
    w.fs.stop_writing()
    while w.fs.settle():
        pass
    w.medium.fence()
    w.fs.leave_clean()
    w.fs.resume_writing()


def idle(w: World) -> None:
    for _ in range(12):
        w.fs.tidy()


def many_links(w: World) -> None:
    for at in range(6):
        w.fs.link(w.ino("b"), w.home, LONG[:240] + b"%d" % at)


def refused(w: World) -> None:
    raise OSError(errno.EINVAL, "nothing")


NAMES = [
    make("f1", FILE),
    make("d/f1", NewInode(0o100600, 7, 8, xattrs=XATTRS), "make file with xattrs"),
    make("e/d1", DIRECTORY),
    make("d1", NewInode(0o042775, 7, 8), "make setgid directory"),
    make("fifo", NewInode(0o010644, 1, 1)),
    make("sock", NewInode(0o140755, 1, 1)),
    make("chr", NewInode(0o020600, 0, 0, rdev=0x103)),
    make("blk", NewInode(0o060600, 0, 0, rdev=0x801)),
    make("l1", link_to(b"short")),
    make("l2", link_to(b"p" * 4095), "make long link"),
    make("d/" + "n" * 255, FILE, "make of long name"),
    make(
        "big", NewInode(0o100600, 7, 8, xattrs=((b"user.big", BIG_XATTR),)), "make with big xattr"
    ),
    link("a", "a2"),
    link("d/x", "e/x2"),
    link("d/l", "l3"),
    unlink("a"),
    unlink("d/b2"),
    unlink("d/l"),
    unlink("d/t"),
    rmdir("e"),
    rename("a", "a3"),
    rename("a", "e/a"),
    rename("a", "b"),
    rename("d/x", "a"),
    rename("a", "d/x"),
    rename("e", "e4"),
    rename("e", "d/e"),
    rename("d", "e"),
    rename("d", "e/d"),
    rename("a", "d/x", 2),
    rename("d/l", "b", 2),
    rename("d", "e", 2),
    rename("d", "a", 2),
    rename("d/x", "d/" + "m" * 250),
    rename("a", "a5", 4),
    rename("a", "d/x", 4),
    rename("d", "d5", 4),
    rename("e", "d/e", 4),
    rename("d/x", "x5", 5),
]

DATA = [
    written("a", 0, 2),
    written("a", 3, 1000),
    written("a", 3, 3 * FRAME),
    written("a", 9000, 100),
    written("b", 5000, 100),
    written("b", 10000, 50),
    written("b", 10000, 5000),
    written("s", 3 * FRAME, 100),
    written("s", 4 * FRAME + 10, FRAME),
    written("s", 2 * FRAME + 8, 4 * FRAME),
    written("d/x", 0, 6000),
    native("a", 1, 500),
    native("a", 3, 700),
    native("b", 10000, 2000),
    native("d/x", 5000, 3000),
    truncated("b", 0),
    truncated("b", 5000),
    truncated("b", FRAME),
    truncated("b", 20000),
    truncated("a", 4000),
    truncated("s", 2 * FRAME),
    punched("b", 0, FRAME),
    punched("b", 100, 9000),
    punched("b", 5000, 100000),
    punched("s", 10, 20),
    allocated("a", 0, 5 * FRAME, keep_size=True),
    allocated("a", 100, 5 * FRAME, keep_size=False),
    allocated("s", 0, 6 * FRAME, keep_size=False),
    zeroed("b", 100, 9000, keep_size=True),
    zeroed("b", 5000, 10000, keep_size=False),
    zeroed("s", 2 * FRAME, 3 * FRAME, keep_size=True),
    collapsed("b", 0, 1),
    collapsed("s", 1, 3),
    inserted("b", 1, 2),
    inserted("s", 0, 1),
]

REST = [
    attributed("a", mode=0o4711),
    attributed("d", uid=5, gid=6),
    attributed("b", atime_ns=5, mtime_ns=-6),
    xattr("a", b"user.new", b"v"),
    xattr("d/t", b"user.two", b""),
    xattr("a", b"user.big", BIG_XATTR),
    xattr("d", b"trusted.overlay", b"y" * 300),
    Op("remove xattr", lambda w: w.fs.remove_xattr(w.ino("d/t"), b"user.two")),
    laid_out("a"),
    laid_out("s"),
    laid_out("s", step_frames=1),
    Op("acl", acl),
    Op("unlink held", unlink_held),
    Op("make unnamed", make_unnamed),
    Op("link unnamed", link_unnamed, blocks=False),
    Op("drop", drop_all),
    trimmed("a"),
    trimmed("b"),
    persisted("a"),
    persisted("b"),
    Op("tidy", idle, blocks=False),
    Op("end", end_and_mount, mounts=True, persists_all=True, blocks=False),
    Op("read-only and back", read_only_and_back, blocks=False),
    Op("remount", World.remount, mounts=True, blocks=False),
]

EDGES = [
    attributed("i", mode=0o711),
    attributed("f", mode=0o711),
    attributed("g", mode=0o711),
    attributed("h", mode=0o711),
    attributed("c", mode=0o711),
    attributed("m", mode=0o711),
    xattr("i", b"user.a", b"a" * 600),
    xattr("g", b"user.a", b"a" * 600),
    xattr("f", b"user.big", BIG_XATTR),
    written("f", 6000, 9000),
    written("i", 0, 9000),
    truncated("f", 100),
    make("m/new", FILE),
    make("c/new", FILE),
    make("new", DIRECTORY),
    link("i", "c/" + "n" * 255),
    unlink("c/0"),
    unlink("m/0"),
    unlink("g"),
    rename("c/1", "m/1"),
    rename("i", "f"),
    rename("c", "m/9"),
    rename("g", "c/g"),
    rename("c", "m", 2),
    rename("c/2", "m/2", 4),
    rename("i", "f", 4),
    rename("c", "c5", 5),
    trimmed("f"),
    Op("remove xattr", lambda w: w.fs.remove_xattr(w.ino("h"), b"user.two")),
]

SEALED = [
    written("a", 1, 1),
    written("a", 2, 30),
    written("b", 37, 9000),
    written("b", 9995, 5),
    written("b", 9995, 40),
    written("d/x", 4090, 12),
    truncated("b", 5001),
    truncated("a", 2),
    truncated("a", 17),
    punched("b", 7, 20),
    zeroed("b", 35, 5000, keep_size=True),
]
"""In the middle of the blocks that are encrypted as one."""

_NOT_SEALED = {"native", "collapse", "insert"}
"""Writes of the data plane are not encrypted here; what moves bytes within a file is refused."""


def pack(w: World, path: str, index: int = 0, frame_count: int = 32) -> None:
    """Compress some frames, as the background does."""
    inode, codec = w.fs.inode(w.ino(path)), codec_of(Transformation.ZSTD)
    assert codec is not None
    plain = w.fs.read(inode.number, index * FRAME, frame_count * FRAME)
    raw = codec.compress(bytes(plain).ljust(frame_count * FRAME, b"\0"), 0)
    with w.fs.store.change(urgent=True) as change:
        replace_piece = w.fs.frames.packed.replace
        assert replace_piece(change, inode, index, frame_count, raw, Transformation.ZSTD)


def lay_packed(w: World, path: str) -> None:
    """Compress all of a file, or make it plain, as its transformation says."""
    trio.run(w.fs.cooler.rewrite, w.ino(path))


def compressed(path: str, id_: int, level: int = 0) -> Op:
    return Op(
        f"compress {path} with {id_}",
        lambda w: w.fs.properties.set_transform(w.ino(path), id_, level),
    )


def in_steps(op: Op) -> Op:
    """An operation that makes pieces plain first: the frames of its file change before the rest."""
    return replace(op, blocks=False)


ZSTD, LZ4 = Transformation.ZSTD, Transformation.LZ4
PACKED = [
    Op("pack r", lambda w: pack(w, "r", 0, 7)),
    Op("pack q anew", lambda w: pack(w, "q")),
    Op("warm p", lambda w: w.fs.make_plain(w.ino("p"), 0, 1)),
    Op("warm q", lambda w: w.fs.make_plain(w.ino("q"), 0, 1 << 20), blocks=False),
    Op("rewrite r", lambda w: lay_packed(w, "r"), blocks=False),
    Op("rewrite q", lambda w: lay_packed(w, "q"), blocks=False),
    Op("rewrite p", lambda w: lay_packed(w, "p"), blocks=False),
    compressed("p", ZSTD, 9),
    compressed("r", LZ4),
    compressed("r", 0),
    compressed("z", 0),
    compressed("e", LZ4),
    Op("encrypt e", lambda w: w.fs.properties.encrypt(w.ino("e"), b"key of nobody   ")),
    make("z/new", FILE),
    make("z/link", link_to(b"there")),
    make("z/directory", DIRECTORY),
    in_steps(written("p", 100, 50)),
    in_steps(written("p", 9 * FRAME - 10, 3000)),
    in_steps(written("q", 31 * FRAME, 2 * FRAME)),
    written("q", 40 * FRAME - 5, 3000),
    truncated("p", 0),
    in_steps(truncated("p", 5000)),
    in_steps(truncated("p", 20 * FRAME)),
    truncated("q", 32 * FRAME),
    in_steps(truncated("q", 33 * FRAME + 1)),
    truncated("q", 60 * FRAME),
    punched("q", 0, 32 * FRAME),
    in_steps(punched("q", 100, 50)),
    in_steps(punched("q", 31 * FRAME, 9 * FRAME)),
    in_steps(zeroed("p", 5000, 10000, keep_size=True)),
    in_steps(allocated("p", 0, 12 * FRAME, keep_size=False)),
    in_steps(collapsed("q", 1, 2)),
    in_steps(inserted("q", 33, 1)),
    unlink("p"),
    unlink("q"),
    rename("r", "p"),
    rename("p", "z/p"),
    in_steps(laid_out("p")),
    trimmed("q"),
    persisted("p"),
    attributed("p", mode=0o600),
    Op("tidy", idle, blocks=False),
    Op("end", end_and_mount, mounts=True, persists_all=True, blocks=False),
]

OPERATIONS = {
    "standard": [*NAMES, *DATA, *REST],
    "edges": EDGES,
    "sealed": [
        *SEALED,
        *NAMES,
        *(op for op in (*DATA, *REST) if not _NOT_SEALED & {*op.name.split()}),
    ],
    "packed": PACKED,
}
