"""What holds pages while arrays show them, and how to ask it of an array.

The end of a pin belongs to the addresses (`medium/addresses`); a `Pin` only knows about it, and
holds nothing. So whoever keeps a `Pin` keeps no page.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pmemfs.client.connection import Connection
from pmemfs.errors import NotPinned
from pmemfs.medium.addresses import Addresses, PinEnd, Shown, Words
from pmemfs.medium.base import Durability

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_STALE, _RENAMED, _ENDED = 1, 2, 4
"""The bits of a pin's word, as the daemon sets them."""


class PinnedFile(NamedTuple):
    """A range of a file that a pin holds."""

    path: str
    """As it was given; the file may have another name by now, or none."""
    inode: int
    generation: int
    """Tells files apart that had the same inode number one after the other."""
    offset_bytes: int
    length_bytes: int


class Pin:
    """References on every page of one or more ranges of files.

    It lasts until the last array, and the last view of one, is gone, in this process and in those
    that it has forked. Then the pages go to whom they belong by then.
    """

    __slots__ = ("_end", "_words", "files", "is_writable", "number", "place")

    def __init__(
        self,
        end: PinEnd,
        words: Words,
        *,
        number: int,
        place: int,
        is_writable: bool,
        files: tuple[PinnedFile, ...],
    ) -> None:
        self._end = weakref.ref(end)
        self._words = words
        self.place = place
        """Of its word, in the memory that the daemon shares."""
        self.number = number
        """The daemon's number for it, as in `Mount.pins` and `pmemfs pages --pins`."""
        self.is_writable = is_writable
        self.files = files

    def __repr__(self) -> str:
        paths = ", ".join(repr(file.path) for file in self.files)
        state = "ended" if self.has_ended else "stale" if self.stale else "current"
        return f"<Pin {self.number} of {paths}, {state}>"

    @property
    def has_ended(self) -> bool:
        """Whether this process holds it no more."""
        return self._end() is None

    @property
    def stale(self) -> bool:
        """Whether a page of it has left its file, by truncation, removal, punching or moving, so
        that the arrays no longer show what the file is; also once the pin has ended.

        Asks nobody: the daemon keeps this in memory that it shares.
        """
        return self._is_set(_STALE | _ENDED)

    @property
    def renamed(self) -> bool:
        """Whether a name of a file of it was changed or removed; also once the pin has ended."""
        return self._is_set(_RENAMED | _ENDED)

    def _is_set(self, bits: int) -> bool:
        # The word of a pin that is over may be another pin's.
        return self.has_ended or bool(self._words.read(self.place) & bits)


class About(NamedTuple):
    """What `Addresses` know of themselves."""

    pin: Pin
    file: PinnedFile
    mode: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    words: Words
    durability: Durability
    uuid: str
    """Of the pool. Its descriptor isn't here: a mapping that is closed must not keep its lock."""
    connection: Connection


def memory_of(array: ArrayLike | memoryview) -> tuple[Addresses, About]:
    """The addresses that an array, or a view of it, shows. Raises NotPinned."""
    at: Any = array
    while at is not None and not isinstance(at, Shown):
        at = at.obj if isinstance(at, memoryview) else getattr(at, "base", None)
    if at is None:
        raise NotPinned(what=f"this {type(array).__name__}")
    about = at.memory.about
    assert isinstance(about, About)
    return at.memory, about


def pin_of(array: ArrayLike | memoryview) -> Pin:
    """The pin that holds the pages of an array, of a view of one, or of a memoryview of one.

    Raises NotPinned for what lies elsewhere, such as a copy.
    """
    return memory_of(array)[1].pin
