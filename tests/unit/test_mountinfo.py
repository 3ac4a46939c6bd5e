"""mountinfo: every name that a directory can have, and the mount that covers another."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.sources import needs_root
from pmemfs import mountinfo
from pmemfs.mountinfo import Mount, mount_at, mount_of_device, mounts

LINES = """\
22 27 0:21 / /proc rw,nosuid shared:5 master:1 - proc proc rw
36 35 98:0 /mnt1 /mnt/with\\040space rw,noatime - ext4 /dev/a\\040b rw,errors=continue
40 22 0:57 / /mnt/one rw - fuse.pmemfs /dev/shm/pmem0 rw,user_id=0
41 22 0:58 / /mnt/one ro,nodev - fuse.pmemfs /dev/shm/pmem1 rw,user_id=0
42 22 0:59 / /mnt/\\134040\\011\\012\\043é rw - tmpfs none rw
43 22 0:60 / /mnt/empty-source rw - tmpfs  rw
"""


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mountinfo of our own."""
    path = tmp_path / "mountinfo"
    path.write_text(LINES)
    monkeypatch.setattr(mountinfo, "open", lambda *_: path.open("rb"), raising=False)
    return path


@pytest.mark.usefixtures("lines")
def test_fields_are_found_however_many_optional_ones_there_are() -> None:
    assert mounts()[0] == Mount("0:21", "/proc", "proc", "proc", "rw,nosuid,rw")
    assert mounts()[1] == Mount(
        "98:0", "/mnt/with space", "ext4", "/dev/a b", "rw,noatime,rw,errors=continue", "/mnt1"
    )
    assert len(mounts()) == 6


def test_a_mount_of_a_part_of_a_file_system_says_so(lines: Path) -> None:
    lines.write_text("40 22 0:57 /a\\040b /mnt rw - fuse.pmemfs /dev/shm/pmem0 rw,user_id=0\n")
    assert mounts()[0].root == "/a b"


@pytest.mark.usefixtures("lines")
def test_of_two_mounts_on_one_directory_the_later_is_meant() -> None:
    mount = mount_at("/mnt/one")
    assert mount is not None
    assert (mount.source, mount.minor, mount.is_ours) == ("/dev/shm/pmem1", 58, True)


@pytest.mark.usefixtures("lines")
def test_escapes_are_undone_once() -> None:
    assert mount_at("/mnt/\\040\t\n#é") is not None
    assert mount_at("/mnt/nowhere") is None


@pytest.mark.usefixtures("lines")
def test_a_mount_is_found_by_its_device_number() -> None:
    mount = mount_of_device(os.makedev(98, 0))
    assert mount is not None
    assert not mount.is_ours
    assert mount_of_device(os.makedev(1, 1)) is None


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20))
def test_any_name_is_one_line_and_comes_back(name: str) -> None:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return
    escaped = raw
    for byte in b"\\ \t\n#":
        escaped = escaped.replace(bytes([byte]), b"\\%03o" % byte)

    line = b"42 22 0:59 / /mnt/%s rw - tmpfs none rw\n" % escaped
    line += b"43 22 0:60 / /other rw - tmpfs none rw\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mountinfo, "open", lambda *_: io.BytesIO(line), raising=False)
        assert [mount.mountpoint for mount in mounts()] == [f"/mnt/{name}", "/other"]


def test_this_machines_own_mounts_parse() -> None:
    assert mount_at("/proc") is not None
    mount = mount_of_device(os.stat("/dev/shm").st_dev)
    assert mount is not None
    assert mount.fs_type == "tmpfs"


@needs_root
@pytest.mark.parametrize("name", ["a\x0cb", "a\u2028b", "a\rb", "a\nb", "a\x85b"])
def test_a_mountpoint_with_any_line_break_is_found(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        assert mount_at(str(directory)) is not None
    finally:
        subprocess.run(["umount", str(directory)], check=True)
