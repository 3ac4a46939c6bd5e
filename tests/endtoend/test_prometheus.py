"""What `pmemfs stat --prometheus` says, read by Prometheus' own parser."""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kit.caches import make_cache, new_origin
from kit.commands import BIN, pmemfs, pmemfs_ok, refused
from kit.mounts import Engine, Mounted, PoolMaker
from kit.posix import opened
from kit.processes import wait_until

pytestmark = pytest.mark.mount

PAGE = 4096
REQUESTS = "pmemfs_requests_total"


def samples(text: str) -> dict[tuple[str, str, str], float]:
    """Values by name, operation and plane."""
    return {
        (s.name, s.labels.get("operation", ""), s.labels.get("plane", "")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if "le" not in s.labels
    }


def test_counters_are_what_was_read_and_written(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        for number in range(3):
            os.pwrite(fd, bytes(PAGE), number * PAGE)
    plane = "data" if engine.name == "native" else "control"
    told: dict[tuple[str, str, str], float] = {}

    def are_counted() -> bool:
        nonlocal told
        told = told_of(mounted)
        # How long a request took is the last that a worker counts of it.
        last = "pmemfs_request_duration_seconds_count" if plane == "data" else REQUESTS
        return told.get((last, "write", "" if plane == "data" else plane), 0) >= 3

    # A worker counts a request when its caller may have been answered.
    wait_until(are_counted, "all writes are counted")
    assert told["pmemfs_up", "", ""] == 1
    assert told[REQUESTS, "write", plane] == 3
    assert told["pmemfs_moved_bytes_total", "write", plane] == 3 * PAGE
    if plane == "data":
        assert told["pmemfs_request_duration_seconds_count", "write", ""] == 3
        assert told["pmemfs_forwarded_requests_total", "write", ""] == 0
        assert told["pmemfs_forwarded_requests_total", "other", ""] > 0
        assert 0 < told["pmemfs_request_duration_seconds_sum", "write", ""] < 300


def test_of_a_cache_blocks_and_its_origin_are_counted_too(pools: PoolMaker, tmp_path: Path) -> None:
    pool = pools.directory / "cached"
    make_cache(pool, str(new_origin(tmp_path / "origin")))
    mounted = pools.mount(pool)
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x" * PAGE, 0)
        os.pread(fd, PAGE, 64 * PAGE)
    told = samples(pmemfs_ok("stat", mounted.mountpoint, "--prometheus"))
    assert told["pmemfs_cache_dirty_bytes", "", ""] == PAGE
    assert told["pmemfs_cache_misses_total", "", ""] == 1
    assert told["pmemfs_origin_read_bytes_total", "", ""] >= PAGE
    assert told["pmemfs_origin_up", "", ""] == 1


def test_scrapes_are_answered_until_the_mount_ends(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    # At an address where nobody else gets the port meanwhile.
    with socket.create_server(("127.77.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address = f"127.77.0.1:{port}"
        refusal = pmemfs("stat", mounted.mountpoint, "--listen", address)
        refused(refusal, 2, f"can't listen on {address}: Address already in use")
    words = [BIN / "pmemfs", "stat", mounted.mountpoint, "--listen", address]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        text = ""

        def is_answered() -> bool:
            nonlocal text
            try:
                with urllib.request.urlopen(f"http://{address}/metrics") as answer:
                    text = answer.read().decode()
            except OSError:
                return False
            return True

        wait_until(is_answered, "a scrape is answered")
        assert samples(text)["pmemfs_up", "", ""] == 1
        pools.umount(mounted)
        _, said = process.communicate(timeout=60)
    assert "it has ended" in said
    assert process.returncode != 0


@pytest.mark.parametrize("words", [["--json"], ["--watch"], ["--per-cpu"], ["--latency"]])
def test_one_form_excludes_the_others(words: list[str]) -> None:
    result = pmemfs("stat", "/", "--prometheus", *words)
    assert result.code == 2
    assert "--prometheus and --listen take no" in result.out + result.err


def test_what_is_compressed_and_read_again_is_counted(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create("fs0", "16M", "--mode", "fs"))
    assert not any("pieces" in name for name, _, _ in told_of(mounted))
    path = mounted.mountpoint / "file"
    path.write_bytes(b"words and words\n" * 40_000)
    assert "compressed" not in pmemfs_ok("info", mounted.mountpoint)
    pmemfs_ok("set", path, "compression=zstd")
    pmemfs_ok("rewrite", path)
    with opened(path, os.O_RDWR) as fd:
        for _ in range(3):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(fd, PAGE, 0)
        os.pwrite(fd, b"x", 3 * PAGE)
    told = told_of(mounted)
    assert told["pmemfs_compressed_pieces_total", "", ""] == 5
    assert told["pmemfs_plain_again_pieces_total", "", ""] == 1
    assert told["pmemfs_decompressed_pieces_total", "", ""] == 1
    assert told["pmemfs_piece_hits_total", "", ""] >= 1
    packed, stored = (told[f"pmemfs_{name}_bytes", "", ""] for name in ("packed", "packed_stored"))
    assert 0 < stored < packed <= 4 * 32 * PAGE
    assert told["pmemfs_saved_bytes_total", "", ""] > packed - stored
    said = pmemfs_ok("info", mounted.mountpoint)
    assert "5 pieces compressed and 1 made plain" in said
    assert f"{packed / stored:.2f} times" in said
    if engine.name == "native":
        assert told["pmemfs_forwarded_requests_total", "read", ""] > 0


def told_of(mounted: Mounted) -> dict[tuple[str, str, str], float]:
    return samples(pmemfs_ok("stat", mounted.mountpoint, "--prometheus"))
