"""Who opened a connection: the kernel's sock_diag for the socket, /proc for the processes that hold it.

The diag socket belongs to the cell's network namespace, so that an answer can only be of that cell.

Covered: IPv4, IPv6 and IPv4-mapped; TCP, and UDP whether connected or not; several sockets on one port
(all of them are candidates, and the answer says that it is ambiguous); holders that hide the descriptor in a thread with a
table of its own, or behind a leader that has ended.
Not covered: a descriptor that is only in flight in a Unix socket's queue (no process holds it: the socket's own cgroup
is what remains).
Source: include/uapi/linux/{sock_diag,inet_diag}.h, net/ipv4/{inet_diag,udp_diag}.c.
"""

# ruff: noqa: PTH116, PTH208 - a tight loop, where Path has nothing to offer
from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from vallum.core.clock import mono_ns
from vallum.sensors import netlink
from vallum.sensors.socket_owner_priv import shares_files

SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_SKV6ONLY = 11
INET_DIAG_CGROUP_ID = 21
_REQUEST = struct.Struct("=BBBBI")
_ANY_STATE = 0xFFFFFFFF
_LISTEN_STATES = 1 << 10
_SIZES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_NO_COOKIE = b"\xff" * 8
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_MAX_ANSWERS = 4096
_ONE_THREAD = 3
"""Links of ``/proc/PID/task``: two of its own and one for each thread; cheaper than listing it."""
_BUDGET_NS = 25_000_000
"""Time spent on looking for holders: a guest with a million descriptors must not hold the gateway."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class DiagSocket:
    """One socket as sock_diag describes it."""

    family: int
    src: tuple[Address, int]
    dst: tuple[Address, int]
    uid: int
    """As seen in the user namespace of whoever opened the diag socket."""
    inode: int
    """0 when no descriptor is left."""
    cgroup_id: int | None
    """Cgroup v2 id stamped on it when it was made."""
    is_v6_only: bool = False


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """The socket of a connection and who holds it."""

    inode: int
    uid: int
    cgroup_id: int | None
    holders: list[int]
    """Host pids with a descriptor of it, in the order in which pids were given."""
    ambiguous: bool = False
    """Several sockets could have sent it; this is the likeliest and ``holders`` are of all."""
    complete: bool = True
    """Whether every process could be looked at within the time allowed."""


@lru_cache(maxsize=4096)
def plain(address: str | bytes) -> Address:
    """An address with an IPv4-mapped one as IPv4 and without a zone.

    Raises:
        ValueError: not an address.
    """
    parsed = ipaddress.ip_address(address.split("%")[0] if isinstance(address, str) else address)
    return getattr(parsed, "ipv4_mapped", None) or parsed


def make_request(
    family: int, protocol: str, seq: int, *, src: tuple[Address, int], dst: tuple[Address, int] | None, dump: bool
) -> bytes:
    """One inet_diag request: of exactly this connection, or a dump of every socket on the local port of ``src``."""
    size = 4 if family == socket.AF_INET else 16

    def spread(address: Address) -> bytes:
        raw = address.packed if len(address.packed) == size else b"\0" * 10 + b"\xff\xff" + address.packed
        return raw.ljust(16, b"\0")

    remote = (b"\0" * 16, 0) if dst is None else (spread(dst[0]), dst[1])
    local = b"\0" * 16 if dump else spread(src[0])
    # A dump filters by ports only: the address of an unbound UDP socket is not that of its packets.
    sockid = struct.pack(">HH", src[1], 0 if dump else remote[1]) + local + (b"\0" * 16 if dump else remote[0])
    sockid += struct.pack("=I", 0) + _NO_COOKIE
    flags = netlink.NLM_F_REQUEST | (netlink.NLM_F_DUMP if dump else 0)
    states = _ANY_STATE & ~_LISTEN_STATES if protocol == "tcp" else _ANY_STATE
    body = _REQUEST.pack(family, _PROTOCOLS[protocol], 0, 0, states) + sockid
    return netlink.make(SOCK_DIAG_BY_FAMILY, flags, seq, body)


def parse_socket(raw: bytes) -> DiagSocket:
    """One inet_diag_msg with its attributes.

    Raises:
        MalformedNetlinkError: too short, or a family we did not ask for.
    """
    if len(raw) < 72:
        raise netlink.MalformedNetlinkError(f"{len(raw)} bytes are too few for an inet_diag_msg")
    family = raw[0]
    size = _SIZES.get(family)
    if size is None:
        raise netlink.MalformedNetlinkError(f"sock_diag answered with family {family}")
    sport, dport = struct.unpack_from(">HH", raw, 4)
    uid, inode = struct.unpack_from("=II", raw, 64)
    extra = netlink.attributes(raw[72:])
    stamp = extra.get(INET_DIAG_CGROUP_ID)
    return DiagSocket(
        family=family,
        src=(plain(raw[8 : 8 + size]), sport),
        dst=(plain(raw[24 : 24 + size]), dport),
        uid=uid,
        inode=inode,
        cgroup_id=struct.unpack("=Q", stamp)[0] if stamp is not None and len(stamp) == 8 else None,
        is_v6_only=any(extra.get(INET_DIAG_SKV6ONLY, b"")),
    )


def rank(found: DiagSocket, src: tuple[Address, int], dst: tuple[Address, int]) -> int:
    """How well a socket fits packets ``src`` -> ``dst``: 0 it cannot be, 3 exactly.

    A UDP socket that is connected elsewhere may still have sent one packet to ``dst`` (sendto with an address):
    it ranks last but is not ruled out.
    """
    if found.src[1] != src[1]:
        return 0
    speaks = src[0].version == 4 if found.family == socket.AF_INET else src[0].version == 6 or not found.is_v6_only
    if not speaks or not (found.src[0] == src[0] or found.src[0].is_unspecified):
        return 0
    if found.dst == dst:
        return 3
    return 2 if found.dst[1] == 0 else 1


class DiagError(OSError):
    """sock_diag did not answer as it should (not: no such socket)."""


def _ask(diag: socket.socket, request: bytes, seq: int) -> Iterator[DiagSocket]:
    """Answers to one request. The kernel answers before ``send`` returns, so nothing is waited for.

    Raises:
        DiagError: refused, or no answer.
        MalformedNetlinkError: bytes that cannot be understood.
    """
    diag.send(request)
    for _ in range(_MAX_ANSWERS):
        try:
            data, (port, _) = diag.recvfrom(65536, socket.MSG_DONTWAIT)
        except OSError as error:
            raise DiagError(error.errno, f"sock_diag did not answer: {error.strerror}") from error
        if port != 0:
            continue
        for message in netlink.split(data):
            if message.seq != seq:
                continue  # left over from a request that was given up
            if message.type == netlink.NLMSG_DONE:
                return
            if message.type == netlink.NLMSG_ERROR:
                code = netlink.error_of(message)
                if code in (0, errno.ENOENT):
                    return
                raise DiagError(code, f"sock_diag refused: {os.strerror(code)}")
            yield parse_socket(message.payload)
            if not message.flags & 0x2:  # NLM_F_MULTI: an exact answer has no end mark
                return


_seq = 0


def _next_seq() -> int:
    global _seq  # noqa: PLW0603 - one counter for all diag sockets, so that a late answer is never taken for another's
    _seq = (_seq + 1) & 0xFFFFFFFF
    return _seq


def find_sockets(diag: socket.socket, protocol: str, src: tuple[str, int], dst: tuple[str, int]) -> list[DiagSocket]:
    """Sockets of the namespace that can have sent from ``src`` to ``dst``, the best fit first.

    More than one only for UDP, when sockets share a port (SO_REUSEPORT): the kernel does not tell which one sent.

    ``protocol`` is ``tcp`` or ``udp``; ``dst`` is where the guest wanted to go. TCP is asked for exactly, then by local
    port; UDP by local port in both families (an IPv6 socket can send IPv4).

    Raises:
        DiagError, MalformedNetlinkError: the kernel did not answer; not that there is none.
        ValueError: not addresses, or another protocol.
    """
    if protocol not in _PROTOCOLS:
        raise ValueError(f"{protocol!r} has no sockets to look for: use 'tcp' or 'udp'")
    source, target = (plain(src[0]), src[1]), (plain(dst[0]), dst[1])
    if protocol == "tcp":
        family = socket.AF_INET if source[0].version == 4 else socket.AF_INET6
        seq = _next_seq()
        exact = list(_ask(diag, make_request(family, protocol, seq, src=source, dst=target, dump=False), seq))
        # The kernel falls back to listeners on that port: they did not send it.
        if hits := [found for found in exact if rank(found, source, target) == 3]:
            return hits
    candidates: list[tuple[int, DiagSocket]] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        seq = _next_seq()
        request = make_request(family, protocol, seq, src=source, dst=None, dump=True)
        candidates += [(rank(found, source, target), found) for found in _ask(diag, request, seq)]
    least = 3 if protocol == "tcp" else 1
    fitting = sorted((pair for pair in candidates if pair[0] >= least), key=lambda pair: -pair[0])
    return [found for _, found in fitting]


def find_holders(inodes: Iterable[int], pids: Iterable[int]) -> tuple[dict[int, list[int]], bool]:
    """(socket -> host pids of ``pids`` with a descriptor of it, whether all could be looked at in time).

    Each table is read once however many sockets are looked for.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes if inode}
    holders: dict[int, list[int]] = {inode: [] for inode in wanted.values()}
    if not wanted:
        return holders, True
    deadline = mono_ns() + _BUDGET_NS
    for pid in pids:
        held, is_complete = _held_by(pid, wanted, deadline)
        for inode in held:
            holders[inode].append(pid)
        if not is_complete:
            return holders, False
    return holders, True


def _held_by(pid: int, wanted: dict[str, int], deadline: int) -> tuple[set[int], bool]:
    """Which of the sockets a process holds in any of its tables, and whether the time sufficed to look at all."""
    held, is_complete = _held_in(f"/proc/{pid}/fd", wanted, deadline)
    if not is_complete:
        return held, False
    try:
        if os.stat(f"/proc/{pid}/task").st_nlink <= _ONE_THREAD:
            return held, True
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return held, True
    for task in tasks:
        if task == str(pid) or shares_files(pid, int(task)):
            continue
        more, is_complete = _held_in(f"/proc/{pid}/task/{task}/fd", wanted, deadline)
        held |= more
        if not is_complete:
            return held, False
    return held, True


def _held_in(path: str, wanted: dict[str, int], deadline: int) -> tuple[set[int], bool]:
    held: set[int] = set()
    try:
        table = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return held, True
    try:
        with os.scandir(table) as entries:
            for count, entry in enumerate(entries, 1):
                try:
                    inode = wanted.get(os.readlink(entry.name, dir_fd=table))
                except OSError:
                    continue
                if inode is not None:
                    held.add(inode)
                    if len(held) == len(wanted):
                        return held, True
                if count % 64 == 0 and mono_ns() > deadline:
                    return held, False
    except OSError:
        return held, True  # it ended while we looked
    finally:
        os.close(table)
    return held, mono_ns() <= deadline


@dataclass(frozen=True, slots=True)
class Asked:
    """A connection or datagram whose sender is looked for; ``dst`` is where the guest wanted to go."""

    protocol: str
    src: tuple[str, int]
    dst: tuple[str, int]


def find_owner(
    diag: socket.socket, protocol: str, src: tuple[str, int], dst: tuple[str, int], pids: Iterable[int]
) -> SocketOwner | None:
    """The socket that sent from ``src`` to ``dst`` and its holders among ``pids``; None when the kernel knows none.

    Raises:
        DiagError, MalformedNetlinkError, ValueError: as :func:`find_sockets`.
    """
    return describe_owners([find_sockets(diag, protocol, src, dst)], list(pids))[0]


def describe_owners(found: Sequence[list[DiagSocket]], pids: Sequence[int] | None) -> list[SocketOwner | None]:
    """For each list of sockets that fit (as :func:`find_sockets` gives them): the owner. One search serves all of them.

    ``pids`` None: holders are not looked for, and the answers say that they are not complete.
    """
    inodes = {each.inode for sockets in found for each in sockets}
    holders, is_complete = find_holders(inodes, pids) if pids is not None else ({}, False)
    order = {pid: place for place, pid in enumerate(pids or ())}
    return [_describe(sockets, holders, is_complete, order) if sockets else None for sockets in found]


def _describe(
    sockets: list[DiagSocket], holders: dict[int, list[int]], is_complete: bool, order: dict[int, int]
) -> SocketOwner:
    best = sockets[0]
    stamps = {each.cgroup_id for each in sockets}
    mine = {pid for each in sockets for pid in holders.get(each.inode, ())}
    return SocketOwner(
        inode=best.inode,
        uid=best.uid,
        cgroup_id=best.cgroup_id if len(stamps) == 1 else None,
        holders=sorted(mine, key=lambda pid: order[pid]),
        ambiguous=len(sockets) > 1,
        complete=is_complete,
    )
