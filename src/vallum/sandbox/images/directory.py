"""A directory of the host's as a root file system: ``dir:/path``."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Image, Layer
from vallum.sandbox.images import accounts
from vallum.sandbox.images.mounts import find_refusal


def resolve_directory(ref: str, *, rootless: bool) -> Image:
    """``dir:/path``, seen copy-on-write; commands run as the image's root unless the caller says otherwise.

    ``digest`` is of the directory's *identity* (real path, device, inode), not of its content, which may change
    between two cells: for a root file system that is the same each time, use one that is content-addressed.

    Raises:
        InvalidInput: relative, missing, no directory, or a place that is refused.
    """
    path = ref.removeprefix("dir:")
    if not path.startswith("/"):
        raise InvalidInput(f"image {ref!r} is not usable: dir: needs an absolute path")
    try:
        real = Path(path).resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError) as error:
        raise InvalidInput(f"image {ref!r} is not there: {path} does not exist or cannot be reached") from error
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidInput(f"image {ref!r} is not usable: {path} is not a directory")
    if reason := find_refusal(str(real)):
        raise InvalidInput(f"image {ref!r} is refused: {reason}; use the image 'host' for the host's programs")
    identity = f"dir\0{real}\0{found.st_dev}:{found.st_ino}"
    shell = "/bin/bash" if (real / "bin").is_dir() and (real / "bin/bash").exists() else "/bin/sh"
    home = "/" if rootless else "/root"
    user = f"{accounts.AGENT_ID}:{accounts.AGENT_ID}" if rootless else "0:0"
    return Image(
        ref=ref,
        digest=f"sha256:{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}",
        layers=[Layer(at="/", lowers=[str(real)])],
        environ={"PATH": accounts.PATH, "HOME": home, "SHELL": shell, "LANG": "C.UTF-8"},
        user=user,
        workdir="/",
    )
