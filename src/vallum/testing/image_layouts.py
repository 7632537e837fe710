"""Container images made from scratch: tar, JSON and SHA-256, nothing else. For tests, hostile ones included."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vallum.sandbox.images.oci_spec import REF_NAME, find_architecture

OCI = "application/vnd.oci.image"


@dataclass(frozen=True)
class Item:
    """One member of a layer, as its author wants it."""

    name: str
    data: bytes | None = None
    """Content; None for what is no file."""
    kind: bytes = b""
    """Type flag; guessed when empty."""
    link: str = ""
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    mtime_s: int = 1_700_000_000
    pax: dict[str, str] = field(default_factory=dict)


def make_layer(items: Sequence[Item]) -> bytes:
    """A plain archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in items:
            info = tarfile.TarInfo(item.name.rstrip("/") or "./")
            if item.name.startswith(("/", "./")) or ".." in item.name:
                info.name = item.name
            info.type = item.kind or _guess(item)
            info.linkname = item.link
            info.size = len(item.data or b"") if info.type == tarfile.REGTYPE else 0
            info.mode = item.mode if item.mode is not None else (0o755 if info.type == tarfile.DIRTYPE else 0o644)
            info.uid, info.gid, info.mtime, info.pax_headers = item.uid, item.gid, item.mtime_s, dict(item.pax)
            archive.addfile(info, io.BytesIO(item.data or b""))
    return out.getvalue()


def _guess(item: Item) -> bytes:
    if item.data is not None:
        return tarfile.REGTYPE
    return tarfile.SYMTYPE if item.link else tarfile.DIRTYPE


def name_bytes(data: bytes) -> str:
    """``sha256:...``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Layout:
    """An OCI layout that is being written."""

    path: Path
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def add_blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Write a blob; give its descriptor."""
        digest = name_bytes(data)
        self.find_blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def find_blob(self, digest: str) -> Path:
        """Where a blob is."""
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def add_image(
        self,
        layers: Sequence[bytes],
        *,
        tag: str | None = "latest",
        process: dict[str, Any] | None = None,
        compress: str = "gzip",
        architecture: str | None = None,
        diff_ids: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Write an image of plain archives, the lowest first; give the descriptor of its manifest."""
        config = {
            "architecture": architecture or find_architecture(),
            "os": "linux",
            "config": process or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids or [name_bytes(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.add_blob(json.dumps(config).encode(), f"{OCI}.config.v1+json"),
            "layers": [self.add_blob(*_compress(layer, compress)) for layer in layers],
        }
        descriptor = self.add_blob(json.dumps(manifest).encode(), f"{OCI}.manifest.v1+json")
        if tag is not None:
            descriptor["annotations"] = {REF_NAME: tag}
        self.manifests.append(descriptor)
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))
        return descriptor


def _compress(layer: bytes, how: str) -> tuple[bytes, str]:
    if how == "gzip":
        return gzip.compress(layer, 1, mtime=0), f"{OCI}.layer.v1.tar+gzip"
    if how == "zstd":
        import zstandard

        return zstandard.compress(layer), f"{OCI}.layer.v1.tar+zstd"
    return layer, f"{OCI}.layer.v1.tar"


def make_layout(path: Path, layers: Sequence[Sequence[Item]], **options: Any) -> str:
    """A layout of one image, from members; its reference. ``options`` as for :meth:`Layout.add_image`."""
    Layout(path).add_image([make_layer(items) for items in layers], **options)
    return f"oci:{path}"


def pack_layout(layout: Path, archive: Path) -> str:
    """A layout as a tar file; its reference."""
    with tarfile.open(archive, "w") as out:
        for path in sorted(layout.rglob("*")):
            out.add(path, str(path.relative_to(layout)), recursive=False)
    return f"oci-archive:{archive}"


def make_docker_archive(archive: Path, layers: Sequence[bytes], name: str = "made:latest") -> str:
    """What ``docker save`` writes of an image; its reference."""
    config = {
        "architecture": find_architecture(),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [name_bytes(layer) for layer in layers]},
    }
    files = {f"{number}/layer.tar": layer for number, layer in enumerate(layers)}
    files["config.json"] = json.dumps(config).encode()
    listed = [{"Config": "config.json", "RepoTags": [name], "Layers": [f"{n}/layer.tar" for n in range(len(layers))]}]
    files["manifest.json"] = json.dumps(listed).encode()
    with tarfile.open(archive, "w") as out:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return f"docker-archive:{archive}"
