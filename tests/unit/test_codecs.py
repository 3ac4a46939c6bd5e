"""Compression of pieces: what comes back, and what hostile pieces can't do."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from pmemfs.errors import DamagedPiece
from pmemfs.media.transform import Transformation
from pmemfs.transform.codec import Codec, codec_of
from pmemfs.units import GIB, KIB, MIB

KINDS = (Transformation.ZSTD, Transformation.LZ4)
TEXT = b"".join(b"line %d of a text that says much the same\n" % line for line in range(4000))
PIECE = TEXT[: 128 * KIB]


def codec(kind: Transformation) -> Codec:
    found = codec_of(kind)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"", b"x", PIECE, bytes(128 * KIB), os.urandom(4096)])
def test_what_was_compressed_comes_back_at_every_level(kind: Transformation, data: bytes) -> None:
    for level in range(codec(kind).MOST_LEVEL + 1):
        packed = codec(kind).compress(memoryview(data), level)
        assert codec(kind).decompress(memoryview(packed), len(data)) == data


def test_a_higher_level_takes_less_room() -> None:
    for kind in KINDS:
        sizes = [len(codec(kind).compress(PIECE, level)) for level in (0, 12)]
        assert sizes[1] < sizes[0] < len(PIECE) // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, len(PIECE) - 1, len(PIECE) + 1, 1 << 20])
def test_a_piece_of_another_length_is_damaged(kind: Transformation, length: int) -> None:
    with pytest.raises(DamagedPiece):
        codec(kind).decompress(codec(kind).compress(PIECE, 0), length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_that_is_cut_off_or_goes_on_is_damaged(kind: Transformation) -> None:
    packed = codec(kind).compress(PIECE, 0)
    for wrong in (b"", packed[:1], packed[:-1], packed + b"\0", packed + packed):
        with pytest.raises(DamagedPiece):
            codec(kind).decompress(wrong, len(PIECE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scribbled_piece_gives_as_many_bytes_as_were_asked_for_or_an_error(
    kind: Transformation,
) -> None:
    chance = random.Random(kind)
    packed = codec(kind).compress(PIECE, 0)
    for _ in range(2000):
        wrong = bytearray(packed)
        for _ in range(chance.randint(1, 8)):
            wrong[chance.randrange(len(wrong))] = chance.randrange(256)
        with suppress(DamagedPiece):
            assert len(codec(kind).decompress(wrong, len(PIECE))) == len(PIECE)


CLAIMS = """
import resource
from pmemfs.errors import DamagedPiece
from pmemfs.transform.zstd import decompress
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
try:
    decompress(bytes.fromhex("{frame}"), 131072)
except DamagedPiece as error:
    print(error)
"""


def test_a_frame_that_claims_a_terabyte_allocates_nothing() -> None:
    # A single segment with a content size of 8 bytes, and then one empty last block.
    frame = bytes.fromhex("28b52ffd") + b"\xe0" + (1 << 40).to_bytes(8, "little") + b"\1\0\0"
    words = CLAIMS.format(limit=GIB, frame=frame.hex())
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert "claims" in done.stdout


def test_a_frame_with_a_window_of_terabytes_allocates_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frame = bytes.fromhex("28b52ffd") + b"\x80\xff" + (128 * KIB).to_bytes(4, "little") + b"\1\0\0"
    with pytest.raises(DamagedPiece):
        codec(Transformation.ZSTD).decompress(frame, 128 * KIB)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * MIB // KIB


@pytest.mark.parametrize("kind", KINDS)
def test_threads_compress_side_by_side(kind: Transformation) -> None:
    wrong = []

    def run(seed: int) -> None:
        data = random.Random(seed).randbytes(64) * 1024
        for _ in range(50):
            packed = codec(kind).compress(data, 1)
            if codec(kind).decompress(packed, len(data)) != data:
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [Transformation.NONE, Transformation.XTS, 4, 255])
def test_what_is_no_compression_has_no_codec(kind: int) -> None:
    assert codec_of(kind) is None


LOADED = "import sys, pmemfs.transform.{name}; print(*sys.modules)"


@pytest.mark.parametrize("name", ["codec", "zstd", "lz4"])
def test_libraries_are_loaded_at_first_use_only(name: str) -> None:
    words = [sys.executable, "-P", "-c", LOADED.format(name=name)]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert not {"zstandard", "lz4"} & set(loaded)
