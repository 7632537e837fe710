"""Host directories that a caller wants to see in a cell: ``/host/path:/guest/path[:ro]``, copy-on-write unless ``ro``.

Covered: the host's directory is never changed; places that are the host itself, hold credentials or talk to
its services are refused, also when named through a link. Not covered: secrets inside a directory
that the caller names; the caller decides that.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Image, Layer, Owner
from vallum.sandbox.images import accounts

_REFUSED_WITH_ALL_BELOW = (
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/var/run",
    "/etc",
    "/boot",
    "/var/lib/docker",
    "/var/lib/containerd",
)
_REFUSED_ITSELF = (
    "/",
    "/root",
    "/home",
    "/var",
    "/var/lib",
    "/var/log",
    "/usr",
    "/lib",
    "/bin",
    "/sbin",
    "/opt",
    "/tmp",  # noqa: S108 - refused, not used
    "/var/tmp",  # noqa: S108 - refused, not used
)
_CREDENTIALS = frozenset(
    {
        ".ssh",
        ".gnupg",
        ".aws",
        ".azure",
        ".kube",
        ".docker",
        ".gcloud",
        "gcloud",
        ".password-store",
        ".mozilla",
        "keyrings",
    }
)
_NO_GUEST_ID = 65535
"""Ids of a cell end before this one; its last is the warden's."""
_GUEST_REFUSED = ("/proc", "/sys", "/dev")


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One host directory in a cell."""

    source: str
    """Absolute path on the host, links resolved."""
    at: str
    """Absolute path in the guest."""
    writable: bool
    """Whether the guest may write; what it writes goes to its own layer."""


def with_mounts(image: Image, mounts: Sequence[str], *, refuse: Sequence[Path] = (), user: str | None = None) -> Image:
    """The image with more directories in it. What belongs to the owner of such a directory is seen as the user's of the cell.

    Args:
        image: what :func:`~vallum.sandbox.images.resolve.resolve` gave.
        mounts: ``HOST:GUEST`` or ``HOST:GUEST:ro``.
        refuse: further host directories that must not be seen, nor anything in or around them (the node's own).
        user: user of the cell's commands, where it is not the image's.

    Raises:
        InvalidInput: one is malformed, missing or refused; names it and says why.
    """
    layers = list(image.layers)
    for text in mounts:
        mount = check_mount(parse_mount(text), text, refuse)
        if any(layer.at == mount.at for layer in layers):
            raise InvalidInput(
                f"mount {text!r} is not usable: something is at {mount.at} already; choose another guest path"
            )
        owner = choose_owner(_owner_of(mount.source, text), user or image.user)
        layers.append(Layer(at=mount.at, lowers=[mount.source], writable=mount.writable, owner=owner))
    # A mount inside another one must come after it.
    layers[1:] = sorted(layers[1:], key=lambda layer: len(PurePosixPath(layer.at).parts))
    return msgspec.structs.replace(image, layers=layers)


def parse_mount(text: str) -> Mount:
    """Split ``HOST:GUEST[:ro|:rw]``. Pure: looks at nothing.

    Raises:
        InvalidInput: it is not of that form.
    """
    parts = text.split(":")
    mode = parts.pop() if len(parts) == 3 else "rw"
    if len(parts) != 2 or mode not in ("ro", "rw") or not all(parts):
        raise InvalidInput(
            f"mount {text!r} is not usable: write HOST:GUEST or HOST:GUEST:ro, with absolute paths without ':'"
        )
    source, at = parts
    if not source.startswith("/") or not at.startswith("/"):
        raise InvalidInput(f"mount {text!r} is not usable: both paths must be absolute")
    if any(".." in PurePosixPath(path).parts or re.search(r"[\x00-\x1f]", path) for path in parts):
        raise InvalidInput(f"mount {text!r} is not usable: '..' and control characters are not allowed in its paths")
    clean_at = "/" + "/".join(part for part in at.split("/") if part not in ("", "."))
    if clean_at == "/" or any(_is_within(clean_at, place) for place in _GUEST_REFUSED):
        raise InvalidInput(f"mount {text!r} is not usable: {clean_at} of a cell is its own")
    return Mount(source=source, at=clean_at, writable=mode == "rw")


def choose_owner(disk: tuple[int, int], user: str) -> Owner | None:
    """Who is to have a directory that belongs to ``disk`` on the host, so that ``user`` works in it as its owner does.

    ``user`` is a name or ``uid[:gid]``; a name other than root's is taken for the agent's. None when no cell has such
    ids. Pure.
    """
    uid, _, gid = ("0" if user == "root" else user).partition(":")
    guest = (
        (int(uid), int(gid) if gid.isascii() and gid.isdecimal() else int(uid))
        if uid.isascii() and uid.isdecimal()
        else (accounts.AGENT_ID, accounts.AGENT_ID)
    )
    if max(guest) >= _NO_GUEST_ID:
        return None
    return Owner(disk=disk, guest=guest)


def _owner_of(path: str, text: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise InvalidInput(f"mount {text!r} is not usable: {path} is not there or cannot be reached") from error
    return found.st_uid, found.st_gid


def check_mount(mount: Mount, text: str, refuse: Sequence[Path] = ()) -> Mount:
    """Look at the host's side; return the mount with links resolved.

    Raises:
        InvalidInput: it is missing, no directory, or refused.
    """
    try:
        real = Path(mount.source).resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise InvalidInput(f"mount {text!r} is not usable: {mount.source} is not there or cannot be reached") from error
    if not stat.S_ISDIR(mode):
        what = "a socket, device or pipe" if not stat.S_ISREG(mode) else "a file"
        raise InvalidInput(
            f"mount {text!r} is not usable: {mount.source} is {what}; only directories can be shown in a cell"
        )
    for path in (mount.source.rstrip("/") or "/", str(real)):
        if reason := find_refusal(path, [str(place) for place in refuse]):
            raise InvalidInput(
                f"mount {text!r} is refused: {reason}; name a directory that holds only what the cell needs"
            )
    return msgspec.structs.replace(mount, source=str(real))


def find_refusal(path: str, refuse: Sequence[str] = ()) -> str | None:
    """Why a host path must not be shown in a cell; None when it may. Pure."""
    if path in _REFUSED_ITSELF:
        return f"{path} is too much of the host"
    for place in _REFUSED_WITH_ALL_BELOW:
        if _is_within(path, place):
            return f"{place} belongs to the host's system"
    for place in refuse:
        if _is_within(path, place) or _is_within(place, path):
            return f"{path} holds files of this node"
    if found := _CREDENTIALS & set(PurePosixPath(path).parts):
        return f"{sorted(found)[0]} holds credentials"
    return None


def _is_within(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
