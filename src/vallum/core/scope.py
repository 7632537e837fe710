"""Who a fact belongs to, and how that is known."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Literal

import msgspec

from vallum.core.errors import InvalidInput

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Method = Literal["cgroup", "argv", "socket", "lineage", "netns", "control", "none"]
"""How an event's step was found, strongest first:

``control``  the node did it itself (it opened the step, it started the command);
``cgroup``   the process's cgroup at the time of the fact (kernel; cannot be left by the guest);
``argv``     as ``cgroup``, but the process was put there because a child of the agent's runtime ran the text of that tool
             call while several calls were open (see ``vallum.node.agents``);
``socket``   the cgroup that the kernel stamped on the socket when it was made;
``lineage``  fork ancestry, where no cgroup can be had;
``netns``    only the cell is known (the fact came through that cell's own socket), not the step;
``none``     not attributed.
"""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The unit everything is charged to. Fields are None from the right: a fact of a whole episode has no step."""

    run: str
    """One launch of training, evaluation or serving, or one ``vallum run``."""
    episode: str | None = None
    """One attempt at a task: the life of one cell."""
    step: int | None = None
    """The agent's step, counted from 0 within the episode."""
    tool_call: str | None = None
    """The tool call inside the step, as the harness names it."""


class Attribution(msgspec.Struct, frozen=True, kw_only=True):
    """How a scope was derived. ``confidence`` is 1.0 when the kernel or the node itself says so."""

    method: Method
    confidence: float = 1.0
    candidates: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """Steps of tool calls that were open when the process was born and could not be told apart; the scope is then the
    agent's own step. Left out where there is no doubt."""


BY_NODE = Attribution(method="control")
"""The node's own act."""


def make_run_id() -> str:
    """A fresh run id that sorts by time, e.g. ``r-20261121-081500-9f3a1c``."""
    return f"r-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def check_id(value: str, what: str) -> str:
    """Return ``value`` when it may be used as an id (and therefore as a file name).

    Raises:
        InvalidInput: it is empty, longer than 64 characters, or has other characters than ``A-Za-z0-9._-``.
    """
    if not _ID.fullmatch(value):
        raise InvalidInput(
            f"{what} {value[:80]!r} is not usable: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return value
