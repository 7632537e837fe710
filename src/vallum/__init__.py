"""Vallum: run and train tool-using AI agents behind walls.

Every process, flow and DNS query of an agent is charged to one (run, episode, step) from kernel
facts; what is not permitted is stopped before its first byte; the record can be proved afterwards.
"""

from __future__ import annotations

from vallum import sync
from vallum.client.approvals import Approval
from vallum.client.face import EventView, ExecResult, Node, Process, Sandbox, Session
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
from vallum.version import __version__

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
