/* What locks of encrypted pages ask of the kernel. */
#ifndef PMEMFS_CRYPT_H
#define PMEMFS_CRYPT_H

#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether a thread is there. A number that was given to another one since says yes, too. */
static inline int pmemfs_thread_lives(uint64_t thread_id) {
    return thread_id && (!syscall(SYS_tkill, (long)thread_id, 0) || errno != ESRCH);
}

#endif
