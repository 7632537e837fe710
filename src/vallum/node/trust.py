"""What makes a cell trust its run's certificate authority: one directory a run, written once, under its cells' trees.

Only for cells whose rules may have TLS ended; others are as if this did not exist.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import msgspec

from vallum.core.errors import InvalidInput, SandboxError
from vallum.gateway.kit import Authority
from vallum.gateway.ssh.hostkey import KNOWN_HOSTS, write_known_hosts
from vallum.sandbox.base import Image
from vallum.sandbox.images.trust import trust_authority


def check_roots(pem: bytes) -> bytes:
    """The same certificates, if the gateway can use them.

    Raises:
        InvalidInput: they are not PEM.
    """
    if pem:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInput(
                f"the authorities of granted servers are not certificates ({error}): give a file of PEM certificates"
            ) from error
    return pem


class Trust:
    """The directories of the runs that are under way. Not safe for threads."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is ours alone; what is in it is deleted by :meth:`start`."""
        self._directory = directory
        self._made: dict[tuple[str, str], asyncio.Task[Image]] = {}

    def start(self) -> None:
        """Remove what a crash left behind.

        Raises:
            SandboxError: it cannot be removed or made.
        """
        try:
            if self._directory.exists():
                shutil.rmtree(self._directory)
            self._directory.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise SandboxError(
                f"{self._directory} cannot be emptied: {error.strerror}; remove it by hand and start again"
            ) from error

    async def equip(
        self, run: str, image: Image, authority: Authority, roots_pem: bytes, environ: Mapping[str, str]
    ) -> Image:
        """The image as a cell of ``run`` sees it: trusting ``authority`` and ``roots_pem``. Written once for all cells alike.

        Args:
            environ: variables that the caller set; they are kept as they are.

        Raises:
            SandboxError: the certificates cannot be written.
        """
        lowers = [(layer.at, layer.lowers) for layer in image.layers]
        key = (run, sha256(repr((lowers, authority.certificate_pem, roots_pem)).encode()).hexdigest()[:32])
        task = self._made.get(key)
        if task is None:
            directory = self._directory / run / key[1]
            work = asyncio.to_thread(
                trust_authority,
                image,
                authority.certificate_pem,
                roots_pem,
                directory,
                {KNOWN_HOSTS: write_known_hosts(authority)},
            )
            task = self._made[key] = asyncio.create_task(work)
        try:
            made = await asyncio.shield(task)
        except SandboxError:
            self._made.pop(key, None)
            raise
        added = {name: value for name, value in made.environ.items() if image.environ.get(name) != value}
        return msgspec.structs.replace(image, layers=made.layers, environ={**image.environ, **added, **environ})

    def stop(self) -> None:
        """No cell is left: delete everything."""
        self._made.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def release(self, run: str) -> None:
        """The run has no cell left: delete its directories."""
        gone = [key for key in self._made if key[0] == run]
        for key in gone:
            del self._made[key]
        if gone:
            shutil.rmtree(self._directory / run, ignore_errors=True)
