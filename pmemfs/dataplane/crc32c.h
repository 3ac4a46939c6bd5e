/* CRC-32C (Castagnoli), with the processor's instruction where it has one.

   Invariant: it is the same function everywhere, as RFC 3720 (appendix B.4) has it, since pools move
   from machine to machine. */
#ifndef PMEMFS_CRC32C_H
#define PMEMFS_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define PMEMFS_CRC_TARGET __attribute__((target("sse4.2")))
#define pmemfs_crc_8(crc, word) _mm_crc32_u64((crc), (word))
#define pmemfs_crc_1(crc, byte) _mm_crc32_u8((uint32_t)(crc), (byte))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#define PMEMFS_CRC_TARGET __attribute__((target("+crc")))
#define pmemfs_crc_8(crc, word) __crc32cd((uint32_t)(crc), (word))
#define pmemfs_crc_1(crc, byte) __crc32cb((uint32_t)(crc), (byte))
#endif

/* Bits in reverse, as everything here. */
#define PMEMFS_CRC_POLYNOMIAL 0x82f63b78u

static uint32_t pmemfs_crc_table[256];
static int pmemfs_crc_is_fast;

/* Before any thread exists, so that nobody finds half a table. */
__attribute__((constructor))
static void pmemfs_crc_begin(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (PMEMFS_CRC_POLYNOMIAL & -(crc & 1));
        pmemfs_crc_table[byte] = crc;
    }
#if defined(__x86_64__)
    pmemfs_crc_is_fast = __builtin_cpu_supports("sse4.2") != 0;
#elif defined(__aarch64__)
    pmemfs_crc_is_fast = (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
}

static uint32_t pmemfs_crc_by_table(uint32_t before, const void *data, size_t length) {
    const uint8_t *at = (const uint8_t *)data;
    uint32_t crc = ~before;
    while (length--) crc = crc >> 8 ^ pmemfs_crc_table[(crc ^ *at++) & 0xff];
    return ~crc;
}

#if defined(PMEMFS_CRC_TARGET)
PMEMFS_CRC_TARGET
static uint32_t pmemfs_crc_fast(uint32_t before, const void *data, size_t length) {
    const uint8_t *at = (const uint8_t *)data;
    uint64_t crc = (uint32_t)~before, word;
    for (; length >= 8; length -= 8, at += 8) {
        memcpy(&word, at, 8);
        crc = pmemfs_crc_8(crc, word);
    }
    for (; length; length--) crc = pmemfs_crc_1(crc, *at++);
    return ~(uint32_t)crc;
}
#endif

/* The checksum of bytes that lie behind those whose checksum is `before`, 0 at the start. */
static inline uint32_t pmemfs_crc32c(uint32_t before, const void *data, size_t length) {
#if defined(PMEMFS_CRC_TARGET)
    if (pmemfs_crc_is_fast) return pmemfs_crc_fast(before, data, length);
#endif
    return pmemfs_crc_by_table(before, data, length);
}

#endif
