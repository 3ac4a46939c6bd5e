"""An end of a copy reads and writes any range, by direct I/O as far as blocks are whole."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.client.transfer import BLOCK_BYTES, End, Route
from pmemfs.errors import NotDirect
from pmemfs.units import MIB

SIZE_BYTES = 6 * BLOCK_BYTES + 123


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """An offset and a length, which may reach behind the end of the file."""
    near = st.integers(0, 8).map(lambda block: block * BLOCK_BYTES)
    start = draw(near | st.integers(0, SIZE_BYTES + 2 * BLOCK_BYTES))
    return start, draw(near | st.integers(0, SIZE_BYTES))


@contextmanager
def end_of(content: bytes, *, insists: bool = True) -> Iterator[End]:
    """An end that is a file of a disk."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield End(file.name, file.fileno(), Route(insists=insists))


def buffer_for(start: int, length: int) -> memoryview:
    """A buffer that lies in its page as a range lies in its block, as pages of a file do."""
    within = start % BLOCK_BYTES
    return memoryview(mmap.mmap(-1, within + length + 1))[within : within + length]


@given(ranges())
def test_any_range_is_read_as_far_as_the_file_goes(wanted: tuple[int, int]) -> None:
    start, length = wanted
    content = os.urandom(SIZE_BYTES)
    view = buffer_for(start, length)
    with end_of(content) as end:
        assert end.read(view, start) == len(content[start : start + length])
        assert (
            bytes(view[: len(content) - start if start < len(content) else 0])
            == content[start : start + length]
        )


@given(st.lists(ranges(), max_size=5))
def test_any_range_is_written(wanted: list[tuple[int, int]]) -> None:
    content = bytearray(os.urandom(SIZE_BYTES))
    with end_of(content) as end:
        for start, length in wanted:
            view = buffer_for(start, length)
            view[:] = os.urandom(length)
            end.write(view, start)
            if length:
                content.extend(bytes(max(0, start + length - len(content))))
                content[start : start + length] = view
        assert Path(end.path).read_bytes() == content


@pytest.mark.parametrize(("start", "length", "is_direct"), [
    (0, BLOCK_BYTES, True), (BLOCK_BYTES - 1, BLOCK_BYTES + 1, True),
    (0, BLOCK_BYTES - 1, False), (1, BLOCK_BYTES, False),
])  # fmt: skip
def test_whole_blocks_alone_are_direct(start: int, length: int, is_direct: bool) -> None:
    with end_of(bytes(SIZE_BYTES)) as end:
        end.read(buffer_for(start, length), start)
        assert end.was_direct is is_direct


def test_memory_that_does_not_fit_costs_the_page_path_and_no_byte() -> None:
    content = os.urandom(SIZE_BYTES)
    view = buffer_for(1, BLOCK_BYTES)
    with end_of(content, insists=False) as end:
        assert end.read(view, 0) == BLOCK_BYTES
        if end.was_direct:
            pytest.skip("this file system takes memory of any alignment")
        assert bytes(view) == content[:BLOCK_BYTES]
        assert "EINVAL" in end._route.why
        assert end.read(buffer_for(0, MIB), 0) == SIZE_BYTES, "it goes on"
    with end_of(content) as end, pytest.raises(NotDirect, match="EINVAL"):
        end.read(view, 0)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_WRONLY)
    try:
        end = End(str(path), fd, Route(insists=False))
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            end.read(buffer_for(0, 1), 0)
        assert (caught.value.errno, caught.value.filename) == (errno.EBADF, str(path))
    finally:
        os.close(fd)
