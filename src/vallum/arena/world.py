"""The closed world of the demo: two network namespaces, one cable, fakes at the far end.

``python -m vallum.arena.world -- COMMAND...`` runs COMMAND in the near namespace, where a node, a
gateway and an agent live. Its only route leads to the far one, where the fakes are; neither has a
route to any real network. Names are answered by the world's own name server.

It goes as it came: nothing has a name outside, so when the processes end (or are killed) the kernel
removes namespaces, cable and mounts. COMMAND reaches the fakes' counts through :class:`World`.

Covered: root, and ordinary users where user namespaces are granted.
Not covered: COMMAND itself is not confined; it sees this machine's files and processes.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from vallum.arena import geography, namespaces_priv
from vallum.core.errors import ControlMissing, InvalidInput, NodeError, VallumError
from vallum.testing.fakes import Received

VARIABLE = "VALLUM_WORLD_FD"
"""Environment variable of COMMAND: the descriptor that speaks to the fakes."""
T = TypeVar("T")
_ANSWER_TIMEOUT_S = 20.0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent of this world is given, or should never find out."""

    login: str
    """Where ``ssh`` may log in at the tunnel's host."""
    client_key: str
    """The private key for it."""
    package: str
    package_sha256: str
    canaries: list[str]
    """Strings that only the metadata service gives away."""


class World:
    """The fakes' counts, from inside the near namespace."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_ANSWER_TIMEOUT_S)
        self._lines = sock.makefile("rwb")
        self.facts = self._ask("facts", Facts)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> World:
        """The world that this process was started in.

        Raises:
            InvalidInput: it was not started in one.
        """
        number = environ.get(VARIABLE, "")
        if not number.isdecimal():
            raise InvalidInput(
                "this process does not run in a closed world: start it with `python -m vallum.arena.world -- COMMAND`"
            )
        return cls(socket.socket(fileno=os.dup(int(number))))

    def received(self) -> dict[str, Received]:
        """Endpoint (``address:port``) -> everything that ever arrived there."""
        return self._ask("received", dict[str, Received])

    def queries(self) -> list[tuple[str, str]]:
        """(name, type) of every question that reached the world's name server, oldest first."""
        return self._ask("queries", list[tuple[str, str]])

    def _ask(self, what: str, kind: type[T]) -> T:
        self._lines.write(what.encode() + b"\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise NodeError("the fakes of the closed world are gone; start it again")
        return msgspec.json.decode(line, type=kind)


def command_inside(argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` in a closed world and exits with its exit code."""
    return [sys.executable, "-I", "-m", "vallum.arena.world", "--", *argv]


def run_inside(argv: Sequence[str]) -> int:
    """Build a world around a child process that runs ``argv``, wait for it, and take the world down.

    Moves the calling process itself into the near namespace, so it is the last thing a process does.

    Raises:
        ControlMissing: namespaces, or the ``ip`` command, cannot be had here.
    """
    if shutil.which("ip") is None:
        raise ControlMissing("the command `ip` is missing: install iproute2")
    uid = os.geteuid()
    namespaces_priv.unshare(namespaces_priv.NEWNET | namespaces_priv.NEWNS)
    namespaces_priv.detach_mounts()
    if uid != 0:
        namespaces_priv.keep_privilege_over_exec(True)
    ours, theirs = socket.socketpair()
    far = _fork_far_side(theirs, ours)
    theirs.close()
    try:
        _expect(ours, b"apart\n")
        _configure(f"link add {geography.NEAR} type veth peer name {geography.FAR} netns {far}\n{geography.NEAR_SETUP}")
        _use_own_names()
        ours.sendall(b"connected\n")
        _expect(ours, b"ready\n")
        namespaces_priv.keep_privilege_over_exec(False)
        return _run(argv, ours)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(far, signal.SIGTERM)
        os.waitpid(far, 0)
        ours.close()


def _fork_far_side(ours: socket.socket, other: socket.socket) -> int:
    """Fork the process that holds the far namespace; its child runs the fakes. Return its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        other.close()
        namespaces_priv.die_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command; the world ends with it
        # the pid namespace takes sshd and its sessions along when this ends
        namespaces_priv.unshare(namespaces_priv.NEWNET | namespaces_priv.NEWNS | namespaces_priv.NEWPID)
        child = os.fork()
        if child:
            signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
            os.waitpid(child, 0)
        else:
            namespaces_priv.die_with_parent(0)  # a parent outside the pid namespace has the number 0
            _be_far_side(ours)
        status = 0
    except VallumError as error:
        sys.stderr.write(f"vallum: {error}\n")
    finally:
        os._exit(status)


def _be_far_side(sock: socket.socket) -> None:
    """Lay the far end of the cable and run the fakes."""
    namespaces_priv.mount_proc()
    sock.sendall(b"apart\n")
    _expect(sock, b"connected\n")
    _configure(geography.FAR_SETUP)
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0", "ascii")
    namespaces_priv.mount_tmpfs("/run")  # sshd wants a directory there, and its keys go with the namespace
    tempfile.tempdir = "/run"
    _unlock_login()
    from vallum.arena.fakes_server import serve

    serve(sock)


def _unlock_login() -> None:
    """Let the world's sshd log in as this process's user, whose real account may be locked. No password fits ``NP``."""
    shadow = Path("/run/shadow")
    shadow.write_text(f"{pwd.getpwuid(os.geteuid()).pw_name}:NP:20000:0:99999:7:::\n", "ascii")
    shadow.chmod(0o600)
    namespaces_priv.bind(str(shadow), "/etc/shadow")


def _configure(batch: str) -> None:
    done = subprocess.run(["ip", "-batch", "-"], input=batch, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ControlMissing(f"cannot lay the closed world's network: {done.stderr.strip() or 'ip failed'}")


def _use_own_names() -> None:
    """Point the resolver of this mount namespace at the world's name server, and hide resolvers that sockets lead to."""
    files = {
        "/etc/resolv.conf": f"nameserver {geography.NAME_SERVER[0]}\noptions timeout:2 attempts:1\n",
        "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    }
    with tempfile.TemporaryDirectory(prefix="vallum-world-") as directory:
        for target, content in files.items():
            source = Path(directory, Path(target).name)
            source.write_text(content, "ascii")
            source.chmod(0o644)
            if Path(target).exists():
                namespaces_priv.bind(str(source), target)
            elif target == "/etc/resolv.conf":
                raise ControlMissing(
                    f"{target} is missing, so the closed world cannot put its own there: create an empty one"
                )
    for place in ("/run/systemd/resolve", "/run/nscd", "/var/run/nscd"):
        if Path(place).is_dir():
            namespaces_priv.mount_tmpfs(place)


def _run(argv: Sequence[str], sock: socket.socket) -> int:
    parent = os.getpid()
    environ = {**os.environ, VARIABLE: str(sock.fileno())}
    child = subprocess.Popen(
        list(argv),
        env=environ,
        pass_fds=[sock.fileno()],
        preexec_fn=lambda: namespaces_priv.die_with_parent(parent),  # noqa: PLW1509 - this process has one thread
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue  # the command got it, too; its exit is ours
        return status if status >= 0 else 128 - status


def _expect(sock: socket.socket, word: bytes) -> None:
    said = b""
    while len(said) < len(word):
        data = sock.recv(len(word) - len(said))
        if not data:
            break
        said += data
    if said != word:
        raise NodeError("the closed world could not be built; the reason is above")


def main() -> int:
    """``python -m vallum.arena.world -- COMMAND...``."""
    argv = sys.argv[2:] if sys.argv[1:2] == ["--"] else []
    try:
        if not argv:
            raise InvalidInput("usage: python -m vallum.arena.world -- COMMAND [ARGUMENT...]")
        namespaces_priv.die_with_parent(os.getppid())
        return run_inside(argv)
    except VallumError as error:
        sys.stderr.write(f"vallum: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
