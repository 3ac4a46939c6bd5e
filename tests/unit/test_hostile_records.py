"""Single things in a pool that are impossible: each is damage, and nothing worse.

What the fuzzer has found once, and what it can hardly find.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

import pytest

from kit.fs_tree import Changes, Tree, names
from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as media
from pmemfs.media.filesystem import (
    FIRST_INODES_FRAME,
    FORMAT_VERSION,
    HEAD_FRAME,
    JOURNAL_FRAME,
    Head,
)
from pmemfs.media.filesystem import pack_head as pack_filesystem_head
from pmemfs.media.inode import HEAD, INLINE_OFFSET, ROOT, SLOT_BYTES, TAIL_WORD_AT, pack_head
from pmemfs.media.journal import pack_journal
from pmemfs.media.log import InodeFlags, RecordKind
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.attributes import CHATTR
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.names import RENAME_EXCHANGE
from pmemfs.volume.fs.reading import read_inode

FILE = NewInode(0o100644, 1, 2)


@pytest.fixture
def tree() -> Tree:
    return Tree()


def set_tail(tree: Tree, number: int, tail: int) -> None:
    slot = tree.mount().store.table.slot_offset(number)
    tree.medium.store(slot + TAIL_WORD_AT, tail.to_bytes(8, "little"))


@pytest.mark.parametrize("distance", [1, 32, 64, INLINE_OFFSET - 1, SLOT_BYTES + 64, 1 << 40])
def test_the_tail_of_a_log_in_its_slot_lies_there(tree: Tree, distance: int) -> None:
    set_tail(tree, tree.file, tree.mount().store.table.slot_offset(tree.file) + distance)
    fs = tree.mount()
    with pytest.raises(OSError, match=f"inode {tree.file}: ") as raised:
        fs.set_attributes(tree.file, mode=0)
    assert raised.value.errno == errno.EIO
    assert fs.read_only


def test_the_tail_of_a_log_in_frames_is_behind_the_head_of_one(tree: Tree) -> None:
    fs = tree.mount()
    fs.set_xattr(tree.file, b"user.long", bytes(3000))
    [frame] = fs.inode(tree.file).log.frames
    for distance in (8, 32, 63, 65):
        set_tail(tree, tree.file, frame + distance)
        with pytest.raises(OSError, match="ends where no record ends"):
            tree.mount().attributes(tree.file)


@pytest.mark.parametrize("kind", [RecordKind.ATTRIBUTES, RecordKind.EXTENT, RecordKind.HOLE,
                                  RecordKind.PARENT])  # fmt: skip
def test_a_record_of_one_slot_has_no_more(tree: Tree, kind: int) -> None:
    with tree.changed() as changes:
        changes.append(tree.other, media.record(kind, bytearray(128)))
    with pytest.raises(OSError, match="takes 128 bytes"):
        tree.mount().attributes(tree.other)


@pytest.mark.parametrize("mode", [0, 0o644, 0o170000, 1 << 16 | 0o100644, 0xFFFF_FFFF])
def test_a_mode_is_one_of_a_type_and_no_more(tree: Tree, mode: int) -> None:
    with tree.changed() as changes:
        changes.state(tree.other, mode=mode)
    with pytest.raises(OSError, match="its mode is of no type"):
        tree.mount().attributes(tree.other)


def test_a_file_that_owns_frames_of_inodes_is_not_written_to(tree: Tree) -> None:
    fs = tree.mount()
    numbers = [fs.make(tree.home, b"f%d" % count, FILE) for count in range(20)]
    pfn = numbers[10] * SLOT_BYTES >> PAGE_SHIFT
    with tree.changed() as changes:
        changes.append(tree.other, media.pack_extent(0, pfn - 1, 3))
    before = bytes(tree.medium.read(pfn << PAGE_SHIFT, FRAME_BYTES))
    fs = tree.mount()
    with pytest.raises(OSError, match="frames of inodes"):
        fs.write(tree.other, 4096, b"mine now")
    assert bytes(tree.medium.read(pfn << PAGE_SHIFT, FRAME_BYTES)) == before


def test_frames_that_were_of_a_file_before_they_were_of_inodes_are_no_damage(tree: Tree) -> None:
    with tree.changed() as changes:
        pfn = changes.fs.geometry.first_pfn + FIRST_INODES_FRAME
        changes.append(tree.other, media.pack_extent(9, pfn, 1), media.pack_hole(9, 1))
    assert tree.mount().attributes(tree.other).size_bytes == 10_000


@pytest.mark.parametrize("way", ["unlink", "rename"])
def test_a_name_of_an_inode_that_counts_none_cannot_be_removed(tree: Tree, way: str) -> None:
    with tree.changed() as changes:
        changes.state(tree.other, link_count=0)
    fs = tree.mount()
    remove = {
        "unlink": lambda: fs.unlink(tree.deep, b"other"),
        "rename": lambda: fs.rename(tree.deep, b"file", tree.deep, b"other"),
    }
    with pytest.raises(OSError, match="counts no names") as raised:
        remove[way]()
    assert raised.value.errno == errno.EIO
    assert fs.read_only
    assert fs.lookup(tree.deep, b"file") == tree.file


def test_generations_go_round(tree: Tree) -> None:
    fs = tree.mount()
    number = fs.make(ROOT, b"first", FILE)
    fs.unlink(ROOT, b"first")
    slot = fs.store.table.slot_offset(number)
    tree.medium.store(slot, pack_head(number, (1 << 64) - 1, 0, 0, 0))
    fs = tree.mount()
    made = {fs.make(ROOT, b"n%d" % count, FILE) for count in range(8)}
    assert number in made
    assert HEAD.unpack(bytes(tree.medium.read(slot, 64))).generation == 0


def test_a_journal_changes_no_word_twice(tree: Tree) -> None:
    slot = tree.mount().store.table.slot_offset(tree.file)
    at = slot + TAIL_WORD_AT
    tail = int.from_bytes(tree.medium.read(at, 8), "little")
    journal = tree.pool.zones.data.offset_bytes + (JOURNAL_FRAME << PAGE_SHIFT)
    tree.medium.store(journal, pack_journal([(at, tail, 0), (at, 0, tail)]))
    with pytest.raises(DamagedFileSystem, match="would change a word"):
        tree.mount()


@pytest.mark.parametrize("frame", [0, 1, JOURNAL_FRAME, 10_000, 32_767])
def test_bits_of_impossible_frames_of_inodes_are_none(tree: Tree, frame: int) -> None:
    with tree.changed() as changes:
        changes.mark(1, changes.fs.geometry.first_pfn + frame, used=True)
    fs = tree.mount()
    assert fs.geometry.frame_count < 10_000
    for count in range(50):
        fs.make(ROOT, b"n%d" % count, FILE)
    assert frame not in {pfn - fs.geometry.first_pfn for pfn in fs.store.table.frames()}


def circles() -> list[Callable[[Tree, Changes], object]]:
    """Directories that lead to themselves."""
    return [
        lambda tree, changes: changes.append(tree.home, media.pack_parent(tree.deep)),
        lambda tree, changes: changes.append(tree.home, media.pack_parent(tree.home)),
        lambda tree, changes: changes.append(
            tree.deep, media.pack_entry(b"up", tree.home, 4, 1), media.pack_parent(tree.deep)
        ),
    ]


@pytest.mark.parametrize("which", range(len(circles())))
def test_circles_of_directories_end(tree: Tree, which: int) -> None:
    with tree.changed() as changes:
        circles()[which](tree, changes)
    fs = tree.mount()
    target = fs.make(ROOT, b"target", NewInode(0o40755, 0, 0))
    fs.rename(ROOT, b"same", tree.deep, b"moved")
    fs.rename(ROOT, b"target", tree.deep, b"target")
    assert fs.lookup(tree.deep, b"target") == target


def test_extents_of_all_the_pool_cost_no_memory_by_the_frame(tree: Tree) -> None:
    with tree.changed() as changes:
        for count in ((1 << 35) - 1, 1 << 62, (1 << 64) - 1):
            changes.append(tree.other, media.pack_hole(0, (1 << 35) - 1))
            with pytest.raises(DamagedFileSystem):
                _with(tree, media.pack_extent(0, changes.extent(tree.file)[1], count))


def _with(tree: Tree, record: bytes) -> None:
    """Read what `other` would be with a record more."""
    before = bytes(tree.medium.read(0, tree.medium.size_bytes))
    with tree.changed() as changes:
        changes.append(tree.other, record)
    fs = tree.mount()
    try:
        read_inode(tree.medium, fs.store.table, tree.other)
    finally:
        tree.medium.store(0, before)


@pytest.mark.parametrize("version", [1, FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_a_file_system_of_another_format_is_refused(tree: Tree, version: int) -> None:
    at = tree.pool.zones.data.offset_bytes + (HEAD_FRAME << PAGE_SHIFT)
    head = Head(format_version=version, uuid=tree.pool.label.uuid)
    tree.medium.store(at, pack_filesystem_head(head))
    with pytest.raises(
        DamagedFileSystem,
        match=f"is {version}, and this program knows only {FORMAT_VERSION}",
    ):
        tree.mount()
    [error] = tree.errors()
    assert f"its format is {version}, and" in error


# Records elsewhere than where they were written

Copy = Callable[[Tree], tuple[int, int, int]]
"""A directory, and the offsets in the pool of two records of one length: the second is overwritten
with the first."""


def _in_its_slot(tree: Tree) -> tuple[int, int, int]:
    # parent, attributes, then file and other
    start = tree.mount().inode(tree.deep).log.head
    return tree.deep, start + 128, start + 192


def _of_another_inode(tree: Tree) -> tuple[int, int, int]:
    fs = tree.mount()
    return tree.deep, fs.inode(tree.home).log.head, fs.inode(tree.deep).log.head


def _in_a_frame(tree: Tree) -> tuple[int, int, int]:
    fs = tree.mount()
    for count in range(100):
        fs.make(tree.home, b"n%d" % count, FILE)
    first, second = fs.inode(tree.home).log.frames[:2]
    return tree.home, first + 640, second + 128


def _of_a_former_inode(tree: Tree) -> tuple[int, int, int]:
    """The slot of the file is used anew: what the former one wrote there is put back."""
    fs = tree.mount()
    slot = fs.store.table.slot_offset(tree.file)
    kept = bytes(tree.medium.read(slot + INLINE_OFFSET, media.RECORD_BYTES))
    fs.unlink(ROOT, b"same")
    fs.unlink(tree.deep, b"file")
    while fs.make(tree.deep, b"again%d" % fs.store.ground.clock, FILE) != tree.file:
        fs.store.ground.clock += 1
    spare = slot + SLOT_BYTES - media.RECORD_BYTES
    tree.medium.store(spare, kept)
    return tree.file, spare, slot + INLINE_OFFSET


COPIES = [_in_its_slot, _of_another_inode, _in_a_frame, _of_a_former_inode]


@pytest.mark.parametrize("copied", COPIES)
def test_a_record_that_was_copied_over_another_is_damage(tree: Tree, copied: Copy) -> None:
    number, source, target = copied(tree)
    raw = bytes(tree.medium.read(source, media.RECORD_BYTES))
    assert raw[1] == tree.medium.read(target, 2)[1] == 1
    tree.medium.store(target, raw)
    assert any(f"a record at {target:#x} has a wrong checksum" in e for e in tree.errors())
    fs = tree.mount()
    with pytest.raises(OSError, match="a wrong checksum") as raised:
        fs.attributes(number)
    assert raised.value.errno == errno.EIO
    assert fs.read_only


def test_a_frame_of_a_log_that_was_copied_over_another_is_damage(tree: Tree) -> None:
    fs = tree.mount()
    for count in range(200):
        fs.make(tree.home, b"n%d" % count, FILE)
    first, second = fs.inode(tree.home).log.frames[:2]
    after = bytes(tree.medium.read(second + media.NEXT_AT, 8))
    tree.medium.store(second, bytes(tree.medium.read(first, FRAME_BYTES)))
    tree.medium.store(second + media.NEXT_AT, after)
    assert any(f"goes on at {second:#x}, where something else lies" in e for e in tree.errors())
    with pytest.raises(OSError, match="something else lies"):
        tree.mount().attributes(tree.home)


def test_records_that_compaction_has_moved_are_sound(tree: Tree) -> None:
    fs = tree.mount()
    for count in range(300):
        fs.make(tree.home, b"n%d" % count, FILE)
        fs.unlink(tree.home, b"n%d" % count)
    fs.set_xattr(tree.other, b"user.long", bytes(3000))
    fs.remove_xattr(tree.other, b"user.long")
    for number in (tree.home, tree.other):
        assert not fs.inode(number).log.is_inline
        with fs.store.change() as change:
            change.compact(fs.inode(number))
        assert fs.inode(number).log.is_inline
    assert tree.errors() == []
    assert bytes(tree.mount().read(tree.other, 0, 20_000)) == b"b" * 10_000


def wrong_ways(tree: Tree) -> dict[str, tuple[int, int]]:
    """Entries for a directory that is elsewhere: where the entry is, and where it leads."""
    return {
        "the root, in itself": (ROOT, ROOT),
        "the root": (tree.deep, ROOT),
        "itself": (tree.deep, tree.deep),
        "above": (tree.deep, tree.home),
        "elsewhere": (ROOT, tree.deep),
    }


@pytest.mark.parametrize("way", wrong_ways(Tree()))
@pytest.mark.parametrize("kind", [4, 8], ids=["directory", "file"])
def test_an_entry_for_a_directory_that_is_elsewhere_is_damage(
    tree: Tree, way: str, kind: int
) -> None:
    directory, number = wrong_ways(tree)[way]
    tree.mount().make(ROOT, b"empty", NewInode(0o40755, 0, 0))
    with tree.changed() as changes:
        changes.append(directory, media.pack_entry(b"wrong", number, kind, 1))
    uses: list[Callable[[FileSystem], object]] = [
        lambda fs: fs.lookup(directory, b"wrong"),
        lambda fs: fs.has_entry(directory, b"wrong"),
        lambda fs: fs.rmdir(directory, b"wrong"),
        lambda fs: fs.unlink(directory, b"wrong"),
        lambda fs: fs.rename(directory, b"wrong", ROOT, b"new"),
        lambda fs: fs.rename(ROOT, b"empty", directory, b"wrong"),
        lambda fs: fs.rename(ROOT, b"empty", directory, b"wrong", RENAME_EXCHANGE),
    ]
    for use in uses:
        fs = tree.mount()
        with pytest.raises(OSError, match="its entry b'wrong' leads to") as raised:
            use(fs)
        assert raised.value.errno == errno.EIO
        assert fs.read_only
        assert fs.lookup(tree.deep, b"file") == tree.file
    assert tree.errors()


def test_directories_that_were_moved_are_where_they_are(tree: Tree) -> None:
    fs = tree.mount()
    away = fs.make(ROOT, b"away", NewInode(0o40755, 0, 0))
    fs.rename(tree.home, b"deep", away, b"moved")
    fs.rename(away, b"moved", ROOT, b"home", RENAME_EXCHANGE)
    for mounted in (fs, tree.mount()):
        assert mounted.lookup(ROOT, b"home") == tree.deep
        assert mounted.lookup(away, b"moved") == tree.home
        assert mounted.has_entry(away, b"moved") == tree.home
    assert not tree.errors()


# Flags

FLAGS = InodeFlags.IMMUTABLE | InodeFlags.APPEND_ONLY


@pytest.mark.parametrize("flags", [32, 64, 1 << 15, 0xFFFF])
def test_flags_that_nobody_knows_are_damage(tree: Tree, flags: int) -> None:
    with tree.changed() as changes:
        changes.state(tree.other, flags=flags)
    fs = tree.mount()
    with pytest.raises(OSError, match="are not all known") as raised:
        fs.attributes(tree.other)
    assert raised.value.errno == errno.EIO
    assert fs.read_only
    assert any("are not all known" in error for error in tree.errors())


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR])
def test_what_nobody_can_open_for_its_flags_is_never_fixed(tree: Tree, kind: int) -> None:
    special = NewInode(kind | 0o644, 0, 0)
    inherited = InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME
    number = tree.mount().make(ROOT, b"sound", special)
    with tree.changed() as changes:
        changes.state(number, flags=inherited)
    assert tree.mount().attributes(number).flags == inherited
    for flags in (InodeFlags.IMMUTABLE, InodeFlags.APPEND_ONLY):
        number = tree.mount().make(ROOT, b"special%d" % flags, special)
        with tree.changed() as changes:
            changes.state(number, flags=flags)
        with pytest.raises(OSError, match="its type cannot have its flags"):
            tree.mount().attributes(number)


def test_all_flags_together_are_no_damage_and_none_is_lost(tree: Tree) -> None:
    everything = InodeFlags.KEEPS_AHEAD | CHATTR
    with tree.changed() as changes:
        for number in (ROOT, tree.home, tree.other):
            changes.state(number, flags=everything)
    assert not tree.errors()
    fs = tree.mount()
    assert fs.attributes(tree.other).flags == everything
    fs.set_flags(tree.other, InodeFlags(0))
    assert fs.attributes(tree.other).flags == InodeFlags.KEEPS_AHEAD
    assert tree.mount().attributes(tree.other).flags == InodeFlags.KEEPS_AHEAD


def test_a_repair_changes_what_is_immutable(tree: Tree) -> None:
    with tree.changed() as changes:
        for number in (ROOT, tree.home, tree.deep, tree.file):
            changes.state(number, flags=FLAGS)
        changes.damage(tree.home)
        changes.state(tree.other, link_count=7)
    assert tree.repair(force=True)
    found = names(tree.mount(), ROOT)
    assert tree.other in found.values()
    assert tree.mount().attributes(tree.file).flags == FLAGS
