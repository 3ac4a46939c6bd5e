"""Encrypted files behave as plain ones, byte for byte, and nothing plain of them is in the pool."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.pools import MemoryMedium
from kit.sealed import Keys
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.base import Durability
from pmemfs.memmap.none import NoMemmap
from pmemfs.observe.owners import Owners
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.sealing import Sealing

FILE = NewInode(stat.S_IFREG | 0o644, 0, 0)
DIRECTORY = NewInode(stat.S_IFDIR | 0o755, 0, 0)
ENGINES = ("native", "python")


@dataclass
class Mounted:
    """A file system with an encrypted directory."""

    pool: Pool
    fs: FileSystem
    keys: Keys
    private: int

    def again(self, sealing: Sealing | None = None) -> FileSystem:
        """What another mount of the same pool would read."""
        return FileSystem(self.pool, NoMemmap(), sealing=sealing or self.keys.native)

    def image(self) -> bytes:
        return bytes(self.pool.medium.read(0, self.pool.medium.size_bytes))


def link_to(target: bytes) -> NewInode:
    return NewInode(stat.S_IFLNK | 0o777, 0, 0, target=target)


def mounted(
    keys: Keys, engine: str = "native", durability: Durability = Durability.CACHE_LINES,
) -> Mounted:  # fmt: skip
    spec = PoolSpec("sealed", alignment_bytes=4 * KIB, scheme=Scheme.NONE, mode=Mode.FS)
    pool = Pool.create(MemoryMedium(bytes(4 * MIB)), spec)
    pool.medium.durability = durability
    FileSystem.format(pool)
    fs = FileSystem(pool, NoMemmap(), sealing=getattr(keys, engine))
    private = fs.make(ROOT, b"private", DIRECTORY)
    fs.properties.encrypt(private, keys.key_id)
    return Mounted(pool, fs, keys, private)


@pytest.fixture
def keys() -> Iterator[Keys]:
    with Keys() as made:
        yield made


def error_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with; 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


# Content

places = st.one_of(st.integers(0, 70_000), st.sampled_from([0, 15, 16, 4095, 4096, 4097, 65536]))
lengths = st.one_of(
    st.integers(1, 9000), st.sampled_from([1, 15, 16, 17, 4096, 4112]), st.integers(1, 70_000)
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), places, lengths),
        st.tuples(st.just("append"), lengths),
        st.tuples(st.just("truncate"), places),
        st.tuples(st.just("punch"), places, lengths),
        st.tuples(st.just("zero"), places, lengths, st.booleans()),
        st.tuples(st.just("allocate"), places, lengths, st.booleans()),
        st.tuples(st.just("copy"), places, places, lengths),
        st.tuples(st.sampled_from(["trim", "lay out", "persist", "mount"])),
    ),
    max_size=30,
)


class Twins:
    """An encrypted file and a plain one, to which the same happens."""

    def __init__(self, mounted: Mounted, engine: str) -> None:
        self.mounted = mounted
        self.engine = engine
        self.fs = mounted.fs
        self.sealed = self.fs.make(mounted.private, b"file", FILE)
        self.plain = self.fs.make(ROOT, b"file", FILE)
        self.count = 0

    def data(self, length: int) -> bytes:
        self.count += 1
        word = b"%07d|" % self.count
        return (word * (length // 8 + 1))[:length]

    def step(self, name: str, *arguments: int) -> None:
        if name == "mount":
            for number in (self.sealed, self.plain):
                self.fs.persist(number)
            self.fs = self.mounted.again(getattr(self.mounted.keys, self.engine))
            return
        data = self.data(arguments[-1]) if name in ("write", "append") else b""
        results = [
            error_of(lambda number=number: self._do(number, name, arguments, data))  # type: ignore[misc]
            for number in (self.sealed, self.plain)
        ]
        assert results[0] == results[1]

    def _do(self, number: int, name: str, arguments: tuple[int, ...], data: bytes) -> None:
        fs = self.fs
        if name == "write":
            fs.write(number, arguments[0], data)
        elif name == "append":
            fs.write(number, min(fs.attributes(number).size_bytes, 200_000), data)
        elif name == "truncate":
            fs.set_attributes(number, size_bytes=arguments[0])
        elif name == "punch":
            fs.punch(number, *arguments)
        elif name in ("zero", "allocate"):
            getattr(fs, name)(number, *arguments[:2], keep_size=bool(arguments[2]))
        elif name == "copy":
            fs.copy(number, arguments[0], number, arguments[1], arguments[2])
        elif name == "trim":
            fs.trim_ahead(number)
        elif name == "lay out":
            trio.run(fs.lay_out, number)
        else:
            fs.persist(number)

    def check(self) -> None:
        sizes = [self.fs.attributes(number).size_bytes for number in (self.sealed, self.plain)]
        assert sizes[0] == sizes[1]
        found = [bytes(self.fs.read(number, 0, sizes[0])) for number in (self.sealed, self.plain)]
        assert found[0] == found[1]
        frames = -(-sizes[0] // 4096)
        for start, length in ((1, 1), (sizes[0] // 2, 33), (sizes[0] - 5, 100)):
            part = bytes(self.fs.read(self.sealed, max(0, start), length))
            assert part == found[0][max(0, start) : max(0, start) + length]
        # Behind the size, how much is mapped ahead depends on what is free.
        holes = [
            [(e.index, e.frame_count) for e in self.fs.inode(number).extents.pieces(0, frames)
             if e.pfn < 0]
            for number in (self.sealed, self.plain)
        ]  # fmt: skip
        assert holes[0] == holes[1]


@pytest.mark.parametrize("durability", Durability)
@pytest.mark.parametrize("engine", ENGINES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_an_encrypted_file_behaves_as_a_plain_one(
    engine: str, durability: Durability, steps: list[tuple[str, int]]
) -> None:
    with Keys() as keys:
        twins = Twins(mounted(keys, engine, durability), engine)
        for step in steps:
            twins.step(*step)
            twins.check()


def test_both_engines_store_the_same_bytes(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda length: b"m" * length)
    stored = []
    for engine in ENGINES:
        twins = Twins(mounted(keys, engine), engine)
        for step in (("write", 3, 5000), ("append", 777), ("zero", 100, 300, True),
                     ("write", 9000, 1), ("truncate", 9100), ("write", 20000, 70000)):  # fmt: skip
            twins.step(*step)
        read = twins.mounted.pool.medium.read
        inode = twins.fs.inode(twins.sealed)
        stored.append([bytes(read(run.pfn << 12, run.frame_count << 12)) for run in inode.runs()])
        assert len(stored[-1][0]) > 4096
    assert stored[0] == stored[1]


def test_what_one_engine_writes_the_other_one_reads(keys: Keys) -> None:
    for engine, other in (ENGINES, ENGINES[::-1]):
        m = mounted(keys, engine)
        number = m.fs.make(m.private, b"file", FILE)
        m.fs.write(number, 5, b"what it says" * 1000)
        m.fs.persist(number)
        fs = m.again(getattr(keys, other))
        assert fs.lookup(m.private, b"file") == number
        assert bytes(fs.read(number, 0, 99999)) == bytes(5) + b"what it says" * 1000


def test_no_plain_byte_of_it_is_in_the_pool(keys: Keys) -> None:
    m = mounted(keys)
    fs = m.fs
    number = fs.make(m.private, b"a plain name of a file", FILE)
    fs.write(number, 7, b"a plain content " * 1000)
    fs.set_xattr(number, b"user.a-plain-attribute", b"a plain value of it")
    fs.make(m.private, b"link", link_to(b"a/plain/target/of/it"))
    fs.rename(m.private, b"a plain name of a file", m.private, b"another plain name")
    fs.make(fs.make(m.private, b"a plain directory", DIRECTORY), b"a plain name in it", FILE)
    fs.persist(number)
    fs.end()
    image = m.image()
    for secret in (b"plain name", b"plain content", b"plain-attr", b"plain value", b"plain/target",
                   b"plain dir"):  # fmt: skip
        assert secret not in image


def test_a_frame_that_was_never_written_reads_as_zeroes(keys: Keys) -> None:
    m = mounted(keys)
    number = m.fs.make(m.private, b"file", FILE)
    m.fs.allocate(number, 0, 50_000, keep_size=False)
    m.fs.write(number, 60_000, b"x")
    m.fs.set_attributes(number, size_bytes=70_001)
    m.fs.allocate(number, 0, 80_000, keep_size=True)
    expected = bytes(60_000) + b"x" + bytes(10_000)
    assert bytes(m.fs.read(number, 0, 99_999)) == expected
    assert bytes(m.again().read(number, 0, 99_999)) == expected


def test_nothing_is_moved_within_an_encrypted_file(keys: Keys) -> None:
    m = mounted(keys)
    number = m.fs.make(m.private, b"file", FILE)
    m.fs.write(number, 0, bytes(5 * 4096))
    assert error_of(lambda: m.fs.collapse(number, 0, 4096)) == errno.EOPNOTSUPP
    assert error_of(lambda: m.fs.insert(number, 0, 4096)) == errno.EOPNOTSUPP


def test_ranges_are_copied_between_plain_and_encrypted_files(keys: Keys) -> None:
    m = mounted(keys)
    sealed, plain = m.fs.make(m.private, b"file", FILE), m.fs.make(ROOT, b"file", FILE)
    m.fs.write(plain, 0, bytes(range(256)) * 100)
    assert m.fs.copy(plain, 3, sealed, 5, 20_000) == 20_000
    other = m.fs.make(ROOT, b"other", FILE)
    assert m.fs.copy(sealed, 5, other, 3, 20_000) == 20_000
    assert m.fs.read(other, 3, 20_000) == m.fs.read(plain, 3, 20_000)


# Names


def test_names_are_those_that_were_given_also_after_a_mount(keys: Keys) -> None:
    m = mounted(keys)
    names = [b"a", b"n" * 255, b"\xff\xfe", b"with space", "ä".encode()]
    for name in names:
        m.fs.make(m.private, name, FILE)
    m.fs.unlink(m.private, b"a")
    for fs in (m.fs, m.again()):
        assert fs.names(m.private) == names[1:]
        assert fs.lookup(m.private, b"n" * 255)
        assert error_of(lambda fs=fs: fs.lookup(m.private, b"a")) == errno.ENOENT  # type: ignore[misc]
        assert error_of(lambda fs=fs: fs.lookup(m.private, b"n" * 256)) == errno.ENAMETOOLONG  # type: ignore[misc]
    assert error_of(lambda: m.fs.make(m.private, b"n" * 256, FILE)) == errno.ENAMETOOLONG
    assert error_of(lambda: m.fs.make(m.private, b"n" * 255, FILE)) == errno.EEXIST


def test_two_directories_store_one_name_differently(keys: Keys) -> None:
    m = mounted(keys)
    below = m.fs.make(m.private, b"same", DIRECTORY)
    m.fs.make(below, b"same", FILE)
    assert not m.fs.inode(below).entries.keys() & m.fs.inode(m.private).entries.keys()


def test_a_locked_directory_shows_encoded_names_that_can_be_removed(keys: Keys) -> None:
    m = mounted(keys)
    fs = m.fs
    numbers = [
        fs.make(m.private, name, FILE) for name in (b"a", b"m" * 163, b"n" * 164, b"o" * 255)
    ]
    directory = fs.make(m.private, b"directory", DIRECTORY)
    keys.lock()
    names = fs.names(m.private)
    assert all(len(name) <= 255 and b"/" not in name for name in names)
    assert [fs.lookup(m.private, name) for name in names] == [*numbers, directory]
    assert fs.attributes(numbers[0]).size_bytes == 0
    assert error_of(lambda: fs.lookup(m.private, b"a")) == errno.ENOENT
    assert error_of(lambda: fs.lookup(m.private, names[0] + b"A")) == errno.ENOENT
    for name in names[:-1]:
        fs.unlink(m.private, name)
    fs.rmdir(m.private, names[-1])
    assert fs.names(m.private) == []
    fs.rmdir(ROOT, b"private")


def test_a_name_that_the_key_has_not_made_is_shown_encoded_and_can_be_removed(keys: Keys) -> None:
    m = mounted(keys)
    fs = m.fs
    for name in (b"a", b"n" * 255):
        fs.make(m.private, name, FILE)
    directory = fs.inode(m.private)
    assert directory.transform is not None
    directory.set_transform(directory.transform._replace(nonce=b"another nonce..."))
    fs.make(m.private, b"b", FILE)
    names = fs.names(m.private)
    assert names[-1] == b"b"
    assert len(names) == 3
    for name in names:
        fs.lookup(m.private, name)
        fs.unlink(m.private, name)
    fs.rmdir(ROOT, b"private")


def test_without_the_key_nothing_is_opened_made_or_changed(keys: Keys) -> None:
    m = mounted(keys)
    fs = m.fs
    number = fs.make(m.private, b"file", FILE)
    fs.write(number, 0, b"content")
    fs.set_xattr(number, b"user.a", b"1")
    fs.set_xattr(number, b"trusted.b", b"2")
    link = fs.make(m.private, b"link", link_to(b"target"))
    plain = fs.make(ROOT, b"plain", FILE)
    keys.lock()
    name = fs.names(m.private)[0]
    for refused in (
        lambda: fs.check_open(number, os.O_RDONLY),
        lambda: fs.check_open(number, os.O_WRONLY),
        lambda: fs.read(number, 0, 7),
        lambda: fs.write(number, 0, b"other"),
        lambda: fs.set_attributes(number, size_bytes=0),
        lambda: fs.set_attributes(number, size_bytes=9999),
        lambda: fs.punch(number, 0, 4096),
        lambda: fs.target(link),
        lambda: fs.make(m.private, b"new", FILE),
        lambda: fs.make_unnamed(m.private, FILE),
        lambda: fs.link(number, m.private, b"new"),
        lambda: fs.link(plain, m.private, b"new"),
        lambda: fs.rename(m.private, name, ROOT, b"new"),
        lambda: fs.rename(m.private, name, m.private, b"new"),
        lambda: fs.rename(ROOT, b"plain", m.private, b"new"),
        lambda: fs.set_xattr(number, b"user.c", b"3"),
        lambda: fs.get_xattr(number, b"user.a"),
        lambda: fs.remove_xattr(number, b"user.a"),
    ):
        assert error_of(refused) == errno.ENOKEY
    assert fs.list_xattrs(number) == [b"trusted.b"]
    assert fs.attributes(link).size_bytes == 6
    fs.set_attributes(number, mode=0o600)
    fs.set_xattr(number, b"trusted.b", b"4")
    keys.unlock()
    assert bytes(fs.read(number, 0, 99)) == b"content"
    assert fs.get_xattr(number, b"user.a") == b"1"
    assert fs.target(link) == b"target"
    assert fs.names(m.private) == [b"file", b"link"]


def test_what_has_another_key_or_none_gets_no_name_in_an_encrypted_directory(keys: Keys) -> None:
    m = mounted(keys)
    fs = m.fs
    other = fs.make(ROOT, b"other", DIRECTORY)
    fs.properties.encrypt(other, keys.make())
    below = fs.make(m.private, b"below", DIRECTORY)
    number = fs.make(m.private, b"file", FILE)
    plain, foreign = fs.make(ROOT, b"plain", FILE), fs.make(other, b"foreign", FILE)
    for refused in (
        lambda: fs.link(plain, m.private, b"new"),
        lambda: fs.link(foreign, m.private, b"new"),
        lambda: fs.rename(ROOT, b"plain", m.private, b"new"),
        lambda: fs.rename(other, b"foreign", below, b"new"),
        lambda: fs.rename(ROOT, b"plain", m.private, b"file", 2),
        lambda: fs.rename(m.private, b"file", ROOT, b"plain", 2),
        lambda: fs.rename(ROOT, b"other", m.private, b"new"),
    ):
        assert error_of(refused) == errno.EXDEV
    fs.link(number, below, b"again")
    fs.rename(m.private, b"file", below, b"moved")
    fs.rename(below, b"moved", ROOT, b"out")
    assert fs.lookup(ROOT, b"out") == fs.lookup(below, b"again") == number


def test_attributes_of_users_are_those_that_were_set(keys: Keys) -> None:
    m = mounted(keys)
    number = m.fs.make(m.private, b"file", NewInode(stat.S_IFREG, 0, 0, xattrs=((b"user.0", b""),)))
    values = {b"user." + b"n" * 250: b"v" * 65536, b"user.1": b"", b"security.x": b"plain"}
    for name, value in values.items():
        m.fs.set_xattr(number, name, value)
    m.fs.remove_xattr(number, b"user.0")
    m.fs.set_xattr(number, b"user.1", b"one")
    values[b"user.1"] = b"one"
    for fs in (m.fs, m.again()):
        assert {name: fs.get_xattr(number, name) for name in fs.list_xattrs(number)} == values
    assert error_of(lambda: m.fs.set_xattr(number, b"user.1", b"", 1)) == errno.EEXIST
    assert error_of(lambda: m.fs.set_xattr(number, b"user.2", b"", 2)) == errno.ENODATA


# What a power failure leaves


def noted(m: Mounted) -> tuple[int, int, bytes]:
    """A file whose first block was noted and not stored: its inode, its place, and the block."""
    number = m.fs.make(m.private, b"file", FILE)
    m.fs.write(number, 0, b"old content here" * 300)
    m.fs.persist(number)
    inode, offset = m.fs.inode(number), m.fs.inode(number).runs()[0].pfn << 12
    cipher, slot = m.keys.native.content_key(inode)
    block = cipher.xts(slot, 0, b"new content here", True)
    m.fs.store.lines.note_redo(inode, offset, block)
    return number, offset, block


def test_a_block_that_was_noted_is_stored_by_the_next_mount(keys: Keys) -> None:
    m = mounted(keys)
    number, offset, block = noted(m)
    fs = m.again()
    assert bytes(fs.read(number, 0, 32)) == b"new content here" + b"old content here"
    assert m.pool.medium.read(offset, 16) == block
    line = fs.live_line(number)
    assert not any(m.pool.medium.read(line + 24, 8))


def test_a_mount_that_only_reads_shows_a_noted_block_and_stores_nothing(keys: Keys) -> None:
    m = mounted(keys)
    number, _, _ = noted(m)
    before = m.image()
    m.pool.medium.read_only = True
    fs = m.again()
    for at, length in ((0, 32), (3, 4), (15, 2), (8, 4096), (16, 16)):
        whole = b"new content here" + b"old content here" * 299
        assert bytes(fs.read(number, at, length)) == whole[at : at + length]
    assert m.image() == before


@pytest.mark.parametrize("damage", ["offset", "block", "check", "frame"])
def test_a_note_that_is_torn_or_of_another_file_is_forgotten(keys: Keys, damage: str) -> None:
    m = mounted(keys)
    number, _, block = noted(m)
    line = m.fs.live_line(number)
    if damage == "frame":
        other = m.fs.make(m.private, b"other", FILE)
        m.fs.write(other, 0, bytes(4096))
        place = m.fs.inode(other).runs()[0].pfn << 12
        m.fs.store.lines.note_redo(m.fs.inode(number), place, block)
    else:
        at = line + {"offset": 24, "block": 32, "check": 48}[damage]
        word = int.from_bytes(m.pool.medium.read(at, 8), "little") + 16
        m.pool.medium.store(at, word.to_bytes(8, "little"))
    fs = m.again()
    assert bytes(fs.read(number, 0, 16)) == b"old content here"
    assert not any(m.pool.medium.read(line + 24, 8))
    if damage == "frame":
        assert bytes(fs.read(other, 0, 4096)) == bytes(4096)
    assert not fs.read_only


# For people


def test_paths_of_owners_are_those_that_a_user_sees_now(keys: Keys) -> None:
    m = mounted(keys)
    number = m.fs.make(m.private, b"a name", FILE)
    owners = Owners(m.fs)
    assert trio.run(owners.of, [number])[number].path == "private/a name"
    keys.lock()
    (encoded,) = m.fs.names(m.private)
    assert trio.run(owners.of, [number])[number].path == f"private/{encoded.decode()}"
