# AES-256-XTS as fast as the processor can; see xts.h.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from pmemfs.transform.secrets cimport secret_t

# Relative to whichever module includes it.
cdef extern from "../transform/xts.h" nogil:
    ctypedef struct cipher_t "struct pmemfs_cipher":
        int encrypts

    bint begin_cipher "pmemfs_begin_cipher"(cipher_t *cipher, const secret_t *secret,
                                            bint encrypts, bint by_libcrypto)
    bint cipher_unit "pmemfs_cipher_unit"(cipher_t *cipher, uint64_t index, uint8_t *into,
                                          const uint8_t *source, size_t length)
    void end_cipher "pmemfs_end_cipher"(cipher_t *cipher)
    void free_cipher "pmemfs_free_cipher"(cipher_t *cipher)
