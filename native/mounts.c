/* The cell's file tree.
 *
 * Every mount is made detached (fsopen, open_tree) and attached to a directory that was opened beneath the new
 * root without following any symlink, so an image cannot lead a mount elsewhere (runc CVE-2025-31133, crun
 * CVE-2026-47766 were of that kind).
 *
 * Covered: lower layers are read-only, nosuid, nodev, and (with a range of ids) idmapped, so ownership is right
 * inside; /proc/sys, /proc/irq, /proc/bus, /proc/fs read-only; host facts in /proc masked; the host's tree is gone.
 * Not covered: what /proc says of the machine (cpuinfo, meminfo, loadavg) is the host's.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* <sys/mount.h> of older C libraries clashes with <linux/mount.h>; these three are all we need of it. */
int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);
#define M_REC_PRIVATE ((1 << 14) | (1 << 18))
#define M_DETACH 2

#define STAGE "/tmp"
#define NEW_ROOT STAGE "/root"
#define NOTHING STAGE "/none"
#define QUOTA STAGE "/quota"
#define SAFE (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)

static int open_tree_(int at, const char *path, unsigned flags) {
    return (int)syscall(SYS_open_tree, at, path, flags | OPEN_TREE_CLOEXEC);
}

static int attach(int mount_fd, int dir, const char *path) {
    return (int)syscall(SYS_move_mount, mount_fd, "", dir, path, MOVE_MOUNT_F_EMPTY_PATH | (*path ? 0 : MOVE_MOUNT_T_EMPTY_PATH));
}

static int restrict_mount(int mount_fd, uint64_t attrs, int userns) {
    struct mount_attr attr = {.attr_set = attrs, .userns_fd = userns < 0 ? 0 : (uint64_t)userns};
    return (int)syscall(SYS_mount_setattr, mount_fd, "", AT_EMPTY_PATH, &attr, sizeof attr);
}

struct option {
    const char *key, *value; /* value NULL: a flag */
};

/* A new detached mount. On failure the kernel's own words are in `why`. */
static int new_mount(const char *type, const struct option *options, unsigned attrs, char *why, size_t room) {
    why[0] = 0;
    int fs = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (fs < 0)
        return -1;
    int result = 0;
    for (; options && options->key && result == 0; options++)
        result = (int)syscall(SYS_fsconfig, fs, options->value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, options->key, options->value, 0);
    if (result == 0)
        result = (int)syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
    if (result == 0)
        result = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attrs);
    int err = errno;
    if (result < 0) {
        ssize_t got = read(fs, why, room - 1);
        why[got > 0 ? got : 0] = 0;
        why[strcspn(why, "\n")] = 0;
    }
    close(fs);
    errno = err;
    return result;
}

static int must_mount(const char *what, const char *type, const struct option *options, unsigned attrs) {
    char why[200];
    int fd = new_mount(type, options, attrs, why, sizeof why);
    if (fd < 0)
        fail(errno, "mount %s%s%s", what, *why ? ": " : "", why);
    return fd;
}

static int open_beneath(int root, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, *path ? path : ".", &how, sizeof how);
}

/* Open directory `path` (no leading slash) beneath `root`, making what is missing. */
static int open_dir(int root, const char *path) {
    int fd = open_beneath(root, path, O_PATH | O_DIRECTORY);
    if (fd >= 0)
        return fd;
    if (errno != ENOENT)
        fail(errno, "use /%s of the image (it must be a directory, not a link)", path);
    char partial[4096];
    snprintf(partial, sizeof partial, "%s", path);
    for (char *at = partial;; at++) {
        if (*at && *at != '/')
            continue;
        char kept = *at;
        *at = 0;
        char *slash = strrchr(partial, '/');
        int parent = open_beneath(root, slash ? (*slash = 0, partial) : "", O_PATH | O_DIRECTORY);
        if (parent >= 0 && mkdirat(parent, slash ? slash + 1 : partial, 0755) < 0 && errno != EEXIST)
            fail(errno, "make /%s in the cell's root", path);
        if (parent >= 0)
            close(parent);
        if (slash)
            *slash = '/';
        *at = kept;
        if (!kept)
            break;
    }
    fd = open_beneath(root, path, O_PATH | O_DIRECTORY);
    if (fd < 0)
        fail(errno, "use /%s of the image (it must be a directory, not a link)", path);
    return fd;
}

static void add_tree(struct trees *trees, const char *path, bool recurse) {
    int fd = open_tree_(AT_FDCWD, path, OPEN_TREE_CLONE);
    if (fd < 0 && errno == EINVAL && recurse) /* mounts below it that this user namespace may not take apart */
        fd = open_tree_(AT_FDCWD, path, OPEN_TREE_CLONE | AT_RECURSIVE);
    if (fd < 0)
        fail(errno, "open the layer %s", path);
    trees->fds[trees->count++] = fd;
}

void open_trees(const struct spec *s, struct trees *trees) {
    bool single = s->flags & SPEC_SINGLE_ID;
    for (uint32_t i = 0; i < s->n_layers; i++)
        for (uint32_t j = 0; j < s->layers[i].count; j++)
            add_tree(trees, s->layers[i].lowers[j], single);
    for (uint32_t i = 0; i < s->n_layers; i++)
        if (s->layers[i].writable && !s->quota_kib)
            add_tree(trees, s->layers[i].upper_dir, false);
    if (!single)
        return;
    int n = 0;
    for (uint32_t i = 0; i < s->n_layers; i++)
        for (uint32_t j = 0; j < s->layers[i].count; j++)
            if (restrict_mount(trees->fds[n++], SAFE | MOUNT_ATTR_RDONLY, -1) < 0)
                fail(errno, "make the layer %s read-only", s->layers[i].lowers[j]);
}

void map_trees(const struct spec *s, struct trees *trees, int userns, int store_userns) {
    int n = 0;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct layer *l = &s->layers[i];
        bool swaps = l->swaps && (l->uid.disk != l->uid.guest || l->gid.disk != l->gid.guest);
        int own = swaps ? map_swapped(s, l) : -1;
        for (uint32_t j = 0; j < l->count; j++)
            if (restrict_mount(trees->fds[n++], SAFE | MOUNT_ATTR_RDONLY | MOUNT_ATTR_IDMAP, j < l->sealed ? store_userns : own >= 0 ? own : userns) < 0)
                fail(errno, "map the ids of the layer %s", l->lowers[j]);
        if (own >= 0)
            close(own);
    }
}

static void make_quota(const struct spec *s);

void stage_make(const struct spec *s) {
    if (mount(NULL, "/", NULL, M_REC_PRIVATE, NULL) < 0)
        fail(errno, "make the mounts private");
    int fd = must_mount("the staging tmpfs", "tmpfs", (struct option[]){{"mode", "0755"}, {"size", "1m"}, {0}}, SAFE);
    if (attach(fd, AT_FDCWD, STAGE) < 0)
        fail(errno, "mount over " STAGE " (is there such a directory?)");
    close(fd);
    char path[64];
    int n = 0;
    for (uint32_t i = 0; i < s->n_layers; i++)
        for (uint32_t j = 0; j < s->layers[i].count + (s->layers[i].writable ? 1 : 0); j++, n++) {
            snprintf(path, sizeof path, STAGE "/%d", n);
            if (mkdir(path, 0755) < 0)
                fail(errno, "make the staging directories");
        }
    if (mkdir(NEW_ROOT, 0755) < 0 || mkdir(NOTHING, 0755) < 0)
        fail(errno, "make the staging directories");
    if (s->quota_kib)
        make_quota(s);
}

/* The writable layers of a cell with a quota on disk: one tmpfs of that size, whose pages are charged to the cell's
 * memory. Upper directories have the same numbers as when they are moved in. */
static void make_quota(const struct spec *s) {
    char size[32], inodes[32], path[64];
    mode_t kept = umask(0);
    snprintf(size, sizeof size, "%uk", s->quota_kib);
    snprintf(inodes, sizeof inodes, "%u", s->quota_inodes);
    if (mkdir(QUOTA, 0755) < 0)
        fail(errno, "make the staging directories");
    int fd = must_mount("the tmpfs of the quota on disk", "tmpfs", (struct option[]){{"mode", "0755"}, {"size", size}, {"nr_inodes", inodes}, {0}}, SAFE);
    if (attach(fd, AT_FDCWD, QUOTA) < 0)
        fail(errno, "attach the tmpfs of the quota on disk");
    close(fd);
    int upper = 0;
    for (uint32_t i = 0; i < s->n_layers; i++)
        upper += (int)s->layers[i].count;
    static const char *const parts[] = {"", "/upper", "/work"};
    for (uint32_t i = 0; i < s->n_layers; i++) {
        if (!s->layers[i].writable)
            continue;
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) {
            snprintf(path, sizeof path, QUOTA "/%d%s", upper, parts[j]);
            if (mkdir(path, 0755) < 0)
                fail(errno, "make the directories of the quota on disk");
            if (j == 1 && s->layers[i].swaps && chown(path, s->layers[i].uid.guest, s->layers[i].gid.guest) < 0)
                fail(errno, "make the directories of the quota on disk");
        }
        upper++;
    }
    umask(kept);
}

/* Trees are staged in the order of `struct trees`: all lowers, then all upper directories. */
void stage_move(const struct spec *s, struct trees *trees) {
    (void)s;
    char path[64];
    for (int n = 0; n < trees->count; n++) {
        snprintf(path, sizeof path, STAGE "/%d", n);
        if (attach(trees->fds[n], AT_FDCWD, path) < 0)
            fail(errno, "move a layer into the cell");
        close(trees->fds[n]);
    }
}

static int overlay(const struct layer *l, int first, int upper, const char *uppers) {
    struct option options[520];
    static char paths[520][24];
    static char upper_path[40], work_path[40];
    int n = 0;
    uint32_t lowers = l->count;
    for (uint32_t j = 0; j < lowers; j++)
        snprintf(paths[j], sizeof paths[j], STAGE "/%d", first + (int)j);
    /* Never a plain bind: through one a guest could connect to a Unix socket that a service of the host listens on.
       Behind an overlay there is only a name without a listener. An overlay without an upper wants two lowers. */
    if (upper < 0 && lowers == 1)
        snprintf(paths[lowers++], sizeof paths[0], NOTHING);
    for (uint32_t j = 0; j < lowers; j++)
        options[n++] = (struct option){"lowerdir+", paths[j]};
    if (upper >= 0) {
        snprintf(upper_path, sizeof upper_path, "%.16s/%d/upper", uppers, upper);
        snprintf(work_path, sizeof work_path, "%.16s/%d/work", uppers, upper);
        options[n++] = (struct option){"upperdir", upper_path};
        options[n++] = (struct option){"workdir", work_path};
        /* The layer dies with the cell, or is synced when it is sealed: the guest's fsync need not reach the disk. */
        options[n++] = (struct option){"volatile", NULL};
    }
    options[n++] = (struct option){"userxattr", NULL};
    options[n] = (struct option){0};
    char why[200];
    unsigned attrs = SAFE | (upper < 0 ? MOUNT_ATTR_RDONLY : 0);
    int fd = new_mount("overlay", options, attrs, why, sizeof why);
    if (fd < 0 && errno == EINVAL && lowers <= 100) {
        /* Before Linux 6.8 there is no lowerdir+; one string, short because the layers are staged under numbers. */
        char joined[100 * 24 + 1] = "";
        for (uint32_t j = 0; j < lowers; j++)
            snprintf(joined + strlen(joined), sizeof joined - strlen(joined), "%s%.22s", j ? ":" : "", paths[j]);
        options[lowers - 1] = (struct option){"lowerdir", joined};
        char second[200];
        int retry = new_mount("overlay", options + lowers - 1, attrs, second, sizeof second);
        if (retry >= 0)
            return retry;
        errno = EINVAL;
    }
    if (fd < 0)
        fail(errno, "mount the overlay at %s%s%s", l->at, *why ? ": " : "", why);
    return fd;
}

static void build_layers(const struct spec *s) {
    int first = 0, upper = 0, root = -1;
    for (uint32_t i = 0; i < s->n_layers; i++)
        upper += (int)s->layers[i].count;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct layer *l = &s->layers[i];
        int fd = overlay(l, first, l->writable ? upper : -1, s->quota_kib ? QUOTA : STAGE);
        first += (int)l->count;
        upper += l->writable ? 1 : 0;
        int dir = i == 0 ? open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC) : open_dir(root, l->at + 1);
        if (dir < 0 || attach(fd, dir, "") < 0)
            fail(errno, "attach the layer at %s", l->at);
        close(dir);
        close(fd);
        if (i == 0 && (root = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
            fail(errno, "open the cell's root");
    }
    close(root);
}

static void attach_at(int fd, int root, const char *path) {
    int dir = open_dir(root, path);
    if (attach(fd, dir, "") < 0)
        fail(errno, "attach /%s", path);
    close(dir);
    close(fd);
}

/* Cover a file or directory beneath root with something; what is not there needs no cover. */
static void cover(int root, const char *path, int mask_file) {
    int there = open_beneath(root, path, O_PATH);
    struct stat st;
    if (there < 0)
        return;
    if (fstat(there, &st) < 0)
        fail(errno, "look at /%s", path);
    int fd;
    if (mask_file < 0) { /* the same thing again, read-only */
        fd = open_tree_(there, "", OPEN_TREE_CLONE | AT_RECURSIVE | AT_EMPTY_PATH);
        if (fd < 0 || restrict_mount(fd, SAFE | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY, -1) < 0)
            fail(errno, "make /%s read-only", path);
    } else if (S_ISDIR(st.st_mode)) {
        fd = must_mount(path, "tmpfs", (struct option[]){{"mode", "0555"}, {"size", "4k"}, {0}}, SAFE | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY);
    } else {
        fd = open_tree_(mask_file, "", OPEN_TREE_CLONE | AT_EMPTY_PATH);
        if (fd < 0)
            fail(errno, "mask /%s", path);
    }
    if (attach(fd, there, "") < 0)
        fail(errno, "cover /%s", path);
    close(fd);
    close(there);
}

static void build_proc(int root) {
    char why[200];
    int fd = new_mount("proc", NULL, SAFE | MOUNT_ATTR_NOEXEC, why, sizeof why);
    if (fd < 0 && errno == EPERM)
        fail(EPERM, "mount /proc (the kernel forbids it where parts of the outer /proc are hidden, as in most containers)");
    if (fd < 0)
        fail(errno, "mount /proc");
    attach_at(fd, root, "proc");
    /* The guest's own servers may take low ports: they are only its own loopback. Before it becomes read-only. */
    write_file(NEW_ROOT "/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    /* A socket that is closed right after connecting is kept as a small TIME_WAIT stub, which has no cgroup, while this
       is at most 60 s; beyond, it stays a socket, and whose step it was can still be asked. */
    write_file(NEW_ROOT "/proc/sys/net/ipv4/tcp_fin_timeout", "61");
    int null = open("/dev/null", O_PATH | O_CLOEXEC);
    if (null < 0)
        fail(errno, "open /dev/null");
    static const char *const masked[] = {"proc/kcore", "proc/keys", "proc/key-users", "proc/timer_list", "proc/timer_stats", "proc/latency_stats",
                                         "proc/sched_debug", "proc/interrupts", "proc/sysrq-trigger", "proc/kmsg", "proc/modules", "proc/cmdline",
                                         "proc/acpi", "proc/asound", "proc/driver", "proc/scsi"};
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
        cover(root, masked[i], null);
    static const char *const frozen[] = {"proc/sys", "proc/irq", "proc/bus", "proc/fs"};
    for (size_t i = 0; i < sizeof frozen / sizeof *frozen; i++)
        cover(root, frozen[i], -1);
    close(null);
}

static void build_dev(const struct spec *s, int root) {
    bool single = s->flags & SPEC_SINGLE_ID;
    int dev = must_mount("/dev", "tmpfs", (struct option[]){{"mode", "0755"}, {"size", "64k"}, {0}}, SAFE | MOUNT_ATTR_NOEXEC);
    int keep = dup(dev);
    attach_at(dev, root, "dev");
    int dir = open_dir(root, "dev");
    static const char *const nodes[] = {"null", "zero", "full", "random", "urandom", "tty"};
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        char host[32];
        snprintf(host, sizeof host, "/dev/%s", nodes[i]);
        int tree = open_tree_(AT_FDCWD, host, OPEN_TREE_CLONE);
        int file = openat(dir, nodes[i], O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
        if (tree < 0 || file < 0 || restrict_mount(tree, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, -1) < 0 || attach(tree, file, "") < 0)
            fail(errno, "bind %s", host);
        close(tree);
        close(file);
    }
    static const char *const links[][2] = {{"pts/ptmx", "ptmx"}, {"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlinkat(links[i][0], dir, links[i][1]) < 0)
            fail(errno, "make /dev/%s", links[i][1]);
    struct option pts[] = {{"newinstance", NULL}, {"ptmxmode", "0666"}, {"mode", "0620"}, {"gid", "5"}, {0}};
    if (single) /* gid 5 is not mapped */
        pts[3] = (struct option){0};
    attach_at(must_mount("/dev/pts", "devpts", pts, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC), root, "dev/pts");
    attach_at(must_mount("/dev/shm", "tmpfs", (struct option[]){{"mode", "1777"}, {"size", "512m"}, {0}}, SAFE), root, "dev/shm");
    if (restrict_mount(keep, MOUNT_ATTR_RDONLY, -1) < 0)
        fail(errno, "make /dev read-only");
    close(keep);
    close(dir);
}

void build_tree(const struct spec *s) {
    umask(0);
    build_layers(s);
    int root = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        fail(errno, "open the cell's root");
    build_proc(root);
    build_dev(s, root);
    attach_at(must_mount("/sys", "tmpfs", (struct option[]){{"mode", "0555"}, {"size", "4k"}, {0}}, SAFE | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY), root, "sys");
    if (s->layers[0].writable) {
        close(open_dir(root, "run"));
        close(open_dir(root, "tmp"));
        int tmp = open_beneath(root, "tmp", O_RDONLY | O_DIRECTORY);
        struct stat st;
        if (tmp < 0 || fstat(tmp, &st) < 0 || ((st.st_mode & 07777) != 01777 && fchmod(tmp, 01777) < 0))
            fail(errno, "open /tmp of the image to all users of the cell");
        close(tmp);
    } else {
        attach_at(must_mount("/tmp", "tmpfs", (struct option[]){{"mode", "1777"}, {"size", "512m"}, {0}}, SAFE), root, "tmp");
        attach_at(must_mount("/run", "tmpfs", (struct option[]){{"mode", "0755"}, {"size", "64m"}, {0}}, SAFE), root, "run");
    }
    close(root);
}

void build_rootfs(const struct spec *s) {
    umask(0);
    build_layers(s);
    int root = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        fail(errno, "open the cell's root");
    static const char *const points[] = {"proc", "sys", "dev", "run", "tmp"};
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        close(open_dir(root, points[i]));
    int tmp = open_beneath(root, "tmp", O_RDONLY | O_DIRECTORY);
    struct stat st;
    if (tmp < 0 || fstat(tmp, &st) < 0 || ((st.st_mode & 07777) != 01777 && fchmod(tmp, 01777) < 0))
        fail(errno, "open /tmp of the image to all users of the cell");
    close(tmp);
    close(root);
    int fd = must_mount("/proc", "proc", NULL, SAFE | MOUNT_ATTR_NOEXEC);
    if (attach(fd, AT_FDCWD, "/proc") < 0)
        fail(errno, "attach /proc");
    close(fd);
    write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
}

void enter_tree(void) {
    if (chdir(NEW_ROOT) < 0 || syscall(SYS_pivot_root, ".", ".") < 0)
        fail(errno, "make the cell's tree the root");
    if (umount2(".", M_DETACH) < 0)
        fail(errno, "let go of the host's tree");
    if (chdir("/") < 0)
        fail(errno, "enter the cell's root");
}
