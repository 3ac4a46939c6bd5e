"""The kmap registry: one mapping for a frame at most, and the right bytes behind it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.bio.bio_vec import BioVec
from pmemfs.bio.kmap import KmapRegistry, Mapping
from pmemfs.errors import BadGeometry, NotInPool
from pmemfs.medium.recording import RecordingMedium
from pmemfs.pfn import FRAME_BYTES, PageGeometry, Pfn, page_to_pfn_t, pfn_to_pfn_t


def numbered(frames: int, first: int = 0) -> RecordingMedium:
    """A medium whose frames hold their number, from `first` on."""
    content = b"".join(
        n.to_bytes(4, "little") * (FRAME_BYTES // 4) for n in range(first, first + frames)
    )
    return RecordingMedium(content)


def test_a_vec_maps_to_the_bytes_of_its_frames() -> None:
    kmap = KmapRegistry()
    low, high = numbered(4), numbered(8, first=1000)
    kmap.register(Mapping(10, 4, low, 0))
    kmap.register(Mapping(14, 6, high, 2 * FRAME_BYTES))
    assert bytes(kmap.kmap(BioVec(pfn_to_pfn_t(13), 4, 8))) == (3).to_bytes(4, "little")
    view = kmap.kmap(BioVec(pfn_to_pfn_t(15), FRAME_BYTES, FRAME_BYTES - 4))
    assert bytes(view[:4]) == (1003).to_bytes(4, "little")
    assert bytes(view[4:8]) == (1004).to_bytes(4, "little")
    assert len(view) == FRAME_BYTES


def test_a_mapping_is_no_copy() -> None:
    kmap = KmapRegistry()
    medium = numbered(2)
    kmap.register(Mapping(0, 2, medium, 0))
    kmap.kmap(BioVec(pfn_to_pfn_t(1), 3, 5))[:] = b"abc"
    assert bytes(medium.read(FRAME_BYTES + 5, 3)) == b"abc"


def test_a_word_with_a_page_is_found_through_its_geometry() -> None:
    kmap = KmapRegistry()
    kmap.register(Mapping(0, 8, numbered(8), 0))
    geometry = PageGeometry(Pfn(2), page_count=6, order=0, memmap_offset_bytes=64)
    view = kmap.kmap(BioVec(page_to_pfn_t(3, geometry), 4, 0), geometry)
    assert bytes(view) == (5).to_bytes(4, "little")


@pytest.mark.parametrize(("pfn", "length"), [(9, 1), (14, 1), (13, FRAME_BYTES + 1), (0, 1)])
def test_frames_that_nobody_announced_are_not_in_the_pool(pfn: int, length: int) -> None:
    kmap = KmapRegistry()
    kmap.register(Mapping(10, 4, numbered(4), 0))
    with pytest.raises(NotInPool):
        kmap.kmap(BioVec(pfn_to_pfn_t(pfn), length, 0))


def test_a_vec_may_not_run_from_one_mapping_into_the_next() -> None:
    kmap = KmapRegistry()
    kmap.register(Mapping(0, 2, numbered(2), 0))
    kmap.register(Mapping(2, 2, numbered(2), 0))
    with pytest.raises(NotInPool):
        kmap.locate(BioVec(pfn_to_pfn_t(1), 2 * FRAME_BYTES, 0))


def test_a_withdrawn_mapping_serves_nothing_and_makes_room() -> None:
    kmap = KmapRegistry()
    mapping = Mapping(10, 4, numbered(4), 0)
    kmap.register(mapping)
    kmap.unregister(mapping)
    with pytest.raises(NotInPool):
        kmap.find(10)
    kmap.register(mapping)
    assert kmap.find(13) is mapping


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=15))
def test_overlapping_mappings_are_refused_and_all_others_found(
    wanted: list[tuple[int, int]],
) -> None:
    kmap = KmapRegistry()
    medium = numbered(1)
    owners: dict[int, Mapping] = {}
    for first, count in wanted:
        mapping = Mapping(first, count, medium, 0)
        frames = range(first, first + count)
        if any(frame in owners for frame in frames):
            with pytest.raises(BadGeometry, match="mapped already"):
                kmap.register(mapping)
        else:
            kmap.register(mapping)
            owners.update(dict.fromkeys(frames, mapping))
    for frame in range(55):
        if frame in owners:
            assert kmap.find(frame) is owners[frame]
        else:
            with pytest.raises(NotInPool):
                kmap.find(frame)
