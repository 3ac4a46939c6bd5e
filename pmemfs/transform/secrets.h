/* Ciphers of libcrypto, and memory for their keys.

   The library is loaded when the first key is used, so a mount without keys neither waits for it nor
   needs it. Its headers aren't needed to build: what is called here is declared here, and OpenSSL
   keeps it as it is in all of version 3. A library context of our own reads no openssl.cnf, which
   might replace a cipher.

   Invariants:
   - all key schedules are in contexts, and whoever has made a context frees it before it returns.
     libcrypto overwrites what it frees of these;
   - a function that is left in the middle by a fault owns nothing here except an `xts` of its
     caller. */
#ifndef PMEMFS_SECRETS_H
#define PMEMFS_SECRETS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define PMEMFS_SLOT_COUNT 1024
#define PMEMFS_KEY_BYTES 64
#define PMEMFS_UNIT_BYTES 4096
#define PMEMFS_BLOCK_BYTES 16
#define PMEMFS_SIV_BYTES 16

#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447 /* Of all architectures; Linux 5.14. */
#endif

/* 128 bytes, so that a slot never shares a cache line with another. */
struct pmemfs_secret {
    uint8_t key[PMEMFS_KEY_BYTES];
    uint32_t kind;   /* 0: free. */
    uint32_t serial; /* How often the slot was filled. */
    uint8_t owner[16];
    uint8_t rest[40];
};
_Static_assert(sizeof(struct pmemfs_secret) == 128, "slots have 128 bytes");
#define PMEMFS_SECRETS_BYTES (PMEMFS_SLOT_COUNT * sizeof(struct pmemfs_secret))

typedef struct evp_cipher_st EVP_CIPHER;
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;

static struct {
    void *context;
    EVP_CIPHER *xts, *siv;
    void *(*new_context)(void);
    EVP_CIPHER *(*fetch)(void *, const char *, const char *);
    EVP_CIPHER_CTX *(*new_cipher)(void);
    void (*free_cipher)(EVP_CIPHER_CTX *);
    int (*reset_cipher)(EVP_CIPHER_CTX *);
    int (*init)(EVP_CIPHER_CTX *, const EVP_CIPHER *, void *, const uint8_t *, const uint8_t *, int);
    int (*update)(EVP_CIPHER_CTX *, uint8_t *, int *, const uint8_t *, int);
    int (*finish)(EVP_CIPHER_CTX *, uint8_t *, int *);
    int (*control)(EVP_CIPHER_CTX *, int, int, void *);
    uint8_t *(*mac)(void *, const char *, const char *, const char *, const void *, const void *,
                    size_t, const uint8_t *, size_t, uint8_t *, size_t, size_t *);
    int (*scrypt)(const char *, size_t, const uint8_t *, size_t, uint64_t, uint64_t, uint64_t,
                  uint64_t, uint8_t *, size_t, void *, const char *);
    void (*cleanse)(void *, size_t);
} pmemfs_crypto;
static pthread_once_t pmemfs_crypto_once = PTHREAD_ONCE_INIT;
static int pmemfs_crypto_failed;

static void pmemfs_load_crypto_once(void) {
    static const struct { const char *name; void **into; } wanted[] = {
        {"OSSL_LIB_CTX_new", (void **)&pmemfs_crypto.new_context},
        {"EVP_CIPHER_fetch", (void **)&pmemfs_crypto.fetch},
        {"EVP_CIPHER_CTX_new", (void **)&pmemfs_crypto.new_cipher},
        {"EVP_CIPHER_CTX_free", (void **)&pmemfs_crypto.free_cipher},
        {"EVP_CIPHER_CTX_reset", (void **)&pmemfs_crypto.reset_cipher},
        {"EVP_CipherInit_ex", (void **)&pmemfs_crypto.init},
        {"EVP_CipherUpdate", (void **)&pmemfs_crypto.update},
        {"EVP_CipherFinal_ex", (void **)&pmemfs_crypto.finish},
        {"EVP_CIPHER_CTX_ctrl", (void **)&pmemfs_crypto.control},
        {"EVP_Q_mac", (void **)&pmemfs_crypto.mac},
        {"EVP_PBE_scrypt_ex", (void **)&pmemfs_crypto.scrypt},
        {"OPENSSL_cleanse", (void **)&pmemfs_crypto.cleanse},
    };
    void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    pmemfs_crypto_failed = ELIBACC;
    if (!library) return;
    for (size_t number = 0; number < sizeof wanted / sizeof *wanted; number++)
        if (!(*wanted[number].into = dlsym(library, wanted[number].name))) return;
    pmemfs_crypto.context = pmemfs_crypto.new_context();
    if (!pmemfs_crypto.context) return;
    pmemfs_crypto.xts = pmemfs_crypto.fetch(pmemfs_crypto.context, "AES-256-XTS", NULL);
    pmemfs_crypto.siv = pmemfs_crypto.fetch(pmemfs_crypto.context, "AES-256-SIV", NULL);
    if (pmemfs_crypto.xts && pmemfs_crypto.siv) pmemfs_crypto_failed = 0;
}

/* 0, or ELIBACC: the library isn't there, or lacks a cipher. */
static inline int pmemfs_load_crypto(void) {
    pthread_once(&pmemfs_crypto_once, pmemfs_load_crypto_once);
    return pmemfs_crypto_failed;
}

/* A descriptor of new memory for keys, or -1 with errno. Without memfd_secret(2), which keeps even
   the kernel from it, it is a memfd that whoever maps it locks. */
static inline int pmemfs_create_secrets(void) {
    int fd = (int)syscall(SYS_memfd_secret, O_CLOEXEC);
    if (fd < 0) fd = memfd_create("pmemfs-secrets", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)PMEMFS_SECRETS_BYTES)) {
        int failed = errno;
        close(fd);
        errno = failed;
        return -1;
    }
    return fd;
}

/* Whether memfd_secret(2) has made it. */
static inline int pmemfs_is_secret(int fd) {
    struct statfs status;
    return !fstatfs(fd, &status) && status.f_type == 0x5345434d /* SECRETMEM_MAGIC */;
}

/* Map the memory of a descriptor; 0 or errno. It is in no core file, in no swap, and in no child.

   From then on this process leaves no core file at all: even one without memory would show what its
   registers have, and vector registers have plain bytes or a key schedule. So no other process of
   the same user can look into it either; root can. */
static inline int pmemfs_map_secrets(int fd, struct pmemfs_secret **secrets) {
    void *mapped = mmap(NULL, PMEMFS_SECRETS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) return errno;
    /* What memfd_secret gives is locked already, and mlock would fail. */
    if ((!pmemfs_is_secret(fd) && mlock(mapped, PMEMFS_SECRETS_BYTES))
        || madvise(mapped, PMEMFS_SECRETS_BYTES, MADV_DONTDUMP)
        || madvise(mapped, PMEMFS_SECRETS_BYTES, MADV_DONTFORK)) {
        int failed = errno;
        munmap(mapped, PMEMFS_SECRETS_BYTES);
        return failed;
    }
    prctl(PR_SET_DUMPABLE, 0);
    *secrets = mapped;
    return 0;
}

static inline int pmemfs_random(uint8_t *into, size_t length) {
    while (length) {
        ssize_t got = getrandom(into, length, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        into += got;
        length -= (size_t)got;
    }
    return 0;
}

/* XTS, in data units of 4096 bytes */

typedef struct {
    EVP_CIPHER_CTX *context;
} pmemfs_xts;

/* Set up for one key and one direction. `encrypts` is 0 or 1. Whether it worked; `pmemfs_end_xts`
   must follow in any case. The context itself is kept for the next time. */
static inline int pmemfs_begin_xts(pmemfs_xts *xts, const struct pmemfs_secret *secret, int encrypts) {
    static const uint8_t zeroes[PMEMFS_BLOCK_BYTES];
    if (!xts->context && !(xts->context = pmemfs_crypto.new_cipher())) return 0;
    return pmemfs_crypto.init(xts->context, pmemfs_crypto.xts, NULL, secret->key, zeroes, encrypts);
}

/* Whole blocks from the start of unit `index` on. `from` may be `into`. Whether it worked. */
static inline int pmemfs_xts_unit(pmemfs_xts *xts, uint64_t index, uint8_t *into,
                                  const uint8_t *from, size_t length) {
    uint64_t tweak[2] = {index, 0};
    int done = 0;
    return pmemfs_crypto.init(xts->context, NULL, NULL, NULL, (const uint8_t *)tweak, -1)
        && pmemfs_crypto.update(xts->context, into, &done, from, (int)length)
        && done == (int)length;
}

/* Forget the key. */
static inline void pmemfs_end_xts(pmemfs_xts *xts) {
    if (xts->context) pmemfs_crypto.reset_cipher(xts->context);
}

static inline void pmemfs_free_xts(pmemfs_xts *xts) {
    if (xts->context) pmemfs_crypto.free_cipher(xts->context);
    xts->context = NULL;
}

/* Whole blocks from any block on. They may begin inside of a unit: what is before them there is
   made up, because each block stands for itself. Whether it worked. */
static inline int pmemfs_xts_range(const struct pmemfs_secret *secret, uint64_t index, size_t skip,
                                   uint8_t *into, const uint8_t *from, size_t length, int encrypts) {
    uint8_t unit[PMEMFS_UNIT_BYTES];
    pmemfs_xts xts = {NULL};
    int works = pmemfs_begin_xts(&xts, secret, encrypts);
    for (; works && length; skip = 0, index++) {
        size_t part = PMEMFS_UNIT_BYTES - skip < length ? PMEMFS_UNIT_BYTES - skip : length;
        if (skip) {
            memset(unit, 0, skip);
            memcpy(unit + skip, from, part);
            works = pmemfs_xts_unit(&xts, index, unit, unit, skip + part);
            memcpy(into, unit + skip, part);
            pmemfs_crypto.cleanse(unit, sizeof unit);
        } else {
            works = pmemfs_xts_unit(&xts, index, into, from, part);
        }
        into += part;
        from += part;
        length -= part;
    }
    pmemfs_free_xts(&xts);
    return works;
}

/* SIV (RFC 5297) */

static inline int pmemfs_cmac(const uint8_t *key, const uint8_t *data, size_t length, uint8_t *into) {
    size_t done = 0;
    return pmemfs_crypto.mac(pmemfs_crypto.context, "CMAC", NULL, "AES-256-CBC", NULL, key, 32, data,
                             length, into, PMEMFS_SIV_BYTES, &done)
        && done == PMEMFS_SIV_BYTES;
}

/* Double in GF(2^128), as section 2.3. */
static inline void pmemfs_double(uint8_t *value) {
    uint8_t carry = value[0] >> 7;
    for (int at = 0; at < 15; at++) value[at] = (uint8_t)(value[at] << 1 | value[at + 1] >> 7);
    value[15] = (uint8_t)(value[15] << 1 ^ (carry ? 0x87 : 0));
}

/* The IV of an empty text, which is all of its ciphertext: libcrypto makes none. */
static inline int pmemfs_siv_of_nothing(const uint8_t *key, const uint8_t *aad, size_t aad_length,
                                        uint8_t *into) {
    uint8_t zero[PMEMFS_SIV_BYTES] = {0}, sum[PMEMFS_SIV_BYTES], part[PMEMFS_SIV_BYTES];
    if (!pmemfs_cmac(key, zero, sizeof zero, sum)) return 0;
    if (aad_length) {
        if (!pmemfs_cmac(key, aad, aad_length, part)) return 0;
        pmemfs_double(sum);
        for (int at = 0; at < PMEMFS_SIV_BYTES; at++) sum[at] ^= part[at];
    }
    pmemfs_double(sum);
    sum[0] ^= 0x80;
    return pmemfs_cmac(key, sum, sizeof sum, into);
}

/* `into` gets the IV and then the ciphertext. An empty `aad` is none. Whether it worked. */
static inline int pmemfs_siv_encrypt(const uint8_t *key, const uint8_t *aad, size_t aad_length,
                                     const uint8_t *data, size_t length, uint8_t *into) {
    EVP_CIPHER_CTX *context;
    int done = 0, rest = 0, works;
    if (!length) return pmemfs_siv_of_nothing(key, aad, aad_length, into);
    context = pmemfs_crypto.new_cipher();
    works = context && pmemfs_crypto.init(context, pmemfs_crypto.siv, NULL, key, NULL, 1)
        && (!aad_length || pmemfs_crypto.update(context, NULL, &done, aad, (int)aad_length))
        && pmemfs_crypto.update(context, into + PMEMFS_SIV_BYTES, &done, data, (int)length)
        && pmemfs_crypto.finish(context, into + PMEMFS_SIV_BYTES + done, &rest)
        && pmemfs_crypto.control(context, 0x10 /* EVP_CTRL_AEAD_GET_TAG */, PMEMFS_SIV_BYTES, into);
    if (context) pmemfs_crypto.free_cipher(context);
    return works;
}

/* `data` is an IV and its ciphertext of `length` bytes. 1, or 0 if no such key has made it. */
static inline int pmemfs_siv_decrypt(const uint8_t *key, const uint8_t *aad, size_t aad_length,
                                     const uint8_t *data, size_t length, uint8_t *into) {
    EVP_CIPHER_CTX *context;
    uint8_t iv[PMEMFS_SIV_BYTES], differs = 0;
    int done = 0, rest = 0, works;
    memcpy(iv, data, sizeof iv);
    if (!length) {
        uint8_t made[PMEMFS_SIV_BYTES];
        if (!pmemfs_siv_of_nothing(key, aad, aad_length, made)) return 0;
        for (int at = 0; at < PMEMFS_SIV_BYTES; at++) differs |= made[at] ^ iv[at];
        return !differs;
    }
    context = pmemfs_crypto.new_cipher();
    works = context && pmemfs_crypto.init(context, pmemfs_crypto.siv, NULL, key, NULL, 0)
        && pmemfs_crypto.control(context, 0x11 /* EVP_CTRL_AEAD_SET_TAG */, PMEMFS_SIV_BYTES, iv)
        && (!aad_length || pmemfs_crypto.update(context, NULL, &done, aad, (int)aad_length))
        && pmemfs_crypto.update(context, into, &done, data + PMEMFS_SIV_BYTES, (int)length)
        && pmemfs_crypto.finish(context, into + done, &rest);
    if (context) pmemfs_crypto.free_cipher(context);
    if (!works) pmemfs_crypto.cleanse(into, length);
    return works;
}

/* Derived keys */

static inline int pmemfs_hmac(const uint8_t *key, size_t key_length, const uint8_t *data,
                              size_t length, uint8_t *into) {
    size_t done = 0;
    return pmemfs_crypto.mac(pmemfs_crypto.context, "HMAC", NULL, "SHA512", NULL, key, key_length,
                             data, length, into, PMEMFS_KEY_BYTES, &done)
        && done == PMEMFS_KEY_BYTES;
}

#define PMEMFS_INFO_LIMIT 255

/* HKDF-SHA512 (RFC 5869) to 64 bytes, which is its first block. Without a salt: zeroes. */
static inline int pmemfs_hkdf(const uint8_t *from, size_t length, const uint8_t *salt,
                              size_t salt_length, const uint8_t *info, size_t info_length,
                              uint8_t *into) {
    uint8_t zeroes[PMEMFS_KEY_BYTES] = {0}, middle[PMEMFS_KEY_BYTES];
    uint8_t last[PMEMFS_INFO_LIMIT + 1];
    int works;
    if (info_length > PMEMFS_INFO_LIMIT) return 0;
    memcpy(last, info, info_length);
    last[info_length] = 1;
    works = pmemfs_hmac(salt_length ? salt : zeroes, salt_length ? salt_length : sizeof zeroes, from,
                        length, middle)
        && pmemfs_hmac(middle, sizeof middle, last, info_length + 1, into);
    pmemfs_crypto.cleanse(middle, sizeof middle);
    return works;
}

/* scrypt (RFC 7914) to 64 bytes; the memory that it takes is 128 * r * 2^log2_n bytes. */
static inline int pmemfs_scrypt(const uint8_t *from, size_t length, const uint8_t *salt,
                                size_t salt_length, unsigned log2_n, unsigned r, unsigned p,
                                uint8_t *into) {
    uint64_t needed = 128 * (uint64_t)r * (((uint64_t)1 << log2_n) + p + 2);
    return pmemfs_crypto.scrypt((const char *)from, length, salt, salt_length, (uint64_t)1 << log2_n,
                                r, p, needed, into, PMEMFS_KEY_BYTES, pmemfs_crypto.context, NULL);
}

#endif
