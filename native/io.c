/* Messages with descriptors, and payloads in memfds. */
#define _GNU_SOURCE
#include "proto.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

int send_message(int sock, const void *data, size_t size, const int *fds, int count) {
    union {
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec vec = {(void *)data, size};
    struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1};
    if (count > 0) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.room;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(head), fds, sizeof(int) * count);
    }
    ssize_t sent;
    do
        sent = sendmsg(sock, &msg, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -1 : 0;
}

/* Bytes received (0 at the end of the socket), -1 with errno. *count goes in as room, comes out as number. */
ssize_t recv_message(int sock, void *data, size_t size, int *fds, int *count) {
    union {
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec vec = {data, size};
    struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    int room = *count;
    *count = 0;
    ssize_t got;
    do
        got = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&msg); head; head = CMSG_NXTHDR(&msg, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        int n = (int)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof fd);
            if (*count < room)
                fds[(*count)++] = fd;
            else
                close(fd);
        }
    }
    return got;
}

void close_fds(const int *fds, int count) {
    for (int i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

int raise_fd(int fd) {
    int high = fcntl(fd, F_DUPFD_CLOEXEC, 400);
    if (high >= 0)
        close(fd);
    return high;
}

int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t size = (ssize_t)strlen(text), put = write(fd, text, size);
    int err = put < 0 ? errno : EIO;
    close(fd);
    if (put == size)
        return 0;
    errno = err;
    return -1;
}

struct payload read_payload(int fd) {
    struct payload p = {0};
    struct stat st;
    if (fstat(fd, &st) < 0)
        return p;
    if (st.st_size < 4 || (uint64_t)st.st_size > MAX_PAYLOAD) {
        errno = E2BIG;
        return p;
    }
    /* A private mapping: strings are used in place, and later writes of the sender are of no matter after a touch. */
    char *base = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (base == MAP_FAILED)
        return p;
    p.at = base;
    p.end = base + st.st_size;
    p.base = base;
    p.size = (size_t)st.st_size;
    return p;
}

uint32_t take_u32(struct payload *p) {
    uint32_t value = 0;
    if (p->end - p->at < 4) {
        p->bad = true;
        return 0;
    }
    memcpy(&value, p->at, 4);
    p->at += 4;
    return value;
}

const char *take_str(struct payload *p) {
    uint32_t size = take_u32(p);
    if (p->bad || (uint64_t)(p->end - p->at) < (uint64_t)size + 1 || p->at[size] != 0 || memchr(p->at, 0, size)) {
        p->bad = true;
        return "";
    }
    const char *text = p->at;
    p->at += (size_t)size + 1;
    return text;
}

const char **take_list(struct payload *p, uint32_t *count, uint32_t most) {
    uint32_t n = take_u32(p);
    if (n > most || (uint64_t)n * 5 > (uint64_t)(p->end - p->at)) {
        p->bad = true;
        n = 0;
    }
    const char **list = calloc((size_t)n + 1, sizeof *list);
    if (!list) {
        p->bad = true;
        n = 0;
        static const char *none[1];
        list = none;
    }
    for (uint32_t i = 0; i < n; i++)
        list[i] = take_str(p);
    *count = n;
    return list;
}
