"""The functions of librados and librbd that open an image and ask about it, by ctypes.

All of them may wait for the cluster, so they are for threads. What there is much of is in
`rbdcommands`.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import Any, NamedTuple

from pmemfs.errors import NeedsPackage, system_error
from pmemfs.origin import rbdcommands
from pmemfs.origin.rbdcommands import Commands

PACKAGE = "librbd1"
RADOS_LIBRARY, RBD_LIBRARY = "librados.so.2", "librbd.so.1"
FEATURE_EXCLUSIVE_LOCK = 1 << 2
_LOCK_MODE_EXCLUSIVE = 0
_FSID_ROOM = 64
_ID_ROOM = 256
_MOST_WATCHERS = 64
_LOCKERS_ROOM = 4096
_COUNT = struct.Struct("<I")
_ACKNOWLEDGEMENT = struct.Struct("<QQI")
"""Client, cookie, length of what it has said, which follows."""

_P, _SIZE, _TEXT, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int


class _Watcher(ctypes.Structure):
    _fields_ = (("addr", ctypes.c_char_p), ("id", ctypes.c_int64), ("cookie", ctypes.c_uint64))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_RADOS: dict[str, tuple[Any, ...]] = {
    "rados_create": (_INT, ctypes.POINTER(_P), _TEXT),
    "rados_conf_read_file": (_INT, _P, _TEXT),
    "rados_conf_parse_env": (_INT, _P, _TEXT),
    "rados_conf_set": (_INT, _P, _TEXT, _TEXT),
    "rados_connect": (_INT, _P),
    "rados_shutdown": (None, _P),
    "rados_cluster_fsid": (_INT, _P, _TEXT, ctypes.c_size_t),
    "rados_get_instance_id": (_SIZE, _P),
    "rados_ioctx_create": (_INT, _P, _TEXT, ctypes.POINTER(_P)),
    "rados_ioctx_set_namespace": (None, _P, _TEXT),
    "rados_ioctx_get_id": (ctypes.c_int64, _P),
    "rados_ioctx_destroy": (None, _P),
    "rados_notify2": (
        _INT,
        _P,
        _TEXT,
        _TEXT,
        _INT,
        _SIZE,
        ctypes.POINTER(_P),
        ctypes.POINTER(ctypes.c_size_t),
    ),
    "rados_buffer_free": (None, _P),
}
_RBD: dict[str, tuple[Any, ...]] = {
    "rbd_open": (_INT, _P, _TEXT, ctypes.POINTER(_P), _TEXT),
    "rbd_open_read_only": (_INT, _P, _TEXT, ctypes.POINTER(_P), _TEXT),
    "rbd_close": (_INT, _P),
    "rbd_get_size": (_INT, _P, ctypes.POINTER(_SIZE)),
    "rbd_get_features": (_INT, _P, ctypes.POINTER(_SIZE)),
    "rbd_get_id": (_INT, _P, _TEXT, ctypes.c_size_t),
    "rbd_get_modify_timestamp": (_INT, _P, ctypes.POINTER(_Time)),
    "rbd_metadata_get": (_INT, _P, _TEXT, _TEXT, ctypes.POINTER(ctypes.c_size_t)),
    "rbd_metadata_set": (_INT, _P, _TEXT, _TEXT),
    "rbd_lock_acquire": (_INT, _P, _INT),
    "rbd_lock_release": (_INT, _P),
    "rbd_lock_get_owners": (_INT, _P, ctypes.POINTER(_INT), _P, ctypes.POINTER(ctypes.c_size_t)),
    "rbd_lock_get_owners_cleanup": (None, _P, ctypes.c_size_t),
    "rbd_lock_break": (_INT, _P, _INT, _TEXT),
    "rbd_list_lockers": (
        ctypes.c_ssize_t,
        _P,
        ctypes.POINTER(_INT),
        *(_P, ctypes.POINTER(ctypes.c_size_t)) * 4,
    ),
    "rbd_watchers_list": (_INT, _P, _P, ctypes.POINTER(ctypes.c_size_t)),
    "rbd_watchers_list_cleanup": (None, _P, ctypes.c_size_t),
}


class Locker(NamedTuple):
    """A client that has a lock of an image."""

    client: str
    cookie: str

    @property
    def is_by_hand(self) -> bool:
        """Whether `rbd lock add` or a program like it has made the lock, and not librbd itself."""
        return not self.cookie.startswith("auto ")


class Watcher(NamedTuple):
    """A client that has an image open."""

    address: str
    client: int


def load() -> Any:
    """Both libraries, as one object with their functions. Raises NeedsPackage."""
    try:
        rados, rbd = ctypes.CDLL(RADOS_LIBRARY), ctypes.CDLL(RBD_LIBRARY)
    except OSError:
        raise NeedsPackage(
            what="an image of Ceph", package=PACKAGE, remedy="scripts/install-origins installs it"
        ) from None
    if not rbdcommands.load(RBD_LIBRARY):
        raise NeedsPackage(
            what="an image of Ceph", package=PACKAGE, remedy="scripts/install-origins installs it"
        )
    for library, functions in ((rados, _RADOS), (rbd, _RBD)):
        for name, (result, *words) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, words
            if library is rados:
                setattr(rbd, name, function)
    return rbd


class Cluster:
    """A connection to a pool of a cluster."""

    def __init__(self, library: Any, user: str, conf: str, settings: dict[str, str]) -> None:
        """Read the configuration, the environment's where `conf` is empty. Raises OSError."""
        self.library = library
        self._cluster, self._context = _P(), _P()
        _check(library.rados_create(ctypes.byref(self._cluster), user.encode() or None))
        try:
            _check(library.rados_conf_read_file(self._cluster, conf.encode() or None))
            _check(library.rados_conf_parse_env(self._cluster, None))
            for name, value in settings.items():
                _check(library.rados_conf_set(self._cluster, name.encode(), value.encode()))
        except BaseException:
            library.rados_shutdown(self._cluster)
            raise

    def connect(self) -> None:
        """Raises OSError."""
        _check(self.library.rados_connect(self._cluster))

    def enter(self, pool: str, namespace: str) -> None:
        """Use a pool. Raises OSError."""
        library = self.library
        _check(
            library.rados_ioctx_create(self._cluster, pool.encode(), ctypes.byref(self._context))
        )
        library.rados_ioctx_set_namespace(self._context, namespace.encode())

    @property
    def names(self) -> tuple[str, int, int]:
        """The cluster's id, the pool's, and this client's."""
        text = ctypes.create_string_buffer(_FSID_ROOM)
        _check(self.library.rados_cluster_fsid(self._cluster, text, _FSID_ROOM))
        pool = self.library.rados_ioctx_get_id(self._context)
        return text.value.decode(), pool, self.library.rados_get_instance_id(self._cluster)

    def open(self, name: str, snapshot: str, *, read_only: bool) -> Image:
        """An image. Raises OSError."""
        library, image = self.library, _P()
        opened = library.rbd_open_read_only if read_only else library.rbd_open
        at = snapshot.encode() or None
        _check(opened(self._context, name.encode(), ctypes.byref(image), at))
        return Image(library, image)

    def answering(self, image_id: str, seconds: float) -> set[int]:
        """The clients that have an image open for writing, and answer within some seconds.

        A notification without content is what old clients sent when a header had changed, so all
        clients understand it: they look at the header again. Raises OSError.
        """
        reply, length = _P(), ctypes.c_size_t()
        header = f"rbd_header.{image_id}".encode()
        number = self.library.rados_notify2(
            self._context, header, None, 0, int(seconds * 1000),
            ctypes.byref(reply), ctypes.byref(length),
        )  # fmt: skip
        try:
            if number != -errno.ETIMEDOUT:
                _check(number)
            return _acknowledged(ctypes.string_at(reply, length.value) if reply else b"")
        finally:
            if reply:
                self.library.rados_buffer_free(reply)

    def close(self) -> None:
        """Disconnect."""
        if self._context:
            self.library.rados_ioctx_destroy(self._context)
        self.library.rados_shutdown(self._cluster)


class Image:
    """An open image."""

    def __init__(self, library: Any, image: ctypes.c_void_p) -> None:
        self._library = library
        self._image = image
        assert image.value is not None
        self.commands = Commands(image.value)

    def close(self) -> None:
        """Let go of the image, and of its lock."""
        _check(self._library.rbd_close(self._image))

    def size_bytes(self) -> int:
        """The size as it is now."""
        size = _SIZE()
        _check(self._library.rbd_get_size(self._image, ctypes.byref(size)))
        return size.value

    def features(self) -> int:
        """Bits of RBD_FEATURE."""
        features = _SIZE()
        _check(self._library.rbd_get_features(self._image, ctypes.byref(features)))
        return features.value

    def id(self) -> str:
        """The image's own name, which no other image of the pool ever has."""
        text = ctypes.create_string_buffer(_ID_ROOM)
        _check(self._library.rbd_get_id(self._image, text, _ID_ROOM))
        return text.value.decode()

    def modified_ns(self) -> int:
        """When somebody last said that the image was written to, as it was at the opening."""
        time = _Time()
        _check(self._library.rbd_get_modify_timestamp(self._image, ctypes.byref(time)))
        return int(time.seconds * 1_000_000_000 + time.nanoseconds)

    def metadata(self, key: str) -> str:
        """A value that is kept with the image, empty if there is none."""
        text, room = ctypes.create_string_buffer(_ID_ROOM), ctypes.c_size_t(_ID_ROOM)
        number = self._library.rbd_metadata_get(self._image, key.encode(), text, ctypes.byref(room))
        return text.value.decode(errors="replace") if number == 0 else ""

    def set_metadata(self, key: str, value: str) -> None:
        """Keep a value with the image."""
        _check(self._library.rbd_metadata_set(self._image, key.encode(), value.encode()))

    def acquire_lock(self) -> None:
        """Take the exclusive lock, and refuse it to all who ask for it from now on."""
        _check(self._library.rbd_lock_acquire(self._image, _LOCK_MODE_EXCLUSIVE))

    def lock_owner(self) -> str:
        """The address of the client that has the exclusive lock; empty if none has it."""
        owners, count = (_TEXT * 1)(), ctypes.c_size_t(1)
        number = self._library.rbd_lock_get_owners(
            self._image, ctypes.byref(_INT()), owners, ctypes.byref(count)
        )
        if number == -errno.ENOENT or not count.value:
            return ""
        _check(number)
        owner = (owners[0] or b"").decode()
        self._library.rbd_lock_get_owners_cleanup(owners, count)
        return owner

    def break_lock(self, owner: str) -> None:
        """Take the exclusive lock away from a client that is dead. The cluster takes nothing from
        that client any more, not even what is on its way. Raises OSError: ENOENT if nobody has the
        lock, EBUSY if another client has it."""
        _check(self._library.rbd_lock_break(self._image, _LOCK_MODE_EXCLUSIVE, owner.encode()))

    def lockers(self) -> list[Locker]:
        """The clients that have a lock of the image."""
        texts = [ctypes.create_string_buffer(_LOCKERS_ROOM) for _ in range(4)]
        rooms = [ctypes.c_size_t(_LOCKERS_ROOM) for _ in texts]
        pairs = [each for text, room in zip(texts, rooms, strict=True)
                 for each in (text, ctypes.byref(room))]  # fmt: skip
        count = self._library.rbd_list_lockers(self._image, ctypes.byref(_INT()), *pairs)
        _check(count)
        clients, cookies = (text.raw.decode(errors="replace").split("\0") for text in texts[1:3])
        return [Locker(*each) for each in zip(clients[:count], cookies[:count], strict=True)]

    def watchers(self) -> list[Watcher]:
        """The clients that have the image open for writing, or had it until lately."""
        room = ctypes.c_size_t(_MOST_WATCHERS)
        found = (_Watcher * _MOST_WATCHERS)()
        _check(self._library.rbd_watchers_list(self._image, found, ctypes.byref(room)))
        watchers = [Watcher(each.addr.decode(), each.id) for each in found[: room.value]]
        self._library.rbd_watchers_list_cleanup(found, room)
        return watchers


def _acknowledged(reply: bytes) -> set[int]:
    """The clients that have acknowledged a notification. Source: rados/librados.h."""
    clients, at = set(), _COUNT.size
    for _ in range(_COUNT.unpack_from(reply)[0] if reply else 0):
        client, _, length = _ACKNOWLEDGEMENT.unpack_from(reply, at)
        clients.add(client)
        at += _ACKNOWLEDGEMENT.size + length
    return clients


def _check(number: int) -> None:
    if number < 0:
        raise system_error(-number)
