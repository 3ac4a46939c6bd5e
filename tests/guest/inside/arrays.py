"""What programs see of the pages of a pool on persistent memory.

arrays.py fs MOUNTPOINT DISK: files of a mount of mode `fs`, as arrays and as entries of a cache,
and copies between them and a file or device that allows O_DIRECT, which loses what it has.
arrays.py block DEVICE: the file of a mount of mode `block` as an array, which is the device.
On a DAX device, set DAX_UNIT to the bytes in units of which it can be mapped.

It ends with a traceback at the first thing that isn't as it should be.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

import pmemfs
from pmemfs.client.filecopy import Manner, copy_file
from pmemfs.medium.writeback import punch_hole

FRAME = 4096
UNIT = int(os.environ.get("DAX_UNIT", "1"))
"""Above a frame: of a DAX device."""
RUN_BYTES = 126 << 20
"""The longest run of a file in a pool."""


def step(words: str) -> None:
    """Say what is looked at next."""
    print(f"-- {words}", flush=True)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something that the daemon does by itself."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def free_bytes(path: Path) -> int:
    """What a mount has free."""
    room = os.statvfs(path)
    return room.f_bfree * room.f_frsize


def random_bytes(count: int, seed: int = 1) -> np.ndarray:
    """The same ones each time."""
    return np.random.default_rng(seed).integers(0, 256, count, dtype="u1")


def refusal(call: Callable[[], object], kind: type[Exception]) -> str:
    """What a call that must fail says."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"it was not refused with {kind.__name__}")


def look_at_modes(fs: pmemfs.Mount, root: Path) -> None:
    """Read-only, read-write and private arrays."""
    step("modes r, r+ and c")
    content = random_bytes(3 * FRAME + 100)
    path = root / "modes"
    path.write_bytes(content.tobytes())
    array = fs.map("modes")
    assert np.array_equal(array, content)
    assert not array.flags.writeable
    before = path.stat().st_mtime_ns
    with fs.open("modes", mode="r+") as mapping:
        mapping.array[FRAME - 3 : FRAME + 3] = content[FRAME - 3 : FRAME + 3] = 7
        time.sleep(0.02)
        mapping.flush()
    assert np.array_equal(array, content), "what one array stores, another shows"
    assert path.read_bytes() == content.tobytes(), "what an array stores is in the file"
    assert path.stat().st_mtime_ns > before, "a flush counts as a write"
    if UNIT > FRAME:
        said = refusal(lambda: fs.map("modes", mode="c"), pmemfs.BadMapping)
        assert "a DAX device has no private mappings; copy an array of mode 'r'" in said, said
        return
    private = fs.map("modes", mode="c")
    private[:] = 9
    assert np.array_equal(array, content), "what is stored privately is in no file"


def look_at_busy_pages(fs: pmemfs.Mount, root: Path) -> None:
    """A file changes at once, and an array keeps what it was mapped with."""
    step("pages that are busy")
    content = random_bytes(16 * FRAME, seed=2)
    (root / "busy").write_bytes(content.tobytes())
    array = fs.map("busy")
    view = array[FRAME:]
    os.truncate(root / "busy", 0)
    assert pmemfs.pin_of(view).stale
    # Not before: what was mapped ahead is given back some time after the file was closed.
    free = free_bytes(root)
    (root / "other").write_bytes(bytes(16 * FRAME))
    (root / "other").unlink()
    del array
    assert np.array_equal(view, content[FRAME:])
    (root / "busy").unlink()
    assert free_bytes(root) <= free, "pages in use are not free"
    del view
    wait_until(lambda: free_bytes(root) > free, "the pages of the last view are free")


def look_at_holes(fs: pmemfs.Mount, root: Path) -> None:
    """They read as zeroes and take no room, until somebody may write to them."""
    step("holes")
    path = root / "holes"
    path.touch()
    os.truncate(path, 64 * FRAME)
    assert not fs.map("holes").any()
    assert path.stat().st_blocks == 0
    array = fs.map("holes", mode="r+")
    array[-1] = 5
    assert path.stat().st_blocks * 512 >= 64 * FRAME
    assert path.read_bytes() == bytes(64 * FRAME - 1) + b"\5"
    os.truncate(path, free_bytes(root) + (1 << 30))
    said = refusal(lambda: fs.map("holes", mode="r+"), OSError)
    assert os.strerror(errno.ENOSPC).lower() in said.lower(), said
    path.unlink()


def write_in_pieces(path: Path, content: np.ndarray) -> None:
    """Make a file whose frames do not lie side by side, by writing two files in turns."""
    other = path.with_name("between")
    with path.open("wb", buffering=0) as file, other.open("wb", buffering=0) as between:
        for at in reversed(range(0, len(content), FRAME)):
            os.pwrite(file.fileno(), content[at : at + FRAME].tobytes(), at)
            os.pwrite(between.fileno(), bytes(FRAME), at)
    other.unlink()


def look_at_units(fs: pmemfs.Mount, root: Path) -> None:
    """Pieces of a file side by side, where the memory can be mapped so, or laid out anew."""
    step("a file in pieces, and one in long runs")
    content = random_bytes(12 * FRAME, seed=3)
    write_in_pieces(root / "pieces", content)
    if UNIT > FRAME:
        said = refusal(lambda: fs.map("pieces"), pmemfs.BadMapping)
        assert "contiguous=True" in said, said
        assert f"{UNIT >> 20}MiB" in said, said
    else:
        assert np.array_equal(fs.map("pieces"), content)
    array = fs.map("pieces", contiguous=True, mode="r+")
    assert np.array_equal(array, content)
    array[-1] = content[-1] = 1
    assert (root / "pieces").read_bytes() == content.tobytes()
    if UNIT <= FRAME:
        # What follows takes seconds, and is about units.
        return
    # Longer than a run can be, so that it has two of them.
    words = (RUN_BYTES + (4 << 20)) // 8
    with fs.create("long", words, "u8") as new:
        new.array[:: FRAME // 8] = np.arange(words * 8 // FRAME, dtype="u8")
        new.commit()
    array = fs.map("long", dtype="u8", contiguous=True)
    assert np.array_equal(array[:: FRAME // 8], np.arange(len(array) * 8 // FRAME, dtype="u8"))
    with (root / "long").open("rb", buffering=0) as file:
        for frame in (0, 1, RUN_BYTES // FRAME - 1, RUN_BYTES // FRAME, words * 8 // FRAME - 1):
            assert os.pread(file.fileno(), 8, frame * FRAME) == frame.to_bytes(8, "little")
    (root / "long").unlink()


def look_at_a_cache(root: Path) -> None:
    """Entries are put, got and evicted."""
    step("a cache of tensors")
    with pmemfs.TensorCache(root / "kv", capacity=200 * FRAME) as cache:
        kept = None
        for number in range(16):
            cache.put(f"layer/{number}", np.full((20, FRAME // 4), number, "f4"))
            array = cache.get(f"layer/{number}")
            assert array is not None
            assert (array == number).all()
            kept = array if number == 3 else kept
        assert kept is not None
        assert (kept == 3).all()
        found = cache.statistics()
        assert found.evicted_count > 0
        assert found.room_bytes <= 200 * FRAME
        assert cache.keys().count("layer/3") == 1, "what is pinned is not evicted"
        assert cache.get("layer/15") is not None
        assert cache.get("layer/0") is None


def killed_child(act: Callable[[], object]) -> None:
    """Do something in another process, and kill that while it has it."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kept = act()
            os.write(writes, b".")
            signal.pause()
            del kept
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b".", "the child has failed"
    os.close(reads)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def look_at_a_killed_client(fs: pmemfs.Mount, path: Path, size_bytes: int) -> None:
    """Its pins are gone, and its stores are in the file."""
    step("a client that is killed")

    def store() -> object:
        array = fs.map(path, shape=size_bytes, mode="r+")
        array[:] = 4
        return array

    killed_child(store)
    wait_until(lambda: not fs.pins(), "the pins of a killed process are gone")
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), size_bytes, 0) == b"\4" * size_bytes


def look_at_copies(root: Path, disk: Path) -> None:
    """From a disk into pages and back, with no buffer in between."""
    step(f"copies between pages and {disk}")
    direct = Manner(insists_on_pages=True, may_replace=True, is_forced=False)
    content = random_bytes(3 << 20, seed=6).tobytes()
    disk.write_bytes(content)
    assert copy_file(str(disk), str(root / "copy"), direct).path == "pages"
    with (root / "copy").open("rb") as file:
        assert file.read(len(content)) == content
    disk.write_bytes(bytes(len(content)))
    assert copy_file(str(root / "copy"), str(disk), direct).path == "pages"
    with disk.open("rb") as file:
        assert file.read(len(content)) == content


def look_at_files(root: Path, disk: Path) -> None:
    """A mount of mode `fs`."""
    with pmemfs.connect(root) as fs:
        look_at_modes(fs, root)
        look_at_busy_pages(fs, root)
        look_at_holes(fs, root)
        look_at_units(fs, root)
        look_at_a_cache(root)
        look_at_copies(root, disk)
        (root / "killed").write_bytes(bytes(5 * FRAME))
        look_at_a_killed_client(fs, root / "killed", 5 * FRAME)


def look_at_a_device(device: Path) -> None:
    """A mount of mode `block`."""
    with pmemfs.connect(device.parent) as fs, device.open("r+b", buffering=0) as file:
        step("an array that is the device")
        content = random_bytes(6 * FRAME, seed=5)
        start = 3 * FRAME
        os.pwrite(file.fileno(), content.tobytes(), start)
        array = fs.map(device, mode="r+", offset=start, shape=len(content))
        assert np.array_equal(array, content)
        array[1] = content[1] = 77
        array.flush()
        assert os.pread(file.fileno(), len(content), start) == content.tobytes()
        step("TRIM shows in it and takes no memory from it")
        punch_hole(file.fileno(), start + FRAME, 2 * FRAME)
        assert not array[FRAME : 3 * FRAME].any()
        array[FRAME] = content[FRAME] = 5
        content[FRAME + 1 : 3 * FRAME] = 0
        assert os.pread(file.fileno(), len(content), start) == content.tobytes()
        del array
        wait_until(lambda: not fs.pins(), "the pin ends with its array")
        look_at_a_killed_client(fs, device, 2 * FRAME)


if __name__ == "__main__":
    look = {"fs": look_at_files, "block": look_at_a_device}[sys.argv[1]]
    look(*map(Path, sys.argv[2:]))
    print("arrays are as they should be")
