"""What the node gives the gateway for one cell beside its rules: phase, credentials, canaries, certificate authority, services.

Kept in the memory of node and gateway only. A credential reaches neither the guest nor the record.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vallum.client.model import ModelBudget as ModelBudget
from vallum.client.model import ModelPrice as ModelPrice

Phase = Literal["setup", "run"]
ServiceName = Literal["forward", "packages", "mcp", "model", "tools"]

ZONE = "vallum.internal"
"""Names under it are answered by the gateway itself; nobody is asked."""
MODEL_HOST = f"model.{ZONE}"
TOOLS_HOST = f"tools.{ZONE}"
SERVICE_PORT = 80
"""Plain HTTP: between guest and gateway there is no network, only the cell's own loopback."""


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that the gateway puts into granted requests."""

    name: str
    hosts: tuple[str, ...]
    """Host patterns (as in rules) that it may be sent to; a rule that injects it elsewhere is an error."""
    header: str = "authorization"
    """Name of the header, or ``basic`` (user:password for Authorization: Basic), or ``ssh-key`` (PEM private key)."""
    prefix: str = "Bearer "
    secret: bytes
    user: str = ""
    """For ``ssh-key``: the user to log in as, whomever the guest names; empty: whom it names."""
    host_keys: tuple[str, ...] = ()
    """For ``ssh-key``: known_hosts lines of the servers it is for."""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that must never leave in plain sight: a planted token or a registered secret."""

    name: str
    value: bytes


class Authority(msgspec.Struct, frozen=True, kw_only=True, weakref=True):
    """The run's certificate authority, with which the gateway ends TLS where a rule needs to see requests."""

    certificate_pem: bytes
    key_pem: bytes


class ModelDoor(msgspec.Struct, frozen=True, kw_only=True):
    """The model gateway of one cell."""

    upstream: str
    """Base URL of a compatible server (``https://host[:port][/prefix]``), ``scripted`` or ``replay``."""
    dialect: Literal["same", "chat", "responses", "messages", "gemini"] = "same"
    """What the upstream speaks; ``same`` as the agent does."""
    capability: str
    """What the agent presents as its key. Only valid for this cell's own door."""
    credential: str = ""
    """Name of the credential for the upstream; it is looked up in :attr:`Kit.credentials`."""
    model: str = ""
    """Replaces the model that the agent asks for; empty keeps it."""
    temperature: float | None = None
    """Replaces the agent's."""
    want_token_ids: bool = False
    """Ask the upstream for token ids and log-probabilities (``return_token_ids``, ``logprobs``)."""
    price: ModelPrice = ModelPrice()
    budget: ModelBudget = ModelBudget()
    hosted: tuple[str, ...] = ()
    """Provider-hosted tools that are granted by type name (``web_search``, ``mcp``, ``url_content``...); others are stripped."""
    script: bytes = b""
    """For ``scripted``: JSON list of replies; for ``replay``: JSON lines of recorded ``model.call`` events."""
    hold_tools: tuple[str, ...] = ()
    """Names of tools whose proposal waits for an approval before it reaches the agent."""


class HostTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of the host that is offered to the guest over MCP at ``http://tools.vallum.internal/mcp``."""

    name: str
    description: str
    input_schema: bytes
    """JSON."""


class Kit(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one cell that is not a rule."""

    phase: Phase = "run"
    agent: str = ""
    """Name of the agent, for rules that are for one agent."""
    credentials: tuple[Credential, ...] = ()
    canaries: tuple[Canary, ...] = ()
    authority: Authority | None = None
    upstream_roots: bytes = b""
    """PEM: certificate authorities that granted servers may be signed by, beside those that the system trusts."""
    verify_upstream: bool = True
    """Whether the server of a TLS flow that is only relayed has to show a certificate for the granted name first."""
    model: ModelDoor | None = None
    tools: tuple[HostTool, ...] = ()
    package_min_age_s: float = 0.0
    """Package versions younger than this are refused (rule ``package-too-young``), where the index tells their age."""
    approval_timeout_s: float = 300.0
