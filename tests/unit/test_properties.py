"""What inodes are transformed with: how it is set, inherited, shown and, if unknown, refused."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kit.fs_tree import DIRECTORY, FILE, Tree
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.media.transform import (
    StoredPiece,
    Transformation,
    TransformState,
    pack_piece,
    pack_transform,
)
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.log import Log
from pmemfs.volume.fs.properties import inherited
from pmemfs.volume.fs.xattrs import XATTR_CREATE
from pmemfs.volume.pinned import Held

ZSTD, LZ4 = TransformState(Transformation.ZSTD, 9), TransformState(Transformation.LZ4)
KEY, OTHER_KEY = b"k" * 16, b"o" * 16
LINK, FIFO = NewInode(stat.S_IFLNK | 0o777, 0, 0, target=b"t"), NewInode(stat.S_IFIFO, 0, 0)


@pytest.fixture
def tree() -> Tree:
    return Tree()


@contextmanager
def refused(number: int, match: str | None = None) -> Iterator[None]:
    with pytest.raises(OSError, match=match) as raised:
        yield
    assert raised.value.errno == number


def states(fs: FileSystem, *numbers: int) -> list[TransformState | None]:
    return [fs.properties.transform_of(number) for number in numbers]


# Compression


def test_what_is_made_in_a_directory_takes_over_how_that_is_compressed(tree: Tree) -> None:
    fs = tree.mount()
    fs.properties.set_transform(tree.home, ZSTD.id, ZSTD.level)
    made = [fs.make(tree.home, b"%d" % at, new) for at, new in enumerate((FILE, DIRECTORY, LINK))]
    made += [fs.make(made[1], b"below", FILE), fs.make_unnamed(tree.home, FILE)]
    assert states(fs, *made) == [ZSTD] * 5
    assert states(fs, tree.file, tree.deep, ROOT) == [None] * 3, "was there before, or is above"
    for at in range(500):
        fs.set_attributes(made[0], mode=0o600 + at % 8)
    fs.end()
    fs = tree.mount()
    assert states(fs, tree.home, *made[:4]) == [ZSTD] * 5
    fs.properties.set_transform(tree.home, Transformation.NONE)
    assert states(fs, fs.make(tree.home, b"after", FILE), made[0]) == [None, ZSTD]
    assert not tree.errors()


def test_a_file_is_moved_with_its_own_transformation(tree: Tree) -> None:
    fs = tree.mount()
    fs.properties.set_transform(tree.file, LZ4.id)
    fs.rename(tree.deep, b"file", ROOT, b"moved")
    fs.rename(tree.deep, b"other", ROOT, b"same")
    assert states(tree.mount(), tree.file, tree.other) == [LZ4, None]


def test_compression_changes_and_goes_and_each_change_is_one_of_the_inode(tree: Tree) -> None:
    fs = tree.mount()
    # The clock of files ticks in milliseconds, so the present may not differ from it.
    fs.set_attributes(tree.file, ctime_ns=5)
    before = fs.attributes(tree.file)
    for state in (ZSTD, LZ4, TransformState(Transformation.ZSTD, -5), None, None):
        fs.properties.set_transform(tree.file, *(state[:2] if state else (0,)))
        assert states(fs, tree.file) == states(tree.mount(), tree.file) == [state]
    after = fs.attributes(tree.file)
    assert fs.inode(tree.file).state.changed_ns > 5
    assert after._replace(ctime_ns=0, block_count=0) == before._replace(ctime_ns=0, block_count=0)
    fs.properties.set_transform(tree.file, 0)
    assert fs.attributes(tree.file) == after, "what changes nothing is no change"


def test_what_cannot_be_compressed_is_not_set(tree: Tree) -> None:
    fs = tree.mount()
    set_transform = fs.properties.set_transform
    for wrong in ((1,), (4,), (255,), (0, 1)):
        with refused(errno.EINVAL):
            set_transform(tree.file, *wrong)
    for new in (LINK, FIFO):
        with refused(errno.EOPNOTSUPP):
            set_transform(fs.make(ROOT, b"%d" % new.mode, new), 2)
    fs.set_flags(tree.file, InodeFlags.IMMUTABLE)
    with refused(errno.EPERM):
        set_transform(tree.file, 2)
    fs.properties.encrypt(fs.make(ROOT, b"secret", DIRECTORY), KEY)
    for id_, why in ((2, "does not shrink"), (0, "stays so")):
        with refused(errno.EOPNOTSUPP, why):
            set_transform(fs.lookup(ROOT, b"secret"), id_)
    with refused(errno.ESTALE):
        set_transform(12345, 2)


class Mapper:
    """A program that has pages of a file as an array."""

    is_stale = False
    who = "python train.py (pid 77)"

    def become_stale(self) -> None: ...

    def was_renamed(self) -> None: ...


def test_a_file_that_a_program_has_mapped_is_not_changed_and_the_program_is_named(
    tree: Tree,
) -> None:
    fs = tree.mount()
    held = Held(Mapper(), tree.file, [(5, 6)])
    fs.pinned.add(held)
    with refused(errno.EBUSY, r"mapped by python train\.py \(pid 77\)"):
        fs.properties.set_transform(tree.file, 2)
    with refused(errno.EBUSY, r"python train\.py"):
        fs.set_flags(tree.file, InodeFlags.COMPRESSED)
    fs.set_flags(tree.file, InodeFlags.NO_DUMP)
    fs.properties.set_transform(tree.file, 0)
    fs.pinned.remove(held)
    fs.properties.set_transform(tree.file, 2)


# Encryption


def test_an_empty_directory_becomes_encrypted_and_stays_so(tree: Tree) -> None:
    fs = tree.mount()
    number = fs.make(ROOT, b"private", DIRECTORY)
    fs.properties.encrypt(number, KEY)
    [state] = states(tree.mount(), number)
    assert state is not None
    assert (state.id, state.key_id, any(state.nonce)) == (Transformation.XTS, KEY, True)
    fs.properties.encrypt(number, KEY)
    assert states(fs, number) == [state], "keys of files that are there hang on the nonce"
    with refused(errno.EEXIST, "another key"):
        fs.properties.encrypt(number, OTHER_KEY)


def test_what_cannot_be_encrypted_is_refused(tree: Tree) -> None:
    fs = tree.mount()
    encrypt = fs.properties.encrypt
    with refused(errno.ENOTDIR):
        encrypt(tree.file, KEY)
    with refused(errno.ENOTEMPTY, "stay readable"):
        encrypt(tree.home, KEY)
    number = fs.make(ROOT, b"private", DIRECTORY)
    fs.set_xattr(number, b"user.note", b"plain")
    with refused(errno.ENOTEMPTY, "user attributes"):
        encrypt(number, KEY)
    fs.remove_xattr(number, b"user.note")
    fs.set_flags(number, InodeFlags.IMMUTABLE)
    with refused(errno.EPERM):
        encrypt(number, KEY)
    with refused(errno.EPERM):
        fs.set_flags(number, InodeFlags.COMPRESSED | InodeFlags.IMMUTABLE)
    fs.set_flags(number, InodeFlags.COMPRESSED)
    with refused(errno.EOPNOTSUPP, "compression=none first"):
        encrypt(number, KEY)
    fs.set_flags(number, InodeFlags(0))
    encrypt(number, KEY)
    assert not tree.errors()


def test_every_inode_that_is_made_in_an_encrypted_directory_has_keys_of_its_own() -> None:
    directory = Inode(9, 0, 1, 0, Log(0, 0))
    directory.set_transform(TransformState(Transformation.XTS, 0, KEY, b"n" * 16))
    made = [inherited(directory) for _ in range(100)]
    assert {state.key_id for state in made if state} == {KEY}
    nonces = {state.nonce for state in made if state}
    assert len(nonces) == 100
    assert directory.transform is not None
    assert directory.transform.nonce not in nonces


# Flags of chattr(1)


def test_flags_say_what_is_compressed_and_what_is_encrypted(tree: Tree) -> None:
    fs = tree.mount()
    fs.properties.set_transform(tree.file, LZ4.id)
    number = fs.make(ROOT, b"private", DIRECTORY)
    fs.properties.encrypt(number, KEY)
    assert fs.attributes(tree.file).flags == InodeFlags.COMPRESSED
    assert fs.attributes(number).flags == InodeFlags.ENCRYPTED
    fs.set_flags(tree.file, InodeFlags.COMPRESSED | InodeFlags.NO_DUMP)
    assert states(fs, tree.file) == [LZ4], "it is compressed as it was"
    fs.set_flags(tree.file, InodeFlags.NO_DUMP)
    assert states(fs, tree.file) == [None]
    fs.set_flags(tree.file, InodeFlags.COMPRESSED)
    assert states(tree.mount(), tree.file) == [TransformState(Transformation.ZSTD)]
    assert tree.mount().attributes(tree.file).flags == InodeFlags.COMPRESSED
    assert not tree.errors()


def test_no_flag_encrypts_or_decrypts(tree: Tree) -> None:
    fs = tree.mount()
    number = fs.make(ROOT, b"private", DIRECTORY)
    with refused(errno.EOPNOTSUPP, "pmemfs encrypt"):
        fs.set_flags(number, InodeFlags.ENCRYPTED)
    fs.properties.encrypt(number, KEY)
    for flags in (InodeFlags(0), InodeFlags.NO_DUMP, InodeFlags.COMPRESSED):
        with refused(errno.EOPNOTSUPP):
            fs.set_flags(number, flags)
    with refused(errno.EOPNOTSUPP):
        fs.set_flags(number, InodeFlags.COMPRESSED | InodeFlags.ENCRYPTED)
    fs.set_flags(number, InodeFlags.ENCRYPTED | InodeFlags.NO_DUMP)
    assert fs.attributes(number).flags == InodeFlags.ENCRYPTED | InodeFlags.NO_DUMP


# What a newer program has made

UNKNOWN = TransformState(77, 5, KEY, b"n" * 16)


def unknown_piece(tree: Tree, fs: FileSystem) -> bytes:
    [run] = fs.allocator.allocate(1)
    return pack_piece(32, StoredPiece(run.pfn, 4, 1, 900, 0, 99))


@pytest.fixture(params=["its state", "a piece"])
def newer(tree: Tree, request: pytest.FixtureRequest) -> Tree:
    """`file` has something that this program does not know."""
    with tree.changed() as changes:
        is_state = request.param == "its state"
        raw = pack_transform(UNKNOWN) if is_state else unknown_piece(tree, changes.fs)
        changes.append(tree.file, raw)
    return tree


CONTENT: dict[str, Callable[[FileSystem, int], object]] = {
    "open to read": lambda fs, ino: fs.check_open(ino, os.O_RDONLY),
    "open to write": lambda fs, ino: fs.check_open(ino, os.O_RDWR),
    "read": lambda fs, ino: fs.read(ino, 0, 5),
    "write": lambda fs, ino: fs.write(ino, 0, b"no"),
    "copy from": lambda fs, ino: fs.copy(ino, 0, fs.make(ROOT, b"copy", FILE), 0, 5),
    "truncate": lambda fs, ino: fs.set_attributes(ino, size_bytes=0),
    "extend": lambda fs, ino: fs.set_attributes(ino, size_bytes=1 << 20),
    "allocate": lambda fs, ino: fs.allocate(ino, 0, 1 << 20, keep_size=False),
    "punch": lambda fs, ino: fs.punch(ino, 0, 4096),
    "zero": lambda fs, ino: fs.zero(ino, 0, 4096, keep_size=True),
    "collapse": lambda fs, ino: fs.collapse(ino, 0, 4096),
    "insert": lambda fs, ino: fs.insert(ino, 0, 4096),
    "seek": lambda fs, ino: fs.seek(ino, 0, for_data=True),
    "map": lambda fs, ino: fs.pieces(ino, 0, 4096, 9),
    "stores": lambda fs, ino: fs.note_stores(ino),
    "extents": lambda fs, ino: fs.extents(ino),
    "compress": lambda fs, ino: fs.properties.set_transform(ino, 2),
    "user attribute": lambda fs, ino: fs.set_xattr(ino, b"user.a", b"b"),
    "get attribute": lambda fs, ino: fs.find_xattr(ino, b"user.a"),
}


@pytest.mark.parametrize("way", CONTENT)
def test_content_that_is_transformed_in_an_unknown_way_is_refused(newer: Tree, way: str) -> None:
    fs = newer.mount()
    before = [bytes(raw) for raw in fs.inode(newer.file).records()]
    if "attribute" in way and not fs.inode(newer.file).transform:
        pytest.skip("the attributes of a file are transformed as its state says")
    with refused(errno.EOPNOTSUPP, f"inode {newer.file} has a transformation"):
        CONTENT[way](fs, newer.file)
    assert [bytes(raw) for raw in fs.inode(newer.file).records()] == before
    assert not fs.read_only
    assert fs.read(newer.other, 0, 5) == b"bbbbb"


def test_all_else_works_with_it_and_nothing_of_it_is_lost(newer: Tree) -> None:
    fs = newer.mount()
    before = fs.inode(newer.file)
    transform, pieces = before.transform, dict(before.pieces)
    assert fs.attributes(newer.file).size_bytes == 10_000
    fs.set_attributes(newer.file, mode=0o600, uid=5)
    fs.rename(newer.deep, b"file", newer.home, b"moved")
    fs.link(newer.file, ROOT, b"again")
    fs.set_xattr(newer.file, b"security.capability", b"c")
    assert fs.find_xattr(newer.file, b"security.capability") == b"c"
    assert fs.list_xattrs(newer.file) == [b"security.capability"]
    fs.hold(newer.file)
    fs.drop(newer.file)
    fs.trim_ahead(newer.file)
    with fs.store.change() as change:
        change.compact(fs.inode(newer.file))
    fs.end()
    fs = newer.mount()
    after = fs.inode(newer.file)
    assert (after.transform, dict(after.pieces)) == (transform, pieces)
    assert after.data_frames == before.data_frames
    for parent, name in ((newer.home, b"moved"), (ROOT, b"again"), (ROOT, b"same")):
        fs.unlink(parent, name)
    fs.end()
    assert not newer.errors()
    assert not newer.leaks()


def test_the_log_says_it_once(newer: Tree, caplog: pytest.LogCaptureFixture) -> None:
    fs = newer.mount()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with refused(errno.EOPNOTSUPP):
                fs.check_open(newer.file, os.O_RDONLY)
    [said] = caplog.messages
    assert f"inode {newer.file} has a transformation (" in said


def test_names_that_are_transformed_in_an_unknown_way_are_refused(tree: Tree) -> None:
    fs = tree.mount()
    empty = fs.make(ROOT, b"empty", DIRECTORY)
    with tree.changed() as changes:
        changes.append(empty, pack_transform(UNKNOWN))
    fs = tree.mount()
    uses: list[Callable[[], object]] = [
        lambda: fs.names(empty),
        lambda: fs.lookup(empty, b"any"),
        lambda: fs.make(empty, b"any", FILE),
        lambda: fs.make_unnamed(empty, FILE),
        lambda: fs.link(tree.file, empty, b"any"),
        lambda: fs.rename(ROOT, b"same", empty, b"any"),
        lambda: fs.properties.encrypt(empty, KEY),
    ]
    for use in uses:
        with refused(errno.EOPNOTSUPP, f"inode {empty} has a transformation"):
            use()
    assert fs.attributes(empty).nlink == 2
    fs.rename(ROOT, b"empty", tree.deep, b"there")
    fs.rmdir(tree.deep, b"there")
    assert not fs.read_only


# The file system's own attributes


def test_attributes_of_the_file_system_are_shown_to_nobody_and_not_counted(tree: Tree) -> None:
    fs = tree.mount()
    own = [b"pmemfs.key.%d" % at for at in range(3)]
    fs.set_xattrs_and_mode(ROOT, dict.fromkeys(own, b"v" * 192), None)
    fs.set_xattr(ROOT, b"user.mine", b"m")
    assert fs.list_xattrs(ROOT) == [b"user.mine"]
    assert [fs.find_xattr(ROOT, name) for name in own] == [b"v" * 192] * 3
    for at in range(15):
        fs.set_xattr(ROOT, b"user.%d" % at + b"x" * 240, b"", XATTR_CREATE)
    assert len(fs.list_xattrs(ROOT)) == 16
    assert all(fs.inode(ROOT).xattrs.get(name) for name in own)
