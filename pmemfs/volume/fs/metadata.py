"""The medium as a file system sees it, except for the bytes of files: a fault in it is damage.

If the bytes of a file can't be touched, only the reader of that file is hurt. If metadata can't be
touched, everybody is, and a change that was under way is lost. So the file system is told at once,
whatever the caller then makes of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from pmemfs.errors import MemoryFault
from pmemfs.medium.base import Medium

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MetadataMedium(Medium):
    """Another medium, except that it calls `on_fault` before it raises MemoryFault."""

    def __init__(self, medium: Medium, on_fault: Callable[[MemoryFault], object]) -> None:
        self._medium = medium
        self._on_fault = on_fault
        self.name = medium.name
        self.durability = medium.durability
        self.read_only = medium.read_only
        self._read, self._store, self._put = medium.read, medium.store, medium.put
        self.fence = medium.fence  # type: ignore[method-assign]

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        return self._medium.size_bytes

    @property
    def reach_bytes(self) -> int:  # type: ignore[override]
        return self._medium.reach_bytes

    @property
    def reserved(self) -> bool:  # type: ignore[override]
        return self._medium.reserved

    @property
    def sparse_fd(self) -> int:
        return self._medium.sparse_fd

    @property
    def fault_count(self) -> int:  # type: ignore[override]
        return self._medium.fault_count

    @property
    def shortage_count(self) -> int:  # type: ignore[override]
        return self._medium.shortage_count

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        try:
            return self._read(offset_bytes, length_bytes)
        except MemoryFault as fault:
            self._tell(fault)

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        return self._medium.view(offset_bytes, length_bytes)

    def has_faulted(self) -> bool:
        return self._medium.has_faulted()

    def check_touched(self) -> None:
        self._medium.check_touched()

    def store(self, offset_bytes: int, data: Buffer) -> None:
        try:
            self._store(offset_bytes, data)
        except MemoryFault as fault:
            self._tell(fault)

    def put(self, offset_bytes: int, data: bytes) -> None:
        try:
            self._put(offset_bytes, data)
        except MemoryFault as fault:
            self._tell(fault)

    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        try:
            self._medium.flush(offset_bytes, length_bytes)
        except MemoryFault as fault:
            self._tell(fault)

    def fence(self) -> None:
        self._medium.fence()

    def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        self._medium.reserve(offset_bytes, length_bytes)

    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        self._medium.populate(offset_bytes, length_bytes)

    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        return self._medium.is_hole(offset_bytes, length_bytes)

    def _tell(self, fault: MemoryFault) -> NoReturn:
        self._on_fault(fault)
        raise fault
