"""What to ask the launcher for when a cell's layers are sealed, and what it answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vallum.core.errors import SandboxError
from vallum.sandbox.base import SealedLayer
from vallum.sandbox.ns import wire


@dataclass(frozen=True)
class SealRequest:
    """One layer to seal."""

    at: str
    number: int
    payload: bytes


def list_requests(
    layers: Sequence[wire.PlacedLayer], ids: wire.Ids, directory: Path, *, merge: bool, copy: bool
) -> list[SealRequest]:
    """One request for each writable layer; where more is merged into it, another for a listing of what is its own."""
    requests = []
    for number, placed in enumerate(layers):
        if not placed.upper_dir:
            continue
        layer = placed.layer
        own = (ids.base, f"{placed.upper_dir}/upper")
        sealed = [(0 if ids.is_single else wire.STORE_BASE, lower) for lower in layer.lowers[: layer.sealed]]
        image = [(0, lower, layer.owner) for lower in layer.lowers[layer.sealed :]]
        under = [*((base, lower, None) for base, lower in sealed), *image]
        tree, base = str(directory / str(number)) if copy else "", str(directory / str(number))
        taken, below = ([own, *sealed], image) if merge and copy else ([own], under)
        payload = wire.encode_seal(ids=ids, sources=taken, below=below, tree=tree, listing=f"{base}.list")
        requests.append(SealRequest(layer.at, number, payload))
        if merge and copy and sealed:
            payload = wire.encode_seal(ids=ids, sources=[own], below=under, tree="", listing=f"{base}.own.list")
            requests.append(SealRequest(layer.at, number, payload))
    return requests


def read_summary(request: SealRequest, text: str) -> SealedLayer:
    """What the launcher said of a layer: entries, bytes and digest.

    Raises:
        SandboxError: it said something else.
    """
    words = text.split(" ")
    if len(words) != 3 or not words[0].isdecimal() or not words[1].isdecimal():
        raise SandboxError("the launcher of cells gave no account of a sealed layer; start the node again")
    return SealedLayer(
        at=request.at, number=request.number, digest=f"sha256:{words[2]}", entries=int(words[0]), bytes=int(words[1])
    )
