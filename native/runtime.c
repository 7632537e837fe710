/* A cell of another kernel: the cell's namespaces hold a runtime (runsc) instead of the guest itself.
 *
 * Everything up to here is as for any cell: its own users, mounts, processes and a network that has only doors. In these
 * walls the runtime is started as the (powerless outside) root of the cell; its own walls are inside of ours. So a guest that
 * gets out of the runtime's kernel stands where a guest of the ns level stands, but for the seccomp filter.
 *
 * Covered: the runtime has no route out but the doors, no host id but the cell's, the cell's cgroups; it dies with the
 * launcher and with the control socket. The listener that it reports to exists in this mount namespace only, so who is
 * heard there is known from which socket it is.
 * Not covered: until the runtime has changed root, its own processes see the host's tree, as a user that owns none of it.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define STAGE "/tmp" /* the staging tmpfs of mounts.c, the cell's own */

static void put_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    size_t size = strlen(text);
    if (fd < 0 || write(fd, text, size) != (ssize_t)size || close(fd) < 0)
        fail(errno, "write %s for the runtime", path);
}

/* Where the runtime's kernel reports to. The node accepts one connection of it. */
static int listen_trace(void) {
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = STAGE "/trace.sock"};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&name, sizeof name) < 0 || listen(fd, 1) < 0)
        fail(errno, "open the socket that the runtime reports to");
    return fd;
}

void run_runtime(const struct spec *s, int sync, int control, struct doors *doors) {
    build_rootfs(s);
    if (mkdir(STAGE "/state", 0700) < 0 || mkdir(STAGE "/bundle", 0755) < 0)
        fail(errno, "make the runtime's directories");
    put_file(STAGE "/bundle/config.json", s->bundle);
    put_file(STAGE "/session.json", s->session);
    int log = memfd_create("runtime-log", MFD_CLOEXEC);
    if (log < 0)
        fail(errno, "make the runtime's log");
    doors->mask |= DOOR_TRACE | DOOR_LOG;
    doors->fds[doors->count++] = listen_trace();
    doors->fds[doors->count++] = log;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        fail(errno, "set no_new_privs");
    umask(022);
    uint32_t ready[2] = {'r', doors->mask};
    if (dup2(control, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0 || chdir("/") < 0)
        fail(errno, "connect the runtime");
    if (send_message(sync, ready, sizeof ready, doors->fds, doors->count) < 0)
        fail(errno, "hand out the doors");
    close_range(3, ~0u, 0);
    char *none[] = {NULL};
    execve(s->runtime[0], (char *const *)s->runtime, none);
    dprintf(2, "%s cannot be run: %s\n", s->runtime[0], strerror(errno));
    _exit(127);
}
