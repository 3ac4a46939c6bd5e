/* What is missing in the oldest linux/fuse.h that this is built with. */
#ifndef PMEMFS_PROTOCOL_H
#define PMEMFS_PROTOCOL_H

#include <linux/fuse.h>
#include <stdint.h>

/* A notice: what was read from /dev/fuse and not answered is to be read again. Linux 6.9. */
#define PMEMFS_NOTIFY_RESEND 7

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
