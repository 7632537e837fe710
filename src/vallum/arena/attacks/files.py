"""Files, devices, programs that carry privilege, and the program that is PID 1."""

from __future__ import annotations

from vallum.arena.attacks.base import Scripted

DEVICES = Scripted(
    "devices-and-privilege",
    "raw devices, mknod, whiteouts by hand, setuid programs, file capabilities, trusted attributes, overlay tricks (CVE-2021-3493, CVE-2023-0386)",
    r"""
import shutil, subprocess
os.chdir("/tmp")
# Device 0:0 is overlay's whiteout: the kernel lets anybody make one, and to open it is an error. Only Landlock forbids it.
for name, device in {"null": os.makedev(1, 3), "mem": os.makedev(1, 1), "disk": os.makedev(254, 0), "loop": os.makedev(7, 0), "kmsg": os.makedev(1, 11), "fuse": os.makedev(10, 229), "kvm": os.makedev(10, 232)}.items():
    for kind, mode in (("character", stat.S_IFCHR), ("block", stat.S_IFBLK)):
        attempt(f"make the {kind} device {name}", lambda: os.mknod("dev", mode | 0o666, device))
for place in ("/tmp", "/home/agent", "/dev", "/dev/shm", "/run"):
    attempt("make a device in " + place, lambda place=place: os.mknod(place + "/x", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
attempt("a device that can be opened, made as a whiteout", lambda: (os.mknod("wh", stat.S_IFCHR | 0o600, 0), os.open("wh", os.O_RDWR)))
for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/dev/vda", "/dev/sda", "/dev/loop-control", "/dev/loop0", "/dev/fuse", "/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vsock", "/dev/mapper/control", "/dev/nvram", "/dev/rtc0", "/dev/watchdog", "/dev/uinput", "/dev/snapshot", "/dev/userfaultfd", "/dev/cuse"):
    attempt("open " + path, lambda path=path: os.open(path, os.O_RDWR))
allowed = {"null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "ptmx", "fd", "stdin", "stdout", "stderr", "mqueue"}
extra = sorted(set(os.listdir("/dev")) - allowed)
report("only harmless devices", not extra, extra)
shutil.copy("/usr/bin/id", "/tmp/suid")
os.chmod("/tmp/suid", 0o6755)
mine = str(os.getuid())
got = subprocess.run(["/tmp/suid", "-u"], capture_output=True, text=True).stdout.strip()
report("a setuid program gives nothing", got == mine, got)
for path in ("/usr/bin/su", "/usr/bin/sudo", "/usr/bin/mount", "/usr/bin/passwd", "/usr/bin/newuidmap"):
    if os.path.exists(path):
        code = "import os;print(os.geteuid())"
        before = open("/proc/self/status").read().split("CapPrm:")[1].split()[0]
        done = subprocess.run([path, "-c", "id -u"], capture_output=True, text=True, stdin=subprocess.DEVNULL) if path.endswith("su") and os.getuid() else None
        report("setuid " + path, done is None or done.returncode != 0 or done.stdout.strip() == mine, done and done.stdout)
attempt("file capabilities", lambda: os.setxattr("/tmp/suid", "security.capability", struct.pack("<IIIII", 0x2000001, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0)))
attempt("file capabilities with a root id", lambda: os.setxattr("/tmp/suid", "security.capability", struct.pack("<IIIIII", 0x3000001, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0, 0)))
attempt("trusted attributes", lambda: os.setxattr("/tmp/suid", "trusted.overlay.opaque", b"y"))
attempt("security attributes", lambda: os.setxattr("/tmp/suid", "security.evil", b"y"))
def redirect():
    os.makedirs("/tmp/r", exist_ok=True)
    os.setxattr("/tmp/r", "user.overlay.redirect", b"/../../../etc")
    seen = os.listdir("/tmp/r")
    return seen or nothing("it is an attribute like any other")
attempt("overlay redirect by a user attribute", redirect)
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
owns = 0b11001011 if facts["is_owner"] else 0  # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID
effective = int(status["CapEff"], 16)
report("no capability but the owner's", effective & ~0b11011011 == 0 if facts["is_owner"] else effective == 0, status["CapEff"])
report("the bounding set is empty", int(status["CapBnd"], 16) == 0, status["CapBnd"])
report("no_new_privs", status["NoNewPrivs"] == "1")
report("seccomp is on", status["Seccomp"] == "2", status["Seccomp"])
attempt("raise a capability", lambda: call(nr(126, 91), struct.pack("=II", 0x20080522, 0), struct.pack("=IIIIII", 0xFFFFFFFF, 0xFFFFFFFF, 0, 0x1FF, 0x1FF, 0)))
attempt("raise an ambient capability", lambda: call(nr(157, 167), 47, 2, 21, 0, 0))
attempt("secure bits", lambda: call(nr(157, 167), 28, 0, 0, 0, 0))
attempt("no_new_privs off", lambda: call(nr(157, 167), 38, 0, 0, 0, 0))
twin("a FIFO", lambda: os.mkfifo("/tmp/fifo"))
twin("a user attribute", lambda: os.setxattr("/tmp/suid", "user.note", b"y"))
twin("a rename between directories", lambda: (os.makedirs("/tmp/a/b"), os.makedirs("/tmp/c"), open("/tmp/a/b/f", "w").close(), os.rename("/tmp/a/b/f", "/tmp/c/f")))
twin("a hard link between directories", lambda: os.link("/tmp/c/f", "/tmp/a/f"))
twin("a directory moved with all in it", lambda: os.rename("/tmp/a", "/tmp/c/a"))
twin("/dev/urandom", lambda: read("/dev/urandom"))
def run_memfd():
    fd = os.memfd_create("x", 0)
    os.write(fd, open("/bin/true", "rb").read())
    os.waitpid(os.posix_spawn(f"/proc/self/fd/{fd}", ["x"], {}), 0)
twin("a program from memory", run_memfd)
""",
)

PROGRAM = Scripted(
    "our-own-program",
    "/proc/self/exe and leaked descriptors (runc CVE-2019-5736, CVE-2024-21626), the working directory, links of /proc/PID/fd",
    r"""
leaked = []
for fd in os.listdir("/proc/self/fd"):
    try:
        target = os.readlink("/proc/self/fd/" + fd)
    except OSError:
        continue
    if int(fd) > 2 and not target.startswith("/proc/") or target.startswith(("/", "memfd")) and not target.startswith(("/dev/null", "/proc/", "/dev/pts")):
        leaked.append((fd, target))
report("no descriptor is inherited", not leaked, leaked)
for fd in range(3, 64):
    try:
        os.fstat(fd)
    except OSError:
        continue
    if os.readlink(f"/proc/self/fd/{fd}").startswith("/proc/"):
        continue
    report(f"descriptor {fd} is closed", False, os.readlink(f"/proc/self/fd/{fd}"))
cwd = os.getcwd()
report("the working directory is in the cell", cwd.startswith("/") and "unreachable" not in cwd, cwd)
def upwards():
    os.chdir("../" * 64)
    return open(facts["canary_dir"].lstrip("/") + "/secret").read()
attempt("upwards from the working directory", upwards)
for base in ("/proc/self/cwd", "/proc/self/root", "/proc/1/cwd", "/proc/1/root", "/proc/thread-self/root", "/dev/fd/3", "/proc/self/fd/3"):
    attempt("the canary through " + base, lambda base=base: read(base + "/../" * 8 + facts["canary_dir"] + "/secret"))
attempt("the canary by its path", lambda: read(facts["canary_dir"] + "/secret"))
attempt("the canary, written by its path", lambda: write(facts["canary_dir"] + "/target", "owned"))
def overwrite():
    for round in range(150):
        for pid in pids():
            if pid == os.getpid():
                continue
            for name in ("exe", "root", "cwd"):
                try:
                    where = os.readlink(f"/proc/{pid}/{name}")
                    if name == "exe" and not where.startswith("/usr"):
                        os.close(os.open(f"/proc/{pid}/exe", os.O_RDWR))
                        return where
                except OSError:
                    pass
    nothing("never could it be opened")
attempt("our program through /proc/PID/exe while commands start", overwrite)
def by_interpreter():
    with open("/tmp/script", "w") as f:
        f.write("#!/proc/self/exe\n")
    os.chmod("/tmp/script", 0o755)
    pid = os.posix_spawn("/tmp/script", ["script"], {})
    os.waitpid(pid, 0)
    nothing("it ran itself, and that is all")
attempt("a script whose interpreter is /proc/self/exe", by_interpreter)
twin("its own program can be read", lambda: read("/proc/self/exe"))
""",
)
