"""The socket of the kernel's proc connector: every fork, exec and exit of the machine, told as it happens.

Raw privilege: the socket filter is given to the kernel as a pointer (ctypes).

Covered: the kernel filters (BPF) all but a process's fork, exec or exit: threads cost nothing here.
Not covered: a node outside the first user or pid namespace; the kernel does not answer there, and :func:`open_connector`
says so. Kernels before 6.6 need CAP_NET_ADMIN.
Source: include/uapi/linux/cn_proc.h, drivers/connector/cn_proc.c.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import socket
import struct
import threading
import time
from pathlib import Path

from vallum.core.errors import ControlMissing
from vallum.sensors import netlink

NETLINK_CONNECTOR = 11
CN_IDX_PROC = CN_VAL_PROC = 1
LISTEN, IGNORE = 1, 2
FIRST_NETNS = "/proc/2/ns/net"
"""Of kthreadd, which is in the machine's first namespaces and, unlike PID 1, lets root look."""
CLONE_NEWNET = 0x40000000
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 8 * 1024 * 1024
"""Room for some 30,000 events while the node is busy with something else."""
_ACK_WAIT_S = 0.5
_CN_MSG = struct.Struct("=IIIIHH")

# Offsets in a message: netlink header 16, cn_msg 20, then proc_event {what, cpu, timestamp, data}.
_WHAT, _DATA = 36, 52
_LD_ABS, _TAX, _JEQ_K, _JEQ_X, _RET = 0x20, 0x07, 0x15, 0x1D, 0x06


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def _attach_filter(sock: socket.socket) -> None:
    """Accept acks, execs, and those forks and exits whose pid is its own thread group's: processes, not threads."""

    def what(value: int) -> int:
        return socket.htonl(value)  # BPF_LD turns words round; the kernel wrote them in host order

    rows = [
        (_LD_ABS, 0, 0, _WHAT),
        (_JEQ_K, 11, 0, what(0)),  # ack: accept
        (_JEQ_K, 10, 0, what(2)),  # exec: accept
        (_JEQ_K, 5, 0, what(1)),  # fork: compare child_pid and child_tgid
        (_JEQ_K, 0, 9, what(0x80000000)),  # exit: compare pid and tgid; anything else: reject
        (_LD_ABS, 0, 0, _DATA),
        (_TAX, 0, 0, 0),
        (_LD_ABS, 0, 0, _DATA + 4),
        (_JEQ_X, 4, 5, 0),
        (_LD_ABS, 0, 0, _DATA + 8),
        (_TAX, 0, 0, 0),
        (_LD_ABS, 0, 0, _DATA + 12),
        (_JEQ_X, 0, 1, 0),
        (_RET, 0, 0, 0xFFFFFFFF),
        (_RET, 0, 0, 0),
    ]
    code = (_Instruction * len(rows))(*(_Instruction(*row) for row in rows))
    program = _Program(len(rows), code)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))


def _request(operation: int, mark: int = 0) -> bytes:
    data = struct.pack("=I", operation)
    message = _CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, mark, len(data), 0) + data
    return netlink.make(netlink.NLMSG_DONE, 0, 0, message)


def _make_socket() -> socket.socket:
    """A socket in the machine's first network namespace, the only one that the connector serves.

    A node in another one (whose egress is meant to go elsewhere) may join the first for the making of this socket;
    a thread does it and ends, so that nothing else of the node ever is there.
    """
    made: list[socket.socket] = []

    def make() -> None:
        made.append(socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_CONNECTOR))

    def make_there() -> None:
        try:
            first = os.open(FIRST_NETNS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # no right to look: the socket is made where we are
        try:
            if ctypes.CDLL(None, use_errno=True).setns(first, CLONE_NEWNET) == 0:
                make()
        finally:
            os.close(first)

    if _inode_of("/proc/self/ns/net") != _inode_of(FIRST_NETNS):
        thread = threading.Thread(target=make_there, name="first-netns")
        thread.start()
        thread.join()
    if not made:
        make()
    return made[0]


def _inode_of(path: str) -> int | None:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return None


def open_connector() -> socket.socket:
    """A non-blocking socket on which the kernel has confirmed that it will tell.

    Raises:
        ControlMissing: this kernel or this place (a container's namespaces) does not tell; says which and the remedy.
    """
    try:
        sock = _make_socket()
    except OSError as error:
        raise ControlMissing(
            f"the kernel offers no process events ({error.strerror}); use a kernel with CONFIG_PROC_EVENTS=y"
        ) from error
    try:
        _attach_filter(sock)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.bind((0, CN_IDX_PROC))
        mark = secrets.randbelow(2**32 - 2) + 1
        sock.send(_request(LISTEN, mark))
        sock.setblocking(False)
        _await_ack(sock, mark)
    except OSError as error:
        sock.close()
        raise ControlMissing(
            f"process events are refused ({error.strerror}); run the node as root, or use a kernel from 6.6 on"
        ) from error
    except ControlMissing:
        sock.close()
        raise
    return sock


def _await_ack(sock: socket.socket, mark: int) -> None:
    """Return when the kernel acknowledges our own request.

    Nothing else will do: while another process listens, events reach a socket that the kernel has refused, too,
    with process numbers of another namespace.

    Raises:
        ControlMissing: no answer, which is how the kernel refuses other namespaces than the first.
        OSError: the kernel's refusal.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    deadline = time.monotonic() + _ACK_WAIT_S
    while (left_s := deadline - time.monotonic()) > 0 and poll.poll(left_s * 1000):
        data = sock.recv(65536)
        if len(data) < _DATA + 4 or struct.unpack_from("=I", data, _WHAT)[0] != 0:
            continue
        if struct.unpack_from("=I", data, netlink.HEADER.size + 12)[0] != mark + 1:
            continue  # an answer to another listener: the kernel answers with our number and one
        error = struct.unpack_from("=I", data, _DATA)[0]
        if error:
            raise OSError(error, os.strerror(error))
        return
    raise ControlMissing(
        "the kernel tells process events only to the machine's first user and pid namespace; "
        "run the node there, not inside a container"
    )


def close_connector(sock: socket.socket) -> None:
    """Tell the kernel that we no longer listen, so that the machine does not pay for it, and close."""
    try:
        sock.send(_request(IGNORE))
    except OSError:
        pass  # the kernel also forgets a listener whose socket closes
    finally:
        sock.close()
