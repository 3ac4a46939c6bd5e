"""Arrays over pages in the hands of other packages: no copy is made, and the pages stay.

Each package is the real one, and is skipped where it is not installed: all but torch belong to the
extra `dev`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.mounts import may_pass, pool_maker
from kit.processes import wait_until
from pmemfs import Mount, TensorCache, connect, pin_of

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@pytest.fixture(scope="module")
def mountpoint() -> Iterator[Path]:
    with pool_maker() as maker:
        may_pass(maker)
        yield maker.mount(maker.create("files", "64M", "--mode", "fs")).mountpoint


@pytest.fixture
def fs(mountpoint: Path) -> Iterator[Mount]:
    """A mount that nobody has pages of, before and after the test."""
    with connect(mountpoint) as mount:
        yield mount
        gc.collect()
        wait_until(lambda: mount.pins() == [], "all pins are gone")


def made(fs: Mount, name: str, array: np.ndarray[Any, Any]) -> Path:
    """A file with the content of an array."""
    with fs.create(name, array.shape, array.dtype) as new:
        new.array[...] = array
        new.commit()
    return Path(fs.mountpoint) / name


def address(array: Any) -> int:
    return int(np.asarray(array).__array_interface__["data"][0])


def cut(path: Path) -> None:
    """Take a file's pages from it. What still shows them has them pinned."""
    os.truncate(path, 0)


NUMBERS = np.arange(60_000, dtype="f8")


def test_numpy_computes_with_pages_and_its_views_keep_them(fs: Mount) -> None:
    path = made(fs, "a", NUMBERS)
    array = fs.map("a", dtype="f8")
    view = np.lib.stride_tricks.sliding_window_view(array.reshape(100, 600).T[::2], 3, axis=0)
    frombuffer = np.frombuffer(memoryview(array), "f8", count=10, offset=80)  # type: ignore[arg-type]
    assert np.shares_memory(view, array)
    del array
    cut(path)
    np.testing.assert_array_equal(view[0, 0], NUMBERS.reshape(100, 600).T[::2][:3, 0])
    np.testing.assert_array_equal(frombuffer, NUMBERS[10:20])
    assert pin_of(view).stale
    out = np.empty_like(NUMBERS)
    np.add(fs.map(made(fs, "b", NUMBERS), dtype="f8"), 1, out=out)
    np.testing.assert_array_equal(out, NUMBERS + 1)


def test_pyarrow_takes_pages_without_a_copy(fs: Mount) -> None:
    pa = pytest.importorskip("pyarrow")
    path = made(fs, "a", NUMBERS)
    array = fs.map("a", dtype="f8")
    where = address(array)
    foreign = pa.foreign_buffer(where, array.nbytes, base=array)
    buffer = pa.py_buffer(array)
    column = pa.Array.from_buffers(pa.float64(), len(array), [None, buffer])
    assert buffer.address == foreign.address == where
    assert not buffer.is_mutable
    del array, buffer
    cut(path)
    assert column.sum().as_py() == NUMBERS.sum()
    assert foreign.to_pybytes() == NUMBERS.tobytes()
    back = column.to_numpy()
    assert address(back) == where


def test_duckdb_reads_an_arrow_file_from_pages(fs: Mount) -> None:
    pa = pytest.importorskip("pyarrow")
    duckdb = pytest.importorskip("duckdb")
    path = Path(fs.mountpoint) / "table.arrow"
    table = pa.table({"number": np.arange(50_000), "half": np.arange(50_000) / 2})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=8192)
    array = fs.map(path)
    first, end = address(array), address(array) + array.nbytes
    pages = pa.ipc.open_file(pa.py_buffer(array)).read_all()
    for chunk in pages.column("number").chunks:
        assert first <= chunk.buffers()[1].address < end
    del array
    cut(path)
    with duckdb.connect() as database:
        database.register("pages", pages)
        query = "select count(*), sum(number), max(half) from pages"
        (said,) = database.execute(query).fetchall()
    assert said == (50_000, sum(range(50_000)), 49_999 / 2)


def test_duckdb_and_pyarrow_read_a_parquet_file_of_the_mount(fs: Mount) -> None:
    pa = pytest.importorskip("pyarrow")
    duckdb = pytest.importorskip("duckdb")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = Path(fs.mountpoint) / "table.parquet"
    parquet.write_table(pa.table({"number": np.arange(50_000)}), path)
    with duckdb.connect() as database:
        (row,) = database.execute("select sum(number) from read_parquet(?)", [str(path)]).fetchall()
        database.execute(f"copy (select 7 as seven) to '{fs.mountpoint}/out.parquet'")
    assert row == (sum(range(50_000)),)
    from_pages = parquet.read_table(pa.BufferReader(pa.py_buffer(fs.map(path))))
    assert from_pages.num_rows == 50_000
    assert parquet.read_table(Path(fs.mountpoint) / "out.parquet").to_pydict() == {"seven": [7]}


def test_safetensors_reads_and_writes_files_that_are_mapped(fs: Mount) -> None:
    package = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    path = Path(fs.mountpoint) / "model.safetensors"
    numpy.save_file({"a": NUMBERS, "b": NUMBERS[:7] * 2}, path)
    with package.safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_slice("a")[10:20], NUMBERS[10:20])
    content = fs.map(path)
    np.testing.assert_array_equal(numpy.load(content.tobytes())["b"], NUMBERS[:7] * 2)
    with TensorCache(path.parent / "kv") as cache:
        cache.put("a/b", NUMBERS)
        assert numpy.load_file(path.parent / "kv/a/b.safetensors").keys() == {"a/b"}


def test_zarr_keeps_an_array_on_the_mount_and_its_chunks_can_be_mapped(fs: Mount) -> None:
    zarr = pytest.importorskip("zarr")
    path = Path(fs.mountpoint) / "numbers.zarr"
    given = NUMBERS.reshape(300, 200)
    array = zarr.create_array(
        store=path, shape=given.shape, chunks=(100, 100), dtype="f8", compressors=None
    )
    array[...] = given
    found = zarr.open_array(path, mode="r+")
    np.testing.assert_array_equal(found[50:250, 30], given[50:250, 30])
    chunk = fs.map(path / "c/2/1", shape=(100, 100), dtype="f8")
    np.testing.assert_array_equal(chunk, given[200:, 100:])
    # A chunk is replaced by a rename, so what is mapped stays as it was.
    found[...] = -1.0
    np.testing.assert_array_equal(chunk, given[200:, 100:])
    assert pin_of(chunk).renamed
    assert found[299, 199] == -1


def test_dlpack_shows_the_same_pages(fs: Mount) -> None:
    path = made(fs, "a", NUMBERS)
    array = fs.map("a", dtype="f8", mode="r+")
    other = np.from_dlpack(array)
    assert address(other) == address(array)
    del array
    cut(path)
    np.testing.assert_array_equal(other, NUMBERS)


def test_torch_takes_pages_without_a_copy(fs: Mount) -> None:
    torch = pytest.importorskip("torch")
    path = made(fs, "a", NUMBERS)
    array = fs.map("a", dtype="f8", mode="r+")
    tensor, packed = torch.from_numpy(np.asarray(array)), torch.from_dlpack(array)
    assert tensor.data_ptr() == packed.data_ptr() == address(array)
    part = tensor.reshape(100, 600)[3]
    packed[0] = 42
    assert array[0] == 42
    del array, tensor
    cut(path)
    assert part.sum().item() == NUMBERS.reshape(100, 600)[3].sum()
    assert packed[0].item() == 42
    with TensorCache(Path(fs.mountpoint) / "kv") as cache:
        cache.put("a", torch.arange(12, dtype=torch.float32).reshape(3, 4))
        found = cache.get("a")
        assert found is not None
        # torch warns of arrays that it can't write to, and takes them.
        with pytest.warns(UserWarning, match="not writable"):
            assert torch.from_numpy(found).sum().item() == 66
