"""`check` of mode `fs`: each thing that can be wrong is found, named, and repaired when asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kit.fs_tree import DIRECTORY, FILE, Changes, Tree, names
from kit.pools import MemoryMedium, content
from pmemfs.media import log as media
from pmemfs.media.filesystem import FIRST_INODES_FRAME, HEAD, HEAD_FRAME, JOURNAL_FRAME, pack_head
from pmemfs.media.inode import LIVE_OFFSET, ROOT, SLOT_BYTES, TAIL_WORD_AT
from pmemfs.media.journal import pack_journal
from pmemfs.media.layout import replace
from pmemfs.media.live import size_word
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap.none import NoMemmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.repair import repair_filesystem

ALL = ["home", "home/deep", "home/deep/file", "home/deep/other", "same"]


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_a_sound_file_system_has_no_problems_and_is_counted(tree: Tree) -> None:
    verdict = tree.check()
    assert verdict.problems == []
    assert (verdict.file_count, verdict.directory_count, verdict.other_count) == (2, 3, 0)
    assert verdict.leaked_frames == 0
    # The frames of inodes, and three of each file.
    assert verdict.used_frames == 1 + 6
    assert repair_filesystem(tree.pool, verdict) == 0


def test_what_a_crash_leaves_is_a_leak_and_no_error(tree: Tree) -> None:
    fs = tree.mount()
    fs.allocator.allocate(5)
    fs.make_unnamed(ROOT, FILE)
    fs.write(tree.file, 10_000, bytes(5000))
    assert tree.errors() == []
    leaks = "\n".join(tree.leaks())
    assert "5 frames are marked as used and not owned" in leaks
    assert "removed while it was in use" in leaks
    assert "behind the sizes of 1 files" in leaks
    free = fs.allocator.free_count()
    assert "they are freed" in tree.repair()
    assert tree.mount().allocator.free_count() > free + 5


def test_frames_that_fallocate_keeps_behind_the_size_are_no_leak(tree: Tree) -> None:
    fs = tree.mount()
    fs.allocate(tree.file, 0, 100_000, keep_size=True)
    assert tree.leaks() == []


def test_an_unfinished_journal_is_said_and_checked_as_if_it_were_finished() -> None:
    tree = Tree()
    medium = RecordingMedium(content(tree.medium))
    FileSystem(Pool.open(medium), NoMemmap()).make(tree.home, b"new", FILE)
    tree.pool = Pool.open(MemoryMedium(next(medium.after_power_failure(limit=1))))
    tree.medium = tree.pool.medium
    assert tree.errors() == []
    assert "an operation was interrupted" in tree.leaks()[0]
    assert tree.repair() == ["it is carried out"]
    assert "home/new" in names(tree.mount(), ROOT)


def test_a_journal_that_would_change_something_else_is_emptied(tree: Tree) -> None:
    at = tree.pool.zones.data.offset_bytes
    tree.medium.store(at + (JOURNAL_FRAME << PAGE_SHIFT), pack_journal([(at, 0, 1)]))
    assert "would change a word at" in tree.errors()[0]
    assert "the journal is emptied" in tree.repair()[0]
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_a_head_that_was_overwritten_is_written_anew(tree: Tree) -> None:
    at = tree.pool.zones.data.offset_bytes + (HEAD_FRAME << PAGE_SHIFT)
    tree.medium.store(at, bytes(64))
    assert "does not start with the magic" in tree.errors()[0]
    assert tree.repair() == ["the head is written anew"]
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_a_head_of_a_newer_program_is_left_alone(tree: Tree) -> None:
    at = tree.pool.zones.data.offset_bytes + (HEAD_FRAME << PAGE_SHIFT)
    head = HEAD.unpack(bytes(tree.medium.read(at, 64)))
    tree.medium.store(at, pack_head(replace(head, features=8)))
    before = content(tree.medium)
    assert "features that this program does not know" in tree.errors()[0]
    repair_filesystem(tree.pool, check_filesystem(tree.pool))
    assert content(tree.medium) == before


def test_a_frame_that_is_owned_and_free_is_named_with_its_owner_and_marked(tree: Tree) -> None:
    with tree.changed() as changes:
        pfn = changes.extent(tree.file)[1]
        for frame in range(3):
            changes.mark(0, pfn + frame, used=False)
    assert any(
        error.startswith(("/same: ", "/home/deep/file: "))
        and error.endswith(f"its content is in free frames {pfn:#x}-{pfn + 2:#x}")
        for error in tree.errors()
    )
    assert tree.repair() == ["they are marked as used"]
    assert not tree.mount().allocator.is_free(pfn)


@pytest.mark.parametrize("is_same_file", [False, True])
def test_a_frame_with_two_owners_is_copied_and_both_keep_what_they_read(
    tree: Tree, is_same_file: bool
) -> None:
    first, second = sorted((tree.file, tree.other))
    with tree.changed() as changes:
        _, pfn, _ = changes.extent(first)
        target = first if is_same_file else second
        changes.append(target, media.pack_extent(2 if is_same_file else 1, pfn, 1))
        fs = tree.mount()
        read = {number: bytes(fs.read(number, 0, 10_000)) for number in (first, second)}
    [error] = tree.errors()
    assert f"its content is in frames that others own, too: {pfn:#x}" in error
    assert "they are copied, so that both keep what they read" in tree.repair()
    fs = tree.mount()
    assert {number: bytes(fs.read(number, 0, 10_000)) for number in read} == read
    fs.write(first, 0, b"z" * 4096)
    at = 8192 if is_same_file else 4096
    assert bytes(fs.read(target, at, 10)) == read[target][at : at + 10]


def test_a_file_over_inodes_is_copied_and_the_inodes_stay(tree: Tree) -> None:
    with tree.changed() as changes:
        pfn = changes.fs.geometry.first_pfn + FIRST_INODES_FRAME
        changes.append(tree.other, media.pack_extent(0, pfn, 1))
    assert any("frames that others own" in error for error in tree.errors())
    with pytest.raises(OSError, match="frames of inodes"):
        tree.mount().attributes(tree.other)
    tree.repair()
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_a_bit_for_a_frame_that_can_hold_no_inodes_is_cleared(tree: Tree) -> None:
    with tree.changed() as changes:
        geometry = changes.fs.geometry
        changes.mark(1, geometry.first_pfn + JOURNAL_FRAME, used=True)
        changes.mark(1, geometry.end_pfn + 5, used=True)
    assert "2 bits are of no possible frame" in tree.errors()[0]
    assert tree.repair() == ["they are cleared"]


def test_inodes_whose_frame_has_lost_its_bit_are_found_again(tree: Tree) -> None:
    fs = tree.mount()
    numbers = [fs.make(tree.home, b"f%d" % count, FILE) for count in range(20)]
    fs.end()
    pfn = numbers[10] * SLOT_BYTES >> PAGE_SHIFT
    with tree.changed() as changes:
        changes.mark(1, pfn, used=False)
    assert any(f"whose frame {pfn:#x} is not marked" in error for error in tree.errors())
    assert "the frame is marked" in tree.repair()
    assert len(names(tree.mount(), ROOT)) == len(ALL) + 20


def test_the_first_frame_of_inodes_is_one_whatever_its_bit_says(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.mark(1, changes.fs.geometry.first_pfn + FIRST_INODES_FRAME, used=False)
    assert tree.errors() == [": the first frame of inodes is not marked"]
    assert tree.repair() == ["it is marked"]


@pytest.mark.parametrize("count", [0, 1, 3, 1 << 32 - 1])
def test_a_wrong_count_of_names_is_set_right(tree: Tree, count: int) -> None:
    with tree.changed() as changes:
        changes.state(tree.file, link_count=count)
    [error] = tree.errors()
    assert error.endswith(f"file: 2 names lead to it, and it says {count}") or "same" in error
    assert tree.repair() == ["it says 2 then"]
    assert tree.mount().attributes(tree.file).nlink == 2


def test_an_entry_that_leads_to_nothing_is_removed(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(tree.home, media.pack_entry(b"gone", tree.file + 10_000, 8, 1))
        changes.append(tree.home, media.pack_entry(b"self", 1 << 60, 8, 1))
    assert [error.partition(" leads")[0] for error in tree.errors()] == [
        "/home: its entry 'gone'",
        "/home: its entry 'self'",
    ]
    tree.repair()
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_an_entry_of_another_type_gets_that_of_its_inode(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(tree.deep, media.pack_entry(b"file", tree.file, 10, 1))
    assert "a type that it does not have" in tree.errors()[0]
    tree.repair()
    assert sorted(names(tree.mount(), ROOT)) == sorted(ALL)


def test_the_root_has_no_name(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(tree.deep, media.pack_entry(b"up", ROOT, 4, 1))
        changes.append(ROOT, media.pack_parent(tree.deep))
    assert len(tree.errors()) == 2
    tree.repair()
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_a_directory_that_says_another_parent_is_corrected(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(tree.deep, media.pack_parent(tree.file))
    [error] = tree.errors()
    assert (
        error == f"/home/deep: it is in directory {tree.home}, and says that it is in {tree.file}"
    )
    tree.repair()
    assert tree.mount().parent(tree.deep) == tree.home


def test_a_directory_with_two_names_keeps_the_one_where_it_says_it_is(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(ROOT, media.pack_entry(b"again", tree.deep, 4, 1))
    assert "2 names lead to this directory" in tree.errors()[0]
    tree.repair()
    assert sorted(names(tree.mount(), ROOT)) == ALL


def test_a_circle_of_directories_is_broken_and_put_into_lost_and_found(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(ROOT, media.pack_entry(b"home", tree.home, 0, 1))
        changes.append(tree.deep, media.pack_entry(b"circle", tree.home, 4, 1))
        changes.append(tree.home, media.pack_parent(tree.deep))
    [error] = tree.errors()
    assert "in a circle of directories" in error
    tree.repair()
    found = names(tree.mount(), ROOT)
    assert found["same"] == tree.file
    assert tree.other in found.values()
    assert any(path.startswith("lost+found/#") for path in found)


def test_what_has_no_name_goes_to_lost_and_found_with_all_that_is_in_it(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(ROOT, media.pack_entry(b"home", tree.home, 0, 1))
        changes.append(tree.deep, media.pack_entry(b"other", tree.other, 0, 1))
    assert len(tree.errors()) == 2
    tree.repair()
    found = names(tree.mount(), ROOT)
    assert found[f"lost+found/#{tree.home}/deep/file"] == tree.file
    assert found[f"lost+found/#{tree.other}"] == tree.other
    assert bytes(tree.mount().read(tree.other, 0, 20_000)) == b"b" * 10_000


def test_an_inode_that_cannot_be_read_is_removed_with_its_names(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.damage(tree.file)
    errors = tree.errors()
    assert any("a wrong checksum" in error and error.startswith("/") for error in errors)
    assert sum("which is damaged" in error for error in errors) == 2
    assert "it is removed, and what it had is lost" in tree.repair(force=True)
    assert sorted(names(tree.mount(), ROOT)) == ["home", "home/deep", "home/deep/other"]


def test_a_directory_that_cannot_be_read_keeps_the_names_before_the_damage(tree: Tree) -> None:
    with tree.changed() as changes:
        # parent, attributes, then file and other
        changes.damage(tree.deep, 3)
    tree.repair()
    fs = tree.mount()
    found = names(fs, ROOT)
    assert found["home/deep/file"] == tree.file
    assert found[f"lost+found/#{tree.other}"] == tree.other
    assert fs.attributes(tree.deep).mode == 0o40755


@pytest.mark.parametrize("how", ["record", "head", "free"])
def test_a_root_that_cannot_be_read_is_made_anew(tree: Tree, how: str) -> None:
    slot = tree.pool.zones.data.offset_bytes + (FIRST_INODES_FRAME << PAGE_SHIFT)
    with tree.changed() as changes:
        if how == "record":
            changes.damage(ROOT, 2)
        elif how == "head":
            tree.medium.store(slot + 8, b"\xff" * 8)
        else:
            tree.medium.store(slot + TAIL_WORD_AT, bytes(8))
    assert tree.errors()
    tree.repair()
    found = names(tree.mount(), ROOT)
    assert found[f"lost+found/#{tree.home}/deep/file"] == tree.file
    assert found[f"lost+found/#{tree.home}/deep/other"] == tree.other


def test_a_file_of_an_impossible_size_gets_one_that_covers_all_that_it_has(tree: Tree) -> None:
    fs = tree.mount()
    fs.set_attributes(tree.file, size_bytes=9000)
    inode = fs.inode(tree.file)
    word = size_word(1 << 47, inode.keys_of_line()[0])
    tree.medium.store(inode.slot_offset + LIVE_OFFSET, word.to_bytes(8, "little"))
    assert any("its size is not known" in error for error in tree.errors())
    tree.repair(force=True)
    assert bytes(tree.mount().read(tree.file, 0, 9000)) == b"a" * 9000
    assert tree.mount().attributes(tree.file).size_bytes == 3 * FRAME_BYTES


def test_logs_in_the_same_frames_are_untangled(tree: Tree) -> None:
    fs = tree.mount()
    for count in range(100):
        fs.make(tree.home, b"n%d" % count, FILE)
    frame = fs.inode(tree.home).log.frames[0]
    with tree.changed() as changes:
        changes.mark(1, frame >> PAGE_SHIFT, used=True)
    assert any("its log is in frames that others own" in error for error in tree.errors())
    tree.repair()
    assert len(names(tree.mount(), ROOT)) == len(ALL) + 100


def test_a_removed_directory_with_names_in_it_is_no_leak(tree: Tree) -> None:
    with tree.changed() as changes:
        changes.append(tree.home, media.pack_entry(b"deep", tree.deep, 0, 1))
        changes.state(tree.deep, link_count=0)
    assert any("no name leads to this directory" in error for error in tree.errors())
    tree.repair()
    assert names(tree.mount(), ROOT)[f"lost+found/#{tree.deep}/file"] == tree.file


def test_a_deep_tree_is_no_deep_recursion(tree: Tree) -> None:
    fs = tree.mount()
    directory = tree.deep
    for _ in range(1500):
        directory = fs.make(directory, b"d", DIRECTORY)
        fs.store.ground.clock += 20
    last = fs.make(directory, b"last", FILE)
    with tree.changed() as changes:
        changes.state(last, link_count=7)
    [error] = tree.errors()
    assert "/home/deep/d/d/d/d" in error
    assert "/last: 1 name leads to it" in error


def damages() -> list[Callable[[Tree, Changes], object]]:
    """Some things that are wrong, for repairs that are interrupted."""
    return [
        lambda tree, changes: changes.damage(tree.file),
        lambda tree, changes: changes.damage(tree.deep, 3),
        lambda tree, changes: changes.damage(ROOT, 2),
        lambda tree, changes: changes.mark(0, changes.extent(tree.file)[1], used=False),
        lambda tree, changes: changes.append(
            tree.other, media.pack_extent(0, changes.extent(tree.file)[1], 2)
        ),
        lambda tree, changes: changes.append(ROOT, media.pack_entry(b"home", tree.home, 0, 1)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("which", range(len(damages())))
def test_a_power_failure_during_a_repair_leaves_what_can_be_repaired(which: int) -> None:
    tree = Tree()
    with tree.changed() as changes:
        damages()[which](tree, changes)
        changes.fs.allocator.allocate(3)
    medium = RecordingMedium(content(tree.medium))
    images: set[bytes] = set()
    medium.at_each_fence = lambda: images.update(medium.after_power_failure(limit=20))
    pool = Pool.open(medium)
    assert repair_filesystem(pool, check_filesystem(pool), force=True) > 0
    wanted = sorted(names(FileSystem(pool, NoMemmap()), ROOT).values())
    assert len(images) > 4
    for image in images:
        tree.pool = Pool.open(MemoryMedium(image))
        tree.medium = tree.pool.medium
        tree.repair(force=True)
        found = names(tree.mount(), ROOT)
        assert set(found.values()) >= set(wanted) - {found.get("lost+found")}
