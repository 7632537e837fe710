"""New namespaces, mounts and other people's: where most escapes begin; and control groups."""

from __future__ import annotations

from vallum.arena.attacks.base import Scripted

NAMESPACES = Scripted(
    "namespaces",
    "setns, unshare, clone, clone3, user namespaces within user namespaces, mounts, overlay tricks, pivot_root, chroot",
    r"""
kinds = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}
for name, flag in kinds.items():
    attempt(f"unshare {name}", lambda flag=flag: in_child(lambda: call(nr(272, 97), flag)))
    attempt(f"unshare {name} with high bits", lambda flag=flag: in_child(lambda: call(nr(272, 97), flag | 1 << 40)))
    if name != "time":
        def fresh(flag=flag):
            pid = call(nr(56, 220), flag | 17, 0, 0, 0, 0)
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        attempt(f"clone {name}", fresh)
    def fresh3(flag=flag):
        pid = call(435, struct.pack("=QQQQQQQQ", flag, 0, 0, 0, 17, 0, 0, 0), 64)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    attempt(f"clone3 {name}", fresh3)
attempt("clone3 into a cgroup by descriptor", lambda: call(435, struct.pack("=QQQQQQQQQQQ", 0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, os.open("/", os.O_RDONLY)), 88))
for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
    for pid in (1, "self", facts["canary_pid"]):
        attempt(f"setns {name} of {pid}", lambda: in_child(lambda: call(nr(308, 268), os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY), 0)))
attempt("setns by pidfd", lambda: in_child(lambda: call(nr(308, 268), call(434, 1, 0), 0x7E020000)))
attempt("mount a tmpfs", lambda: call(nr(165, 40), b"none", b"/tmp", b"tmpfs", 0, None))
attempt("mount proc again, unmasked", lambda: call(nr(165, 40), b"proc", b"/tmp", b"proc", 0, None))
attempt("mount a cgroup hierarchy (release_agent)", lambda: call(nr(165, 40), b"cgroup", b"/tmp", b"cgroup", 0, b"rdma"))
attempt("mount cgroup2", lambda: call(nr(165, 40), b"none", b"/tmp", b"cgroup2", 0, None))
attempt("mount the host's disk", lambda: call(nr(165, 40), b"/dev/vda", b"/tmp", b"ext4", 0, None))
attempt("overlay within the overlay", lambda: call(nr(165, 40), b"overlay", b"/tmp", b"overlay", 0, b"lowerdir=/,upperdir=/tmp,workdir=/tmp"))
attempt("FUSE", lambda: os.open("/dev/fuse", os.O_RDWR))
attempt("bind over a mask", lambda: call(nr(165, 40), b"/tmp", b"/proc/sys", None, 4096, None))
attempt("remount writable", lambda: call(nr(165, 40), None, b"/proc/sys", None, 32 | 4096, None))
attempt("umount a mask", lambda: call(nr(166, 39), b"/proc/kcore", 2))
attempt("umount /proc/sys", lambda: call(nr(166, 39), b"/proc/sys", 2))
attempt("umount everything", lambda: call(nr(166, 39), b"/", 2))
attempt("move_mount", lambda: call(429, -100, b"/proc", -100, b"/tmp", 0))
attempt("open_tree, cloned", lambda: call(428, -100, b"/", 1))
attempt("fsopen", lambda: call(430, b"proc", 0))
attempt("fspick", lambda: call(433, -100, b"/", 0))
attempt("mount_setattr", lambda: call(442, -100, b"/proc/sys", 0, bytes(32), 32))
attempt("pivot_root", lambda: call(nr(155, 41), b"/", b"/tmp"))
attempt("chroot", lambda: call(nr(161, 51), b"/tmp"))
attempt("write a uid map", lambda: write("/proc/self/uid_map", "0 0 1"))
attempt("write setgroups", lambda: write("/proc/self/setgroups", "allow"))
attempt("ioctl: the parent user namespace", lambda: fcntl.ioctl(os.open("/proc/self/ns/user", os.O_RDONLY), 0xB702))
twin("fork", lambda: in_child(lambda: None))
twin("a thread", lambda: (lambda t: (t.start(), t.join()))(threading.Thread(target=int)))
twin("unshare files", lambda: in_child(lambda: call(nr(272, 97), 0x400)))
""",
)

CGROUPS = Scripted(
    "cgroups",
    "release_agent, migration out of the step's group, lifting its limits, freezing others",
    r"""
found = [line.split(" - ")[1].split()[0] for line in open("/proc/self/mountinfo") if " - " in line]
report("no control group is mounted", not any(kind.startswith("cgroup") for kind in found), " ".join(sorted(set(found))))
seen = open("/proc/self/cgroup").read()
report("the host's groups are not named", "/vallum" not in seen, seen.replace("\n", " "))
attempt("find a cgroup.procs", lambda: [p for p in ("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs", "/sys/fs/cgroup/memory/cgroup.procs") if os.path.exists(p)] or nothing())
for path in ("/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/cgroup.freeze"):
    attempt("write " + path, lambda path=path: write(path, "max"))
attempt("make a control group", lambda: os.makedirs("/sys/fs/cgroup/x"))
attempt("/proc/self/cgroup is written", lambda: write("/proc/self/cgroup", "0::/"))
def escape_by_children():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(0.2)
        os._exit(0)
    os.waitpid(pid, 0)
    return open("/proc/self/cgroup").read() == seen or 1 / 0
twin("a daemon is still in the same group", escape_by_children)
""",
)

SETTINGS = Scripted(
    "kernel-settings",
    "/proc/sys, core_pattern, modprobe, binfmt_misc, sysrq, uevent_helper, /sys, masks of /proc (CVE-2025-31133, 52565, 52881)",
    r"""
paths = ["kernel/core_pattern", "kernel/modprobe", "kernel/hotplug", "kernel/poweroff_cmd", "kernel/sysrq", "kernel/randomize_va_space", "kernel/hostname",
         "kernel/ns_last_pid", "kernel/shmmax", "kernel/sem", "kernel/msgmax", "kernel/keys/maxkeys", "kernel/unprivileged_bpf_disabled", "kernel/threads-max",
         "fs/suid_dumpable", "fs/file-max", "fs/pipe-max-size", "fs/mqueue/msg_max", "fs/binfmt_misc/register", "fs/protected_symlinks",
         "vm/overcommit_memory", "vm/drop_caches", "vm/panic_on_oom", "vm/mmap_min_addr", "user/max_user_namespaces",
         "net/ipv4/ip_forward", "net/ipv4/ip_unprivileged_port_start", "net/ipv4/tcp_fin_timeout", "net/ipv4/conf/all/route_localnet", "net/ipv4/ping_group_range",
         "net/ipv6/conf/all/disable_ipv6", "net/netfilter/nf_conntrack_max", "net/core/somaxconn"]
for path in paths:
    attempt("write " + path, lambda path=path: write("/proc/sys/" + path, "1"))
for path in ("/proc/sysrq-trigger", "/proc/kcore", "/proc/kmem", "/dev/mem", "/dev/kmem", "/dev/port", "/proc/irq/0/smp_affinity", "/proc/irq/default_smp_affinity", "/proc/fs/nfsd/exports", "/proc/acpi/wakeup",
             "/proc/bus/pci/00/00.0", "/proc/scsi/scsi", "/proc/mtrr", "/proc/timer_stats", "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state",
             "/sys/kernel/security/apparmor/.remove", "/sys/module/overlay/parameters/redirect_dir", "/sys/devices/system/cpu/cpu1/online", "/sys/firmware/efi/efivars/x", "/sys/block/vda/queue/scheduler"):
    attempt("write " + path, lambda path=path: write(path, "1"))
for path in ("/proc/kcore", "/proc/kmsg", "/dev/kmsg", "/proc/keys", "/proc/key-users", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats", "/proc/cmdline", "/proc/modules", "/proc/1/environ", "/proc/1/maps",
             "/proc/1/mem", "/proc/1/syscall", "/proc/1/stack", "/sys/kernel/notes", "/sys/firmware/dmi/tables/DMI", "/sys/kernel/debug/tracing/trace", "/sys/kernel/tracing/trace"):
    attempt("read " + path, lambda path=path: read(path))
attempt("make a link in the place of a mask", lambda: os.symlink("/tmp", "/proc/sys/x"))
attempt("rename /proc away", lambda: os.rename("/proc", "/proc2"))
attempt("rename /dev away", lambda: os.rename("/dev", "/dev2"))
attempt("unlink a device node", lambda: os.unlink("/dev/null"))
attempt("a link in the place of /dev/null", lambda: os.symlink("/proc/sysrq-trigger", "/dev/null"))
attempt("exchange /proc for a directory", lambda: (os.makedirs("/tmp/p", exist_ok=True), call(nr(316, 276), -100, b"/proc", -100, b"/tmp/p", 2)))
attempt("chmod /proc/sys/kernel", lambda: os.chmod("/proc/sys/kernel", 0o777))
attempt("its own memory limit off by oom_score_adj below the cell's", lambda: write("/proc/self/oom_score_adj", "-1000"))
attempt("the audit identity of a user beyond the cell's", lambda: write("/proc/self/loginuid", "70000"))
twin("read a setting", lambda: read("/proc/sys/kernel/ostype"))
twin("read /proc/meminfo", lambda: read("/proc/meminfo"))
twin("its own name", lambda: write("/proc/self/comm", "x"))
twin("a higher oom_score_adj", lambda: write("/proc/self/oom_score_adj", "900"))
""",
)
