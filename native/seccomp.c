/* The seccomp filter of a cell: an allow-list (calls.h) with looks at the arguments of a few calls.
 *
 * Covered: io_uring, bpf, keyrings, userfaultfd, perf, mounts, new namespaces, modules, kexec, handles; socket families
 * other than UNIX, INET, INET6 and route netlink (so no AF_ALG, AF_PACKET, AF_VSOCK, AF_XDP); TIOCSTI, TIOCLINUX and
 * TIOCSETD; foreign architectures and x32 (the process is killed).
 * Not covered: what an allowed call does in the kernel. ptrace is allowed: it reaches only processes of the same user
 * of the same cell.
 *
 * Arguments are compared in their low 32 bits only, as the kernel itself takes them (int, unsigned int, or flags of
 * which it ignores the rest), so high bits cannot slip one through.
 */
#define _GNU_SOURCE
#include "proto.h"
#include "calls.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "vallum-cell knows the system calls of x86_64 and aarch64 only"
#endif

#define NEW_NAMESPACES 0x7E020000u /* CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} */
#define NEW_TIME 0x80u             /* CLONE_NEWTIME, of unshare only */

static struct sock_filter code[1600];
static unsigned short size;

static void op(uint16_t what, uint32_t k, uint8_t yes, uint8_t no) {
    if (size < sizeof code / sizeof *code)
        code[size] = (struct sock_filter){what, yes, no, k};
    size++;
}

static void ret(uint32_t action) { op(BPF_RET | BPF_K, action, 0, 0); }
static void load(size_t offset) { op(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0); }
static void load_nr(void) { load(offsetof(struct seccomp_data, nr)); }
static void load_arg(int n) { load(offsetof(struct seccomp_data, args) + 8 * (size_t)n); } /* both are little-endian: the low half */
static void skip_unless(uint32_t value, uint8_t count) { op(BPF_JMP | BPF_JEQ | BPF_K, value, 0, count); }
static void ret_if(uint32_t value, uint32_t action) {
    skip_unless(value, 1);
    ret(action);
}

#define ALLOW SECCOMP_RET_ALLOW
#define DENY(err) (SECCOMP_RET_ERRNO | (err))

/* Code between these two runs for one system call only, and must end by returning. */
static unsigned short call_begin(int nr) {
    skip_unless((uint32_t)nr, 0);
    return (unsigned short)(size - 1);
}
static void call_end(unsigned short jump) { code[jump].jf = (uint8_t)(size - jump - 1); }

static void look_at_arguments(void) {
    unsigned short jump;

    jump = call_begin(__NR_clone);
    load_arg(0);
    op(BPF_JMP | BPF_JSET | BPF_K, NEW_NAMESPACES, 0, 1);
    ret(DENY(EPERM));
    ret(ALLOW);
    call_end(jump);

    jump = call_begin(__NR_unshare);
    load_arg(0);
    op(BPF_JMP | BPF_JSET | BPF_K, NEW_NAMESPACES | NEW_TIME, 0, 1);
    ret(DENY(EPERM));
    ret(ALLOW);
    call_end(jump);

    jump = call_begin(__NR_socket);
    load_arg(0);
    ret_if(1, ALLOW);           /* AF_UNIX */
    skip_unless(16, 3);         /* AF_NETLINK: only NETLINK_ROUTE, which C libraries ask for addresses */
    load_arg(2);
    ret_if(0, ALLOW);
    load_arg(0);
    op(BPF_JMP | BPF_JEQ | BPF_K, 2, 2, 0); /* AF_INET */
    op(BPF_JMP | BPF_JEQ | BPF_K, 10, 1, 0); /* AF_INET6 */
    ret(DENY(EAFNOSUPPORT));
    load_arg(2);
    ret_if(0, ALLOW);
    ret_if(6, ALLOW);   /* TCP */
    ret_if(17, ALLOW);  /* UDP */
    ret_if(1, ALLOW);   /* ICMP: the kernel decides, and refuses */
    ret_if(58, ALLOW);  /* ICMPv6 */
    ret_if(255, ALLOW); /* raw: the kernel refuses it without CAP_NET_RAW */
    ret(DENY(EPROTONOSUPPORT)); /* SCTP, DCCP, MPTCP, UDP-Lite, L2TP: only attack surface in a cell */
    call_end(jump);

    jump = call_begin(__NR_socketpair);
    load_arg(0);
    ret_if(1, ALLOW);
    ret(DENY(EAFNOSUPPORT));
    call_end(jump);

    jump = call_begin(__NR_ioctl);
    load_arg(1);
    ret_if(0x5412, DENY(EPERM)); /* TIOCSTI: types into another's terminal */
    ret_if(0x541C, DENY(EPERM)); /* TIOCLINUX */
    ret_if(0x5423, DENY(EPERM)); /* TIOCSETD: loads line disciplines, a source of kernel bugs */
    ret(ALLOW);
    call_end(jump);

    jump = call_begin(__NR_personality);
    load_arg(0);
    ret_if(0, ALLOW);
    ret_if(0x0008, ALLOW);     /* PER_LINUX32 */
    ret_if(0x20000, ALLOW);    /* UNAME26 */
    ret_if(0x20008, ALLOW);
    ret_if(0x40000, ALLOW);    /* ADDR_NO_RANDOMIZE: debuggers */
    ret_if(0xffffffffu, ALLOW); /* asks */
    ret(DENY(EPERM));
    call_end(jump);

    /* A core limit of 0 would bring the host's core handler back (see drop_everything()): say yes and do nothing. */
    jump = call_begin(__NR_prlimit64);
    load_arg(2);
    skip_unless(0, 3); /* a null pointer only asks */
    load(offsetof(struct seccomp_data, args) + 8 * 2 + 4);
    skip_unless(0, 1);
    ret(ALLOW);
    load_arg(0);
    op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0);
    ret(DENY(EPERM)); /* another process: in a rootless cell PID 1 and its keepers are of the guest's user */
    load_arg(1);
    ret_if(4, DENY(0)); /* RLIMIT_CORE */
    ret(ALLOW);
    call_end(jump);

    jump = call_begin(__NR_setrlimit);
    load_arg(0);
    ret_if(4, DENY(0));
    ret(ALLOW);
    call_end(jump);
}

static int install(void) {
    if (size > sizeof code / sizeof *code) {
        errno = E2BIG;
        return -1;
    }
    struct sock_fprog program = {size, code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static void check_arch(void) {
    size = 0;
    load(offsetof(struct seccomp_data, arch));
    op(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
    ret(SECCOMP_RET_KILL_PROCESS);
    load_nr();
#ifdef __x86_64__
    op(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1); /* x32 */
    ret(SECCOMP_RET_KILL_PROCESS);
#endif
}

#define CALLS 1024 /* above every number in calls.h */
static uint32_t actions[CALLS];

/* Decide among the numbers from..to-1 by bisection. The kernel runs a new filter once for every number there is, to
 * remember which are always allowed: short paths make installing it ten times faster than a list does. */
static void bisect(const uint16_t *starts, int from, int to) {
    if (to - from == 1) {
        ret(actions[starts[from]]);
        return;
    }
    int middle = (from + to) / 2;
    op(BPF_JMP | BPF_JGE | BPF_K, starts[middle], 0, 1);
    unsigned short jump = size;
    op(BPF_JMP | BPF_JA, 0, 0, 0);
    bisect(starts, from, middle);
    if (jump < sizeof code / sizeof *code)
        code[jump].k = (uint32_t)(size - jump - 1);
    bisect(starts, middle, to);
}

/* With CAP_SETUID root could become PID 1's user, whom the kernel lets change PID 1's limits and priority. Nobody does. */
static void refuse_warden(int nr, int ids) {
    unsigned short jump = call_begin(nr);
    for (int n = 0; n < ids; n++) {
        load_arg(n);
        ret_if(WARDEN_UID, DENY(EPERM));
    }
    ret(ALLOW);
    call_end(jump);
}

/* For PID 1 and everything it starts. Preconditions: no_new_privs; PID 1 has its user already. */
int install_walls(bool owner) {
    check_arch();
    look_at_arguments();
    if (owner) {
        refuse_warden(__NR_setuid, 1), refuse_warden(__NR_setreuid, 2), refuse_warden(__NR_setresuid, 3), refuse_warden(__NR_setfsuid, 1);
        refuse_warden(__NR_setgid, 1), refuse_warden(__NR_setregid, 2), refuse_warden(__NR_setresgid, 3), refuse_warden(__NR_setfsgid, 1);
    }
    for (int nr = 0; nr < CALLS; nr++)
        actions[nr] = DENY(ENOSYS);
    for (size_t i = 0; i < sizeof allowed_calls / sizeof *allowed_calls; i++)
        actions[allowed_calls[i]] = ALLOW;
    for (size_t i = 0; i < sizeof denied_calls / sizeof *denied_calls; i++)
        actions[denied_calls[i]] = DENY(EPERM);
    static uint16_t starts[CALLS];
    int count = 0;
    for (int nr = 0; nr < CALLS; nr++)
        if (nr == 0 || actions[nr] != actions[nr - 1])
            starts[count++] = (uint16_t)nr;
    bisect(starts, 0, count);
    return install();
}

/* For commands: clone3's flags are behind a pointer where a filter cannot look, so it is not there; C libraries fall
 * back to clone. PID 1 itself needs it. */
int install_fork_wall(void) {
    check_arch();
    ret_if(__NR_clone3, DENY(ENOSYS));
    ret(ALLOW);
    return install();
}
