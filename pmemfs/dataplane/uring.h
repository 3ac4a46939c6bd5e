/* Where a worker runs, and commands to the FUSE device. */
#ifndef PMEMFS_URING_H
#define PMEMFS_URING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <liburing.h>
#include <string.h>

#include <sched.h>

/* The CPUs on which this thread may run. If another program has set them (taskset), they stay. */
static __thread cpu_set_t pmemfs_anywhere, pmemfs_here;

static void pmemfs_learn_place(void) {
    sched_getaffinity(0, sizeof pmemfs_here, &pmemfs_here);
    pmemfs_anywhere = pmemfs_here;
}
static void pmemfs_move_thread(int cpu, int is_near) {
    cpu_set_t now, wanted = pmemfs_anywhere;
    if (sched_getaffinity(0, sizeof now, &now) || !CPU_EQUAL(&now, &pmemfs_here)) return;
    if (is_near) {
        CPU_ZERO(&wanted);
        CPU_SET(cpu, &wanted);
    }
    /* If this fails, the CPU is offline or not allowed, and has no callers of this mount. */
    if (!sched_setaffinity(0, sizeof wanted, &wanted)) pmemfs_here = wanted;
}

/* A command to the FUSE device, which is file 0 of the ring. */
static void *pmemfs_prepare_command(struct io_uring_sqe *sqe, unsigned command,
                                    const void *memory, unsigned count) {
    memset(sqe, 0, 128);
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->cmd_op = command;
    sqe->addr = (uint64_t)(uintptr_t)memory;
    sqe->len = count;
    return sqe->cmd;
}

#endif
