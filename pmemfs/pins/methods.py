"""What clients ask the daemon about pages, over the control socket of the mount."""

from __future__ import annotations

import errno
import json
import os
import weakref
from typing import Any

import trio

from pmemfs.control import Peer, WithDescriptors, close_all
from pmemfs.errors import CannotMapTransformed, CannotPin, MemoryFault
from pmemfs.media.pinreport import PinnedFileReport, PinReport
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.source import alignment_of
from pmemfs.pins.accesses import accesses_of
from pmemfs.pins.pin import Client, Pin, WantedRange
from pmemfs.pins.registry import Pins
from pmemfs.pool import Pool
from pmemfs.volume.base import Volume

_LIMIT = 1 << 63
_REPORTS_AT_ONCE = 200
_REPORT_BYTES = 3 << 20
"""Less than an answer may be long: it has blanks that the answer has not."""


class PinMethods:
    """The methods of one mount."""

    def __init__(
        self, pins: Pins, pool: Pool, medium: MappedMedium, volume: Volume, mount_identity: int
    ) -> None:
        self.registry = self._pins = pins
        self._pool = pool
        self._medium = medium
        self._volume = volume
        self._mount_identity = mount_identity
        self._unit_bytes = 0
        self._of_peer: weakref.WeakKeyDictionary[Peer, Client] = weakref.WeakKeyDictionary()

    async def pin(
        self, peer: Peer, files: Any, writable: bool = False, contiguous: bool = False,
        wants_pool: bool = False, paths: Any = None, may_make_plain: bool = True,
    ) -> WithDescriptors:  # fmt: skip
        """Pin ranges of files: inode, offset and length of each. See `Pins.pin`."""
        wanted = _wanted(files, paths)
        try:
            pin, fd = await self._pins.pin(
                self._client(peer), wanted, is_writable=writable, is_contiguous=contiguous,
                may_make_plain=may_make_plain,
            )  # fmt: skip
        except (MemoryFault, CannotPin, CannotMapTransformed):
            raise
        except OSError as error:
            what = ", ".join(one.path or f"inode {one.inode}" for one in wanted[:3])
            raise CannotPin(error.errno or errno.EIO, what=what, why=_why(error)) from None
        result = _as_result(pin)
        if not wants_pool:
            return WithDescriptors(result, [fd])
        descriptors = [fd]
        try:
            descriptors.append(self._medium.shared_fd(writable=writable))
            descriptors.append(os.dup(self._pins.words.fd))
        except OSError as error:
            close_all(descriptors)
            raise CannotPin(error.errno or errno.EIO, what="anything", why=_why(error)) from None
        return WithDescriptors(result | {"pool": self._pool_report()}, descriptors)

    async def flush(self, pin: int) -> None:
        """A client has made its stores durable: its files were written to now."""
        await self._pins.flush(pin)

    async def pins(self, resting: bool = False) -> list[dict[str, Any]]:
        """Who has which pins; `resting`: also what rests, because its client is gone.

        The oldest pins come first, as many as fit into an answer.
        """
        # A client that has just let go of a pin counts on that.
        while self._pins.notice_ends():
            await trio.lowlevel.checkpoint()
        reports: list[dict[str, Any]] = []
        left = _REPORT_BYTES
        for pin in (*self._pins.living, *(self._pins.resting if resting else ())):
            report = _report(pin)
            files = [file._asdict() for file in report.files]
            reports.append(report._asdict() | {"files": files})
            left -= len(json.dumps(reports[-1]))
            if len(reports) % _REPORTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if left < 0:
                reports.pop()
                break
        return reports

    async def accesses(self, inodes: list[int]) -> dict[str, Any]:
        """What the page structures know of files. Raises NoPageStructures."""
        answer = await accesses_of(inodes, self._pins, self._volume, self._mount_identity)
        return answer._asdict()

    def _client(self, peer: Peer) -> Client:
        """The client at the other end of a connection. It may have several connections."""
        client = self._of_peer.get(peer)
        if client is None:
            client = self._of_peer[peer] = self._pins.client(peer.pid)
        return client

    def _pool_report(self) -> dict[str, Any]:
        medium, label = self._medium, self._pool.label
        self._unit_bytes = self._unit_bytes or alignment_of(medium.source)
        return {
            "size_bytes": medium.size_bytes,
            "map_flags": medium.map_flags,
            "unit_bytes": self._unit_bytes,
            "durability": medium.durability.name.lower(),
            "read_only": self._volume.read_only,
            "uuid": label.uuid.hex(),
        }


def _wanted(files: Any, paths: Any) -> list[WantedRange]:
    """What a request asks for. Raises CannotPin if that makes no sense."""
    # Looked at here, because to decode the shape of an answer takes as long as to pin.
    try:
        if files and len(paths := paths or [""] * len(files)) == len(files):
            wanted = [
                WantedRange(number, offset, length, path)
                for (number, offset, length), path in zip(files, paths, strict=True)
            ]
            if all(_is_possible(one) for one in wanted):
                return wanted
    except (TypeError, ValueError):
        pass
    why = "each file needs an inode, an offset and a length"
    raise CannotPin(errno.EINVAL, what="this", why=why)


def _is_possible(wanted: WantedRange) -> bool:
    number, offset, length, path = wanted
    is_number = type(number) is type(offset) is type(length) is int
    return (
        is_number
        and type(path) is str
        and 0 < number < _LIMIT
        and 0 <= offset < _LIMIT
        and -1 <= length < _LIMIT
    )


def _why(error: OSError) -> str:
    said = error.strerror or str(error)
    return said[:1].lower() + said[1:]


def _report(pin: Pin) -> PinReport:
    return PinReport(
        pin=pin.number,
        pid=pin.client.pid,
        command=pin.client.command,
        since_ns=pin.since_ns,
        writable=pin.is_writable,
        is_resting=pin.fd < 0,
        is_stale=pin.is_stale,
        page_count=pin.page_count,
        files=tuple(
            PinnedFileReport(file.inode, "" if pin.is_renamed else file.path, file.offset_bytes,
                       file.length_bytes)
            for file in pin.files
        ),
    )  # fmt: skip


def _as_result(pin: Pin) -> dict[str, Any]:
    """A pin as the answer to who asked for it."""
    return {
        "pin": pin.number,
        "place": pin.place,
        "files": [
            {
                "inode": file.inode,
                "generation": file.generation,
                "size_bytes": file.size_bytes,
                "length_bytes": file.length_bytes,
                "pieces": file.pieces,
            }
            for file in pin.files
        ],
    }
