/* Resolves a user by the guest's own /etc/passwd and /etc/group, with a small bounded parser.
 *
 * Runs in the child of PID 1 that is about to become that user. The files are the guest's and hostile: only regular
 * files, at most MAX_FILE bytes, over-long or odd lines are skipped. What they say gives no right over anything but
 * the guest's own ids; PID 1's id is refused.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILE (1 << 20)

static char *read_text(const char *path) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    struct stat st;
    if (fd < 0)
        return NULL;
    char *text = NULL;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (text = malloc(MAX_FILE + 1))) {
        size_t have = 0;
        ssize_t got;
        while (have < MAX_FILE && (got = read(fd, text + have, MAX_FILE - have)) > 0)
            have += (size_t)got;
        text[have] = 0;
    }
    close(fd);
    return text;
}

static bool parse_id(const char *text, uint32_t *out) {
    if (!*text || strlen(text) > 10)
        return false;
    uint64_t value = 0;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return false;
        value = value * 10 + (uint64_t)(*text - '0');
    }
    if (value >= UINT32_MAX)
        return false;
    *out = (uint32_t)value;
    return true;
}

/* Cut the next line into `want` colon-separated fields. False at the end; fields[0] is NULL for a line to skip. */
static bool next_line(char **at, char **fields, int want) {
    if (!*at || !**at)
        return false;
    char *line = *at, *stop = strchr(line, '\n');
    *at = stop ? stop + 1 : line + strlen(line);
    if (stop)
        *stop = 0;
    fields[0] = NULL;
    if (strlen(line) > 4096 || *line == '#')
        return true;
    char *parts[8];
    int n = 0;
    while (n < want) {
        parts[n++] = line;
        char *colon = strchr(line, ':');
        if (!colon)
            break;
        *colon = 0;
        line = colon + 1;
    }
    if (n == want)
        memcpy(fields, parts, sizeof *fields * (size_t)want);
    return true;
}

static void find_groups(struct user *out) {
    char *text = read_text("/etc/group"), *at = text, *f[4];
    uint32_t gid;
    while (next_line(&at, f, 4) && out->n_groups < 64) {
        if (!f[0] || !parse_id(f[2], &gid) || gid >= WARDEN_UID)
            continue;
        char *rest = f[3], *member;
        while ((member = strsep(&rest, ",")) != NULL)
            if (strcmp(member, out->name) == 0) {
                out->groups[out->n_groups++] = gid;
                break;
            }
    }
    free(text);
}

int find_user(const char *wanted, struct user *out) {
    memset(out, 0, sizeof *out);
    strcpy(out->home, "/");
    char first[64];
    if (strlen(wanted) >= sizeof first || !*wanted)
        return -EINVAL;
    strcpy(first, wanted);
    char *colon = strchr(first, ':');
    uint32_t gid = 0, uid = 0;
    if (colon) {
        *colon = 0;
        if (!parse_id(colon + 1, &gid))
            return -EINVAL;
    }
    bool numeric = parse_id(first, &uid), found = false;
    char *text = read_text("/etc/passwd"), *at = text, *f[7];
    while (!found && next_line(&at, f, 7)) {
        uint32_t u, g;
        if (!f[0] || !parse_id(f[2], &u) || !parse_id(f[3], &g))
            continue;
        if (numeric ? u != uid : strcmp(f[0], first) != 0)
            continue;
        found = true;
        out->uid = u;
        out->gid = g;
        if (strlen(f[0]) < sizeof out->name)
            strcpy(out->name, f[0]);
        if (f[5][0] == '/' && strlen(f[5]) < sizeof out->home)
            strcpy(out->home, f[5]);
    }
    free(text);
    if (!found && numeric) {
        out->uid = uid;
        out->gid = uid;
    } else if (!found && strcmp(first, "root") == 0) {
        strcpy(out->name, "root");
    } else if (!found) {
        return -ENOENT;
    }
    if (colon)
        out->gid = gid;
    if (out->uid >= WARDEN_UID || out->gid >= WARDEN_UID)
        return -EPERM;
    if (out->name[0])
        find_groups(out);
    return 0;
}
