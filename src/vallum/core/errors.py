"""The error model.

Every failure belongs to the boundary it crossed and is one clear sentence: what, where, what to do::

    VallumError
    +-- InvalidInput        what the caller gave cannot be used           exit 2
    +-- SandboxError        a cell could not be built, entered or ended   exit 125
    |   +-- CommandNotFound     no such command in the cell               exit 127
    |   +-- CommandNotExecutable  found, but may not be executed          exit 126
    |   +-- StepTimeout         its time was up; its processes are gone   exit 124
    |   +-- CellGone            the cell has ended
    |   +-- GuestFileError      a file operation failed inside the cell (``errno_name`` says how)
    +-- GatewayError        the door failed (it fails closed: nothing was forwarded)  exit 125
    +-- RuleError           a rule file cannot be used (names line and key)  exit 2
    +-- RecordError         the ledger cannot be written or read          exit 3
    |   +-- VerificationError   the record was changed; names the first bad record   exit 4
    +-- NodeError           the trusted process cannot be started or reached  exit 125
    |   +-- ControlMissing      a control that was asked for cannot be enforced here
    +-- Contained           containment stopped the command               exit 125

Verification raises; it never returns False. Judges that fail deny. Nothing is caught blindly: the
only broad handlers are at process boundaries and say why.
"""

from __future__ import annotations

from typing import Any


class VallumError(Exception):
    """Base of every error this package raises on purpose. ``str(error)`` is one sentence for a person."""

    exit_code = 1


class InvalidInput(VallumError):
    """The caller's input cannot be used."""

    exit_code = 2


class RuleError(InvalidInput):
    """A rule file cannot be used; the message names file, place and key."""


class SandboxError(VallumError):
    """A cell could not be built, entered or ended."""

    exit_code = 125


class CommandNotFound(SandboxError):
    """The command does not exist in the cell."""

    exit_code = 127


class CommandNotExecutable(SandboxError):
    """The command exists in the cell but may not be executed."""

    exit_code = 126


class StepTimeout(SandboxError, TimeoutError):
    """The time of a command was up. Its process tree has been killed."""

    exit_code = 124
    partial: Any = None
    """What the command had written (``stdout``, ``stderr``, ``step``), where that is known."""


class CellGone(SandboxError):
    """The cell has ended, so nothing more can be done in it."""


class GuestFileError(SandboxError):
    """A file operation failed inside the cell.

    ``errno_name`` is the kernel's word for it (``ENOENT``, ``EACCES``, ``EISDIR``, ``EFBIG``...).
    """

    def __init__(self, message: str, errno_name: str) -> None:
        super().__init__(message)
        self.errno_name = errno_name


class GatewayError(VallumError):
    """The door failed. It fails closed."""

    exit_code = 125


class RecordError(VallumError):
    """The ledger cannot be written or read."""

    exit_code = 3


class VerificationError(RecordError):
    """The record is not what was written. ``seq`` is the number of the first bad record."""

    exit_code = 4

    def __init__(self, message: str, seq: int) -> None:
        super().__init__(message)
        self.seq = seq


class NodeError(VallumError):
    """The trusted process cannot be started or reached."""

    exit_code = 125


class ControlMissing(NodeError):
    """A control that was asked for cannot be enforced on this machine."""


class Contained(VallumError):
    """Containment stopped the command."""

    exit_code = 125


BY_NAME: dict[str, type[VallumError]] = {
    cls.__name__: cls
    for cls in (
        VallumError,
        InvalidInput,
        RuleError,
        SandboxError,
        CommandNotFound,
        CommandNotExecutable,
        StepTimeout,
        CellGone,
        GatewayError,
        RecordError,
        NodeError,
        ControlMissing,
        Contained,
    )
}
"""Errors that cross the node's socket by name (GuestFileError and VerificationError carry a field and are named apart)."""
