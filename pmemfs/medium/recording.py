"""A medium that knows what is durable, so that a test can pull the power between any two stores.

The model, after Vinter (Kalbfleisch et al., ATC '22) and the x86 persistency rules:

- an aligned 8-byte word is stored whole or not at all, and anything larger may tear;
- of one 64-byte cache line, a *prefix* of the stores since it was last durable survives;
- lines are independent of each other, and a line may be evicted, and so become durable, without a
  flush;
- a flush guarantees nothing before the fence behind it.

So a power failure leaves, for each line that is not durable, one of the states between its stores.
All states between two stores are among the states just before the next fence. So a test that looks
there (`at_each_fence`) and at the end has looked everywhere.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from pmemfs.medium.base import Durability, Medium

if TYPE_CHECKING:
    from typing_extensions import Buffer

LINE_BYTES = 64
WORD_BYTES = 8


class RecordingMedium(Medium):
    """Memory of the process that behaves like persistent memory in a power failure.

    `ignored_calls` are numbers of flush and fence calls, counted from 0, that do nothing, as if
    the program had forgotten them. `failures` are numbers of calls that raise, as do all after.
    `image` is what it began with.
    """

    def __init__(
        self,
        image: Buffer,
        *,
        ignored_calls: Collection[int] = (),
        failures: Mapping[int, OSError] | None = None,
    ) -> None:
        self.image = bytes(image)
        self._memory = bytearray(image)
        self._durable = bytearray(image)
        self._changed: dict[int, bytes] = {}
        self._pending: dict[int, list[bytes]] = {}
        self._flushed: dict[int, int] = {}
        self._store_order: list[int] = []
        self._ignored_calls = ignored_calls
        self._failures = failures or {}
        self._lost: OSError | None = None
        self.name = "recording medium"
        self.size_bytes = self.reach_bytes = len(self._memory)
        self.durability = Durability.CACHE_LINES
        self.read_only = False
        self.reserved = True
        self.call_count = 0
        self.at_each_fence: Callable[[], None] = lambda: None

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        return memoryview(self._memory)[offset_bytes : offset_bytes + length_bytes].toreadonly()

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        return memoryview(self._memory)[offset_bytes : offset_bytes + length_bytes]

    def has_faulted(self) -> bool:
        return False

    def check_touched(self) -> None:
        """Nothing to do: all of this memory can be touched."""

    def outlive_process(self) -> None:
        """Let calls count again after one that failed: the process is killed, and another one goes
        on with this memory, in which it finds what is not durable yet."""
        self._failures, self._lost, self._flushed = {}, None, {}

    def store(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if offset_bytes < 0 or offset_bytes + len(view) > self.size_bytes:
            raise ValueError("store outside the medium")
        position, end = offset_bytes, offset_bytes + len(view)
        while position < end:
            line = position // LINE_BYTES
            stop = min(end, (line + 1) * LINE_BYTES)
            self._store_in_line(line, position, view[position - offset_bytes : stop - offset_bytes])
            position = stop

    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        if self._counts():
            first, end = offset_bytes // LINE_BYTES, offset_bytes + length_bytes
            for line in range(first, -(-end // LINE_BYTES) if length_bytes else first):
                if line in self._pending:
                    self._flushed[line] = len(self._pending[line])

    def fence(self) -> None:
        self.at_each_fence()
        if self._counts():
            for line, count in self._flushed.items():
                versions = self._pending[line]
                self._set_line(self._durable, line, versions[count - 1])
                self._changed[line] = versions[count - 1]
                self._pending[line] = versions[count:]
            self._pending = {line: v for line, v in self._pending.items() if v}
            self._forget_order_of(self._flushed)
            self._flushed = {}

    def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing to do: all of this memory is there."""

    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing to do: all of this memory is mapped."""

    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        return False

    def after_power_failure(self, limit: int = 2000, seed: int = 0) -> Iterator[bytes]:
        """The images that a power failure now could leave, each once.

        It gives all of them if there are no more than `limit`. Otherwise it gives: nothing kept,
        all kept, every point of the program's order, each line alone lost or alone kept, and
        `limit` random choices.
        """
        seen: set[bytes] = set()
        lines = sorted(self._pending)
        image = bytearray(self._durable)
        held: tuple[bytes, ...] = (b"",) * len(lines)
        for choice in self._choices(lines, limit, random.Random(seed)):
            # Most choices are nearly the one before.
            for line, content, before in zip(lines, choice, held, strict=True):
                if content is not before:
                    image[line * LINE_BYTES : (line + 1) * LINE_BYTES] = content
            held = choice
            frozen = bytes(image)
            if frozen not in seen:
                seen.add(frozen)
                yield frozen

    @property
    def durable(self) -> bytes:
        """A copy of all that is durable."""
        return bytes(self._durable)

    @property
    def durable_lines(self) -> dict[int, bytes]:
        """The lines that have become durable since there was only `image`, with what they hold."""
        return dict(self._changed)

    def undecided(self) -> tuple[dict[int, list[bytes]], list[int]]:
        """The contents that each undurable line may have, the oldest first; and the lines of the
        stores since, in the program's order."""
        contents = {line: self._contents(line) for line in self._pending}
        return contents, list(self._store_order)

    def _choices(
        self, lines: list[int], limit: int, rng: random.Random
    ) -> Iterator[tuple[bytes, ...]]:
        """For each line, one content that may survive."""
        # Many stores write what was there already, and only contents that differ make states.
        contents = [list(dict.fromkeys(self._contents(line))) for line in lines]
        if math.prod(len(possible) for possible in contents) <= limit:
            yield from itertools.product(*contents)
            return
        yield from self._program_order(lines)
        oldest = tuple(possible[0] for possible in contents)
        newest = tuple(self._pending[line][-1] for line in lines)
        for position, possible in enumerate(contents):
            middle = possible[len(possible) // 2]
            for others, content in (
                (newest, oldest[position]),
                (newest, middle),
                (oldest, newest[position]),
                (oldest, middle),
            ):
                yield (*others[:position], content, *others[position + 1 :])
        for _ in range(limit):
            yield tuple(
                rng.choice((possible[0], possible[-1], rng.choice(possible)))
                for possible in contents
            )

    def _program_order(self, lines: list[int]) -> Iterator[tuple[bytes, ...]]:
        following = {line: iter(self._contents(line)) for line in lines}
        chosen = {line: next(contents) for line, contents in following.items()}
        yield tuple(chosen.values())
        for line in self._store_order:
            chosen[line] = next(following[line])
            yield tuple(chosen.values())

    def _contents(self, line: int) -> list[bytes]:
        """What a line may hold: its durable content, or what any store since has made of it."""
        durable = bytes(self._durable[line * LINE_BYTES : (line + 1) * LINE_BYTES])
        return [durable, *self._pending[line]]

    def _forget_order_of(self, persisted: dict[int, int]) -> None:
        """Drop the oldest stores of each line, as many as became durable."""
        order = []
        for line in self._store_order:
            if persisted.get(line):
                persisted[line] -= 1
            else:
                order.append(line)
        self._store_order = order

    def _store_in_line(self, line: int, offset_bytes: int, data: memoryview) -> None:
        """Each word of it is a store, the lowest first."""
        start = line * LINE_BYTES
        first, end = offset_bytes - start, offset_bytes - start + len(data)
        before = bytes(self._memory[start : start + LINE_BYTES])
        after = before[:first] + data + before[end:]
        # Where each word ends: the line is new up to there.
        stops = [*range(first // WORD_BYTES * WORD_BYTES + WORD_BYTES, end, WORD_BYTES), end]
        self._memory[start : start + LINE_BYTES] = after
        versions = [after[:stop] + before[stop:] for stop in stops]
        self._pending.setdefault(line, []).extend(versions)
        self._store_order += [line] * len(stops)

    def _counts(self) -> bool:
        """Count a call; whether to carry it out."""
        call, self.call_count = self.call_count, self.call_count + 1
        self._lost = self._lost or self._failures.get(call)
        if self._lost:
            raise self._lost
        return call not in self._ignored_calls

    @staticmethod
    def _set_line(image: bytearray, line: int, content: bytes) -> None:
        image[line * LINE_BYTES : line * LINE_BYTES + len(content)] = content
