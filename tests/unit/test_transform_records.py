"""The records of transformations and pieces, and the inode that is made of them."""

from __future__ import annotations

import stat
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.errors import DamagedFileSystem
from pmemfs.media import keys, live
from pmemfs.media import log as log_media
from pmemfs.media.filesystem import Geometry
from pmemfs.media.inode import ROOT, SIZE_LIMIT_BYTES
from pmemfs.media.layout import replace
from pmemfs.media.log import NAME_MAX_BYTES, STORED_NAME_MAX_BYTES, RecordKind
from pmemfs.media.transform import (
    PIECE_FRAMES,
    StoredPiece,
    Transformation,
    TransformState,
    pack_piece,
    pack_transform,
    unpack_piece,
    unpack_transform,
    why_impossible_piece,
)
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.inode import Inode, State
from pmemfs.volume.fs.log import Log
from pmemfs.volume.fs.replay import Replay

NUMBER = 1234
FIRST, FRAMES = 16, 20_000
GEOMETRY = Geometry(FIRST, FRAMES)
KEY, NONCE = b"k" * 16, b"n" * 16
ENCRYPTED = TransformState(Transformation.XTS, key_id=KEY, nonce=NONCE)


def state(type_: int) -> bytes:
    return State(type_ | 0o644, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0).pack()


FILE, DIRECTORY, LINK = map(state, (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK))
PARENT = log_media.pack_parent(ROOT)


def begun() -> tuple[Inode, Replay]:
    inode = Inode(NUMBER, 0, 1, 0, Log(0, 0))
    return inode, Replay(inode, GEOMETRY)


def made(*records: bytes) -> Inode:
    """The inode that these records make. Raises DamagedFileSystem."""
    inode, replay = begun()
    replay.apply([(raw[0], raw) for raw in records])
    replay.finish()
    return inode


def said(inode: Inode) -> dict[str, object]:
    """All that an inode is, as far as its log says it."""
    names = ("state", "xattrs", "entries", "target", "parent", "pieces", "piece_frames",
             "transform", "unknown_id", "subdirectory_count", "live_slots")  # fmt: skip
    return {name: getattr(inode, name) for name in names} | {"extents": list(inode.extents)}


def piece(pfn: int, frame_count: int, stored_frames: int, id_: int = 2) -> StoredPiece:
    return StoredPiece(pfn, frame_count, stored_frames, stored_frames * FRAME_BYTES - 7, 99, id_)


# What a file is made of, against a model: for each frame a pfn, or the index of its piece

SOME_FRAMES = 4 * PIECE_FRAMES
RANGES = st.tuples(st.integers(0, SOME_FRAMES), st.integers(1, 2 * PIECE_FRAMES))
PIECES = st.tuples(st.integers(0, 3), st.integers(2, PIECE_FRAMES), st.integers(1, PIECE_FRAMES))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extent"), RANGES),
        st.tuples(st.just("hole"), RANGES),
        st.tuples(st.just("piece"), PIECES),
    ),
    max_size=30,
)


@given(STEPS)
def test_a_piece_is_there_wholly_or_not_at_all(steps: list[tuple[str, tuple[int, ...]]]) -> None:
    inode, replay = begun()
    frames, pieces = dict[int, int](), dict[int, StoredPiece]()
    for number, (what, values) in enumerate(steps):
        pfn = FIRST + 100 + number * 2 * PIECE_FRAMES
        if what == "piece":
            place, count, stored_frames = values
            index, new = place * PIECE_FRAMES, piece(pfn, count, min(stored_frames, count - 1))
            raw = pack_piece(index, new)
        else:
            index, count = values
            is_extent = what == "extent"
            raw = (
                log_media.pack_extent(index, pfn, count)
                if is_extent
                else log_media.pack_hole(index, count)
            )
        touched = {at for at, p in pieces.items() if at < index + count and index < at + p[1]}
        if any(at < index or at + pieces[at].frame_count > index + count for at in touched):
            with pytest.raises(DamagedFileSystem, match="only a part of its piece"):
                replay.apply([(raw[0], raw)])
            continue
        replay.apply([(raw[0], raw)])
        pieces = {at: p for at, p in pieces.items() if at not in touched}
        frames = {at: frame for at, frame in frames.items() if not index <= at < index + count}
        if what == "piece":
            pieces[index] = new
        elif what == "extent":
            frames.update({index + at: pfn + at for at in range(count)})
        assert_is(inode, frames, pieces)
    replay.apply([(FILE[0], FILE)])
    replay.finish()
    assert_is_kept(inode)


def assert_is(inode: Inode, frames: dict[int, int], pieces: dict[int, StoredPiece]) -> None:
    assert dict(inode.pieces) == pieces
    mapped = {e.index + at: e.pfn + at for e in inode.extents for at in range(e.frame_count)}
    assert mapped == frames
    compressed = {at + more: at for at, p in pieces.items() for more in range(p.frame_count)}
    assert not compressed.keys() & frames.keys()
    assert inode.end == max((*frames, *compressed), default=-1) + 1
    stored = {p.pfn + at for p in pieces.values() for at in range(p.stored_frames)}
    owned = [run.pfn + at for run in inode.runs() for at in range(run.frame_count)]
    assert sorted(owned) == sorted((*frames.values(), *stored))
    assert inode.data_frames == len(owned)
    for index in range(SOME_FRAMES + 3 * PIECE_FRAMES):
        assert inode.is_plain_range(index, 1) == (index not in compressed)
    for index, count in ((0, SOME_FRAMES), (5, 40), (33, 1), (40, 1 << 40)):
        there = sorted({compressed[at] for at in compressed if index <= at < index + count})
        assert inode.pieces_in(index, count) == [(at, pieces[at]) for at in there]
        cut = [at for at in there if at < index or at + pieces[at].frame_count > index + count]
        assert inode.cut_piece(index, count) == (cut[0] if cut else None)


def assert_is_kept(inode: Inode) -> None:
    """A compaction, and a copy, lose nothing, and a copy goes its own way."""
    records = list(inode.records())
    assert said(made(*records)) == said(inode)
    assert sum(raw[1] for raw in records) == inode.compacted_slots
    copy = inode.copy()
    before = said(inode)
    assert [bytes(raw) for raw in copy.records()] == records
    copy.unmap(0, 1 << 34)
    copy.set_piece(0, piece(FIRST + 50, 9, 1))
    copy.set_transform(ENCRYPTED)
    assert said(inode) == before


STATES = st.one_of(
    st.none(),
    st.tuples(st.sampled_from((2, 3)), st.integers(-128, 127)).map(lambda c: TransformState(*c)),
    st.builds(TransformState, st.just(1), st.just(0), st.just(KEY), st.binary(min_size=16,
              max_size=16).filter(any)),
    st.builds(TransformState, st.integers(4, 255), st.integers(-128, 127),
              st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
)  # fmt: skip


@given(st.lists(STATES, min_size=1, max_size=5), st.sampled_from((FILE, DIRECTORY)))
def test_the_last_transformation_counts_and_is_kept(
    states: list[TransformState | None], attributes: bytes
) -> None:
    parent = [PARENT] if attributes == DIRECTORY else []
    inode = made(*parent, attributes, *map(pack_transform, states))
    assert inode.transform == states[-1]
    assert inode.unknown_id == (states[-1].id if states[-1] and states[-1].id > 3 else 0)
    if not inode.transform:
        assert len(list(inode.records())) == len(parent) + 1
    assert_is_kept(inode)


def test_most_inodes_share_what_they_do_not_have() -> None:
    one, two = made(FILE), made(FILE, log_media.pack_extent(0, FIRST + 9, 5))
    assert one.pieces is two.pieces
    assert not hasattr(one, "__dict__")
    two.set_piece(0, piece(FIRST + 50, 9, 1))
    assert not one.pieces


def test_a_piece_of_an_unknown_compression_makes_its_file_unknown_until_it_is_gone() -> None:
    unknown = pack_piece(32, piece(FIRST + 10, 9, 3, id_=77))
    assert made(FILE, unknown).unknown_id == 77
    assert made(FILE, unknown, log_media.pack_hole(32, 9)).unknown_id == 0


# Records that no program writes

GOOD = piece(FIRST + 10, 20, 3)
IMPOSSIBLE_PIECES = {
    "at no place for one": (33, GOOD),
    "of no frames": (0, GOOD._replace(frame_count=0, stored_frames=0, stored_bytes=0)),
    "longer than a piece": (0, GOOD._replace(frame_count=33)),
    "saving nothing": (0, piece(FIRST + 10, 3, 3)),
    "taking nothing": (0, GOOD._replace(stored_frames=0, stored_bytes=0)),
    "shorter than its frames": (0, GOOD._replace(stored_bytes=2 * FRAME_BYTES)),
    "longer than its frames": (0, GOOD._replace(stored_bytes=3 * FRAME_BYTES + 1)),
    "plain": (0, GOOD._replace(id=0)),
    "encrypted": (0, GOOD._replace(id=1)),
    "in a bitmap": (0, GOOD._replace(pfn=FIRST + 1)),
    "outside": (0, GOOD._replace(pfn=FIRST + FRAMES - 2)),
    "elsewhere": (0, GOOD._replace(pfn=1 << 63)),
    "behind every file": (SIZE_LIMIT_BYTES // FRAME_BYTES, GOOD),
    "far behind every file": (1 << 63, GOOD),
}


@pytest.mark.parametrize("which", IMPOSSIBLE_PIECES)
def test_an_impossible_piece_is_damage(which: str) -> None:
    assert made(FILE, pack_piece(0, GOOD)).pieces == {0: GOOD}
    index, wrong = IMPOSSIBLE_PIECES[which]
    with pytest.raises(DamagedFileSystem, match=f"inode {NUMBER}: .*(piece|frames)"):
        made(FILE, pack_piece(index, wrong))


IMPOSSIBLE_STATES = {
    "encrypted without a key": TransformState(1, 0, bytes(16), NONCE),
    "encrypted without a nonce": TransformState(1, 0, KEY, bytes(16)),
    "encrypted and compressed": TransformState(1, 3, KEY, NONCE),
    "a key of nothing": TransformState(0, 0, KEY),
    "a level of nothing": TransformState(0, 3),
    "compressed with a key": TransformState(2, 3, KEY),
    "compressed with a nonce": TransformState(3, 0, bytes(16), NONCE),
}


@pytest.mark.parametrize("which", IMPOSSIBLE_STATES)
def test_an_impossible_transformation_is_damage(which: str) -> None:
    with pytest.raises(DamagedFileSystem, match=r"it (is|has) "):
        made(FILE, pack_transform(IMPOSSIBLE_STATES[which]))


@pytest.mark.parametrize("kind", [RecordKind.TRANSFORM, RecordKind.PIECE])
def test_such_a_record_has_one_slot(kind: int) -> None:
    with pytest.raises(DamagedFileSystem, match="takes 128 bytes"):
        made(FILE, log_media.record(kind, bytearray(128)))


def test_only_a_regular_file_has_pieces_and_only_if_it_is_not_encrypted() -> None:
    with pytest.raises(DamagedFileSystem, match="is not a regular file"):
        made(PARENT, DIRECTORY, pack_piece(0, GOOD))
    with pytest.raises(DamagedFileSystem, match="encrypted, and has compressed pieces"):
        made(FILE, pack_transform(ENCRYPTED), pack_piece(0, GOOD))


# Names and values of encrypted inodes


def entry(name: bytes) -> bytes:
    return log_media.pack_entry(name, 77, stat.S_IFREG >> 12, 5)


CODED = bytes(range(47)) + b"/"


@pytest.mark.parametrize("name", [CODED, bytes(17), b"n" * STORED_NAME_MAX_BYTES])
def test_a_name_in_an_encrypted_directory_is_any_bytes(name: bytes) -> None:
    inode = made(PARENT, DIRECTORY, pack_transform(ENCRYPTED), entry(name))
    assert list(inode.entries) == [name]
    assert_is_kept(inode)
    with pytest.raises(DamagedFileSystem, match="is no name"):
        made(PARENT, DIRECTORY, entry(name))


@pytest.mark.parametrize("length", [0, 1, 16, STORED_NAME_MAX_BYTES + 1, 5000])
def test_a_name_that_no_encryption_makes_is_damage(length: int) -> None:
    with pytest.raises(DamagedFileSystem, match="is no name"):
        made(PARENT, DIRECTORY, pack_transform(ENCRYPTED), entry(b"n" * length))


def test_a_plain_name_is_no_longer_than_ever() -> None:
    assert made(PARENT, DIRECTORY, entry(b"n" * NAME_MAX_BYTES)).entries
    with pytest.raises(DamagedFileSystem, match="is no name"):
        made(PARENT, DIRECTORY, entry(b"n" * (NAME_MAX_BYTES + 1)))


def test_the_root_is_not_encrypted() -> None:
    inode = Inode(ROOT, 0, 1, 0, Log(0, 0))
    replay = Replay(inode, GEOMETRY)
    replay.apply([(raw[0], raw) for raw in (PARENT, pack_transform(ENCRYPTED), DIRECTORY)])
    with pytest.raises(DamagedFileSystem, match="is the root, and encrypted"):
        replay.finish()


def test_a_directory_with_names_does_not_become_encrypted() -> None:
    for first, then in ((None, ENCRYPTED), (ENCRYPTED, None)):
        records = [PARENT, DIRECTORY, pack_transform(first), entry(b"n" * 20)]
        with pytest.raises(DamagedFileSystem, match="while it had names"):
            made(*records, pack_transform(then))
        emptied = [*records, log_media.pack_entry(b"n" * 20, 77, 0, 6)]
        assert made(*emptied, pack_transform(then)).transform == then


def test_what_a_newer_program_sets_on_a_directory_with_names_is_no_damage() -> None:
    newer = TransformState(77, 3, KEY, NONCE)
    records = [PARENT, DIRECTORY, entry(b"name"), pack_transform(newer)]
    inode = made(*records)
    assert (inode.transform, inode.unknown_id, list(inode.entries)) == (newer, 77, [b"name"])
    assert_is_kept(inode)
    plain = made(*records, pack_transform(None))
    assert (plain.transform, plain.unknown_id, list(plain.entries)) == (None, 0, [b"name"])
    assert_is_kept(plain)


def test_values_of_an_encrypted_inode_may_be_longer_and_no_others() -> None:
    transform = pack_transform(ENCRYPTED)
    target = log_media.pack_values(RecordKind.TARGET, b"", bytes(4095 + 16))
    assert len(made(transform, *target, LINK).target) == 4111
    values = log_media.pack_values(RecordKind.XATTR, b"x" * 287, bytes(65536 + 16))
    assert_is_kept(made(transform, *values, FILE))
    for records in (target, values):
        with pytest.raises(DamagedFileSystem, match=r"long|name"):
            made(*records, FILE)
    for wrong in (
        log_media.pack_values(RecordKind.TARGET, b"", bytes(4096 + 16)),
        log_media.pack_values(RecordKind.XATTR, b"x", bytes(65537 + 16)),
        log_media.pack_values(RecordKind.XATTR, b"x" * 288, b""),
    ):
        with pytest.raises(DamagedFileSystem, match=r"long|name"):
            made(transform, *wrong, LINK)


# Records as bytes


@given(STATES)
def test_a_transformation_is_read_as_it_was_written(of: TransformState | None) -> None:
    raw = pack_transform(of)
    assert len(raw) == 64
    assert unpack_transform(raw) == (of or TransformState(0))


@given(st.integers(0, (1 << 64) - 1), st.tuples(*[st.integers(0, (1 << 32) - 1)] * 5),
       st.integers(0, 255))  # fmt: skip
def test_a_piece_is_read_as_it_was_written_and_looked_at_whatever_it_is(
    index: int, values: tuple[int, ...], id_: int
) -> None:
    of = StoredPiece(*values, id_)
    raw = pack_piece(index, of)
    assert len(raw) == 64
    assert unpack_piece(raw) == (index, of)
    why = why_impossible_piece(index, of)
    with suppress(DamagedFileSystem):
        made(FILE, raw)
        assert not why


@given(st.integers(1, 1 << 47), st.binary(min_size=16, max_size=16), st.integers(0, 191))
def test_any_bit_that_changes_in_a_redo_record_is_noticed(
    offset: int, block: bytes, bit: int
) -> None:
    right = live.redo_check(offset, block)
    changed = int.from_bytes(offset.to_bytes(8, "little") + block, "little") ^ 1 << bit
    raw = changed.to_bytes(24, "little")
    assert live.redo_check(int.from_bytes(raw[:8], "little"), raw[8:]) != right
    assert 0 < right < 1 << 64


# Wrapped keys

WRAPPED = keys.WrappedKey(
    kind=1, log2_n=17, r=8, p=1, created_ns=5, key_id=KEY, name="wörk", salt=NONCE,
    wrapped=b"w" * 80,
)  # fmt: skip
BY_FILE = replace(WRAPPED, kind=2, log2_n=0, r=0, p=0)


def test_a_wrapped_key_is_one_under_its_own_name() -> None:
    name = keys.key_attribute(KEY, 3)
    assert keys.read_key_attribute(name) == (KEY, 3)
    for sound in (WRAPPED, BY_FILE):
        raw = keys.WRAPPED_KEY.pack(sound)
        assert len(raw) == 192
        assert keys.why_wrong(name, raw) == ""
        assert keys.WRAPPED_KEY.unpack(raw) == sound
        assert "another key" in keys.why_wrong(keys.key_attribute(NONCE, 3), raw)
        assert "not that of a wrapped key" in keys.why_wrong(b"pmemfs.other", raw)
        assert "193 bytes" in keys.why_wrong(name, raw + b"x")


@pytest.mark.parametrize(
    ("sound", "changes", "why"),
    [
        (WRAPPED, {"version": 2}, "version"),
        (WRAPPED, {"kind": 3}, "kind"),
        (WRAPPED, {"key_id": bytes(16)}, "another key"),
        (WRAPPED, {"log2_n": 30}, "cost"),
        (WRAPPED, {"log2_n": 0}, "cost"),
        (WRAPPED, {"log2_n": 255, "r": 255}, "cost"),
        (WRAPPED, {"r": 0}, "cost"),
        (WRAPPED, {"p": 0}, "cost"),
        (WRAPPED, {"p": 17}, "cost"),
        (WRAPPED, {"name": ""}, "name"),
        (WRAPPED, {"name": "\udcff"}, "name"),
        (BY_FILE, {"r": 1}, "cost"),
    ],
)
def test_what_is_no_wrapped_key_is_said_to_be_none(
    sound: keys.WrappedKey, changes: dict[str, object], why: str
) -> None:
    raw = keys.WRAPPED_KEY.pack(replace(sound, **changes))
    assert why in keys.why_wrong(keys.key_attribute(KEY, 0), raw)


@pytest.mark.parametrize(
    "name",
    [b"user.key", b"pmemfs.key.", b"pmemfs.key.zz.1", b"pmemfs.key.00", b"pmemfs.key.AA.1",
     b"pmemfs.key.aa.01", b"pmemfs.key.aa.x", b"pmemfs.key. aa.1", b"pmemfs.key.\xc3\xa4.1"],
)  # fmt: skip
def test_what_is_no_attribute_of_a_key_is_not_taken_for_one(name: bytes) -> None:
    assert keys.read_key_attribute(name) is None
