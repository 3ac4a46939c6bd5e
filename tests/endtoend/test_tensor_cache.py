"""A cache of arrays in the pool: what one process puts, all of them get, whole or not at all."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.cache_processes import KEYS, holding, is_whole, made_up, start_random
from kit.commands import pmemfs_ok
from kit.descriptors import open_before, open_descriptors
from kit.documents import ROOT, blocks
from kit.fs_mounts import FsMount
from kit.mounts import UNKEPT, Engine, Mounted, PoolMaker, native_only
from kit.processes import is_running, stopped, wait_until
from pmemfs import TensorCache, connect, pin_of
from pmemfs.client import cacheroom
from pmemfs.client.cacheroom import LEDGER_NAME
from pmemfs.client.unnamed import HIDDEN_PREFIX
from pmemfs.errors import (
    BadArray,
    BadCache,
    BadEntry,
    BadKey,
    BadSize,
    CacheFull,
    Closed,
    DaemonGone,
    NoPageStructures,
    NotMounted,
)
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@pytest.fixture
def cache(root: Path) -> Iterator[TensorCache]:
    """A cache in an empty directory, with each engine."""
    with TensorCache(root / "kv") as made:
        yield made


def entry(number: int, size_bytes: int = MIB - 4096) -> np.ndarray[Any, Any]:
    """An array that takes a round size with its header."""
    return np.full(size_bytes // 8, number, "u8")


def others(cache: TensorCache) -> TensorCache:
    """The same cache, as another process has it that starts now."""
    return TensorCache(cache.directory, capacity=cache.capacity_bytes)


def requests(mounted: Mounted) -> int:
    """How many requests of the kernel a mount has answered."""
    report = json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))
    return sum(operation["requests"] for operation in report["operations"].values())


# One entry


def test_what_was_put_is_got_as_a_read_only_array_over_pinned_pages(cache: TensorCache) -> None:
    given = np.arange(12, dtype="f4").reshape(3, 4)
    cache.put("layer0/prefix9", given)
    found = cache.get("layer0/prefix9")
    assert found is not None
    assert (found.dtype, found.shape) == (given.dtype, given.shape)
    np.testing.assert_array_equal(found, given)
    assert not pin_of(found[1:]).stale
    assert not found.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        found.flags.writeable = True
    assert cache.get("layer0") is None
    assert cache.keys() == ["layer0/prefix9"]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (700, 900)], ids=str)
def test_an_array_of_any_shape_is_an_entry(cache: TensorCache, shape: tuple[int, ...]) -> None:
    given = np.asarray(np.random.default_rng(1).random(shape))
    cache.put("a", given)
    found = others(cache).get("a")
    assert found is not None
    np.testing.assert_array_equal(found, given)


def test_arrays_that_lie_in_another_order_are_stored_in_rows(cache: TensorCache) -> None:
    given = np.arange(60, dtype=">i4").reshape(3, 4, 5).transpose(2, 0, 1)[::-1]
    cache.put("a", given)
    found = cache.get("a")
    assert found is not None
    assert found.flags.c_contiguous
    assert found.dtype == "<i4"
    np.testing.assert_array_equal(found, given)


def test_the_safetensors_package_reads_an_entry_and_writes_one(cache: TensorCache) -> None:
    package = pytest.importorskip("safetensors.numpy")
    cache.put("a/b", entry(3))
    file = Path(cache.directory) / "a/b.safetensors"
    np.testing.assert_array_equal(package.load_file(file)["a/b"], entry(3))
    package.save_file({"weights": entry(4)}, Path(cache.directory) / "model.safetensors")
    found = cache.get("model")
    assert found is not None
    np.testing.assert_array_equal(found, entry(4))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_of_machine_learning_are_kept(cache: TensorCache, name: str) -> None:
    types = pytest.importorskip("ml_dtypes")
    given = np.arange(6).astype(getattr(types, name))
    cache.put("a", given)
    found = cache.get("a")
    assert found is not None
    assert found.dtype == given.dtype
    np.testing.assert_array_equal(found.astype("f4"), given.astype("f4"))


def test_a_type_that_needs_a_package_that_is_not_here_is_refused_with_a_sentence(
    cache: TensorCache,
) -> None:
    types = pytest.importorskip("ml_dtypes")
    cache.put("a", np.arange(6).astype(types.bfloat16))
    code = (
        "import sys, pmemfs\n"
        "sys.modules['ml_dtypes'] = None\n"
        "try: pmemfs.TensorCache(sys.argv[1]).get('a')\n"
        "except pmemfs.NeedsPackage as error: print(error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code, cache.directory], text=True)
    assert said.startswith(f"{cache.directory}/a.safetensors, with elements of type BF16, needs ")
    assert said.endswith("'pip install ml_dtypes' installs it\n")


def test_a_file_that_is_no_entry_is_refused_with_a_sentence(cache: TensorCache) -> None:
    (Path(cache.directory) / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadEntry, match=r"x\.safetensors is not the entry of a cache: it has no he"):
        cache.get("x")
    assert cache.delete("x")
    assert cache.get("x") is None


def test_what_can_be_no_entry_is_refused_and_leaves_nothing(cache: TensorCache) -> None:
    with pytest.raises(BadKey, match="more than 255"):
        cache.put("k" * 300, entry(1))
    with pytest.raises(BadArray, match="type complex128"):
        cache.put("k", np.zeros(3, complex))
    with pytest.raises(BadKey):
        cache.get("k" * 300)
    assert cache.keys() == []


# The entry of a key changes


def test_a_repeated_get_asks_nobody(
    file_system: tuple[Engine, Mounted], cache: TensorCache
) -> None:
    _, mounted = file_system
    cache.put("a", entry(1))
    assert cache.get("a") is not None
    with stopped(mounted.pid):
        # No array has kept it mapped meanwhile.
        found = cache.get("a")
        assert found is not None
        np.testing.assert_array_equal(found, entry(1))
    assert cache.statistics().hits == 1
    assert cache.statistics().first_gets == 1


@native_only
def test_a_first_get_makes_no_request_of_the_kernel(
    file_system: tuple[Engine, Mounted], cache: TensorCache
) -> None:
    _, mounted = file_system
    cache.put("b", entry(2))
    numbers = itertools.count()

    def requests_of_a_first_get() -> int:
        # One that the kernel has never heard of in this cache.
        key = str(next(numbers))
        cache.put(key, entry(1))
        another = others(cache)
        assert another.get("b") is not None
        before = requests(mounted)
        assert another.get(key) is not None
        return requests(mounted) - before

    # The kernel says a moment later that a file was closed, and this may come in between.
    wait_until(lambda: requests_of_a_first_get() == 0, "a first get makes none")


def test_an_entry_that_another_one_replaces_is_got_from_then_on(cache: TensorCache) -> None:
    cache.put("a", entry(1))
    before = cache.get("a")
    others(cache).put("a", entry(2, 9000))
    after = cache.get("a")
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(before, entry(1))
    np.testing.assert_array_equal(after, entry(2, 9000))


def test_an_entry_that_another_one_deletes_is_gone_and_its_arrays_are_not(
    cache: TensorCache,
) -> None:
    cache.put("a", entry(1))
    before = cache.get("a")
    assert others(cache).delete("a")
    assert cache.get("a") is None
    assert not cache.delete("a")
    others(cache).put("b", entry(2))
    assert before is not None
    np.testing.assert_array_equal(before, entry(1))


def test_a_file_that_has_lost_its_name_before_it_is_pinned_is_never_taken_for_the_entry(
    root: Path,
) -> None:
    path = root / "file"
    path.write_bytes(bytes(8192))
    with connect(root) as fs, fs._connection.opened(path, writable=False) as inode:
        path.unlink()
        answer = fs._connection.pin([(inode, 0, -1)], ["file"], writable=False, contiguous=False)
        assert answer.pool.words.read(answer.place)


# Entries in the making


def test_a_reserved_entry_is_filled_in_place_and_appears_with_the_commit(
    cache: TensorCache,
) -> None:
    with cache.reserve("a", (4, 1000), "f4") as reserved:
        assert not reserved.array.any()
        reserved.array[1:] = 7
        assert others(cache).get("a") is None
        reserved.commit()
        found = others(cache).get("a")
        with pytest.raises(Closed):
            reserved.commit()
    assert found is not None
    assert found.sum() == 7 * 3000


def test_without_a_commit_nothing_remains(cache: TensorCache) -> None:
    cache.put("a", entry(1))
    with cache.reserve("a", 1000, "u1") as reserved:
        reserved.array[:] = 1
    reserved = cache.reserve("b/c", 1000, "u1")
    reserved.close()
    found = cache.get("a")
    assert found is not None
    np.testing.assert_array_equal(found, entry(1))
    assert cache.keys() == ["a"]
    assert not list(Path(cache.directory).rglob(f"{HIDDEN_PREFIX}*"))


def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_makes_is_not(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cacheroom, "_LEFT_BEHIND_SECONDS", -1)
    directory = Path(cache.directory)
    left = directory / "layer0" / f"{HIDDEN_PREFIX}0123"
    left.parent.mkdir()
    left.write_bytes(b"left")
    making = directory / f"{HIDDEN_PREFIX}4567"
    making.write_bytes(bytes(8192))
    kept = directory / ".mine"
    kept.write_bytes(b"mine")
    with connect(directory) as fs:
        in_use = fs.map(making, mode="r+")
        (directory / LEDGER_NAME).unlink()
        assert others(cache).statistics().entry_count == 0
        assert (left.exists(), making.exists(), kept.exists()) == (False, True, True)
        del in_use


# Room


def entries_of(cache: TensorCache) -> list[str]:
    return others(cache).keys()


def test_the_entry_whose_pages_were_accessed_the_longest_ago_goes_first(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="4MiB")
    for key in "abcd":
        cache.put(key, entry(1))
    # Another process reads one, and another program reads one without pmemfs.
    assert others(cache).get("a") is not None
    (root / "kv/b.safetensors").read_bytes()
    cache.put("e", entry(1))
    assert entries_of(cache) == ["a", "b", "d", "e"]
    # This one would have been next.
    assert others(cache).get("d") is not None
    cache.put("f", entry(1, 2 * MIB - 4096))
    assert entries_of(cache) == ["d", "e", "f"]
    assert cache.statistics().evicted_count == 3
    assert cache.statistics().room_bytes == 4 * MIB


def test_what_only_this_process_knows_to_be_used_goes_in_its_turn(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="4MiB")
    for key in "abcd":
        cache.put(key, entry(1))
    assert cache.get("a") is not None
    assert others(cache).get("b") is not None
    # This one asks nobody, so that no page structure knows of it.
    assert cache.get("a") is not None
    assert cache.statistics().hits == 1
    for key, left in zip("efghi", ["abde", "abef", "aefg", "efgh", "fghi"], strict=True):
        cache.put(key, entry(1))
        assert entries_of(cache) == list(left)


def test_an_entry_that_any_process_has_pinned_is_never_evicted(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="4MiB")
    for number in range(3):
        cache.put(f"held{number}", entry(number))
    with holding(root / "kv", "held0", "held1"):
        here = cache.get("held2")
        for number in range(6):
            cache.put(f"new{number}", entry(number))
        assert entries_of(cache) == ["held0", "held1", "held2", "new5"]
        mine = cache.get("new5")
        with pytest.raises(CacheFull, match=r"no room for 1MiB in the cache .* is in use"):
            cache.put("more", entry(9))
        del mine
        cache.put("more", entry(9))
    assert here is not None
    np.testing.assert_array_equal(here, entry(2))
    for number in range(3):
        cache.put(f"last{number}", entry(number))
    assert entries_of(cache) == ["held2", "last0", "last1", "last2"]


def test_what_is_larger_than_the_capacity_evicts_nothing(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="2MiB")
    cache.put("a", entry(1))
    with pytest.raises(CacheFull, match="its capacity is 2MiB"):
        cache.put("b", entry(1, 2 * MIB))
    assert entries_of(cache) == ["a"]


def test_what_replaces_an_entry_needs_no_room_beside_it_afterwards(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="4MiB")
    for number in range(9):
        cache.put("a", entry(number))
    assert cache.statistics().room_bytes == MIB
    assert cache.statistics().evicted_count == 0


def test_all_processes_add_to_one_count(root: Path) -> None:
    caches = [TensorCache(root / "kv", capacity="4MiB") for _ in range(3)]
    for number in range(12):
        caches[number % 3].put(f"{number}", entry(number))
        held = sum(file.stat().st_size for file in (root / "kv").glob("*.safetensors"))
        assert held <= 4 * MIB
    assert caches[0].statistics()[:2] == (4, 4 * MIB)
    # A count that is lost is made again.
    (root / "kv" / LEDGER_NAME).unlink()
    assert caches[1].statistics()[:2] == (4, 4 * MIB)
    (root / "kv" / LEDGER_NAME).write_bytes(b"anything" * 4)
    assert caches[2].statistics()[:2] == (4, 4 * MIB)


def test_a_count_that_is_wrong_is_mended_before_long(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cacheroom, "_LOOK_AGAIN_BYTES", 2 * MIB)
    cache = TensorCache(root / "kv", capacity="8MiB")
    for key in "abc":
        shutil.copy(Path(__file__), root / "kv/copied.safetensors")
        cache.put(key, entry(1))
        # What nobody has added is subtracted.
        assert cache.delete("copied")
    assert cache.statistics()[:2] == (3, 3 * MIB)


def test_directories_without_entries_go(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity="2MiB")
    for number in range(5):
        cache.put(f"request{number}/layer0", entry(number))
    assert cache.delete("request4/layer0")
    (root / "kv" / LEDGER_NAME).unlink()
    assert cache.statistics().entry_count == 1
    left = sorted(path.name for path in (root / "kv").iterdir())
    assert left == [LEDGER_NAME, "request3"]


def test_a_full_pool_evicts_too(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("full", "32M", "--mode", "fs"))
    cache = TensorCache(mounted.mountpoint / "kv")
    first = None
    for number in range(60):
        cache.put(f"k{number:02}", entry(number))
        if number == 0:
            first = cache.get("k00")
    keys = cache.keys()
    assert keys[0] == "k00"
    assert keys[1:] == [f"k{number:02}" for number in range(61 - len(keys), 60)]
    assert len(keys) > 10
    assert first is not None
    np.testing.assert_array_equal(first, entry(0))
    with pytest.raises(CacheFull, match="the pool is full"):
        cache.put("huge", np.zeros(40 * MIB, "u1"))


def test_few_entries_stay_mapped_for_nothing(cache: TensorCache) -> None:
    code = (
        "import sys, resource, pmemfs\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "cache = pmemfs.TensorCache(sys.argv[1])\n"
        "for number in range(60): assert cache.get(str(number)) is not None\n"
        "print(cache.statistics().mapped_count)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "try: views = [cache.get(str(number)) for number in range(60)]\n"
        "except pmemfs.TooManyOpenFiles as error: print(error.errno)\n"
        "print(cache.get('0')[0])\n"
    )
    for number in range(60):
        cache.put(str(number), np.full(10, number))
    said = subprocess.check_output([sys.executable, "-c", code, cache.directory], text=True)
    mapped, errno, value = said.split()
    assert 20 < int(mapped) <= 50
    assert (errno, value) == ("24", "0")


# Processes and threads


def test_a_forked_child_and_a_pickled_cache_are_the_same_cache(cache: TensorCache) -> None:
    cache.put("a", entry(1))
    inherited = cache.get("a")
    assert inherited is not None
    pid = os.fork()
    if pid == 0:
        done = 1
        try:
            cache.put("b", entry(2))
            found = cache.get("b")
            done = int(found is None or found[0] != 2 or inherited[0] != 1)
        finally:
            os._exit(done)
    assert os.waitpid(pid, 0)[1] == 0
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        workers.apply(cache.put, ("c", entry(3)))
    assert [cache.get(key)[0] for key in "abc"] == [1, 2, 3]  # type: ignore[index]
    assert pickle.loads(pickle.dumps(cache)).keys() == ["a", "b", "c"]


def test_threads_use_one_cache(root: Path) -> None:
    cache = TensorCache(root / "kv", capacity=6 * MIB)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        randomly = random.Random(seed)
        try:
            for _ in range(60):
                key = randomly.choice(KEYS)
                if randomly.randrange(3):
                    found = cache.get(key)
                    assert found is None or is_whole(key, found)
                else:
                    cache.put(key, made_up(key, randomly.getrandbits(32)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    held = sum(file.stat().st_size for file in (root / "kv").rglob("*.safetensors"))
    assert held <= 6 * MIB


def test_a_cache_that_is_closed_says_so_and_its_arrays_stay(cache: TensorCache) -> None:
    cache.put("a", entry(1))
    found = cache.get("a")
    cache.close()
    for call in (cache.get, cache.delete):
        with pytest.raises(Closed):
            call("a")
    with pytest.raises(Closed):
        cache.put("a", entry(1))
    assert found is not None
    assert found[0] == 1
    assert repr(cache).endswith("closed>")


def test_a_cache_that_is_dropped_leaves_nothing_open(cache: TensorCache) -> None:
    before = len(open_before())
    for _ in range(5):
        other = others(cache)
        other.put("a", entry(1))
        assert other.get("a") is not None
    del other
    assert len(open_descriptors()) == before


def test_entries_of_killed_processes_are_whole_or_not_there(pools: PoolMaker) -> None:
    randomly = random.Random(14)
    with FsMount.made(pools, "128M") as mount:
        directory = mount.directory / "kv"
        directory.mkdir()
        living = [start_random(directory, seed, 12 * MIB) for seed in range(3)]
        try:
            cache = TensorCache(directory)
            for seed in range(3, 9):
                victim = living.pop(0)
                with pytest.raises(subprocess.TimeoutExpired):
                    victim.wait(0.2 + randomly.random() / 2)
                victim.kill()
                victim.wait()
                living.append(start_random(directory, seed, 12 * MIB))
                for key in KEYS:
                    found = cache.get(key)
                    assert found is None or is_whole(key, found)
                found = None
        finally:
            for process in living:
                process.send_signal(signal.SIGKILL)
                process.wait()
        cache.close()
        with connect(directory) as fs:
            wait_until(lambda: fs.pins() == [], "the pins of the killed are gone")
        mount.restart("kill daemon")
        with TensorCache(directory) as cache:
            keys = cache.keys()
            for key in keys:
                found = cache.get(key)
                assert found is not None
                assert is_whole(key, found)
            found = None
            assert cache.statistics().entry_count == len(keys)
        mount.check()


# Mounts


def test_entries_survive_a_new_mount(pools: PoolMaker) -> None:
    with FsMount.made(pools, "64M") as mount:
        cache = TensorCache(mount.directory / "kv", capacity="3MiB")
        for key in "ab":
            cache.put(key, entry(ord(key)))
        (mount.directory / "kv" / LEDGER_NAME).write_bytes(b"")
        cache.put("c", entry(ord("c")))
        for number, how in enumerate(["kill daemon", "remount"]):
            cache.close()
            mount.restart(how)
            cache = TensorCache(mount.directory / "kv", capacity="3MiB")
            assert cache.statistics()[:2] == (3, 3 * MIB)
            for key in "bc":
                found = cache.get(key)
                assert found is not None
                np.testing.assert_array_equal(found, entry(ord(key)))
            found = None
            cache.put(f"d{number}", entry(number))
            assert cache.keys() == ["b", "c", f"d{number}"]
        cache.close()
        mount.check()


def test_a_read_only_mount_has_entries_to_get(pools: PoolMaker) -> None:
    pool = pools.create("files", "64M", "--mode", "fs")
    mounted = pools.mount(pool)
    with TensorCache(mounted.mountpoint / "kv") as cache:
        cache.put("a", entry(1))
    pools.umount(mounted)
    mounted = pools.mount(pool, "-o", "ro")
    with TensorCache(mounted.mountpoint / "kv") as cache:
        found = cache.get("a")
        assert found is not None
        np.testing.assert_array_equal(found, entry(1))
        assert cache.statistics()[:2] == (1, MIB)
        for change in (lambda: cache.put("b", entry(2)), lambda: cache.delete("a")):
            with pytest.raises(OSError, match="Read-only file system"):
                change()


def test_when_the_daemon_dies_arrays_stay_and_calls_say_so(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("files", "64M", "--mode", "fs"), *UNKEPT)
    cache = TensorCache(mounted.mountpoint / "kv", capacity="2MiB")
    cache.put("a", entry(1))
    cache.put("b", entry(2))
    found = cache.get("a")
    pid, data_plane = mounted.pid, mounted.data_plane_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "the daemon has ended")
    # Until then the kernel has its answers from this one.
    wait_until(lambda: not is_running(data_plane), "so has the data plane")
    again = cache.get("a")
    assert found is not None
    assert again is not None
    np.testing.assert_array_equal(found, again)
    for call in (
        lambda: cache.get("b"), lambda: cache.put("c", entry(3)), lambda: cache.delete("b"),
        cache.keys, cache.statistics, lambda: cache.reserve("d", 1, "u1"),
    ):  # fmt: skip
        with pytest.raises(DaemonGone):
            call()
    cache.close()


def test_where_no_cache_can_be_is_said_in_a_sentence(pools: PoolMaker) -> None:
    with pytest.raises(NotMounted):
        TensorCache(pools.directory / "kv")
    assert not (pools.directory / "kv").exists(), "nothing is made outside of a mount"
    none = pools.mount(pools.create("none", "64M", "--mode", "fs", "--scheme", "none"))
    with pytest.raises(NoPageStructures):
        TensorCache(none.mountpoint / "kv")
    block = pools.mount(pools.create("block", "64M"))
    for directory in (block.mountpoint / "kv", block.mountpoint):
        with pytest.raises(BadCache, match=r"cannot be a cache: .*mode 'block'.* --mode fs"):
            TensorCache(directory)
    with pytest.raises(BadSize):
        TensorCache(none.mountpoint, capacity="much")


def test_the_example_of_the_documents_runs(cache: TensorCache) -> None:
    (example,) = blocks(ROOT / "docs/tensor-cache.md", "python")
    assert "/mnt/pmem/kv" in example
    exec(example.replace("/mnt/pmem/kv", cache.directory), {"print": lambda *said: None})
    assert cache.keys() == ["layer1/prefix9"]


# Against a model

KEYS_OF_MODEL = st.sampled_from(["a", "b/c", "b", "..", "", "x.safetensors/y"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "reserve", "get", "delete", "begin anew"]),
        KEYS_OF_MODEL,
        st.integers(0, 20000),
    ),
    max_size=20,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=15,
    deadline=None,
)
@given(steps=STEPS)
def test_it_is_a_dictionary_of_arrays(pools: PoolMaker, steps: list[tuple[str, str, int]]) -> None:
    mounted = Mounted(pools.directory / "model", pools.directory / "mounts/of-model")
    if not mounted.pool.exists():
        pools.mount(pools.create("model", "64M", "--mode", "fs"))
    cache = TensorCache(mounted.mountpoint / "kv")
    left = cache.keys()
    for key in left:
        cache.delete(key)
    model: dict[str, np.ndarray[Any, Any]] = {}
    seen: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for step, key, count in steps:
        given = np.arange(count, count * 2, dtype="u2")
        if step == "put":
            cache.put(key, given)
            model[key] = given
        elif step == "reserve":
            with cache.reserve(key, count, "u1") as reserved:
                reserved.array[:] = 255
        elif step == "delete":
            assert cache.delete(key) == (model.pop(key, None) is not None)
        elif step == "begin anew":
            cache = others(cache)
        else:
            found = cache.get(key)
            assert (found is None) == (key not in model)
            if found is not None:
                seen.append((found, model[key]))
        assert cache.keys() == sorted(model)
    for found, expected in seen:
        np.testing.assert_array_equal(found, expected)
    rooms = [cacheroom.room_of(4096 + each.nbytes) for each in model.values()]
    assert cache.statistics()[:2] == (len(rooms), sum(rooms))
