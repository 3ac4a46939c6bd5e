# Ciphers and the memory of their keys, for native code; see secrets.h.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

# Relative to whichever module includes it.
cdef extern from "../transform/secrets.h" nogil:
    cdef struct secret_t "pmemfs_secret":
        uint8_t key[64]
        uint32_t kind
        uint32_t serial
        uint8_t owner[16]

    ctypedef struct xts_t "pmemfs_xts":
        void *context

    enum:
        SECRETS_COUNT "PMEMFS_SLOT_COUNT"
        SECRETS_BYTES "PMEMFS_SECRETS_BYTES"
        KEY_BYTES "PMEMFS_KEY_BYTES"
        UNIT_BYTES "PMEMFS_UNIT_BYTES"
        CIPHER_BYTES "PMEMFS_BLOCK_BYTES"
        SIV_BYTES "PMEMFS_SIV_BYTES"
        INFO_LIMIT "PMEMFS_INFO_LIMIT"

    int load_crypto "pmemfs_load_crypto"()
    int new_secrets "pmemfs_create_secrets"()
    int map_secrets "pmemfs_map_secrets"(int fd, secret_t **secrets)
    int random_bytes "pmemfs_random"(uint8_t *into, size_t length)
    bint begin_xts "pmemfs_begin_xts"(xts_t *xts, const secret_t *secret, bint encrypts)
    bint xts_unit "pmemfs_xts_unit"(xts_t *xts, uint64_t index, uint8_t *into,
                                    const uint8_t *source, size_t length)
    void end_xts "pmemfs_end_xts"(xts_t *xts)
    void free_xts "pmemfs_free_xts"(xts_t *xts)
    bint xts_range "pmemfs_xts_range"(const secret_t *secret, uint64_t index, size_t skip,
                                      uint8_t *into, const uint8_t *source, size_t length,
                                      bint encrypts)
    bint siv_encrypt "pmemfs_siv_encrypt"(const uint8_t *key, const uint8_t *aad,
                                          size_t aad_length, const uint8_t *data, size_t length,
                                          uint8_t *into)
    bint siv_decrypt "pmemfs_siv_decrypt"(const uint8_t *key, const uint8_t *aad,
                                          size_t aad_length, const uint8_t *data, size_t length,
                                          uint8_t *into)
    bint hkdf "pmemfs_hkdf"(const uint8_t *source, size_t length, const uint8_t *salt,
                            size_t salt_length, const uint8_t *info, size_t info_length,
                            uint8_t *into)
    bint scrypt "pmemfs_scrypt"(const uint8_t *source, size_t length, const uint8_t *salt,
                                size_t salt_length, unsigned log2_n, unsigned r, unsigned p,
                                uint8_t *into)
