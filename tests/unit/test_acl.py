"""Access control lists: what the kernel takes is kept, and modes and lists agree."""

from __future__ import annotations

import errno
import os
import stat
import struct
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.acl import ACCESS, DEFAULT, Acl, Entry, Tag

permissions = st.integers(0, 7)
modes = st.integers(0, 0o7777)
ids = st.integers(0, (1 << 32) - 2)


@st.composite
def lists(draw: st.DrawFn) -> Acl:
    """Lists that the kernel would take."""
    users = draw(st.lists(st.builds(Entry, st.just(Tag.USER), permissions, ids), max_size=3))
    groups = draw(st.lists(st.builds(Entry, st.just(Tag.GROUP), permissions, ids), max_size=3))
    mask = [Entry(Tag.MASK, draw(permissions))] if users or groups or draw(st.booleans()) else []
    return (
        Entry(Tag.OWNER, draw(permissions)),
        *users,
        Entry(Tag.GROUP_OF_FILE, draw(permissions)),
        *groups,
        *mask,
        Entry(Tag.OTHERS, draw(permissions)),
    )


def minimal(mode: int) -> Acl:
    return (
        Entry(Tag.OWNER, mode >> 6 & 7),
        Entry(Tag.GROUP_OF_FILE, mode >> 3 & 7),
        Entry(Tag.OTHERS, mode & 7),
    )


def of_tag(entries: Acl, tag: Tag) -> list[Entry]:
    return [entry for entry in entries if entry.tag == tag]


@given(lists())
def test_a_list_survives_being_stored(entries: Acl) -> None:
    assert acl.parse(acl.pack(entries)) == entries


def test_the_stored_form_is_the_kernels() -> None:
    raw = acl.pack((*minimal(0o640)[:1], Entry(Tag.USER, 6, 1000), *minimal(0o640)[1:2],
                    Entry(Tag.MASK, 7), *minimal(0o640)[2:]))  # fmt: skip
    assert raw == struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in [(1, 6, 0xFFFFFFFF), (2, 6, 1000), (4, 4, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF),
                      (32, 0, 0xFFFFFFFF)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", errno.EINVAL),
        (b"\x02\x00\x00", errno.EINVAL),
        (struct.pack("<I", 1), errno.EOPNOTSUPP),
        (struct.pack("<IHH", 2, 1, 7), errno.EINVAL),
        (struct.pack("<IHHI", 2, 3, 7, 0), errno.EINVAL),
    ],
)
def test_what_is_no_list_is_refused(raw: bytes, error: int) -> None:
    with pytest.raises(OSError, match="access control list") as caught:
        acl.parse(raw)
    assert caught.value.errno == error


OWNER, GROUP, OTHERS = minimal(0o754)
USER, MASK = Entry(Tag.USER, 6, 7), Entry(Tag.MASK, 5)


@pytest.mark.parametrize(
    "entries",
    [
        (OWNER, GROUP),
        (GROUP, OTHERS),
        (OWNER, OWNER, GROUP, OTHERS),
        (GROUP, OWNER, OTHERS),
        (OWNER, USER, GROUP, OTHERS),
        (OWNER, GROUP, Entry(Tag.GROUP, 1, 9), OTHERS),
        (OWNER, GROUP, MASK, MASK, OTHERS),
        (OWNER, Entry(Tag.USER, 6), GROUP, MASK, OTHERS),
        (Entry(Tag.OWNER, 8), GROUP, OTHERS),
        (OWNER, GROUP, OTHERS, MASK),
    ],
)
def test_a_list_that_the_kernel_would_refuse_is_refused(entries: Acl) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        acl.parse(acl.pack(entries))
    assert caught.value.errno == errno.EINVAL


def test_a_list_without_entries_is_none() -> None:
    assert acl.parse(struct.pack("<I", 2)) == ()


@given(modes, modes)
def test_a_list_of_three_entries_is_a_mode(mode: int, before: int) -> None:
    assert not acl.says_more_than_a_mode(minimal(mode))
    assert acl.mode_of(minimal(mode), before) == before & ~0o777 | mode & 0o777


@given(lists(), modes)
def test_the_mask_is_what_a_mode_shows_of_the_group_class(entries: Acl, before: int) -> None:
    mode = acl.mode_of(entries, before)
    mask = of_tag(entries, Tag.MASK) or of_tag(entries, Tag.GROUP_OF_FILE)
    assert mode >> 3 & 7 == mask[0].permissions
    assert mode & ~0o777 == before & ~0o777
    assert acl.says_more_than_a_mode(entries) == (len(entries) > 3)


@given(lists(), modes)
def test_after_chmod_list_and_mode_agree_and_the_named_keep_their_entries(
    entries: Acl, mode: int
) -> None:
    changed = acl.with_mode(entries, mode)
    assert acl.mode_of(changed, mode) == mode
    assert acl.parse(acl.pack(changed)) == changed
    for tag in (Tag.USER, Tag.GROUP):
        assert of_tag(changed, tag) == of_tag(entries, tag)
    if of_tag(entries, Tag.MASK):
        assert of_tag(changed, Tag.GROUP_OF_FILE) == of_tag(entries, Tag.GROUP_OF_FILE)


@given(lists(), modes, st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO]))
def test_what_is_inherited_agrees_with_its_mode_and_allows_no_more(
    default: Acl, permission_bits: int, kind: int
) -> None:
    mode = kind | permission_bits
    made = acl.inherit(acl.pack(default), mode)
    xattrs = dict(made.xattrs)
    assert made.mode & ~mode == 0
    assert made.mode & ~0o777 == mode & ~0o777
    assert (xattrs.get(DEFAULT) == acl.pack(default)) == (kind == stat.S_IFDIR)
    assert (ACCESS in xattrs) == acl.says_more_than_a_mode(default)
    if ACCESS in xattrs:
        own = acl.parse(xattrs[ACCESS])
        assert acl.mode_of(own, made.mode) == made.mode
        assert of_tag(own, Tag.USER) == of_tag(default, Tag.USER)
    else:
        assert made.mode & 0o777 == mode & acl.mode_of(default, 0)


def test_nothing_is_inherited_from_a_list_without_entries() -> None:
    assert acl.inherit(struct.pack("<I", 2), stat.S_IFDIR | 0o755) == acl.Inherited(
        stat.S_IFDIR | 0o755
    )


@pytest.mark.parametrize("is_directory", [False, True])
def test_the_kernel_agrees_on_what_is_inherited_and_on_chmod(shm: Path, is_directory: bool) -> None:
    """tmpfs does all of it, and is the judge."""
    parent = shm / "parent"
    parent.mkdir()
    defaults: list[Acl] = [
        minimal(0o750),
        (*minimal(0o750)[:1], Entry(Tag.USER, 6, 1000), Entry(Tag.GROUP_OF_FILE, 5),
         Entry(Tag.GROUP, 7, 100), Entry(Tag.MASK, 6), Entry(Tag.OTHERS, 5)),
    ]  # fmt: skip
    for number, (default, mode) in enumerate(product(defaults, (0o777, 0o640, 0o067, 0o000))):
        os.setxattr(parent, DEFAULT.decode(), acl.pack(default))
        path = parent / str(number)
        if is_directory:
            path.mkdir(mode)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, mode))
        kind = stat.S_IFDIR if is_directory else stat.S_IFREG
        made = acl.inherit(acl.pack(default), kind | mode)
        assert path.stat().st_mode == made.mode
        names = [name.encode() for name in os.listxattr(path)]
        assert {name: os.getxattr(path, name) for name in names} == dict(made.xattrs)
        if ACCESS in names:
            entries = acl.parse(os.getxattr(path, ACCESS))
            path.chmod(0o561)
            assert os.getxattr(path, ACCESS) == acl.pack(acl.with_mode(entries, 0o561))
