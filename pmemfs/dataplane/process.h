/* What a process of the data plane asks of the kernel for itself: signals, memory. */
#ifndef PMEMFS_PROCESS_H
#define PMEMFS_PROCESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

static void pmemfs_on_wake(int number) { (void)number; }
static void pmemfs_wakeable(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = pmemfs_on_wake;  /* Without SA_RESTART, so that waiting calls return. */
    sigaction(SIGUSR1, &action, NULL);
}
/* Users end the control plane, which then ends this process in order. */
static void pmemfs_ignore_endings(void) {
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}
/* Threads that start later inherit this. */
static int pmemfs_become_io_flusher(void) {
    return prctl(PR_SET_IO_FLUSHER, 1UL, 0UL, 0UL, 0UL) ? errno : 0;
}
/* Lock all memory except the pool, which may be larger than DRAM. */
static int pmemfs_lock_memory(const void *pool, size_t pool_bytes) {
    if (mlockall(MCL_CURRENT | MCL_ONFAULT)) return errno;
    if (pool) munlock(pool, pool_bytes);
    return 0;
}
/* What other threads of this process store before the next line, and what they load after it, is
   ordered as if each of them had had a full fence at some instant of this call. */
static void pmemfs_may_fence_others(void) {
    syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
}
static void pmemfs_fence_others(void) {
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
        syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
}
enum { NUDGE_TRIES = 100, NUDGE_PAUSE_MICROSECONDS = 20000 };

/* Let a process of its own ask the file system at `path` for its size `count` times, on one CPU. A
   thread of this process would wait for itself, and this process could not even be killed. */
static void pmemfs_nudge(const char *path, int cpu, int count) {
    cpu_set_t wanted;
    struct statfs answer;
    pid_t child = -1;
    signal(SIGCHLD, SIG_IGN);
    /* For a moment there may be no room for a process. Without one, callers could wait for ever. */
    for (int tries = 0; child < 0 && tries < NUDGE_TRIES; ++tries)
        if ((child = fork()) < 0) usleep(NUDGE_PAUSE_MICROSECONDS);
    if (child) return;
    /* No descriptor of the connection stays open by it, and it does not outlive this process. */
    syscall(SYS_close_range, 3, ~0U, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    /* Where it may, it looks at a copy of the mount, so that it keeps nobody from unmounting. */
    if (!unshare(CLONE_NEWNS)) mount("", "/", 0, MS_REC | MS_PRIVATE, 0);
    CPU_ZERO(&wanted);
    CPU_SET(cpu, &wanted);
    /* Where this fails, the CPU is offline or not allowed. */
    while (!sched_setaffinity(0, sizeof wanted, &wanted) && count-- > 0) statfs(path, &answer);
    _exit(0);
}
/* Put no memory into core files: some of it may have been a key, or a plain byte. */
static void pmemfs_dump_nothing(void) {
    int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    if (write(fd, "0", 1) != 1) { /* There is nothing else to be done. */ }
    close(fd);
}
/* As recv(2), and a descriptor that came with the message, or -1. */
static ssize_t pmemfs_receive(int from, void *into, size_t length, int *fd) {
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec part = {into, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t count = recvmsg(from, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *head = count < 0 ? NULL : CMSG_FIRSTHDR(&message);
    *fd = -1;
    if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(head), sizeof(int));
    return count;
}
static long pmemfs_thread_id(void) { return syscall(SYS_gettid); }

#endif
