// Faults of storage and clock below a process that does not know of them: preloaded before the C library, it stands between the
// process and the operating system. Which faults there are it reads from a file that the tests write (mod.rs has the same
// layout), so that one can begin and end while the process runs.
//
// FAULTS_CONTROL names that file, FAULTS_FOLDER the data folder whose files are meant.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { OBJECTS = 1, DATABASE = 2, SCRATCH = 4, OTHERS = 8 };

struct control {
    int32_t error;            // errno that fails a call; 0: none
    int32_t one_in;           // every how many-th call fails
    int32_t delay_ms;         // how long a call that writes waits first
    int32_t targets;          // whose files: OBJECTS | DATABASE | SCRATCH | OTHERS
    int64_t clock_offset_ms;  // added to the wall clock
};

static volatile struct control *control;
static const char *folder;
static unsigned calls;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    folder = getenv("FAULTS_FOLDER");
    if (!path || !folder) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof(struct control), PROT_READ, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (map != MAP_FAILED) control = map;
}

static int target(const char *path) {
    size_t length = strlen(folder);
    if (strncmp(path, folder, length) != 0 || path[length] != '/') return 0;
    const char *rest = path + length + 1;
    if (strncmp(rest, "objects/", 8) == 0) return OBJECTS;
    if (strncmp(rest, "lorad.db", 8) == 0) return DATABASE;
    if (strncmp(rest, "scratch/", 8) == 0) return SCRATCH;
    return OTHERS;
}

static int active(void) { return control && (control->error || control->delay_ms); }

// Waits and fails as the control says; `reads`: a full disk fails only what writes.
static int strikes(const char *path, int reads) {
    if (!(target(path) & control->targets)) return 0;
    // In small pieces, so that a wait ends when the fault does.
    for (int waited_ms = 0; !reads && waited_ms < control->delay_ms; waited_ms++) {
        struct timespec millisecond = {0, 1000000L};
        nanosleep(&millisecond, NULL);
    }
    int error = control->error, one_in = control->one_in;
    if (!error || (reads && error != EIO)) return 0;
    if (one_in > 1 && __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) % (unsigned)one_in != 0) return 0;
    errno = error;
    return 1;
}

static int strikes_fd(int fd, int reads) {
    if (!active()) return 0;
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strikes(path, reads);
}

static int strikes_path(const char *path) { return active() && path && path[0] == '/' && strikes(path, 0); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(type, name, reads, params, args) \
    type name params { \
        static __typeof__(&name) real; \
        if (!real) real = REAL(name); \
        return strikes_fd(fd, reads) ? -1 : real args; \
    }

ON_FD(ssize_t, read, 1, (int fd, void *buffer, size_t count), (fd, buffer, count))
ON_FD(ssize_t, pread, 1, (int fd, void *buffer, size_t count, off_t at), (fd, buffer, count, at))
ON_FD(ssize_t, pread64, 1, (int fd, void *buffer, size_t count, off64_t at), (fd, buffer, count, at))
ON_FD(ssize_t, write, 0, (int fd, const void *buffer, size_t count), (fd, buffer, count))
ON_FD(ssize_t, pwrite, 0, (int fd, const void *buffer, size_t count, off_t at), (fd, buffer, count, at))
ON_FD(ssize_t, pwrite64, 0, (int fd, const void *buffer, size_t count, off64_t at), (fd, buffer, count, at))
ON_FD(int, ftruncate, 0, (int fd, off_t length), (fd, length))
ON_FD(int, ftruncate64, 0, (int fd, off64_t length), (fd, length))
ON_FD(int, fsync, 0, (int fd), (fd))
ON_FD(int, fdatasync, 0, (int fd), (fd))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        static __typeof__(&name) real; \
        if (!real) real = REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return (flags & O_CREAT) && strikes_path(path) ? -1 : real(path, flags, mode); \
    }

OPEN(open)
OPEN(open64)

#define ON_PATH(name, params, args) \
    int name params { \
        static __typeof__(&name) real; \
        if (!real) real = REAL(name); \
        return strikes_path(path) ? -1 : real args; \
    }

ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(link, (const char *path, const char *to), (path, to))

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && clock == CLOCK_REALTIME && control) {
        now->tv_sec += control->clock_offset_ms / 1000;
    }
    return result;
}
