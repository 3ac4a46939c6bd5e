"""Persistent memory as storage through FUSE, with a page structure for every page.

A program that wants pages of a mount as arrays begins with `connect`:

    with pmemfs.connect("/mnt/pmem") as fs:
        a = fs.map("table", shape=(1000, 64), dtype="f4")

The names here load what they need, numpy too, when they are used first.
"""

from __future__ import annotations

from pmemfs.version import VERSION as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pmemfs.client.mapping import Mapping, MapRequest, PinnedArray
    from pmemfs.client.mount import Mount, MountStatistics, connect
    from pmemfs.client.newfile import NewFile
    from pmemfs.client.pin import Pin, PinnedFile, pin_of
    from pmemfs.client.tensorcache import CacheStatistics, Reservation, TensorCache
    from pmemfs.errors import (
        BadArray,
        BadCache,
        BadEntry,
        BadKey,
        BadMapping,
        CacheFull,
        CannotMapTransformed,
        CannotPin,
        Closed,
        DaemonGone,
        NeedsPackage,
        NoAnswer,
        NoNewFiles,
        NoPageStructures,
        NotMounted,
        NotPermitted,
        NotPinned,
        PmemfsError,
        StillInUse,
        TooManyMappings,
        TooManyOpenFiles,
        TooManyPieces,
        TooManyPins,
    )
    from pmemfs.media.pinreport import PinReport

__all__ = [
    "BadArray",
    "BadCache",
    "BadEntry",
    "BadKey",
    "BadMapping",
    "CacheFull",
    "CacheStatistics",
    "CannotMapTransformed",
    "CannotPin",
    "Closed",
    "DaemonGone",
    "MapRequest",
    "Mapping",
    "Mount",
    "MountStatistics",
    "NeedsPackage",
    "NewFile",
    "NoAnswer",
    "NoNewFiles",
    "NoPageStructures",
    "NotMounted",
    "NotPermitted",
    "NotPinned",
    "Pin",
    "PinReport",
    "PinnedArray",
    "PinnedFile",
    "PmemfsError",
    "Reservation",
    "StillInUse",
    "TensorCache",
    "TooManyMappings",
    "TooManyOpenFiles",
    "TooManyPieces",
    "TooManyPins",
    "__version__",
    "connect",
    "pin_of",
]

_PLACES = {
    "client.mapping": ("MapRequest", "Mapping", "PinnedArray"),
    "client.mount": ("Mount", "MountStatistics", "connect"),
    "media.pinreport": ("PinReport",),
    "client.newfile": ("NewFile",),
    "client.pin": ("Pin", "PinnedFile", "pin_of"),
    "client.tensorcache": ("CacheStatistics", "Reservation", "TensorCache"),
}
"""Where names are; all others of `__all__` are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = next((where for where, names in _PLACES.items() if name in names), "errors")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def __dir__() -> list[str]:
    # Without what is loaded by now, which a user of the package needs as little as this function.
    return __all__
