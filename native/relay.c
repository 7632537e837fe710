/* A terminal in a runtime's kernel, seen through a socket of the host: that kernel cannot hand its pty to the node.
 *
 * A relay process between both, forked by the command-to-be when it is already the guest user, and adopted by PID 1. The
 * guest may kill it: that is its own terminal gone. It ends with the terminal or the node's socket.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static bool put_all(int fd, const char *data, ssize_t size) {
    while (size > 0) {
        ssize_t put = write(fd, data, (size_t)size);
        if (put < 0 && (errno == EAGAIN || errno == EINTR)) {
            poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
            continue;
        }
        if (put < 0)
            return false;
        data += put;
        size -= put;
    }
    return true;
}

/* `leader`: the command, leader of the session. Its end is the terminal's, which that kernel does not tell the master. */
static void relay(int master, int stream, int sizes, pid_t leader) {
    char data[65536];
    for (;;) {
        struct pollfd polls[3] = {{.fd = master, .events = POLLIN}, {.fd = stream, .events = POLLIN}, {.fd = sizes, .events = POLLIN}};
        int ready = poll(polls, 3, 100);
        if (ready < 0)
            continue;
        if (ready == 0 && kill(leader, 0) < 0 && errno == ESRCH)
            _exit(0);
        if (polls[0].revents) {
            ssize_t got = read(master, data, sizeof data);
            if (got <= 0 && errno != EAGAIN && errno != EINTR)
                _exit(0); /* every holder of the slave has closed it */
            if (got > 0 && !put_all(stream, data, got))
                _exit(0);
        }
        if (polls[1].revents) {
            ssize_t got = read(stream, data, sizeof data);
            if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
                _exit(0); /* the node closed its end: a hang-up */
            if (got > 0 && !put_all(master, data, got))
                _exit(0);
        }
        if (polls[2].revents) {
            uint16_t size[2];
            if (recv(sizes, size, sizeof size, MSG_DONTWAIT) == sizeof size) {
                struct winsize wanted = {.ws_row = size[0], .ws_col = size[1]};
                ioctl(master, TIOCSWINSZ, &wanted);
            } else {
                sizes = -1;
            }
        }
    }
}

int open_relayed_terminal(int stream, int sizes, uint32_t rows, uint32_t columns) {
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    int unlock = 0, number = -1, master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0 || ioctl(master, TIOCGPTN, &number) < 0)
        return -1;
    char path[32] = "/dev/pts/", digits[12];
    int n = 0, at = 9;
    do
        digits[n++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (n)
        path[at++] = digits[--n];
    int slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0 || ioctl(master, TIOCSWINSZ, &size) < 0 || ioctl(slave, TIOCSCTTY, 0) < 0)
        return -1;
    pid_t leader = getpid(), between = fork();
    if (between == 0) {
        setsid();
        if (fork() != 0)
            _exit(0);
        /* Nothing else may stay open in here: PID 1 waits for the end of a pipe, the reader of the terminal for its own. */
        master = fcntl(master, F_DUPFD_CLOEXEC, 600), stream = fcntl(stream, F_DUPFD_CLOEXEC, 600), sizes = fcntl(sizes, F_DUPFD_CLOEXEC, 600);
        if (master != 600 || stream != 601 || sizes != 602 || close_range(0, 599, 0) < 0 || close_range(603, INT_MAX, 0) < 0)
            _exit(1);
        signal(SIGPIPE, SIG_IGN);
        prctl(PR_SET_NAME, "terminal");
        relay(master, stream, sizes, leader);
    }
    if (between < 0)
        return -1;
    int status;
    while (waitpid(between, &status, 0) < 0 && errno == EINTR)
        ;
    slave = raise_fd(slave);
    return slave;
}
