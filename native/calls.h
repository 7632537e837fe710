/* The system calls a guest may make, by name. What is in neither list does not exist for it (ENOSYS). */
#ifndef VALLUM_CALLS_H
#define VALLUM_CALLS_H
#include <asm/unistd.h>

/* Newer than the headers of some supported distributions; the numbers are those of every architecture. */
#ifndef __NR_close_range
#define __NR_close_range 436
#endif
#ifndef __NR_openat2
#define __NR_openat2 437
#endif
#ifndef __NR_pidfd_getfd
#define __NR_pidfd_getfd 438
#endif
#ifndef __NR_faccessat2
#define __NR_faccessat2 439
#endif
#ifndef __NR_process_madvise
#define __NR_process_madvise 440
#endif
#ifndef __NR_epoll_pwait2
#define __NR_epoll_pwait2 441
#endif
#ifndef __NR_mount_setattr
#define __NR_mount_setattr 442
#endif
#ifndef __NR_quotactl_fd
#define __NR_quotactl_fd 443
#endif
#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#endif
#ifndef __NR_landlock_add_rule
#define __NR_landlock_add_rule 445
#endif
#ifndef __NR_landlock_restrict_self
#define __NR_landlock_restrict_self 446
#endif
#ifndef __NR_process_mrelease
#define __NR_process_mrelease 448
#endif
#ifndef __NR_futex_waitv
#define __NR_futex_waitv 449
#endif
#ifndef __NR_set_mempolicy_home_node
#define __NR_set_mempolicy_home_node 450
#endif
#ifndef __NR_cachestat
#define __NR_cachestat 451
#endif
#ifndef __NR_fchmodat2
#define __NR_fchmodat2 452
#endif
#ifndef __NR_map_shadow_stack
#define __NR_map_shadow_stack 453
#endif
#ifndef __NR_futex_wake
#define __NR_futex_wake 454
#endif
#ifndef __NR_futex_wait
#define __NR_futex_wait 455
#endif
#ifndef __NR_futex_requeue
#define __NR_futex_requeue 456
#endif
#ifndef __NR_mseal
#define __NR_mseal 462
#endif
#ifndef __NR_setxattrat
#define __NR_setxattrat 463
#endif
#ifndef __NR_getxattrat
#define __NR_getxattrat 464
#endif
#ifndef __NR_listxattrat
#define __NR_listxattrat 465
#endif
#ifndef __NR_removexattrat
#define __NR_removexattrat 466
#endif

#define SYS(name) __NR_##name

static const int allowed_calls[] = {
    SYS(accept), SYS(accept4), SYS(adjtimex), SYS(bind), SYS(brk), SYS(cachestat), SYS(capget), SYS(capset), SYS(chdir), SYS(clock_getres),
    SYS(clock_gettime), SYS(clock_nanosleep), SYS(close), SYS(close_range), SYS(connect), SYS(copy_file_range), SYS(dup), SYS(dup3),
    SYS(epoll_create1), SYS(epoll_ctl), SYS(epoll_pwait), SYS(epoll_pwait2), SYS(eventfd2), SYS(execve), SYS(execveat), SYS(exit), SYS(exit_group),
    SYS(faccessat), SYS(faccessat2), SYS(fadvise64), SYS(fallocate), SYS(fchdir), SYS(fchmod), SYS(fchmodat), SYS(fchmodat2), SYS(fchown),
    SYS(fchownat), SYS(fcntl), SYS(fdatasync), SYS(fgetxattr), SYS(flistxattr), SYS(flock), SYS(fremovexattr), SYS(fsetxattr), SYS(fstat),
    SYS(fstatfs), SYS(fsync), SYS(ftruncate), SYS(futex), SYS(futex_requeue), SYS(futex_wait), SYS(futex_waitv), SYS(futex_wake), SYS(getcpu),
    SYS(getcwd), SYS(getdents64), SYS(getegid), SYS(geteuid), SYS(getgid), SYS(getgroups), SYS(getitimer), SYS(getpeername), SYS(getpgid),
    SYS(getpid), SYS(getppid), SYS(getpriority), SYS(getrandom), SYS(getresgid), SYS(getresuid), SYS(getrlimit), SYS(get_robust_list),
    SYS(getrusage), SYS(getsid), SYS(getsockname), SYS(getsockopt), SYS(gettid), SYS(gettimeofday), SYS(getuid), SYS(getxattr), SYS(getxattrat),
    SYS(inotify_add_watch), SYS(inotify_init1), SYS(inotify_rm_watch), SYS(ioprio_get), SYS(ioprio_set), SYS(kcmp), SYS(kill),
    SYS(landlock_add_rule), SYS(landlock_create_ruleset), SYS(landlock_restrict_self), SYS(lgetxattr), SYS(linkat), SYS(listen), SYS(listxattr),
    SYS(listxattrat), SYS(llistxattr), SYS(lremovexattr), SYS(lseek), SYS(lsetxattr), SYS(madvise), SYS(map_shadow_stack), SYS(membarrier),
    SYS(memfd_create), SYS(mincore), SYS(mkdirat), SYS(mknodat), SYS(mlock), SYS(mlock2), SYS(mlockall), SYS(mmap), SYS(mprotect),
    SYS(mq_getsetattr), SYS(mq_notify), SYS(mq_open), SYS(mq_timedreceive), SYS(mq_timedsend), SYS(mq_unlink), SYS(mremap), SYS(mseal), SYS(msgctl),
    SYS(msgget), SYS(msgrcv), SYS(msgsnd), SYS(msync), SYS(munlock), SYS(munlockall), SYS(munmap), SYS(nanosleep), SYS(newfstatat), SYS(openat),
    SYS(openat2), SYS(pidfd_getfd), SYS(pidfd_open), SYS(pidfd_send_signal), SYS(pipe2), SYS(pkey_alloc), SYS(pkey_free), SYS(pkey_mprotect),
    SYS(ppoll), SYS(prctl), SYS(pread64), SYS(preadv), SYS(preadv2), SYS(process_madvise), SYS(process_mrelease), SYS(process_vm_readv),
    SYS(process_vm_writev), SYS(pselect6), SYS(ptrace), SYS(pwrite64), SYS(pwritev), SYS(pwritev2), SYS(read), SYS(readahead), SYS(readlinkat),
    SYS(readv), SYS(recvfrom), SYS(recvmmsg), SYS(recvmsg), SYS(remap_file_pages), SYS(removexattr), SYS(removexattrat), SYS(renameat),
    SYS(renameat2), SYS(restart_syscall), SYS(rseq), SYS(rt_sigaction), SYS(rt_sigpending), SYS(rt_sigprocmask), SYS(rt_sigqueueinfo),
    SYS(rt_sigreturn), SYS(rt_sigsuspend), SYS(rt_sigtimedwait), SYS(rt_tgsigqueueinfo), SYS(sched_getaffinity), SYS(sched_getattr),
    SYS(sched_getparam), SYS(sched_get_priority_max), SYS(sched_get_priority_min), SYS(sched_getscheduler), SYS(sched_rr_get_interval),
    SYS(sched_setaffinity), SYS(sched_setattr), SYS(sched_setparam), SYS(sched_setscheduler), SYS(sched_yield), SYS(seccomp), SYS(semctl),
    SYS(semget), SYS(semop), SYS(semtimedop), SYS(sendfile), SYS(sendmmsg), SYS(sendmsg), SYS(sendto), SYS(setfsgid), SYS(setfsuid), SYS(setgid),
    SYS(setgroups), SYS(setitimer), SYS(setpgid), SYS(setpriority), SYS(setregid), SYS(setresgid), SYS(setresuid), SYS(setreuid),
    SYS(set_robust_list), SYS(setsid), SYS(setsockopt), SYS(set_tid_address), SYS(setuid), SYS(setxattr), SYS(setxattrat), SYS(shmat), SYS(shmctl),
    SYS(shmdt), SYS(shmget), SYS(shutdown), SYS(sigaltstack), SYS(signalfd4), SYS(splice), SYS(statfs), SYS(statx), SYS(symlinkat), SYS(sync),
    SYS(sync_file_range), SYS(syncfs), SYS(sysinfo), SYS(tee), SYS(tgkill), SYS(timer_create), SYS(timer_delete), SYS(timerfd_create),
    SYS(timerfd_gettime), SYS(timerfd_settime), SYS(timer_getoverrun), SYS(timer_gettime), SYS(timer_settime), SYS(times), SYS(tkill), SYS(truncate),
    SYS(umask), SYS(uname), SYS(unlinkat), SYS(utimensat), SYS(vmsplice), SYS(wait4), SYS(waitid), SYS(write), SYS(writev), SYS(clone3),
#ifdef __x86_64__
    SYS(access), SYS(alarm), SYS(arch_prctl), SYS(chmod), SYS(chown), SYS(creat), SYS(dup2), SYS(epoll_create), SYS(epoll_wait), SYS(eventfd),
    SYS(fork), SYS(futimesat), SYS(getdents), SYS(getpgrp), SYS(inotify_init), SYS(lchown), SYS(link), SYS(lstat), SYS(mkdir), SYS(mknod), SYS(open),
    SYS(pause), SYS(pipe), SYS(poll), SYS(readlink), SYS(rename), SYS(rmdir), SYS(select), SYS(signalfd), SYS(stat), SYS(symlink), SYS(time),
    SYS(unlink), SYS(utime), SYS(utimes), SYS(vfork),
#endif
};

/* Refused with EPERM, so that programs that try them see a refusal rather than an old kernel. */
static const int denied_calls[] = {
    SYS(acct), SYS(add_key), SYS(bpf), SYS(chroot), SYS(clock_adjtime), SYS(clock_settime), SYS(delete_module), SYS(fanotify_init),
    SYS(fanotify_mark), SYS(finit_module), SYS(fsconfig), SYS(fsmount), SYS(fsopen), SYS(fspick), SYS(get_mempolicy), SYS(init_module),
    SYS(io_uring_enter), SYS(io_uring_register), SYS(io_uring_setup), SYS(kexec_file_load), SYS(kexec_load), SYS(keyctl), SYS(lookup_dcookie),
    SYS(mbind), SYS(migrate_pages), SYS(mount), SYS(mount_setattr), SYS(move_mount), SYS(move_pages), SYS(name_to_handle_at), SYS(nfsservctl),
    SYS(open_by_handle_at), SYS(open_tree), SYS(perf_event_open), SYS(pivot_root), SYS(quotactl), SYS(quotactl_fd), SYS(reboot), SYS(request_key),
    SYS(sethostname), SYS(setdomainname), SYS(set_mempolicy), SYS(set_mempolicy_home_node), SYS(setns), SYS(settimeofday), SYS(swapoff), SYS(swapon),
    SYS(syslog), SYS(umount2), SYS(userfaultfd), SYS(vhangup),
#ifdef __x86_64__
    SYS(_sysctl), SYS(create_module), SYS(get_kernel_syms), SYS(ioperm), SYS(iopl), SYS(modify_ldt), SYS(query_module), SYS(sysfs), SYS(uselib),
    SYS(ustat),
#endif
};
#endif
