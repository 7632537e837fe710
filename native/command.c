/* A child of PID 1 on its way to become a guest's command (at once, or waiting for it), or to read or write one file as a guest user.
 *
 * Everything is resolved inside the cell's own tree, after becoming the user, so a symlink leads only where that user
 * could go by itself. Until execve it is not dumpable: other processes of that user cannot look into it.
 * No helper program (su, env, sh) of the image is ever run on the way.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int status_fd;

static void give_up(int32_t stage, int32_t err) {
    int32_t why[2] = {stage, err};
    ssize_t put = write(status_fd, why, sizeof why);
    _exit(put == sizeof why ? 0 : 1);
}

static void become(const struct command *c, const char *wanted, struct user *user) {
    int err = find_user(wanted, user);
    if (err)
        give_up(STAGE_USER, -err);
    /* A runtime's kernel knows no SECBIT_NOROOT: an exec as root would gain what is in the bounding set. */
    if (c->guard.given)
        for (int cap = 0; cap < 64; cap++)
            if (prctl(PR_CAPBSET_DROP, cap) < 0 && errno != EINVAL)
                give_up(STAGE_SETUP, errno);
    if (c->guard.single_id) {
        if (user->uid != c->guard.uid)
            give_up(STAGE_USER, EPERM);
    } else {
        if (setgroups((size_t)user->n_groups, user->groups) < 0 || setresgid(user->gid, user->gid, user->gid) < 0 || setresuid(user->uid, user->uid, user->uid) < 0)
            give_up(STAGE_USER, errno);
    }
    /* Root of an owner cell keeps the few that make it the owner of the cell's files; everybody else has none. */
    uint32_t kept = c->guard.owner && user->uid == 0 ? OWNER_CAPS : 0;
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct caps[2] = {{kept, kept, kept}, {0, 0, 0}};
    /* Changing user sets "dumpable" to the system's default; nobody may look in before execve. In this order: while
     * it has capabilities, a guest cannot trace it either. */
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || syscall(SYS_capset, &head, caps) < 0)
        give_up(STAGE_SETUP, errno);
    /* Ambient, so that they outlive execve though the bounding set is empty and root is nothing by itself (SECBIT_NOROOT). */
    for (unsigned long cap = 0; kept >> cap; cap++)
        if (kept >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
            give_up(STAGE_SETUP, errno);
}

/* --- commands --- */

static void hello(const struct command *c, const int *fds, int count) {
    struct message m = {.op = E_HELLO, .id = c->id, .a = getpid()};
    if (send_message(c->control, &m, HEAD, fds, count) < 0)
        give_up(STAGE_SETUP, errno);
    close_fds(fds, count);
}

static void make_pipe(bool to_guest, int *ours, int *theirs) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        give_up(STAGE_SETUP, errno);
    *ours = raise_fd(ends[to_guest ? 1 : 0]);
    *theirs = raise_fd(ends[to_guest ? 0 : 1]);
    if (*ours < 0 || *theirs < 0 || fcntl(*ours, F_SETFL, O_NONBLOCK | (to_guest ? O_WRONLY : O_RDONLY)) < 0)
        give_up(STAGE_SETUP, errno);
}

/* close_range() to the end; some kernels take no number that is negative as an int. */
static int close_above(unsigned first) {
    return close_range(first, ~0u, 0) < 0 ? close_range(first, INT_MAX, 0) : 0;
}

static void take_streams(const struct command *c, uint32_t rows, uint32_t columns);
static void use_streams(const int *theirs, int n, int go);

static void connect_streams(const struct command *c, uint32_t rows, uint32_t columns) {
    int ours[MAX_FDS], theirs[MAX_FDS], n = 0, mine = 0;
    if (c->guard.given) {
        take_streams(c, rows, columns);
        return;
    }
    if (c->flags & SPAWN_PTY) {
        struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
        int unlock = 0, master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK), slave = -1;
        if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0 || (slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0 ||
            ioctl(master, TIOCSWINSZ, &size) < 0 || ioctl(slave, TIOCSCTTY, 0) < 0)
            give_up(STAGE_SETUP, errno);
        ours[mine++] = raise_fd(master);
        slave = raise_fd(slave);
        theirs[n++] = slave, theirs[n++] = slave, theirs[n++] = slave;
    } else {
        for (; n < 3; n++)
            make_pipe(n == 0, &ours[mine++], &theirs[n]);
    }
    for (uint32_t i = 0; i < c->extra; i++)
        make_pipe(i % 2 == 0, &ours[mine++], &theirs[n++]);
    hello(c, ours, mine);
    use_streams(theirs, n, -1);
}

/* Descriptors 0 to n-1 of the command, and nothing else; with a socket to wait at, that one above the status pipe. */
static void use_streams(const int *theirs, int n, int go) {
    for (int i = 0; i < n; i++)
        if (dup2(theirs[i], i) < 0)
            give_up(STAGE_SETUP, errno);
    /* The status pipe moves just above them and vanishes at execve; everything higher is closed now. */
    if (dup3(status_fd, n, O_CLOEXEC) < 0)
        give_up(STAGE_SETUP, errno);
    status_fd = n;
    if (go >= 0 && dup3(go, ++n, O_CLOEXEC) < 0)
        give_up(STAGE_SETUP, errno);
    if (close_above((unsigned)n + 1) < 0)
        give_up(STAGE_SETUP, errno);
}

/* As connect_streams(), with pipes that the node has made: the runtime's kernel cannot hand ours out. */
static void take_streams(const struct command *c, uint32_t rows, uint32_t columns) {
    int theirs[MAX_FDS];
    if (c->flags & SPAWN_PTY) {
        if (c->n_given < 2 || (theirs[0] = open_relayed_terminal(c->given[0], c->given[1], rows, columns)) < 0)
            give_up(STAGE_SETUP, c->n_given < 2 ? EBADMSG : errno);
        theirs[1] = theirs[2] = theirs[0];
    } else {
        for (int i = 0; i < 3; i++)
            theirs[i] = i < c->n_given ? c->given[i] : -1;
    }
    int skip = c->flags & SPAWN_PTY ? 2 : 3;
    if (c->n_given != skip + (int)c->extra)
        give_up(STAGE_SETUP, EBADMSG);
    for (uint32_t i = 0; i < c->extra; i++)
        theirs[3 + i] = c->given[skip + (int)i];
    hello(c, NULL, 0);
    use_streams(theirs, 3 + (int)c->extra, -1);
}

static const char *lookup(const char **env, const char *key) {
    size_t size = strlen(key);
    for (; *env; env++)
        if (!strncmp(*env, key, size) && (*env)[size] == '=')
            return *env + size + 1;
    return NULL;
}

static void add_env(const char **env, uint32_t *count, const char *key, const char *value) {
    if (lookup(env, key) || !*value)
        return;
    char *text = malloc(strlen(key) + strlen(value) + 2);
    if (!text)
        give_up(STAGE_SETUP, ENOMEM);
    strcpy(text, key);
    strcat(text, "=");
    strcat(text, value);
    env[(*count)++] = text;
    env[*count] = NULL;
}

static void execute(const char **argv, const char **env) {
    if (strchr(argv[0], '/')) {
        execve(argv[0], (char *const *)argv, (char *const *)env);
        give_up(STAGE_EXEC, errno);
    }
    const char *path = lookup(env, "PATH");
    if (!path)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    int err = ENOENT;
    char full[PATH_MAX];
    size_t name = strlen(argv[0]);
    if (!name || name > NAME_MAX)
        give_up(STAGE_EXEC, name ? ENAMETOOLONG : ENOENT);
    for (const char *at = path, *stop; at; at = *stop ? stop + 1 : NULL) {
        stop = strchrnul(at, ':');
        size_t size = (size_t)(stop - at);
        if (size + name + 2 > sizeof full)
            continue;
        memcpy(full, at, size);
        if (size) /* an empty element is the current directory */
            full[size++] = '/';
        memcpy(full + size, argv[0], name + 1);
        execve(full, (char *const *)argv, (char *const *)env);
        if (errno == EACCES)
            err = EACCES; /* another directory may still have one that may be executed */
        else if (errno != ENOENT && errno != ENOTDIR)
            give_up(STAGE_EXEC, errno);
    }
    give_up(STAGE_EXEC, err);
}

/* Half of what PID 1 has. A user may have no more descriptors in flight between sockets than the sender's limit: where
 * guest and node are one user of the host (rootless), a guest with the node's limit could stop the node from passing any. */
static void limit_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        give_up(STAGE_SETUP, errno);
    limit.rlim_cur = limit.rlim_max = limit.rlim_max / 2;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        give_up(STAGE_SETUP, errno);
}

/* What is the same for every command. */
static void raise_fork_wall(void) {
    limit_descriptors();
    if (install_fork_wall() < 0)
        give_up(STAGE_SETUP, errno);
}

/* `waiting`: the user whom this child has made its pipes for, and has all but the command's own properties. */
static void spawn(const struct command *c, struct payload *p, const struct user *waiting) {
    const char *wanted = take_str(p), *cwd = take_str(p);
    uint32_t rows = take_u32(p), columns = take_u32(p), argc, envc;
    const char **argv = take_list(p, &argc, 1 << 20), **given = take_list(p, &envc, 1 << 16);
    const char **env = calloc(envc + 5, sizeof *env);
    if (p->bad || !argc || !env || c->extra > 32)
        give_up(STAGE_SETUP, p->bad ? EBADMSG : EINVAL);
    memcpy(env, given, envc * sizeof *env);
    struct user user;
    become(c, wanted, &user);
    if (waiting && (user.uid != waiting->uid || user.gid != waiting->gid))
        give_up(STAGE_STALE, EAGAIN); /* /etc/passwd says otherwise by now; nothing has run */
    if (!waiting) {
        if (setsid() < 0)
            give_up(STAGE_SETUP, errno);
        connect_streams(c, rows, columns);
    }
    add_env(env, &envc, "HOME", user.home);
    add_env(env, &envc, "USER", user.name);
    add_env(env, &envc, "LOGNAME", user.name);
    if (chdir(cwd) < 0)
        give_up(STAGE_CWD, errno);
    if (!waiting)
        raise_fork_wall();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execute(argv, env);
}

/* Do all that does not depend on the command, hand out the pipes, and wait for the word (or for the end of who would say it).
 * The pipes belong to the user that the command will be (programs open /dev/stdout), so this child has that one's id for files,
 * and for nothing else: no guest can signal or trace it. */
static void await_command(const struct command *c) {
    static char word[MAX_WORD];
    struct user user;
    int ours[4], theirs[3], pair[2], err = find_user(c->user, &user);
    if (err)
        give_up(STAGE_USER, -err);
    if (setsid() < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        give_up(STAGE_SETUP, errno);
    ours[0] = raise_fd(pair[0]);
    int go = raise_fd(pair[1]);
    if (ours[0] < 0 || go < 0 || fcntl(ours[0], F_SETFL, O_NONBLOCK) < 0)
        give_up(STAGE_SETUP, errno);
    setfsgid(user.gid), setfsuid(user.uid);
    if (prctl(PR_SET_DUMPABLE, 0) < 0) /* as in become() */
        give_up(STAGE_SETUP, errno);
    for (int i = 0; i < 3; i++)
        make_pipe(i == 0, &ours[i + 1], &theirs[i]);
    hello(c, ours, 4);
    use_streams(theirs, 3, go);
    raise_fork_wall();
    ssize_t got;
    do
        got = recv(4, word, sizeof word, 0);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        _exit(0); /* not needed */
    struct payload p = {.at = word, .end = word + got, .base = word, .size = (size_t)got};
    spawn(c, &p, &user);
}

/* --- files --- */

static void move_bytes(int from, int to, uint64_t most) {
    static char block[1 << 16];
    for (;;) {
        ssize_t got = read(from, block, sizeof block);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            give_up(STAGE_FILE, errno);
        if (got == 0)
            return;
        if ((uint64_t)got > most)
            give_up(STAGE_FILE, EFBIG);
        most -= (uint64_t)got;
        for (ssize_t done = 0; done < got;) {
            ssize_t put = write(to, block + done, (size_t)(got - done));
            if (put < 0 && errno == EINTR)
                continue;
            if (put < 0)
                give_up(STAGE_FILE, errno);
            done += put;
        }
    }
}

static int open_regular(const char *path, int flags, mode_t mode) {
    /* O_NONBLOCK: a FIFO must not hang us. Looking before and after opening is needed for neither. */
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, mode);
    struct stat st;
    if (fd < 0)
        give_up(STAGE_FILE, errno == ENXIO ? EINVAL : errno);
    if (fstat(fd, &st) < 0)
        give_up(STAGE_FILE, errno);
    if (S_ISDIR(st.st_mode))
        give_up(STAGE_FILE, EISDIR);
    if (!S_ISREG(st.st_mode))
        give_up(STAGE_FILE, EINVAL);
    return fd;
}

static void read_one(const struct command *c, struct payload *p) {
    const char *wanted = take_str(p), *path = take_str(p);
    uint64_t most = take_u32(p);
    most |= (uint64_t)take_u32(p) << 32;
    if (p->bad)
        give_up(STAGE_SETUP, EBADMSG);
    struct user user;
    become(c, wanted, &user);
    int ours, theirs;
    int fd = open_regular(path, O_RDONLY, 0);
    if (c->guard.given) {
        if (c->n_given != 1)
            give_up(STAGE_SETUP, EBADMSG);
        ours = -1, theirs = c->given[0];
    } else {
        make_pipe(false, &ours, &theirs);
    }
    fcntl(theirs, F_SETPIPE_SZ, 1 << 20); /* fewer wake-ups; no matter when refused */
    hello(c, &ours, c->guard.given ? 0 : 1);
    signal(SIGPIPE, SIG_DFL);
    move_bytes(fd, theirs, most);
    _exit(0);
}

static void make_parents(char *path) {
    for (char *at = path + 1; *at; at++) {
        if (*at != '/')
            continue;
        *at = 0;
        if (mkdir(path, 0755) < 0 && errno != EEXIST && errno != EROFS && errno != EACCES)
            give_up(STAGE_FILE, errno);
        *at = '/';
    }
}

static void write_one(const struct command *c, struct payload *p) {
    const char *wanted = take_str(p), *path = take_str(p);
    uint32_t mode = take_u32(p);
    if (p->bad)
        give_up(STAGE_SETUP, EBADMSG);
    struct user user;
    become(c, wanted, &user);
    make_parents((char *)path);
    hello(c, NULL, 0);
    int fd = open_regular(path, O_WRONLY | O_CREAT | O_TRUNC, mode & 0777);
    while (p->at < p->end) {
        ssize_t put = write(fd, p->at, (size_t)(p->end - p->at));
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            give_up(STAGE_FILE, errno);
        p->at += put;
    }
    if (close(fd) < 0)
        give_up(STAGE_FILE, errno);
    _exit(0);
}

/* Walls are what a command has: its fork wall, too. */
static void check_one(const struct command *c, struct payload *p) {
    struct user user;
    become(c, take_str(p), &user);
    if (install_fork_wall() < 0)
        give_up(STAGE_SETUP, errno);
    _exit(check_walls());
}

void run_command(const struct command *given) {
    struct command c = *given;
    /* Out of the way of the numbers that the command's own descriptors will have. */
    c.control = fcntl(c.control, F_DUPFD_CLOEXEC, 400);
    if (c.op != I_PREPARE) /* that one's is the cgroup it was born in */
        c.payload = fcntl(c.payload, F_DUPFD_CLOEXEC, 400);
    status_fd = fcntl(c.status, F_DUPFD_CLOEXEC, 400);
    int pipes[MAX_FDS];
    for (int i = 0; i < c.n_given; i++)
        if ((pipes[i] = fcntl(c.given[i], F_DUPFD_CLOEXEC, 400)) < 0)
            _exit(1);
    c.given = pipes;
    if (c.control < 0 || c.payload < 0 || status_fd < 0 || close_range(3, 399, 0) < 0)
        _exit(1);
    if (c.op == I_PREPARE)
        await_command(&c);
    struct payload p = read_payload(c.payload);
    if (!p.at)
        give_up(STAGE_SETUP, errno);
    if (c.op == I_SPAWN)
        spawn(&c, &p, NULL);
    else if (c.op == I_READ)
        read_one(&c, &p);
    else if (c.op == I_CHECK)
        check_one(&c, &p);
    else
        write_one(&c, &p);
    _exit(1);
}
