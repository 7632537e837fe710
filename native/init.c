/* PID 1 of a cell: fork server and reaper, and nothing else.
 *
 * It serves one SEQPACKET socket. When the other end closes (the node ended the cell, or died), it exits, and the
 * kernel kills every process of the pid namespace. It runs as a user that no guest can be, is not dumpable, and
 * holds CAP_SETUID, CAP_SETGID and CAP_KILL of the cell's own user namespace only (and, not effective, what root of an
 * owner cell keeps: OWNER_CAPS).
 *
 * It keeps one child waiting where the node asks for one (I_PREPARE): forked into the next step's cgroup, with all done that
 * does not depend on the command, so that starting a command is one message from the node to that child and an execve.
 * Until then it has the rights of PID 1 and none of a guest, holds nothing but its own pipes, and runs no guest's code.
 *
 * A keeper (where cgroups cannot be had) is a fork that serves a socket in the same way and is a child subreaper, so
 * that whatever its commands leave running stays below it: lineage as a kernel fact.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct child {
    pid_t pid;
    uint32_t id;
    int status; /* pipe that closes at execve, or says why there was none; -1 once it did */
    bool failed, keeper;
};

static struct child *children;
static size_t n_children, room;
static struct pollfd *polls;
static struct message due; /* I_PREPARE that waits for the end of a child; its leaf, -1: none */
static int due_leaf = -1;

static void emit(int control, uint32_t op, uint32_t id, int32_t a, int32_t b, const int *fds, int count) {
    struct message m = {.op = op, .id = id, .a = a, .b = b};
    if (send_message(control, &m, HEAD, fds, count) < 0)
        _exit(0); /* the node is gone, so is the cell */
}

static struct child *add_child(void) {
    if (n_children == room) {
        size_t more = room ? room * 2 : 32;
        struct child *bigger = realloc(children, more * sizeof *children);
        struct pollfd *wider = realloc(polls, (more + 2) * sizeof *polls);
        if (bigger)
            children = bigger;
        if (wider)
            polls = wider;
        if (!bigger || !wider)
            return NULL;
        room = more;
    }
    children[n_children] = (struct child){.status = -1};
    return &children[n_children++];
}

/* A runtime's kernel may not have clone3; without flags fork() is the same. */
static pid_t fork_with(struct clone_args *args) {
    pid_t pid = (pid_t)syscall(SYS_clone3, args, sizeof *args);
    return pid < 0 && errno == ENOSYS && !args->flags ? fork() : pid;
}

static void start(int control, struct guard guard, const struct message *m, const int *fds, int count) {
    int status[2], leaf = -1, next = 1;
    struct child *child = add_child();
    if (!child || count < 1 || pipe2(status, O_CLOEXEC) < 0) {
        if (child)
            n_children--;
        emit(control, E_FAILED, m->id, STAGE_CLONE, count < 1 ? EBADMSG : errno, NULL, 0);
        return;
    }
    bool spawn = m->op == I_SPAWN, wants_leaf = m->op == I_PREPARE || (spawn && (m->a & SPAWN_LEAF));
    if (m->op == I_PREPARE)
        leaf = fds[0];
    else if (wants_leaf && count > 1)
        leaf = fds[next++];
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (leaf >= 0) {
        args.flags = CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)leaf;
    }
    pid_t pid = (wants_leaf && leaf < 0) ? (errno = EBADMSG, -1) : fork_with(&args);
    if (pid == 0)
        run_command(&(struct command){m->op, m->id, (uint32_t)m->a, (uint32_t)m->b, fds[0], control, status[1], m->text, guard, fds + 1, count - 1});
    int err = errno;
    close(status[1]);
    if (pid < 0) {
        close(status[0]);
        n_children--;
        emit(control, E_FAILED, m->id, STAGE_CLONE, err, NULL, 0);
        return;
    }
    *child = (struct child){pid, m->id, status[0], false, false};
}

static void prepare_due(int control, struct guard guard) {
    if (due_leaf < 0)
        return;
    start(control, guard, &due, &due_leaf, 1);
    close(due_leaf);
    due_leaf = -1;
}

/* Keep a child waiting for a command of the next step. With `a` only when a child ends, if there is one: until then there is
 * other work. Without a leaf: now, if it is still due. */
static void prepare(int control, struct guard guard, const struct message *m, int *fds, int count) {
    if (!count && !m->a) {
        if (due.id == m->id)
            prepare_due(control, guard);
        return;
    }
    if (due_leaf >= 0)
        close(due_leaf);
    due_leaf = -1;
    if (count != 1 || guard.given || guard.single_id) {
        emit(control, E_FAILED, m->id, STAGE_CLONE, EBADMSG, NULL, 0);
    } else if (m->a && n_children) {
        due = *m;
        due_leaf = fds[0];
        fds[0] = -1; /* ours now */
    } else {
        start(control, guard, m, fds, count);
    }
}

static void start_keeper(int control, struct guard guard, const struct message *m) {
    int pair[2], on = 1;
    struct child *child = add_child();
    if (!child || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        if (child)
            n_children--;
        emit(control, E_FAILED, m->id, STAGE_CLONE, errno, NULL, 0);
        return;
    }
    setsockopt(pair[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on);
    struct clone_args args = {.exit_signal = SIGCHLD};
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        int mine = fcntl(pair[1], F_DUPFD_CLOEXEC, 400);
        if (mine < 0 || dup3(mine, 3, O_CLOEXEC) < 0 || close_range(4, ~0u, 0) < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
            _exit(1);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_NAME, "cell-keeper");
        n_children = 0;
        emit(3, E_HELLO, m->id, 0, 0, NULL, 0);
        serve_cell(3, guard);
    }
    int err = errno;
    close(pair[1]);
    if (pid < 0) {
        n_children--;
        emit(control, E_FAILED, m->id, STAGE_CLONE, err, NULL, 0);
    } else {
        *child = (struct child){pid, m->id, -1, false, true};
        emit(control, E_KEEPER, m->id, 0, 0, pair, 1);
    }
    close(pair[0]);
}

/* The status pipe of a child has closed, or says which stage failed and how. */
static void settle(int control, struct child *child) {
    int32_t why[2];
    ssize_t got;
    do
        got = read(child->status, why, sizeof why);
    while (got < 0 && errno == EINTR);
    close(child->status);
    child->status = -1;
    child->failed = got == sizeof why;
    if (child->failed)
        emit(control, E_FAILED, child->id, why[0], why[1], NULL, 0);
    else
        emit(control, E_STARTED, child->id, child->pid, 0, NULL, 0);
}

/* Our own code does not stop itself: a guest of the same user did it, to keep whoever waits for an answer waiting.
 * A command that has been executed may be stopped as it likes. */
static void stopped(int control, struct child *child) {
    if (child->keeper)
        _exit(1);
    struct pollfd executed = {.fd = child->status, .events = POLLIN};
    if (child->status >= 0 && poll(&executed, 1, 0) == 1)
        settle(control, child);
    if (child->status >= 0)
        kill(child->pid, SIGKILL);
}

static void reap(int control, struct guard guard) {
    int status;
    bool ended = false;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0)
        for (size_t i = 0; i < n_children; i++) {
            if (children[i].pid != pid)
                continue;
            if (WIFSTOPPED(status)) {
                stopped(control, &children[i]);
                break;
            }
            /* A keeper that did not end by itself was killed by its guest to shake off its lineage. */
            if (children[i].keeper && !(WIFEXITED(status) && WEXITSTATUS(status) == 0))
                _exit(1);
            if (children[i].status >= 0)
                settle(control, &children[i]);
            if (!children[i].failed && !children[i].keeper)
                emit(control, E_EXITED, children[i].id, status, 0, NULL, 0);
            children[i] = children[--n_children];
            ended = true;
            break;
        }
    if (ended)
        prepare_due(control, guard);
}

static void signal_child(const struct message *m) {
    for (size_t i = 0; i < n_children; i++)
        if (children[i].id == m->id && !children[i].keeper && m->a > 0 && m->a < 65) {
            if (kill(-children[i].pid, m->a) < 0)
                kill(children[i].pid, m->a); /* before its setsid() */
        }
}

/* What the node charges to a step, where it can kill by process id only (guest.c). Never us. */
static void kill_listed(const struct message *m, int payload_fd) {
    struct payload p = read_payload(payload_fd);
    uint32_t count = p.at ? take_u32(&p) : 0;
    for (uint32_t i = 0; i < count && !p.bad; i++) {
        pid_t pid = (pid_t)take_u32(&p);
        if (!p.bad && pid > 1 && m->a > 0 && m->a < 65)
            kill(pid, m->a);
    }
    if (p.at)
        munmap(p.base, p.size);
}

void serve_cell(int control, struct guard guard) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_SETMASK, &set, NULL);
    for (int s = 1; s < 65; s++)
        if (s != SIGKILL && s != SIGSTOP)
            signal(s, SIG_DFL);
    int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0 || !(polls = realloc(polls, (room + 2) * sizeof *polls)))
        _exit(1);
    for (;;) {
        polls[0] = (struct pollfd){.fd = control, .events = POLLIN};
        polls[1] = (struct pollfd){.fd = signals, .events = POLLIN};
        for (size_t i = 0; i < n_children; i++)
            polls[i + 2] = (struct pollfd){.fd = children[i].status, .events = POLLIN}; /* -1 is skipped */
        if (poll(polls, n_children + 2, -1) < 0)
            continue;
        short control_events = polls[0].revents, signal_events = polls[1].revents;
        for (size_t i = 0; i < n_children; i++)
            if (polls[i + 2].revents)
                settle(control, &children[i]);
        if (signal_events) {
            struct signalfd_siginfo info[8];
            while (read(signals, info, sizeof info) > 0)
                ;
            reap(control, guard);
        }
        if (!control_events)
            continue;
        struct message m;
        int fds[MAX_FDS], count = MAX_FDS;
        memset(m.text, 0, sizeof m.text);
        ssize_t got = recv_message(control, &m, sizeof m, fds, &count);
        if (got <= 0)
            _exit(0);
        m.text[sizeof m.text - 1] = 0;
        if (got >= (ssize_t)HEAD) {
            if (m.op == I_SPAWN || m.op == I_READ || m.op == I_WRITE || m.op == I_CHECK)
                start(control, guard, &m, fds, count);
            else if (m.op == I_PREPARE)
                prepare(control, guard, &m, fds, count);
            else if (m.op == I_SIGNAL)
                signal_child(&m);
            else if (m.op == I_KILL && guard.given && count == 1)
                kill_listed(&m, fds[0]);
            else if (m.op == I_KEEPER)
                start_keeper(control, guard, &m);
        }
        close_fds(fds, count);
    }
}
