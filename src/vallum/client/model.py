"""The model that an agent in a cell may call, as the owner of the cell says it."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model costs, in micro-dollars per million tokens."""

    prompt_usd_micros: int = 0
    completion_usd_micros: int = 0
    cached_usd_micros: int = 0


class ModelBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much one episode may use; None is no limit. What would exceed it is denied with rule ``model-budget``."""

    calls: int | None = None
    tokens: int | None = None
    usd_micros: int | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the cell's model calls go. The agent holds no key of it: the door puts the credential in."""

    upstream: str
    """Base URL of a compatible server (``https://host[:port][/prefix]``), ``scripted`` or ``replay``."""
    dialect: Literal["same", "chat", "responses", "messages", "gemini"] = "same"
    """What the upstream speaks; ``same`` as the agent does."""
    credential: str = ""
    """Name of a stored credential (``vallum credentials``); empty: none is sent."""
    model: str = ""
    """Replaces the model that the agent asks for; empty keeps it."""
    temperature: float | None = None
    """Replaces the agent's."""
    want_token_ids: bool = False
    """Ask the upstream for token ids and log-probabilities."""
    price: ModelPrice = ModelPrice()
    budget: ModelBudget = ModelBudget()
    hosted: tuple[str, ...] = ()
    """Provider-hosted tools that are granted by type name; others are stripped."""
    script: bytes = b""
    """For ``scripted``: JSON list of replies; for ``replay``: JSON lines of recorded ``model.call`` events."""
    hold_tools: tuple[str, ...] = ()
    """Names of tools whose proposal waits for an approval before it reaches the agent."""
