"""The power fails at every fence and at the end of what a pool does with its label.

Legal is: during an operation, the pool opens as before or as after; once it has replied, as after,
from either copy of the label alone; and a generation that page structures may bear is never given
out again, whichever copy is left; and a pool that has grown holds zeroes where nobody has written.
The last part removes each flush and fence in turn, and asks that this very test notices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from kit.pools import SMALL_BYTES, content, small_pool, small_spec
from pmemfs.errors import InvalidPool, NotAPool
from pmemfs.media.label import Label, Scheme, pack
from pmemfs.media.layout import replace
from pmemfs.media.zones import LABEL_BYTES
from pmemfs.medium.recording import RecordingMedium
from pmemfs.pool import Pool
from pmemfs.pool.growth import Growth, heal

Meaning = Label | None
"""What an image opens as; None where it is refused as no pool, or not a valid one."""

Operation = Callable[[RecordingMedium], Pool]
SCRIBBLE = b"\xa5" * LABEL_BYTES

Meanings = tuple[Meaning, Meaning, Meaning]
"""What an image opens as; and if one or the other copy of the label is lost, too."""

_meanings: dict[bytes, Meaning] = {}
_all_meanings: dict[bytes, Meanings] = {}


def labels_of(image: bytes) -> tuple[bytes, ...]:
    """All places of an image that an open may look at: a smaller pool is half as large."""
    middle = len(image) // 2
    return image[:LABEL_BYTES], image[middle - LABEL_BYTES : middle], image[-LABEL_BYTES:]


def meaning(image: bytes) -> Meaning:
    """What the image opens as. Remembered, since an open looks at the labels only."""
    key = key_of(image)
    if key not in _meanings:
        try:
            _meanings[key] = Pool.open(RecordingMedium(image)).label
        except (InvalidPool, NotAPool):
            _meanings[key] = None
    return _meanings[key]


def key_of(image: bytes) -> bytes:
    """A test looks at so many images that their labels would fill gigabytes."""
    return blake2b(b"".join(labels_of(image)), digest_size=16).digest()


def all_meanings(image: bytes) -> Meanings:
    """As `meaning`, with and without a copy; remembered as that is."""
    key = key_of(image)
    if key not in _all_meanings:
        scribbled = (meaning(with_scribbled(image, copy)) for copy in (0, 1))
        _all_meanings[key] = meaning(image), *scribbled
    return _all_meanings[key]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    _meanings.clear()
    _all_meanings.clear()


def with_scribbled(image: bytes, copy: int) -> bytes:
    """The image with one copy of the label overwritten."""
    return SCRIBBLE + image[LABEL_BYTES:] if copy == 0 else image[:-LABEL_BYTES] + SCRIBBLE


@dataclass(frozen=True)
class Left:
    """What is left of a pool."""

    found: Meaning
    scribbled: tuple[Meaning, Meaning]
    """The same if one or the other copy of the label is lost, too."""
    grew_by_other: bool
    """Whether it has grown by something that is not zero."""


@dataclass
class Explorer:
    """Runs operations on one medium, and judges what a power failure leaves at every instant."""

    medium: RecordingMedium
    limit: int
    states: int = 0
    violations: list[str] = field(default_factory=list)
    used_generations: set[int] = field(default_factory=set)
    crash_images: dict[tuple[bytes, ...], bytes] = field(default_factory=dict)
    """One image for each pair of labels that was left."""
    keeps_images: bool = False
    may_be_lost: Collection[Meaning] = ()
    """What else the first operation may find, as a process was killed that had not replied."""
    grown_data: tuple[bytes, int, int] | None = None
    """What becomes data when the pool of that uuid grows."""

    def __post_init__(self) -> None:
        label = meaning(content(self.medium))
        if label and label.pool_size_bytes < self.medium.size_bytes:
            grown = Pool.open(RecordingMedium(content(self.medium)))
            after = grown.grown_label(self.medium.size_bytes, 1).zones.data
            self.grown_data = label.uuid, label.zones.data.end_bytes, after.end_bytes

    def run(self, name: str, operation: Operation, *, looks: bool = True) -> None:
        """One operation, looked at during and after."""
        during: list[Left] = []
        if looks:
            self.medium.at_each_fence = lambda: during.extend(self._left())
        before = meaning(content(self.medium))
        pool = operation(self.medium)
        self.medium.at_each_fence = lambda: None
        for left in during:
            self._judge(f"during {name}", left, {before, pool.label, *self.may_be_lost})
            self._judge_generation(f"during {name}", left)
        if name == "begin_mount":
            # From now on, page structures may bear it.
            self.used_generations.add(pool.label.generation)
        for image in self.medium.after_power_failure(self.limit) if looks else ():
            left = self._look(image)
            self._judge(f"after {name}", left, {pool.label})
            self._judge_generation(f"after {name}", left)
            # On a medium that is larger than its pool, the label in front says where the copy is.
            for copy in (0, 1) if pool.label.pool_size_bytes == len(image) else ():
                left = self._look(with_scribbled(image, copy))
                self._judge(f"after {name}, copy {copy} scribbled,", left, {pool.label})

    def _left(self) -> Iterator[Left]:
        """What a power failure may leave now: what it means, since all the images together would
        fill gigabytes."""
        for image in self.medium.after_power_failure(self.limit):
            if self.keeps_images:
                self.crash_images[labels_of(image)] = image
            yield self._look(image)

    def _look(self, image: bytes) -> Left:
        found, *scribbled = all_meanings(image)
        grew_by_other = False
        if found and self.grown_data and found.pool_size_bytes == len(image):
            owner, start, end = self.grown_data
            grew_by_other = found.uuid == owner and image[start:end] != bytes(end - start)
        return Left(found, (scribbled[0], scribbled[1]), grew_by_other)

    def _judge(self, when: str, left: Left, legal: Collection[Meaning]) -> None:
        self.states += 1
        if left.found not in legal:
            self.violations.append(f"{when} it opens as {left.found}")
        if left.grew_by_other:
            self.violations.append(f"{when} it has grown by something that is not zero")

    def _judge_generation(self, when: str, left: Left) -> None:
        for label in (left.found, *left.scribbled):
            self.states += 1
            if label and label.generation + 1 in self.used_generations:
                self.violations.append(f"{when} generation {label.generation + 1} comes again")


def create(medium: RecordingMedium) -> Pool:
    return Pool.create(medium, small_spec(name="new"))


def begin_mount(medium: RecordingMedium) -> Pool:
    pool = Pool.open(medium)
    pool.begin_mount()
    return pool


def end_mount(medium: RecordingMedium) -> Pool:
    pool = Pool.open(medium)
    pool.end_mount()
    return pool


def resume_mount(medium: RecordingMedium) -> Pool:
    pool = Pool.open(medium)
    pool.resume_mount()
    return pool


def heal_labels(medium: RecordingMedium) -> Pool:
    pool = Pool.open(medium)
    heal(pool)
    return pool


def grow(medium: RecordingMedium) -> Pool:
    """The medium has grown before, by whatever it holds there now."""
    pool = Pool.open(medium)
    Growth(pool, medium.size_bytes, medium.size_bytes).run()
    return pool


OPERATIONS: dict[str, Operation] = {
    "create": create,
    "begin_mount": begin_mount,
    "end_mount": end_mount,
    "resume_mount": resume_mount,
    "heal": heal_labels,
    "grow": grow,
}

LIVES: dict[str, tuple[str, ...]] = {
    "create": ("create",),
    "begin_mount": ("begin_mount",),
    "a mount": ("begin_mount", "end_mount"),
    # As a mount is remounted read-only and back.
    "a remount": ("begin_mount", "end_mount", "resume_mount", "end_mount"),
    # Two mounts in a row without an end are a daemon that was killed.
    "a whole life": ("create", "begin_mount", "end_mount", "begin_mount", "begin_mount",
                     "end_mount", "create", "begin_mount"),
    "grow": ("grow",),
    "grow after a crash": ("heal", "grow", "begin_mount", "end_mount"),
}  # fmt: skip
GROWING = [life for life in LIVES if "grow" in life]
"""These begin with a pool on a medium that is twice as large."""


def old_pool_image() -> bytes:
    return content(small_pool(Scheme.ON_DEMAND).medium)


def smaller_pool_image(in_force: int) -> bytes:
    """A pool whose file was made larger, one of whose copies was written last."""
    pool = small_pool(size_bytes=SMALL_BYTES // 2)
    newer = pack(replace(pool.label, sequence=pool.label.sequence + 1))
    end = SMALL_BYTES // 2
    pool.medium.store(0 if in_force == 0 else end - LABEL_BYTES, newer)
    return content(pool.medium) + bytes(SMALL_BYTES - end)


def outgrown_image(scheme: Scheme) -> bytes:
    """A pool, mounted once, whose medium has grown by what it does not expect there."""
    pool = small_pool(scheme, size_bytes=SMALL_BYTES // 2)
    pool.begin_mount()
    pool.end_mount()
    image = bytearray(content(pool.medium))
    # Page structures, and what is left over.
    start, end = pool.zones.data.end_bytes, pool.zones.label_copy.offset_bytes
    image[start:end] = b"\x5a" * (end - start)
    return bytes(image) + b"\xa5" * (SMALL_BYTES // 2)


def image_with_one_copy(scribbled: int) -> bytes:
    return with_scribbled(old_pool_image(), scribbled)


IMAGES: dict[str, Callable[[], bytes]] = {
    "blank": lambda: bytes(SMALL_BYTES),
    "garbage": lambda: b"\x5a" * SMALL_BYTES,
    "an old pool": old_pool_image,
    "an old pool with its copy left": lambda: image_with_one_copy(0),
    "an old pool without its copy": lambda: image_with_one_copy(1),
    "a smaller old pool": lambda: smaller_pool_image(0),
    "a smaller old pool with its copy in force": lambda: smaller_pool_image(1),
    "a pool that is to grow": lambda: outgrown_image(Scheme.PMEM),
    "a pool that is to grow, without page structures": lambda: outgrown_image(Scheme.NONE),
}

CASES = [
    (image, life)
    for image in IMAGES
    for life in LIVES
    if (life in GROWING) == image.startswith("a pool that")
    and (LIVES[life][0] == "create" or image.startswith(("an old pool", "a pool that")))
] + [(f"a smaller old pool{how}", "grow after a crash") for how in ("", " with its copy in force")]


def explored(
    image: bytes, life: tuple[str, ...], *, limit: int = 400, ignored: Collection[int] = ()
) -> Explorer:
    """A whole life; with a call that is ignored, from the operation on that makes it, which is as
    it should be until then."""
    explorer = Explorer(RecordingMedium(image, ignored_calls=ignored), limit)
    ends = ends_of(image, life) if ignored else [0] * len(life)
    for name, end in zip(life, ends, strict=True):
        explorer.run(name, OPERATIONS[name], looks=not ignored or end > min(ignored))
        if ignored and explorer.violations:
            break
    return explorer


def ends_of(image: bytes, life: tuple[str, ...]) -> list[int]:
    """How many flushes and fences there were when each operation of a life had returned."""
    medium = RecordingMedium(image)
    ends = []
    for name in life:
        OPERATIONS[name](medium)
        ends.append(medium.call_count)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize(("image", "life"), CASES, ids=[f"{life}, on {i}" for i, life in CASES])
def test_every_power_failure_leaves_the_pool_as_before_or_as_after(image: str, life: str) -> None:
    # A pool that grows is larger, and so is each image of it.
    limit = 60 if "grow" in life else 150
    explorer = explored(IMAGES[image](), LIVES[life], limit=limit)
    print(f"{life} on {image}: {explorer.states} states")
    assert explorer.violations == []
    assert explorer.states > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "going_on"),
    [
        ("create", "a mount"),
        ("begin_mount", "a mount"),
        ("end_mount", "a mount"),
        ("grow", "a mount"),
        ("grow", "grow after a crash"),
    ],
)
def test_a_second_power_failure_while_going_on_from_the_first_loses_nothing(
    name: str, going_on: str
) -> None:
    medium = RecordingMedium(outgrown_image(Scheme.PMEM) if name == "grow" else old_pool_image())
    first = Explorer(medium, limit=20, keeps_images=True)
    begin_mount(medium)
    first.run(name, OPERATIONS[name])
    left = list(first.crash_images.values())
    # A pool that grows is larger, and so is what there is to judge.
    count, limit = (8, 4) if name == "grow" else (20, 10)
    images = left[:: max(1, len(left) // count)]
    assert len(images) > 5
    states = 0
    for image in images:
        label = meaning(image)
        assert label is not None
        is_over = going_on in GROWING and label.pool_size_bytes == len(image)
        second = explored(image, LIVES["a mount" if is_over else going_on], limit=limit)
        assert second.violations == []
        states += second.states
    print(f"after a crash in {name}: {len(images)} images, {states} states")


CALLS, SETTLING = 6, (0, 1)
"""An operation flushes and fences three times; first what a killed process may have left, which has
a gate of its own."""


def gone_on(killed_at: int, killed: str, name: str, ignored: Collection[int] = ()) -> Explorer:
    """An operation on what a process left that was killed before one of its calls."""
    failures = {killed_at: OSError("it is killed here")}
    medium = RecordingMedium(old_pool_image(), failures=failures, ignored_calls=ignored)
    durable = meaning(content(medium))
    with pytest.raises(OSError, match="killed"):
        OPERATIONS[killed](medium)
    medium.outlive_process()
    explorer = Explorer(medium, limit=100, may_be_lost={durable})
    explorer.run(name, OPERATIONS[name])
    return explorer


@pytest.mark.parametrize("name", ["begin_mount", "create"])
@pytest.mark.parametrize("killed", ["begin_mount", "create"])
@pytest.mark.parametrize("killed_at", range(CALLS))
def test_what_a_killed_process_wrote_last_is_durable_before_the_other_copy_is_overwritten(
    killed_at: int, killed: str, name: str
) -> None:
    assert gone_on(killed_at, killed, name).violations == []


@pytest.mark.parametrize("call", SETTLING)
def test_without_that_flush_or_fence_it_may_be_lost(call: int) -> None:
    # Killed before it has flushed or fenced the first copy that it wrote.
    assert any(
        gone_on(killed_at, "begin_mount", "begin_mount", ignored={killed_at + 1 + call}).violations
        for killed_at in (2, 3)
    )


# On a blank medium there is nothing to lose before `create` has replied, so there alone the fence
# between the two copies, call 1, is not needed.
GATES = [("blank", "create", call) for call in (0, 2, 3)] + [
    ("an old pool", life, call)
    for life in LIVES
    if life not in GROWING
    for call in range(CALLS * len(LIVES[life]))
    if call % CALLS not in SETTLING
]
OUTGROWN = "a pool that is to grow"
# Nothing counts before the last step of growing: its first fence, call 7, stands for those before.
GATES += [(OUTGROWN, "grow", call) for call in (0, 2, 4, 6, 7, 8, 9)]


@pytest.mark.slow
@pytest.mark.parametrize(("image", "life", "call"), GATES)
def test_without_any_one_flush_or_fence_this_test_would_fail(
    image: str, life: str, call: int
) -> None:
    explorer = explored(IMAGES[image](), LIVES[life], limit=60, ignored={call})
    assert explorer.violations, f"call {call} of {life} on {image} is not needed"


@pytest.mark.parametrize("life", [life for life in LIVES if life not in GROWING])
def test_the_gate_covers_every_flush_and_fence_there_is(life: str) -> None:
    medium = RecordingMedium(old_pool_image())
    for name in LIVES[life]:
        OPERATIONS[name](medium)
    gated = sum(gate[:2] == ("an old pool", life) for gate in GATES)
    assert medium.call_count == gated + len(SETTLING) * len(LIVES[life])


def test_the_gate_covers_every_flush_and_fence_of_growing() -> None:
    medium = RecordingMedium(IMAGES[OUTGROWN]())
    grow(medium)
    assert medium.call_count == 10


def test_one_pool_object_keeps_the_order_of_its_copies_over_a_mount() -> None:
    medium = RecordingMedium(old_pool_image())
    explorer = Explorer(medium, limit=100)
    pool = Pool.open(medium)

    def begin(_: RecordingMedium) -> Pool:
        pool.begin_mount()
        return pool

    def end(_: RecordingMedium) -> Pool:
        pool.end_mount()
        return pool

    for _ in range(2):
        explorer.run("begin_mount", begin)
        explorer.run("end_mount", end)
    assert explorer.violations == []
