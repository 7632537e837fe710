/* The network of a cell: only lo, every address local to it, and doors that the gateway serves from outside.
 *
 * `local default dev lo` makes every IPv4 and IPv6 address one of the cell's own (AnyIP). nftables redirects TCP that
 * does not go to loopback to one port, where our listeners are; UDP to port 53 of any address reaches our socket with
 * no NAT at all. Everything else is reported to NFLOG group 1 and dropped, which the sender sees as EPERM at once.
 * All of it by raw netlink: no helper program, no library.
 *
 * Covered: TCP, UDP, ICMP and other protocols of both address families; a guest without capabilities cannot change it.
 * Not covered: what the guest says to itself over 127.0.0.0/8 and ::1, which stays inside.
 */
#define _GNU_SOURCE
#include "proto.h"

#include <arpa/inet.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define TABLE "vallum"
#define LOG_GROUP 1
#define SNAPLEN 128
#define LO_INDEX 1 /* the first device of every network namespace */

static char batch[8192];
static size_t used;
static uint32_t sequence, acks_due;

static void *put(const void *data, size_t size) {
    size_t whole = NLMSG_ALIGN(size);
    if (used + whole > sizeof batch)
        fail(ENOBUFS, "encode the network rules");
    char *at = batch + used;
    memset(at, 0, whole);
    if (data)
        memcpy(at, data, size);
    used += whole;
    return at;
}

static struct nlmsghdr *begin(uint16_t type, uint16_t flags) {
    struct nlmsghdr *head = put(NULL, sizeof *head);
    *head = (struct nlmsghdr){.nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags, .nlmsg_seq = ++sequence};
    if (flags & NLM_F_ACK)
        acks_due++;
    return head;
}

static void end(struct nlmsghdr *head) { head->nlmsg_len = (uint32_t)(batch + used - (char *)head); }

static void attr(uint16_t type, const void *data, size_t size) {
    struct nlattr a = {.nla_len = (uint16_t)(NLA_HDRLEN + size), .nla_type = type};
    put(&a, sizeof a);
    put(data, size);
}

static void attr_str(uint16_t type, const char *text) { attr(type, text, strlen(text) + 1); }

static void attr_be32(uint16_t type, uint32_t value) {
    value = htonl(value);
    attr(type, &value, 4);
}

static struct nlattr *nest(uint16_t type) {
    struct nlattr a = {.nla_type = type | NLA_F_NESTED};
    return put(&a, sizeof a);
}

static void unnest(struct nlattr *a) { a->nla_len = (uint16_t)(batch + used - (char *)a); }

/* Send what was encoded and wait until the kernel has taken all of it. 0 or an errno. */
static int commit(int sock) {
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    ssize_t sent = sendto(sock, batch, used, 0, (struct sockaddr *)&kernel, sizeof kernel);
    int err = sent < 0 ? errno : 0;
    char answer[8192];
    while (!err && acks_due) {
        ssize_t got = recv(sock, answer, sizeof answer, 0);
        if (got < 0) {
            err = errno == EINTR ? 0 : errno;
            continue;
        }
        size_t left = (size_t)got;
        for (struct nlmsghdr *m = (struct nlmsghdr *)answer; NLMSG_OK(m, left); m = NLMSG_NEXT(m, left)) {
            if (m->nlmsg_type != NLMSG_ERROR)
                continue;
            int code = ((struct nlmsgerr *)NLMSG_DATA(m))->error;
            if (code && !err)
                err = -code;
            if (acks_due)
                acks_due--;
        }
    }
    used = 0;
    acks_due = 0;
    return err;
}

static void add_route(uint8_t family) {
    struct nlmsghdr *m = begin(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK);
    put(&(struct rtmsg){.rtm_family = family, .rtm_table = RT_TABLE_LOCAL, .rtm_protocol = RTPROT_BOOT, .rtm_scope = RT_SCOPE_HOST, .rtm_type = RTN_LOCAL}, sizeof(struct rtmsg));
    uint32_t lo = LO_INDEX;
    attr(RTA_OIF, &lo, 4);
    end(m);
}

static void set_up_lo(bool v6) {
    int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (sock < 0)
        fail(errno, "open a route socket");
    struct nlmsghdr *m = begin(RTM_NEWLINK, NLM_F_ACK);
    put(&(struct ifinfomsg){.ifi_family = AF_UNSPEC, .ifi_index = LO_INDEX, .ifi_flags = IFF_UP, .ifi_change = IFF_UP}, sizeof(struct ifinfomsg));
    end(m);
    int err = commit(sock);
    if (err)
        fail(err, "bring the loopback device up");
    add_route(AF_INET);
    if ((err = commit(sock)))
        fail(err, "make every IPv4 address local to the cell");
    if (v6) {
        add_route(AF_INET6);
        if ((err = commit(sock)))
            fail(err, "make every IPv6 address local to the cell");
    }
    close(sock);
}

/* --- nftables expressions --- */

static void nft_begin(struct nlmsghdr **m, uint16_t type, uint16_t flags) {
    *m = begin((uint16_t)(NFNL_SUBSYS_NFTABLES << 8 | type), flags | NLM_F_ACK);
    put(&(struct nfgenmsg){.nfgen_family = NFPROTO_INET, .version = NFNETLINK_V0}, sizeof(struct nfgenmsg));
}

static struct nlattr *expr_begin(const char *name, struct nlattr **data) {
    struct nlattr *elem = nest(NFTA_LIST_ELEM);
    attr_str(NFTA_EXPR_NAME, name);
    *data = nest(NFTA_EXPR_DATA);
    return elem;
}

static void expr_end(struct nlattr *elem, struct nlattr *data) {
    unnest(data);
    unnest(elem);
}

static void load_meta(uint32_t key) {
    struct nlattr *d, *e = expr_begin("meta", &d);
    attr_be32(NFTA_META_KEY, key);
    attr_be32(NFTA_META_DREG, NFT_REG_1);
    expr_end(e, d);
}

static void load_payload(uint32_t base, uint32_t offset, uint32_t size) {
    struct nlattr *d, *e = expr_begin("payload", &d);
    attr_be32(NFTA_PAYLOAD_DREG, NFT_REG_1);
    attr_be32(NFTA_PAYLOAD_BASE, base);
    attr_be32(NFTA_PAYLOAD_OFFSET, offset);
    attr_be32(NFTA_PAYLOAD_LEN, size);
    expr_end(e, d);
}

static void compare(uint32_t op, const void *value, size_t size) {
    struct nlattr *d, *e = expr_begin("cmp", &d);
    attr_be32(NFTA_CMP_SREG, NFT_REG_1);
    attr_be32(NFTA_CMP_OP, op);
    struct nlattr *v = nest(NFTA_CMP_DATA);
    attr(NFTA_DATA_VALUE, value, size);
    unnest(v);
    expr_end(e, d);
}

static void verdict(uint32_t code) {
    struct nlattr *d, *e = expr_begin("immediate", &d);
    attr_be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
    struct nlattr *v = nest(NFTA_IMMEDIATE_DATA), *w = nest(NFTA_DATA_VERDICT);
    attr_be32(NFTA_VERDICT_CODE, code);
    unnest(w);
    unnest(v);
    expr_end(e, d);
}

static void redirect(uint16_t port) {
    struct nlattr *d, *e = expr_begin("immediate", &d);
    attr_be32(NFTA_IMMEDIATE_DREG, NFT_REG_1);
    struct nlattr *v = nest(NFTA_IMMEDIATE_DATA);
    uint16_t be = htons(port);
    attr(NFTA_DATA_VALUE, &be, 2);
    unnest(v);
    expr_end(e, d);
    e = expr_begin("redir", &d);
    attr_be32(NFTA_REDIR_REG_PROTO_MIN, NFT_REG_1);
    expr_end(e, d);
}

static void log_it(void) {
    struct nlattr *d, *e = expr_begin("log", &d);
    uint16_t group = htons(LOG_GROUP), threshold = htons(1);
    attr(NFTA_LOG_GROUP, &group, 2);
    attr_be32(NFTA_LOG_SNAPLEN, SNAPLEN);
    attr(NFTA_LOG_QTHRESHOLD, &threshold, 2);
    expr_end(e, d);
}

static void match_family(uint8_t family) {
    load_meta(NFT_META_NFPROTO);
    compare(NFT_CMP_EQ, &family, 1);
}

static void match_protocol(uint8_t protocol) {
    load_meta(NFT_META_L4PROTO);
    compare(NFT_CMP_EQ, &protocol, 1);
}

static void match_loopback4(uint32_t op) {
    uint8_t first = 127;
    load_payload(NFT_PAYLOAD_NETWORK_HEADER, 16, 1);
    compare(op, &first, 1);
}

static void match_loopback6(uint32_t op) {
    load_payload(NFT_PAYLOAD_NETWORK_HEADER, 24, 16);
    compare(op, &in6addr_loopback, 16);
}

static void match_port(uint32_t offset, uint16_t port) {
    uint16_t be = htons(port);
    load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, offset, 2);
    compare(NFT_CMP_EQ, &be, 2);
}

static struct nlmsghdr *rule_message;
static struct nlattr *rule_nest;

static void rule_begin(const char *chain) {
    nft_begin(&rule_message, NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND);
    attr_str(NFTA_RULE_TABLE, TABLE);
    attr_str(NFTA_RULE_CHAIN, chain);
    rule_nest = nest(NFTA_RULE_EXPRESSIONS);
}

static void rule_end(void) {
    unnest(rule_nest);
    end(rule_message);
}

static void add_chain(const char *name, const char *type, int priority, uint32_t policy) {
    struct nlmsghdr *m;
    nft_begin(&m, NFT_MSG_NEWCHAIN, NLM_F_CREATE);
    attr_str(NFTA_CHAIN_TABLE, TABLE);
    attr_str(NFTA_CHAIN_NAME, name);
    struct nlattr *hook = nest(NFTA_CHAIN_HOOK);
    attr_be32(NFTA_HOOK_HOOKNUM, NF_INET_LOCAL_OUT);
    attr_be32(NFTA_HOOK_PRIORITY, (uint32_t)priority);
    unnest(hook);
    attr_be32(NFTA_CHAIN_POLICY, policy);
    attr_str(NFTA_CHAIN_TYPE, type);
    end(m);
}

static void batch_edge(uint16_t type) {
    struct nlmsghdr *m = begin(type, 0);
    put(&(struct nfgenmsg){.nfgen_family = AF_UNSPEC, .res_id = htons(NFNL_SUBSYS_NFTABLES)}, sizeof(struct nfgenmsg));
    end(m);
}

static int set_rules(uint16_t port, bool with_log) {
    int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
    if (sock < 0)
        return errno;
    int big = 1 << 17;
    setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &big, sizeof big);
    struct nlmsghdr *m;
    batch_edge(NFNL_MSG_BATCH_BEGIN);
    nft_begin(&m, NFT_MSG_NEWTABLE, NLM_F_CREATE);
    attr_str(NFTA_TABLE_NAME, TABLE);
    end(m);
    add_chain("out", "nat", -100, NF_ACCEPT);
    rule_begin("out"), match_protocol(IPPROTO_TCP), match_family(NFPROTO_IPV4), match_loopback4(NFT_CMP_NEQ), redirect(port), rule_end();
    rule_begin("out"), match_protocol(IPPROTO_TCP), match_family(NFPROTO_IPV6), match_loopback6(NFT_CMP_NEQ), redirect(port), rule_end();
    /* After the redirect. What no rule accepts is dropped by the chain's policy, also if a rule were missing. */
    add_chain("rest", "filter", 0, NF_DROP);
    rule_begin("rest"), match_protocol(IPPROTO_TCP), verdict(NF_ACCEPT), rule_end();
    rule_begin("rest"), match_family(NFPROTO_IPV4), match_loopback4(NFT_CMP_EQ), verdict(NF_ACCEPT), rule_end();
    rule_begin("rest"), match_family(NFPROTO_IPV6), match_loopback6(NFT_CMP_EQ), verdict(NF_ACCEPT), rule_end();
    rule_begin("rest"), match_protocol(IPPROTO_UDP), match_port(2, 53), verdict(NF_ACCEPT), rule_end(); /* queries */
    rule_begin("rest"), match_protocol(IPPROTO_UDP), match_port(0, 53), verdict(NF_ACCEPT), rule_end(); /* answers */
    if (with_log)
        rule_begin("rest"), log_it(), verdict(NF_DROP), rule_end();
    batch_edge(NFNL_MSG_BATCH_END);
    int err = commit(sock);
    close(sock);
    return err;
}

/* A socket that hears of every dropped packet: the first bytes, protocol, and the sender's user. -1 with errno. */
static int open_packets(void) {
    int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_NETFILTER);
    if (sock < 0)
        return -1;
    struct nlmsghdr *m = begin(NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG, NLM_F_ACK);
    put(&(struct nfgenmsg){.nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(LOG_GROUP)}, sizeof(struct nfgenmsg));
    struct nfulnl_msg_config_cmd cmd = {.command = NFULNL_CFG_CMD_BIND};
    struct nfulnl_msg_config_mode mode = {.copy_range = htonl(SNAPLEN), .copy_mode = NFULNL_COPY_PACKET};
    attr(NFULA_CFG_CMD, &cmd, sizeof cmd);
    attr(NFULA_CFG_MODE, &mode, sizeof mode);
    attr_be32(NFULA_CFG_TIMEOUT, 1); /* 10 ms */
    attr_be32(NFULA_CFG_QTHRESH, 1);
    end(m);
    struct sockaddr_nl me = {.nl_family = AF_NETLINK};
    int err = bind(sock, (struct sockaddr *)&me, sizeof me) < 0 ? errno : 0, room = 1 << 20;
    if (!err)
        err = commit(sock); /* netlink answers within sendto(), so a non-blocking socket does as well */
    used = 0;
    acks_due = 0;
    if (err) {
        close(sock);
        errno = err;
        return -1;
    }
    setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    return sock;
}

static int open_door(int family, int type, uint16_t port) {
    int fd = socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0)
        return -1;
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    if (type == SOCK_STREAM) {
        v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        v6.sin6_addr = in6addr_loopback;
    }
    int result = 0;
    if (family == AF_INET6)
        result = setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (result == 0 && type == SOCK_DGRAM)
        result = family == AF_INET ? setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof on) : setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
    /* So that an answer may come from the address that was asked. */
    if (result == 0 && type == SOCK_DGRAM)
        result = family == AF_INET ? setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &on, sizeof on) : setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &on, sizeof on);
    if (result == 0)
        result = family == AF_INET ? bind(fd, (struct sockaddr *)&v4, sizeof v4) : bind(fd, (struct sockaddr *)&v6, sizeof v6);
    if (result == 0 && type == SOCK_STREAM)
        result = listen(fd, 1024);
    if (result == 0)
        return fd;
    int err = errno;
    close(fd);
    errno = err;
    return -1;
}

static void hand_out(struct doors *doors, uint32_t which, int fd, const char *what) {
    if (fd < 0)
        fail(errno, "open %s", what);
    doors->mask |= which;
    doors->fds[doors->count++] = fd;
}

void open_network(const struct spec *s, struct doors *doors) {
    int probe = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool v6 = probe >= 0; /* else the kernel has no IPv6 at all, for the guest as well */
    if (v6)
        close(probe);
    uint16_t port = (uint16_t)s->port;
    int packets = open_packets();
    int err = set_rules(port, packets >= 0);
    if (err && packets >= 0) { /* the log expression may be what is missing */
        close(packets);
        packets = -1;
        err = set_rules(port, false);
    }
    if (err)
        fail(err, "load the nftables rules of the cell");
    set_up_lo(v6);
    hand_out(doors, DOOR_TCP4, open_door(AF_INET, SOCK_STREAM, port), "the TCP door");
    hand_out(doors, DOOR_DNS4, open_door(AF_INET, SOCK_DGRAM, 53), "the DNS door");
    if (v6) {
        hand_out(doors, DOOR_TCP6, open_door(AF_INET6, SOCK_STREAM, port), "the IPv6 TCP door");
        hand_out(doors, DOOR_DNS6, open_door(AF_INET6, SOCK_DGRAM, 53), "the IPv6 DNS door");
    }
    int diag = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_SOCK_DIAG);
    if (diag >= 0)
        hand_out(doors, DOOR_DIAG, diag, "the socket diagnosis");
    if (packets >= 0)
        hand_out(doors, DOOR_PACKETS, packets, "the packet log");
}
