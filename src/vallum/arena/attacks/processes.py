"""Other processes: those of the host, PID 1, and the helpers that act for the node; and terminals."""

from __future__ import annotations

from vallum.arena.attacks.base import Scripted

PROCESSES = Scripted(
    "processes",
    "signals, ptrace, process_vm_*, pidfd_getfd, priorities, limits, /proc/PID/{root,cwd,fd,exe,mem} of PID 1 and of host processes",
    r"""
canary, buffer = facts["canary_pid"], ctypes.create_string_buffer(64)
seen = pids()
report("no process of the host is listed", len(seen) < 12, seen)
for who, pid in (("PID 1", 1), ("a host process", canary)):
    if pid != 1 and os.path.exists(f"/proc/{pid}"):
        continue  # a process of the cell has this number
    for sig in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        if pid == 1:  # the kernel may let it be sent, but PID 1 of a namespace is immune; so only whether it lives counts
            try:
                os.kill(1, sig)
            except OSError:
                pass
            time.sleep(0.02)
            state = open("/proc/1/stat").read().rpartition(")")[2].split()[0]
            report(f"{sig.name} to PID 1", state in "SR", state)
        else:
            attempt(f"{sig.name} to {who}", lambda: os.kill(pid, sig))
    attempt(f"tgkill {who}", lambda: call(nr(234, 131), pid, pid, 0) if pid != 1 else nothing())
    attempt(f"rt_sigqueueinfo to {who}", lambda: call(nr(129, 138), pid, 9, bytes(128)))
    attempt(f"ptrace attach to {who}", lambda: call(nr(101, 117), 16, pid, 0, 0))
    attempt(f"ptrace seize {who}", lambda: call(nr(101, 117), 0x4206, pid, 0, 0))
    iov = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 64)
    attempt(f"process_vm_readv {who}", lambda: call(nr(310, 270), pid, iov, 1, iov, 1, 0))
    attempt(f"process_vm_writev {who}", lambda: call(nr(311, 271), pid, iov, 1, iov, 1, 0))
    attempt(f"prlimit of {who}", lambda: call(nr(302, 261), pid, 7, struct.pack("=QQ", 1, 1), None))
    attempt(f"setpriority of {who}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt(f"sched_setaffinity of {who}", lambda: os.sched_setaffinity(pid, {0}))
    attempt(f"ioprio of {who}", lambda: call(nr(251, 30), 1, pid, 3 << 13))
    attempt(f"setpgid of {who}", lambda: os.setpgid(pid, pid))
    attempt(f"kcmp with {who}", lambda: call(nr(312, 272), pid, os.getpid(), 0, 0, 0))
    attempt(f"get_robust_list of {who}", lambda: call(nr(274, 100), pid, buffer, ctypes.create_string_buffer(8)))
    attempt(f"pidfd_getfd of {who}", lambda: call(438, call(434, pid, 0), 3, 0))
    attempt(f"process_madvise of {who}", lambda: call(440, call(434, pid, 0), iov, 1, 4, 0))
    for entry in ("root", "cwd", "exe", "fd", "mem", "environ", "map_files", "task", "fdinfo", "ns/mnt", "personality", "auxv"):
        path = f"/proc/{pid}/{entry}"
        if entry in ("fd", "map_files", "fdinfo"):
            attempt(f"list {entry} of {who}", lambda: os.listdir(path))
        elif entry == "task" and pid == 1:
            continue
        elif entry in ("root", "cwd"):
            attempt(f"walk {entry} of {who}", lambda: os.listdir(path + "/"))
        elif entry in ("exe", "ns/mnt"):
            attempt(f"open {entry} of {who}", lambda: os.open(path, os.O_RDONLY))
        else:
            attempt(f"open {entry} of {who}", lambda: read(path))
attempt("kill(-1) reaches nothing outside", lambda: in_child(lambda: os.kill(-1, 0)) and nothing())
attempt("a host process by pidfd_open", lambda: call(434, canary, 0) if not os.path.exists(f"/proc/{canary}") else nothing())
attempt("a real-time priority", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)))
attempt("a better niceness", lambda: os.setpriority(os.PRIO_PROCESS, 0, -10))
attempt("a higher hard limit of descriptors", lambda: call(nr(302, 261), 0, 7, struct.pack("=QQ", 1 << 20, 1 << 20), None))
attempt("a higher hard limit of core files", lambda: call(nr(302, 261), 0, 4, struct.pack("=QQ", 1 << 30, 1 << 30), None) == 0 and __import__("resource").getrlimit(4)[1] > 4096 or nothing())
attempt("become PID 1's user", lambda: in_child(lambda: os.setuid(65535)))
attempt("become a user beyond the cell's", lambda: in_child(lambda: os.setuid(70000)))
attempt("become PID 1's group", lambda: in_child(lambda: os.setgid(65535)))
if os.getuid():
    attempt("become root", lambda: in_child(lambda: os.setuid(0)))
    attempt("join group 0", lambda: in_child(lambda: os.setgroups([0])))
def own_child():
    pid = os.fork()
    if pid == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
twin("signal a child of its own", own_child)
twin("a worse niceness", lambda: os.setpriority(os.PRIO_PROCESS, 0, 5))
twin("core pipes are for nobody: a crash", lambda: os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "kill -SEGV $$"], {}), 0))
""",
)

TERMINALS = Scripted(
    "terminals",
    "TIOCSTI, TIOCLINUX, TIOCSETD, the console, other people's terminals",
    r"""
import pty, termios
master, slave = pty.openpty()
def typed(request, value=b"x"):
    fcntl.ioctl(slave, request, value)
for name, request in {"TIOCSTI": 0x5412, "TIOCSTI with high bits": 0x100005412, "TIOCLINUX": 0x541C, "TIOCSETD": 0x5423, "TIOCCONS": 0x541D, "TIOCSSERIAL": 0x541F, "TIOCVHANGUP": 0x5437}.items():
    def tried(request=request):
        if request > 0xFFFFFFFF:
            call(nr(16, 29), slave, request, b"x")
        else:
            fcntl.ioctl(slave, request, bytes(64))
    attempt(name, tried)
for path in ("/dev/console", "/dev/tty0", "/dev/tty1", "/dev/ttyS0", "/dev/vcs", "/dev/vcsa", "/dev/kmsg", "/dev/ptmx0"):
    attempt("open " + path, lambda path=path: os.open(path, os.O_RDWR | os.O_NOCTTY))
attempt("a controlling terminal that is not there", lambda: os.open("/dev/tty", os.O_RDWR))
def steal():
    mine = os.ttyname(slave).rpartition("/")[2]
    others = [n for n in os.listdir("/dev/pts") if n not in ("ptmx", mine)]
    if not others:
        nothing("no other terminal is there")
    return others
attempt("another's terminal", steal)
twin("a terminal of its own", lambda: (os.write(slave, b"hello"), os.read(master, 5)))
twin("its size", lambda: termios.tcsetwinsize(slave, (10, 10)) if hasattr(termios, "tcsetwinsize") else None)
""",
)
