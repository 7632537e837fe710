/* A second wall behind the mount tree, from the kernel's Landlock: it holds where a mount flag was forgotten.
 *
 * Covered: no device node can be made anywhere; ioctl on devices only beneath /dev (Landlock ABI 5); no signal to and
 * no abstract Unix socket of a process that was not started in the cell (ABI 6). Mounts can never be changed again.
 * Not covered: reading and writing of ordinary files, which the mount tree and ids decide. Landlock grants by
 * directory and cannot take /proc out of a grant on /, and a guest may make new directories in its root.
 *
 * Renames and links between directories are granted on /: a ruleset that does not say so forbids them all.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <sys/syscall.h>
#include <unistd.h>

/* The headers of supported distributions are older than what kernels offer, so the few names are here. */
#define CALL_CREATE_RULESET 444
#define CALL_ADD_RULE 445
#define CALL_RESTRICT_SELF 446
#define CREATE_VERSION (1u << 0)
#define RULE_PATH_BENEATH 1
#define FS_MAKE_CHAR (1ull << 6)
#define FS_MAKE_BLOCK (1ull << 11)
#define FS_REFER (1ull << 13)     /* ABI 2 */
#define FS_IOCTL_DEV (1ull << 15) /* ABI 5 */
#define SCOPE_ABSTRACT (1ull << 0) /* ABI 6 */
#define SCOPE_SIGNAL (1ull << 1)
#define LOG_SAME_EXEC_OFF (1u << 0) /* ABI 7: a guest must not fill the host's audit log */

struct ruleset {
    uint64_t fs, net, scoped;
};
struct beneath {
    uint64_t allowed;
    int32_t parent;
} __attribute__((packed));

static int allow(int ruleset, int directory, uint64_t access) {
    struct beneath rule = {.allowed = access, .parent = directory};
    return (int)syscall(CALL_ADD_RULE, ruleset, RULE_PATH_BENEATH, &rule, 0);
}

static int restrict_self(int root, int dev) {
    int abi = (int)syscall(CALL_CREATE_RULESET, NULL, 0, CREATE_VERSION);
    if (abi < 2)
        return 0;
    struct ruleset rules = {.fs = FS_MAKE_CHAR | FS_MAKE_BLOCK | FS_REFER};
    if (abi >= 5)
        rules.fs |= FS_IOCTL_DEV;
    if (abi >= 6)
        rules.scoped = SCOPE_ABSTRACT | SCOPE_SIGNAL;
    int ruleset = (int)syscall(CALL_CREATE_RULESET, &rules, abi >= 6 ? sizeof rules : abi >= 4 ? 16 : 8, 0);
    if (ruleset < 0)
        return -1;
    int result = allow(ruleset, root, FS_REFER);
    if (result == 0 && abi >= 5)
        result = allow(ruleset, dev, FS_REFER | FS_IOCTL_DEV);
    if (result == 0)
        result = (int)syscall(CALL_RESTRICT_SELF, ruleset, abi >= 7 ? LOG_SAME_EXEC_OFF : 0);
    int err = errno;
    close(ruleset);
    errno = err;
    return result < 0 ? -1 : abi;
}

/* For PID 1 and everything it starts. Preconditions: no_new_privs, the cell's tree is the root.
 * Returns the ABI that was used, 0 where there is no Landlock (or none that allows renames), -1 with errno. */
int install_landlock(int root, int dev) {
    int abi = restrict_self(root, dev), err = errno;
    close(root);
    close(dev);
    errno = err;
    return abi;
}
