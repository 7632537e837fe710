/* Seals what a guest wrote: a cell's upper directory (and the sealed layers that are to be merged into it) becomes a new
 * layer, with a listing that is evidence and what `diff` compares. Without a destination only the listing is made.
 *
 * Covered: symlinks (never followed: each step is openat with O_NOFOLLOW on a held directory); whiteouts, opaque
 * directories, hard links, holes, owners (moved from the cell's range to the store's), modes, times, user.* attributes,
 * ACLs; FIFOs are not opened; a file of one exabyte that is a hole costs nothing; directories deeper than PATH_MAX. What a guest can make us hold in memory and write as a listing is bounded.
 * Not covered: consistency while the guest runs (the caller freezes it; without, each file is what it was when it was
 * read, and nothing worse); directories nested deeper than 4000, or with paths beyond
 * 64 KiB, more than a million entries in one, or a listing beyond 1 GiB are refused.
 *
 * Listing: records of two NUL-ended strings, in order of path within each directory:
 *   "TYPE MODE UID GID SIZE MTIME_NS BELOW REPLACED DIGEST" and the path without a leading slash.
 * TYPE f d l p s, or w (whiteout: what was below is gone). Ids are the guest's. SIZE is 0 of what is not a file or link.
 * BELOW, of the layers that the sealed one lies on: 0 nothing there, = the same type, mode and owner, ~ another.
 * REPLACED: o when a directory hides all that was below it. DIGEST: SHA-256 of the content (of a link: of its target); of
 * a file with holes of 64 MiB and more in all "s" and that of its 4096-byte blocks that are not all zero, each after its
 * number (64 bits, little-endian); "-" where there is no content.
 */
#define _GNU_SOURCE
#include "proto.h"
#include "sha256.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define DEEPEST 4000
#define MOST_NAMES (1u << 20)           /* in one directory: they are held in memory */
#define LONGEST (64u << 10)             /* path; what is deeper would make listings out of all proportion */
#define LARGEST_LISTING (1ull << 30)
#define MOST_LINK_BYTES (64u << 20)     /* of paths remembered for hard links; beyond, links become files of their own */
#define MANY_HOLES (64ll << 20)
#define PART (256u << 10)
#define OPAQUE "user.overlay.opaque"

struct place {
    int fd;
    uint32_t base; /* the host id that its id 0 is */
    const struct swap *swaps; /* of user ids and of group ids, when they are seen swapped; else NULL */
    int mode;      /* that it had before we opened it to ourselves; -1: we did not */
};
struct name {
    char *text;
    int source;
};
struct link {
    dev_t dev;
    ino_t ino;
    char *path;
};

static int node_sock, dest_root = -1, depth;
static uint32_t request_id, to_base, range, single_id;
static struct place sources[520], lower[520];
static int n_sources, n_lower;
static char *path;
static size_t path_length, path_room;
static FILE *listing;
static struct sha256 digest;
static uint64_t entries, bytes, listed;
static struct link *links;
static size_t n_links, link_room, link_bytes;
static uint8_t part[PART], values[65536];
static struct place opened[DEEPEST + 600]; /* directories to be given back their modes */
static int n_opened;

static void refuse(int err, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
static void give_back(int down_to) {
    while (n_opened > down_to) {
        n_opened--;
        fchmod(opened[n_opened].fd, (mode_t)opened[n_opened].mode);
    }
}

static void refuse(int err, const char *format, ...) {
    give_back(0);
    struct message m = {.op = L_SEALED, .id = request_id, .a = err ? err : EIO};
    va_list list;
    va_start(list, format);
    vsnprintf(m.text, sizeof m.text, format, list);
    va_end(list);
    send_message(node_sock, &m, HEAD + strlen(m.text), NULL, 0);
    _exit(0);
}

static void *must(void *memory) {
    if (!memory)
        refuse(ENOMEM, "remember the names of so many files");
    return memory;
}

/* --- reading --- */

/* A guest without a range of ids is our own user, so a file of it may be closed to us: it is opened for a moment. */
static int open_file(int at, const char *name) {
    int fd = openat(at, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 || errno != EACCES || range)
        return fd;
    struct stat st;
    char proc[40];
    int held = openat(at, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (held < 0)
        return -1;
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", held);
    if (fstat(held, &st) == 0 && S_ISREG(st.st_mode) && chmod(proc, (st.st_mode & 07777) | 0400) == 0) {
        fd = openat(at, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        chmod(proc, st.st_mode & 07777);
    }
    close(held);
    return fd;
}

/* The same for a directory, which stays open to us until give_back(). */
static struct place open_directory(int at, const char *name, uint32_t base, bool may_open) {
    struct place place = {.fd = -1, .base = base, .mode = -1};
    struct stat st;
    int held = openat(at, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (held < 0 || fstat(held, &st) < 0)
        return place;
    char proc[40];
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", held);
    bool closed = may_open && !range && geteuid() != 0 && (st.st_mode & 0500) != 0500;
    if (closed && n_opened < (int)(sizeof opened / sizeof *opened) && chmod(proc, (st.st_mode & 07777) | 0500) == 0)
        place.mode = st.st_mode & 07777;
    place.fd = openat(held, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int err = errno;
    if (place.mode >= 0 && place.fd >= 0)
        opened[n_opened++] = place;
    else if (place.mode >= 0)
        chmod(proc, (mode_t)place.mode);
    close(held);
    errno = err;
    return place;
}

static bool is_whiteout(const struct stat *st) {
    return S_ISCHR(st->st_mode) && st->st_rdev == 0;
}

static bool is_opaque(int dir) {
    char value[4];
    return fgetxattr(dir, OPAQUE, value, sizeof value) == 1 && value[0] == 'y';
}

static uint32_t inner(uint32_t id, uint32_t base) {
    if (!range)
        return single_id;
    return id - base < range ? id - base : 65534;
}

/* Of a file of a layer below; which: 0 the user, 1 the group. */
static uint32_t inner_below(uint32_t id, const struct place *place, int which) {
    const struct swap *w = place->swaps ? &place->swaps[which] : NULL;
    if (!range || !w || (id != w->disk && id != w->guest))
        return inner(id, place->base);
    return id == w->disk ? w->guest : inner(w->disk, place->base);
}

static int compare(const void *a, const void *b) {
    return strcmp(((const struct name *)a)->text, ((const struct name *)b)->text);
}

/* Every name of the first n places, once, with the uppermost place that has it. */
static struct name *read_names(const struct place *in, int n, uint32_t *count) {
    struct name *names = NULL;
    uint32_t room = 0;
    *count = 0;
    for (int i = 0; i < n; i++) {
        int fd = openat(in[i].fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        DIR *stream = fd < 0 ? NULL : fdopendir(fd);
        if (!stream)
            refuse(errno, "read the directory /%s", path);
        struct dirent *entry;
        while ((errno = 0, entry = readdir(stream)) != NULL) {
            struct stat st;
            bool hidden = !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..");
            for (int j = 0; j < i && !hidden; j++)
                hidden = fstatat(in[j].fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0;
            if (hidden)
                continue;
            if (*count == MOST_NAMES)
                refuse(E2BIG, "take in the directory /%s: it has more than %u entries", path, MOST_NAMES);
            if (*count == room)
                names = must(realloc(names, (room = room ? 2 * room : 32) * sizeof *names));
            names[*count].text = must(strdup(entry->d_name));
            names[(*count)++].source = i;
        }
        if (errno)
            refuse(errno, "read the directory /%s", path);
        closedir(stream);
    }
    if (*count)
        qsort(names, *count, sizeof *names, compare);
    return names;
}

/* --- listing --- */

static size_t push_path(const char *name) {
    size_t before = path_length, size = strlen(name);
    if (path_length + size + 2 > path_room)
        path = must(realloc(path, path_room = 2 * (path_length + size + 2)));
    if (path_length)
        path[path_length++] = '/';
    memcpy(path + path_length, name, size + 1);
    path_length += size;
    if (path_length > LONGEST)
        refuse(ENAMETOOLONG, "take in paths longer than %u bytes, at /%.200s", LONGEST, path);
    return before;
}

static void pop_path(size_t before) {
    path_length = before;
    path[before] = 0;
}

static void list(char type, const struct stat *st, uint32_t base, char below, bool replaced, const char *content) {
    char head[256];
    bool sized = type == 'f' || type == 'l';
    int n = snprintf(head, sizeof head, "%c %o %u %u %lld %lld %c %c %s", type, type == 'w' ? 0 : (unsigned)st->st_mode & 07777,
                     type == 'w' ? 0 : inner(st->st_uid, base), type == 'w' ? 0 : inner(st->st_gid, base), sized ? (long long)st->st_size : 0ll,
                     type == 'w' ? 0ll : (long long)st->st_mtim.tv_sec * 1000000000ll + st->st_mtim.tv_nsec, below, replaced ? 'o' : '-', content);
    if ((listed += (uint64_t)n + path_length + 2) > LARGEST_LISTING)
        refuse(E2BIG, "list so many and so long paths: the listing would be larger than 1 GiB");
    sha256_add(&digest, head, (size_t)n + 1);
    sha256_add(&digest, path, path_length + 1);
    if (fwrite(head, 1, (size_t)n + 1, listing) != (size_t)n + 1 || fwrite(path, 1, path_length + 1, listing) != path_length + 1)
        refuse(errno, "write the listing");
    entries++;
}

/* --- writing --- */

static void copy_acl(int from, int to, const char *name, uint32_t base) {
    /* Version, then entries of tag, permission, id: ids of named users (2) and groups (8) are the host's. */
    ssize_t size = fgetxattr(from, name, values, sizeof values);
    for (ssize_t at = 4; at + 8 <= size && range; at += 8) {
        uint16_t tag = (uint16_t)(values[at] | values[at + 1] << 8);
        uint32_t id;
        memcpy(&id, values + at + 4, 4);
        if (tag == 2 || tag == 8) {
            id = to_base + inner(id, base);
            memcpy(values + at + 4, &id, 4);
        }
    }
    if (size > 0 && fsetxattr(to, name, values, (size_t)size, 0) < 0)
        refuse(errno, "write the access list of /%s", path);
}

static void copy_attributes(int from, int to, uint32_t base) {
    static char names[65536];
    ssize_t size = flistxattr(from, names, sizeof names);
    if (size < 0 && errno != ENOTSUP)
        refuse(errno, "read the attributes of /%s", path);
    for (char *name = names; size > 0 && name < names + size; name += strlen(name) + 1) {
        if (!strncmp(name, "system.posix_acl_", 17)) {
            copy_acl(from, to, name, base);
            continue;
        }
        if (strncmp(name, "user.", 5) != 0)
            continue;
        ssize_t got = fgetxattr(from, name, values, sizeof values);
        if (got < 0 || fsetxattr(to, name, values, (size_t)got, 0) < 0)
            refuse(errno, "copy the attribute %.100s of /%s", name, path);
    }
}

static void own(int at, const char *name, const struct stat *st, uint32_t base) {
    if (range && fchownat(at, name, to_base + inner(st->st_uid, base), to_base + inner(st->st_gid, base), AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH)) < 0)
        refuse(errno, "give /%s its owner", path);
}

/* Owner before mode (changing the owner clears set-id bits), times last. */
static void finish(int from, int to, const struct stat *st, uint32_t base) {
    own(to, "", st, base);
    copy_attributes(from, to, base);
    if (fchmod(to, st->st_mode & 07777) < 0)
        refuse(errno, "give /%s its mode", path);
    if (futimens(to, (struct timespec[]){st->st_atim, st->st_mtim}) < 0)
        refuse(errno, "give /%s its times", path);
}

static bool is_zero(const uint8_t *at, size_t size) {
    return size == 0 || (at[0] == 0 && memcmp(at, at + 1, size - 1) == 0);
}

static void add_blocks(struct sha256 *sum, off_t at, size_t size) {
    for (size_t done = 0; done < size; done += 4096) {
        size_t step = size - done < 4096 ? size - done : 4096;
        uint64_t number = (uint64_t)(at + (off_t)done) / 4096;
        if (is_zero(part + done, step))
            continue;
        sha256_add(sum, &number, sizeof number);
        sha256_add(sum, part + done, step);
    }
}

static void add_zeros(struct sha256 *sum, off_t size) {
    static const uint8_t zeros[65536];
    for (; size > 0; size -= (off_t)sizeof zeros)
        sha256_add(sum, zeros, size < (off_t)sizeof zeros ? (size_t)size : sizeof zeros);
}

/* Content of `from`, hole by hole, into `to` (when >= 0) and its digest. Grows or shrinks meanwhile: what there is. */
static void copy_content(int from, int to, const struct stat *st, char text[67]) {
    bool sparse = st->st_size - (off_t)st->st_blocks * 512 >= MANY_HOLES;
    struct sha256 sum;
    sha256_begin(&sum);
    off_t at = 0, reached = 0;
    while (at < st->st_size) {
        off_t data = lseek(from, at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            data = at; /* a file system without the notion */
        if (data < 0 || data > st->st_size)
            data = st->st_size;
        data -= data % 4096; /* so that blocks are the same whatever the file system calls a hole */
        if (data < at)
            data = at;
        if (!sparse)
            add_zeros(&sum, data - at);
        at = data;
        off_t hole = at < st->st_size ? lseek(from, at, SEEK_HOLE) : at;
        if (hole < 0 || hole > st->st_size || hole <= at)
            hole = st->st_size;
        hole = hole + 4095 - (hole + 4095) % 4096 < st->st_size ? hole + 4095 - (hole + 4095) % 4096 : st->st_size;
        while (at < hole) {
            size_t size = hole - at < (off_t)PART ? (size_t)(hole - at) : PART;
            ssize_t got = pread(from, part, size, at);
            if (got < 0)
                refuse(errno, "read /%s", path);
            memset(part + got, 0, size - (size_t)got); /* cut short meanwhile */
            if (sparse)
                add_blocks(&sum, at, size);
            else
                sha256_add(&sum, part, size);
            for (size_t put = 0; to >= 0 && put < size;) {
                ssize_t wrote = pwrite(to, part + put, size - put, at + (off_t)put);
                if (wrote <= 0)
                    refuse(wrote < 0 ? errno : ENOSPC, "write the copy of /%s", path);
                put += (size_t)wrote;
            }
            reached = at += (off_t)size;
            bytes += size;
        }
    }
    if (to >= 0 && reached < st->st_size && ftruncate(to, st->st_size) < 0) /* it ends in a hole */
        refuse(errno, "write the copy of /%s", path);
    text[0] = 's';
    sha256_end(&sum, text + sparse);
}

/* --- hard links: the first path of each, to link the others to --- */

static size_t find_link(dev_t dev, ino_t ino) {
    size_t at = (size_t)(ino * 0x9E3779B97F4A7C15ull ^ dev) & (link_room - 1);
    while (links[at].path && (links[at].dev != dev || links[at].ino != ino))
        at = (at + 1) & (link_room - 1);
    return at;
}

static void keep_link(const struct stat *st) {
    if (path_length >= 4096 || link_bytes + path_length > MOST_LINK_BYTES || n_links >= MOST_NAMES)
        return;
    link_bytes += path_length;
    if (2 * (n_links + 1) > link_room) {
        struct link *old = links;
        size_t before = link_room;
        link_room = link_room ? 2 * link_room : 64;
        links = must(calloc(link_room, sizeof *links));
        for (size_t i = 0; i < before; i++)
            if (old[i].path)
                links[find_link(old[i].dev, old[i].ino)] = old[i];
        free(old);
    }
    links[find_link(st->st_dev, st->st_ino)] = (struct link){st->st_dev, st->st_ino, must(strdup(path))};
    n_links++;
}

/* Whether a copy of the same file is there already and could be linked. Nobody but us writes to the destination. */
static bool link_again(const struct stat *st, int dest, const char *name) {
    if (dest < 0 || !link_room)
        return false;
    const char *first = links[find_link(st->st_dev, st->st_ino)].path;
    return first && linkat(dest_root, first, dest, name, 0) == 0;
}

/* --- the walk --- */

static void take_file(const struct place *from, const char *name, int dest, char below) {
    struct stat st;
    char text[67] = "";
    int fd = open_file(from->fd, name);
    if (fd < 0 && errno == ENOENT)
        return;
    if (fd < 0 || fstat(fd, &st) < 0)
        refuse(errno, "open /%s", path);
    if (!S_ISREG(st.st_mode))
        refuse(EAGAIN, "take /%s: it became something else meanwhile", path);
    bool linked = st.st_nlink > 1 && link_again(&st, dest, name);
    int to = dest < 0 || linked ? -1 : openat(dest, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (dest >= 0 && !linked && to < 0)
        refuse(errno, "write the copy of /%s", path);
    copy_content(fd, to, &st, text);
    if (to >= 0) {
        finish(fd, to, &st, from->base);
        close(to);
        if (st.st_nlink > 1)
            keep_link(&st);
    }
    close(fd);
    list('f', &st, from->base, below, false, text);
}

static void take_link(const struct place *from, const char *name, const struct stat *st, int dest, char below) {
    char target[4097], text[65];
    ssize_t size = readlinkat(from->fd, name, target, sizeof target - 1);
    if (size < 0)
        refuse(errno, "read the link /%s", path);
    target[size] = 0;
    if (dest >= 0) {
        if (symlinkat(target, dest, name) < 0)
            refuse(errno, "write the link /%s", path);
        own(dest, name, st, from->base);
        utimensat(dest, name, (struct timespec[]){st->st_atim, st->st_mtim}, AT_SYMLINK_NOFOLLOW);
    }
    struct sha256 sum;
    sha256_begin(&sum);
    sha256_add(&sum, target, (size_t)size);
    sha256_end(&sum, text);
    list('l', st, from->base, below, false, text);
}

/* Whiteouts, FIFOs and sockets: made, never opened. A whiteout is the one device that needs no privilege. */
static void take_node(const struct place *from, const char *name, const struct stat *st, int dest, char below) {
    char type = is_whiteout(st) ? 'w' : S_ISFIFO(st->st_mode) ? 'p' : S_ISSOCK(st->st_mode) ? 's' : 0;
    if (!type)
        refuse(EPERM, "take /%s: it is a device, and no guest can have made one", path);
    if (dest >= 0) {
        if (mknodat(dest, name, (st->st_mode & S_IFMT) | (type == 'w' ? 0 : st->st_mode & 07777), 0) < 0)
            refuse(errno, "write /%s", path);
        if (type != 'w') {
            own(dest, name, st, from->base);
            utimensat(dest, name, (struct timespec[]){st->st_atim, st->st_mtim}, AT_SYMLINK_NOFOLLOW);
        }
    }
    list(type, st, from->base, below, false, "-");
}

static void walk(const struct place *in, int n, const struct place *under, int n_under, int dest);

/* Directories `name` of the places from `first` on that are seen through each other. `hides`: what comes after is not.
 * `ours`: what is sealed; of the rest, what is closed to us is passed over. */
static int open_all(const struct place *in, int first, int n, const char *name, struct place *out, bool *hides, bool ours) {
    int count = 0;
    *hides = false;
    for (int i = first; i < n && !*hides; i++) {
        struct stat st;
        if (fstatat(in[i].fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        *hides = !S_ISDIR(st.st_mode);
        if (*hides)
            break;
        struct place place = open_directory(in[i].fd, name, in[i].base, ours);
        if (place.fd < 0 && !ours && errno == EACCES)
            continue;
        if (place.fd < 0)
            refuse(errno, "open the directory /%s", path);
        place.swaps = in[i].swaps;
        *hides = is_opaque(place.fd);
        out[count++] = place;
    }
    return count;
}

static void take_directory(const struct place *in, int first, int n, const struct place *under, int n_under, const char *name, int dest, char below) {
    struct place *inside = must(malloc((size_t)(n - first + n_under + 1) * sizeof *inside));
    bool hides, ignored;
    int before = n_opened, count = open_all(in, first, n, name, inside, &hides, true), to = -1;
    if (count == 0) {
        free(inside); /* gone meanwhile */
        return;
    }
    struct stat st;
    if (fstat(inside[0].fd, &st) < 0)
        refuse(errno, "open the directory /%s", path);
    if (inside[0].mode >= 0)
        st.st_mode = S_IFDIR | (mode_t)inside[0].mode;
    if (++depth > DEEPEST)
        refuse(ELOOP, "take in directories nested deeper than %d, at /%.200s", DEEPEST, path);
    if (dest >= 0 && (mkdirat(dest, name, 0700) < 0 || (to = openat(dest, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0))
        refuse(errno, "write the directory /%s", path);
    list('d', &st, inside[0].base, below, hides && below != '0', "-");
    struct place *deeper = inside + count;
    int n_deeper = hides ? 0 : open_all(under, 0, n_under, name, deeper, &ignored, false);
    walk(inside, count, deeper, n_deeper, to);
    if (to >= 0) {
        finish(inside[0].fd, to, &st, inside[0].base);
        if (hides && fsetxattr(to, OPAQUE, "y", 1, 0) < 0)
            refuse(errno, "write the directory /%s", path);
        close(to);
    }
    give_back(before);
    for (int i = 0; i < count + n_deeper; i++)
        close(inside[i].fd);
    free(inside);
    depth--;
}

/* What the layers below have under a name: see BELOW at the top. */
static char look_below(const struct place *under, int n_under, const char *name, const struct stat *st, uint32_t base) {
    for (int i = 0; i < n_under; i++) {
        struct stat seen;
        if (fstatat(under[i].fd, name, &seen, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if (is_whiteout(&seen))
            return '0';
        bool same = (seen.st_mode == st->st_mode) && inner_below(seen.st_uid, &under[i], 0) == inner(st->st_uid, base) &&
                    inner_below(seen.st_gid, &under[i], 1) == inner(st->st_gid, base);
        return same ? '=' : '~';
    }
    return '0';
}

static void walk(const struct place *in, int n, const struct place *under, int n_under, int dest) {
    uint32_t count;
    struct name *names = read_names(in, n, &count);
    for (uint32_t i = 0; i < count; i++) {
        const char *name = names[i].text;
        const struct place *from = &in[names[i].source];
        struct stat st;
        size_t before = push_path(name);
        if (fstatat(from->fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
            char below = look_below(under, n_under, name, &st, from->base);
            if (S_ISDIR(st.st_mode))
                take_directory(in, names[i].source, n, under, n_under, name, dest, below);
            else if (S_ISREG(st.st_mode))
                take_file(from, name, dest, below);
            else if (S_ISLNK(st.st_mode))
                take_link(from, name, &st, dest, below);
            else
                take_node(from, name, &st, dest, below);
        } else if (errno != ENOENT) {
            refuse(errno, "look at /%s", path);
        }
        pop_path(before);
        free(names[i].text);
    }
    free(names);
}

static int take_places(struct payload *p, struct place *out, bool ours) {
    uint32_t count = take_u32(p);
    if (count > 512)
        p->bad = true;
    for (uint32_t i = 0; i < count && !p->bad; i++) {
        uint32_t base = take_u32(p);
        const char *where = take_str(p);
        struct swap *swaps = NULL;
        if (take_u32(p)) {
            swaps = must(calloc(2, sizeof *swaps));
            for (int j = 0; j < 2; j++) {
                swaps[j].disk = take_u32(p);
                swaps[j].guest = take_u32(p);
            }
        }
        if (p->bad)
            break;
        out[i] = open_directory(AT_FDCWD, where, base, ours);
        if (out[i].fd < 0)
            refuse(errno, "open the layer %s", where);
        out[i].swaps = swaps;
    }
    return p->bad ? 0 : (int)count;
}

void seal_layer(int node, uint32_t id, int payload_fd) {
    node_sock = node;
    request_id = id;
    umask(0); /* every mode is given in full */
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    push_path("");
    struct payload p = read_payload(payload_fd);
    if (!p.at)
        refuse(errno, "read the request");
    range = take_u32(&p);
    single_id = take_u32(&p);
    to_base = take_u32(&p);
    const char *dest = take_str(&p), *list_path = take_str(&p);
    n_sources = take_places(&p, sources, true);
    n_lower = take_places(&p, lower, false);
    if (p.bad || n_sources < 1)
        refuse(EBADMSG, "read the request");
    if (*dest && (mkdir(dest, 0700) < 0 || (dest_root = open(dest, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0))
        refuse(errno, "make %s", dest);
    int list_fd = open(list_path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (list_fd < 0 || !(listing = fdopen(list_fd, "w")))
        refuse(errno, "make %s", list_path);
    sha256_begin(&digest);
    struct stat st;
    if (fstat(sources[0].fd, &st) < 0)
        refuse(errno, "read the layer");
    if (sources[0].mode >= 0)
        st.st_mode = S_IFDIR | (mode_t)sources[0].mode;
    list('d', &st, sources[0].base, '=', false, "-");
    walk(sources, n_sources, lower, n_lower, dest_root);
    if (dest_root >= 0)
        finish(sources[0].fd, dest_root, &st, sources[0].base);
    give_back(0);
    if (fclose(listing) != 0)
        refuse(errno, "write the listing");
    char text[65];
    sha256_end(&digest, text);
    struct message m = {.op = L_SEALED, .id = id};
    snprintf(m.text, sizeof m.text, "%llu %llu %s", (unsigned long long)entries, (unsigned long long)bytes, text);
    send_message(node, &m, HEAD + strlen(m.text), NULL, 0);
    _exit(0);
}
