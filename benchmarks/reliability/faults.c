// What the campaign puts before libc (LD_PRELOAD): file operations below FAULT_ROOT that fail from the FAULT_AT-th on or
// once, reads that come back changed, memory that is refused, and a wall clock that jumps.
//
// Nothing happens without these variables, which a process sets before it begins: FAULT_ROOT, FAULT_AT (0: count alone),
// FAULT_ERRNO (0: kill -9, after half of a write), FAULT_ONCE, FAULT_TRACE (a file with a line for each operation);
// FAULT_MEMORY (the n-th request of a tensor's memory fails; 0: count in FAULT_TRACE's length); FAULT_CLOCK (seconds that
// the wall clock is wrong by from the FAULT_AT-th look at it on).

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long operations, requests, looks;

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

static void trace(const char *what, const char *path) {
    const char *file = getenv("FAULT_TRACE");
    if (!file) return;
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %s\n", what, path);
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND, 0600);
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
}

// Whether this operation on this path is to fail; sets errno. `half` is done before a kill.
static int fails(const char *what, const char *path, int fd, const void *data, size_t bytes) {
    const char *root = getenv("FAULT_ROOT");
    if (!root || strncmp(path, root, strlen(root))) return 0;
    trace(what, path);
    long at = number("FAULT_AT"), now = ++operations;
    if (!at || now < at || (now > at && number("FAULT_ONCE"))) return 0;
    if (!number("FAULT_ERRNO")) {
        if (data) syscall(SYS_write, fd, data, bytes / 2);
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    errno = number("FAULT_ERRNO");
    return 1;
}

static int fails_fd(const char *what, int fd, const void *data, size_t bytes) {
    if (!getenv("FAULT_ROOT")) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(what, path, fd, data, bytes);
}

static int fails_at(const char *what, int folder, const char *path) {
    if (!getenv("FAULT_ROOT")) return 0;
    if (path[0] == '/') return fails(what, path, -1, NULL, 0);
    char link[64], whole[2 * PATH_MAX];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, whole, PATH_MAX);
    if (length < 0) return 0;
    snprintf(whole + length, PATH_MAX, "/%s", path);
    return fails(what, whole, -1, NULL, 0);
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, parameters, call, data, bytes) \
    type name parameters { NEXT(name); return fails_fd(#name, fd, data, bytes) ? -1 : next call; }
#define ON_PATH(name, parameters, call, folder, path) \
    int name parameters { NEXT(name); return fails_at(#name, folder, path) ? -1 : next call; }

ON_FD(ssize_t, write, (int fd, const void *data, size_t bytes), (fd, data, bytes), data, bytes)
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t bytes, off64_t at), (fd, data, bytes, at), NULL, 0)
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), NULL, 0)
ON_FD(ssize_t, pwritev64v2, (int fd, const struct iovec *parts, int count, off64_t at, int flags),
      (fd, parts, count, at, flags), NULL, 0)
ON_FD(int, fsync, (int fd), (fd), NULL, 0)
ON_FD(int, fdatasync, (int fd), (fd), NULL, 0)
ON_FD(int, ftruncate64, (int fd, off64_t size), (fd, size), NULL, 0)
ON_PATH(rename, (const char *path, const char *to), (path, to), AT_FDCWD, path)
ON_PATH(renameat, (int folder, const char *path, int other, const char *to), (folder, path, other, to), folder, path)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
ON_PATH(unlink, (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
ON_PATH(rmdir, (const char *path), (path), AT_FDCWD, path)

int posix_fallocate64(int fd, off64_t at, off64_t bytes) {  // returns its error
    NEXT(posix_fallocate64);
    return fails_fd("fallocate", fd, NULL, 0) ? errno : next(fd, at, bytes);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t bytes) {
    NEXT(sendfile64);
    return fails_fd("sendfile", to, NULL, 0) ? -1 : next(to, from, at, bytes);
}

static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        NEXT(name); \
        return flags & O_CREAT && fails_at("create", AT_FDCWD, path) ? -1 : next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int posix_memalign(void **memory, size_t alignment, size_t bytes) {
    NEXT(posix_memalign);
    const char *at = getenv("FAULT_MEMORY");
    if (at) {
        long now = ++requests;
        if (!atol(at)) trace("memory", "");
        else if (now == atol(at)) return ENOMEM;
    }
    return next(memory, alignment, bytes);
}

static long wrong_by(void) {
    const char *seconds = getenv("FAULT_CLOCK");
    return seconds && ++looks >= number("FAULT_AT") ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += wrong_by();
    return failed;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
