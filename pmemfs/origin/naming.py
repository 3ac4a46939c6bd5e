"""How an origin is named: a path, an NBD URI, or `rbd:POOL/IMAGE`.

A text that isn't a URI is a path. NBD's URIs are those of the NBD project, which libnbd takes as
they are; an image is named as the `rbd` program names it, and options follow as in a URI:
`rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][?id=USER&conf=FILE]`.
Source: doc/uri.md of https://github.com/NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from pmemfs.errors import BadOrigin

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_NBD_TCP = ("nbd", "nbds")
_NBD_UNIX = ("nbd+unix", "nbds+unix")
_RBD_OPTIONS = ("id", "conf")


@dataclass(frozen=True, slots=True)
class FileName:
    """A file or a block device."""

    path: str
    """Absolute."""

    @property
    def text(self) -> str:
        """The canonical text."""
        return self.path


@dataclass(frozen=True, slots=True)
class NbdName:
    """An export of an NBD server."""

    text: str
    """The URI, as libnbd takes it, and the canonical text."""
    export: str


@dataclass(frozen=True, slots=True)
class RbdName:
    """An image of a Ceph cluster, or a snapshot of one."""

    pool: str
    namespace: str
    image: str
    snapshot: str
    user: str
    conf: str

    @property
    def spec(self) -> str:
        """As the `rbd` program names the image."""
        return "/".join(filter(None, (self.pool, self.namespace, self.image)))

    @property
    def text(self) -> str:
        """The canonical text."""
        at = f"@{self.snapshot}" if self.snapshot else ""
        options = {name: value for name, value in zip(_RBD_OPTIONS, (self.user, self.conf),
                                                      strict=True) if value}  # fmt: skip
        return f"rbd:{self.spec}{at}" + (f"?{urlencode(options, safe='/')}" if options else "")


def parse_origin(text: str) -> FileName | NbdName | RbdName:
    """What a text names; a relative path is made absolute. Raises BadOrigin."""
    if not text or "\0" in text:
        raise BadOrigin(text=text, why="it has to be a path, an nbd:// URI or rbd:POOL/IMAGE")
    match = _SCHEME.fullmatch(text)
    if match is None or os.path.lexists(text):
        return FileName(os.path.abspath(text))
    scheme = match[1].lower()
    if scheme in (*_NBD_TCP, *_NBD_UNIX):
        return _parse_nbd(text, scheme)
    if scheme == "rbd":
        return _parse_rbd(text, match[2])
    if match[2].startswith("//"):
        raise BadOrigin(
            text=text,
            why=f"nothing here speaks {scheme}; it has to be a path, an nbd:// URI or "
            "rbd:POOL/IMAGE",
        )
    return FileName(os.path.abspath(text))


def _parse_nbd(text: str, scheme: str) -> NbdName:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise BadOrigin(text=text, why=str(error).lower()) from None
    queries = dict(parse_qsl(parts.query))
    if scheme in _NBD_TCP and (not parts.hostname or port == 0):
        raise BadOrigin(text=text, why=f"write it as {scheme}://HOST[:PORT]/EXPORT")
    if scheme in _NBD_UNIX and (parts.hostname or not queries.get("socket")):
        raise BadOrigin(text=text, why=f"write it as {scheme}:///EXPORT?socket=/PATH/OF/SOCKET")
    return NbdName(text, unquote(parts.path.removeprefix("/")))


def _parse_rbd(text: str, rest: str) -> RbdName:
    spec, _, query = rest.partition("?")
    spec, has_at, snapshot = spec.partition("@")
    words = spec.split("/")
    if len(words) not in (2, 3) or not all(words) or bool(has_at) != bool(snapshot):
        raise BadOrigin(text=text, why="write it as rbd:POOL/IMAGE, with @SNAPSHOT for a snapshot")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - set(_RBD_OPTIONS))
    if unknown or (query and not options):
        raise BadOrigin(
            text=text,
            why=f"{unknown[0] if unknown else query} is not an option of an image; "
            "id=USER and conf=FILE are",
        )
    namespace = words[1] if len(words) == 3 else ""
    conf = os.path.abspath(options["conf"]) if "conf" in options else ""
    return RbdName(words[0], namespace, words[-1], snapshot, options.get("id", ""), conf)
