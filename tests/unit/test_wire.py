"""The protocol as it is declared is that of the installed linux/fuse.h, as far as it goes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pmemfs.fuse import wire
from pmemfs.fuse.wire import Opcode, Structure

HEADER = Path("/usr/include/linux/fuse.h")
STRUCTURES = {name: made for name, made in vars(wire).items() if isinstance(made, Structure)}
FOLLOWED = {"fuse_entry_out": 88, "fuse_attr_out": 88, "fuse_statx_out": 256}
"""Structures whose last field is declared apart, and its size."""
FLAGS = {
    **{name: f"FUSE_{name}" for name in (
        "ASYNC_READ", "ATOMIC_O_TRUNC", "EXPORT_SUPPORT", "BIG_WRITES", "DONT_MASK",
        "AUTO_INVAL_DATA", "DO_READDIRPLUS", "READDIRPLUS_AUTO", "ASYNC_DIO", "PARALLEL_DIROPS",
        "HANDLE_KILLPRIV", "POSIX_ACL", "MAX_PAGES", "HANDLE_KILLPRIV_V2", "SETXATTR_EXT",
        "INIT_EXT", "DIRECT_IO_ALLOW_MMAP", "OVER_IO_URING", "WRITE_CACHE", "WRITE_KILL_SUIDGID",
        "OPEN_KILL_SUIDGID", "SETXATTR_ACL_KILL_SGID", "NOTIFY_INVAL_INODE",
    )},
    **{name: name for name in (
        "FOPEN_DIRECT_IO", "FOPEN_KEEP_CACHE", "FOPEN_NOFLUSH", "FOPEN_PARALLEL_DIRECT_WRITES",
    )},
    "SETS_MODE": "FATTR_MODE", "SETS_UID": "FATTR_UID", "SETS_GID": "FATTR_GID",
    "SETS_SIZE": "FATTR_SIZE", "SETS_ATIME": "FATTR_ATIME", "SETS_MTIME": "FATTR_MTIME",
    "SETS_CTIME": "FATTR_CTIME", "SETS_ATIME_NOW": "FATTR_ATIME_NOW",
    "SETS_MTIME_NOW": "FATTR_MTIME_NOW", "SETATTR_KILL_SUIDGID": "FATTR_KILL_SUIDGID",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not HEADER.exists(), reason="no compiler, or no header"
)


def compiled(lines: list[str], directory: Path) -> dict[str, int]:
    """What a program prints that is made of these lines of C."""
    source = directory / "ask.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
        '#define SAY(name, value) printf("%s %llu\\n", name, (unsigned long long)(value))\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["gcc", "-w", "-o", directory / "ask", source], check=True)
    said = subprocess.run([directory / "ask"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


def known_structures() -> list[Structure]:
    """Those that this header has."""
    text = HEADER.read_text()
    return [made for made in STRUCTURES.values() if f"struct {made.name} {{" in text]


def test_sizes_and_offsets_are_those_of_the_header(tmp_path: Path) -> None:
    known = known_structures()
    assert len(known) > 35
    lines = []
    for made in known:
        lines.append(f'SAY("{made.name}", sizeof(struct {made.name}));')
        lines += [
            f'SAY("{made.name}.{field}", offsetof(struct {made.name}, {field}));'
            for field in made.offsets
        ]
    found = compiled(lines, tmp_path)
    wanted = {made.name: made.size + FOLLOWED.get(made.name, 0) for made in known}
    for made in known:
        wanted.update({f"{made.name}.{field}": at for field, at in made.offsets.items()})
    assert found == wanted


def test_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    text = HEADER.read_text()
    names = {f"FUSE_{opcode.name}": int(opcode) for opcode in Opcode}
    names.update({theirs: getattr(wire, ours) for ours, theirs in FLAGS.items()})
    known = {name: value for name, value in names.items() if name in text}
    assert len(known) > 70
    lines = [f'SAY("{name}", {name});' for name in known]
    assert compiled(lines, tmp_path) == known


def test_what_the_oldest_header_lacks_has_the_size_that_newer_ones_say() -> None:
    # Source: include/uapi/linux/fuse.h of Linux 6.18.
    assert wire.STATX_OUT.size + wire.STATX.size == 288
    assert (wire.STATX_IN.size, wire.COPY_OUT_64.size) == (24, 8)
    assert wire.STATX.offsets["atime"] == 64
    assert wire.STATX.offsets["rdev_major"] == 128
