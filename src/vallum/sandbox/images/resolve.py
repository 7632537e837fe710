"""From what a caller names to what a cell is built on."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Image
from vallum.sandbox.images import oci
from vallum.sandbox.images.directory import resolve_directory
from vallum.sandbox.images.host import resolve_host
from vallum.sandbox.images.mounts import with_mounts

__all__ = ["resolve", "resolve_in_thread", "with_mounts"]


def resolve(ref: str, *, images_dir: Path, rootless: bool, stop: threading.Event | None = None) -> Image:
    """Resolve ``host`` (the curated host tree), ``dir:/path`` or a container image (see :mod:`.oci`).

    Reads some hundred small files for ``host``; keep the result for as long as the host's programs stay as
    they are (a node resolves it once). A container image takes as long as it takes to pull and unpack what is
    not in the store yet, and a millisecond after that.

    Args:
        ref: what the caller names.
        images_dir: the image store, 0700.
        rootless: an ordinary user makes it.
        stop: when set by another thread, pulling and unpacking end with an error and leave nothing half-made.

    Raises:
        InvalidInput: no such kind of image, or it cannot be used; says what can.
        SandboxError: it cannot be prepared.
    """
    if ref == "host":
        return resolve_host(images_dir=images_dir, rootless=rootless)
    kind = ref.partition(":")[0]
    if kind == "dir":
        return resolve_directory(ref, rootless=rootless)
    if kind in oci.KINDS and ref != kind:
        return oci.resolve_oci(ref, images_dir=images_dir, rootless=rootless, stop=stop)
    raise InvalidInput(
        f"image {ref[:200]!r} is not known: use 'host' for the curated host tree, dir:/path, oci:/layout:tag, "
        "oci-archive:/file.tar, docker-archive:/file.tar, or docker://registry/name:tag"
    )


async def resolve_in_thread(ref: str, *, images_dir: Path, rootless: bool) -> Image:
    """:func:`resolve` beside the event loop. When it is cancelled, pulling and unpacking end soon after."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(resolve, ref, images_dir=images_dir, rootless=rootless, stop=stop)
    finally:
        stop.set()
