/* Addresses over pieces of a file, side by side, and what an end of a pin says before it closes. */
#ifndef PMEMFS_ADDRESSES_H
#define PMEMFS_ADDRESSES_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define PMEMFS_FRAME 4096
#define PMEMFS_HUGE (2u << 20)

/* One range of addresses, counted from the first; `from` is -1 for zero pages. */
typedef struct { size_t at; long long from; size_t length; } pmemfs_piece;

/* An end of a pin, in the list of all those that speak in this process. One that is silent is in a
   list of its own. */
typedef struct pmemfs_end { int fd; struct pmemfs_end *before, *after; } pmemfs_end;
static pmemfs_end pmemfs_ends = {-1, &pmemfs_ends, &pmemfs_ends};

/* Both ends of a new pin; -1 with errno. */
static inline int pmemfs_ends_of(int ends[2]) {
    return socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends);
}
static inline void pmemfs_begin(pmemfs_end *end, int fd, int speaks) {
    end->fd = fd;
    end->before = end->after = end;
    if (!speaks) return;
    end->before = &pmemfs_ends;
    end->after = pmemfs_ends.after;
    end->after->before = end;
    pmemfs_ends.after = end;
}
/* Never waits: a daemon that does not listen learns what it has to from the close. */
static inline void pmemfs_say(const pmemfs_end *end, char word) {
    int kept = errno;
    if (end->before == end) return;
    if (send(end->fd, &word, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) errno = kept;
}
static inline void pmemfs_over(pmemfs_end *end) {
    /* One that was never begun is all zeroes. */
    if (!end->before || end->fd < 0) return;
    pmemfs_say(end, 'd');
    close(end->fd);
    end->fd = -1;
    end->before->after = end->after;
    end->after->before = end->before;
}
/* In the child of a fork, which has copies of all ends. */
static inline void pmemfs_forked(void) {
    for (pmemfs_end *end = pmemfs_ends.after; end != &pmemfs_ends; end = end->after)
        pmemfs_say(end, 'f');
}

/* What the kernel knows of an open file without asking its file system. 0, or -1 with errno. */
static inline int pmemfs_known(int fd, unsigned long long known[4]) {
    struct statx found;
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_MODE | STATX_UID
              | STATX_INO, &found))
        return -1;
    known[0] = makedev(found.stx_dev_major, found.stx_dev_minor);
    known[1] = found.stx_ino;
    known[2] = found.stx_mode;
    known[3] = found.stx_uid;
    return 0;
}

/* So many addresses, of which nothing is mapped yet: the first is `shift` behind a multiple of
   `unit`. MAP_FAILED with errno. */
static void *pmemfs_reserve(size_t length, size_t unit, size_t shift) {
    size_t slack = unit > PMEMFS_FRAME ? unit : 0, head, tail;
    char *start = mmap(NULL, length + slack, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || !slack) return start;
    head = (shift - (uintptr_t)start) & (unit - 1);
    tail = slack - head;
    if (head) munmap(start, head);
    if (tail) munmap(start + head + length, tail);
    return start + head;
}
static int pmemfs_zeroes(void *start, size_t length, int protection) {
    void *mapped = mmap(start, length, protection,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? -1 : 0;
}
/* Map pieces of a file over reserved addresses. 0, or -1 with errno. */
static int pmemfs_lay(char *start, const pmemfs_piece *pieces, size_t count, int fd, int protection,
                      int flags) {
    for (const pmemfs_piece *piece = pieces; piece < pieces + count; piece++) {
        char *there = start + piece->at;
        if (piece->from < 0) {
            if (pmemfs_zeroes(there, piece->length, protection)) return -1;
            continue;
        }
        if (mmap(there, piece->length, protection, flags | MAP_FIXED, fd, piece->from)
                == MAP_FAILED)
            return -1;
        /* Advice only: where the file has no huge pages, nothing changes. */
        if (piece->length >= PMEMFS_HUGE) madvise(there, piece->length, MADV_HUGEPAGE);
    }
    return 0;
}

#endif
