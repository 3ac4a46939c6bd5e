"""AES-256-XTS by the library `cryptography`: how the python engine encrypts the content of files.

It does what `secrets` does, by other code, so each is a check of the other. The unit is a frame of
4 KiB, and its tweak is the frame's index in the file. Invariant:
- a key is read where it lies, in the secret memory, and never copied into an object of Python. A
  copy would stay in memory that a core file shows.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

from pmemfs.pfn import FRAME_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

SLOT_BYTES = 128
KEY_BYTES = 64
_TWEAK_BYTES = 16


class ReferenceCipher:
    """Encrypts with the keys in the slots of a secret memory, which a descriptor stands for."""

    def __init__(self, descriptor: int, slot_count: int) -> None:
        self._keys = memoryview(mmap.mmap(descriptor, slot_count * SLOT_BYTES))

    def xts(
        self, slot: int, first_unit: int, data: Buffer, encrypts: bool, *, offset: int = 0
    ) -> bytes:
        """As `Secrets.xts`."""
        view = memoryview(data).cast("B")
        key = AES(self._keys[slot * SLOT_BYTES : slot * SLOT_BYTES + KEY_BYTES])
        parts, at = [], 0
        while at < len(view):
            unit, inside = divmod(offset + at, FRAME_BYTES)
            step = min(FRAME_BYTES - inside, len(view) - at)
            cipher = Cipher(key, XTS((first_unit + unit).to_bytes(_TWEAK_BYTES, "little")))
            work = cipher.encryptor() if encrypts else cipher.decryptor()
            # The tweak of a block follows from its place in the unit, so the unit is done from its
            # start. What stands in front does not matter.
            done = work.update(bytes(inside) + view[at : at + step])
            parts.append(done[inside:])
            at += step
        return b"".join(parts)
