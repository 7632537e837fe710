"""Vallum: run and train tool-using AI agents behind walls.

Every process, flow and DNS query of an agent is charged to one (run, episode, step) from kernel
facts; what is not permitted is stopped before its first byte; the record can be proved afterwards.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vallum.version import __version__

if TYPE_CHECKING:
    from vallum import sync
    from vallum.client.approvals import Approval
    from vallum.client.face import EventView, ExecResult, HostTool, Node, Process, Sandbox, Session
    from vallum.client.model import Model, ModelBudget, ModelPrice
    from vallum.client.snapshots import FileChange, FilesChanged, Snapshot
    from vallum.core.errors import (
        CellGone,
        CommandNotExecutable,
        CommandNotFound,
        Contained,
        ControlMissing,
        GatewayError,
        GuestFileError,
        InvalidInput,
        NodeError,
        RecordError,
        RuleError,
        SandboxError,
        StepTimeout,
        VallumError,
        VerificationError,
    )
    from vallum.core.limits import Limits

_PLACES = {
    "vallum.client.approvals": ("Approval",),
    "vallum.client.face": ("EventView", "ExecResult", "HostTool", "Node", "Process", "Sandbox", "Session"),
    "vallum.client.model": ("Model", "ModelBudget", "ModelPrice"),
    "vallum.client.snapshots": ("FileChange", "FilesChanged", "Snapshot"),
    "vallum.core.errors": (
        "CellGone",
        "CommandNotExecutable",
        "CommandNotFound",
        "Contained",
        "ControlMissing",
        "GatewayError",
        "GuestFileError",
        "InvalidInput",
        "NodeError",
        "RecordError",
        "RuleError",
        "SandboxError",
        "StepTimeout",
        "VallumError",
        "VerificationError",
    ),
    "vallum.core.limits": ("Limits",),
}
"""Module -> the public names that are its. Loaded when first used: the node's own processes need none of them."""

_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Approval",
    "CellGone",
    "CommandNotExecutable",
    "CommandNotFound",
    "Contained",
    "ControlMissing",
    "EventView",
    "ExecResult",
    "FileChange",
    "FilesChanged",
    "GatewayError",
    "GuestFileError",
    "HostTool",
    "InvalidInput",
    "Limits",
    "Model",
    "ModelBudget",
    "ModelPrice",
    "Node",
    "NodeError",
    "Process",
    "RecordError",
    "RuleError",
    "Sandbox",
    "SandboxError",
    "Session",
    "Snapshot",
    "StepTimeout",
    "VallumError",
    "VerificationError",
    "__version__",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name == "sync":
        return importlib.import_module("vallum.sync")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'vallum' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
