/* What every handler of SIGBUS needs: which causes are a touch, and which handler is next. */
#ifndef PMEMFS_SIGBUS_H
#define PMEMFS_SIGBUS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <string.h>

#ifndef BUS_MCEERR_AR
#define BUS_MCEERR_AR 4
#define BUS_MCEERR_AO 5
#endif

/* The handler of SIGBUS before this module set its own. */
static struct sigaction pmemfs_next_handler;

/* Whether this thread has touched memory that is not there, and stands at that instruction. */
static inline int pmemfs_is_touch(const siginfo_t *info) {
    return info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
}
/* Whether the kernel only reports damage that was not touched yet: then there is nothing to do. */
static inline int pmemfs_is_news(const siginfo_t *info) {
    return info->si_code == BUS_MCEERR_AO;
}
/* The signal is for another handler: call the former one, or take the default action. */
static void pmemfs_pass_on(int number, siginfo_t *info, void *context) {
    if (pmemfs_next_handler.sa_flags & SA_SIGINFO) {
        pmemfs_next_handler.sa_sigaction(number, info, context);
    } else if (pmemfs_next_handler.sa_handler != SIG_DFL
               && pmemfs_next_handler.sa_handler != SIG_IGN) {
        pmemfs_next_handler.sa_handler(number);
    } else {
        signal(number, SIG_DFL);
        /* A touch is repeated on return, and then kills. A sent signal has to be sent again. */
        if (!pmemfs_is_touch(info)) raise(number);
    }
}
/* SA_NODEFER: the mask stays as it is, because a handler may leave by a jump. 0, or -1 with
   errno. */
static int pmemfs_handle_sigbus(void (*handler)(int, siginfo_t *, void *)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    return sigaction(SIGBUS, &action, &pmemfs_next_handler);
}

#endif
