"""The contract of a harness: how somebody else's agent is installed, told of the model door, and started.

A recipe changes nothing of the agent: it gives it the environment, the configuration files and the command line that its
own documentation describes. None holds a key: the cell's environment has the capability of its own door.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

MODEL_BASE = "http://model.vallum.internal"
"""The model door as a cell's programs see it. Plain HTTP: there is no network between a guest and its gateway."""
STATE = "/var/tmp/agent"  # noqa: S108 - of the guest; codex refuses places under /tmp
"""Where an agent keeps its configuration and state in the cell: writable in every image."""

Installer = Literal["npm", "pip"]
Dialect = Literal["chat", "responses", "messages", "gemini"]


@dataclass(frozen=True)
class Launch:
    """What starts the agent in a cell that has its tree."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Absolute path in the guest -> content, written before it starts."""


class Harness(Protocol):
    """An agent of others."""

    name: str
    version: str
    """Pinned: the command line and the configuration are this version's."""
    dialect: Dialect
    """What it speaks to its model."""
    installer: Installer
    packages: Sequence[str]
    """Exactly pinned requirements, the agent's own first."""
    program: str
    """Relative path in its tree; it is installed when this is there."""
    shows_command: str
    """How the command line of a child carries the text of a tool call (what :mod:`vallum.node.calltext` looks for)."""

    def make_launch(self, place: str, task: str, *, model: str) -> Launch:
        """How to start it on ``task``, headless, every action permitted (the cell is the wall), when its tree is at
        ``place`` in the guest. ``model``: the name to ask for."""
        ...
