"""The project's own notes for agents, read from the cell. Text of the guest: it instructs the agent, and grants nothing."""

from __future__ import annotations

from vallum.client.face import Sandbox
from vallum.core.errors import GuestFileError
from vallum.core.text import keep

NAMES = ("AGENTS.md", "CLAUDE.md", "IFLOW.md")
"""In order of preference; the first that is there is used."""
MAX_BYTES = 32 * 1024


async def read_memory(sandbox: Sandbox, workdir: str) -> str:
    """The project's memory file in ``workdir``, cut at 32 KiB; empty when there is none."""
    for name in NAMES:
        try:
            raw = await sandbox.read_file(f"{workdir.rstrip('/')}/{name}", limit_bytes=MAX_BYTES)
        except GuestFileError as error:
            if error.errno_name == "EFBIG":
                return f"({name} is larger than {MAX_BYTES} bytes and was not read)"
            continue
        return f"Notes of this project ({name}):\n{keep(raw)}"
    return ""
