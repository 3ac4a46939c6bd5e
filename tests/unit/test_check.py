"""`check`: says what is wrong with what is stored, and changes nothing."""

from __future__ import annotations

import pytest

from kit.pools import SMALL_BYTES, MemoryMedium, content, small_pool
from pmemfs.errors import NotAPool
from pmemfs.media.label import Label, pack
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES
from pmemfs.pool.label_check import has_errors
from pmemfs.volume.pool_check import check_pool


def checked(first: bytes, second: bytes) -> tuple[bool, dict[str, str]]:
    """Whether there are errors, and the sentences by what they are about; nothing is written."""
    image = first + bytes(SMALL_BYTES - 2 * LABEL_BYTES) + second
    medium = MemoryMedium(image)
    medium.read_only = True
    findings = check_pool(medium)
    assert content(medium) == image
    return has_errors(findings), {finding.what: finding.sentence for finding in findings}


@pytest.fixture
def label() -> Label:
    return replace(small_pool().label, checksum=0)


def test_a_clean_pool_has_no_errors_and_names_every_zone(label: Label) -> None:
    failed, said = checked(pack(label), pack(label))
    assert not failed
    assert said["label copies"] == "agree"
    assert said["state"] == "clean"
    assert {"zone label", "zone memmap", "zone data", "zone label copy"} <= said.keys()
    assert said["zone memmap"] == f"{label.memmap_size_bytes} bytes at {label.memmap_offset_bytes}"


@pytest.mark.parametrize("damaged", [0, 1])
def test_one_damaged_copy_is_an_error_that_says_what_heals_it(label: Label, damaged: int) -> None:
    raw = [pack(label), pack(label)]
    raw[damaged] = b"\xa5" * LABEL_BYTES
    failed, said = checked(*raw)
    assert failed
    where = ("label", "label copy")[damaged]
    assert said[where].startswith("not valid: ")
    assert (
        said["label copies"] == "only one copy is valid; the next writable mount rewrites the other"
    )


def test_an_interrupted_label_write_is_no_error(label: Label) -> None:
    failed, said = checked(pack(replace(label, sequence=label.sequence + 1)), pack(label))
    assert not failed
    assert "interrupted" in said["label copies"]


def test_copies_of_different_pools_are_an_error(label: Label) -> None:
    failed, said = checked(pack(replace(label, uuid=b"another pool's  ")), pack(label))
    assert failed
    assert "different pools" in said["label copies"]


def test_one_sequence_number_with_two_contents_is_an_error(label: Label) -> None:
    failed, said = checked(pack(replace(label, mount_count=9)), pack(label))
    assert failed
    assert "differ" in said["label copies"]


def test_a_pool_that_was_not_unmounted_is_no_error(label: Label) -> None:
    pool = small_pool()
    pool.begin_mount()
    image = content(pool.medium)
    failed, said = checked(image[:LABEL_BYTES], image[-LABEL_BYTES:])
    assert not failed
    assert "not cleanly unmounted" in said["state"]


def test_a_pool_that_does_not_open_is_an_error_and_not_an_exception(label: Label) -> None:
    bad = bytearray(pack(label))
    bad[50] ^= 1
    failed, said = checked(bytes(bad), bytes(bad))
    assert failed
    assert "not a valid pool" in said["pool"]
    newer = pack(replace(label, format_version=9))
    assert "format is 9" in checked(newer, pack(label))[1]["pool"]


def test_what_is_no_pool_can_not_be_checked() -> None:
    with pytest.raises(NotAPool):
        checked(bytes(LABEL_BYTES), bytes(LABEL_BYTES))
