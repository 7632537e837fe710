"""From what a caller names to what a cell is built on."""

from __future__ import annotations

from pathlib import Path

from vallum.core.errors import InvalidInput
from vallum.sandbox.base import Image
from vallum.sandbox.images.directory import resolve_directory
from vallum.sandbox.images.host import resolve_host
from vallum.sandbox.images.mounts import with_mounts

__all__ = ["resolve", "with_mounts"]


def resolve(ref: str, *, images_dir: Path, rootless: bool) -> Image:
    """Resolve ``host`` (the curated host tree) or ``dir:/path``.

    Reads some hundred small files for ``host``; keep the result for as long as the host's programs stay as
    they are (a node resolves it once).

    Raises:
        InvalidInput: no such kind of image, or it cannot be used; says what can.
        SandboxError: it cannot be prepared.
    """
    if ref == "host":
        return resolve_host(images_dir=images_dir, rootless=rootless)
    if ref.startswith("dir:"):
        return resolve_directory(ref, rootless=rootless)
    kind = ref.partition(":")[0]
    if kind in ("oci", "docker"):
        raise InvalidInput(
            f"image {ref[:200]!r} is not usable: container images come in a later version; unpack it and use dir:/path, or use host"
        )
    raise InvalidInput(f"image {ref[:200]!r} is not known: use 'host' for the curated host tree, or dir:/path")
