"""Cells of the ns level for tests of what only this level promises, each in a home of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vallum.core.limits import Limits
from vallum.sandbox.base import Cell, CellSpec, GuestRoot, Image
from vallum.sandbox.cgroup.detect import find_driver
from vallum.sandbox.images.resolve import resolve
from vallum.sandbox.ns.backend import NsBackend
from vallum.sandbox.uidrange import UidRanges

NO_LIMITS = Limits(memory_bytes=None, pids=None, disk_bytes=None)


@asynccontextmanager
async def open_backend(home: Path, *, with_range: bool = True, with_groups: bool = True) -> AsyncIterator[NsBackend]:
    """A started backend over ``home``, stopped and swept at the end."""
    driver = find_driver(f"vallum.{secrets.token_hex(4)}") if with_groups else None
    backend = NsBackend(home / "cells", uids=UidRanges(home / "uids") if with_range else None, driver=driver)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()
        if driver is not None:
            driver.sweep()
            driver.close()


def make_spec(
    home: Path,
    *,
    limits: Limits = NO_LIMITS,
    rootless: bool = False,
    image: Image | None = None,
    root: GuestRoot = "plain",
) -> CellSpec:
    """A cell of the host's own tree, or of ``image``."""
    image = image or resolve("host", images_dir=home / "images", rootless=rootless or os.geteuid() != 0)
    return CellSpec(id=f"t{secrets.token_hex(5)}", image=image, limits=limits, root=root)


@asynccontextmanager
async def open_cell(
    home: Path,
    *,
    with_range: bool = True,
    with_groups: bool = True,
    limits: Limits = NO_LIMITS,
    image: Image | None = None,
    root: GuestRoot = "plain",
) -> AsyncIterator[Cell]:
    """One cell of a backend of its own."""
    async with open_backend(home, with_range=with_range, with_groups=with_groups) as backend:
        cell = await backend.create(make_spec(home, rootless=not with_range, limits=limits, image=image, root=root))
        try:
            yield cell
        finally:
            await cell.close()
