"""100,000 labels that nobody wrote: each is refused with a sentence, or works."""

from __future__ import annotations

import random
import struct

import pytest

from kit.pools import SMALL_BYTES, MemoryMedium, small_pool, some_label
from pmemfs.errors import InvalidLabel, InvalidPool, PmemfsError, ReadOnlyPool
from pmemfs.media.label import LAYOUT, Label, Mode, Scheme, State, checksum, pack, validate
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES, PAGE_SIZES_BYTES, compute_zones
from pmemfs.pool import Pool

LABELS = 100_000
_CHECKSUM_AT = LAYOUT.offset_of("checksum")
_NUMBERS = (0, 1, 2, 3, 63, 64, 4095, 4096, 8192, 1 << 16, 1 << 21, 1 << 30, 1 << 62, (1 << 62) + 1,
            (1 << 63) - 4096, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)  # fmt: skip
# Most labels end at a number, so that whole words are what is worth mutating.
_WRITTEN_BYTES = LAYOUT.offset_of("reserved")


def flip_bits(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        bit = rng.randrange(8 * (_WRITTEN_BYTES if rng.random() < 0.9 else LABEL_BYTES))
        raw[bit // 8] ^= 1 << bit % 8


def set_fields(raw: bytearray, rng: random.Random) -> None:
    """Fields become numbers where things tend to break."""
    for field in rng.sample(LAYOUT.fields, rng.randint(1, 3)):
        number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)
        value = (number & ((1 << 64) - 1)).to_bytes(8, "little") * (field.size_bytes // 8 + 1)
        raw[field.offset_bytes : field.offset_bytes + field.size_bytes] = value[: field.size_bytes]


def splice_fields(raw: bytearray, rng: random.Random) -> None:
    """Bytes of one place turn up at another."""
    length = rng.choice((1, 2, 4, 8, 16, 64))
    source, target = (rng.randrange(_WRITTEN_BYTES - length) for _ in range(2))
    raw[target : target + length] = raw[source : source + length]


def tell_another_geometry(raw: bytearray, rng: random.Random) -> None:
    """A consistent lie: zones that do follow, from numbers that this medium does not have."""
    page_size_bytes = rng.choice(PAGE_SIZES_BYTES)
    features = rng.choice((0, 1))
    geometry = {
        "pool_size_bytes": rng.choice(
            (SMALL_BYTES, SMALL_BYTES // 2, SMALL_BYTES + 4096, 1 << rng.randint(12, 63))
        ),
        "page_size_bytes": page_size_bytes,
        "alignment_bytes": page_size_bytes << rng.randint(0, 3),
        "scheme": rng.choice(list(Scheme)),
        "incompatible_features": features,
    }
    try:
        zones = compute_zones(
            geometry["pool_size_bytes"],
            page_size_bytes=page_size_bytes,
            alignment_bytes=geometry["alignment_bytes"],
            memmap_in_pool=geometry["scheme"] == Scheme.PMEM,
            memmap_behind_data=bool(features),
        )
    except PmemfsError:
        zones = _ZONES
    geometry |= {
        "memmap_offset_bytes": zones.memmap.offset_bytes,
        "memmap_size_bytes": zones.memmap.size_bytes,
        "data_offset_bytes": zones.data.offset_bytes,
        "data_size_bytes": zones.data.size_bytes,
    }
    raw[:] = LAYOUT.pack(replace(LAYOUT.unpack(raw), **geometry))  # type: ignore[arg-type]


_ZONES = some_label().zones
MUTATIONS = (flip_bits, set_fields, splice_fields, tell_another_geometry)


def mutated(original: bytes, rng: random.Random) -> bytes:
    raw = bytearray(original)
    for _ in range(rng.randint(1, 2)):
        rng.choice(MUTATIONS)(raw, rng)
    if rng.random() < 0.9:
        struct.pack_into("<I", raw, _CHECKSUM_AT, checksum(bytes(raw)))
    return bytes(raw)


def works(label: Label, raw: bytes, blank: bytes) -> bool:
    """Whether a pool with this label in both copies can be mounted; refused in a sentence else."""
    zones = label.zones
    assert zones.data.size_bytes == label.data_size_bytes > 0
    assert Scheme(label.scheme).word
    assert Mode(label.mode).word
    assert State(label.state).word
    medium = MemoryMedium(raw + blank[LABEL_BYTES:-LABEL_BYTES] + raw)
    try:
        pool = Pool.open(medium)
        pool.begin_mount()
        assert pool.page_geometry.page_count > 0
        pool.end_mount()
    except (InvalidPool, ReadOnlyPool, InvalidLabel):
        return False
    reopened = Pool.open(MemoryMedium(medium.read(0, medium.size_bytes)))
    assert reopened.label.generation == label.generation % ((1 << 64) - 1) + 1
    return True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_100_000_mutated_labels_are_refused_with_a_sentence_or_work() -> None:
    rng = random.Random(2015)
    blank = bytes(SMALL_BYTES)
    originals = [pack(small_pool(scheme).label) for scheme in Scheme]
    outcomes = {"works": 0, "valid, and the pool refused": 0}
    for _ in range(LABELS):
        raw = mutated(rng.choice(originals), rng)
        try:
            label = validate(raw)
        except InvalidLabel as refusal:
            sentence = str(refusal)
            assert 15 < len(sentence) < 800
            assert sentence.isprintable()
            assert sentence.startswith("it")
            step = " ".join(sentence.split()[:3])
            outcomes[step] = outcomes.get(step, 0) + 1
            continue
        assert label.zones.data.size_bytes == label.data_size_bytes > 0
        # Mounting takes longer than all the rest, and a quarter of them is thousands.
        if rng.random() < 0.25:
            outcome = "works" if works(label, raw, blank) else "valid, and the pool refused"
            outcomes[outcome] += 1
    print(outcomes)
    # Were all refused at the first step, this test would have looked at one step only.
    assert len(outcomes) > 10
    assert outcomes["works"] > LABELS // 100
    assert outcomes["valid, and the pool refused"] > LABELS // 1000


@pytest.mark.parametrize("field", [field.name for field in LAYOUT.fields])
@pytest.mark.parametrize("number", _NUMBERS)
def test_a_field_at_an_extreme_is_refused_or_works(field: str, number: int) -> None:
    raw = bytearray(pack(some_label()))
    stored = next(f for f in LAYOUT.fields if f.name == field)
    value = number.to_bytes(8, "little") * (stored.size_bytes // 8 + 1)
    raw[stored.offset_bytes : stored.offset_bytes + stored.size_bytes] = value[: stored.size_bytes]
    if field != "checksum":
        struct.pack_into("<I", raw, _CHECKSUM_AT, checksum(bytes(raw)))
    try:
        label = validate(raw)
    except InvalidLabel:
        return
    works(label, bytes(raw), bytes(SMALL_BYTES))
