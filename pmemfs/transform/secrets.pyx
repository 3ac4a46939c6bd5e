# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Keys in memory that is in no core file and in no swap, and what is done with them there.

A key is named by the number of its slot. Its bytes never become an object of Python: these can
neither be kept from being copied nor be overwritten. The processes of a mount that need keys, and
its keeper, share one such memory by its descriptor. Invariants:
- whatever a call computes of a key on the way is overwritten before the call returns;
- a slot is filled before its `kind` says so, so whoever finds a kind finds its key;
- only the control plane fills and wipes slots. It wipes one only when no table that is published
  names it any more, and after a grace period.

Master keys have 64 random bytes. They are stored only wrapped: encrypted with AES-256-SIV by a key
made of a passphrase (scrypt) or of the bytes of a key file (HKDF-SHA512). Files and directories
have keys of their own, which HKDF-SHA512 makes of a master key.

Source: memfd_secret(2); RFC 5297 (SIV), 5869 (HKDF), 7914 (scrypt); IEEE 1619 (XTS).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from posix.mman cimport munmap

from pmemfs.transform.secrets cimport *

import os

cdef extern from "string.h" nogil:
    void explicit_bzero(void *memory, size_t length)

SLOT_COUNT = SECRETS_COUNT
FREE, MASTER, FILE, TRIED = 0, 1, 2, 5
"""Kinds of slots: a master key is TRIED until `keep`. Other kinds of derived keys may have other
numbers."""
WRAPPED_BYTES = SIV_BYTES + KEY_BYTES
SIV_OVERHEAD_BYTES = SIV_BYTES
KEY_ID_BYTES = 16
SCRYPT_LIMIT_BYTES = 1 << 30
"""More memory is taken for no passphrase, whatever a pool says."""

cdef enum:
    MASTER_KIND = 1
    FILE_KIND = 2
    TRIED_KIND = 5
    OWNER_BYTES = 16

cdef bytes _ID_INFO = b"pmemfs key id"
cdef bytes _FILE_INFO = b"pmemfs key file"


def load_ciphers() -> None:
    """Load libcrypto, as the first use of a key would. Raises OSError (ELIBACC)."""
    if load_crypto():
        raise OSError(load_crypto(), "libcrypto.so.3 of OpenSSL can't be loaded; "
                      "install the package libssl3")


def create_secrets() -> int:
    """A descriptor of new memory for keys. Raises OSError."""
    cdef int fd = new_secrets()
    if fd < 0:
        raise OSError(errno, f"no memory for keys: {os.strerror(errno)}")
    return fd


cdef class Secrets:
    """The slots in the memory of a descriptor, which stays the caller's to close.

    Raises OSError: ENOMEM, EAGAIN or EPERM if the memory can't be locked (`ulimit -l`), ELIBACC
    without libcrypto.
    """

    cdef secret_t *_secrets
    cdef readonly int fd

    def __cinit__(self, int fd) -> None:
        cdef int failed
        load_ciphers()
        failed = map_secrets(fd, &self._secrets)
        if failed:
            self._secrets = NULL
            raise OSError(failed, "no locked memory for keys: the daemon needs "
                          f"{SECRETS_COUNT * sizeof(secret_t)} bytes of it, and 'ulimit -l' "
                          f"limits it ({os.strerror(failed)})")
        self.fd = fd

    def __dealloc__(self) -> None:
        if self._secrets != NULL:
            munmap(self._secrets, SECRETS_BYTES)

    # Slots

    def kind(self, int slot) -> int:
        """What is in a slot: FREE, MASTER, FILE or another kind."""
        return self._slot(slot).kind

    def serial(self, int slot) -> int:
        """How often the slot was filled."""
        return self._slot(slot).serial

    def key_id(self, int slot) -> bytes:
        """The name of the master key in a slot."""
        return bytes(self._slot(slot).owner[:OWNER_BYTES])

    def file_of(self, int slot) -> tuple[int, int]:
        """Whose derived key is in a slot: inode and generation."""
        cdef uint64_t words[2]
        memcpy(words, self._slot(slot).owner, OWNER_BYTES)
        return words[0], words[1]

    def wipe(self, int slot) -> None:
        """Overwrite a slot."""
        self._wipe(self._slot(slot))

    def wipe_all(self) -> None:
        """Overwrite all slots."""
        cdef int slot
        for slot in range(SECRETS_COUNT):
            if self._secrets[slot].kind:
                self._wipe(&self._secrets[slot])

    # Master keys

    def generate(self, int slot) -> bytes:
        """Make a new master key in a slot; its key_id of 16 bytes."""
        cdef secret_t *into = self._slot(slot)
        cdef int failed = random_bytes(into.key, KEY_BYTES)
        if failed:
            raise OSError(failed, "no random bytes for a key")
        return self._name_master(into)

    def wrap(self, int slot, bytes secret not None, bytes salt not None, unsigned log2_n,
             unsigned r, unsigned p, bytes aad not None) -> bytes:
        """The master key of a slot, encrypted by a passphrase or by the bytes of a key file.

        For a passphrase scrypt gets 2^log2_n, r and p; with log2_n 0 it is a key file. What `aad`
        says can't be changed unnoticed. Raises ValueError for parameters that need more than
        `SCRYPT_LIMIT_BYTES`, or that scrypt doesn't know.
        """
        cdef secret_t *found = self._slot(slot)
        cdef uint8_t wrapping[64]
        cdef uint8_t wrapped[80]
        cdef bint works
        if not _is_master(found):
            raise KeyError(slot)
        _make_wrapping(wrapping, secret, salt, log2_n, r, p)
        works = siv_encrypt(wrapping, aad, <size_t>len(aad), found.key, KEY_BYTES, wrapped)
        explicit_bzero(wrapping, sizeof(wrapping))
        _demand(works)
        return bytes(wrapped[:80])

    def unwrap(self, int slot, bytes secret not None, bytes salt not None, unsigned log2_n,
               unsigned r, unsigned p, bytes wrapped not None, bytes aad not None) -> bool:
        """Put a master key that was wrapped into a slot. False, and nothing happens, if the
        passphrase or the key file is another one, or `wrapped` or `aad` is damaged. Raises
        ValueError as `wrap`."""
        cdef secret_t *into = self._slot(slot)
        cdef uint8_t wrapping[64]
        cdef uint8_t key[64]
        cdef const uint8_t *source = wrapped
        cdef bint is_right
        if len(wrapped) != SIV_BYTES + KEY_BYTES:
            return False
        _make_wrapping(wrapping, secret, salt, log2_n, r, p)
        is_right = siv_decrypt(wrapping, aad, <size_t>len(aad), source, KEY_BYTES, key)
        explicit_bzero(wrapping, sizeof(wrapping))
        if is_right:
            memcpy(into.key, key, KEY_BYTES)
            explicit_bzero(key, sizeof(key))
            self._name_master(into)
        return is_right

    def keep(self, int slot) -> None:
        """The master key in a slot is unlocked from now on, also for another process that takes
        over."""
        cdef secret_t *found = self._slot(slot)
        if not _is_master(found):
            raise KeyError(slot)
        found.kind = MASTER_KIND

    # Derived keys

    def derive(self, int from_slot, int to_slot, bytes info not None, *, uint64_t inode=0,
               uint64_t generation=0, uint32_t kind=FILE_KIND) -> None:
        """Fill a slot with the key that a master key and `info` (at most 255 bytes) make, for a
        file or directory."""
        cdef secret_t *source = self._slot(from_slot)
        cdef secret_t *into = self._slot(to_slot)
        cdef uint64_t[2] owner = [inode, generation]
        if (not _is_master(source) or from_slot == to_slot or kind <= MASTER_KIND
                or kind == TRIED_KIND):
            raise KeyError(from_slot)
        into.kind = 0
        if len(info) > INFO_LIMIT:
            raise ValueError(f"{len(info)} bytes of info are too many")
        _demand(hkdf(source.key, KEY_BYTES, NULL, 0, info, <size_t>len(info), into.key))
        memcpy(into.owner, owner, OWNER_BYTES)
        into.serial += 1
        into.kind = kind

    def siv_encrypt(self, int slot, bytes aad not None, bytes data not None) -> bytes:
        """AES-256-SIV: deterministic. An IV of 16 bytes, and as many bytes as `data` has. An empty
        `aad` is none."""
        cdef secret_t *found = self._filled(slot)
        cdef bytes into = PyBytes_FromStringAndSize(NULL, SIV_BYTES + len(data))
        _demand(siv_encrypt(found.key, aad, <size_t>len(aad), data, <size_t>len(data),
                            <uint8_t *>PyBytes_AS_STRING(into)))
        return into

    def siv_decrypt(self, int slot, bytes aad not None, bytes data not None) -> bytes | None:
        """What `siv_encrypt` was given; None if this key has not made `data` with this `aad`."""
        cdef secret_t *found = self._filled(slot)
        cdef bytes into
        if len(data) < SIV_BYTES:
            return None
        into = PyBytes_FromStringAndSize(NULL, len(data) - SIV_BYTES)
        if not siv_decrypt(found.key, aad, <size_t>len(aad), data,
                           <size_t>len(data) - SIV_BYTES, <uint8_t *>PyBytes_AS_STRING(into)):
            return None
        return into

    def xts(self, int slot, uint64_t first_unit, data, bint encrypts, *,
            size_t offset=0) -> bytes:
        """AES-256-XTS of whole blocks of 16 bytes, of data units of 4096 bytes. `data` begins
        `offset` bytes into unit `first_unit`, whose number is its tweak."""
        cdef secret_t *found = self._filled(slot)
        cdef Py_buffer view
        cdef bytes into
        cdef uint8_t *target
        cdef bint works
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len % CIPHER_BYTES or offset % CIPHER_BYTES or offset >= UNIT_BYTES:
                raise ValueError(f"{view.len} bytes from {offset} on are not whole blocks")
            into = PyBytes_FromStringAndSize(NULL, view.len)
            target = <uint8_t *>PyBytes_AS_STRING(into)
            with nogil:
                works = xts_range(found, first_unit, offset, target, <const uint8_t *>view.buf,
                                  <size_t>view.len, encrypts)
        finally:
            PyBuffer_Release(&view)
        _demand(works)
        return into

    cdef secret_t *_slot(self, int slot) except NULL:
        if not 0 <= slot < SECRETS_COUNT:
            raise IndexError(slot)
        return &self._secrets[slot]

    cdef secret_t *_filled(self, int slot) except NULL:
        cdef secret_t *found = self._slot(slot)
        if not found.kind:
            raise KeyError(slot)
        return found

    cdef void _wipe(self, secret_t *found) noexcept:
        cdef uint32_t serial = found.serial
        found.kind = 0
        explicit_bzero(found, sizeof(secret_t))
        found.serial = serial

    cdef bytes _name_master(self, secret_t *into):
        """Say that a slot has a master key, and which: its key_id."""
        cdef uint8_t name[64]
        cdef const uint8_t *info = _ID_INFO
        _demand(hkdf(into.key, KEY_BYTES, NULL, 0, info, <size_t>len(_ID_INFO), name))
        memcpy(into.owner, name, OWNER_BYTES)
        into.serial += 1
        into.kind = TRIED_KIND
        return bytes(name[:OWNER_BYTES])


cdef bint _is_master(secret_t *found) noexcept:
    return found.kind == MASTER_KIND or found.kind == TRIED_KIND


cdef int _make_wrapping(uint8_t *into, bytes secret, bytes salt, unsigned log2_n, unsigned r,
                        unsigned p) except -1:
    """The key of 64 bytes that wraps a master key."""
    cdef const uint8_t *source = secret
    cdef const uint8_t *salted = salt
    cdef const uint8_t *info = _FILE_INFO
    cdef size_t length = <size_t>len(secret)
    cdef size_t salt_length = <size_t>len(salt)
    cdef size_t info_length = <size_t>len(_FILE_INFO)
    cdef bint works
    if not log2_n:
        _demand(hkdf(source, length, salted, salt_length, info, info_length, into))
        return 0
    if (log2_n > 30 or not 0 < r <= 1024 or not 0 < p <= 1024
            or 128 * <uint64_t>r * ((<uint64_t>1 << log2_n) + p) > <uint64_t>SCRYPT_LIMIT_BYTES):
        raise ValueError(f"scrypt can't be asked for 2^{log2_n}, {r}, {p}")
    with nogil:
        works = scrypt(source, length, salted, salt_length, log2_n, r, p, into)
    if not works:
        raise ValueError(f"scrypt fails with 2^{log2_n}, {r}, {p}")
    return 0


cdef int _demand(bint works) except -1:
    if not works:
        raise MemoryError("libcrypto finds no memory")
    return 0
