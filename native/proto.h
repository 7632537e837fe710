/* What the parts of vallum-cell share: the wire to the node, errors, and a reader of bounded payloads.
 *
 * Wire: SOCK_SEQPACKET messages that begin with `struct message` (native byte order, 32-bit words),
 * with descriptors by SCM_RIGHTS. Anything longer than a few words travels in a memfd. The Python
 * side of the same wire is vallum/sandbox/ns/wire.py: change both or neither.
 */
#ifndef VALLUM_PROTO_H
#define VALLUM_PROTO_H

#include <errno.h>
#include <linux/capability.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MAX_FDS 64
#define MAX_TEXT 480
#define MAX_PAYLOAD (512u << 20)
#define MAX_WORD (64u << 10) /* of the message that a waiting child becomes a command by */
#define WARDEN_UID 65535u /* PID 1's user inside a cell; no guest may have it */

struct message {
    uint32_t op, id;
    int32_t a, b;
    char text[MAX_TEXT];
};
#define HEAD offsetof(struct message, text)

enum launcher_op { L_CREATE = 1, L_CANCEL = 2, L_REMOVE = 3, L_SEAL = 4 };
enum launcher_reply { L_READY = 1, L_FAILED = 2, L_REMOVED = 3, L_SEALED = 4 };
enum init_op { I_SPAWN = 1, I_SIGNAL = 2, I_KEEPER = 3, I_READ = 4, I_WRITE = 5, I_PREPARE = 6, I_CHECK = 20, I_KILL = 30 };
enum init_event { E_HELLO = 1, E_STARTED = 2, E_FAILED = 3, E_EXITED = 4, E_KEEPER = 5 };
enum spawn_flag { SPAWN_LEAF = 1, SPAWN_PTY = 2 };
enum stage { STAGE_CLONE = 1, STAGE_SETUP = 2, STAGE_USER = 3, STAGE_CWD = 4, STAGE_EXEC = 5, STAGE_FILE = 6, STAGE_STALE = 7 };
enum door { DOOR_TCP4 = 1, DOOR_DNS4 = 2, DOOR_TCP6 = 4, DOOR_DNS6 = 8, DOOR_DIAG = 16, DOOR_PACKETS = 32, DOOR_TRACE = 64, DOOR_LOG = 128 };
#define LANDLOCK_SHIFT 8                   /* above the doors in the same word: the Landlock ABI in force */
enum spec_flag { SPEC_SINGLE_ID = 1, SPEC_OWNER = 2, SPEC_RUNTIME = 1024 };

/* What root of an owner cell (SPEC_OWNER) keeps, in the cell's own user namespace only: to own and to give away files, and
 * to become the cell's other users. Never CAP_KILL: without it no guest has all that our own processes have before
 * execve, and so the kernel lets none trace them. docs/design/0004-guest-root.md has the reasons. */
#define OWNER_CAPS (1u << CAP_CHOWN | 1u << CAP_DAC_OVERRIDE | 1u << CAP_FOWNER | 1u << CAP_FSETID | 1u << CAP_SETGID | 1u << CAP_SETUID)

/* --- io.c --- */
int send_message(int sock, const void *data, size_t size, const int *fds, int count);
ssize_t recv_message(int sock, void *data, size_t size, int *fds, int *count);
void close_fds(const int *fds, int count);
int raise_fd(int fd);                      /* move to a high number, so that low ones can be assigned */
int write_file(const char *path, const char *text);

struct payload {
    char *at, *end, *base;                 /* base, size: the mapping */
    size_t size;
    bool bad;
};
struct payload read_payload(int fd);       /* .at == NULL with errno when it cannot be read */
uint32_t take_u32(struct payload *p);
const char *take_str(struct payload *p);   /* never NULL; "" and .bad when malformed */
const char **take_list(struct payload *p, uint32_t *count, uint32_t most); /* NULL-terminated */

/* --- cell.c, mounts.c, net.c --- */
struct swap {
    uint32_t disk, guest;                  /* the id on disk that is seen as the guest's id `guest`, and the other way round */
};
struct layer {
    const char *at, *upper_dir;
    uint32_t writable, count, sealed;      /* the first `sealed` lowers are owned by the store's ids */
    bool swaps;                            /* owners of the other lowers are swapped, and the layer is uid.guest's: */
    struct swap uid, gid;
    const char **lowers;
};
struct spec {
    uint32_t flags, base, range, inner_uid, inner_gid, outer_uid, outer_gid, port, nproc, store;
    uint32_t quota_kib, quota_inodes;      /* of all writable layers together; 0: they are on disk, without a quota */
    const char *hostname;
    uint32_t n_cgroups, n_layers;
    const char **cgroups;
    struct layer *layers;
    uint32_t n_runtime;                    /* SPEC_RUNTIME: what to run instead of our PID 1, and its two files */
    const char **runtime, *bundle, *session;
};
struct doors {
    uint32_t mask;
    int fds[8], count;
};
void build_cell(int node, uint32_t id, int payload_fd, volatile pid_t *cell) __attribute__((noreturn));
void fail(int err, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
extern int fail_sock;                      /* where fail() sends its sentence */

struct trees {
    int fds[520];                          /* detached mounts: every lower, then every upper directory */
    int count;
};
void open_trees(const struct spec *spec, struct trees *trees);
int map_swapped(const struct spec *spec, const struct layer *layer); /* cell.c: a user namespace with its ids swapped */
void map_trees(const struct spec *spec, struct trees *trees, int userns, int store_userns);
void stage_make(const struct spec *spec);
void stage_move(const struct spec *spec, struct trees *trees);
void build_tree(const struct spec *spec);
void build_rootfs(const struct spec *spec); /* only the layers, and a /proc of the new pid namespace over the host's */
void enter_tree(void);
void open_network(const struct spec *spec, struct doors *doors);

/* --- runtime.c --- */
void run_runtime(const struct spec *spec, int sync, int control, struct doors *doors) __attribute__((noreturn));

/* --- seccomp.c --- */
int install_walls(bool owner);
int install_fork_wall(void);

/* --- check.c --- */
int check_walls(void);                     /* one bit for each control that does not hold */

/* --- landlock.c --- */
int install_landlock(int root, int dev);   /* ABI, 0: none, -1 with errno; closes both */

/* --- init.c, command.c --- */
struct guard {
    bool single_id, owner;
    uint32_t uid, gid;                     /* of every command, when single_id */
    bool given;                            /* in a runtime's kernel: pipes come from the node */
};
void serve_cell(int control, struct guard guard) __attribute__((noreturn));
int open_relayed_terminal(int stream, int sizes, uint32_t rows, uint32_t columns); /* relay.c: the slave, -1 with errno */
void run_guest(void) __attribute__((noreturn));                  /* guest.c: PID 1 in a runtime's kernel */
struct command {
    uint32_t op, id;
    uint32_t flags, extra;                 /* of I_SPAWN */
    int payload, control, status;
    const char *user;                      /* of I_PREPARE: whose the pipes will be */
    struct guard guard;
    const int *given;                      /* with guard.given: our ends of its pipes, from the node */
    int n_given;
};
void run_command(const struct command *command) __attribute__((noreturn));

/* --- users.c --- */
struct user {
    uint32_t uid, gid, groups[65];
    int n_groups;
    char name[64], home[256];
};
int find_user(const char *wanted, struct user *out); /* 0 or -errno */

/* --- rmtree.c --- */
int remove_tree(const char *path);         /* 0 or -errno; never follows a symlink, never leaves the file system tree */

/* --- seal.c --- */
void seal_layer(int node, uint32_t id, int payload_fd) __attribute__((noreturn));

#endif
