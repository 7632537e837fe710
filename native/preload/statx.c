/* For guests in a runtime's kernel that refuses AT_NO_AUTOMOUNT (runsc before 2023): without it `ls` and `stat` of
 * coreutils 9 fail with EINVAL. Loaded by the image's own loader through /etc/ld.so.preload, only in such cells.
 *
 * Built without any library, so it fits every C library of the same architecture. There is nothing to mount in a cell, so
 * the flag has no meaning there.
 */
#include <asm/unistd.h>

#define NO_AUTOMOUNT 0x800

int *__errno_location(void);

static long call5(long number, long a, long b, long c, long d, long e) {
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    long result = x0;
#else
#error "write the system call of this architecture"
#endif
    if (result < 0) {
        *__errno_location() = (int)-result;
        return -1;
    }
    return result;
}

int statx(int dir, const char *path, int flags, unsigned mask, void *found) {
    return (int)call5(__NR_statx, dir, (long)path, flags & ~NO_AUTOMOUNT, mask, (long)found);
}

int fstatat(int dir, const char *path, void *found, int flags) {
    return (int)call5(__NR_newfstatat, dir, (long)path, (long)found, flags & ~NO_AUTOMOUNT, 0);
}

int fstatat64(int dir, const char *path, void *found, int flags) {
    return fstatat(dir, path, found, flags);
}
