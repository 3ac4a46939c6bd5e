"""From the text of an origin to the origin.

What only one kind needs is loaded only for it, because a mount must not wait for libraries of
Ceph that it doesn't use.
"""

from __future__ import annotations

from pmemfs.origin.base import Left, Origin
from pmemfs.origin.naming import FileName, NbdName, parse_origin


async def open_origin(text: str, *, read_only: bool = False, left: Left | None = None) -> Origin:
    """Open what a text names, and go on with what a dead process has left of it. The descriptors
    of `left` stay open.

    Raises BadOrigin for a text that names nothing, NeedsPackage where a library is missing,
    UnusableOrigin for what can't be one, OriginGone where nobody answers, and OSError.
    """
    name = parse_origin(text)
    if isinstance(name, FileName):
        from pmemfs.origin.file import FileOrigin

        left_fd = left.fds[0] if left and left.fds else None
        return await FileOrigin.open(name, read_only=read_only, left_fd=left_fd)
    if isinstance(name, NbdName):
        from pmemfs.origin.nbd import NbdOrigin

        return await NbdOrigin.open(name, read_only=read_only)
    from pmemfs.origin.rbd import RbdOrigin

    return await RbdOrigin.open(name, read_only=read_only, left=left)
