/* The launcher: one process a node. Each cell is built by a fork of it, so a build that hangs (a dead
 * network file system among the layers, say) can be killed and blocks nobody.
 *
 * The node's death is the end of its socket: the launcher exits, and its cells with it (each PID 1 has
 * its own socket to the node, and the launcher as parent for PR_SET_PDEATHSIG).
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_JOBS 128

struct job {
    pid_t pid;       /* of the fork that works on it; 0: free */
    uint32_t id, op;
};
static struct job jobs[MAX_JOBS];
static volatile pid_t *cells; /* shared with the forks: the cell each of them has cloned */

void run_launcher(int node) __attribute__((noreturn));

static void tell(int node, uint32_t op, uint32_t id, int err, const char *text) {
    struct message m = {.op = op, .id = id, .a = err};
    snprintf(m.text, sizeof m.text, "%s", text);
    if (send_message(node, &m, HEAD + strlen(m.text), NULL, 0) < 0)
        exit(0); /* the node is gone */
}

static void work_remove(int node, uint32_t id, int payload_fd) {
    struct payload p = read_payload(payload_fd);
    uint32_t count = 0;
    if (!p.at)
        p.bad = true;
    const char **paths = p.bad ? NULL : take_list(&p, &count, 4096);
    if (p.bad) {
        tell(node, L_REMOVED, id, EBADMSG, "the request is malformed");
        _exit(0);
    }
    for (uint32_t i = 0; i < count; i++) {
        int err = remove_tree(paths[i]);
        if (err) {
            tell(node, L_REMOVED, id, -err, paths[i]);
            _exit(0);
        }
    }
    tell(node, L_REMOVED, id, 0, "");
    _exit(0);
}

static uint32_t reply_of(uint32_t op) {
    return op == L_CREATE ? L_FAILED : op == L_SEAL ? L_SEALED : L_REMOVED;
}

static void start(int node, const struct message *m, int payload_fd) {
    int slot = 0;
    while (slot < MAX_JOBS && jobs[slot].pid)
        slot++;
    if (slot == MAX_JOBS) {
        tell(node, reply_of(m->op), m->id, EAGAIN, "too many requests at once");
        return;
    }
    cells[slot] = 0;
    pid_t launcher = getpid(), pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != launcher)
            _exit(1);
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        if (m->op == L_CREATE)
            build_cell(node, m->id, payload_fd, &cells[slot]);
        if (m->op == L_SEAL)
            seal_layer(node, m->id, payload_fd);
        work_remove(node, m->id, payload_fd);
    }
    if (pid < 0) {
        tell(node, reply_of(m->op), m->id, errno, "start a process to work on it");
        return;
    }
    jobs[slot] = (struct job){pid, m->id, m->op};
}

static void kill_job(int slot) {
    kill(jobs[slot].pid, SIGKILL);
    if (cells[slot] > 0)
        kill(cells[slot], SIGKILL);
}

static void reap(int node) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (int i = 0; i < MAX_JOBS; i++) {
            if (cells[i] == pid)
                cells[i] = 0; /* the number may be another's from now on */
            if (jobs[i].pid != pid)
                continue;
            jobs[i].pid = 0;
            if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
                continue; /* it has answered */
            if (cells[i] > 0)
                kill(cells[i], SIGKILL);
            tell(node, reply_of(jobs[i].op), jobs[i].id, ECANCELED, "the work was cancelled or killed");
        }
}

void run_launcher(int node) {
    cells = mmap(NULL, sizeof(pid_t) * MAX_JOBS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    for (int s = 1; s < 65; s++)
        if (s != SIGKILL && s != SIGSTOP)
            signal(s, SIG_DFL);
    /* A terminal's ^C is for the node to handle; the launcher lives as long as the node's socket. */
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_NAME, "vallum-launcher");
    int children = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (cells == MAP_FAILED || children < 0)
        exit(1);
    for (;;) {
        struct pollfd polls[2] = {{.fd = node, .events = POLLIN}, {.fd = children, .events = POLLIN}};
        if (poll(polls, 2, -1) < 0)
            continue;
        if (polls[1].revents) {
            struct signalfd_siginfo info;
            while (read(children, &info, sizeof info) > 0)
                ;
            reap(node);
        }
        if (!polls[0].revents)
            continue;
        struct message m;
        int fds[MAX_FDS], count = MAX_FDS;
        ssize_t got = recv_message(node, &m, sizeof m, fds, &count);
        if (got <= 0) {
            for (int i = 0; i < MAX_JOBS; i++)
                if (jobs[i].pid)
                    kill_job(i);
            exit(0);
        }
        if (got >= (ssize_t)HEAD) {
            if ((m.op == L_CREATE || m.op == L_REMOVE || m.op == L_SEAL) && count == 1)
                start(node, &m, fds[0]);
            else if (m.op == L_CANCEL)
                for (int i = 0; i < MAX_JOBS; i++)
                    if (jobs[i].pid && jobs[i].id == m.id)
                        kill_job(i);
        }
        close_fds(fds, count);
    }
}
