"""dd against the device of a mount, as a user tries it first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.commands import Result, run_command
from kit.mounts import ENGINES, Mounted, pool_maker
from pmemfs.units import MIB

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def mounted(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mount that the tests of this file share: each leaves it as usable as it was."""
    with pool_maker(request.param) as pools:
        yield pools.mount(pools.create(size="32M"))


def dd(source: Path | str, target: Path, *words: object) -> Result:
    return run_command("dd", f"if={source}", f"of={target}", *words)


@pytest.mark.parametrize("flags", [(), ("oflag=direct",), ("oflag=sync",)])
def test_what_dd_writes_is_read_back_and_the_rest_stays(
    mounted: Mounted, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    expected = bytearray(mounted.device.read_bytes())
    direct = ("iflag=direct",) if "oflag=direct" in flags else ()
    data, back = tmp_path / "data", tmp_path / "back"
    for seek, conv in enumerate([(), ("conv=notrunc",), ("conv=notrunc,fsync",)], start=3):
        data.write_bytes(os.urandom(8 * MIB))
        done = dd(data, mounted.device, "bs=1M", f"seek={seek}", *conv, *flags)
        assert done.code == 0, done.err
        assert dd(mounted.device, back, "bs=1M", f"skip={seek}", "count=8", *direct).code == 0
        assert back.read_bytes() == data.read_bytes()
        expected[seek * MIB : (seek + 8) * MIB] = data.read_bytes()
        assert mounted.device.read_bytes() == expected


@pytest.mark.parametrize("options", [(), ("conv=notrunc",), ("oflag=direct",)])
def test_dd_behind_the_end_has_no_space_left(mounted: Mounted, options: tuple[str, ...]) -> None:
    size_bytes = mounted.device.stat().st_size
    for seek in (size_bytes, size_bytes + MIB, size_bytes * 1000):
        done = dd("/dev/zero", mounted.device, "bs=4k", "count=1", f"seek={seek // 4096}", *options)
        assert done.code == 1
        assert "No space left on device" in done.err
    assert mounted.device.stat().st_size == size_bytes


def test_dd_without_a_count_fills_the_device_and_stops(mounted: Mounted, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(33 * MIB))
    # Not a divisor of the size: the last write fits in part.
    done = dd(source, mounted.device, "bs=300000")
    assert done.code == 1
    assert "No space left on device" in done.err
    size_bytes = mounted.device.stat().st_size
    assert mounted.device.read_bytes() == source.read_bytes()[:size_bytes]


def test_dd_reads_the_whole_device_and_no_more(mounted: Mounted, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert dd(mounted.device, back, "bs=300000").code == 0
    assert back.stat().st_size == mounted.device.stat().st_size
