"""Container images: ``oci:``, ``oci-archive:``, ``docker-archive:`` (on this machine) and ``docker://`` (a registry).

Every byte that is used was compared with a digest: the manifest's names the image, it names the configuration, that
names each layer as a plain archive. Layers are unpacked once and shared (see ``store.py``).
Covered: see ``layer.py`` and ``oci_source.py``. Not covered: who made an image; signatures are not looked at
(``docker://`` obeys ``containers-policy.json(5)``, which may ask for them).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vallum.core.errors import InvalidInput
from vallum.core.text import show
from vallum.sandbox.base import Image, Layer
from vallum.sandbox.images.layer import OPAQUE
from vallum.sandbox.images.oci_root import make_image
from vallum.sandbox.images.oci_source import Archive, Directory, Source, read_blob, read_json
from vallum.sandbox.images.oci_spec import (
    Config,
    Descriptor,
    check_digest,
    choose_platform,
    choose_tag,
    parse_archived,
    parse_config,
    parse_manifest,
)
from vallum.sandbox.images.pull import Pulled, parse_name, pull
from vallum.sandbox.images.store import LayerRef, Store, hash_bytes

_MOST_PREPARED = 256
_prepared: dict[tuple[str, bool, str], Image] = {}
"""Images that this process has prepared: what their digest names does not change."""

KINDS = ("oci", "oci-archive", "docker-archive", "docker")
"""Kinds of reference that :func:`resolve_oci` takes."""


@dataclass(frozen=True)
class Bundle:
    """An image whose parts are known but not yet unpacked."""

    what: str
    """For errors."""
    digest: str
    """Of the manifest (of the configuration, where there is none)."""
    config: Config
    layers: list[LayerRef]
    """The lowest first."""
    source: Source


def resolve_oci(ref: str, *, images_dir: Path, rootless: bool, stop: threading.Event | None = None) -> Image:
    """Prepare a container image. Takes as long as pulling and unpacking what is not yet in the store.

    Args:
        ref: ``oci:/layout[:tag|@sha256:...]``, ``oci-archive:/file.tar[:tag]``, ``docker-archive:/file.tar[:name:tag]``,
            ``docker://name[:tag|@sha256:...]``.
        images_dir: the image store.
        rootless: an ordinary user makes it: all of it is that user's, whom the guest sees as ``1000``.
        stop: when set, it ends with an error and leaves nothing half-made.

    Raises:
        InvalidInput: the image is not there, is not for this machine, is corrupt or hostile.
        SandboxError: the registry cannot be reached, the disk is full, a tool is missing.
    """
    store = Store(images_dir, owners=not rootless, stop=stop)
    what = f"image {show(ref)!r}"
    kind, _, rest = ref.partition(":")
    if kind == "docker":
        # Without the slashes it is no name: parse_name refuses it.
        return _resolve_pulled(ref, rest.removeprefix("//") if rest.startswith("//") else "", what, store)
    openers: dict[str, Callable[[Path, str | None, str], Bundle]] = {
        "oci": open_layout, "oci-archive": open_archive, "docker-archive": open_docker_archive,
    }  # fmt: skip
    path, tag = split_place(rest, what, Path.exists)
    return _unpack(ref, openers[kind](path, tag, what), store)


def split_place(rest: str, what: str, exists: Callable[[Path], bool]) -> tuple[Path, str | None]:
    """(path, tag) of what follows the kind. A colon may be part of the path: the longest one that exists counts.

    Raises:
        InvalidInput: relative, or nothing is there.
    """
    if not rest.startswith("/") or "\0" in rest:
        raise InvalidInput(f"{what} is not usable: it needs an absolute path")
    if exists(Path(rest)):
        return Path(rest), None
    at = rest.find("@sha256:")
    if at > 0 and exists(Path(rest[:at])):
        return Path(rest[:at]), rest[at + 1 :]
    end = len(rest)
    while (end := rest.rfind(":", 0, end)) > 0:
        if exists(Path(rest[:end])):
            return Path(rest[:end]), rest[end + 1 :]
    raise InvalidInput(f"{what} is not there: {show(rest)} does not exist or cannot be reached")


def open_layout(path: Path, tag: str | None, what: str) -> Bundle:
    """An OCI layout in a directory."""
    return _open_index(Directory(path, what), tag, what)


def open_archive(path: Path, tag: str | None, what: str) -> Bundle:
    """An OCI layout in a tar file."""
    return _open_index(Archive(path, what), tag, what)


def _open_index(source: Source, tag: str | None, what: str) -> Bundle:
    index = parse_manifest(read_json(source, "index.json", what), what)
    if index.manifests is None:
        raise InvalidInput(f"{what} is not usable: its index.json is no index; is it an OCI layout?")
    return open_manifest(source, choose_tag(index.manifests, tag, what), what)


def open_manifest(source: Source, descriptor: Descriptor, what: str) -> Bundle:
    """The image of a manifest, or of an index of manifests for several machines.

    Raises:
        InvalidInput: something is missing, corrupt or for other machines.
    """
    for _ in range(4):
        manifest = parse_manifest(read_blob(source, descriptor.digest, what), what)
        if manifest.manifests is None:
            break
        descriptor = choose_platform(manifest.manifests, what)
    else:
        raise InvalidInput(f"{what} is not usable: its indexes are nested too deeply")
    assert manifest.config is not None  # parse_manifest has seen to it
    assert manifest.layers is not None
    config = parse_config(read_blob(source, manifest.config.digest, what), what)
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise InvalidInput(
            f"{what} is not usable: its manifest has {len(manifest.layers)} layers, its configuration {len(diff_ids)}"
        )
    layers = []
    for diff_id, blob in zip(diff_ids, manifest.layers, strict=True):
        if blob.media_type.endswith("+encrypted"):
            raise InvalidInput(
                f"{what} is not usable: its layers are encrypted; decrypt it with skopeo copy --decryption-key"
            )
        layers.append(LayerRef(diff_id, blob.digest, blob.digest, blob.size))
    return Bundle(what, descriptor.digest, config, layers, source)


def open_docker_archive(path: Path, tag: str | None, what: str) -> Bundle:
    """What ``docker save`` wrote. It has no manifest: the digest is that of the configuration (Docker's image id)."""
    source = Archive(path, what)
    images = parse_archived(read_json(source, "manifest.json", what), what)
    if tag is not None:
        images = [one for one in images if tag in (one.repo_tags or ())]
    if len(images) != 1:
        raise InvalidInput(
            f"{what} is not usable: {len(images)} images of that name are in the archive; add :NAME:TAG of one of them"
        )
    raw = read_json(source, images[0].config, what)
    config = parse_config(raw, what)
    if len(config.rootfs.diff_ids) != len(images[0].layers):
        raise InvalidInput(f"{what} is not usable: its layers and its configuration do not agree")
    layers = [
        LayerRef(diff_id, name, None, None)
        for diff_id, name in zip(config.rootfs.diff_ids, images[0].layers, strict=True)
    ]
    return Bundle(what, hash_bytes(raw), config, layers, source)


# ---------------------------------------------------------------------- registries


def _resolve_pulled(ref: str, text: str, what: str, store: Store) -> Image:
    """An image of a registry: from the store when it was pulled before, else pulled."""
    name = parse_name(text, what)
    with store.hold_pull(name.full) as place:
        digest = store.read_ref(name.full)
        if digest is not None and (bundle := _open_kept(digest, what, store)) is not None:
            return _unpack(ref, bundle, store)
        # What the name stood for is pulled again if its layers were deleted, not what it stands for by now.
        pulled = pull(name if digest is None else name.pinned(digest), place, what, store)
        bundle = open_manifest(pulled.source, Descriptor(pulled.digest, 0), what)
        image = _unpack(ref, bundle, store)
        _keep(pulled, name.full, what, store)
        return image


def _keep(pulled: Pulled, name: str, what: str, store: Store) -> None:
    manifest = parse_manifest(raw := read_blob(pulled.source, pulled.digest, what), what)
    assert manifest.config is not None
    store.write_blob(read_blob(pulled.source, manifest.config.digest, what))
    store.write_blob(raw)
    store.write_ref(name, pulled.digest)


def _open_kept(digest: str, what: str, store: Store) -> Bundle | None:
    """A pulled image that is all there, None when something is missing."""
    if store.read_blob(check_digest(digest, what)) is None:
        return None
    try:
        bundle = open_manifest(Directory(store.directory, what), Descriptor(digest, 0), what)
    except InvalidInput:
        return None
    return bundle if all(store.find_layer(layer.diff_id).is_dir() for layer in bundle.layers) else None


# ---------------------------------------------------------------------- unpacking


def _unpack(ref: str, bundle: Bundle, store: Store) -> Image:
    key = (str(store.directory), store.owners, bundle.digest)
    known = _prepared.get(key)
    if known is not None and all(Path(lower).is_dir() for lower in known.layers[0].lowers):
        return msgspec.structs.replace(known, ref=ref)
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    image = _prepared[key] = _unpack_all(ref, bundle, store)
    return image


def _unpack_all(ref: str, bundle: Bundle, store: Store) -> Image:
    lowers: list[Path] = []
    for layer in bundle.layers:
        store.check_stop()
        path = store.add_layer(layer, bundle.source, bundle.what)
        if hides_all_below(path):
            lowers.clear()
        # Overlay refuses a directory twice. What a layer holds counts where it is uppermost: below it is redundant.
        lowers = [one for one in lowers if one != path] + [path]
    image = make_image(ref, bundle.digest, bundle.config, lowers[::-1], store)
    return Image(
        ref=ref,
        digest=bundle.digest,
        layers=[Layer(at="/", lowers=[str(path) for path in image.lowers])],
        environ=image.environ,
        user=image.user,
        workdir=image.workdir,
    )


def hides_all_below(layer: Path) -> bool:
    """Whether a layer's root is opaque, which overlay itself does not look at."""
    try:
        return os.getxattr(layer, OPAQUE) == b"y"
    except OSError:
        return False
