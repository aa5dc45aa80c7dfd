/* Faults at the n-th write or sync of a ledger, for the tests of its store: load with LD_PRELOAD, then shim_arm().
 *
 * Counted are the calls that change the ledger's file, its journal or their folder. At call `number` (from 1) the
 * process dies before it, after it or in the middle of a write, or the call fails. Every counted call can be traced
 * with its bytes, from which a test rebuilds what a power cut would have left. The clock can be set too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { WRITE = 1, TRUNCATE, SYNC, UNLINK, RENAME, CREATE, MARK };
enum mode { COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALF, FAIL, FAIL_FROM_HERE, HALF_THEN_FAIL };
enum { OWED = 256 };
enum file { OTHER = -1, LEDGER, JOURNAL, FOLDER, BESIDE };

/* One traced call; the bytes of a write follow it. */
struct event {
    int32_t kind, file;
    int64_t offset, length;
};

static char ledger[PATH_MAX], folder[PATH_MAX];
static long number, calls;
static int mode = COUNT, error_number, trace_fd = -1, armed;
/* As Linux does since 4.13: every descriptor that was open when a sync failed reports the failure once. */
static unsigned char owed[OWED];
static int64_t clock_shift, clock_frozen = INT64_MIN;

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static void trace(int kind, int file, int64_t offset, int64_t length, const void *data) {
    struct event event = {kind, file, offset, length};
    if (trace_fd < 0) return;
    syscall(SYS_write, trace_fd, &event, sizeof event);
    if (data) syscall(SYS_write, trace_fd, data, (size_t)length);
}

void shim_arm(const char *path, long at, int how, int error, int trace_to) {
    snprintf(ledger, sizeof ledger, "%s", path);
    snprintf(folder, sizeof folder, "%s", path);
    *strrchr(folder, '/') = 0;
    number = at, mode = how, error_number = error, trace_fd = trace_to, calls = 0, armed = 1;
    memset(owed, 0, sizeof owed);
}

void shim_disarm(void) { armed = 0; }

long shim_calls(void) { return calls; }

/* Note a release in the trace, between the calls. */
void shim_mark(long step) { trace(MARK, OTHER, step, 0, NULL); }

static int which(const char *path) {
    size_t length = strlen(ledger);
    if (strcmp(path, folder) == 0) return FOLDER;
    if (strncmp(path, ledger, length)) return OTHER;
    if (!path[length] || path[length] == ' ') return LEDGER; /* "path (deleted)" */
    return strncmp(path + length, "-journal", 8) ? BESIDE : JOURNAL;
}

static int which_fd(int fd) {
    char name[64], path[PATH_MAX];
    ssize_t length;
    if (!armed) return OTHER;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    length = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path - 1);
    if (length < 0) return OTHER;
    path[length] = 0;
    return which(path);
}

static void die(void) {
    syscall(SYS_kill, (pid_t)syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* Count a call; 1 where it must fail with errno, 2 where half of it must be done first. */
static int fault(int kind) {
    calls++;
    errno = error_number;
    if (mode == COUNT || mode == KILL_AFTER || calls < number) return 0;
    if (calls == number) {
        if (mode == KILL_BEFORE || (mode == KILL_HALF && kind != WRITE)) die();
        return kind == WRITE && (mode == KILL_HALF || mode == HALF_THEN_FAIL) ? 2 : 1;
    }
    /* A full disk still syncs and removes; a dead one does nothing any more. */
    if (error_number == ENOSPC && kind != WRITE && kind != CREATE) return 0;
    return mode == FAIL_FROM_HERE || mode == HALF_THEN_FAIL;
}

static int sync_fault(int file, int fd) {
    if (fault(SYNC)) {
        for (int other = 0; other < OWED; other++)
            if (other != fd && which_fd(other) == file) owed[other] = 1;
        errno = error_number;
        return 1;
    }
    if (fd < OWED && owed[fd]) {
        owed[fd] = 0;
        errno = error_number;
        return 1;
    }
    return 0;
}

static void after(void) {
    if (mode == KILL_AFTER && calls == number) die();
}

#define AROUND(fails, call)    \
    do {                       \
        __typeof__(call) done; \
        if (fails) return -1;  \
        done = (call);         \
        after();               \
        return done;           \
    } while (0)

static ssize_t write_at(int file, int fd, const void *data, size_t size, off_t offset) {
    ssize_t done;
    int due;
    trace(WRITE, file, offset, (int64_t)size, data);
    due = fault(WRITE);
    if (due == 1) return -1;
    done = syscall(SYS_pwrite64, fd, data, due == 2 ? size / 2 : size, offset);
    if (due == 2 && mode == KILL_HALF) die();
    after();
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    int file = which_fd(fd);
    if (file == OTHER) return syscall(SYS_pwrite64, fd, data, size, offset);
    return write_at(file, fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size) {
    int file = which_fd(fd);
    ssize_t done;
    if (file == OTHER) return syscall(SYS_write, fd, data, size);
    done = write_at(file, fd, data, size, lseek(fd, 0, SEEK_CUR));
    if (done > 0) lseek(fd, done, SEEK_CUR);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ssize_t done = 0;
    if (which_fd(fd) == OTHER) return syscall(SYS_writev, fd, parts, count);
    for (int i = 0; i < count; i++) {
        ssize_t part = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (part < 0) return done ? done : -1;
        done += part;
        if ((size_t)part < parts[i].iov_len) break;
    }
    return done;
}

int ftruncate(int fd, off_t length) {
    int file = which_fd(fd);
    if (file == OTHER) return (int)syscall(SYS_ftruncate, fd, length);
    trace(TRUNCATE, file, length, 0, NULL);
    AROUND(fault(TRUNCATE), (int)syscall(SYS_ftruncate, fd, length));
}

int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int fsync(int fd) {
    int file = which_fd(fd);
    if (file == OTHER) return (int)syscall(SYS_fsync, fd);
    trace(SYNC, file, 0, 0, NULL);
    AROUND(sync_fault(file, fd), (int)syscall(SYS_fsync, fd));
}

int fdatasync(int fd) {
    int file = which_fd(fd);
    if (file == OTHER) return (int)syscall(SYS_fdatasync, fd);
    trace(SYNC, file, 0, 0, NULL);
    AROUND(sync_fault(file, fd), (int)syscall(SYS_fdatasync, fd));
}

int unlink(const char *path) {
    int file = armed ? which(path) : OTHER;
    if (file == OTHER) return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    trace(UNLINK, file, 0, 0, NULL);
    AROUND(fault(UNLINK), (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

int rename(const char *from, const char *to) {
    int file = armed ? which(to) : OTHER;
    REAL(int, rename, const char *, const char *);
    if (file == OTHER) return real(from, to);
    trace(RENAME, file, 0, 0, NULL);
    AROUND(fault(RENAME), real(from, to));
}

int open(const char *path, int flags, ...) {
    mode_t permissions = 0;
    int file = armed && (flags & O_CREAT) ? which(path) : OTHER;
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) {
        va_list rest;
        va_start(rest, flags);
        permissions = va_arg(rest, mode_t);
        va_end(rest);
    }
    if (file == OTHER) return (int)syscall(SYS_openat, AT_FDCWD, path, flags, permissions);
    trace(CREATE, file, 0, 0, NULL);
    AROUND(fault(CREATE), (int)syscall(SYS_openat, AT_FDCWD, path, flags, permissions));
}

int open64(const char *path, int flags, ...) {
    mode_t permissions = 0;
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) {
        va_list rest;
        va_start(rest, flags);
        permissions = va_arg(rest, mode_t);
        va_end(rest);
    }
    return open(path, flags, permissions);
}

/* Seconds that the wall clock is off by from now on. */
void shim_shift_clock(int64_t seconds) { clock_shift = seconds, clock_frozen = INT64_MIN; }

/* The wall clock stands still at this second. */
void shim_freeze_clock(int64_t second) { clock_frozen = second; }

static void bend(int64_t *seconds) {
    if (clock_frozen != INT64_MIN) *seconds = clock_frozen;
    else *seconds += clock_shift;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int done = (int)syscall(SYS_clock_gettime, id, now);
    if (!done && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        int64_t seconds = now->tv_sec;
        bend(&seconds);
        now->tv_sec = seconds;
    }
    return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
