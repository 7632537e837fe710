/* PID 1 of a cell whose kernel is a runtime's (gVisor): the same fork server as init.c, started as `vallum-cell guest`.
 *
 * The runtime gives it the control socket as descriptor 0, and as user and capabilities what PID 1 of any cell has, and
 * CAP_SETPCAP to empty the bounding set of commands. That kernel lets us receive descriptors of the host but not send any,
 * so pipes come from the node (SPAWN_GIVEN), and process ids are the cell's own, said in E_HELLO.
 *
 * Covered: descriptors 0 to 2 of the runtime are closed before any command runs; commands have no capability,
 * no_new_privs and the seccomp filter. Not covered: Landlock, which that kernel does not have.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define NO_AUTOMOUNT 0x800 /* AT_NO_AUTOMOUNT */

/* Whether this kernel refuses a flag that programs give by habit; the node then lends them native/preload/statx.c. */
static bool refuses_automount(void) {
    struct stat st;
    return fstatat(AT_FDCWD, "/", &st, NO_AUTOMOUNT) < 0 && errno == EINVAL;
}

void run_guest(void) {
    int control = fcntl(0, F_DUPFD_CLOEXEC, 500);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (control < 0 || null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        _exit(1);
    close_range(3, 499, 0);
    umask(022);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0 || install_walls(false) < 0)
        _exit(1);
    struct message hello = {.op = E_HELLO, .a = getpid(), .b = refuses_automount()};
    if (send_message(control, &hello, HEAD, NULL, 0) < 0)
        _exit(1);
    serve_cell(control, (struct guard){.given = true});
}
