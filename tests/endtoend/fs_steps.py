"""Hypothesis strategies of steps for `fs_oracle`: few names, so that they meet, and odd ones."""

from __future__ import annotations

import fcntl
import os
import stat
import struct

from fs_oracle import (
    ACCESS_ACL,
    DEFAULT_ACL,
    EXCHANGE,
    KEEP_SIZE,
    NO_OVERWRITE,
    NOBODY,
    PUNCH,
    SLOT_COUNT,
    Step,
)
from hypothesis import strategies as st

MIB = 1 << 20

# What a case may begin with, so that it needn't make all of it first.
PRELUDE = [
    Step("mkdir", ("a", 0o755)),
    Step("mkdir", ("a/b", 0o777)),
    Step("mkdir", ("b", 0o1777)),
    Step("open", (0, "a/f", os.O_RDWR | os.O_CREAT, 0o644)),
    Step("pwrite", (0, 1, 10_000, 0)),
    Step("open", (1, "f", os.O_RDWR | os.O_CREAT, 0o666)),
    Step("write", (1, 2, 100)),
    Step("symlink", ("a/f", "l")),
]

PLAIN = ["a", "b", "c", "f", "l"]
ODD = ["x" * 255, "y" * 256, "é" * 127, "\udcff\udcfe", ".", "..", "a b\n", "f/", "f/g"]

names = st.one_of(st.sampled_from(PLAIN), st.sampled_from(PLAIN), st.sampled_from([*PLAIN, *ODD]))
paths = st.one_of(
    names,
    st.builds("{}/{}".format, st.sampled_from(["a", "b", "a/b", "a/b/c", "l", "a/.."]), names),
)
slots = st.integers(0, SLOT_COUNT - 1)
users = st.sampled_from([0, 0, 0, NOBODY])
modes = st.sampled_from([0o644, 0o755, 0o600, 0o777, 0o000, 0o4755, 0o2755, 0o6777, 0o1777, 0o2644])
edges = st.sampled_from([0, 4096, 8192, 65536, 2 * MIB])
offsets = st.one_of(
    st.integers(0, 20_000), st.builds(lambda edge, off: max(0, edge + off), edges,
                                      st.integers(-5, 5)), edges
)  # fmt: skip
lengths = st.one_of(
    st.integers(0, 9000), st.sampled_from([0, 1, 4096, 8192, 12288, 70_000, 300_000])
)
seeds = st.integers(0, 200)
booleans = st.booleans()

access = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR])
extra_flags = st.sampled_from([
    0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC,
    os.O_CREAT | os.O_TRUNC, os.O_APPEND, os.O_CREAT | os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW,
    os.O_CREAT | os.O_NOFOLLOW, os.O_DSYNC, os.O_CREAT | os.O_EXCL | os.O_TRUNC,
])  # fmt: skip
open_flags = st.one_of(
    st.builds(lambda one, other: one | other, access, extra_flags),
    st.just(os.O_RDONLY | os.O_DIRECTORY),
)

targets = st.one_of(paths, st.sampled_from([".", "a", "nowhere", "t" * 4095, "t" * 255]))
kinds = st.sampled_from([
    (stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFREG, 0), (stat.S_IFDIR, 0),
    (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(259, 70_000)),
])  # fmt: skip
owners = st.sampled_from([-1, 0, NOBODY, 1000])
times_ns = st.one_of(
    st.sampled_from([0, 1, 999_999_999, 10**18 + 123_456_789, -1, -1_500_000_000, 4 * 10**18]),
    st.integers(-(10**18), 10**18),
)

xattr_names = st.sampled_from(
    ["user.a", "user.a", "user.b", "user." + "n" * 250, "trusted.a", "security.a", "user.", "bad.a"]
)
xattr_values = st.one_of(
    st.sampled_from([b"", b"v", b"w" * 100, b"x" * 3000]), st.binary(max_size=9)
)
xattr_flags = st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE])


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access-control list as the kernel stores it: (tag, permissions, id) each."""
    nobody_in_particular = 0xFFFFFFFF
    packed = [
        struct.pack("<HHI", tag, bits, nobody_in_particular if owner < 0 else owner)
        for tag, bits, owner in entries
    ]
    return struct.pack("<I", 2) + b"".join(packed)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ACLS = [
    acl((USER_OBJ, 6, -1), (GROUP_OBJ, 4, -1), (OTHER, 0, -1)),
    acl((USER_OBJ, 7, -1), (USER, 7, NOBODY), (GROUP_OBJ, 0, -1), (MASK, 7, -1), (OTHER, 0, -1)),
    acl((USER_OBJ, 7, -1), (USER, 6, NOBODY), (GROUP_OBJ, 7, -1), (GROUP, 4, 1000), (MASK, 4, -1),
        (OTHER, 5, -1)),
    acl((USER_OBJ, 7, -1), (GROUP_OBJ, 7, -1)),
    b"not a list",
]  # fmt: skip


def step(name: str, *arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Step]:
    """Steps of one kind, by root or by nobody."""
    return st.builds(Step, st.just(name), st.tuples(*arguments), users)


def root_step(name: str, *arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Step]:
    return st.builds(Step, st.just(name), st.tuples(*arguments))


def mknod_step(path: str, kind: tuple[int, int], mode: int, uid: int) -> Step:
    """The type and the permissions go together in one argument."""
    return Step("mknod", (path, kind[0] | mode, kind[1]), uid)


def _links() -> list[st.SearchStrategy[Step]]:
    rename_flags = st.sampled_from([0, 0, 0, NO_OVERWRITE, EXCHANGE, NO_OVERWRITE | EXCHANGE, 64])
    return [
        step("mkdir", paths, modes),
        step("mkdir", paths, st.just(0o777)),
        step("rmdir", paths),
        step("unlink", paths),
        step("rename", paths, paths, rename_flags),
        step("rename", paths, paths, st.just(0)),
        step("link", paths, paths),
        step("symlink", targets, paths),
        step("readlink", paths),
        st.builds(mknod_step, paths, kinds, modes, users),
        step("listdir", paths),
        step("mkdir_in", slots, names),
        step("unlink_in", slots, names),
        step("list_open", slots),
        root_step("link_open", slots, paths),
    ]


def _attributes() -> list[st.SearchStrategy[Step]]:
    return [
        step("truncate", paths, st.one_of(offsets, st.just(-1))),
        step("chmod", paths, modes),
        step("chown", paths, owners, owners, booleans),
        step("utimens", paths, times_ns, times_ns, booleans),
        step("touch", paths),
        step("stat", paths),
        step("access", paths, st.integers(0, 7)),
        step("setxattr", paths, xattr_names, xattr_values, xattr_flags, booleans),
        step("getxattr", paths, xattr_names, booleans),
        step("removexattr", paths, xattr_names, booleans),
        # Whether nobody sees the names of trusted.* is each file system's own matter.
        root_step("listxattr", paths, booleans),
        step("fchmod", slots, modes),
        step("fchown", slots, owners, owners),
    ]


def _lists() -> list[st.SearchStrategy[Step]]:
    kind = st.sampled_from([ACCESS_ACL, DEFAULT_ACL])
    return [
        step("setxattr", paths, kind, st.sampled_from(ACLS), st.just(0), booleans),
        step("getxattr", paths, kind, booleans),
        step("removexattr", paths, kind, booleans),
    ]


def _data() -> list[st.SearchStrategy[Step]]:
    modes_of_fallocate = st.sampled_from([0, KEEP_SIZE, PUNCH | KEEP_SIZE, PUNCH])
    whence = st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
    return [
        step("open", slots, paths, open_flags, modes),
        step("open", slots, paths, st.just(os.O_RDWR | os.O_CREAT), st.just(0o666)),
        step("open_in", slots, slots, names, open_flags, modes),
        root_step("make_unnamed", slots, paths, modes, st.sampled_from([0, 0, os.O_EXCL])),
        step("close", slots),
        step("read", slots, lengths),
        step("pread", slots, lengths, offsets),
        step("write", slots, seeds, lengths),
        step("pwrite", slots, seeds, lengths, offsets),
        step("ftruncate", slots, st.one_of(offsets, st.just(-1))),
        step("fsync", slots, booleans),
        step("lseek", slots, offsets, whence),
        step("seek_data", slots, offsets, booleans),
        step("fallocate", slots, modes_of_fallocate, offsets, lengths),
        step("copy_range", slots, offsets, slots, offsets, lengths),
        step("flock", slots, st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN])),
    ]


REMOUNT, KILL_DAEMON, KILL_DATA_PLANE = (
    Step("remount"),
    Step("kill daemon"),
    Step("kill data plane"),
)
RESTARTS = [REMOUNT, KILL_DAEMON, KILL_DATA_PLANE]

any_step = st.one_of(*_links(), *_attributes(), *_data(), *_data(), *_lists())


def cases(most: int, *, restarts: bool = False) -> st.SearchStrategy[list[Step]]:
    """Sequences of steps, from an empty directory or from a small tree."""
    kinds_of_step = [any_step] * 10 + [st.sampled_from(RESTARTS)] if restarts else [any_step]
    steps = st.lists(st.one_of(*kinds_of_step), min_size=1, max_size=most)
    return st.builds(lambda before, after: [*before, *after], st.sampled_from([PRELUDE, []]), steps)
