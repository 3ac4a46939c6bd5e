"""What the daemon of a mounted file system answers about keys, beside what every daemon does.

key-list                                            KeyReports
key-find    inode or name                           KeyReport
key-ways    name, secret                            KeyReport, with these ways only
key-add     name, secret, salt                      Added
key-change  name, secret, new secret, salt          KeyReport
key-remove  name, key ID, ways; whether forced      KeyReport
encrypt     inode, name, path                       KeyReport
unlock      inode or name, secret                   KeyReport
lock        inode or name; whether forced           Locked

A secret is a passphrase or the bytes of a key file, in Base64; a salt is random hexadecimal digits
of one request alone. Invariants:
- no secret is logged, nor in an answer;
- a command asks again when the daemon dies before it answers. What has changed by then is known by
  what the request alone can have stored, never by that it looks as if it had been changed. What a
  request removes it names exactly, as it was found by an earlier one, so that it can't remove more
  by being asked twice;
- one of these is carried out at a time. What takes long, to unwrap a key, goes on in a thread, and
  takes much memory.
"""

from __future__ import annotations

import binascii
import errno
from base64 import b64decode
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import trio

from pmemfs.errors import (
    BadKeyName,
    BadSecret,
    CannotEncrypt,
    CannotStoreKey,
    KeyInUse,
    LastWay,
    LostKey,
    NoKey,
    NoSecretMemory,
    NoSuchKey,
    NoSuchSource,
    NotEncrypted,
    NoWayLeft,
    SameSecret,
    WrongKey,
    sentence_of,
)
from pmemfs.fuse.forgetting import forget, kept_of, read_kept
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.media.inode import ROOT
from pmemfs.media.keyreport import (
    MOST_NAME_BYTES,
    SALT_BYTES,
    Added,
    KeyReport,
    KeyReports,
    KeyWay,
    Locked,
    check_secret,
)
from pmemfs.media.keys import KEY_ID_BYTES
from pmemfs.text import counted
from pmemfs.transform.keyring import Keyring
from pmemfs.unsaid import json_values
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.keystore import (
    WORDS,
    KeyStore,
    Secret,
    Way,
    key_report,
    name_of,
    wrapped,
)
from pmemfs.volume.fs.sealing import encoded

_RELEASE_SECONDS = 5
"""So long the kernel may need to say that a file is closed that nobody has any more."""
_POLL_SECONDS = 0.02
_MOST_POLL_SECONDS = 0.32

T = TypeVar("T")

_KINDS = {word: kind for kind, word in WORDS.items()}


class KeyMethods:
    """The methods of one mounted file system."""

    def __init__(
        self, fs: FileSystem, keyring: Keyring, handlers: Handlers,
        users_of: Callable[[set[int]], str], protect: Callable[[], None],
    ) -> None:  # fmt: skip
        """`users_of` names the processes that have inodes open, "" if it finds none. `protect`
        keeps memory of the mount's processes out of core files, before any of them has a key."""
        self._fs = fs
        self._keyring = keyring
        self._handlers = handlers
        self._users_of = users_of
        self._protect = protect
        self._store = KeyStore(fs.store, fs.xattrs)
        self._turn = trio.Lock()
        self._lost_names: dict[bytes, str] = {}
        """Of keys that are unlocked and that nothing unlocks any more, if this daemon removed the
        last way."""

    def methods(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """All of them, by name."""
        return {
            "key-list": self.list,
            "key-find": self.find,
            "key-ways": self.ways,
            "key-add": self.add,
            "key-change": self.change,
            "key-remove": self.remove,
            "encrypt": self.encrypt,
            "unlock": self.unlock,
            "lock": self.lock,
        }

    def reports(self) -> tuple[KeyReport, ...]:
        """All keys, also those that are unlocked and that no way is left to unlock."""
        stored = self._store.key_ids()
        others = self._keyring.unlocked - set(stored)
        return tuple(self._report(key_id) for key_id in [*stored, *sorted(others)])

    async def list(self) -> dict[str, Any]:
        """All keys."""
        return json_values(KeyReports(self.reports()))

    async def find(
        self, inode: int | None = None, name: str | None = None, path: str = ""
    ) -> dict[str, Any]:
        """The key of an inode, or of a name. Raises NoSuchKey, NotEncrypted."""
        return json_values(self._report(self._key_id(inode, name, path)))

    async def ways(self, name: str, secret: str, kind: str) -> dict[str, Any]:
        """A key, with those ways only that a secret unlocks. Raises NoSuchKey, BadSecret, LostKey,
        WrongKey, OSError."""
        given = _secret(secret, kind)
        async with self._turn:
            key_id = self._key_id(None, name)
            slot = self._slot()
            try:
                found = await self._unlocked_by(key_id, given, slot)
            finally:
                self._keyring.give_back(slot)
            if not found:
                raise self._why_not(key_id, given)
            return json_values(self._report(key_id, found))

    async def add(self, name: str, secret: str, kind: str, salt: str) -> dict[str, Any]:
        """Make a key, or add one more way to unlock a key that is unlocked, unless the secret
        unlocks it already. Raises BadKeyName, BadSecret, NoKey, OSError."""
        check_name(name)
        new, own = _secret(secret, kind), _salt(salt)
        async with self._turn:
            key_id = self._named(name)
            if key_id is None:
                key_id = await self._make_key(name, new, own)
            elif self._has_way(key_id, own):
                await self._unlock_made(key_id, new)
            else:
                await self._add_way(self._name(key_id) or name, key_id, new, own)
            return json_values(Added(self._report(key_id), self._has_way(key_id, own)))

    async def change(
        self, name: str, secret: str, kind: str, new_secret: str, new_kind: str, salt: str
    ) -> dict[str, Any]:
        """Replace the way that a secret unlocks by another, and what the new one unlocked already,
        too. Raises NoSuchKey, BadSecret, SameSecret, LostKey, WrongKey, OSError."""
        old, new, own = _secret(secret, kind), _secret(new_secret, new_kind), _salt(salt)
        async with self._turn:
            key_id = self._key_id(None, name)
            if old == new:
                raise SameSecret(name=name, kind=new_kind)
            ways = self._store.of_key(key_id)
            if self._has_way(key_id, own):
                # A daemon that has died has done it, and has answered nobody.
                return json_values(self._report(key_id))
            slot = self._slot()
            try:
                replaced = await self._unlocked_by(key_id, old, slot)
                if not replaced:
                    raise self._why_not(key_id, old)
                same = await self._unlocked_by(key_id, new, slot)
                # What was tried last may have left no key in the slot.
                await self._unwrap(key_id, old, slot, replaced)
                value = await self._in_thread(
                    wrapped, name_of(ways), key_id, new, self._keyring.secrets, slot, own
                )
                self._storing(partial(self._store.replace, [*replaced, *same], value))
            finally:
                self._keyring.give_back(slot)
            return json_values(self._report(key_id))

    async def remove(
        self, name: str, key_id: str, ways: tuple[KeyWay, ...], is_forced: bool = False
    ) -> dict[str, Any]:
        """Remove these ways to unlock a key, as far as they are still there; the last one only if
        that is forced. Raises BadKeyName, NoSuchKey, LastWay, OSError."""
        check_name(name)
        id_ = _id(key_id)
        async with self._turn:
            there = self._store.of_key(id_)
            # A way that came later has another time, though it may have got the number.
            named = {(way.number, way.created_ns) for way in ways}
            chosen = [way for way in there if (way.number, way.created_ns) in named]
            if chosen:
                if not is_forced and not any(way.wrapped for way in there if way not in chosen):
                    raise LastWay(name=name)
                self._storing(partial(self._store.remove, chosen))
            is_lost = not self._store.of_key(id_) and self._keyring.is_unlocked(id_)
            if is_lost and name != key_id:
                self._lost_names[id_] = name
            return json_values(self._report(id_))

    async def encrypt(self, inode: int, name: str, path: str) -> dict[str, Any]:
        """Encrypt an empty directory with a key. Raises NoSuchKey, NoKey, CannotEncrypt."""
        key_id = self._key_id(None, name)
        self._check_unlocked(key_id, name)
        if not self._store.of_key(key_id):
            why = (
                f"nothing unlocks the key {name!r} any more; 'pmemfs key add' lets something do so"
            )
            raise CannotEncrypt(errno.ENOKEY, path=path, why=why)
        try:
            self._fs.properties.encrypt(inode, key_id)
        except OSError as error:
            raise CannotEncrypt(error.errno, path=path, why=sentence_of(error)) from None
        return json_values(self._report(key_id))

    async def unlock(
        self, secret: str, kind: str, inode: int | None = None, name: str | None = None,
        path: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Unlock a key. Raises NoSuchKey, NotEncrypted, BadSecret, LostKey, WrongKey, OSError."""
        given = _secret(secret, kind)
        async with self._turn:
            key_id = self._key_id(inode, name, path)
            slot = self._slot()
            try:
                await self._unwrap(key_id, given, slot)
                await read_kept(self._fs)
            except BaseException:
                self._keyring.give_back(slot)
                raise
            if self._keyring.is_unlocked(key_id):
                self._keyring.give_back(slot)
            else:
                # Nothing is awaited in between, so no name comes that is not forgotten.
                kept = kept_of(self._fs, key_id)
                self._keyring.keep_master(slot)
                await forget(self._handlers.notifier, kept, lambda _, stored: encoded(stored))
            return json_values(self._report(key_id))

    async def lock(
        self, inode: int | None = None, name: str | None = None, path: str = "",
        is_forced: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Lock a key, if it is not locked; one that nothing would unlock again only if that is
        forced. Raises NoSuchKey, NotEncrypted, NoWayLeft, KeyInUse."""
        async with self._turn:
            key_id = self._key_id(inode, name, path)
            key = self._name(key_id) or key_id.hex()
            if not self._keyring.is_unlocked(key_id):
                return json_values(Locked(key, key_id.hex(), was_locked=True))
            if not is_forced and not any(way.wrapped for way in self._store.of_key(key_id)):
                raise NoWayLeft(name=key)
            await read_kept(self._fs)
            await self._wait_until_closed(key_id, key)
            # Nothing is awaited in between, so nothing else is opened, and no name comes that is
            # not forgotten.
            kept = kept_of(self._fs, key_id)
            self._keyring.begin_lock(key_id)
            try:
                await forget(self._handlers.notifier, kept, self._fs.store.sealing.plain_name)
            except BaseException:
                self._keyring.keep_unlocked(key_id)
                raise
            self._keyring.lock(key_id)
            self._lost_names.pop(key_id, None)
            return json_values(Locked(key, key_id.hex(), was_locked=False))

    def _slot(self) -> int:
        """A slot for a key; `give_back` or `keep_master` follows. Raises NoSecretMemory."""
        try:
            self._protect()
            return self._keyring.take_master()
        except OSError as error:
            raise NoSecretMemory(why=sentence_of(error)) from None

    def _key_id(self, inode: int | None, name: str | None, path: str = "") -> bytes:
        """The key of a name, or of an inode. Raises NoSuchKey, NotEncrypted, NoSuchSource."""
        if name is not None:
            key_id = self._named(name)
            if key_id is None:
                raise NoSuchKey(name=name)
            return key_id
        number = ROOT if inode is None else inode
        shown = path or f"inode {number}"
        try:
            transform = self._fs.inode(number).transform
        except OSError as error:
            raise NoSuchSource(path=shown, why=sentence_of(error)) from None
        if transform is None or not any(transform.key_id):
            raise NotEncrypted(path=shown)
        return transform.key_id

    def _named(self, name: str) -> bytes | None:
        """The ID of the key of a name; None if there is none. One that is unlocked and that nothing
        unlocks any more has its ID as a name, too: its name is stored nowhere."""
        stored = self._store.named(name)
        if stored is not None:
            return stored
        lost = self._keyring.unlocked - set(self._store.key_ids())
        return next((id_ for id_ in lost if name in (self._name(id_), id_.hex())), None)

    def _name(self, key_id: bytes) -> str:
        """The name of a key; "" if nobody knows it."""
        return name_of(self._store.of_key(key_id)) or self._lost_names.get(key_id, "")

    def _check_unlocked(self, key_id: bytes, name: str) -> None:
        if not self._keyring.is_unlocked(key_id):
            raise NoKey(name=name)

    def _has_way(self, key_id: bytes, own: bytes) -> bool:
        """Whether a request with this salt has added a way to unlock a key."""
        return any(way.wrapped and way.wrapped.salt == own for way in self._store.of_key(key_id))

    async def _make_key(self, name: str, new: Secret, own: bytes) -> bytes:
        """Make a key, which is unlocked then; its ID."""
        slot = self._slot()
        try:
            key_id = self._keyring.secrets.generate(slot)
            await self._add_wrapped(name, key_id, new, slot, own)
        except BaseException:
            self._keyring.give_back(slot)
            raise
        self._keyring.keep_master(slot)
        return key_id

    async def _unlock_made(self, key_id: bytes, new: Secret) -> None:
        """Unlock a key that was made for this secret by a daemon that died before it unlocked
        it."""
        if self._keyring.is_unlocked(key_id):
            return
        slot = self._slot()
        try:
            await self._unwrap(key_id, new, slot)
        except BaseException:
            self._keyring.give_back(slot)
            raise
        self._keyring.keep_master(slot)

    async def _add_way(self, name: str, key_id: bytes, new: Secret, own: bytes) -> None:
        """Add one more way to a key that is unlocked, unless the secret unlocks it already."""
        self._check_unlocked(key_id, name)
        slot = self._slot()
        try:
            with suppress(WrongKey, LostKey):
                await self._unwrap(key_id, new, slot)
                return
        finally:
            self._keyring.give_back(slot)
        await self._add_wrapped(name, key_id, new, self._keyring.slot_of(key_id), own)

    async def _add_wrapped(
        self, name: str, key_id: bytes, new: Secret, slot: int, own: bytes
    ) -> None:
        value = await self._in_thread(wrapped, name, key_id, new, self._keyring.secrets, slot, own)
        self._storing(partial(self._store.add, key_id, value))

    async def _unlocked_by(self, key_id: bytes, secret: Secret, slot: int) -> Sequence[Way]:
        """All ways to unlock a key that a secret unlocks, by trying them in a slot."""
        return [
            way
            for way in self._store.of_key(key_id)
            if await self._in_thread(way.is_unlocked_by, secret, self._keyring.secrets, slot)
        ]

    async def _unwrap(
        self, key_id: bytes, secret: Secret, slot: int, ways: Sequence[Way] | None = None
    ) -> None:
        """Put a key into a slot, by any way or by one of these. Raises LostKey, WrongKey."""
        for way in self._store.of_key(key_id) if ways is None else ways:
            if await self._in_thread(way.is_unlocked_by, secret, self._keyring.secrets, slot):
                return
        raise self._why_not(key_id, secret)

    def _why_not(self, key_id: bytes, secret: Secret) -> LostKey | WrongKey:
        """What to say if a secret unlocks a key in no way."""
        ways = self._store.of_key(key_id)
        if not ways:
            return LostKey(key_id=key_id.hex())
        word = WORDS[secret.kind]
        if any(way.wrapped and way.wrapped.kind == secret.kind for way in ways):
            why = f"the {word} is wrong"
        elif any(way.wrapped for way in ways):
            other = next(WORDS[k] for k in WORDS if k is not secret.kind)
            why = f"it has a {other}, and no {word}"
        else:
            why = f"what is stored of it is damaged: {ways[0].problem}"
        return WrongKey(name=name_of(ways) or key_id.hex(), why=why)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        """Do what takes long. Nothing else touches the slot meanwhile."""
        return await trio.to_thread.run_sync(partial(call, *args))

    def _storing(self, store: Callable[[], object]) -> None:
        """Raises CannotStoreKey."""
        try:
            store()
        except OSError as error:
            raise CannotStoreKey(error.errno or errno.EIO, why=sentence_of(error)) from None

    def _opened(self, key_id: bytes) -> dict[int, set[int]]:
        """The open files of a key, and the processes that have opened them."""
        opened: dict[int, set[int]] = {}
        for number, pid in self._handlers.files.openers():
            # A file that is damaged since must not keep its key from being locked.
            with suppress(OSError):
                transform = self._fs.inode(number).transform
                if transform is not None and transform.key_id == key_id:
                    opened.setdefault(number, set()).add(pid)
        return opened

    async def _wait_until_closed(self, key_id: bytes, name: str) -> None:
        """Return when no file of a key is open. Raises KeyInUse if a process has one.

        The kernel says that a file is closed some time after close(2) has returned.
        """
        pause_seconds = _POLL_SECONDS
        with trio.move_on_after(_RELEASE_SECONDS):
            while opened := self._opened(key_id):
                if who := await trio.to_thread.run_sync(self._users_of, set(opened)):
                    raise KeyInUse(name=name, why=f"files of it are open: {who}")
                await trio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _MOST_POLL_SECONDS)
            return
        files = counted(len(opened), "file is", "files are")
        pids = ", ".join(map(str, sorted(set().union(*opened.values()))))
        raise KeyInUse(name=name, why=f"{files} open; opened by process {pids}")

    def _report(self, key_id: bytes, ways: Sequence[Way] | None = None) -> KeyReport:
        """What is said of a key, with all ways to unlock it or with some."""
        return key_report(
            key_id, self._store.of_key(key_id) if ways is None else ways,
            is_unlocked=self._keyring.is_unlocked(key_id),
            name=self._lost_names.get(key_id, ""),
        )  # fmt: skip


def check_name(name: str) -> None:
    """Raise BadKeyName for what can't name a key."""
    encoded = name.encode(errors="surrogatepass")
    for is_wrong, why in (
        (not name, "it is empty"),
        (len(encoded) > MOST_NAME_BYTES, f"it has more than {MOST_NAME_BYTES} bytes"),
        (not name.isprintable(), "it has characters that can't be shown"),
    ):
        if is_wrong:
            raise BadKeyName(name=name, why=why)


def _secret(text: str, kind: str) -> Secret:
    """What a request says of a secret. Raises BadSecret."""
    try:
        raw = b64decode(text, validate=True)
    except binascii.Error:
        raise BadSecret(what="this", why="it is no Base64") from None
    if kind not in _KINDS:
        raise BadSecret(what="this", why=f"its kind is none of {', '.join(_KINDS)}")
    check_secret(raw, kind)
    return Secret(_KINDS[kind], raw)


def _id(digits: str) -> bytes:
    """Raises NoSuchKey."""
    try:
        key_id = bytes.fromhex(digits)
    except ValueError:
        key_id = b""
    if len(key_id) != KEY_ID_BYTES:
        raise NoSuchKey(name=digits)
    return key_id


def _salt(digits: str) -> bytes:
    """Raises BadSecret."""
    try:
        salt = bytes.fromhex(digits)
    except ValueError:
        salt = b""
    if len(salt) != SALT_BYTES:
        raise BadSecret(what="this", why=f"its salt has not {2 * SALT_BYTES} hexadecimal digits")
    return salt
