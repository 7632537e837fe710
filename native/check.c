/* The walls tried from inside, before a node serves anybody: a child of PID 1 that has become a guest user tries what
 * it must not be able to do, and exits with one bit for each control that did not hold.
 *
 * This is our own code in a cell without any guest, so its word is good. It finds a kernel (or an outer sandbox) that
 * says yes to a request and then does not enforce it.
 * Covered: the controls that a cell cannot do without. Not covered: whatever needs a program of the guest's; that is
 * tried by `vallum doctor`.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static bool has_capability(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    if (syscall(SYS_capget, &head, data) < 0)
        return true;
    for (int i = 0; i < 2; i++)
        if (data[i].effective | data[i].permitted | data[i].inheritable)
            return true;
    for (int cap = 0; cap < 64; cap++)
        if (prctl(PR_CAPBSET_READ, cap) == 1)
            return true;
    return prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1;
}

static bool seccomp_fails(void) {
    if (prctl(PR_GET_SECCOMP) != 2)
        return true;
    return socket(38, SOCK_SEQPACKET, 0) >= 0 /* AF_ALG */ || errno != EAFNOSUPPORT || syscall(SYS_bpf, 0, 0, 0) >= 0 || errno != EPERM ||
           syscall(SYS_keyctl, 0, 0, 0) >= 0 || errno != EPERM;
}

static bool namespaces_fail(void) {
    if (unshare(CLONE_NEWUSER) == 0 || errno != EPERM || syscall(SYS_mount, 0, 0, 0, 0, 0) == 0 || errno != EPERM)
        return true;
    return getppid() != 1 || getpid() > 100; /* of a pid namespace of our own, or they would be the host's */
}

static bool proc_fails(void) {
    static const char *const kept[] = {"/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger"};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        int fd = open(kept[i], O_WRONLY | O_CLOEXEC);
        struct stat st;
        /* A masked file is /dev/null: open, and nothing is behind it. */
        if (fd >= 0 && !(fstat(fd, &st) == 0 && S_ISCHR(st.st_mode)))
            return true;
    }
    return false;
}

/* A connection to an address that is nowhere must arrive at our own door. */
static bool redirect_fails(int family) {
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), err = 0;
    if (fd < 0)
        return family == AF_INET; /* no IPv6 in this kernel: none for the guest */
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(9)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(9)};
    inet_pton(AF_INET, "203.0.113.1", &v4.sin_addr); /* documentation only (RFC 5737, RFC 3849) */
    inet_pton(AF_INET6, "2001:db8::1", &v6.sin6_addr);
    int result = family == AF_INET ? connect(fd, (struct sockaddr *)&v4, sizeof v4) : connect(fd, (struct sockaddr *)&v6, sizeof v6);
    struct pollfd ready = {.fd = fd, .events = POLLOUT};
    socklen_t size = sizeof err;
    bool arrived = result == 0 || (errno == EINPROGRESS && poll(&ready, 1, 2000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &size) == 0 && err == 0);
    close(fd);
    return !arrived;
}

static bool has_interface(void) {
    char name[IF_NAMESIZE];
    for (unsigned i = 2; i < 64; i++)
        if (if_indextoname(i, name) && strcmp(name, "lo") != 0)
            return true;
    return false;
}

static bool devices_fail(void) { return mknod("/vallum-check", S_IFCHR | 0600, 1 << 8 | 3) == 0 || mknod("/tmp/vallum-check", S_IFCHR | 0600, 1 << 8 | 3) == 0; }

int check_walls(void) {
    return has_capability() << 0 | seccomp_fails() << 1 | namespaces_fail() << 2 | proc_fails() << 3 | (redirect_fails(AF_INET) || has_interface()) << 4 |
           redirect_fails(AF_INET6) << 5 | devices_fail() << 6;
}
