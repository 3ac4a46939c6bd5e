/* What the oldest linux/fuse.h that we build with lacks. */
#ifndef PMEMFS_PROTOCOL_H
#define PMEMFS_PROTOCOL_H

#include <linux/fuse.h>
#include <stdint.h>

#define PMEMFS_TMPFILE 51
#define PMEMFS_STATX 52
#define PMEMFS_COPY_FILE_RANGE_64 53
/* Bits 36 and 41 of the flags of INIT, as bits of flags2. */
#define PMEMFS_DIRECT_IO_ALLOW_MMAP (1u << (36 - 32))
#define PMEMFS_OVER_IO_URING (1u << (41 - 32))
#define PMEMFS_URING_REGISTER 1
#define PMEMFS_URING_COMMIT_AND_FETCH 2

struct pmemfs_uring_entry {
    uint64_t flags;
    uint64_t commit_id;
    uint32_t payload_sz;
    uint32_t padding;
    uint64_t reserved;
};
struct pmemfs_uring_header {
    char in_out[128];
    char op_in[128];
    struct pmemfs_uring_entry entry;
};
struct pmemfs_uring_command {
    uint64_t flags;
    uint64_t commit_id;
    uint16_t qid;
    uint8_t padding[6];
};

#endif
