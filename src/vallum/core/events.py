"""What can happen, as typed frozen facts.

Every event carries when, whose (:class:`~vallum.core.scope.Scope`) and how that is known
(:class:`~vallum.core.scope.Attribution`). ``kind`` is the tag. An event's id is its number in the
run's ledger, given when it is appended; ``evidence`` fields name those numbers.

Sensors state facts, rules give verdicts, detectors give findings; all of them are events.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vallum.core.scope import Attribution, Scope
from vallum.core.verdict import Severity, Verdict

SCHEMA_VERSION = 1

Protocol = Literal["http", "http2", "tls", "ssh", "stratum", "dns", "socks", "unknown"]
"""What the first bytes of a flow are, whatever its port says. ``unknown`` also stands for no bytes yet."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Fields of every event."""

    t_ns: int
    """Wall clock, nanoseconds since the epoch."""
    mono_ns: int
    """Monotonic clock, nanoseconds: order and latency within one boot."""
    scope: Scope
    attribution: Attribution


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """Which process did something, as the host's kernel sees it."""

    pid: int
    """Process id on the host."""
    exe: str
    """Path of the executable as seen in the guest; empty when the process was gone before it could be read."""
    argv: list[str]
    uid: int | None = None
    """User id inside the cell."""


class RunStarted(Event, frozen=True, tag="run.started"):
    """The first record of a run (and again when a later client goes on in it)."""

    command: list[str]
    """What was asked for; empty for an SDK run."""
    containment: str
    version: str
    """Version of vallum."""
    host: str
    kernel: str
    tiers: dict[str, str]
    """Control -> ``enforced``, ``degraded: why`` or ``missing: why``, as attempted at node start."""


class RunEnded(Event, frozen=True, tag="run.ended"):
    """The last record of a run."""

    outcome: str
    """``finished``, ``client_gone``, ``contained``, ``node_stopped``, or ``interrupted`` (written by the next node)."""
    exit_code: int | None = None


class EpisodeStarted(Event, frozen=True, tag="episode.started"):
    """A cell is ready, with these rules and limits."""

    sandbox: str
    """Id of the cell."""
    image: str
    image_digest: str
    level: str
    """``ns``, ``gvisor``..."""
    containment: str
    rules: list[str]
    """Every rule of the episode, one readable line each."""
    limits: dict[str, float | int | None]
    parent: str | None = None
    """Snapshot that the cell was forked from: it began with its files, and with none of its processes or memory."""
    root: str = "plain"
    """What user 0 of the cell may do: ``plain`` or ``owner`` (see ``vallum.sandbox.base.GuestRoot``)."""


class EpisodeEnded(Event, frozen=True, tag="episode.ended"):
    """A cell has ended and everything in it."""

    reason: str
    """``closed``, ``client_gone``, ``contained``, ``cell_died`` or ``node_stopped``."""
    survivors: int
    """Guest processes that were still alive and were killed."""


class StepOpened(Event, frozen=True, tag="step.opened"):
    """What happens from here on in this cgroup is charged to the step."""

    cause: str
    """``exec``, ``session``, ``block`` (several commands in one step), ``file`` or ``tool_call`` (a reply of the model)."""
    cgroup_id: int | None
    """Inode of the step's cgroup v2 directory; None where lineage replaces it."""


class StepClosed(Event, frozen=True, tag="step.closed"):
    """The agent went on. What the step left running is charged to it for ever."""

    duration_ns: int
    exit_code: int | None
    """Of its last command; None when it has none."""
    cpu_ns: int | None
    """CPU time of the step so far (what it left running goes on being charged to it)."""
    memory_peak_bytes: int | None
    processes: int | None
    """Processes started in the step, where a sensor counted them."""
    left_running: int | None
    """Processes of the step that were alive when it closed."""


class ToolCall(Event, frozen=True, tag="tool.call"):
    """A command given to the cell, or a call the model gateway saw. Written before it starts."""

    name: str
    """``exec``, ``session.run``, or the tool's name."""
    arguments: str
    """JSON, e.g. ``{"argv": [...], "cwd": ..., "user": ...}`` or ``{"command": "..."}``."""
    source: str = "sdk"
    """Where it was seen: ``sdk`` (a client asked the node), ``model`` (a reply that the model gateway passed on)."""
    model_call: str = ""
    """The ``model.call`` whose reply proposed it, where the model gateway saw that."""


class ToolResult(Event, frozen=True, tag="tool.result"):
    """How a tool call ended."""

    call: int
    """Id of its ``tool.call`` event."""
    exit_code: int | None
    """None when it never started or was stopped before it ended."""
    duration_ns: int
    output_bytes: int
    output_sha256: str
    timed_out: bool = False
    error: str = ""
    """Why it did not start, e.g. ``CommandNotFound: ...``."""


class ProcessStarted(Event, frozen=True, tag="process.started"):
    """A program was executed in the cell."""

    process: Process
    ppid: int
    sensor: str
    """Which sensor saw it, e.g. ``proc_connector``, ``cell_init``, ``proc_poll``."""


class ProcessExited(Event, frozen=True, tag="process.exited"):
    """A program of the cell ended."""

    pid: int
    exit_code: int | None
    signal: int | None
    sensor: str


class Flow(Event, frozen=True, tag="net.flow"):
    """A TCP connection that the guest asked for: once when decided, and once more when an allowed one closes."""

    state: Literal["opened", "closed", "denied"]
    flow: str
    """Id that the opened and closed events of one flow share."""
    verdict: Verdict
    rule: str
    reason: str
    dst_ip: str
    dst_port: int
    dst_host: str | None
    """Name that the guest asked for (pinned DNS answer, SNI or Host), None when it dialled an address."""
    protocol: Protocol
    bytes_out: int
    """Payload bytes guest -> outside that really left."""
    bytes_in: int
    process: Process | None
    decision_ns: int
    """From the gateway's accept to the verdict."""
    first_bytes: str = ""
    """Up to 128 first bytes of the guest, escaped, of a denied flow: evidence."""
    socket_step: int | None = None
    """Step whose cgroup is on the socket, where it is not the step charged."""
    phase: str = "run"
    """``setup`` or ``run``."""
    ja4: str = ""
    """Fingerprint of a TLS ClientHello (FoxIO JA4), empty for other protocols."""
    alpn: list[str] = []
    """Protocols that the ClientHello offered."""
    inspected: bool = False
    """The gateway ended the guest's TLS or parsed every request: each has an ``http.request`` event."""


class HttpRequest(Event, frozen=True, tag="http.request"):
    """A request that the gateway read: when decided (before its first byte leaves), and once more when an allowed one ended."""

    state: Literal["opened", "closed", "denied"]
    flow: str
    """Id of the ``net.flow`` that carries it."""
    request: str
    """Id that the opened and closed events of one request share."""
    verdict: Verdict
    rule: str
    reason: str
    method: str
    scheme: Literal["http", "https"]
    host: str
    port: int
    path: str
    """Path and query, escaped, secrets redacted; cut at 2,000 characters."""
    status: int | None = None
    bytes_out: int = 0
    """Body bytes guest -> outside that really left."""
    bytes_in: int = 0
    credential: str = ""
    """Name of the credential that was injected."""
    service: str = "forward"
    """Who answered: ``forward`` (the server), ``packages`` (through the cache), ``model``, ``tools``, ``gateway`` (refused)."""
    upgrade: str = ""
    """``websocket`` once both sides agreed on it."""
    messages_out: int = 0
    """WebSocket messages guest -> outside."""
    messages_in: int = 0
    phase: str = "run"


class SshSession(Event, frozen=True, tag="ssh.session"):
    """An exec, shell or subsystem inside SSH that the gateway ended: when decided, and once more when an allowed one ended."""

    state: Literal["opened", "closed", "denied"]
    flow: str
    """Id of the ``net.flow`` that carries it."""
    session: str
    """Id that the opened and closed events of one session share."""
    verdict: Verdict
    rule: str
    reason: str
    host: str
    port: int
    user: str
    """As whom the guest asked to log in."""
    wants: Literal["exec", "shell", "sftp", "git-read", "git-write", "other"]
    command: str
    """The command, or the subsystem; escaped, secrets redacted; cut at 2,000 characters."""
    terminal: bool = False
    exit_status: int | None = None
    bytes_out: int = 0
    """Payload guest -> server that really left."""
    bytes_in: int = 0
    credential: str = ""
    """Name of the key that the gateway logged in with."""
    phase: str = "run"


class PackageFetched(Event, frozen=True, tag="package.fetched"):
    """A package file that the guest asked a granted index for."""

    ecosystem: str
    """``pypi``, ``npm``, ``debian``."""
    name: str
    version: str
    digest: str
    """``sha256:...`` of the bytes that the guest was given, as the gateway counted them."""
    bytes: int
    source: Literal["index", "cache"]
    flow: str
    published_ns: int | None = None
    """When the index says it was published (nanoseconds since the epoch), where it says so."""


class ModelCall(Event, frozen=True, tag="model.call"):
    """A call of a model through the model gateway: when let through or denied, and once more when answered.

    The closing event is written before the last bytes of the answer reach the agent.
    """

    state: Literal["opened", "closed", "denied"]
    call: str
    """Id that the events of one call share."""
    verdict: Verdict
    rule: str
    reason: str
    dialect: str
    """``chat``, ``responses``, ``messages`` or ``gemini``."""
    model: str
    """As asked for."""
    model_used: str = ""
    """As sent upstream."""
    upstream: str = ""
    """Origin of the upstream, ``scripted`` or ``replay``."""
    stream: bool = False
    branch: str = ""
    """Id of the conversation: a chain of message hashes that goes on. A compaction or a sub-agent begins another one."""
    parent: str = ""
    """``call`` whose reply this one goes on from; empty at the start of a branch."""
    agent: str = ""
    """What the client's own headers say which of its agents asks; not evidence."""
    retry_of: str = ""
    """The call whose answer was given again."""
    messages: str = ""
    """JSON list: what is new since ``parent``, in the unified form of :mod:`vallum.core.messages`. Opening event only."""
    known: int = 0
    """How many messages of the conversation come before them: those of ``parent`` and its reply."""
    digest: str = ""
    """``sha256:...`` over all messages but the system's, as compared for a replay. Opening event only."""
    reply: str = ""
    """JSON: the answer in the unified form. Closing event only."""
    tools: str = ""
    """JSON list of tool definitions, when they differ from the parent's. Opening event only."""
    stripped: list[str] = []
    """Provider-hosted tools, remote MCP servers and URL contents that were taken out."""
    tool_calls: list[str] = []
    """Ids of the tool calls in the reply."""
    steps: list[int] = []
    """The steps that they opened, in the same order."""
    finish: str = ""
    """``stop``, ``tool_calls``, ``length``, ``filtered`` or ``error``."""
    status: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd_micros: int | None = None
    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    duration_ns: int = 0
    overhead_ns: int = 0
    """Of that, what the gateway itself took."""
    policy_version: str = ""
    """Version of the weights, where the upstream says so."""


class McpCall(Event, frozen=True, tag="mcp.call"):
    """A call of a tool of an MCP server through the door, decided before it left."""

    state: Literal["closed", "denied"]
    server: str
    """Host of the server, or ``tools`` for the node's own."""
    tool: str
    """Its name; ``resource:URI`` and ``prompt:NAME`` for those. Empty for other methods."""
    arguments: str
    """JSON, secrets redacted; cut at 8,000 characters."""
    verdict: Verdict
    rule: str
    reason: str
    flow: str
    method: str = "tools/call"
    is_error: bool = False
    result_bytes: int = 0
    duration_ns: int = 0
    hidden: int = 0
    """Entries that a list came back without, as they are not granted."""
    changed: tuple[str, ...] = ()
    """Tools that a list defines otherwise than the first one did; of a call: the tool, when its definition has changed."""


class ApprovalRequested(Event, frozen=True, tag="approval.requested"):
    """An action waits for a person. Nothing of it has left."""

    approval: str
    """Id for ``vallum approve`` and ``vallum deny``."""
    subject: str
    """What is asked, in one line."""
    rule: str
    flow: str
    timeout_s: float


class ApprovalDecided(Event, frozen=True, tag="approval.decided"):
    """A held action was decided."""

    approval: str
    verdict: Verdict
    by: str
    """User name (and uid) of who decided, or ``timeout``, ``cell-closed``, ``guest-gone``."""
    why: str
    waited_ns: int


class RulesChanged(Event, frozen=True, tag="rules.changed"):
    """Other rules, or another phase, hold for a cell from now on."""

    phase: str
    """``setup`` or ``run``."""
    rules: list[str]
    """Every rule, one readable line each."""
    digest: str
    """``sha256:...`` of the rules."""
    by: str
    """``sdk``, ``cli``, ``phase`` or ``approval`` (a rule that held asks no more)."""
    flows_cut: int = 0


class DnsQuery(Event, frozen=True, tag="dns.query"):
    """A name that the guest asked for, decided before anything was asked upstream."""

    qname: str
    qtype: str
    verdict: Verdict
    rule: str
    reason: str
    answers: list[str]
    transport: Literal["udp", "tcp"]
    process: Process | None
    decision_ns: int


class PacketDropped(Event, frozen=True, tag="net.packet"):
    """A packet that is neither TCP nor DNS and died inside the cell."""

    protocol: str
    """``udp``, ``icmp``, ``icmpv6``, ``sctp`` or ``ip-N``."""
    dst_ip: str
    dst_port: int | None
    bytes: int
    uid: int | None
    verdict: Verdict = "deny"
    rule: str = "no-udp-or-raw"


class FileWrite(Event, frozen=True, tag="file.write"):
    """A file that was written, where that is known."""

    path: str
    bytes: int
    sha256: str
    source: str
    """``sdk`` for write_file; a sensor's name otherwise."""


class SnapshotMade(Event, frozen=True, tag="snapshot.made"):
    """A cell's files were sealed at one moment. Its processes, their memory and connections are in no snapshot."""

    snapshot: str
    digest: str
    """``sha256:...`` over the image, the snapshot below it and the layers: names every path, owner, mode and content."""
    parent: str | None
    """Snapshot that the cell was forked from."""
    layers: dict[str, str]
    """Place in the guest -> ``sha256:...`` of the listing of the layer sealed there."""
    entries: int
    bytes: int
    processes: str
    """``freeze``: they stood still meanwhile and went on; ``end``: they were killed first."""
    alive: int
    """How many there were."""
    stopped_ns: int
    """How long the cell stood still."""


class FileChanged(Event, frozen=True, tag="file.change"):
    """A path of the cell that is not as it was. Seen by comparing contents when a snapshot or a diff was asked for."""

    path: str
    change: Literal["added", "changed", "removed"]
    type: str
    """``file``, ``directory``, ``link``, ``fifo`` or ``socket``; empty for what was removed and is not known."""
    bytes: int | None
    mode: int | None
    uid: int | None
    """Owner inside the cell."""
    sha256: str
    """Of the content (of a link: its target); of a file with large holes ``s`` and a digest of its blocks."""
    replaced: bool
    """A directory that was deleted and made again: what was in it before is gone."""
    first_step: int | None
    """It changed in the steps from this one to ``last_step``, or was changed then by what earlier ones left running."""
    last_step: int | None


class FilesCompared(Event, frozen=True, tag="files.compared"):
    """What the ``file.change`` events before it come to."""

    snapshot: str | None
    """The moment that was looked at, where it is a snapshot."""
    since: str | None
    """The snapshot it was compared with, where it is one."""
    first_step: int | None
    last_step: int | None
    added: int
    changed: int
    removed: int
    left_out: int
    """Of these, how many have no event of their own."""


class ResourceSample(Event, frozen=True, tag="resource.sample"):
    """What was in use: of the step when the scope has one, of the whole cell otherwise. None where the kernel does not tell."""

    cpu_ns: int | None
    memory_bytes: int | None
    memory_peak_bytes: int | None
    pids: int | None
    oom_kills: int | None = None


class VerdictGiven(Event, frozen=True, tag="verdict"):
    """A decision on something other than a flow or a query."""

    subject: str
    verdict: Verdict
    rule: str
    reason: str


class Finding(Event, frozen=True, tag="finding"):
    """A detector's claim, with the events that support it."""

    detector: str
    title: str
    severity: Severity
    attack: list[str]
    """MITRE ATT&CK technique ids."""
    summary: str
    evidence: list[int]
    """Ids of events of the same run."""


class ContainmentAction(Event, frozen=True, tag="containment.action"):
    """What was done to contain, and how long it took."""

    action: Literal["cut_flow", "kill_step", "freeze_step", "kill_cell", "freeze_cell", "hold", "release"]
    target: str
    reason: str
    latency_ns: int
    """From the fact that caused it to its effect."""
    cause: int | None = None
    """Id of the event that caused it."""


class SensorStatus(Event, frozen=True, tag="sensor.status"):
    """A sensor came, went, changed tier or lost something. Silence is never the answer."""

    sensor: str
    state: Literal["watching", "degraded", "blind", "stopped"]
    detail: str
    dropped: int = 0


class LedgerNote(Event, frozen=True, tag="ledger.note"):
    """The ledger speaks of itself, e.g. of a torn tail that was cut."""

    note: str


AnyEvent = (
    RunStarted
    | RunEnded
    | EpisodeStarted
    | EpisodeEnded
    | StepOpened
    | StepClosed
    | ToolCall
    | ToolResult
    | ProcessStarted
    | ProcessExited
    | Flow
    | HttpRequest
    | SshSession
    | PackageFetched
    | ModelCall
    | McpCall
    | ApprovalRequested
    | ApprovalDecided
    | RulesChanged
    | DnsQuery
    | PacketDropped
    | FileWrite
    | SnapshotMade
    | FileChanged
    | FilesCompared
    | ResourceSample
    | VerdictGiven
    | Finding
    | ContainmentAction
    | SensorStatus
    | LedgerNote
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its number in the run's ledger."""

    id: int
    event: AnyEvent


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """One line of JSON without a newline."""
    return _encoder.encode(event)


def decode(raw: bytes) -> AnyEvent:
    """The event that :func:`encode` wrote.

    Raises:
        MALFORMED (:mod:`vallum.core.decoding`): not an event of this schema.
    """
    event: AnyEvent = _decoder.decode(raw)
    return event
