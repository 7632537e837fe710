"""The contract of a cell: what every isolation level offers, whatever holds its walls.

A *backend* builds *cells*. A cell is namespaces, a file tree, quotas and *doors*: sockets made
inside its network namespace and served from outside. Commands run in *steps*; a step is one or
more cgroups of the cell, and the mapping from a kernel fact (pid, cgroup id) back to the step is
this contract's most important promise.

``vallum.testing.sandbox_conformance`` is the definition in tests: every backend passes it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from vallum.core.limits import Limits

MIN_UID_RANGE = 65536

GuestRoot = Literal["plain", "owner"]
"""What user 0 of a cell may do: ``plain``, what any user may; ``owner``, also own and give away every file of the cell and
become its other users (CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETUID, SETGID of the cell's own user namespace)."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a directory of the host is, there and in the cell."""

    disk: tuple[int, int]
    """User and group id on disk."""
    guest: tuple[int, int]
    """Those that the guest sees instead, below 65535; what is theirs on disk is seen as the other ones' in turn (as
    nobody's, where a cell has no such id)."""


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One directory of the cell's tree: lower directories, seen copy-on-write at ``at``."""

    at: str
    """Absolute path in the guest; ``/`` for the root, which must come first."""
    lowers: list[str]
    """Host directories, the uppermost first. Never written to."""
    writable: bool = True
    """Whether the guest gets a private upper layer here (copy-on-write) or sees the lowers read-only."""
    sealed: int = 0
    """How many of ``lowers``, from the first, are sealed layers (their owners are ids of the store, not the image's)."""
    owner: Owner | None = None
    """Whose files in the other lowers change hands, and the layer itself; None: everything is whose it is on disk.
    Cells of one user have only that one and pass it over."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved root file system."""

    ref: str
    """What the caller named: ``host``, ``dir:/path``..."""
    digest: str
    """``sha256:...`` of what identifies it (for ``host``: of its manifest)."""
    layers: list[Layer]
    environ: dict[str, str]
    """Environment of commands unless the caller gives another."""
    user: str = "agent"
    """User of commands unless the caller names another."""
    workdir: str = "/home/agent"


Processes = Literal["freeze", "end"]
"""What is done with a cell's processes while it is sealed: stopped for that moment, or ended."""


class SealedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One writable layer of a cell, copied as it was at one moment."""

    at: str
    """Where in the guest."""
    number: int
    """Its tree is ``<directory>/<number>``, its listing ``<directory>/<number>.list`` (format: native/seal.c)."""
    digest: str
    """``sha256:...`` of the listing, and so of every path, mode, owner and content in it."""
    entries: int
    bytes: int
    """Content, holes not counted."""


class Sealing(msgspec.Struct, frozen=True, kw_only=True):
    """What :meth:`Cell.seal` made."""

    layers: list[SealedLayer]
    alive: int
    """Processes of the cell at that moment. Nothing of their memory is kept."""
    stopped_ns: int
    """How long the cell stood still."""


class CellSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to build."""

    id: str
    """Unique on this machine; used in directory and cgroup names (``[a-z0-9-]``, at most 40 characters)."""
    image: Image
    limits: Limits
    hostname: str = "cell"
    root: GuestRoot = "plain"
    """A level or machine that cannot give ``owner`` refuses it (``ControlMissing``)."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One command of a step. ``argv[0]`` is looked up in the guest's own PATH by our code, never by a wrapper."""

    argv: list[bytes]
    environ: dict[str, str] | None = None
    """Added to (and overriding) the image's environment."""
    cwd: str | None = None
    """Absolute, or relative to the image's workdir."""
    user: str | None = None
    """Name or ``uid[:gid]`` inside the cell."""
    pty: bool = False
    """Give it a terminal of the cell's own devpts instead of pipes."""
    rows: int = 24
    columns: int = 80
    extra_pipes: int = 0
    """Further pipes handed in as descriptors 3, 4, ...: even ones towards the guest are not; see ``Child.extra``."""


@dataclass(frozen=True)
class Doors:
    """Sockets made inside the cell's network namespace, owned by us. Which socket it is tells which cell asks."""

    tcp: list[socket.socket]
    """Listening sockets (IPv4, IPv6). Every TCP connection of the guest that does not go to the cell's own
    loopback arrives here; ``SO_ORIGINAL_DST`` (``IP6T_SO_ORIGINAL_DST``) says where it wanted to go."""
    dns: list[socket.socket]
    """UDP sockets on port 53 of every address (IPv4, IPv6; ``IP_PKTINFO`` is on)."""
    packets: socket.socket | None
    """Netlink socket that delivers what was dropped (NFLOG group 1), or None where the kernel does not offer it."""
    diag: socket.socket | None
    """``NETLINK_SOCK_DIAG`` socket of the cell's network namespace: who owns a connection."""

    def close(self) -> None:
        """Close every door; the guest's attempts are then refused by the kernel."""
        for door in [*self.tcp, *self.dns, *filter(None, (self.packets, self.diag))]:
            door.close()


@dataclass
class Child:
    """A running command. The descriptors are ours, non-blocking, and closed by whoever took them."""

    pid: int
    """Process id on the host."""
    stdin: int | None
    """Write end; with ``pty`` the master, which is also ``stdout``."""
    stdout: int | None
    stderr: int | None
    extra: list[int] = field(default_factory=list)
    """Our ends of ``extra_pipes``: index 0 (guest fd 3) is written by us, index 1 (guest fd 4) is read by us, and so on by turns."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was used, from the kernel's own accounting. None where this machine does not tell."""

    cpu_ns: int | None = None
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    pids: int | None = None
    oom_kills: int | None = None


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None

    @property
    def status(self) -> int:
        """Shell convention: the code, or 128 + signal."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


class Cell(Protocol):
    """A live cell.

    Every coroutine raises ``CellGone`` once the cell has ended. A cell whose owner dies is ended by
    the kernel: its PID 1 holds one end of a socket whose other end only the node has.
    """

    id: str
    pid: int
    """Host pid of the cell's PID 1."""
    doors: Doors
    rootless: bool
    """Whether it was built without privilege (fewer walls; ``doctor`` names them)."""

    async def open_step(self, step: int) -> int | None:
        """Make room to charge for ``step`` and return the cgroup v2 id (inode), None under lineage."""
        ...

    def expect_command(self, step: int) -> None:
        """A command of ``step``, the next one, is to be expected: make ready what can be. May do nothing.

        Preconditions: whoever watches the cell's processes does so already: one may be made now that becomes the command.
        """
        ...

    async def spawn(self, command: Command, *, step: int) -> Child:
        """Start ``command`` inside the cell, in the cgroup of ``step`` from its first instruction.

        Postconditions: the process has the requested user, no capability (but root of an ``owner`` cell), no_new_privs, the seccomp
        filter, no descriptor but 0, 1, 2 and the extra pipes, and its own session.

        Raises:
            CommandNotFound, CommandNotExecutable: from execve itself, so a race cannot lie about it.
            InvalidInput: unknown user; cwd that does not exist.
        """
        ...

    async def wait(self, child: Child) -> Exit:
        """Wait for the command itself (not for what it left running)."""
        ...

    async def signal(self, child: Child, signum: int) -> None:
        """Send ``signum`` to the command's process group."""
        ...

    async def resize(self, child: Child, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        ...

    async def move(self, child: Child, *, step: int) -> None:
        """Charge ``child`` (only that process, not its children) to ``step`` from now on. For persistent shells."""
        ...

    def charge(self, pid: int, *, step: int) -> None:
        """Like :meth:`move`, for any process of the cell (see :meth:`pids`) and at once: the runtime of an agent, or a child
        of it that was told apart. ``step`` may be one that was never opened.

        Raises:
            SandboxError: it is gone, or the kernel refuses.
        """
        ...

    async def kill_step(self, step: int, *, spare: Child | None = None) -> int:
        """Kill every process charged to ``step`` (but ``spare``), return how many. They are gone on return."""
        ...

    async def freeze(self, *, step: int | None = None) -> None:
        """Stop every process of the step, or of the cell, where it stands."""
        ...

    async def thaw(self, *, step: int | None = None) -> None:
        """Undo :meth:`freeze`."""
        ...

    def pids(self, step: int | None = None) -> list[int]:
        """Host pids charged to the step, or of the whole cell without PID 1."""
        ...

    def step_of_pid(self, pid: int) -> tuple[int | None, str, float]:
        """(step, method, confidence) of a host pid: ``cgroup`` 1.0, or ``lineage`` with less."""
        ...

    def step_of_cgroup(self, cgroup_id: int) -> int | None:
        """Step that a cgroup v2 id belongs to; None when it is none of this cell's."""
        ...

    def usage(self, step: int | None = None) -> Usage:
        """What the step, or the whole cell, has used so far."""
        ...

    async def read_file(self, path: str, *, user: str | None = None, limit_bytes: int) -> bytes:
        """Read a regular file as ``user``, resolved inside the cell and nowhere else.

        Raises:
            GuestFileError: ENOENT, EACCES, EISDIR, ELOOP, EFBIG (larger than ``limit_bytes``), or
                EINVAL for what is not a regular file.
        """
        ...

    async def write_file(self, path: str, data: bytes, *, user: str | None = None, mode: int = 0o644) -> None:
        """Write a file as ``user``, making missing parent directories; never follows a link out of the cell.

        Raises:
            GuestFileError: EACCES, EISDIR, ENOSPC, EDQUOT...
        """
        ...

    async def seal(
        self, directory: Path, *, processes: Processes = "freeze", merge: bool = False, copy: bool = True
    ) -> Sealing:
        """Copy every writable layer into ``directory`` (empty, ours) as it is at one moment; the cell goes on.

        Only files are kept. Processes, their memory and their connections are not: with ``freeze`` they stand still
        meanwhile and go on after, with ``end`` they are killed first, so that nothing is caught halfway.

        Args:
            merge: take in the sealed layers that the cell lies on, so that the copy needs only the image.
            copy: False makes the listings only.

        Raises:
            CellGone: the cell has ended, or ends meanwhile.
            SandboxError: it could not be copied (disk full, directories nested too deep...); ``directory`` is to be deleted.
        """
        ...

    async def kill(self) -> int:
        """End everything in the cell. On return every process is dead and the doors are closed; mounts, cgroups and
        layer go with :meth:`close`, which the owner still calls. Returns how many processes were alive."""
        ...

    async def close(self) -> int:
        """End the cell: every process killed, mounts and cgroups gone, layer deleted. Returns how many were alive."""
        ...


class Backend(Protocol):
    """Builds cells of one level."""

    level: str

    async def start(self) -> None:
        """Get ready; remove what a crash left behind (cgroups, mounts, layers, processes).

        Raises:
            ControlMissing: this level cannot be had on this machine; says what is missing and the remedy.
        """
        ...

    def probe(self) -> dict[str, str]:
        """Control -> ``enforced``, ``degraded: why; remedy`` or ``missing: why; remedy``, by having attempted it."""
        ...

    async def create(self, spec: CellSpec) -> Cell:
        """Build a cell and return when its PID 1 is ready for commands.

        Raises:
            SandboxError: it could not be built; nothing is left behind.
        """
        ...

    async def discard(self, paths: list[Path]) -> None:
        """Delete directories that hold what guests wrote (sealed layers, what a crash left of them).

        Raises:
            SandboxError: one cannot be deleted.
        """
        ...

    async def stop(self) -> None:
        """End every cell and helper process."""
        ...
