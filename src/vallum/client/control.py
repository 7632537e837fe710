"""What a client says of a cell's door, put on the wire."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vallum.client import wire
from vallum.client.connection import Connection
from vallum.client.model import Model
from vallum.core.errors import InvalidInput

UPSTREAM_CA = "VALLUM_UPSTREAM_CA"


def make_control(
    *,
    phase: wire.Phase = "run",
    agent: str = "",
    model: Model | None = None,
    credentials: Sequence[str] | None = None,
    canaries: Mapping[str, str | bytes] | None = None,
    plant_canaries: bool = False,
    approval_timeout_s: float = 300.0,
    package_min_age_s: float = 0.0,
    upstream_ca: str | os.PathLike[str] | None = None,
    verify_upstream: bool = True,
) -> wire.Control:
    """Raises InvalidInput: a phase that there is not, or a file that cannot be read."""
    if phase not in ("setup", "run"):
        raise InvalidInput(f"phase={phase!r} is not usable: give 'setup' or 'run'")
    return wire.Control(
        phase=phase,
        agent=agent,
        model=model,
        canaries={
            name: value.encode() if isinstance(value, str) else bytes(value) for name, value in (canaries or {}).items()
        },
        plant_canaries=plant_canaries,
        credentials=None if credentials is None else list(credentials),
        approval_timeout_s=approval_timeout_s,
        package_min_age_s=package_min_age_s,
        upstream_roots=_read_roots(upstream_ca or os.environ.get(UPSTREAM_CA)),
        verify_upstream=verify_upstream,
    )


async def update_rules(
    connection: Connection,
    *,
    sandbox: str | None,
    run: str | None,
    containment: str | None,
    allow: Sequence[str],
    rules: str | os.PathLike[str] | None,
    by: Literal["sdk", "cli"],
) -> wire.RulesUpdated:
    """Ask the node for other rules."""
    text, name = read_rules(rules)
    request = wire.UpdateRules(
        seq=connection.next_seq(), sandbox=sandbox, run=run, containment=containment, allow=list(allow), rules=text,
        rules_name=name, by=by,
    )  # fmt: skip
    return await connection.call(request, wire.RulesUpdated)


def read_rules(rules: str | os.PathLike[str] | None) -> tuple[str | None, str]:
    """Text and name of a rule file; (None, "") without one.

    Raises:
        InvalidInput: it cannot be read.
    """
    if rules is None:
        return None, ""
    path = Path(rules)
    try:
        return path.read_text("utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput(f"the rule file {path} cannot be read ({why}): give the path of a TOML file") from error


def _read_roots(file: str | os.PathLike[str] | None) -> bytes:
    if not file:
        return b""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"the authorities of granted servers cannot be read from {file}: {error.strerror}"
        ) from error
