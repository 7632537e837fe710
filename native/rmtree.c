/* Deletes a tree that a guest wrote.
 *
 * Covered: symlinks (never followed: every step is openat with O_NOFOLLOW on a held directory), directories
 * without permissions, trees deeper than PATH_MAX or the descriptor limit (each sub-directory is first moved to
 * the top, so depth never exceeds two), overlay's own work directory.
 * Not covered: a guest that still runs in the tree; the caller ends the cell first.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Open a directory below `at` for reading and changing, giving ourselves the right to (we own it, or are root). */
static int open_dir(int at, const char *name) {
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;
    if (fd >= 0 && (fstat(fd, &st) < 0 || (st.st_mode & 0700) == 0700))
        return fd;
    if (fd < 0 && errno != EACCES)
        return -1;
    int path = fd >= 0 ? fd : openat(at, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (path < 0)
        return -1;
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", path);
    chmod(link, 0700);
    close(path);
    return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Empty `dir` but for `spare`: files are deleted, directories moved into `top` under fresh names. Closes `dir`. */
static int empty_dir(int top, int dir, unsigned long *serial, const char *spare) {
    int err = 0;
    DIR *stream = fdopendir(dir); /* takes dir */
    if (!stream) {
        close(dir);
        return -errno;
    }
    bool again = true;
    while (again && !err) {
        again = false;
        rewinddir(stream);
        struct dirent *entry;
        while (!err && (errno = 0, entry = readdir(stream)) != NULL) {
            if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") || (spare && !strcmp(entry->d_name, spare)))
                continue;
            again = true; /* deleting while reading may skip entries: read again until there are none */
            if (unlinkat(dirfd(stream), entry->d_name, 0) == 0)
                continue;
            if (errno != EISDIR && errno != EPERM) {
                err = -errno;
                break;
            }
            if (unlinkat(dirfd(stream), entry->d_name, AT_REMOVEDIR) == 0)
                continue;
            int child = open_dir(dirfd(stream), entry->d_name); /* moving a directory needs the right to write to it */
            if (child >= 0)
                close(child);
            char fresh[40];
            snprintf(fresh, sizeof fresh, "%lu", (*serial)++);
            if (renameat(dirfd(stream), entry->d_name, top, fresh) < 0)
                err = -errno;
        }
        if (!err && errno)
            err = -errno;
    }
    closedir(stream);
    return err;
}

int remove_tree(const char *path) {
    int root = open_dir(AT_FDCWD, path);
    if (root < 0)
        return errno == ENOENT ? 0 : -errno;
    /* Work in a fresh sub-directory of our own, so that our names cannot meet the guest's. */
    char top_name[40];
    unsigned long serial = 0;
    snprintf(top_name, sizeof top_name, ".removing-%d", getpid());
    int err = 0, top = -1;
    if (mkdirat(root, top_name, 0700) < 0 && errno != EEXIST)
        err = -errno;
    if (!err && (top = open_dir(root, top_name)) < 0)
        err = -errno;
    if (!err) {
        int again = openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        err = again < 0 ? -errno : empty_dir(top, again, &serial, top_name);
    }
    /* Every directory is now directly in `top`; emptying one may add more of them there. */
    for (unsigned long next = 0; !err && next < serial; next++) {
        char name[40];
        snprintf(name, sizeof name, "%lu", next);
        int dir = open_dir(top, name);
        if (dir < 0) {
            if (errno != ENOENT)
                err = -errno;
            continue;
        }
        err = empty_dir(top, dir, &serial, NULL);
        if (!err && unlinkat(top, name, AT_REMOVEDIR) < 0)
            err = -errno;
    }
    if (!err && (unlinkat(root, top_name, AT_REMOVEDIR) < 0 || rmdir(path) < 0))
        err = -errno;
    if (top >= 0)
        close(top);
    close(root);
    return err;
}
