"""Pulls the power of a file system of mode `fs`, and judges what is left.

A `World` is a file system on a recording medium. Each operation that it runs is looked at while it
runs, at every fence, and when it has returned: what the medium may hold then is mounted, read
through the file system and by the independent checker, and compared with what is legal:
- names, attributes (but for times of access), targets, extended attributes and contents are exactly
  as before the operation or exactly as after it, and as after it when it has returned;
- of a file that was written to since it was persisted, the size and the times are those of before
  or of after any such write, and each byte is that of one of these moments, or zero;
- frames may be leaked and inodes may lack a name, but not in a file system that is marked clean.
Free frames hold a pattern that no operation writes, so a stale frame in a file is noticed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kit.fs_checker import Checker, Report
from kit.sealed import Keys
from pmemfs.media.label import Mode, Scheme
from pmemfs.media.live import raised
from pmemfs.medium.base import Durability, Medium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

if TYPE_CHECKING:
    from typing_extensions import Buffer

FRAME = 4096
ROOT = 1
ENCRYPTED = b"encrypted"
"""A directory in the root; if it is there, all paths begin in it."""
FRAMES = 200
STALE = b"STALE!!\xa5"
LINE_BYTES = 64
BLOCK = 16
"""What is encrypted as one."""
NO_TRANSFORM = (0, 0, bytes(16), bytes(16))


class Node(NamedTuple):
    """All that can be seen of an inode."""

    fixed: tuple[object, ...]
    mtime_ns: int
    ctime_ns: int
    size_bytes: int
    block_count: int
    content: bytes


Tree = dict[int, Node]


@dataclass
class Versions:
    """What a file may be that was written to and not persisted."""

    contents: list[bytes]
    mtimes: set[int]
    ctimes: set[int]
    blocks: list[range] = field(default_factory=list)
    """Bytes that may be anything: whole blocks of an encrypted file, torn while they are stored."""

    def add(self, node: Node) -> None:
        if node.content not in self.contents:
            self.contents.append(node.content)
        self.mtimes.add(node.mtime_ns)
        self.ctimes.add(node.ctime_ns)

    def copy(self) -> Versions:
        return Versions(list(self.contents), set(self.mtimes), set(self.ctimes), list(self.blocks))

    def why_not(self, node: Node) -> str:
        """Why a node is none of these; empty where it is one."""
        if node.mtime_ns not in self.mtimes or node.ctime_ns not in self.ctimes:
            return "its times are of no version"
        if node.content in self.contents:
            return ""
        if node.size_bytes not in {len(content) for content in self.contents}:
            return f"its size {node.size_bytes} is of no version"
        found = np.frombuffer(node.content, np.uint8)
        is_legal = found == 0
        for content in self.contents:
            length = min(len(content), len(found))
            is_legal[:length] |= found[:length] == np.frombuffer(content, np.uint8)[:length]
        for bytes_ in self.blocks:
            is_legal[bytes_.start : bytes_.stop] = True
        if not is_legal.all():
            at = int(np.argmin(is_legal))
            return f"byte {at} is {node.content[at : at + 16]!r}, which is of no version"
        return ""


class CrashMedium(RecordingMedium):
    """The memory of one pool that is looked at in many states: each one is undone again."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(b"")
        self.size_bytes = size_bytes
        self.memory = bytearray(size_bytes)
        self.reads: set[tuple[int, int]] = set()
        """Offsets and lengths."""
        self._view = memoryview(self.memory)
        self._base = b""
        self._undo: list[tuple[int, bytearray]] = []

    def apply(self, image: bytes, lines: Mapping[int, bytes]) -> None:
        """Hold an image with some other lines."""
        if image is not self._base:
            self.memory[:] = self._base = image
        for line, content in lines.items():
            self.store(line * LINE_BYTES, content)

    @property
    def store_count(self) -> int:
        """How many stores will be undone."""
        return len(self._undo)

    def undo(self) -> None:
        for offset, content in reversed(self._undo):
            self.memory[offset : offset + len(content)] = content
        self._undo.clear()

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview:
        self.reads.add((offset_bytes, length_bytes))
        return self._view[offset_bytes : offset_bytes + length_bytes]

    view = read

    def store(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        end = offset_bytes + len(view)
        if offset_bytes < 0 or end > self.size_bytes:
            raise ValueError("store outside the medium")
        self._undo.append((offset_bytes, self.memory[offset_bytes:end]))
        self.memory[offset_bytes:end] = view

    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing to do."""

    def fence(self) -> None:
        """Nothing to do."""


def lines_of(reads: Collection[tuple[int, int]]) -> set[int]:
    """All lines that were read."""
    lines: set[int] = set()
    for offset, length in reads:
        lines.update(range(offset // LINE_BYTES, -(-(offset + length) // LINE_BYTES)))
    return lines


def snapshot(fs: FileSystem) -> Tree:
    """All that can be seen through the file system."""
    tree: Tree = {}
    todo = [ROOT]
    while todo:
        number = todo.pop()
        if number in tree:
            continue
        a = fs.attributes(number)
        kind = stat.S_IFMT(a.mode)
        entries = [(name, *entry) for name, entry in fs.inode(number).entries.items()]
        todo += [to for _, to, _ in entries]
        fixed = (
            a.ino, a.generation, a.mode, a.nlink, a.uid, a.gid, a.rdev, a.birth_ns,
            tuple(sorted(entries)),
            fs.parent(number) if kind == stat.S_IFDIR else 0,
            fs.target(number) if kind == stat.S_IFLNK else b"",
            tuple(sorted((name, fs.get_xattr(number, name)) for name in fs.list_xattrs(number))),
            # Without the nonce, which differs each time.
            (fs.properties.transform_of(number) or NO_TRANSFORM)[:3],
        )  # fmt: skip
        content = bytes(fs.read(number, 0, a.size_bytes)) if kind == stat.S_IFREG else b""
        tree[number] = Node(fixed, a.mtime_ns, a.ctime_ns, a.size_bytes, a.block_count, content)
    return tree


def difference(found: Tree, legal: Tree, relaxed: Mapping[int, Versions], *, blocks: bool) -> str:
    """How a tree differs from a legal one; empty where it doesn't."""
    if found.keys() != legal.keys():
        return f"inodes {sorted(found.keys() ^ legal.keys())} are on one side only"
    for number, node in found.items():
        other = legal[number]
        if node == other:
            continue
        if node.fixed != other.fixed:
            pairs = zip(node.fixed, other.fixed, strict=True)
            return f"inode {number}: " + "; ".join(f"{a} not {b}" for a, b in pairs if a != b)
        if number in relaxed:
            if why := relaxed[number].why_not(node):
                return f"inode {number}: {why}"
            continue
        if not blocks:
            other = other._replace(block_count=node.block_count)
        if node != other:
            names = ("mtime", "ctime", "size", "blocks", "content")
            pairs = zip(names, node[1:], other[1:], strict=True)
            return f"inode {number}: " + "; ".join(
                f"{name} is {str(a)[:60]}, not {str(b)[:60]}" for name, a, b in pairs if a != b
            )
    return ""


def disagreement(fs: FileSystem, report: Report) -> str:
    """How what the file system reads differs from what the checker found."""
    for number, found in report.inodes.items():
        inode = fs.store.cache.read_inode(number)
        if inode is None:
            return f"inode {number} is there for the checker alone"
        frames = {e.index + at: e.pfn + at for e in inode.extents for at in range(e.frame_count)}
        if (
            frames != found.frames
            or dict(inode.pieces) != found.pieces
            or (inode.transform or NO_TRANSFORM) != found.transform
            or {n: tuple(e) for n, e in inode.entries.items()} != found.entries
            or inode.xattrs != found.xattrs
            or [offset // FRAME for offset in inode.log.frames] != found.log_frames
        ):
            return f"the checker finds another inode {number}"
        again = fs.store.cached(number)
        if again is not None and (
            again.live_slots != inode.live_slots
            or again.subdirectory_count != inode.subdirectory_count
            or again.log.slot_count != inode.log.slot_count
            or list(again.extents) != list(inode.extents)
            or (again.pieces, again.piece_frames) != (inode.pieces, inode.piece_frames)
        ):
            return f"inode {number} in memory is not what a fresh look makes it"
    return ""


@dataclass
class Op:
    """An operation. Paths say which files it treats how."""

    name: str
    run: Callable[[World], object]
    writes: str = ""
    """It stores bytes of this file, which `persist` makes durable."""
    in_place: str = ""
    """While it runs, bytes of this file change in place."""
    range: tuple[int, int] | None = None
    """Where `writes` or `in_place` stores: offset and length."""
    changes: str = ""
    """It changes the content of this file all at once."""
    transform: Callable[[bytes], bytes] | None = None
    """What it makes of the content of `in_place` or `changes`, whatever that is."""
    persists: str = ""
    persists_all: bool = False
    blocks: bool = True
    """Frames of files change with the rest of it, all at once."""
    mounts: bool = False


@dataclass
class Moment:
    """What a power failure at one instant may leave."""

    image: bytes
    durable: dict[int, bytes]
    """The lines that are durable and were not in the image."""
    contents: dict[int, list[bytes]]
    """For each line that is not durable what it may hold, the oldest first."""
    order: list[int]
    """The stores since, by their lines."""

    @staticmethod
    def of(medium: RecordingMedium) -> Moment:
        return Moment(medium.image, medium.durable_lines, *medium.undecided())

    def choices(self, matters: set[int], limit: int, rng: random.Random) -> Iterator[list[int]]:
        """For each line how many of its stores survive: all choices of the lines that matter where
        there are no more than `limit`, else some of every kind."""
        lines = list(self.contents)
        newest = [len(self.contents[line]) - 1 for line in lines]
        first = [at for at, line in enumerate(lines) if line in matters]
        distinct = [
            list({content: i for i, content in enumerate(self.contents[lines[at]])}.values())
            for at in first
        ]
        if math.prod(map(len, distinct)) <= limit:
            for chosen in itertools.product(*distinct):
                choice = [rng.randint(0, count) for count in newest]
                for at, kept in zip(first, chosen, strict=True):
                    choice[at] = kept
                yield choice
            return
        yield from self._in_order(lines, limit // 2)
        for at in sorted(rng.sample(first, min(len(first), limit // 4))):
            yield [*newest[:at], 0, *newest[at + 1 :]]
            yield [*[0] * at, newest[at], *[0] * (len(lines) - at - 1)]
        for _ in range(limit):
            choice = [rng.choice((0, count, rng.randint(0, count))) for count in newest]
            yield choice

    def _in_order(self, lines: list[int], limit: int) -> Iterator[list[int]]:
        """Points of the program's own order."""
        places = {line: at for at, line in enumerate(lines)}
        kept = [0] * len(lines)
        step = max(1, len(self.order) // max(1, limit))
        for count, line in enumerate(self.order, 1):
            kept[places[line]] += 1
            if count % step == 0:
                yield list(kept)

    def survivors(self, choice: list[int]) -> dict[int, bytes]:
        """The lines that are not as in the image: the same image, the same lines."""
        lines = dict(self.durable)
        for (line, contents), kept in zip(self.contents.items(), choice, strict=True):
            lines[line] = contents[kept]
        image = memoryview(self.image)
        return {
            line: content
            for line, content in lines.items()
            if content != image[line * LINE_BYTES : (line + 1) * LINE_BYTES]
        }


class Judge:
    """Looks at what is left of one pool."""

    def __init__(self, pool: Pool, *, deep_every: int = 0) -> None:
        self.medium = CrashMedium(pool.medium.size_bytes)
        self.pool = on_medium(pool, self.medium)
        self.checker = Checker(int(pool.first_data_pfn), pool.data_pfn_count)
        self.deep_every = deep_every
        self.states = 0
        self.deep_states = 0
        self.left: list[bytes] = []
        """Some of the images that passed, to go on from."""
        self.passed: dict[tuple[bytes, frozenset[tuple[int, bytes]]], set[tuple[int, int]]] | None
        self.passed = None
        """What passed, and what was read of it, for as long as the same is legal. Many moments may
        leave the same."""

    def why_not(
        self, moment: Moment, legal: Sequence[Tree], relaxed: Mapping[int, Versions],
        blocks: bool, limit: int,
    ) -> Iterator[str]:  # fmt: skip
        """What is wrong with each of the states of a moment in which something is."""
        self.medium.reads.clear()
        everything = [len(contents) - 1 for contents in moment.contents.values()]
        seen: set[frozenset[tuple[int, bytes]]] = set()
        for choice in ([0] * len(everything), everything):
            yield from self._look(moment, choice, seen, legal, relaxed, blocks)
        # What nobody reads can't make a difference, at least not if nothing else does.
        matters = lines_of(self.medium.reads) & moment.contents.keys()
        for choice in moment.choices(matters, limit, random.Random(0)):
            yield from self._look(moment, choice, seen, legal, relaxed, blocks)

    def _look(
        self, moment: Moment, choice: list[int], seen: set[frozenset[tuple[int, bytes]]],
        legal: Sequence[Tree], relaxed: Mapping[int, Versions], blocks: bool,
    ) -> Iterator[str]:  # fmt: skip
        """Judge what a choice leaves, unless the same has passed."""
        lines = moment.survivors(choice)
        key = frozenset(lines.items())
        if key in seen:
            return
        seen.add(key)
        passed = (self.passed or {}).get((moment.image, key))
        if passed is not None:
            self.medium.reads |= passed
            return
        before, self.medium.reads = self.medium.reads, set()
        self.medium.apply(moment.image, lines)
        self.states += 1
        try:
            if why := self._why_not(legal, relaxed, blocks):
                yield why
            elif self.passed is not None:
                self.passed[moment.image, key] = set(self.medium.reads)
        finally:
            self.medium.reads |= before
            self.medium.undo()

    def _why_not(self, legal: Sequence[Tree], relaxed: Mapping[int, Versions], blocks: bool) -> str:
        is_deep = bool(self.deep_every) and self.states % self.deep_every == 0
        image = bytes(self.medium.memory) if is_deep else b""
        try:
            fs = file_system(self.pool)
            found = snapshot(fs)
        except Exception as problem:
            return f"it can't be read: {problem!r}"
        if fs.read_only:
            return f"it is read-only: {fs.damage}"
        whys = [difference(found, tree, relaxed, blocks=blocks) for tree in legal]
        if all(whys):
            return " / ".join(whys)
        report = self.checker.check(self.medium.memory)
        if report.problems:
            return f"the checker says: {report.problems[0]}"
        if report.is_clean and (report.leaked or report.orphans):
            return f"clean, but {report.leaked} are leaked and {report.orphans} lack a name"
        if (is_deep or self.states % 5 == 0) and (why := disagreement(fs, report)):
            return why
        if is_deep:
            self.deep_states += 1
            self.left.append(image)
            return self._search(fs, found)
        return ""

    def _search(self, fs: FileSystem, found: Tree) -> str:
        """The search for leaks leaves none, and all else as it is."""
        while fs.tidy():
            pass
        if why := difference(snapshot(fs), found, {}, blocks=False):
            return f"the search for leaks changed: {why}"
        report = self.checker.check(self.medium.memory)
        if report.problems or report.leaked or report.orphans or fs.read_only:
            return f"after the search for leaks: {report.problems} {report.leaked} {fs.damage}"
        if fs.space().free_frames != report.free_frames:
            return f"{fs.space().free_frames} frames are free, not {report.free_frames}"
        fs.end()
        return "" if self.checker.check(self.medium.memory).is_clean else "the end is not clean"


class World:
    """A file system whose power fails."""

    def __init__(
        self, image: bytes, *, limit: int = 0, judge: Judge | None = None, seed: int = 0,
        ignored: Collection[int] = (), failures: Mapping[int, OSError] | None = None,
        durability: Durability = Durability.CACHE_LINES,
        medium: RecordingMedium | None = None,
    ) -> None:  # fmt: skip
        self.medium = medium or RecordingMedium(image, ignored_calls=ignored, failures=failures)
        self.medium.durability = durability
        self.pool = on_medium(template(len(image)), self.medium)
        self.limit = limit
        self.judge = judge
        self.violations: list[str] = []
        self.fs = file_system(self.pool)
        self.home = self.fs.has_entry(ROOT, ENCRYPTED) or ROOT
        """Where paths begin."""
        self.tree = snapshot(self.fs)
        self.volatile: dict[int, Versions] = {}
        self.relaxed: dict[int, Versions] = {}
        self.error: OSError | None = None
        self.held: list[int] = []
        self.counter = 0
        self.rng = random.Random(seed)

    def ino(self, path: str) -> int:
        """The inode of a path."""
        number = self.home
        for name in path.strip("/").split("/"):
            if name:
                number = self.fs.lookup(number, name.encode())
        return number

    def at(self, path: str) -> tuple[int, bytes]:
        """Directory and name."""
        directory, _, name = path.strip("/").rpartition("/")
        return self.ino(directory), name.encode()

    def data(self, length: int) -> bytes:
        """Bytes that were in no file before."""
        self.counter += 1
        word = b"%07d|" % self.counter
        return (word * (length // 8 + 1))[:length]

    def remount(self) -> None:
        """Forget everything and mount again."""
        self.held.clear()
        self.fs = file_system(self.pool)

    def run(self, op: Op, *, explore: bool = True) -> None:
        """One operation, looked at while it runs and when it has returned."""
        during: list[Moment] = []
        before, was_volatile = self.tree, self.volatile
        if explore and self.limit:
            self.medium.at_each_fence = lambda: during.append(self._moment())
        self.error = None
        target = self._number_of(op.writes or op.in_place or op.changes)
        persisted = self._number_of(op.persists)
        try:
            op.run(self)
        except OSError as error:
            self.error = error
        self.medium.at_each_fence = lambda: None
        after = self.tree = snapshot(self.fs)
        if self.error and not (op.writes or op.in_place or op.mounts) and after != before:
            self.violations.append(f"{op.name} failed with {self.error}, but not wholly")
        relaxed = self.relaxed = self._relaxed(op, target, before, after)
        self.volatile = {n: v.copy() for n, v in was_volatile.items() if n in after}
        self._settle(op, target, persisted, after, relaxed)
        if explore and self.limit and self.judge:
            self.judge.passed = {}
            for moment in during:
                rest = (relaxed, op.blocks, self.limit)
                for why in self.judge.why_not(moment, (before, after), *rest):
                    self.violations.append(f"during {op.name}: {why}")
            self.judge.passed = None
            for why in self.judge.why_not(
                self._moment(), (after,), self.volatile, True, self.limit
            ):
                self.violations.append(f"after {op.name}: {why}")

    def _moment(self) -> Moment:
        return Moment.of(self.medium)

    def _number_of(self, path: str) -> int:
        if not path:
            return 0
        try:
            return self.ino(path)
        except OSError:
            return 0

    def _relaxed(self, op: Op, target: int, before: Tree, after: Tree) -> dict[int, Versions]:
        relaxed = {n: v.copy() for n, v in self.volatile.items()}
        is_in_place = op.writes or op.in_place
        if is_in_place and target in before and target not in relaxed:
            relaxed[target] = Versions([], set(), set())
            relaxed[target].add(before[target])
        if is_in_place and target in relaxed and op.range and self.fs.inode(target).is_encrypted:
            start, length = op.range
            blocks = range(-(-start // BLOCK) * BLOCK, (start + length) // BLOCK * BLOCK)
            relaxed[target].blocks.append(blocks)
        if target in relaxed and op.transform:
            for content in list(relaxed[target].contents):
                relaxed[target].contents.append(op.transform(content))
        for number, versions in relaxed.items():
            if number in after:
                versions.add(after[number])
        return relaxed

    def _settle(
        self, op: Op, target: int, persisted: int, after: Tree, relaxed: dict[int, Versions]
    ) -> None:
        """What stays uncertain once it has returned."""
        if op.persists_all:
            self.volatile.clear()
        if op.writes and target in after:
            self.volatile[target] = relaxed[target].copy()
        elif target in self.volatile and op.transform and not self.error:
            versions = self.volatile[target]
            versions.contents = [op.transform(content) for content in versions.contents]
        for number, versions in self.volatile.items():
            versions.add(after[number])
        self.volatile.pop(persisted, None)


_templates: dict[int, Pool] = {}


def spec() -> PoolSpec:
    return PoolSpec("small", alignment_bytes=4 * KIB, scheme=Scheme.NONE, mode=Mode.FS)


def blank_image(frames: int = FRAMES) -> bytes:
    """The image of a pool with nothing in it but a label and stale frames."""
    if frames not in _images:
        size_bytes = (frames + 2) * FRAME
        pool = Pool.create(RecordingMedium(STALE * (size_bytes // 8)), spec())
        _images[frames] = bytes(pool.medium.read(0, size_bytes))
    return _images[frames]


_images: dict[int, bytes] = {}


def template(size_bytes: int) -> Pool:
    """A pool of that size, open."""
    if size_bytes not in _templates:
        image = blank_image(size_bytes // FRAME - 2)
        _templates[size_bytes] = Pool.open(RecordingMedium(image))
    return _templates[size_bytes]


def on_medium(pool: Pool, medium: Medium) -> Pool:
    """The same pool on another medium."""
    other = copy.copy(pool)
    other.medium = medium
    return other


class PlainMedium(RecordingMedium):
    """A recording medium that records nothing."""

    def store(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._memory[offset_bytes : offset_bytes + len(view)] = view


@functools.cache
def keys() -> Keys:
    """The keys of all images here."""
    return Keys()


def file_system(pool: Pool) -> FileSystem:
    """The file system of a pool, mounted, with the keys for what is encrypted."""
    return FileSystem(pool, NoMemmap(), sealing=keys().native)


def built(
    build: Callable[[World], object], frames: int = FRAMES,
    durability: Durability = Durability.CACHE_LINES, *, is_encrypted: bool = False,
) -> bytes:  # fmt: skip
    """The image of a file system after something was done in it, or in an encrypted directory in
    it, unmounted."""
    image = blank_image(frames)
    medium = PlainMedium(image)
    pool = on_medium(template(len(image)), medium)
    FileSystem.format(pool)
    world = World(image, medium=medium, durability=durability)
    if is_encrypted:
        world.home = world.fs.make(ROOT, ENCRYPTED, DIRECTORY)
        world.fs.properties.encrypt(world.home, keys().key_id)
    build(world)
    for number in world.tree | snapshot(world.fs):
        world.fs.trim_ahead(number)
        world.fs.persist(number)
    world.fs.end()
    return bytes(medium.read(0, medium.size_bytes))


FILE = NewInode(0o100644, 1000, 100)
DIRECTORY = NewInode(0o040755, 1000, 100)


def link_to(target: bytes) -> NewInode:
    return NewInode(0o120777, 0, 0, target=target)


def write(w: World, path: str, offset: int, length: int) -> None:
    w.fs.write(w.ino(path), offset, w.data(length))


def native_write(w: World, path: str, offset: int, length: int) -> None:
    """As the data plane writes: the bytes are fenced where fences make them durable, then the size
    is raised, and nothing flushes it before an fsync."""
    number = w.ino(path)
    w.fs.hold(number)
    w.held.append(number)
    fs, medium, data = w.fs, w.medium, w.data(length)
    mapped = {e.index + at: e.pfn + at for e in fs.extents(number) for at in range(e.frame_count)}
    size_bytes = fs.attributes(number).size_bytes
    position = offset
    frames = range(offset // FRAME, (offset + length - 1) // FRAME + 1)
    if length <= 0 or offset > size_bytes or not all(frame in mapped for frame in frames):
        # That is for the control plane.
        return
    while position < offset + length:
        inside = position % FRAME
        step = min(FRAME - inside, offset + length - position)
        at = mapped[position // FRAME] * FRAME + inside
        medium.store(at, data[position - offset : position - offset + step])
        medium.flush(at, step)
        position += step
    if medium.durability is Durability.CACHE_LINES:
        medium.fence()
    line = fs.live_line(number)
    word = int.from_bytes(medium.read(line, 8), "little")
    if offset + length > word >> 16:
        medium.store(line, raised(word, offset + length).to_bytes(8, "little"))
    written_ns = fs.attributes(number).ctime_ns + 1
    medium.store(line + 8, written_ns.to_bytes(8, "little"))
