"""What every medium promises.

Invariants:
- every persistent store of pmemfs goes through `store` or `put`, and nothing else writes what must
  survive. So a recording medium sees each of them, and tests can pull the power at any. (Page
  structures need not survive, and are written through `view`.);
- a store is visible to every reader at once, and durable once a `fence` has returned that came
  after a `flush` of it;
- before that, a power failure may keep the store, lose it, or tear it at any aligned 8-byte word;
- memory that can't be touched is a MemoryFault. Each operation here raises it for itself. After
  touches of a `view` the caller asks by `check_touched`, before it uses what it read or relies on
  what it stored, because a bad page reads as zeroes and loses stores.
"""

from __future__ import annotations

import enum
import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


_CLEARING_BYTES = 1 << 20


class Durability(enum.Enum):
    """What `fence` does so that flushed bytes survive."""

    VOLATILE = "nothing: lost with the power"
    """Nothing: the memory loses its content with the power (tmpfs)."""
    CACHE_LINES = "cache lines written back and fenced"
    """Cache lines were written back; a store fence orders them (MAP_SYNC, DAX devices)."""
    MSYNC = "msync"
    """msync(2) hands the pages of the page cache to the device."""


class Medium(ABC):
    """Memory that is addressed by bytes and may survive."""

    name: str
    """The medium's name in messages, mostly a path."""
    size_bytes: int
    reach_bytes: int
    """How large the medium may become while it is open. What depends on its size is given room for
    that at once."""
    durability: Durability
    read_only: bool
    reserved: bool
    """Whether every byte has memory behind it, so that a touch of the mapping cannot fail."""

    fault_count = 0
    """How often memory could not be touched."""
    shortage_count = 0
    """How often a sparse medium has found no memory."""

    @abstractmethod
    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        """The bytes of a range as they are now; using the result never touches the medium again.

        Raises MemoryFault if the medium can't be read.
        """

    @abstractmethod
    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """The mapping of a range; writable unless the medium is read-only.

        `reserve` the range of a sparse medium first, because touching a hole may be a SIGBUS. Call
        `check_touched` after the touches: until then the view shows zeroes where memory is bad.
        """

    @property
    def sparse_fd(self) -> int:
        """The descriptor to read from where memory may have holes, of which a view must not be
        touched; -1 if all of it may be touched."""
        return -1

    @abstractmethod
    def has_faulted(self) -> bool:
        """Whether this thread has touched bad memory since its last `check_touched`."""

    @abstractmethod
    def check_touched(self) -> None:
        """Raise MemoryFault if this thread has touched bad memory through a `view`.

        What it read there is zeroes, and what it stored there is lost.
        """

    def note_shortage(self, error: int | None) -> None:
        """Count it if this errno says that the medium has found no memory."""
        self.shortage_count += error == errno.ENOSPC

    @abstractmethod
    def store(self, offset_bytes: int, data: Buffer) -> None:
        """Write. Raises ReadOnlyMedium, and OSError (ENOSPC) if a sparse medium finds no memory.

        Raises MemoryFault if a page is bad; other pages of the range may be written then.
        """

    @abstractmethod
    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        """Begin to make a range durable. Raises MemoryFault."""

    @abstractmethod
    def fence(self) -> None:
        """Wait until everything that was flushed before is durable. May block.

        Raises OSError (EIO) if the device couldn't take it, and from then on always: the kernel
        reports such a loss once and forgets it, so nobody can tell what is missing.
        """

    def put(self, offset_bytes: int, data: bytes) -> None:
        """Write, and begin to make it durable. Raises as `store` and `flush`."""
        self.store(offset_bytes, data)
        self.flush(offset_bytes, len(data))

    def persist(self, offset_bytes: int, length_bytes: int) -> None:
        """Make one range durable: flush and fence."""
        self.flush(offset_bytes, length_bytes)
        self.fence()

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a range of whole frames read as zeroes, durably. Raises as `store` and `fence`."""
        done = 0
        while done < length_bytes:
            step = min(_CLEARING_BYTES, length_bytes - done)
            self.store(offset_bytes + done, bytes(step))
            self.flush(offset_bytes + done, step)
            done += step
        if length_bytes:
            self.fence()

    @abstractmethod
    def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """Get memory behind a range, so that its view can be touched. Raises OSError (ENOSPC)."""

    @abstractmethod
    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        """Map a range that has memory, so that touching its view is cheap; may do nothing."""

    @abstractmethod
    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether nothing was ever stored in a range and it has no memory behind it."""

    def with_memory(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        """The parts of a range of whole frames that have memory, as (offset, length).

        The rest reads as zeroes. Raises MemoryFault.
        """
        yield offset_bytes, length_bytes
