"""What the JSON of an image says: index, manifest, configuration. Pure.

All of it is hostile. Unknown fields are ignored, as the specification asks; known ones are checked.
Source: OCI image-spec v1.1 (descriptor.md, image-index.md, manifest.md, config.md); Docker image manifest v2, schema 2.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from vallum.core.errors import InvalidInput
from vallum.core.text import show

MAX_JSON_BYTES = 4 << 20
"""Of a manifest or configuration, as registries have it."""
MAX_LAYERS = 400
REF_NAME = "org.opencontainers.image.ref.name"

_T = TypeVar("_T")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "loongarch64": "loong64"}


class Platform(msgspec.Struct, frozen=True):
    """For which machines an image is."""

    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """Names a blob by its content."""

    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None
    platform: Platform | None = None

    @property
    def tag(self) -> str | None:
        """What the layout calls it."""
        return (self.annotations or {}).get(REF_NAME)


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image's manifest, or an index of several."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None


class RootFs(msgspec.Struct, frozen=True):
    """The layers as plain archives, the lowest first."""

    diff_ids: list[str]
    type: str = "layers"


class Process(msgspec.Struct, frozen=True, rename="pascal"):
    """How the image wants to be run. ``entrypoint`` and ``cmd`` are data: nothing here runs them."""

    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None


class Config(msgspec.Struct, frozen=True):
    """An image's configuration."""

    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    config: Process | None = None


class Archived(msgspec.Struct, frozen=True, rename="pascal"):
    """One image of ``docker save``: names of files in the archive."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


def parse_manifest(raw: bytes, what: str) -> Manifest:
    """A manifest or an index; ``what`` names it in errors.

    Raises:
        InvalidInput: it is neither.
    """
    manifest = _decode(raw, Manifest, what)
    if manifest.schema_version == 1:
        raise InvalidInput(
            f"{what} is not usable: its manifest is of Docker's schema 1, which is no longer in use; push the image again"
        )
    if manifest.manifests is None and (manifest.config is None or manifest.layers is None):
        raise InvalidInput(f"{what} is not usable: its manifest names no configuration and layers")
    blobs = [*(manifest.manifests or ()), *(manifest.layers or ()), *([manifest.config] if manifest.config else ())]
    for blob in blobs:
        check_digest(blob.digest, what)
        if blob.size < 0:
            raise InvalidInput(f"{what} is not usable: the blob {blob.digest} has a negative size")
    return manifest


def parse_config(raw: bytes, what: str) -> Config:
    """A configuration, for this machine.

    Raises:
        InvalidInput: it is none, or the image is for other machines.
    """
    config = _decode(raw, Config, what)
    wanted = find_architecture()
    if config.os not in ("", "linux") or config.architecture not in ("", wanted):
        raise InvalidInput(
            f"{what} is for {show(config.os, 20)}/{show(config.architecture, 20)}, but this machine is linux/{wanted}; name an image for it"
        )
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) > MAX_LAYERS:
        raise InvalidInput(f"{what} has {len(diff_ids)} layers, but at most {MAX_LAYERS} can be stacked; flatten it")
    for digest in diff_ids:
        check_digest(digest, what)
    return config


def parse_archived(raw: bytes, what: str) -> list[Archived]:
    """``manifest.json`` of ``docker save``.

    Raises:
        InvalidInput: it is none.
    """
    return _decode(raw, list[Archived], what)


def _decode(raw: bytes, wanted: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(raw, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{what} is not usable: its JSON is not that of an image ({show(str(error))})") from error


def check_digest(digest: str, what: str) -> str:
    """The digest, if it is one that can be checked.

    Raises:
        InvalidInput: it is not ``sha256:`` and 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{what} is not usable: {show(digest, 100)!r} is not a sha256 digest")
    return digest


def find_architecture(machine: str | None = None) -> str:
    """This machine's architecture as images name it (Go's words)."""
    machine = machine or platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def choose_platform(descriptors: Sequence[Descriptor], what: str) -> Descriptor:
    """The manifest for this machine.

    Raises:
        InvalidInput: there is none; says for which there are.
    """
    wanted = find_architecture()
    for one in descriptors:
        if one.platform is not None and (one.platform.os, one.platform.architecture) == ("linux", wanted):
            return one
    if len(descriptors) == 1 and descriptors[0].platform is None:
        return descriptors[0]
    have = (
        ", ".join(sorted({f"{p.os}/{p.architecture}" for one in descriptors if (p := one.platform)})) or "no platform"
    )
    raise InvalidInput(f"{what} has no manifest for linux/{wanted}, only for {show(have)}")


def choose_tag(descriptors: Sequence[Descriptor], tag: str | None, what: str) -> Descriptor:
    """The entry of a layout's index that ``tag`` (or ``sha256:...``, or None for the only one) names.

    Raises:
        InvalidInput: there is none, or several; says which tags there are.
    """
    tags = ", ".join(sorted(one.tag for one in descriptors if one.tag)) or "none"
    if tag is not None:
        for one in descriptors:
            if tag in (one.tag, one.digest):
                return one
        raise InvalidInput(f"{what} is not there: the tags of that place are: {show(tags)}")
    if len(descriptors) == 1:
        return descriptors[0]
    if not descriptors:
        raise InvalidInput(f"{what} is not usable: it holds no image")
    if not any(one.tag for one in descriptors):
        return choose_platform(descriptors, what)
    raise InvalidInput(f"{what} holds several images: add one of these tags: {show(tags)}")


def parse_environ(env: Sequence[str]) -> dict[str, str]:
    """``NAME=value`` entries; what is not of that form, or cannot be passed to a program, is left out."""
    pairs = (entry.partition("=") for entry in env if "\0" not in entry)
    return {name: value for name, equals, value in pairs if equals and name}
