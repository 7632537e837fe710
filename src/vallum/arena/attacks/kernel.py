"""Kernel interfaces that have been the way out: closed by seccomp, by missing capabilities, or both."""

from __future__ import annotations

from vallum.arena.attacks.base import Scripted

INTERFACES = Scripted(
    "kernel-interfaces",
    "io_uring, bpf, perf, userfaultfd, keyrings, modules, kexec, handles, time, host name, swap, accounting, quota",
    r"""
buffer = ctypes.create_string_buffer(256)
attempt("io_uring_setup", lambda: call(425, 4, buffer))
attempt("io_uring_enter on a guessed descriptor", lambda: call(426, 3, 1, 0, 0, None, 0))
attempt("bpf: create a map", lambda: call(nr(321, 280), 0, struct.pack("=IIII", 2, 4, 4, 1).ljust(120, b"\0"), 120))
attempt("bpf: load a program", lambda: call(nr(321, 280), 5, buffer, 120))
attempt("perf_event_open", lambda: call(nr(298, 241), struct.pack("=II", 1, 112).ljust(112, b"\0"), 0, -1, -1, 0))
attempt("userfaultfd", lambda: call(nr(323, 282), 1))
attempt("keyctl: session keyring", lambda: call(nr(250, 219), 0, -3, 1))
attempt("keyctl: user keyring of the host id", lambda: call(nr(250, 219), 0, -4, 0))
attempt("add_key", lambda: call(nr(248, 217), b"user", b"vallum", b"x", 1, -4))
attempt("request_key", lambda: call(nr(249, 218), b"user", b"vallum", None, 0))
attempt("init_module", lambda: call(nr(175, 105), b"\x7fELF", 4, b""))
attempt("finit_module", lambda: call(nr(313, 273), os.open("/usr/bin/env", os.O_RDONLY), b"", 0))
attempt("delete_module", lambda: call(nr(176, 106), b"overlay", 0))
attempt("module by socket family (modprobe)", lambda: socket.socket(9, socket.SOCK_DGRAM))
attempt("kexec_load", lambda: call(nr(246, 104), 0, 0, None, 0))
attempt("kexec_file_load", lambda: call(nr(320, 294), -1, -1, 0, b"", 0))
attempt("reboot", lambda: call(nr(169, 142), 0xFEE1DEAD, 672274793, 0))
attempt("open_by_handle_at (Shocker)", lambda: call(nr(304, 265), os.open("/", os.O_RDONLY), struct.pack("=IiQ", 8, 1, 2), 0))
attempt("name_to_handle_at", lambda: call(nr(303, 264), -100, b"/etc/passwd", struct.pack("=Ii", 128, 0).ljust(136, b"\0"), buffer, 0))
attempt("settimeofday", lambda: call(nr(164, 170), struct.pack("=qq", int(time.time()) - 86400, 0), None))
attempt("clock_settime", lambda: call(nr(227, 112), 0, struct.pack("=qq", 1, 0)))
attempt("clock_adjtime", lambda: call(nr(305, 266), 0, struct.pack("=I", 0x8002).ljust(208, b"\0")))
attempt("adjtimex: set the tick", lambda: call(nr(159, 171), struct.pack("=I", 0x4000).ljust(208, b"\0")))
attempt("sethostname", lambda: call(nr(170, 161), b"owned", 5))
attempt("setdomainname", lambda: call(nr(171, 162), b"owned", 5))
attempt("swapon", lambda: call(nr(167, 224), b"/tmp", 0))
attempt("swapoff", lambda: call(nr(168, 225), b"/dev/vda"))
attempt("acct", lambda: call(nr(163, 89), b"/tmp/acct"))
attempt("quotactl", lambda: call(nr(179, 60), 0x80000700, b"/dev/vda", 0, buffer))
attempt("quotactl_fd", lambda: call(443, os.open("/", os.O_RDONLY), 0x80000700, 0, buffer))
attempt("syslog: read the kernel log", lambda: call(nr(103, 116), 3, buffer, 200))
attempt("syslog: clear the kernel log", lambda: call(nr(103, 116), 5, None, 0))
attempt("ioperm", lambda: call(nr(173), 0x70, 2, 1))
attempt("iopl", lambda: call(nr(172), 3))
attempt("modify_ldt", lambda: call(nr(154), 0, buffer, 64))
attempt("vhangup", lambda: call(nr(153, 58)))
attempt("fanotify_init", lambda: call(nr(300, 262), 0, 0))
attempt("lookup_dcookie", lambda: call(nr(212, 18), 1, buffer, 64))
attempt("mbind to other nodes", lambda: call(nr(237, 235), 0, 4096, 1, None, 0, 0))
attempt("move_pages of the host's process", lambda: call(nr(279, 239), facts["canary_pid"], 0, None, None, None, 0))
attempt("personality: READ_IMPLIES_EXEC", lambda: call(nr(135, 92), 0x0400000))
attempt("personality: ADDR_COMPAT_LAYOUT", lambda: call(nr(135, 92), 0x0200000))
attempt("prctl: a memory map of its own (exe_file)", lambda: call(nr(157, 167), 35, 13, os.open("/usr/bin/env", os.O_RDONLY), 0, 0))
attempt("a new seccomp filter that says yes", lambda: in_child(lambda: (call(nr(317, 277), 1, 0, bytes(struct.pack("=HxxxxxxQ", 1, ctypes.addressof(ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)))))), call(425, 4, buffer))))
attempt("seccomp: a listener for notifications", lambda: call(nr(317, 277), 1, 8, None))
attempt("a call number beyond the table", lambda: call(600))
attempt("a call number that is negative", lambda: in_child(lambda: call(-38 & 0xFFFFFFFF)))
if X86:
    attempt("x32 system call", lambda: in_child(lambda: call(0x40000000 + 425, 4, buffer)))
    def i386(number):
        m = mmap.mmap(-1, 4096, prot=7)
        m.write(b"\xb8" + struct.pack("<I", number) + b"\xcd\x80\xc3")
        result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
        if result < 0:
            raise OSError(-result, "")
    attempt("i386 system call (int 0x80)", lambda: in_child(lambda: i386(20)))
    attempt("i386 mount by int 0x80", lambda: in_child(lambda: i386(21)))
twin("memfd_create", lambda: os.close(os.memfd_create("x")))
twin("personality: ask", lambda: call(nr(135, 92), 0xFFFFFFFF))
twin("clock_gettime", lambda: time.clock_gettime(time.CLOCK_REALTIME))
twin("adjtimex: ask", lambda: call(nr(159, 171), ctypes.create_string_buffer(208)))
""",
)

SOCKETS = Scripted(
    "sockets",
    "socket families that reach the host, its page cache or its kernel: AF_ALG (CVE-2026-31431), AF_VSOCK, AF_PACKET, "
    "AF_XDP, AF_KEY, netlink (CVE-2024-1086), SCTP and the like; abstract and named Unix sockets of the host",
    r"""
def opened(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()
    return "a socket"
families = {"AF_AX25": 3, "AF_IPX": 4, "AF_APPLETALK": 5, "AF_NETROM": 6, "AF_X25": 9, "AF_KEY": 15, "AF_PACKET": 17, "AF_RDS": 21, "AF_PPPOX": 24,
            "AF_LLC": 26, "AF_IB": 27, "AF_CAN": 29, "AF_TIPC": 30, "AF_BLUETOOTH": 31, "AF_RXRPC": 33, "AF_PHONET": 35, "AF_CAIF": 37, "AF_ALG": 38,
            "AF_NFC": 39, "AF_VSOCK": 40, "AF_KCM": 41, "AF_QIPCRTR": 42, "AF_SMC": 43, "AF_XDP": 44, "AF_MCTP": 45}
for name, number in families.items():
    def every(number=number):
        last = None
        for kind in (1, 2, 3, 5):
            try:
                return opened(number, kind)
            except OSError as error:
                last = error
        raise last
    attempt(name, every)
attempt("AF_ALG by a pair", lambda: call(nr(53, 199), 38, 5, 0, ctypes.create_string_buffer(8)))
attempt("AF_ALG with high bits in the family", lambda: call(nr(41, 198), 0x100000026, 5, 0))
for protocol in range(1, 23):
    attempt(f"netlink family {protocol}", lambda protocol=protocol: opened(16, 3, protocol))
for name, protocol in {"SCTP": 132, "DCCP": 33, "MPTCP": 262, "UDP-Lite": 136, "GRE": 47, "L2TP": 115}.items():
    attempt(name, lambda protocol=protocol: opened(2, 1 if protocol != 136 else 2, protocol))
attempt("a raw socket", lambda: opened(2, 3, 255))
attempt("a raw IPv6 socket", lambda: opened(10, 3, 58))
attempt("a ping socket", lambda: opened(2, 2, 1))
def reach(address):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(address)
    return "connected"
attempt("abstract socket of the host", lambda: reach("\0" + facts["canary_abstract"]))
attempt("named socket of the host", lambda: reach(facts["canary_dir"] + "/socket"))
for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/vallum/node.sock"):
    attempt("control socket " + path, lambda path=path: reach(path))
def change_network():
    s = socket.socket(16, 3, 0)
    s.send(struct.pack("=IHHIIBxHiII", 32, 16, 5, 1, 0, 0, 0, 1, 0, 1))
    got = s.recv(4096)
    code = struct.unpack_from("=i", got, 16)[0]
    if code < 0:
        raise OSError(-code, "")
attempt("rtnetlink: take lo down", change_network)
attempt("SO_MARK", lambda: socket.socket().setsockopt(1, 36, 1))
attempt("SO_BINDTODEVICE eth0", lambda: socket.socket().setsockopt(1, 25, b"eth0"))
attempt("SIOCSIFFLAGS", lambda: fcntl.ioctl(socket.socket(2, 2), 0x8914, b"lo".ljust(16, b"\0") + bytes(24)))
attempt("IP_TRANSPARENT", lambda: socket.socket().setsockopt(0, 19, 1))
attempt("TCP_REPAIR", lambda: socket.socket().setsockopt(6, 19, 1))
attempt("iptables by setsockopt", lambda: socket.socket(2, 2).setsockopt(0, 64, bytes(96)))
attempt("TCP_ULP module", lambda: socket.socket().setsockopt(6, 31, b"espintcp"))
attempt("a listener on the door's port", lambda: socket.socket().bind(("127.0.0.1", 64999)))
attempt("a listener on the door's port by SO_REUSEPORT", lambda: (lambda s: (s.setsockopt(1, 15, 1), s.setsockopt(1, 2, 1), s.bind(("0.0.0.0", 64999)), s.listen()))(socket.socket()))
def own_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
twin("its own loopback", own_loopback)
twin("route netlink", lambda: opened(16, 3, 0))
twin("a Unix pair", lambda: [s.close() for s in socket.socketpair()])
def own_abstract():
    with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
        a.bind("\0own"); a.listen(1); b.connect("\0own")
twin("its own abstract socket", own_abstract)
""",
)
