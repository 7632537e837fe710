"""What one cell may use. Units are in the names.

A limit that is given is enforced or the cell is refused. None asks for the node's default
(:data:`DEFAULTS`), which is applied where the machine can enforce it and said to be missing where not.
"""

from __future__ import annotations

import msgspec

from vallum.core.errors import InvalidInput

MIB = 1024 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quotas of a cell."""

    cpus: float | None = None
    """CPU time per wall time: 1.5 is one and a half cores. None: all of the machine's."""
    memory_bytes: int | None = None
    """Memory of all processes of the cell together; beyond it the kernel kills inside the cell."""
    pids: int | None = None
    """Processes and threads alive at once."""
    disk_bytes: int | None = None
    """Bytes that the cell may write to its own layers, together. A cell with this limit keeps them in its memory (they
    count towards ``memory_bytes``), may make one file for each 8 KiB of it (at least 4096), and cannot be snapshotted."""
    output_bytes: int = 10 * MIB
    """Bytes kept of each of stdout and stderr of one command: the first and the last half of it."""

    def check(self) -> Limits:
        """Return self.

        Raises:
            InvalidInput: a limit is not positive or too small to start a process.
        """
        if self.cpus is not None and not 0.01 <= self.cpus <= 4096:
            raise InvalidInput(f"cpus={self.cpus} is not usable: give a number of cores between 0.01 and 4096")
        if self.memory_bytes is not None and self.memory_bytes < 8 * MIB:
            raise InvalidInput(f"memory of {self.memory_bytes} bytes is too small to start a process: give at least 8M")
        if self.pids is not None and self.pids < 2:
            raise InvalidInput(f"pids={self.pids} is too small: give at least 2")
        if self.disk_bytes is not None and not MIB <= self.disk_bytes <= 1 << 42:
            raise InvalidInput(f"disk_bytes={self.disk_bytes} is not usable: give between 1M and 4T")
        if self.disk_bytes and self.memory_bytes and self.disk_bytes > self.memory_bytes:
            raise InvalidInput(
                f"disk_bytes={self.disk_bytes} is more than memory_bytes={self.memory_bytes}: "
                "what a cell with a quota on disk writes is kept in its memory; give it more memory or less disk"
            )
        if self.output_bytes < 1024:
            raise InvalidInput(f"output_bytes={self.output_bytes} is too small: give at least 1024")
        return self

    def with_defaults(self, enforceable: set[str]) -> Limits:
        """These limits with :data:`DEFAULTS` filled in for the names in ``enforceable`` that are not given."""
        missing = {
            name: value for name, value in DEFAULTS.items() if name in enforceable and getattr(self, name) is None
        }
        return msgspec.structs.replace(self, **missing)


DEFAULTS: dict[str, int] = {"memory_bytes": 2048 * MIB, "pids": 512}
"""Quotas of a cell whose caller names none."""
