/* Builds one cell: namespaces, id map, cgroups, and the order in which builder and cell do their parts.
 *
 *   builder (caller's privilege)                      cell (PID 1 of new namespaces)
 *   open the layers as detached mounts
 *   clone3 ------------------------------------------> waits
 *   write id maps
 *   "go" --------------------------------------------> staging tmpfs; "staged"; network
 *   put it into its cgroups, map the layers' ids meanwhile
 *   enter its mount namespace, move layers in; "moved" > cgroup namespace, overlay, /proc, /dev, pivot_root, drop everything
 *   node <- pidfd, control socket, doors <------------- "ready", then serves commands
 *
 * With SPEC_SINGLE_ID (rootless) one id is mapped and the cell moves the layers in itself.
 *
 * Covered: nothing of the host is visible inside after enter_tree(); the guest gets no capability (root of an owner cell:
 * OWNER_CAPS, in the cell's own user namespace); PID 1 ends when its socket's other end is closed.  Not covered: kernel bugs: the kernel is shared.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int fail_sock = -1;
static uint32_t fail_id;
static pid_t fail_cell;

void fail(int err, const char *format, ...) {
    struct message m = {.op = L_FAILED, .id = fail_id, .a = err};
    va_list list;
    va_start(list, format);
    vsnprintf(m.text, sizeof m.text, format, list);
    va_end(list);
    if (fail_cell > 0)
        kill(fail_cell, SIGKILL);
    send_message(fail_sock, &m, HEAD + strlen(m.text), NULL, 0);
    _exit(0);
}

static void parse(struct spec *s, int payload_fd) {
    struct payload p = read_payload(payload_fd);
    if (!p.at)
        fail(errno, "read the request");
    uint32_t *words[] = {&s->flags, &s->base, &s->range, &s->inner_uid, &s->inner_gid, &s->outer_uid, &s->outer_gid, &s->port, &s->nproc, &s->store, &s->quota_kib, &s->quota_inodes};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        *words[i] = take_u32(&p);
    s->hostname = take_str(&p);
    s->cgroups = take_list(&p, &s->n_cgroups, 32);
    s->n_layers = take_u32(&p);
    if (p.bad || s->n_layers < 1 || s->n_layers > 64)
        fail(EBADMSG, "read the request");
    s->layers = calloc(s->n_layers, sizeof *s->layers);
    uint32_t total = 0;
    for (uint32_t i = 0; s->layers && i < s->n_layers; i++) {
        struct layer *l = &s->layers[i];
        l->at = take_str(&p);
        l->writable = take_u32(&p);
        l->upper_dir = take_str(&p);
        l->sealed = take_u32(&p);
        l->swaps = take_u32(&p);
        uint32_t *ids[] = {&l->uid.disk, &l->uid.guest, &l->gid.disk, &l->gid.guest};
        for (size_t j = 0; l->swaps && j < sizeof ids / sizeof *ids; j++)
            *ids[j] = take_u32(&p);
        l->lowers = take_list(&p, &l->count, 500);
        total += l->count + 1;
        if (l->count < 1 || l->sealed > l->count || l->at[0] != '/')
            p.bad = true;
    }
    if (s->flags & SPEC_RUNTIME) {
        s->runtime = take_list(&p, &s->n_runtime, 64);
        s->bundle = take_str(&p);
        s->session = take_str(&p);
        if (!s->n_runtime)
            p.bad = true;
    }
    if (!s->layers || p.bad || total > 512 || strcmp(s->layers[0].at, "/") != 0)
        fail(EBADMSG, "read the request (at most 448 layers; the first must be at /)");
}

static void map_ids(const struct spec *s, pid_t pid) {
    char path[64], text[64];
    bool single = s->flags & SPEC_SINGLE_ID;
    if (single) {
        snprintf(path, sizeof path, "/proc/%d/setgroups", pid);
        if (write_file(path, "deny") < 0)
            fail(errno, "deny setgroups in the user namespace");
    }
    snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
    if (single)
        snprintf(text, sizeof text, "%u %u 1\n", s->inner_gid, s->outer_gid);
    else
        snprintf(text, sizeof text, "0 %u %u\n", s->base, s->range);
    if (write_file(path, text) < 0)
        fail(errno, "map group ids into the user namespace");
    snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
    if (single)
        snprintf(text, sizeof text, "%u %u 1\n", s->inner_uid, s->outer_uid);
    if (write_file(path, text) < 0)
        fail(errno, "map user ids into the user namespace");
}

/* A user namespace with these maps, for mounts that are seen through it. The kernel takes ids from namespaces only, so a
 * child makes one, and is gone when it has been opened. */
static int make_userns(const char *gid_map, const char *uid_map, const char *what) {
    int pidfd = -1;
    struct clone_args args = {.flags = CLONE_NEWUSER | CLONE_PIDFD, .exit_signal = SIGCHLD, .pidfd = (uint64_t)(uintptr_t)&pidfd};
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    char path[64];
    int fd = -1;
    for (int i = 0; pid > 0 && i < 2; i++) {
        snprintf(path, sizeof path, "/proc/%d/%cid_map", pid, "gu"[i]);
        if (write_file(path, i ? uid_map : gid_map) < 0) {
            int err = errno;
            kill(pid, SIGKILL);
            fail(err, "map the ids of %s", what);
        }
    }
    snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
    if (pid < 0 || (fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
        fail(errno, "make a user namespace for %s", what);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(pidfd);
    return fd;
}

/* In which the store's ids are the cell's: sealed layers are seen through it. -1 when none is needed. */
static int map_store(const struct spec *s) {
    bool needed = false;
    for (uint32_t i = 0; i < s->n_layers; i++)
        needed = needed || s->layers[i].sealed;
    if (!needed)
        return -1;
    char text[64];
    snprintf(text, sizeof text, "%u %u %u\n", s->store, s->base, s->range);
    return make_userns(text, text, "sealed layers");
}

/* The map of a cell with two ids swapped. Beyond the cell's range there is nothing to swap with: only `disk` is seen. */
static void write_swapped(const struct spec *s, const struct swap *w, char *text, size_t room) {
    uint32_t first = w->disk < w->guest ? w->disk : w->guest, last = w->disk < w->guest ? w->guest : w->disk;
    uint32_t cuts[] = {0, first, last, s->range};
    size_t n = (size_t)snprintf(text, room, "%u %u 1\n", w->disk, s->base + w->guest);
    if (w->disk < s->range && first != last)
        n += (size_t)snprintf(text + n, room - n, "%u %u 1\n", w->guest, s->base + w->disk);
    for (int i = 0; i < 3; i++) {
        uint32_t from = cuts[i] + (i > 0 && cuts[i] < s->range), to = cuts[i + 1] < s->range ? cuts[i + 1] : s->range;
        if (from < to)
            n += (size_t)snprintf(text + n, room - n, "%u %u %u\n", from, s->base + from, to - from);
    }
}

int map_swapped(const struct spec *s, const struct layer *l) {
    char uids[256], gids[256];
    if (l->uid.guest >= s->range || l->gid.guest >= s->range)
        fail(EINVAL, "give the layer %s to a user that no cell has", l->lowers[0]);
    write_swapped(s, &l->uid, uids, sizeof uids);
    write_swapped(s, &l->gid, gids, sizeof gids);
    return make_userns(gids, uids, l->lowers[0]);
}

static void enter_cgroups(const struct spec *s, pid_t pid) {
    char text[64];
    snprintf(text, sizeof text, "%d\n", pid);
    for (uint32_t i = 0; i < s->n_cgroups; i++)
        if (write_file(s->cgroups[i], text) < 0)
            fail(errno, "put the cell into its cgroup %s", s->cgroups[i]);
}

/* Wait for one byte of the other side; a message longer than that is its failure, which is passed on. */
static void expect(int sync, char wanted, int *fds, int *count, uint32_t *mask) {
    struct message m;
    int none = 0;
    ssize_t got = recv_message(sync, &m, sizeof m, fds, count ? count : &none);
    if (got == 1 && *(char *)&m == wanted)
        return;
    if (got == 8 && mask && ((uint32_t *)&m)[0] == (uint32_t)wanted) {
        *mask = ((uint32_t *)&m)[1];
        return;
    }
    if (got >= (ssize_t)HEAD && m.op == L_FAILED) {
        size_t room = (size_t)got - HEAD;
        fail(m.a, "%.*s", (int)(room < MAX_TEXT ? room : MAX_TEXT), m.text);
    }
    fail(got < 0 ? errno : ECHILD, "hear from the cell while it was built (was it killed for memory?)");
}

static void say(int sync, char byte) {
    if (send_message(sync, &byte, 1, NULL, 0) < 0)
        fail(errno, "talk to the cell while it was built");
}

static void set_limit(int which, rlim_t value) {
    struct rlimit limit;
    if (getrlimit(which, &limit) == 0) {
        if (limit.rlim_max == RLIM_INFINITY || limit.rlim_max > value)
            limit.rlim_max = value;
        limit.rlim_cur = limit.rlim_max;
        setrlimit(which, &limit);
    }
}

static void set_caps(uint32_t effective, uint32_t permitted, uint32_t inheritable) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{effective, permitted, inheritable}, {0, 0, 0}};
    if (syscall(SYS_capset, &head, data) < 0)
        fail(errno, "drop capabilities");
}

static void allow_inheriting(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &head, data) < 0)
        fail(errno, "read capabilities");
    data[0].inheritable = OWNER_CAPS;
    data[1].inheritable = 0;
    if (syscall(SYS_capset, &head, data) < 0)
        fail(errno, "keep the capabilities of the cell's root");
}

/* After this the process can do nothing but start commands as guest users and signal them.
 * Returns the Landlock ABI in force, 0 where there is none. */
static int drop_everything(const struct spec *s) {
    bool single = s->flags & SPEC_SINGLE_ID, owner = s->flags & SPEC_OWNER;
    /* Opened while we may: the image's root need not be open to the user that PID 1 becomes. */
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), dev = open("/dev", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0 || dev < 0)
        fail(errno, "open /dev of the cell");
    /* A core limit of exactly 1 makes the kernel skip the host's core handler as well (core(5), coredump.c). */
    set_limit(RLIMIT_CORE, 1);
    set_limit(RLIMIT_NOFILE, 65536);
    if (s->nproc)
        set_limit(RLIMIT_NPROC, s->nproc);
    /* The bounding set is empty in every cell: no file gives a capability. What root of an owner cell keeps comes by way of
     * the inheritable and ambient sets; the former can be filled only while the bounding set still is. */
    if (owner)
        allow_inheriting();
    for (int cap = 0; cap < 64; cap++)
        if (prctl(PR_CAPBSET_DROP, cap) < 0 && errno != EINVAL)
            fail(errno, "empty the capability bounding set");
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    unsigned long no_ambient = owner ? 0 : SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
    if (prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | no_ambient) < 0)
        fail(errno, "lock the secure bits");
    if (!single && (setgroups(0, NULL) < 0 || setresgid(WARDEN_UID, WARDEN_UID, WARDEN_UID) < 0 || setresuid(WARDEN_UID, WARDEN_UID, WARDEN_UID) < 0))
        fail(errno, "become the cell's warden");
    /* The owner's capabilities are not effective here: PID 1 itself touches files as a user without rights. */
    uint32_t own = single ? 1u << CAP_KILL : 1u << CAP_KILL | 1u << CAP_SETUID | 1u << CAP_SETGID;
    set_caps(own, owner ? own | OWNER_CAPS : own, owner ? OWNER_CAPS : 0);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0)
        fail(errno, "set no_new_privs");
    umask(022);
    int landlock = install_landlock(root, dev);
    if (landlock < 0)
        fail(errno, "restrict the cell by Landlock");
    if (install_walls(owner) < 0)
        fail(errno, "install the seccomp filter");
    /* Set last: changing user clears it. The parent is the launcher. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return landlock;
}

static void run_cell(const struct spec *s, int sync, int control) {
    fail_sock = sync;
    bool single = s->flags & SPEC_SINGLE_ID;
    expect(sync, 'g', NULL, NULL, NULL);
    if (!single && (setgroups(0, NULL) < 0 || setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0))
        fail(errno, "become root of the new user namespace");
    /* The node's session keyring must not be the guest's. */
    syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);
    write_file("/proc/self/oom_score_adj", "300");
    struct trees trees = {.count = 0};
    if (single)
        open_trees(s, &trees); /* before staging covers what may hold them */
    stage_make(s);
    struct doors doors = {0};
    if (single) {
        stage_move(s, &trees);
        open_network(s, &doors);
    } else {
        say(sync, 's');
        open_network(s, &doors); /* while the builder puts us into our cgroups and moves the layers in */
        expect(sync, 'm', NULL, NULL, NULL);
    }
    if (unshare(CLONE_NEWCGROUP) < 0)
        fail(errno, "make a cgroup namespace");
    if (s->flags & SPEC_RUNTIME) {
        set_limit(RLIMIT_CORE, 1);
        set_limit(RLIMIT_NOFILE, 65536);
        run_runtime(s, sync, control, &doors);
    }
    build_tree(s);
    if (sethostname(s->hostname, strlen(s->hostname)) < 0 || setdomainname("", 0) < 0)
        fail(errno, "set the host name");
    enter_tree();
    prctl(PR_SET_NAME, "cell-init");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        fail(errno, "open /dev/null in the cell");
    close(null);
    int landlock = drop_everything(s);
    uint32_t ready[2] = {'r', doors.mask | (uint32_t)landlock << LANDLOCK_SHIFT};
    if (send_message(sync, ready, sizeof ready, doors.fds, doors.count) < 0)
        fail(errno, "hand out the doors");
    close_fds(doors.fds, doors.count);
    close(sync);
    serve_cell(control, (struct guard){single, s->flags & SPEC_OWNER, s->inner_uid, s->inner_gid, false});
}

void build_cell(int node, uint32_t id, int payload_fd, volatile pid_t *cell) {
    struct spec s = {0};
    fail_sock = node;
    fail_id = id;
    parse(&s, payload_fd);
    bool single = s.flags & SPEC_SINGLE_ID;
    struct trees trees = {.count = 0};
    if (!single)
        open_trees(&s, &trees);
    int sync[2], control[2], pidfd = -1, on = 1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sync) < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) < 0)
        fail(errno, "make sockets");
    /* So that each message says, by the kernel's word, which host pid sent it. */
    if (setsockopt(control[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) < 0)
        fail(errno, "make sockets");
    struct clone_args args = {
        .flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_PARENT | CLONE_PIDFD,
        .pidfd = (uint64_t)(uintptr_t)&pidfd,
    };
    pid_t pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        fail(errno, "make namespaces (user, mount, pid, net, uts, ipc)");
    if (pid == 0) {
        int s_fd = fcntl(sync[1], F_DUPFD_CLOEXEC, 300), c_fd = fcntl(control[1], F_DUPFD_CLOEXEC, 300);
        if (s_fd < 0 || c_fd < 0 || dup3(s_fd, 3, O_CLOEXEC) < 0 || dup3(c_fd, 4, O_CLOEXEC) < 0 || close_range(5, ~0u, 0) < 0)
            _exit(1);
        run_cell(&s, 3, 4);
    }
    *cell = pid;
    fail_cell = pid;
    close(sync[1]);
    close(control[1]);
    map_ids(&s, pid);
    char text[64];
    if (single)
        enter_cgroups(&s, pid);
    say(sync[0], 'g');
    if (!single) {
        enter_cgroups(&s, pid); /* while the cell stages: the first move may wait for the kernel */
        snprintf(text, sizeof text, "/proc/%d/ns/user", pid); /* while the cell stages */
        int userns = open(text, O_RDONLY | O_CLOEXEC);
        if (userns < 0)
            fail(errno, "open the cell's user namespace");
        map_trees(&s, &trees, userns, map_store(&s));
        snprintf(text, sizeof text, "/proc/%d/ns/mnt", pid);
        int mntns = open(text, O_RDONLY | O_CLOEXEC);
        expect(sync[0], 's', NULL, NULL, NULL);
        if (mntns < 0 || setns(mntns, CLONE_NEWNS) < 0)
            fail(errno, "enter the cell's mount namespace");
        stage_move(&s, &trees);
        say(sync[0], 'm');
    }
    int fds[10] = {pidfd, control[0]}, count = 8;
    uint32_t mask = 0;
    expect(sync[0], 'r', fds + 2, &count, &mask);
    struct message m = {.op = L_READY, .id = id, .a = pid, .b = (int32_t)mask};
    if (send_message(node, &m, HEAD, fds, count + 2) < 0)
        fail(errno, "hand out the cell");
    _exit(0);
}
