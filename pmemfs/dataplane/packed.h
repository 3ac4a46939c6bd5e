/* The libraries that decompress.

   libzstd and liblz4 are loaded when a data plane of files starts, and never later: a thread that
   loads one while it serves could wait for a file of its own mount. Nobody has to have them. Their
   headers aren't needed to build: what is called here is declared here, and has been the same since
   zstd 1.3.4 and lz4 1.7.

   Invariant: nothing here touches memory of the pool, because a library that is left in the middle
   by a fault, or whose source changes under it, may do anything. */
#ifndef PMEMFS_PACKED_H
#define PMEMFS_PACKED_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static struct {
    void *(*new_context)(void);
    void (*free_context)(void *);
    size_t (*decompress)(void *, void *, size_t, const void *, size_t);
    unsigned long long (*content_size)(const void *, size_t);
    size_t (*frame_size)(const void *, size_t);
} pmemfs_zstd;

static int (*pmemfs_lz4_decompress)(const char *, char *, int, int);

static void pmemfs_load_packers(void) {
    static const struct { const char *name; void **into; } wanted[] = {
        {"ZSTD_createDCtx", (void **)&pmemfs_zstd.new_context},
        {"ZSTD_freeDCtx", (void **)&pmemfs_zstd.free_context},
        {"ZSTD_decompressDCtx", (void **)&pmemfs_zstd.decompress},
        {"ZSTD_getFrameContentSize", (void **)&pmemfs_zstd.content_size},
        {"ZSTD_findFrameCompressedSize", (void **)&pmemfs_zstd.frame_size},
    };
    void *library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    for (size_t number = 0; library && number < sizeof wanted / sizeof *wanted; number++)
        if (!(*wanted[number].into = dlsym(library, wanted[number].name))) {
            memset(&pmemfs_zstd, 0, sizeof pmemfs_zstd);
            break;
        }
    library = dlopen("liblz4.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library) *(void **)&pmemfs_lz4_decompress = dlsym(library, "LZ4_decompress_safe");
}

/* NULL if there is no library, or no memory. */
static inline void *pmemfs_new_zstd(void) {
    return pmemfs_zstd.new_context ? pmemfs_zstd.new_context() : NULL;
}

static inline void pmemfs_free_zstd(void *context) {
    if (context) pmemfs_zstd.free_context(context);
}

/* Whether the bytes are one frame of exactly this content. A frame whose head claims another length
   is not looked at any further. */
static inline int pmemfs_unpack_zstd(void *context, uint8_t *into, size_t length,
                                     const uint8_t *stored, size_t stored_bytes) {
    return pmemfs_zstd.content_size(stored, stored_bytes) == length
        && pmemfs_zstd.frame_size(stored, stored_bytes) == stored_bytes
        && pmemfs_zstd.decompress(context, into, length, stored, stored_bytes) == length;
}

/* The same of a block of LZ4. */
static inline int pmemfs_unpack_lz4(uint8_t *into, size_t length, const uint8_t *stored,
                                    size_t stored_bytes) {
    return pmemfs_lz4_decompress && length <= INT_MAX && stored_bytes <= INT_MAX
        && pmemfs_lz4_decompress((const char *)stored, (char *)into, (int)stored_bytes,
                                 (int)length) == (int)length;
}

#endif
