"""What every medium promises.

Invariants:
- every persistent store of pmemfs goes through `store`; nothing else writes to what must
  survive. (Page structures must not survive, and are written through `view`.)
- a store is visible to every reader at once, and durable when a `fence` has returned that came
  after a `flush` of it;
- before that, a power failure may keep it, lose it, or tear it at any aligned 8-byte word;
- memory that can't be touched is a MemoryFault, whatever touched it: of each operation here by
  itself, of touches of a `view` when `check_touched` is called, which must be before what was read
  is used or what was stored counts as there.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


_CLEARING_BYTES = 1 << 20


class Durability(enum.Enum):
    """What `fence` does, so that what was flushed survives."""

    VOLATILE = "nothing: lost with the power"
    """Nothing: the memory loses its content with the power (tmpfs)."""
    CACHE_LINES = "cache lines written back and fenced"
    """Cache lines were written back; a store fence orders them (MAP_SYNC, DAX devices)."""
    MSYNC = "msync"
    """msync(2) hands the pages of the page cache to the device."""


class Medium(ABC):
    """Memory that is addressed by bytes and may survive."""

    name: str
    """How messages call it: a path, mostly."""
    size_bytes: int
    reach_bytes: int
    """As large as it may become while it is open; whoever sets memory aside for it does it once."""
    durability: Durability
    read_only: bool
    reserved: bool
    """Whether every byte has memory behind it, so that a touch of the mapping cannot fail."""

    fault_count = 0
    """How often memory could not be touched."""

    @abstractmethod
    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        """The content of a range as it is now, which nobody has to touch again.

        Raises MemoryFault where the medium can't be read.
        """

    @abstractmethod
    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        """The mapping of a range; writable unless the medium is read-only.

        Where the medium is sparse, `reserve` it first: touching a hole may be a SIGBUS. After the
        touches, `check_touched`: where memory is bad, the view shows zeroes until then.
        """

    @abstractmethod
    def has_faulted(self) -> bool:
        """Whether this thread has touched bad memory since its last `check_touched`."""

    @abstractmethod
    def check_touched(self) -> None:
        """Raise MemoryFault where this thread has touched bad memory through a `view`.

        What it has read there are zeroes, and what it has stored is lost.
        """

    @abstractmethod
    def store(self, offset_bytes: int, data: Buffer) -> None:
        """Write. Raises ReadOnlyMedium, and OSError (ENOSPC) where a sparse one finds no memory.

        Raises MemoryFault where a page is bad, and then may have written others of the range.
        """

    @abstractmethod
    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        """Begin to make a range durable. Raises MemoryFault."""

    @abstractmethod
    def fence(self) -> None:
        """Everything that was flushed before is durable when this returns. May block.

        Raises OSError (EIO) where the device couldn't take it; and from then on always, since
        nobody knows what is missing: the kernel reports such a loss once, and forgets it.
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
        """Map a range that has memory, so that touching its view costs nothing; may do nothing."""

    @abstractmethod
    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether nothing was ever stored in the range and it has no memory behind it."""
