"""Keys in secret memory: what is done with them is what the standards say, and nothing is left."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kit.processes import readable_memory
from pmemfs.transform.secrets import (
    FILE,
    FREE,
    MASTER,
    SCRYPT_LIMIT_BYTES,
    SLOT_COUNT,
    TRIED,
    Secrets,
    create_secrets,
)

SALT = b"salt of 16 bytes"
AAD = b"what stands before"
CHEAP = (10, 8, 1)
FILE_KEY = (0, 0, 0)

# XTS-AES-256, vectors 10 and 11 of IEEE 1619-2007, annex B; the beginnings of their ciphertexts.
XTS_KEY = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)
XTS_10 = bytes.fromhex(
    "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"
    "5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd"
)
# AES-SIV-CMAC-512: vectors that several projects publish, after those of RFC 5297, appendix A.
SIV_KEY = bytes.fromhex(
    "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f06f6e6d6c6b6a69686766656463626160"
    "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff000102030405060708090a0b0c0d0e0f"
)
SIV_AAD = bytes.fromhex("101112131415161718191a1b1c1d1e1f2021222324252627")
SIV_TEXT = bytes.fromhex("112233445566778899aabbccddee")
SIV_SEALED = bytes.fromhex("f125274c598065cfc26b0e71575029088b035217e380cac8919ee800c126")


@pytest.fixture
def secrets() -> Iterator[Secrets]:
    fd = create_secrets()
    yield Secrets(fd)
    os.close(fd)


def hkdf(key: bytes, info: bytes, salt: bytes | None = None) -> bytes:
    return HKDF(SHA512(), 64, salt, info).derive(key)


def put(secrets: Secrets, slot: int, key: bytes) -> None:
    """Have this very key in a slot, as a key that was wrapped."""
    wrapped = AESSIV(hkdf(b"a file", b"pmemfs key file", SALT)).encrypt(key, [AAD])
    assert secrets.unwrap(slot, b"a file", SALT, *FILE_KEY, wrapped, AAD)


def test_xts_gives_the_published_answers(secrets: Secrets) -> None:
    put(secrets, 3, XTS_KEY)
    text = bytes(range(256)) * 2
    sealed = secrets.xts(3, 0xFF, text, True)
    assert sealed[: len(XTS_10)] == XTS_10
    assert secrets.xts(3, 0xFF, sealed, False) == text


@pytest.mark.parametrize(("offset", "length"), [(0, 16), (16, 4080), (4080, 32), (48, 3 * 4096)])
def test_xts_is_that_of_cryptography_wherever_a_range_begins_and_ends(
    secrets: Secrets, offset: int, length: int
) -> None:
    put(secrets, 0, XTS_KEY)
    text = os.urandom(4096 * 5)
    sealed = b"".join(
        Cipher(algorithms.AES(XTS_KEY), modes.XTS(unit.to_bytes(16, "little"))).encryptor().update(
            text[(unit - 7) * 4096 : (unit - 6) * 4096]
        )
        for unit in range(7, 12)
    )  # fmt: skip
    part = slice(offset, offset + length)
    assert secrets.xts(0, 7, memoryview(text)[part], True, offset=offset) == sealed[part]
    assert secrets.xts(0, 7, sealed[part], False, offset=offset) == text[part]


def test_xts_takes_whole_blocks_only(secrets: Secrets) -> None:
    put(secrets, 0, XTS_KEY)
    for data, offset in ((b"x" * 15, 0), (b"x" * 16, 8), (b"x" * 16, 4096)):
        with pytest.raises(ValueError, match="not whole blocks"):
            secrets.xts(0, 0, data, True, offset=offset)


def test_siv_gives_the_published_answers(secrets: Secrets) -> None:
    put(secrets, 0, SIV_KEY)
    assert secrets.siv_encrypt(0, SIV_AAD, SIV_TEXT) == SIV_SEALED
    assert secrets.siv_decrypt(0, SIV_AAD, SIV_SEALED) == SIV_TEXT


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 4096])
@pytest.mark.parametrize("aad", [b"", AAD])
def test_siv_is_that_of_cryptography(secrets: Secrets, length: int, aad: bytes) -> None:
    put(secrets, 0, SIV_KEY)
    text = os.urandom(length)
    sealed = AESSIV(SIV_KEY).encrypt(text, [aad] if aad else None)
    assert secrets.siv_encrypt(0, aad, text) == sealed
    assert secrets.siv_decrypt(0, aad, sealed) == text


@pytest.mark.parametrize("aad", [b"", AAD])
def test_an_empty_text_has_an_iv_that_is_checked(secrets: Secrets, aad: bytes) -> None:
    put(secrets, 0, SIV_KEY)
    sealed = secrets.siv_encrypt(0, aad, b"")
    assert sealed == AESSIV(SIV_KEY).encrypt(b"", [aad] if aad else None)
    assert secrets.siv_decrypt(0, aad, sealed) == b""
    assert secrets.siv_decrypt(0, aad + b"x", sealed) is None
    assert secrets.siv_decrypt(0, aad, bytes(16)) is None


def test_siv_refuses_what_was_changed(secrets: Secrets) -> None:
    put(secrets, 0, SIV_KEY)
    for at in range(len(SIV_SEALED)):
        changed = bytearray(SIV_SEALED)
        changed[at] ^= 1
        assert secrets.siv_decrypt(0, SIV_AAD, bytes(changed)) is None
    assert secrets.siv_decrypt(0, b"", SIV_SEALED) is None
    assert secrets.siv_decrypt(0, SIV_AAD, SIV_SEALED[:15]) is None


def test_a_derived_key_is_that_of_hkdf(secrets: Secrets) -> None:
    put(secrets, 0, SIV_KEY)
    info = b"pmemfs names" + bytes(range(16))
    secrets.derive(0, 9, info, inode=77, generation=3)
    assert secrets.kind(9) == FILE
    assert secrets.file_of(9) == (77, 3)
    derived = AESSIV(hkdf(SIV_KEY, info))
    assert secrets.siv_encrypt(9, b"", b"a name") == derived.encrypt(b"a name", None)


def test_a_master_key_is_named_by_what_it_is(secrets: Secrets) -> None:
    put(secrets, 0, SIV_KEY)
    assert secrets.kind(0) == TRIED
    secrets.keep(0)
    assert secrets.kind(0) == MASTER
    with pytest.raises(KeyError):
        secrets.keep(1)
    assert secrets.key_id(0) == hkdf(SIV_KEY, b"pmemfs key id")[:16]
    made = {secrets.generate(slot) for slot in range(1, 9)}
    assert len(made) == 8
    assert {secrets.key_id(slot) for slot in range(1, 9)} == made


@pytest.mark.parametrize("cost", [CHEAP, FILE_KEY])
def test_a_wrapped_key_comes_back_with_its_secret_alone(
    secrets: Secrets, cost: tuple[int, int, int]
) -> None:
    key_id = secrets.generate(0)
    wrapped = secrets.wrap(0, b"right", SALT, *cost, AAD)
    assert len(wrapped) == 80
    assert not secrets.unwrap(1, b"wrong", SALT, *cost, wrapped, AAD)
    assert not secrets.unwrap(1, b"right", SALT[::-1], *cost, wrapped, AAD)
    assert not secrets.unwrap(1, b"right", SALT, *cost, wrapped, AAD + b"x")
    assert not secrets.unwrap(1, b"right", SALT, *cost, wrapped[:-1], AAD)
    for at in (0, 15, 16, 79):
        changed = bytearray(wrapped)
        changed[at] ^= 0x80
        assert not secrets.unwrap(1, b"right", SALT, *cost, bytes(changed), AAD)
    assert secrets.kind(1) == FREE
    assert secrets.unwrap(1, b"right", SALT, *cost, wrapped, AAD)
    assert secrets.key_id(1) == key_id
    assert secrets.siv_encrypt(1, b"", b"x") == secrets.siv_encrypt(0, b"", b"x")


def test_a_passphrase_makes_the_key_that_scrypt_makes(secrets: Secrets) -> None:
    # RFC 7914, section 12: the third of its answers.
    answer = bytes.fromhex(
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
    )
    cost = {"n": 1 << 14, "r": 8, "p": 1}
    salt = b"SodiumChloride"
    assert hashlib.scrypt(b"pleaseletmein", salt=salt, **cost, dklen=64, maxmem=1 << 26) == answer
    wrapped = AESSIV(answer).encrypt(XTS_KEY, [AAD])
    assert secrets.unwrap(0, b"pleaseletmein", salt, 14, 8, 1, wrapped, AAD)
    assert secrets.xts(0, 0xFF, bytes(range(64)), True) == XTS_10


@pytest.mark.parametrize("cost", [(31, 8, 1), (20, 0, 1), (20, 8, 0), (24, 64, 1), (1, 1 << 20, 1)])
def test_no_pool_makes_scrypt_take_more_than_its_limit(
    secrets: Secrets, cost: tuple[int, int, int]
) -> None:
    assert SCRYPT_LIMIT_BYTES == 1 << 30
    with pytest.raises(ValueError, match="scrypt"):
        secrets.unwrap(0, b"x", SALT, *cost, bytes(80), AAD)


def test_slots_that_are_not_there_or_have_no_key_are_refused(secrets: Secrets) -> None:
    for slot in (-1, SLOT_COUNT):
        with pytest.raises(IndexError):
            secrets.generate(slot)
    with pytest.raises(KeyError):
        secrets.siv_encrypt(5, b"", b"x")
    with pytest.raises(KeyError):
        secrets.wrap(5, b"x", SALT, *FILE_KEY, AAD)
    secrets.generate(5)
    secrets.derive(5, 6, b"info")
    with pytest.raises(KeyError):
        secrets.derive(6, 7, b"a derived key derives nothing")


def test_another_process_has_the_same_keys_by_the_descriptor(secrets: Secrets) -> None:
    secrets.generate(0)
    twin = Secrets(os.dup(secrets.fd))
    assert twin.siv_encrypt(0, b"", b"x") == secrets.siv_encrypt(0, b"", b"x")
    twin.wipe(0)
    assert secrets.kind(0) == FREE
    os.close(twin.fd)


def test_what_is_wiped_is_zeroes_except_how_often_it_was_filled() -> None:
    fd = os.memfd_create("readable")
    os.ftruncate(fd, SLOT_COUNT * 128)
    secrets = Secrets(fd)
    for slot in (0, 1, SLOT_COUNT - 1):
        secrets.generate(slot)
    secrets.derive(0, 2, b"info", inode=5)
    assert os.pread(fd, 64, 0) != bytes(64)
    secrets.wipe(1)
    assert os.pread(fd, 64, 128) == bytes(64)
    secrets.wipe_all()
    for slot in (0, 1, 2, SLOT_COUNT - 1):
        assert os.pread(fd, 128, slot * 128) == bytes(68) + b"\1" + bytes(59)
    secrets.generate(0)
    assert secrets.serial(0) == 2
    os.close(fd)


KEEPS_KEYS = """
import os, sys
from pmemfs.transform import secrets as module
fd = module.create_secrets()
secrets = module.Secrets(fd)
wrapped = bytes.fromhex(sys.argv[1])
assert secrets.unwrap(0, b"a file", sys.argv[2].encode(), 0, 0, 0, wrapped, sys.argv[3].encode())
secrets.derive(0, 1, b"info")
for slot in (0, 1):
    sealed = secrets.xts(slot, 1, bytes(8192), True)
    secrets.xts(slot, 1, sealed, False)
    secrets.xts(slot, 1, sealed[:64], False, offset=64)
    name = secrets.siv_encrypt(slot, b"aad", b"a name")
    assert secrets.siv_decrypt(slot, b"aad", name) == b"a name"
    assert secrets.siv_decrypt(slot, b"", name) is None
    secrets.siv_encrypt(slot, b"", b"")
rewrapped = secrets.wrap(0, b"pass", b"salt", 10, 8, 1, b"")
assert secrets.unwrap(2, b"pass", b"salt", 10, 8, 1, rewrapped, b"")
assert not secrets.unwrap(2, b"fail", b"salt", 10, 8, 1, rewrapped, b"")
print("ready", flush=True)
sys.stdin.read()
"""


def test_no_key_is_left_in_memory_that_is_not_secret() -> None:
    wrapping = hkdf(b"a file", b"pmemfs key file", SALT)
    wrapped = AESSIV(wrapping).encrypt(XTS_KEY, [AAD])
    words = (wrapped.hex(), SALT.decode(), AAD.decode())
    with subprocess.Popen(
        [sys.executable, "-c", KEEPS_KEYS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if "secretmem" not in Path(f"/proc/{child.pid}/maps").read_text():
            child.communicate()
            pytest.skip("this kernel has no memfd_secret")
        keys = [
            XTS_KEY,
            hkdf(XTS_KEY, b"info"),
            wrapping,
            hashlib.scrypt(b"pass", salt=b"salt", n=1 << 10, r=8, p=1, dklen=64),
        ]
        halves = [key[at : at + 16] for key in keys for at in range(0, 64, 16)]
        found = [
            (number // 4, number % 4)
            for piece in readable_memory(child.pid)
            for number, half in enumerate(halves)
            if half in piece
        ]
        child.communicate()
    assert child.returncode == 0
    assert found == []


# seccomp: memfd_secret answers ENOSYS, as a kernel without it.
WITHOUT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
words = [(0x20, 0, 0, 0), (0x15, 0, 1, 447), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *word) for word in words))
program = struct.pack("HxxxxxxQ", len(words), ctypes.addressof(filters))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0
from pmemfs.transform.secrets import Secrets, create_secrets
fd = create_secrets()
assert "pmemfs-secrets" in os.readlink(f"/proc/self/fd/{fd}")
secrets = Secrets(fd)
secrets.generate(0)
assert secrets.siv_decrypt(0, b"", secrets.siv_encrypt(0, b"", b"x")) == b"x"
flags, inside = "", False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        inside = "pmemfs-secrets" in line
    if inside and line.startswith("VmFlags"):
        flags = line
assert {"lo", "dd", "dc"} <= set(flags.split()), flags
"""


def test_without_secret_memory_keys_are_locked_and_in_no_core_file_and_no_child() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NO_LOCKING = """
import errno, os, resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
from pmemfs.transform.secrets import Secrets, create_secrets
try:
    Secrets(create_secrets())
except OSError as error:
    assert error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EPERM), error
    print(error.strerror)
"""


def test_memory_that_cannot_be_locked_takes_no_key() -> None:
    assert resource.RLIMIT_MEMLOCK
    done = subprocess.run([sys.executable, "-c", NO_LOCKING], capture_output=True, text=True)
    assert "no locked memory for keys: the daemon needs 131072 bytes of it" in done.stdout, (
        done.stderr
    )
    assert "ulimit -l" in done.stdout
