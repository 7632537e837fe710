"""The node's protocol: length-prefixed msgpack over a Unix stream socket.

A client sends requests with a ``seq`` of its choosing; the node answers each with exactly one
:class:`Reply` or :class:`Failure` of that ``seq``, and may send :class:`Output` of it before.
The connection is the client's life: when it closes, the node ends the client's cells.

Both ends are of one owner (the socket's directory is 0700 and peer credentials are checked), but
the node still validates every message: types by msgspec, sizes by :data:`MAX_FRAME_BYTES`.
"""

from __future__ import annotations

import re
import struct
from typing import Literal

import msgspec

from vallum.client.model import Model
from vallum.core.limits import Limits

PROTOCOL = 1
MAX_FRAME_BYTES = 512 * 1024 * 1024
LENGTH = struct.Struct(">I")
"""Before each frame: how many bytes its body has."""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """Fields of every request."""

    seq: int


class Hello(Request, frozen=True, tag="hello"):
    """First request of a connection."""

    protocol: int
    version: str


Phase = Literal["setup", "run"]


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds at a cell's door beside its rules; see :meth:`vallum.Node.sandbox`."""

    phase: Phase = "run"
    agent: str = ""
    """Name of the agent, for rules that are for one agent."""
    model: Model | None = None
    canaries: dict[str, bytes] = {}
    """Name -> bytes that must not leave any cell of the run."""
    plant_canaries: bool = False
    """Put a file of false keys into the cell, which are canaries."""
    credentials: list[str] | None = None
    """Names of the stored credentials that its rules may use; None: those that they name."""
    approval_timeout_s: float = 300.0
    package_min_age_s: float = 0.0
    upstream_roots: bytes = b""
    """PEM: authorities that granted servers may be signed by, beside the system's."""
    verify_upstream: bool = True
    """Whether the server of a TLS flow that is only relayed has to show a certificate for the granted name first."""


class CreateSandbox(Request, frozen=True, tag="sandbox.create"):
    """Build a cell. Answer: :class:`SandboxMade`."""

    image: str
    containment: str | None
    """None: what the rule file says, else ``standard``."""
    allow: list[str]
    rules: str | None
    """Text of a rule file."""
    rules_name: str
    """What to call it in messages."""
    mounts: list[str]
    limits: Limits
    run: str | None
    episode: str | None
    environ: dict[str, str]
    user: str | None
    workdir: str | None
    level: str
    command: list[str]
    """For the run's first record; empty for SDK runs."""
    root: Literal["plain", "owner"] = "plain"
    control: Control = Control()


class ForkSandbox(Request, frozen=True, tag="sandbox.fork"):
    """Build a cell on a snapshot. What is None or empty is as it was for the parent. Answer: :class:`SandboxMade`."""

    snapshot: str
    containment: str | None
    """Given: the parent's containment, grants and rules do not count, only what is given here."""
    allow: list[str]
    rules: str | None
    rules_name: str
    limits: Limits | None
    run: str | None
    episode: str | None
    environ: dict[str, str]
    user: str | None
    workdir: str | None
    control: Control | None = None
    """None: the defaults; the canaries of a run are of all its cells."""


class Snapshot(Request, frozen=True, tag="snapshot.make"):
    """Seal a cell's files. Answer: :class:`SnapshotInfo`."""

    sandbox: str
    processes: Literal["freeze", "end"]


class Snapshots(Request, frozen=True, tag="snapshot.list"):
    """Answer: a list of :class:`SnapshotInfo`, the newest first."""


class DeleteSnapshot(Request, frozen=True, tag="snapshot.delete"):
    """Answer: None."""

    snapshot: str


class Diff(Request, frozen=True, tag="files.diff"):
    """What changed in a cell's files. Answer: :class:`FilesChanged`."""

    sandbox: str
    since: int | str | None
    """A step after which a snapshot or diff was made, a snapshot, or None: since the cell began."""


class CloseSandbox(Request, frozen=True, tag="sandbox.close"):
    """End a cell. Answer: :class:`SandboxClosed`."""

    sandbox: str
    exit_code: int | None
    """What the caller counts as the run's exit code; None when it has none."""


class OpenStep(Request, frozen=True, tag="step.open"):
    """Open a step for several commands. Answer: its index."""

    sandbox: str
    tool_call: str | None


class CloseStep(Request, frozen=True, tag="step.close"):
    """Answer: None."""

    sandbox: str
    step: int


class ModelRequest(Request, frozen=True, tag="model.request"):
    """An HTTP request to the cell's model door, of an agent that runs on the host. Answer: :class:`ModelAnswer`."""

    sandbox: str
    method: str
    target: str
    """Path and query."""
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Exec(Request, frozen=True, tag="exec"):
    """Run a command. Answer: :class:`Ran`, after ``Output`` frames when ``stream``."""

    sandbox: str
    argv: list[bytes]
    step: int | None
    tool_call: str | None
    environ: dict[str, str]
    cwd: str | None
    user: str | None
    stdin: bytes | None
    """All of it; None and ``interactive`` for a stdin fed by :class:`Input`."""
    interactive: bool
    timeout_s: float | None
    stream: bool
    pty: bool
    rows: int
    columns: int


class Input(Request, frozen=True, tag="exec.input"):
    """Feed stdin of the exec with seq ``to``. Answer: None, once the guest has taken enough of it to send more."""

    to: int
    data: bytes
    eof: bool


class EnterStep(Request, frozen=True, tag="exec.enter_step"):
    """Charge the exec with seq ``to`` to another open step from now on. Answer: None."""

    to: int
    step: int


class Signal(Request, frozen=True, tag="exec.signal"):
    """Signal the exec with seq ``to``. No answer."""

    to: int
    signum: int


class Cancel(Request, frozen=True, tag="exec.cancel"):
    """End the command with seq ``to`` and everything it started. No answer of its own: the exec answers."""

    to: int


class Resize(Request, frozen=True, tag="exec.resize"):
    """Resize the terminal of the exec with seq ``to``. No answer."""

    to: int
    rows: int
    columns: int


class OpenSession(Request, frozen=True, tag="session.open"):
    """Start a persistent shell. Answer: its id."""

    sandbox: str
    environ: dict[str, str]
    cwd: str | None
    user: str | None


class SessionRun(Request, frozen=True, tag="session.run"):
    """Run a command line in a shell. Answer: :class:`Ran`."""

    session: str
    command: str
    step: int | None
    tool_call: str | None
    timeout_s: float | None


class CloseSession(Request, frozen=True, tag="session.close"):
    """Answer: None."""

    session: str


class ReadFile(Request, frozen=True, tag="file.read"):
    """Answer: bytes."""

    sandbox: str
    path: str
    user: str | None
    limit_bytes: int


class WriteFile(Request, frozen=True, tag="file.write"):
    """Answer: None."""

    sandbox: str
    path: str
    data: bytes
    user: str | None
    mode: int


Cursor = tuple[int, int, bytes]
"""A place between two records of a ledger: byte offset, number of records before it, hash of the last of them."""


class Events(Request, frozen=True, tag="events"):
    """Answer: :class:`EventPage`."""

    run: str
    episode: str | None
    start: Cursor | None
    limit: int


class SetPhase(Request, frozen=True, tag="sandbox.phase"):
    """Go from ``setup`` to ``run``. Answer: how many open flows were cut."""

    sandbox: str
    phase: Phase


class UpdateRules(Request, frozen=True, tag="rules.update"):
    """Other rules for one cell (of this client), or for every cell of a run (of any client of this owner).

    All or none: rules that cannot be used for one of the cells change nothing. Answer: :class:`RulesUpdated`.
    """

    sandbox: str | None
    run: str | None
    containment: str | None
    allow: list[str]
    rules: str | None
    rules_name: str
    by: Literal["sdk", "cli"]


class ListApprovals(Request, frozen=True, tag="approvals.list"):
    """What waits for a person. Answer: :class:`ApprovalPage`, at once or when it is another than ``seen``."""

    sandbox: str | None
    """Only of this cell."""
    seen: int
    """Revision of the page that is known already; -1: none."""
    wait_s: float


class Decide(Request, frozen=True, tag="approvals.decide"):
    """Allow or deny what waits. Answer: :class:`ApprovalInfo` of it."""

    approval: str
    verdict: Literal["allow", "deny"]
    why: str
    always: bool
    """With ``allow``: the rule asks no more in this run."""


class Status(Request, frozen=True, tag="status"):
    """Answer: :class:`NodeStatus`."""


class Stop(Request, frozen=True, tag="stop"):
    """Stop the node and every cell. Answer: None, just before it goes."""


TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class HostTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool of the host that a cell may call."""

    name: str
    description: str
    input_schema: bytes
    """JSON."""


class AddTool(Request, frozen=True, tag="tools.add"):
    """Offer a tool of this client to a cell, instead of one of the same name. Answer: None."""

    sandbox: str
    tool: HostTool


class TakeToolCall(Request, frozen=True, tag="tools.take"):
    """Wait for the next call of a tool. Answer: :class:`ToolCallMade`."""

    sandbox: str


class AnswerToolCall(Request, frozen=True, tag="tools.answer"):
    """Answer a call. Answer: None."""

    sandbox: str
    call: int
    result: str
    """JSON of an MCP ``CallToolResult``."""


class ToolCallMade(msgspec.Struct, frozen=True, kw_only=True):
    """A guest calls a tool of the host."""

    call: int
    name: str
    arguments: str
    """JSON."""


AnyRequest = (
    Hello
    | CreateSandbox
    | ForkSandbox
    | Snapshot
    | Snapshots
    | DeleteSnapshot
    | Diff
    | CloseSandbox
    | OpenStep
    | CloseStep
    | Exec
    | ModelRequest
    | AddTool
    | TakeToolCall
    | AnswerToolCall
    | Input
    | EnterStep
    | Signal
    | Cancel
    | Resize
    | OpenSession
    | SessionRun
    | CloseSession
    | ReadFile
    | WriteFile
    | Events
    | SetPhase
    | UpdateRules
    | ListApprovals
    | Decide
    | Status
    | Stop
)


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The node introduces itself."""

    version: str
    pid: int
    tiers: dict[str, str]


class SandboxMade(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that is ready for commands."""

    sandbox: str
    run: str
    episode: str
    pid: int
    rootless: bool


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot."""

    id: str
    run: str
    episode: str
    step: int | None
    """The last step before it."""
    digest: str
    parent: str | None
    created_ns: int
    image: str
    entries: int
    bytes: int
    processes: str
    alive: int
    depth: int
    """Snapshots that make it up, itself included."""


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """A path that is not as it was; fields as of the event ``file.change``."""

    path: str
    change: Literal["added", "changed", "removed"]
    type: str
    bytes: int | None
    mode: int | None
    uid: int | None
    sha256: str
    replaced: bool


class FilesChanged(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to :class:`Diff`."""

    changes: list[FileChange]
    """In the order of their paths; the first thousand."""
    first_step: int | None
    last_step: int | None
    added: int
    changed: int
    removed: int
    left_out: int
    """How many there are beyond ``changes``."""


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell used, for a summary. None where this machine does not tell."""

    steps: int
    processes: int
    denied: int
    findings: int
    cpu_ns: int | None
    memory_peak_bytes: int | None
    bytes_out: int
    bytes_in: int


class SandboxClosed(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that has ended."""

    survivors: int
    used: Used


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """A command that has ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    """What it wrote in all, kept or not."""
    stderr_bytes: int
    step: int
    duration_ns: int
    timed_out: bool


class RulesUpdated(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to :class:`UpdateRules`."""

    cells: list[str]
    digest: str
    """``sha256:...`` of the rules."""
    flows_cut: int


class ApprovalInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A held action. What a guest chose in it (``subject``) is hostile text: escape it."""

    id: str
    sandbox: str
    run: str
    episode: str
    step: int | None
    subject: str
    rule: str
    flow: str
    asked_ns: int
    """Wall clock, nanoseconds since the epoch."""
    timeout_s: float
    can_always: bool
    """Whether there is a rule that could stop asking."""


class ApprovalPage(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to :class:`ListApprovals`."""

    revision: int
    pending: list[ApprovalInfo]
    """The oldest first."""


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the node is doing."""

    version: str
    pid: int
    cells: int
    clients: int
    tiers: dict[str, str]


class EventPage(msgspec.Struct, frozen=True, kw_only=True):
    """Some events of a run."""

    lines: list[bytes]
    """JSON, oldest first, each with its ``id``."""
    next: Cursor | None
    """Where the next page starts; None at the end."""
    after: Cursor | None = None
    """Where what is recorded from now on starts: for who follows a run."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply", tag_field="m"):
    """The answer to request ``seq``: msgpack of its result."""

    seq: int
    result: bytes


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure", tag_field="m"):
    """Request ``seq`` failed."""

    seq: int
    error: str
    """Class name of ``vallum.core.errors``."""
    message: str
    errno_name: str = ""
    """Of a GuestFileError."""
    partial: bytes = b""
    """msgpack of a :class:`Ran` of a command that was stopped by its timeout."""


class ModelAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model door answered."""

    status: int
    headers: list[tuple[bytes, bytes]]
    """Names in lower case."""
    body: bytes


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output", tag_field="m"):
    """Bytes of a streaming exec."""

    seq: int
    stream: Literal["stdout", "stderr"]
    data: bytes


AnyMessage = Reply | Failure | Output

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(AnyRequest)
_messages = msgspec.msgpack.Decoder(AnyMessage)


def frame(message: object) -> bytes:
    """Bytes of one message."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def pack(result: object) -> bytes:
    """Bytes of a reply's result."""
    return _encoder.encode(result)


def decode_request(body: bytes) -> AnyRequest:
    """The request in one frame.

    Raises:
        MALFORMED (:mod:`vallum.core.decoding`): not a request of this protocol.
    """
    request: AnyRequest = _requests.decode(body)
    return request


def decode_message(body: bytes) -> AnyMessage:
    """What the node sent in one frame."""
    message: AnyMessage = _messages.decode(body)
    return message
