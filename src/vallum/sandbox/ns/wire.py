"""The wire between the node and ``vallum-cell``, as bytes. Pure; the C side is native/proto.h: change both or neither.

A message is four 32-bit words (operation, id, a, b) and a text, on a SOCK_SEQPACKET socket. What is longer travels
in a memfd as a payload: words, and strings as (length, bytes, NUL).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Layer, Owner

HEAD = struct.Struct("=IIii")
MAX_MESSAGE = 4096
MAX_LAYERS = 448
MAX_PAYLOAD = 512 * 1024 * 1024
MAX_USER = 128
"""Of a user's name in a message."""
MAX_WORD = 64 * 1024
"""Of the message that a waiting child becomes a command by."""

# node -> launcher, and back
L_CREATE, L_CANCEL, L_REMOVE, L_SEAL = 1, 2, 3, 4
L_READY, L_FAILED, L_REMOVED, L_SEALED = 1, 2, 3, 4
# node -> PID 1, and back
I_SPAWN, I_SIGNAL, I_KEEPER, I_READ, I_WRITE, I_PREPARE, I_CHECK = 1, 2, 3, 4, 5, 6, 20
E_HELLO, E_STARTED, E_FAILED, E_EXITED, E_KEEPER = 1, 2, 3, 4, 5

SPAWN_LEAF, SPAWN_PTY = 1, 2
SPEC_SINGLE_ID, SPEC_OWNER = 1, 2
STAGE_CLONE, STAGE_SETUP, STAGE_USER, STAGE_CWD, STAGE_EXEC, STAGE_FILE, STAGE_STALE = 1, 2, 3, 4, 5, 6, 7
DOOR_TCP4, DOOR_DNS4, DOOR_TCP6, DOOR_DNS6, DOOR_DIAG, DOOR_PACKETS = 1, 2, 4, 8, 16, 32
DOORS = (DOOR_TCP4, DOOR_DNS4, DOOR_TCP6, DOOR_DNS6, DOOR_DIAG, DOOR_PACKETS)
"""The order in which a cell hands them out."""

LANDLOCK_SHIFT = 8
"""Above the doors in the same word: the Landlock ABI in force."""

WARDEN_UID = 65535
"""PID 1's user inside a cell; refused for commands."""

STORE_BASE = 0x7FFE_0000
"""Host id that id 0 of a sealed layer has on disk: systemd's "foreign" range (UIDS-GIDS.md), made for trees of others
that are kept on disk. No process has these ids; a cell sees them as its own through an idmapped mount."""


@dataclass(frozen=True)
class Message:
    """One message of either side."""

    op: int
    id: int
    a: int = 0
    b: int = 0
    text: str = ""

    def encode(self) -> bytes:
        """The bytes to send."""
        return HEAD.pack(self.op, self.id, self.a, self.b) + self.text.encode()

    @classmethod
    def decode(cls, raw: bytes) -> Message | None:
        """The message that C sent; None for what is too short to be one."""
        if len(raw) < HEAD.size:
            return None
        op, ident, a, b = HEAD.unpack_from(raw)
        return cls(op, ident, a, b, raw[HEAD.size :].decode("utf-8", "backslashreplace"))


@dataclass
class Packer:
    """Builds a payload."""

    parts: list[bytes] = field(default_factory=list)

    def word(self, value: int) -> None:
        """One 32-bit word.

        Raises:
            InvalidInput: it does not fit.
        """
        if not 0 <= value <= 0xFFFFFFFF:
            raise InvalidInput(f"{value} is out of range")
        self.parts.append(struct.pack("=I", value))

    def text(self, value: str | bytes) -> None:
        """One string.

        Raises:
            InvalidInput: it contains a NUL byte, which no path, argument or variable can.
        """
        raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise InvalidInput("a path, an argument or a variable contains a NUL byte; remove it")
        self.parts += [struct.pack("=I", len(raw)), raw, b"\0"]

    def texts(self, values: Sequence[str | bytes]) -> None:
        """A list of strings."""
        self.word(len(values))
        for value in values:
            self.text(value)

    def owner(self, owner: Owner | None) -> None:
        """Ids that are swapped: user on disk, in the guest, then the group."""
        self.word(int(owner is not None))
        if owner is not None:
            for disk, guest in zip(owner.disk, owner.guest, strict=True):
                self.word(disk)
                self.word(guest)

    def bytes(self) -> bytes:
        """All of it.

        Raises:
            InvalidInput: larger than the other side takes.
        """
        raw = b"".join(self.parts)
        if len(raw) > MAX_PAYLOAD:
            raise InvalidInput(f"{len(raw)} bytes are too many for one request: at most {MAX_PAYLOAD}")
        return raw


@dataclass(frozen=True)
class Ids:
    """Which ids of the host a cell's ids are.

    With ``range_size`` > 0, guest ids 0.. are host ids ``base``..; otherwise one id is mapped: guest ``inner`` is
    host ``outer``.
    """

    base: int = 0
    range_size: int = 0
    inner: tuple[int, int] = (0, 0)
    outer: tuple[int, int] = (0, 0)

    @property
    def is_single(self) -> bool:
        """Rootless: one id."""
        return self.range_size == 0


@dataclass(frozen=True)
class PlacedLayer:
    """A layer and, when writable, the host directory that holds its ``upper`` and ``work``."""

    layer: Layer
    upper_dir: str = ""


def count_inodes(disk_bytes: int) -> int:
    """How many files a quota on disk allows: one for each 8 KiB, at least 4096 and at most a million.

    Each takes about a kilobyte of the kernel's memory, charged to the cell.
    """
    return min(max(disk_bytes // 8192, 4096), 1_000_000)


def encode_create(
    *,
    ids: Ids,
    port: int,
    processes: int,
    hostname: str,
    cgroups: Sequence[str],
    layers: Sequence[PlacedLayer],
    root_owns: bool = False,
    disk_bytes: int = 0,
) -> bytes:
    """What the launcher needs to build a cell.

    ``processes``: RLIMIT_NPROC, 0 for none. ``root_owns``: ``GuestRoot`` is ``owner``; needs a range of ids.
    ``disk_bytes``: quota of all writable layers together, which are then kept in memory; 0 for none, on disk.

    Raises:
        InvalidInput: too many layers, or the first is not at ``/``.
    """
    count = sum(len(p.layer.lowers) + 1 for p in layers)
    if not layers or layers[0].layer.at != "/" or any(not p.layer.lowers for p in layers):
        raise InvalidInput("the image has no layer at /, or a layer without directories; resolve it again")
    if count > MAX_LAYERS:
        raise InvalidInput(f"the image has {count} directories in its layers; at most {MAX_LAYERS} can be stacked")
    p = Packer()
    p.word((SPEC_SINGLE_ID if ids.is_single else 0) | (SPEC_OWNER if root_owns else 0))
    for value in (ids.base, ids.range_size, *ids.inner, *ids.outer, port, processes, STORE_BASE):
        p.word(value)
    p.word((disk_bytes + 1023) // 1024)
    p.word(count_inodes(disk_bytes) if disk_bytes else 0)
    p.text(hostname)
    p.texts(cgroups)
    p.word(len(layers))
    for placed in layers:
        p.text(placed.layer.at)
        p.word(int(placed.layer.writable))
        p.text(placed.upper_dir)
        p.word(placed.layer.sealed)
        p.owner(placed.layer.owner)
        p.texts(placed.layer.lowers)
    return p.bytes()


def encode_spawn(
    *, user: str, cwd: str, argv: Sequence[bytes], environ: Sequence[bytes], rows: int = 24, columns: int = 80
) -> bytes:
    """A command: ``environ`` as ``KEY=value``.

    Raises:
        InvalidInput: empty argv, a NUL byte, or too much of it.
    """
    if not argv:
        raise InvalidInput("the command is empty; give at least the name of a program")
    p = Packer()
    p.text(user)
    p.text(cwd)
    p.word(rows)
    p.word(columns)
    p.texts(argv)
    p.texts(environ)
    return p.bytes()


def encode_read(*, user: str, path: str, limit_bytes: int) -> bytes:
    """Read at most ``limit_bytes`` of ``path``."""
    p = Packer()
    p.text(user)
    p.text(path)
    p.word(limit_bytes & 0xFFFFFFFF)
    p.word(min(limit_bytes >> 32, 0x7FFFFFFF))
    return p.bytes()


def encode_write(*, user: str, path: str, mode: int, data: bytes) -> bytes:
    """Write ``data`` to ``path``; the data is the rest of the payload."""
    p = Packer()
    p.text(user)
    p.text(path)
    p.word(mode & 0o777)
    p.parts.append(data)
    return p.bytes()


def encode_check(*, user: str) -> bytes:
    """Try the walls as ``user``."""
    p = Packer()
    p.text(user)
    return p.bytes()


def encode_seal(
    *,
    ids: Ids,
    sources: Sequence[tuple[int, str]],
    below: Sequence[tuple[int, str, Owner | None]],
    tree: str,
    listing: str,
) -> bytes:
    """Seal ``sources`` (host id of id 0, directory; the uppermost first), which lie on ``below`` (the same, and whose ids
    are swapped there), as one.

    ``tree``: the new directory, "" to make nothing but the new file ``listing``.
    """
    p = Packer()
    for value in (ids.range_size, ids.inner[0], STORE_BASE):
        p.word(value)
    p.text(tree)
    p.text(listing)
    for places in ([(base, path, None) for base, path in sources], below):
        p.word(len(places))
        for base, path, owner in places:
            p.word(base)
            p.text(path)
            p.owner(owner)
    return p.bytes()


def encode_remove(paths: Sequence[str]) -> bytes:
    """Directories to delete."""
    p = Packer()
    p.texts(paths)
    return p.bytes()
