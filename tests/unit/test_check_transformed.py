"""`check` of what is transformed: damage is named, and repaired when asked, without keys."""

from __future__ import annotations

import errno

import pytest

from kit.fs_tree import DIRECTORY, FILE, Tree, repaired
from pmemfs.media import keys
from pmemfs.media import log as media
from pmemfs.media.filesystem import FIRST_INODES_FRAME
from pmemfs.media.inode import ROOT
from pmemfs.media.layout import replace
from pmemfs.media.transform import (
    StoredPiece,
    Transformation,
    TransformState,
    pack_piece,
    pack_transform,
    piece_checksum,
)
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.transform.codec import codec_of
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.reading import read_inode
from pmemfs.volume.pool_check import check_pool

PIECE = 32
KEY, NONCE = b"k" * 16, b"n" * 16
ENCRYPTED = TransformState(Transformation.XTS, 0, KEY, NONCE)


@pytest.fixture
def tree() -> Tree:
    return Tree()


def compressed(fs: FileSystem, plain: bytes, id_: int = Transformation.ZSTD) -> StoredPiece:
    """A piece of these bytes, in frames that are taken for it."""
    codec = codec_of(id_)
    assert codec is not None
    raw = codec.compress(plain, 0)
    count = -(-len(raw) // FRAME_BYTES)
    run = fs.allocator.allocate_run(count)
    fs.medium.store(run.pfn << PAGE_SHIFT, raw)
    frames = len(plain) // FRAME_BYTES
    return StoredPiece(run.pfn, frames, count, len(raw), piece_checksum(raw), id_)


def text(frame_count: int) -> bytes:
    return b"".join(b"line %d\n" % at for at in range(frame_count * 1000))[: frame_count << 12]


def add_pieces(tree: Tree, number: int, *indexes: int, frame_count: int = PIECE) -> None:
    """Give a file compressed pieces, and a size that covers them."""
    if 0 in indexes:
        tree.mount().set_attributes(number, size_bytes=0)
    with tree.changed() as changes:
        for index in indexes:
            piece = compressed(changes.fs, text(frame_count))
            changes.append(number, pack_piece(index, piece))
        fs = tree.mount()
        fs.store.set_live_size(fs.inode(number), (max(indexes) + frame_count) << PAGE_SHIFT)


@pytest.fixture
def packed(tree: Tree) -> Tree:
    """`file` has an extent (frame 0 to 2) and the pieces 32 and 64; `other` has the piece 0."""
    add_pieces(tree, tree.file, 32, 64)
    add_pieces(tree, tree.other, 0, frame_count=20)
    return tree


def piece_of(tree: Tree, number: int, index: int) -> StoredPiece:
    return tree.mount().inode(number).pieces[index]


def spoil(tree: Tree, piece: StoredPiece, at: int = 100) -> None:
    offset = (piece.pfn << PAGE_SHIFT) + at
    tree.medium.store(offset, bytes([tree.medium.read(offset, 1)[0] ^ 1]))


def test_sound_pieces_are_no_problem_and_their_frames_are_counted_once(packed: Tree) -> None:
    verdict = packed.check()
    assert verdict.problems == []
    fs = packed.mount()
    owned = sum(fs.inode(number).data_frames for number in (packed.file, packed.other))
    stored = [p.stored_frames for n in (packed.file, packed.other) for p in
              fs.inode(n).pieces.values()]  # fmt: skip
    assert owned == 3 + sum(stored)
    assert verdict.used_frames == 1 + owned
    assert fs.attributes(packed.file).block_count == fs.inode(packed.file).data_frames * 8
    assert fs.space().mapped_frames == owned


@pytest.mark.parametrize("id_", [Transformation.ZSTD, Transformation.LZ4])
def test_a_damaged_piece_is_named_with_its_bytes_and_becomes_zeroes_if_forced(
    packed: Tree, id_: int
) -> None:
    with packed.changed() as changes:
        changes.append(packed.other, pack_piece(0, compressed(changes.fs, text(20), id_)))
    repaired(packed.pool)
    spoil(packed, piece_of(packed, packed.other, 0))
    [error] = packed.errors()
    assert error == (
        "/home/deep/other: its bytes 0 to 81919 lie in a compressed piece that is damaged: its "
        "checksum is wrong"
    )
    before = [bytes(raw) for raw in packed.mount().inode(packed.file).records()]
    done = "they become zeroes, and what they were is lost"
    assert repaired(packed.pool) == [f"only with --force: {done}"]
    assert packed.errors() == [error]
    assert repaired(packed.pool, force=True) == [done]
    assert packed.check().problems == []
    fs = packed.mount()
    assert fs.read(packed.other, 0, 1 << 20) == bytes(20 << PAGE_SHIFT)
    assert [bytes(raw) for raw in fs.inode(packed.file).records()] == before


def test_a_piece_with_a_right_checksum_that_holds_no_such_bytes_is_damaged(packed: Tree) -> None:
    fs = packed.mount()
    piece = piece_of(packed, packed.other, 0)
    for content in (b"\0" * 9, text(1), b"\x28\xb5\x2f\xfd" + bytes(50)):
        codec = codec_of(Transformation.ZSTD)
        assert codec is not None
        raw = content if len(content) < 4096 else codec.compress(text(19), 0)
        raw = raw.ljust(piece.stored_bytes, b"\0")[: piece.stored_bytes]
        fs.medium.store(piece.pfn << PAGE_SHIFT, raw)
        with packed.changed() as changes:
            wrong = piece._replace(checksum=piece_checksum(raw))
            changes.append(packed.other, pack_piece(0, wrong))
        [error] = packed.errors()
        assert "other: its bytes 0 to 81919 lie in a compressed piece that is damaged: " in error
    repaired(packed.pool, force=True)
    assert packed.check().problems == []


def test_a_piece_in_frames_that_are_free_is_named_and_they_are_marked(packed: Tree) -> None:
    piece = piece_of(packed, packed.file, 32)
    with packed.changed() as changes:
        changes.mark(0, piece.pfn, used=False)
    assert any(f"its content is in free frames {piece.pfn:#x}" in e for e in packed.errors())
    assert repaired(packed.pool) == ["they are marked as used"]
    assert packed.check().problems == []
    assert not packed.mount().allocator.is_free(piece.pfn)


@pytest.mark.parametrize("with_what", ["another's piece", "its own piece", "its extent",
                                       "inodes"])  # fmt: skip
def test_a_piece_that_shares_frames_is_copied_and_both_keep_their_bytes(
    packed: Tree, with_what: str
) -> None:
    with packed.changed() as changes:
        piece = piece_of(packed, packed.file, 64)
        pfn = {
            "another's piece": piece_of(packed, packed.other, 0).pfn,
            "its own piece": piece_of(packed, packed.file, 32).pfn,
            "its extent": changes.extent(packed.file)[1],
            "inodes": changes.fs.geometry.first_pfn + FIRST_INODES_FRAME,
        }[with_what]
        length = piece.stored_bytes
        raw = bytes(packed.medium.read(pfn << PAGE_SHIFT, length))
        # Nobody knows what such bytes would be.
        moved = piece._replace(pfn=pfn, checksum=piece_checksum(raw), id=200)
        changes.append(packed.file, pack_piece(64, moved))
    assert any(f"its content is in frames that others own, too: {pfn:#x}" in error
               for error in packed.errors())  # fmt: skip
    # The inodes have changed since the checksum was taken of them, so that piece is damaged, too.
    is_damaged = with_what == "inodes"
    assert any("copied, so that both" in done for done in repaired(packed.pool, force=is_damaged))
    assert packed.errors() == []
    fs = packed.mount()
    owners = [run for number in (packed.file, packed.other) for run in
              read(packed, fs, number).runs()]  # fmt: skip
    frames = [pfn + at for pfn, count in owners for at in range(count)]
    assert len(frames) == len(set(frames))
    if not is_damaged:
        again = read(packed, fs, packed.file).pieces[64]
        assert bytes(packed.medium.read(again.pfn << PAGE_SHIFT, length)) == raw


def read(tree: Tree, fs: FileSystem, number: int) -> Inode:
    inode = read_inode(tree.medium, fs.store.table, number)
    assert inode is not None
    return inode


def test_a_piece_that_is_nobodys_is_a_leak(packed: Tree) -> None:
    fs = packed.mount()
    lost = fs.inode(packed.other).piece_frames
    with packed.changed() as changes:
        changes.append(packed.other, media.pack_hole(0, 20))
    assert packed.errors() == []
    count = "1 frame is" if lost == 1 else f"{lost} frames are"
    assert f"leak: {count} marked as used and not owned" in packed.leaks()
    fs = packed.mount()
    fs.store.ground.may_have_leaks = True
    free = fs.room().free_frames
    while fs.tidy():
        pass
    assert fs.room().free_frames == free + lost
    assert packed.leaks() == []
    assert fs.inode(packed.file).pieces.keys() == {32, 64}


def test_a_piece_behind_the_size_is_trimmed_and_one_that_reaches_over_it_is_not(
    packed: Tree,
) -> None:
    with packed.changed() as changes:
        fs = changes.fs
        fs.store.set_live_size(fs.inode(packed.file), (40 << PAGE_SHIFT) + 5)
    gone = piece_of(packed, packed.file, 64).stored_frames
    assert packed.errors() == []
    count = "1 frame is" if gone == 1 else f"{gone} frames are"
    assert any(f"{count} behind the sizes of 1 files" in leak for leak in packed.leaks())
    packed.mount().trim_ahead(packed.file)
    assert packed.mount().inode(packed.file).pieces.keys() == {32}
    assert packed.check().problems == []


# Truncate and unlink


@pytest.mark.parametrize(
    ("size_bytes", "kept"),
    [(0, []), (3 << 12, []), (32 << 12, []), ((32 << 12) + 1, [32]), (64 << 12, [32]),
     ((70 << 12) + 9, [32, 64]), (96 << 12, [32, 64])],
)  # fmt: skip
def test_a_shorter_file_gives_back_the_pieces_that_are_wholly_gone(
    packed: Tree, size_bytes: int, kept: list[int]
) -> None:
    fs = packed.mount()
    if size_bytes < 96 << 12:
        fs.set_attributes(packed.file, size_bytes=size_bytes)
    for mounted in (fs, packed.mount()):
        assert sorted(mounted.inode(packed.file).pieces) == kept
        assert mounted.attributes(packed.file).size_bytes == size_bytes
    fs.end()
    assert packed.check().problems == []


def test_a_full_pool_is_emptied_of_its_pieces(packed: Tree) -> None:
    fs = packed.mount()
    fs.allocator.allocate(fs.room().free_frames, urgent=True)
    gone = fs.inode(packed.file).data_frames
    free = fs.room().free_frames
    fs.set_attributes(packed.other, size_bytes=5)
    fs.unlink(packed.deep, b"file")
    fs.unlink(ROOT, b"same")
    assert fs.room().free_frames >= free + gone
    assert packed.errors() == []


# What this program does not know


def test_what_a_newer_program_has_made_is_named_and_left_alone(packed: Tree) -> None:
    with packed.changed() as changes:
        changes.append(packed.other, pack_piece(0, piece_of(packed, packed.other, 0)._replace(
            id=90)))  # fmt: skip
        changes.append(packed.file, pack_transform(TransformState(77, 1, KEY, NONCE)))
        fs = changes.fs
        fs.store.set_live_size(fs.inode(packed.file), 5)
    assert packed.errors() == []
    said = packed.leaks()
    assert len(said) == 2
    for id_ in (77, 90):
        assert any(f"it has a transformation ({id_}) that this program does not know" in each
                   for each in said)  # fmt: skip
    repaired(packed.pool)
    assert packed.leaks() == said


# Keys

WRAPPED = keys.WrappedKey(
    kind=1, log2_n=14, r=8, p=1, created_ns=5, key_id=KEY, name="work", salt=NONCE,
    wrapped=b"w" * 80,
)  # fmt: skip
NAME = keys.key_attribute(KEY, 0)


def wrap(tree: Tree, name: bytes, value: bytes) -> None:
    tree.mount().set_xattrs_and_mode(ROOT, {name: value}, None)


def test_a_wrapped_key_that_is_damaged_is_named_and_removed_if_forced(tree: Tree) -> None:
    wrap(tree, NAME, keys.WRAPPED_KEY.pack(WRAPPED))
    assert tree.check().problems == []
    wrap(tree, NAME, keys.WRAPPED_KEY.pack(replace(WRAPPED, log2_n=40)))
    [error] = tree.errors()
    assert error == f"/: the wrapped key {NAME.decode()} is damaged: its cost is not possible"
    [done] = tree.repair(force=True)
    assert "can never be read again" in done
    assert tree.mount().inode(ROOT).xattrs == {}


def said_of_keys(tree: Tree) -> list[str]:
    return [found.sentence for found in check_pool(tree.medium) if found.what == "keys"]


def test_keys_and_ways_are_counted_the_sound_ones_and_the_damaged(tree: Tree) -> None:
    assert said_of_keys(tree) == []
    other = b"o" * 16
    sound = {
        keys.key_attribute(KEY, 1): WRAPPED, keys.key_attribute(KEY, 2): WRAPPED,
        keys.key_attribute(other, 1): replace(WRAPPED, key_id=other),
    }  # fmt: skip
    for name, key in sound.items():
        wrap(tree, name, keys.WRAPPED_KEY.pack(key))
    assert said_of_keys(tree) == ["2 keys, 3 ways to unlock, 0 damaged"]
    wrap(tree, keys.key_attribute(other, 1), keys.WRAPPED_KEY.pack(WRAPPED))
    assert said_of_keys(tree) == ["2 keys, 3 ways to unlock, 1 damaged"]
    # What is no key's attribute is counted nowhere.
    wrap(tree, keys.RESERVED_XATTRS + b"other", b"value")
    assert said_of_keys(tree) == ["2 keys, 3 ways to unlock, 1 damaged"]


def test_files_whose_key_nothing_unlocks_are_counted(tree: Tree) -> None:
    fs = tree.mount()
    number = fs.make(ROOT, b"private", DIRECTORY)
    fs.properties.encrypt(number, KEY)
    assert tree.errors() == []
    why = f"1 inode is encrypted with the key {KEY.hex()}, which nothing here unlocks"
    assert tree.leaks() == [why]
    wrap(tree, NAME, keys.WRAPPED_KEY.pack(WRAPPED))
    assert tree.check().problems == []


# Encrypted directories


def coded(number: int) -> bytes:
    """A name as encryption makes it."""
    return bytes([number]) * 20 + b"/\0"


@pytest.fixture
def sealed(tree: Tree) -> tuple[Tree, int, int]:
    """An encrypted directory, and a directory in it, with some names."""
    wrap(tree, NAME, keys.WRAPPED_KEY.pack(WRAPPED))
    fs = tree.mount()
    outer, inner = (fs.make(ROOT, name, DIRECTORY) for name in (b"private", b"inner"))
    fs.properties.encrypt(outer, KEY)
    fs.properties.encrypt(inner, KEY)
    files = [fs.make(ROOT, b"f%d" % at, FILE) for at in range(2, 5)]
    # What is appended behind a mount's back it does not know, so nothing else is done with it.
    with tree.changed() as changes:
        changes.append(ROOT, *[media.pack_entry(b"f%d" % at, 1, 0, 9) for at in range(2, 5)],
                       media.pack_entry(b"inner", 1, 0, 9))  # fmt: skip
        changes.append(outer, media.pack_entry(coded(1), inner, 4, 9))
        changes.append(inner, media.pack_parent(outer),
                       *[media.pack_entry(coded(at), file, 8, 9)
                         for at, file in enumerate(files, 2)])  # fmt: skip
        for at, file in enumerate(files, 2):
            changes.append(file, pack_transform(ENCRYPTED._replace(nonce=bytes([at]) * 16)))
    assert tree.check().problems == []
    return tree, outer, inner


def test_an_encrypted_directory_that_is_rebuilt_stays_encrypted_and_keeps_its_names(
    sealed: tuple[Tree, int, int],
) -> None:
    tree, _, inner = sealed
    before = read(tree, tree.mount(), inner)
    with tree.changed() as changes:
        log = changes.fs.inode(inner).log
        # The last record: its tail is cut off with damage.
        at = log.tail - 64 + 20
        changes.medium.store(at, bytes([changes.medium.read(at, 1)[0] ^ 1]))
    repaired(tree.pool)
    assert tree.errors() == []
    after = read(tree, tree.mount(), inner)
    assert after.transform == before.transform
    assert set(after.entries) >= {coded(2), coded(3)}
    assert tree.errors() == []


def test_an_encrypted_directory_of_which_nothing_is_left_does_not_become_plain(
    sealed: tuple[Tree, int, int],
) -> None:
    tree, outer, inner = sealed
    before = read(tree, tree.mount(), inner)
    with tree.changed() as changes:
        inode = changes.fs.inode(inner)
        slot = changes.fs.store.table.slot_offset(inner)
        with changes.fs.store.change() as change:
            change.compact(inode)
        [first] = inode.log.frames or [slot + 128 - 64]
        # Behind the first record, which says where it lies.
        at = first + 64 + 64 + 20
        changes.medium.store(at, bytes([changes.medium.read(at, 1)[0] ^ 1]))
    repaired(tree.pool)
    assert tree.errors() == []
    after = read(tree, tree.mount(), inner)
    assert before.transform is not None
    assert after.transform is not None
    assert after.transform.key_id == KEY
    assert after.transform.nonce != before.transform.nonce
    assert not after.entries
    assert after.parent == outer


def test_lost_files_go_to_a_directory_that_takes_plain_names(
    sealed: tuple[Tree, int, int],
) -> None:
    tree, _, inner = sealed
    fs = tree.mount()
    trap = fs.make(ROOT, b"lost+found", DIRECTORY)
    fs.properties.encrypt(trap, KEY)
    with tree.changed() as changes:
        changes.append(inner, media.pack_entry(coded(3), 1, 0, 9))
    repaired(tree.pool)
    assert tree.errors() == []
    fs = tree.mount()
    assert read(tree, fs, trap).entries == {}
    assert fs.names(fs.lookup(ROOT, b"lost+found.1"))


def test_a_root_that_says_it_is_encrypted_is_plain_again_after_a_repair(tree: Tree) -> None:
    before = tree.mount().names(ROOT)
    with tree.changed() as changes:
        changes.append(ROOT, pack_transform(ENCRYPTED))
    with pytest.raises(OSError, match="while it had names"):
        tree.mount().names(ROOT)
    assert any("/: its transformation was changed" in error for error in tree.errors())
    tree.repair()
    fs = tree.mount()
    assert fs.names(ROOT) == before
    assert fs.properties.transform_of(ROOT) is None


def test_the_root_is_not_encrypted(tree: Tree) -> None:
    fs = tree.mount()
    for name in fs.names(ROOT):
        remove_all(fs, ROOT, name)
    with pytest.raises(OSError, match="root of a file system stays plain") as raised:
        fs.properties.encrypt(ROOT, KEY)
    assert raised.value.errno == errno.EPERM


def remove_all(fs: FileSystem, parent: int, name: bytes) -> None:
    number = fs.lookup(parent, name)
    if fs.inode(number).is_directory:
        for below in fs.names(number):
            remove_all(fs, number, below)
        fs.rmdir(parent, name)
    else:
        fs.unlink(parent, name)
