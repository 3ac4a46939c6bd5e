"""Arrays over the pages of files on real mounts: what they show, whatever becomes of the file."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import pickle
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import FRAME, free_bytes, own_pins, wait_for_pins, write_file, write_in_pieces
from kit.descriptors import open_before, open_descriptors
from kit.mounts import Engine, Mounted
from kit.processes import wait_until
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@pytest.fixture(scope="module")
def connected(file_system: tuple[Engine, Mounted]) -> Iterator[pmemfs.Mount]:
    """A connection with the mount of all tests here."""
    with pmemfs.connect(file_system[1].mountpoint) as fs:
        yield fs


@pytest.fixture
def fs(connected: pmemfs.Mount) -> Iterator[pmemfs.Mount]:
    """The same; a test leaves no pin."""
    yield connected
    gc.collect()
    assert connected.statistics() == (0, 0, 0)
    wait_for_pins(connected, 0)


EXAMPLE = """
with pmemfs.connect("/mnt/pmem") as fs:
    with fs.create("kv/0.bin", shape=(32, 4096), dtype="f4") as new:      # unnamed until it is committed
        new.array[:] = 0                                                  # straight into the pool
        new.commit()                                                      # durable, then visible, all at once

    a = fs.map("kv/0.bin", shape=(32, 4096), dtype="f4")                  # a numpy.ndarray, read-only
    b = a[3:5]                                                            # every view keeps the pin
    os.truncate("/mnt/pmem/kv/0.bin", 0)                                  # works; a and b keep their pages
    print(pmemfs.pin_of(b).stale, fs.pins())

    with fs.map("big", mode="r+") as m:                                   # at the end our hold goes; a view keeps the pin
        disk = os.open("/data/file", os.O_RDONLY | os.O_DIRECT)
        os.preadv(disk, [m.array], 0)                                     # disk to pages, no copy in between
        m.flush()                                                         # durable
"""  # noqa: E501


def test_the_program_that_shows_what_this_is_for(
    root: Path, fs: pmemfs.Mount, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "kv").mkdir()
    write_file(root / "big", 64)
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as disk:
        content = write_file(Path(disk.name), 64, seed=2)
        text = EXAMPLE.replace('"/mnt/pmem"', repr(fs.mountpoint)).replace("/mnt/pmem", str(root))
        text = re.sub(r'"(kv/0.bin|big)"', lambda name: repr(str(root / name[1])), text)
        names = {"pmemfs": pmemfs, "os": os}
        exec(text.replace("/data/file", disk.name), names)
        os.close(names["disk"])  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert said.startswith("True [PinReport(pin=")
    assert (root / "kv/0.bin").stat().st_size == 0
    assert (root / "big").read_bytes() == content.tobytes()
    b = names["b"]
    assert isinstance(b, np.ndarray)
    assert b.shape == (2, 4096)
    assert not b.any()


# What an array shows


@pytest.mark.parametrize("make", [write_file, write_in_pieces])
def test_an_array_is_the_file(
    fs: pmemfs.Mount, root: Path, make: Callable[[Path, int], np.ndarray]
) -> None:
    content = make(root / "file", 40)
    whole = fs.map(root / "file")
    assert isinstance(whole, np.ndarray)
    assert (whole == content).all()
    assert not whole.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        whole.flags.writeable = True
    assert fs.statistics() == (1, 1, 40 * FRAME)


@pytest.mark.parametrize(("offset", "count"), [(0, 1), (1, 3), (4092, 2), (4096, 512), (99, 9000)])
def test_a_part_of_a_file_may_begin_anywhere(
    fs: pmemfs.Mount, root: Path, offset: int, count: int
) -> None:
    content = write_in_pieces(root / "file", 20)
    part = fs.map(root / "file", shape=(count,), dtype="<u4", offset=offset)
    assert part.tobytes() == content[offset : offset + 4 * count].tobytes()


def test_shapes_and_types_are_numpys(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 6)
    record = np.dtype([("a", "<u2"), ("b", "u1", 6)])
    assert fs.map(root / "file", dtype=record).shape == (6 * FRAME // 8,)
    assert fs.map(root / "file", dtype="f4", shape=(2, 3, 16)).shape == (2, 3, 16)
    assert fs.map(root / "file", shape=10).tolist() == content[:10].tolist()
    assert fs.map(root / "file", shape=()).item() == content[0]
    assert fs.map(root / "file", shape=(0, 4)).shape == (0, 4)
    assert fs.map(root / "file", shape=(np.int64(3),)).shape == (3,)
    (root / "empty").touch()
    assert fs.map(root / "empty").shape == (0,)
    assert fs.map(root / "empty", mode="r+").shape == (0,)


def test_the_end_of_a_file_may_lie_within_a_page(fs: pmemfs.Mount, root: Path) -> None:
    (root / "file").write_bytes(b"x" * 5000)
    assert fs.map(root / "file").tobytes() == b"x" * 5000


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"mode": "w"}, "mode is 'w'"),
        ({"mode": "w+"}, "Mount.create makes new files"),
        ({"dtype": "O"}, "can't lie in a file"),
        ({"dtype": "c16"}, "not a multiple of 16"),
        ({"shape": (5001,)}, "needs 5001"),
        ({"shape": (5000,), "offset": 1}, "4999 bytes from offset 1"),
        ({"shape": (5001,), "mode": "r+"}, "larger"),
        ({"shape": (-1,)}, "below zero"),
        ({"offset": -1}, "below zero"),
        ({"offset": 5001}, "behind its end"),
        ({"shape": (1 << 40, 1 << 40)}, "no file has"),
    ],
    ids=str,
)
def test_what_cannot_be_mapped_is_said_in_a_sentence(
    fs: pmemfs.Mount, root: Path, asked: dict[str, object], why: str
) -> None:
    (root / "file").write_bytes(bytes(5000))
    with pytest.raises(pmemfs.BadMapping, match=re.escape(why)) as refused:
        fs.map(root / "file", **asked)  # type: ignore[arg-type]
    assert isinstance(refused.value, ValueError)
    assert refused.value.errno == errno.EINVAL
    assert "file" in str(refused.value)


def test_what_cannot_be_opened_is_the_systems_error(fs: pmemfs.Mount, root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        fs.map(root / "absent")
    with pytest.raises(IsADirectoryError):
        fs.map(root)
    with pytest.raises(NotADirectoryError):
        fs.map(root / "file" / "below") if (root / "file").write_bytes(b"1") else None
    os.mkfifo(root / "pipe")
    for mode in ("r", "r+"):
        with pytest.raises(pmemfs.BadMapping, match="regular"):
            fs.map(root / "pipe", mode=mode)
    (root / "elsewhere").symlink_to("/etc/hostname")
    with pytest.raises(pmemfs.NotMounted, match="elsewhere"):
        fs.map(root / "elsewhere")
    with pytest.raises(pmemfs.NotMounted):
        pmemfs.connect("/dev/shm")


def test_a_path_may_come_from_the_mountpoint_and_lead_over_links(
    fs: pmemfs.Mount, root: Path
) -> None:
    content = write_file(root / "file", 2)
    (root / "link").symlink_to("file")
    for name in ("file", "link"):
        path = Path(root.name) / name
        for spelled in (path, str(path), os.fsencode(path)):
            assert (fs.map(spelled) == content).all()


# Modes


def test_stores_are_seen_by_read_and_counted_at_flush(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    os.utime(root / "file", (1, 1))
    with fs.open(root / "file", mode="r+") as mapping:
        mapping.array[100:110] = 7
        with open(root / "file", "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, 100) == b"\7" * 10
        mapping.flush()
        assert (root / "file").stat().st_mtime > 1e9
        os.utime(root / "file", (1, 1))
        mapping.array[0] = 9
    wait_until(lambda: (root / "file").stat().st_mtime > 1e9, "the end of the pin counts")
    assert (root / "file").read_bytes()[0] == 9


def test_writes_are_seen_by_arrays(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    for mode in ("r", "r+", "c"):
        whole = fs.map(root / "file", mode=mode)
        with open(root / "file", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), mode.encode() * 50, 5000)
        assert whole[5000 : 5000 + 50].tobytes() == (mode.encode() * 50)[:50]
    del whole


def test_copy_on_write_is_private(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 3)
    private = fs.map(root / "file", mode="c")
    private[:] = 1
    assert (fs.map(root / "file") == content).all()
    assert (root / "file").read_bytes() == content.tobytes()
    assert (private == 1).all()
    assert not own_pins(fs)[0].writable


def test_holes_read_as_zeroes_and_take_no_room(fs: pmemfs.Mount, root: Path) -> None:
    with open(root / "file", "wb", buffering=0) as file:
        os.truncate(file.fileno(), 64 * MIB)
        os.pwrite(file.fileno(), b"data", 32 * MIB)
    free = free_bytes(root)
    for mode in ("r", "c"):
        whole = fs.map(root / "file", mode=mode)
        assert whole.sum() == sum(b"data")
        assert whole[32 * MIB : 32 * MIB + 4].tobytes() == b"data"
    assert (root / "file").stat().st_blocks * 512 == FRAME
    # Earlier tests may still give frames back, and the daemon may take some for inodes.
    assert free_bytes(root) > free - MIB
    del whole


def test_a_hole_that_is_written_to_gets_pages_first(fs: pmemfs.Mount, root: Path) -> None:
    (root / "file").touch()
    os.truncate(root / "file", 10 * FRAME)
    whole = fs.map(root / "file", mode="r+")
    assert not whole.any()
    assert (root / "file").stat().st_blocks * 512 == 10 * FRAME
    whole[:] = 3
    assert (root / "file").read_bytes() == b"\3" * 10 * FRAME


def test_where_there_is_no_room_for_a_hole_it_is_enospc(fs: pmemfs.Mount, root: Path) -> None:
    (root / "file").touch()
    os.truncate(root / "file", 1 << 30)
    free = free_bytes(root)
    with pytest.raises(OSError, match="space") as full:
        fs.map(root / "file", mode="r+")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="space"):
        fs.create(root / "new", shape=1 << 30)
    (root / "file").unlink()
    # A frame or two are the directory's, which had a hidden name with pyfuse3.
    left = free - 4 * FRAME
    wait_until(lambda: free_bytes(root) >= left, "nothing is left of what was tried")


def test_a_file_that_grows_is_shown_as_it_was_mapped(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 3)
    whole = fs.map(root / "file")
    with open(root / "file", "ab") as file:
        file.write(bytes(10 * FRAME))
    assert len(whole) == 3 * FRAME
    assert (whole == content).all()
    assert not pmemfs.pin_of(whole).stale
    assert len(fs.map(root / "file")) == 13 * FRAME


# Busy pages


def truncate(path: Path) -> None:
    os.truncate(path, 0)


def rename_over(path: Path) -> None:
    write_file(path.with_name("other"), 30, seed=9)
    path.with_name("other").rename(path)


def cut_within_a_page(path: Path) -> None:
    os.truncate(path, 5 * FRAME + 100)


def punch(path: Path) -> None:
    done = subprocess.run(
        ["fallocate", "--punch-hole", "-o", "8192", "-l", "40960", path], check=False
    )
    if done.returncode:
        pytest.skip("pyfuse3 has no fallocate")


LOSSES = [truncate, Path.unlink, rename_over, punch, cut_within_a_page]


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_an_array_keeps_its_pages_whatever_becomes_of_the_file(
    fs: pmemfs.Mount, root: Path, lose: Callable[[Path], None], mode: str
) -> None:
    content = write_in_pieces(root / "file", 30)
    whole = fs.map(root / "file", mode=mode)
    pin = pmemfs.pin_of(whole)
    assert not pin.stale
    lose(root / "file")
    # The kernel forgets a file that has no name a moment later.
    wait_until(lambda: pin.stale, "the pin is stale")
    # Whoever gets pages now gets others.
    for number in range(4):
        write_file(root / f"other{number}", 30, seed=number)
    # The rest of a page that the end of the file lies in is the file's, and zero by now.
    kept = np.ones(len(content), bool)
    if lose is cut_within_a_page:
        kept[5 * FRAME + 100 : 6 * FRAME] = False
    assert (whole == content)[kept].all()
    if mode != "r":
        whole[:] = 0
        for number in range(4):
            expected = np.random.default_rng(number).integers(0, 256, 30 * FRAME, dtype="u1")
            assert (root / f"other{number}").read_bytes() == expected.tobytes()


def test_when_the_last_view_is_gone_the_room_is_back(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "other", 1)
    free = free_bytes(root)
    write_file(root / "file", 2048)
    view = fs.map(root / "file")[5:6]
    pin = pmemfs.pin_of(view)
    (root / "file").unlink()
    # The kernel forgets a file that has no name a moment later.
    wait_until(lambda: pin.stale, "its pages have left the file")
    # Half of them, because earlier tests may still give frames back.
    assert free_bytes(root) <= free - 1024 * FRAME
    del view
    # A frame or two may be for inodes by now.
    wait_until(lambda: free_bytes(root) >= free - 4 * FRAME, "the pages are free again")


def test_a_name_that_changes_is_known(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    pin = pmemfs.pin_of(whole := fs.map(root / "file"))
    assert not pin.renamed
    (root / "file").rename(root / "moved")
    assert pin.renamed
    assert not pin.stale
    del whole
    assert pin.has_ended
    assert pin.stale


# The pin


def views(whole: np.ndarray) -> list[object]:
    return [whole[3:5], whole.reshape(-1, 64), whole.view("<u4"), memoryview(whole)[9:], whole.T,
            np.asarray(whole), whole[::3][::2], memoryview(whole[4:]).cast("B")]  # fmt: skip


def test_every_view_knows_its_pin_and_keeps_it(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 2)
    for number in range(len(views(np.zeros(FRAME, "u1")))):
        whole = fs.map(root / "file")
        pin = pmemfs.pin_of(whole)
        view = views(whole)[number]
        del whole
        assert pmemfs.pin_of(view) is pin  # type: ignore[arg-type]
        assert not pin.has_ended
        assert [report.pin for report in own_pins(fs)] == [pin.number]
        del view
        assert pin.has_ended
        wait_for_pins(fs, 0)


def test_copies_and_results_are_plain_and_have_no_pin(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 2)
    whole = fs.map(root / "file")
    assert type(whole[1:]) is np.ndarray
    assert type(whole + 1) is np.ndarray
    assert type(np.sqrt(whole)) is np.ndarray
    assert isinstance(whole.sum(), np.integer)
    assert whole[5] == content[5]
    for copy in (whole.copy(), whole[[1, 2]], whole + 0, np.array(whole), content, [1], None, b"1"):
        with pytest.raises(pmemfs.NotPinned, match="no pin"):
            pmemfs.pin_of(copy)  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(whole))
    assert type(again) is np.ndarray
    assert (again == content).all()
    counts = fs.map(root / "file", mode="r+")
    counts += 1
    assert type(counts) is pmemfs.PinnedArray
    assert (counts == content + 1).all()


def test_one_pin_holds_many_files(fs: pmemfs.Mount, root: Path) -> None:
    contents = [write_file(root / f"file{n}", 1 + n, seed=n) for n in range(50)]
    fs.map(root / "file1")
    before = len(open_before())
    arrays = fs.map_many([root / f"file{n}" for n in range(50)])
    assert len(open_descriptors()) == before + 1
    assert all((a == c).all() for a, c in zip(arrays, contents, strict=True))
    assert len({pmemfs.pin_of(a) for a in arrays}) == 1
    (report,) = own_pins(fs)
    assert len(report.files) == 50
    assert report.page_count == sum(range(1, 51))
    last = arrays.pop()
    del arrays, report
    assert (last == contents[49]).all()
    requests = [pmemfs.MapRequest(root / "file1", (16, 64), "f4"), root / "file2"]
    assert [a.shape for a in fs.map_many(requests)] == [(16, 64), (3 * FRAME,)]
    assert fs.map_many([]) == []
    with pytest.raises(FileNotFoundError):
        fs.map_many([root / "file1", root / "absent"])


def test_who_holds_what_is_told(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 5)
    held = fs.map(root / "file", mode="r+", offset=FRAME, shape=100)
    (report,) = own_pins(fs)
    assert report.writable
    assert "pytest" in report.command or "python" in report.command
    assert report.page_count == 1
    (file,) = report.files
    assert file.path.endswith("file")
    assert (file.inode, file.offset_bytes) == ((root / "file").stat().st_ino, FRAME)
    assert file.length_bytes == 100
    assert pmemfs.pin_of(held).files[0][1:] == (
        file.inode, pmemfs.pin_of(held).files[0].generation, FRAME, 100
    )  # fmt: skip


# Mappings


def test_close_refuses_while_views_are_alive(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 3)
    mapping = fs.open(root / "file")
    view = mapping.array[3:5]
    with pytest.raises(pmemfs.StillInUse, match="force=True") as refused:
        mapping.close()
    assert refused.value.errno == errno.EBUSY
    assert view.tolist() == content[3:5].tolist()
    assert not mapping.closed
    del view
    mapping.close()
    mapping.close()
    for use in (lambda: mapping.array, mapping.flush, mapping.__enter__, mapping.__reduce__):
        with pytest.raises(pmemfs.Closed, match="closed"):
            use()
    assert mapping.closed
    assert mapping.pin.has_ended


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_forced_close_leaves_zeroes(fs: pmemfs.Mount, root: Path, mode: str) -> None:
    content = write_in_pieces(root / "file", 8)
    mapping = fs.open(root / "file", mode=mode)
    view = mapping.array[::7]
    assert view.any()
    mapping.close(force=True)
    assert not view.any()
    assert mapping.pin.has_ended
    wait_for_pins(fs, 0)
    if mode != "r":
        view[:] = 1
    assert (root / "file").read_bytes() == content.tobytes()


def test_the_array_of_a_mapping_is_the_same_while_it_lives(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    with fs.open(root / "file", dtype="<u2") as mapping:
        first = mapping.array
        assert first is mapping.array
        assert type(first) is np.ndarray
        assert mapping.mode == "r"
        assert "file" in repr(mapping)
        assert "current" in repr(mapping.pin)
    assert first.base is not None
    assert not mapping.pin.has_ended
    assert mapping.closed


def test_the_end_of_with_lets_go_of_all_but_views(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    with fs.map(root / "file") as mapping:
        pin = mapping.pin
    assert pin.has_ended
    with fs.map(root / "file") as mapping:
        view = mapping.array[7:9]
    assert mapping.closed
    assert not mapping.pin.has_ended
    del view
    assert mapping.pin.has_ended
    array = fs.map(root / "file")
    with array as mapping, pytest.raises(pmemfs.StillInUse):
        mapping.close()
    assert array.any()


def test_an_exception_within_with_leaves_no_pin(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 3)
    with pytest.raises(ZeroDivisionError), fs.map(root / "file", mode="r+") as mapping:
        mapping.array[0] = 1 // 0
    with pytest.raises(ZeroDivisionError), fs.create(root / "new", 100) as new:
        new.array[0] = 1 // 0
    assert not (root / "new").exists()
    assert sorted(os.listdir(root)) == ["file"]


def is_removed(said: bytes) -> bool:
    """Whether a pickle of a mapping says that its file is not there any more."""
    try:
        pickle.loads(said).close()
    except FileNotFoundError as error:
        return "removed" in str(error)
    return False


def test_a_mapping_pickles_by_reference(fs: pmemfs.Mount, root: Path) -> None:
    content = write_file(root / "file", 30)
    with fs.open(root / "file", dtype="<u2", shape=(4, 100), offset=6, mode="r+") as mapping:
        said = pickle.dumps(mapping)
        assert len(said) < 1000
        with pickle.loads(said) as again:
            assert again.array.tobytes() == content[6:806].tobytes()
            assert again.array.shape == (4, 100)
            assert again.pin.number != mapping.pin.number
            again.array[0, 0] = 77
        assert mapping.array[0, 0] == 77
    (root / "file").rename(root / "moved")
    with pickle.loads(said) as again:
        assert again.array[0, 0] == 77
    (root / "moved").unlink()
    # The kernel forgets it a moment later.
    wait_until(lambda: is_removed(said), "the file is gone")
    write_file(root / "file", 30)
    assert is_removed(said)


# New files


def test_a_new_file_appears_when_it_is_committed(fs: pmemfs.Mount, root: Path) -> None:
    with fs.create(root / "new", (4, 1000), "<u4") as new:
        assert not new.array.any()
        new.array[:] = 5
        assert not (root / "new").exists()
        new.commit()
        assert (root / "new").read_bytes() == np.full(4000, 5, "<u4").tobytes()
        new.array[0, 0] = 6
        with pytest.raises(pmemfs.Closed):
            new.commit()
    assert os.listdir(root) == ["new"]
    assert fs.map(root / "new", dtype="<u4")[:2].tolist() == [6, 5]


def test_a_commit_replaces_what_has_the_name(fs: pmemfs.Mount, root: Path) -> None:
    old = write_file(root / "file", 3)
    before = fs.map(root / "file")
    with fs.create(root / "file", 10) as new:
        new.array[:] = range(10)
        new.commit()
    assert os.listdir(root) == ["file"]
    assert (root / "file").read_bytes() == bytes(range(10))
    assert (before == old).all()
    # The kernel may take its time with what it says about the end of the first one.
    wait_until(lambda: pmemfs.pin_of(before).stale, "its pages have left the file")


def test_a_new_file_that_is_given_up_leaves_nothing(fs: pmemfs.Mount, root: Path) -> None:
    (root / "other").touch()
    free = free_bytes(root)
    new = fs.create(root / "new", 100 * FRAME)
    view = new.array[5:7]
    new.close()
    assert os.listdir(root) == ["other"]
    view[:] = 3
    assert view.tolist() == [3, 3]
    del view, new
    fs.create(root / "new", FRAME)
    assert os.listdir(root) == ["other"]
    # As above.
    wait_until(lambda: free_bytes(root) >= free - 4 * FRAME, "the room is back")
    with pytest.raises(FileNotFoundError):
        fs.create(root / "absent" / "new", 100)


def test_a_new_file_has_the_permissions_of_one(fs: pmemfs.Mount, root: Path) -> None:
    mask = os.umask(0o027)
    try:
        with fs.create(root / "new", 1) as new:
            new.commit()
    finally:
        os.umask(mask)
    assert (root / "new").stat().st_mode & 0o777 == 0o640


# The kernel's page cache


CACHESTAT = 451


def cached_pages(fd: int) -> int:
    """How many pages of a file the kernel has in its page cache, as cachestat(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    if libc.syscall(CACHESTAT, fd, whole, found, 0):
        pytest.skip(f"no cachestat here: {os.strerror(ctypes.get_errno())}")
    return int(found[0])


def test_no_page_of_the_kernels_page_cache_is_used(fs: pmemfs.Mount, root: Path) -> None:
    write_file(root / "file", 4096)
    # To open a file empties its cache, so it is open all the time.
    with open(root / "file", "rb") as file:
        whole = fs.map(root / "file", mode="r+")
        whole += 1
        assert whole.sum()
        assert cached_pages(file.fileno()) == 0
        # A figure that is zero whatever happens would prove nothing.
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        assert mapped[FRAME * 7] == whole[FRAME * 7]
        assert cached_pages(file.fileno()) > 0
        mapped.close()
