"""What `vallum doctor` tries in a real cell: each control attacked by a small program that reports what it got.

The program is ours and runs in a fresh cell with nothing else in it, so its word is good here; it
is not how cells are judged in use.

Covered: the controls a cell cannot do without, as a guest user and as guest root.
Not covered: kernel bugs; the battery of published escapes.
"""

from __future__ import annotations

from dataclasses import dataclass

PROGRAM = r"""
import ctypes, errno, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
found = {}

def attempt(name, action):
    try:
        got = action()
        found[name] = ["got", str(got)[:120]]
    except OSError as error:
        found[name] = ["denied", errno.errorcode.get(error.errno, str(error.errno or error))]

def call(number, *arguments):
    if number is None:
        raise OSError(errno.ENOSYS, "not on this machine")
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def open_socket(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()
    return "a socket"

def send_tcp(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(5)
        s.connect(address)
        s.sendall(b"vallum doctor\r\n\r\n")
        data = s.recv(200)
    if not data or b"vallum" in data:
        raise OSError(errno.ECONNREFUSED, "")
    return data

def send_udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        s.connect(("203.0.113.9", 5000))
        s.send(b"vallum doctor")
        return s.recv(100)

def read_file(path):
    with open(path, "rb") as f:
        return f.read(10)

def write_file(path, data):
    with open(path, "w") as f:
        f.write(data)
    return "written"

status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
zero = all(int(status[k], 16) == 0 for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
found["capabilities"] = ["denied" if zero else "got", "bounding set " + status["CapBnd"]]
found["no_new_privs"] = ["denied" if status["NoNewPrivs"] == "1" else "got", "NoNewPrivs " + status["NoNewPrivs"]]
found["seccomp"] = ["denied" if status["Seccomp"] == "2" else "got", "mode " + status["Seccomp"]]
extra = [fd for fd in os.listdir("/proc/self/fd") if int(fd) > 3]
found["descriptors"] = ["got" if extra else "denied", "inherited " + ",".join(extra)]
pids = [p for p in os.listdir("/proc") if p.isdigit()]
found["host_processes"] = ["got" if len(pids) > 20 else "denied", f"{len(pids)} processes seen"]
names = [name for _, name in socket.if_nameindex()]
found["interfaces"] = ["denied" if names == ["lo"] else "got", ",".join(names)]
attempt("af_alg", lambda: open_socket(38, socket.SOCK_SEQPACKET))
attempt("af_vsock", lambda: open_socket(40, socket.SOCK_STREAM))
attempt("af_packet", lambda: open_socket(17, socket.SOCK_RAW, 0x300))
attempt("raw_socket", lambda: open_socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("icmp_socket", lambda: open_socket(socket.AF_INET, socket.SOCK_DGRAM, 1))
attempt("io_uring", lambda: call(425, 1, 0))
attempt("bpf", lambda: call(321 if X86 else 280, 5, 0, 0))
attempt("keyctl", lambda: call(250 if X86 else 219, 0, -3, 0))
attempt("userfaultfd", lambda: call(323 if X86 else 282, 1))
attempt("perf_event_open", lambda: call(298 if X86 else 241, 0, 0, -1, -1, 0))
attempt("unshare_user", lambda: call(272 if X86 else 97, 0x10000000))
attempt("mount", lambda: call(165 if X86 else 40, 0, 0, 0, 0, 0) if libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) and ctypes.get_errno() == 0 else call(165 if X86 else 40, 0, 0, 0, 0, 0))
attempt("setns", lambda: call(308 if X86 else 268, os.open("/proc/1/ns/net", os.O_RDONLY), 0))
attempt("ptrace_pid1", lambda: call(101 if X86 else 117, 16, 1, 0, 0))
attempt("core_pattern", lambda: write_file("/proc/sys/kernel/core_pattern", "|/bin/false"))
attempt("net_sysctl", lambda: write_file("/proc/sys/net/ipv4/ip_forward", "1"))
attempt("sysrq", lambda: write_file("/proc/sysrq-trigger", "h"))
attempt("kcore", lambda: read_file("/proc/kcore") or (_ for _ in ()).throw(OSError(errno.EACCES, "")))
attempt("host_shadow", lambda: read_file("/etc/shadow"))
attempt("tcp", lambda: send_tcp(socket.AF_INET, ("203.0.113.9", 443)))
attempt("tcp6", lambda: send_tcp(socket.AF_INET6, ("2001:db8::9", 443)))
attempt("metadata", lambda: send_tcp(socket.AF_INET, ("169.254.169.254", 80)))
attempt("udp", send_udp)
attempt("dns", lambda: socket.gethostbyname("not-granted.vallum.test"))
attempt("write_usr", lambda: write_file("/usr/bin/vallum-doctor", "x") if os.getuid() else "copy-on-write")
json.dump(found, sys.stdout)
"""
"""Prints ``{attempt: ["denied"|"got", detail]}``."""


@dataclass(frozen=True)
class Control:
    """One promise of a cell and the attempts that would break it."""

    name: str
    promise: str
    attempts: tuple[str, ...]
    remedy: str


CONTROLS = (
    Control(
        "capabilities",
        "no capability, none to be had",
        ("capabilities", "no_new_privs"),
        "report this as a bug: it holds on every kernel since 3.5",
    ),
    Control("descriptors", "no inherited descriptor", ("descriptors",), "report this as a bug"),
    Control(
        "pid-namespace",
        "host processes cannot be seen or touched",
        ("host_processes", "ptrace_pid1"),
        "use a kernel with PID namespaces",
    ),
    Control(
        "seccomp",
        "kernel interfaces that agents do not need are closed",
        ("seccomp", "af_alg", "af_vsock", "af_packet", "io_uring", "bpf", "keyctl", "userfaultfd", "perf_event_open"),
        "use a kernel with CONFIG_SECCOMP_FILTER",
    ),
    Control(
        "namespaces-closed",
        "no new namespaces, no mounts",
        ("unshare_user", "mount", "setns"),
        "use a kernel with CONFIG_SECCOMP_FILTER",
    ),
    Control(
        "proc",
        "/proc is the cell's own, kernel settings read-only",
        ("core_pattern", "net_sysctl", "sysrq", "kcore"),
        "report this as a bug",
    ),
    Control("host-files", "nothing of the host's secrets in the tree", ("host_shadow",), "report this as a bug"),
    Control("one-door", "no interface but loopback", ("interfaces",), "use a kernel with network namespaces"),
    Control(
        "egress-tcp",
        "TCP goes nowhere that is not granted",
        ("tcp", "tcp6", "metadata"),
        "load nf_tables: modprobe nf_tables nft_redir",
    ),
    Control(
        "egress-other",
        "UDP, ICMP and raw packets go nowhere",
        ("udp", "icmp_socket", "raw_socket"),
        "load nf_tables: modprobe nf_tables nft_redir",
    ),
    Control(
        "egress-dns",
        "names that are not granted are not resolved",
        ("dns",),
        "see the node's log: the gateway is not answering",
    ),
)
"""Every attempt of :data:`PROGRAM` that must be denied, by the control that denies it."""
