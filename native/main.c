/* vallum-cell: builds cells and is their PID 1. Started by the node as `vallum-cell launcher FD`.
 *
 * It first runs itself again from a sealed memfd: PID 1 of a cell is a fork of this program, so
 * /proc/PID/exe leads from a guest to its file, and where the guest's user owns that file (rootless)
 * it could write to it (the way of CVE-2019-5736). A sealed memfd cannot be written by anyone.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif
#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

void run_launcher(int node) __attribute__((noreturn));

static void run_sealed(char **argv) {
    int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (self < 0) {
        perror("vallum-cell: cannot open /proc/self/exe");
        exit(1);
    }
    int seals = fcntl(self, F_GET_SEALS);
    if (seals >= 0 && (seals & SEALS) == SEALS) {
        close(self);
        return;
    }
    struct stat st;
    int copy = memfd_create("vallum-cell", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC);
    if (copy < 0 && errno == EINVAL) /* before Linux 6.3 */
        copy = memfd_create("vallum-cell", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (copy < 0 || fstat(self, &st) < 0) {
        perror("vallum-cell: cannot make a sealed copy of itself");
        exit(1);
    }
    for (off_t left = st.st_size; left > 0;) {
        ssize_t put = sendfile(copy, self, NULL, left);
        if (put <= 0) {
            perror("vallum-cell: cannot make a sealed copy of itself");
            exit(1);
        }
        left -= put;
    }
    if (fcntl(copy, F_ADD_SEALS, SEALS) < 0) {
        perror("vallum-cell: cannot seal the copy of itself");
        exit(1);
    }
    char *none[] = {NULL}, *plain[] = {"vallum-cell", argv[1], argv[2], NULL}; /* argv[0] is seen in the cell: no path of the host */
    fexecve(copy, plain, none);
    perror("vallum-cell: cannot run the sealed copy of itself");
    exit(1);
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "guest") == 0)
        run_guest();
    if (argc != 3 || strcmp(argv[1], "launcher") != 0) {
        fprintf(stderr, "vallum-cell is started by the vallum node; it does nothing by itself\n");
        return 2;
    }
    run_sealed(argv);
    char *end;
    long fd = strtol(argv[2], &end, 10);
    if (*end || fd < 3 || fcntl((int)fd, F_SETFD, FD_CLOEXEC) < 0) {
        fprintf(stderr, "vallum-cell: %s is not an open descriptor\n", argv[2]);
        return 2;
    }
    run_launcher((int)fd);
}
