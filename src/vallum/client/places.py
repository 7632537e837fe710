"""Where things are kept on this machine. A pure function of an environment, so that tests can have their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Directories of one owner's node. All are 0700."""

    state: Path
    """Ledgers, index, images, layers of live cells. Survives a reboot."""
    runtime: Path
    """Socket, lock and log of the node."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], uid: int) -> Places:
        """``VALLUM_HOME`` when set; otherwise the system's directories for root and the XDG ones for others."""
        if home := environ.get("VALLUM_HOME"):
            return cls(state=Path(home), runtime=Path(home) / "run")
        if uid == 0:
            return cls(state=Path("/var/lib/vallum"), runtime=Path("/run/vallum"))
        base = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME", "/nonexistent")) / ".local/state")
        runtime = environ.get("XDG_RUNTIME_DIR")
        return cls(
            state=Path(base) / "vallum",
            runtime=Path(runtime) / "vallum" if runtime else Path(f"/tmp/vallum-{uid}"),  # noqa: S108 - made 0700 and its owner checked
        )

    @property
    def runs(self) -> Path:
        """One directory a run, holding ``ledger.log``."""
        return self.state / "runs"

    @property
    def cells(self) -> Path:
        """Upper layers of live cells."""
        return self.state / "cells"

    @property
    def images(self) -> Path:
        """Prepared root file systems."""
        return self.state / "images"

    @property
    def snapshots(self) -> Path:
        """Sealed layers; they survive the node."""
        return self.state / "snapshots"

    @property
    def packages(self) -> Path:
        """Package files that the gateway keeps; its user's."""
        return self.state / "packages"

    @property
    def credentials(self) -> Path:
        """The owner's secrets, one file each."""
        return self.state / "credentials"

    @property
    def socket(self) -> Path:
        """The node's Unix socket."""
        return self.runtime / "node.sock"
