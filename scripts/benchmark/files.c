/* The instrument for files: what one phase over many files, or over one that grows, takes; or what
 * another program takes for many files.
 *
 *   files create DIR FILES CALLERS BYTES   open a new file, write BYTES, close; for each
 *   files stat   DIR FILES CALLERS         fstatat each
 *   files list   DIR FILES CALLERS         readdir, and fstatat of each entry, as ls -l does
 *   files rename DIR FILES CALLERS         to another name in the same directory
 *   files mkdir  DIR FILES CALLERS         a directory beside each
 *   files rmdir  DIR FILES CALLERS
 *   files symlink DIR FILES CALLERS        a symbolic link to each
 *   files link   DIR FILES CALLERS         another name of each
 *   files unlink DIR FILES CALLERS         and, not counted, all that is left and the directories
 *   files mail DIR FILES CALLERS BYTES     for each of so many messages: open a new file in one
 *                                          directory, write BYTES, close, rename into another
 *                                          directory, unlink
 *   files mail-fsync DIR FILES CALLERS BYTES   the same with an fsync before each close
 *   files new    FILE BYTES BLOCK MS DIRECT   again and again, for MS of counted time: a new file
 *                                          of BYTES, written BLOCK by BLOCK. Removing the one
 *                                          before isn't counted
 *   files over   FILE BYTES BLOCK MS DIRECT   the same over what is there
 *   files run    FILES COMMAND ...         a program to its end, which works on so many FILES. What
 *                                          it prints is printed, and spoils the line of JSON
 *
 * FILES are shared out among CALLERS, processes with a directory each below DIR. All begin
 * together; the seconds are from then until the last one is done. What is counted begins with open
 * and ends with close. Prints one line of JSON; whatever goes wrong is one line on stderr and exit
 * code 1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_CALLERS = 64, BUFFER_ALIGNMENT = 4096 };

struct caller {
    int dir;
    long first, end;
    size_t bytes;
    char *buffer;
};

typedef void phase_function(const struct caller *);

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    int code = errno;
    va_list rest;
    va_start(rest, format);
    vfprintf(stderr, format, rest);
    va_end(rest);
    fprintf(stderr, ": %s\n", strerror(code));
    exit(1);
}

static double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static long number(const char *word) {
    char *rest;
    errno = 0;
    long value = strtol(word, &rest, 10);
    if (errno != 0 || *rest != '\0' || value < 0) {
        errno = EINVAL;
        fail("%s", word);
    }
    return value;
}

static char *make_buffer(size_t bytes) {
    size_t rounded = (bytes + BUFFER_ALIGNMENT) & ~(size_t)(BUFFER_ALIGNMENT - 1);
    char *buffer = aligned_alloc(BUFFER_ALIGNMENT, rounded);
    if (buffer == NULL)
        fail("memory");
    memset(buffer, 'x', rounded);
    return buffer;
}

static void write_all(int fd, const char *buffer, size_t bytes) {
    while (bytes > 0) {
        ssize_t written = write(fd, buffer, bytes);
        if (written <= 0)
            fail("write");
        buffer += written;
        bytes -= (size_t)written;
    }
}

/* -- phases over many files --------------------------------------------------------------------- */

/* A name as people give them: neither short nor long. */
static void name_of(char *name, const char *stem, long number) {
    sprintf(name, "%s-%07ld.dat", stem, number);
}

static void create_files(const struct caller *caller) {
    char name[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "file", i);
        int fd = openat(caller->dir, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (fd < 0)
            fail("create %s", name);
        if (caller->bytes > 0)
            write_all(fd, caller->buffer, caller->bytes);
        if (close(fd) != 0)
            fail("close %s", name);
    }
}

static void stat_files(const struct caller *caller) {
    char name[64];
    struct stat seen;
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "file", i);
        if (fstatat(caller->dir, name, &seen, AT_SYMLINK_NOFOLLOW) != 0)
            fail("stat %s", name);
    }
}

static void list_files(const struct caller *caller) {
    int fd = openat(caller->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *opened = fd < 0 ? NULL : fdopendir(fd);
    if (opened == NULL)
        fail("opendir");
    long count = 0;
    struct stat seen;
    struct dirent *entry;
    while (errno = 0, (entry = readdir(opened)) != NULL) {
        if (entry->d_name[0] == '.')
            continue;
        if (fstatat(fd, entry->d_name, &seen, AT_SYMLINK_NOFOLLOW) != 0)
            fail("stat %s", entry->d_name);
        count++;
    }
    if (errno != 0)
        fail("readdir");
    closedir(opened);
    if (count != caller->end - caller->first) {
        errno = EINVAL;
        fail("%ld files listed, %ld are there", count, caller->end - caller->first);
    }
}

static void rename_files(const struct caller *caller) {
    char name[64], new_name[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "file", i);
        name_of(new_name, "moved", i);
        if (renameat(caller->dir, name, caller->dir, new_name) != 0)
            fail("rename %s", name);
    }
}

static void make_directories(const struct caller *caller) {
    char name[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "directory", i);
        if (mkdirat(caller->dir, name, 0755) != 0)
            fail("mkdir %s", name);
    }
}

static void remove_directories(const struct caller *caller) {
    char name[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "directory", i);
        if (unlinkat(caller->dir, name, AT_REMOVEDIR) != 0)
            fail("rmdir %s", name);
    }
}

static void link_symbolically(const struct caller *caller) {
    char name[64], link[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "moved", i);
        name_of(link, "symbolic", i);
        if (symlinkat(name, caller->dir, link) != 0)
            fail("symlink %s", link);
    }
}

static void link_files(const struct caller *caller) {
    char name[64], link[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "moved", i);
        name_of(link, "hard", i);
        if (linkat(caller->dir, name, caller->dir, link, 0) != 0)
            fail("link %s", link);
    }
}

/* What the phases of links have left, if there were any. */
static void unlink_links(const struct caller *caller) {
    char name[64];
    static const char *const stems[] = {"symbolic", "hard"};
    for (size_t stem = 0; stem < sizeof stems / sizeof *stems; stem++)
        for (long i = caller->first; i < caller->end; i++) {
            name_of(name, stems[stem], i);
            if (unlinkat(caller->dir, name, 0) != 0 && errno != ENOENT)
                fail("unlink %s", name);
        }
}

static void unlink_files(const struct caller *caller) {
    char name[64];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "moved", i);
        if (unlinkat(caller->dir, name, 0) != 0)
            fail("unlink %s", name);
    }
}

static void deliver(const struct caller *caller, int is_durable) {
    char name[64], waiting[80], taken[80];
    for (long i = caller->first; i < caller->end; i++) {
        name_of(name, "message", i);
        sprintf(waiting, "tmp/%s", name);
        sprintf(taken, "new/%s", name);
        int fd = openat(caller->dir, waiting, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0)
            fail("create %s", waiting);
        write_all(fd, caller->buffer, caller->bytes);
        if (is_durable && fsync(fd) != 0)
            fail("fsync %s", waiting);
        if (close(fd) != 0)
            fail("close %s", waiting);
        if (renameat(caller->dir, waiting, caller->dir, taken) != 0)
            fail("rename %s", waiting);
        if (unlinkat(caller->dir, taken, 0) != 0)
            fail("unlink %s", taken);
    }
}

static void queue_mail(const struct caller *caller) { deliver(caller, 0); }

static void queue_mail_durably(const struct caller *caller) { deliver(caller, 1); }

static const struct {
    const char *name;
    phase_function *function;
} phases[] = {
    {"create", create_files}, {"stat", stat_files},     {"list", list_files},
    {"rename", rename_files}, {"mkdir", make_directories}, {"rmdir", remove_directories},
    {"symlink", link_symbolically}, {"link", link_files}, {"unlink", unlink_files},
    {"mail", queue_mail},           {"mail-fsync", queue_mail_durably},
};

/* Says that it is ready, waits until all are let go, works, and notes when it was done. */
static void work(phase_function *function, const struct caller *caller, int ready, int go,
                 double *done) {
    char byte = 0;
    if (write(ready, &byte, 1) != 1 || read(go, &byte, 1) != 0)
        fail("pipe");
    function(caller);
    *done = now_seconds();
    _exit(0);
}

/* Seconds from letting all callers go until the last is done. Exits where one of them failed. */
static double run_callers(phase_function *function, const struct caller *callers, long count) {
    int ready[2], go[2], status, has_failed = 0;
    double *done = mmap(NULL, MOST_CALLERS * sizeof *done, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (done == MAP_FAILED || pipe(ready) != 0 || pipe(go) != 0)
        fail("pipe");
    for (long i = 0; i < count; i++) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork");
        if (pid == 0) {
            close(go[1]);
            work(function, &callers[i], ready[1], go[0], &done[i]);
        }
    }
    char byte;
    for (long i = 0; i < count; i++)
        if (read(ready[0], &byte, 1) != 1)
            fail("pipe");
    double begin = now_seconds(), end = begin;
    close(go[1]);
    while (wait(&status) > 0)
        has_failed |= status != 0;
    if (has_failed)
        exit(1);
    for (long i = 0; i < count; i++)
        end = done[i] > end ? done[i] : end;
    return end - begin;
}

static void directory_of(char *path, size_t bytes, const char *dir, long caller) {
    snprintf(path, bytes, "%s/caller-%ld", dir, caller);
}

/* The directories of a mail queue, which stand only while mail is delivered. */
static void change_queue(int dir, int is_made) {
    static const char *const names[] = {"tmp", "new"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if ((is_made ? mkdirat(dir, names[i], 0755) : unlinkat(dir, names[i], AT_REMOVEDIR)) != 0)
            fail("%s %s", is_made ? "mkdir" : "rmdir", names[i]);
}

static void run_phase(size_t phase, const char *dir, long files, long count, size_t bytes) {
    char path[4096];
    phase_function *function = phases[phase].function;
    int queues = function == queue_mail || function == queue_mail_durably;
    int begins = function == create_files || queues;
    int ends = function == unlink_files || queues;
    struct caller callers[MOST_CALLERS];
    if (count < 1 || count > MOST_CALLERS) {
        errno = EINVAL;
        fail("%ld callers", count);
    }
    for (long i = 0; i < count; i++) {
        directory_of(path, sizeof path, dir, i);
        if (begins && mkdir(path, 0755) != 0)
            fail("mkdir %s", path);
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0)
            fail("open %s", path);
        callers[i] = (struct caller){fd, files * i / count, files * (i + 1) / count, bytes,
                                     make_buffer(bytes)};
        if (queues)
            change_queue(fd, 1);
    }
    double seconds = run_callers(function, callers, count);
    for (long i = 0; ends && i < count; i++) {
        if (queues)
            change_queue(callers[i].dir, 0);
        else
            unlink_links(&callers[i]);
        directory_of(path, sizeof path, dir, i);
        if (rmdir(path) != 0)
            fail("rmdir %s", path);
    }
    printf("{\"operations\": %ld, \"seconds\": %.9f, \"bytes\": %ld}\n", files, seconds,
           files * (long)bytes);
}

/* -- one file that grows, or is written over ---------------------------------------------------- */

static double write_once(const char *path, long bytes, long block, int flags, const char *buffer) {
    double begin = now_seconds();
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        fail("open %s", path);
    for (long at = 0; at < bytes; at += block)
        write_all(fd, buffer, (size_t)block);
    if (close(fd) != 0)
        fail("close %s", path);
    return now_seconds() - begin;
}

static void run_writes(const char *path, long bytes, long block, long ms, int flags) {
    if (block == 0 || bytes % block != 0) {
        errno = EINVAL;
        fail("blocks of %ld bytes", block);
    }
    char *buffer = make_buffer((size_t)block);
    double seconds = 0;
    long times = 0;
    for (; times == 0 || seconds * 1000 < (double)ms; times++) {
        if (flags & O_CREAT && unlink(path) != 0 && errno != ENOENT)
            fail("unlink %s", path);
        seconds += write_once(path, bytes, block, flags, buffer);
    }
    printf("{\"operations\": %ld, \"seconds\": %.9f, \"bytes\": %ld}\n", times * (bytes / block),
           seconds, times * bytes);
}

/* -- another program ---------------------------------------------------------------------------- */

static void run_program(long files, char **words) {
    int status;
    double begin = now_seconds();
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        execvp(words[0], words);
        fail("%s", words[0]);
    }
    if (waitpid(pid, &status, 0) != pid)
        fail("waitpid");
    double seconds = now_seconds() - begin;
    if (WIFSIGNALED(status))
        fprintf(stderr, "%s: %s\n", words[0], strsignal(WTERMSIG(status)));
    if (status != 0)
        exit(1);
    printf("{\"operations\": %ld, \"seconds\": %.9f, \"bytes\": 0}\n", files, seconds);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "run") == 0 && argc > 3) {
        run_program(number(argv[2]), &argv[3]);
        return 0;
    }
    int makes_new = strcmp(what, "new") == 0;
    if ((makes_new || strcmp(what, "over") == 0) && argc == 7) {
        int flags = (makes_new ? O_CREAT | O_EXCL : 0) | (number(argv[6]) ? O_DIRECT : 0);
        run_writes(argv[2], number(argv[3]), number(argv[4]), number(argv[5]), flags);
        return 0;
    }
    for (size_t i = 0; i < sizeof phases / sizeof *phases; i++)
        if (strcmp(what, phases[i].name) == 0 && (argc == 5 || argc == 6)) {
            long bytes = argc == 6 ? number(argv[5]) : 0;
            run_phase(i, argv[2], number(argv[3]), number(argv[4]), (size_t)bytes);
            return 0;
        }
    fprintf(stderr, "usage: see the head of files.c\n");
    return 2;
}
