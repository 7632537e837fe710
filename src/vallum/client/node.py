"""The node as its client sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from vallum.client import wire
from vallum.client.approvals import Answer, Approval, OnApproval, decide, list_approvals
from vallum.client.connection import Connection, view
from vallum.client.control import make_control, read_rules, update_rules
from vallum.client.model import Model
from vallum.client.opening import Opener
from vallum.client.places import Places
from vallum.client.sandbox import Sandbox
from vallum.client.snapshots import Snapshot, make_fork, name_of, read_snapshot
from vallum.client.tools import HostTool
from vallum.core.errors import InvalidInput, NodeError
from vallum.core.limits import Limits
from vallum.version import __version__

Containment = Literal["locked", "standard", "research"]
GuestRoot = Literal["plain", "owner"]
_HELLOS = 5
"""How many nodes may end just as we come before that is an error."""


class EventView(dict[str, Any]):
    """One event, exactly what ``vallum events --json`` prints; fields may also be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return EventView(value) if isinstance(value, dict) else value


class Node:
    """The trusted process of this machine, as an async context manager.

    Starts the process when the owner has none running, and leaves it running when other clients
    still use it; it ends with its last client. Leaving the block ends this client's cells.

    Args:
        home: directory of its state instead of the default (or ``VALLUM_HOME``).
        places: the same, directory by directory.
        start: whether to start it when there is none; otherwise that is a NodeError.
    """

    def __init__(
        self,
        *,
        home: str | os.PathLike[str] | None = None,
        places: Places | None = None,
        start: bool = True,
    ) -> None:
        self._start = start
        environ = dict(os.environ)
        if home is not None:
            environ["VALLUM_HOME"] = os.path.abspath(home)  # noqa: PTH100 - no symlink is resolved
        self.places = places or Places.from_environ(environ, os.geteuid())
        self._connection: Connection | None = None
        self.tiers: dict[str, str] = {}
        """Control -> ``enforced``, ``degraded: why`` or ``missing: why``."""
        self.pid = 0

    async def __aenter__(self) -> Node:
        for left in reversed(range(_HELLOS)):
            self._connection = connection = await Connection.open(self.places, start=self._start)
            hello = wire.Hello(seq=connection.next_seq(), protocol=wire.PROTOCOL, version=__version__)
            try:
                welcome = await connection.call(hello, wire.Welcome)
            except NodeError:
                # A node that was just ending took the connection and dropped it; who comes next meets its successor.
                if connection.is_open or not left:
                    raise
            else:
                self.tiers, self.pid = welcome.tiers, welcome.pid
                break
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End this client's cells and leave."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    @property
    def connection(self) -> Connection:
        """The wire, for code that speaks it directly.

        Raises:
            NodeError: used outside the ``async with`` block.
        """
        if self._connection is None:
            raise NodeError("this Node is not open: use `async with vallum.Node() as node:`")
        return self._connection

    def sandbox(
        self,
        image: str = "host",
        *,
        containment: Containment | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
        mounts: Sequence[str] = (),
        limits: Limits | None = None,
        run: str | None = None,
        episode: str | None = None,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        level: str = "ns",
        root: GuestRoot = "plain",
        phase: wire.Phase = "run",
        agent: str = "",
        model: Model | None = None,
        credentials: Sequence[str] | None = None,
        canaries: Mapping[str, str | bytes] | None = None,
        plant_canaries: bool = False,
        on_approval: OnApproval | None = None,
        approval_timeout_s: float = 300.0,
        package_min_age_s: float = 0.0,
        upstream_ca: str | os.PathLike[str] | None = None,
        verify_upstream: bool = True,
        command: Sequence[str] = (),
        tools: Sequence[HostTool] = (),
    ) -> SandboxOpener:
        """A cell: ``async with node.sandbox(...) as sb`` or ``sb = await node.sandbox(...)``.

        Args:
            image: ``host`` (curated tree of this machine), ``dir:/path``, ``oci:/layout[:tag]``, ``oci-archive:/file``,
                ``docker-archive:/file`` or ``docker://name`` (see ``docs/images.md``).
            containment: ``locked`` (no network at all), ``standard`` (only what is granted; the default), ``research``
                (any public host over HTTP and TLS).
            allow: grants ``HOST[:PORT]``, ``*.HOST[:PORT]``, ``ADDRESS[:PORT]`` or ``CIDR[:PORT]``.
            rules: rule file (TOML).
            mounts: ``/host/path:/guest/path``, copy-on-write (the host is never written), or with ``:ro`` read-only.
            run, episode: ids; made up when not given. A run may have many episodes.
            environ: added to the image's environment; nothing of the caller's own is passed.
            level: isolation level.
            root: ``plain`` (user 0 of the cell has no more rights than any other user of it; the default) or ``owner``
                (it also owns every file of the cell and may become its other users, as ``adduser``, ``apt-get`` and ``tar``
                need; recorded; not rootless). What that opens: SECURITY.md, "Guest root".
            phase: ``setup`` or ``run``: rules may be for one of them. :meth:`Sandbox.set_phase` ends the set-up.
            agent: name of the agent, for rules that are for one agent.
            model: where the cell's model calls go.
            credentials: names of the stored credentials that the rules may use; None: those that they name.
            canaries: name -> bytes (8 to 4096) that must not leave any cell of the run in plain sight. Every stored
                credential's secret is one, too.
            plant_canaries: put a file of false keys (``~/.aws/credentials``) into the cell; they are canaries.
            on_approval: asked about what rules hold (see ``docs/approvals.md``); without it ``vallum approve`` is waited for.
            approval_timeout_s: what nobody decides by then is denied.
            package_min_age_s: versions of packages that are younger are refused, where the index tells their age.
            upstream_ca: PEM file of authorities that granted servers may be signed by, beside the system's (default:
                ``VALLUM_UPSTREAM_CA``).
            verify_upstream: a granted server has to show a certificate for the granted name before TLS is relayed to it.
            tools: functions of this process that the cell may call over MCP; see :meth:`Sandbox.add_tool`.

        Raises (when entered or awaited):
            InvalidInput, RuleError: an argument cannot be used.
            SandboxError, ControlMissing: the cell cannot be built here.
        """
        if root not in ("plain", "owner"):
            raise InvalidInput(f"root={root!r} is not usable: give 'plain' or 'owner'")
        text, rules_name = read_rules(rules)
        request = wire.CreateSandbox(
            seq=self.connection.next_seq(),
            image=image,
            containment=containment,
            allow=list(allow),
            rules=text,
            rules_name=rules_name,
            mounts=list(mounts),
            limits=(limits or Limits()).check(),
            run=run,
            episode=episode,
            environ=dict(environ or {}),
            user=user,
            workdir=workdir,
            level=level,
            root=root,
            command=list(command),
            control=make_control(
                phase=phase, agent=agent, model=model, credentials=credentials, canaries=canaries,
                plant_canaries=plant_canaries, approval_timeout_s=approval_timeout_s,
                package_min_age_s=package_min_age_s, upstream_ca=upstream_ca, verify_upstream=verify_upstream,
            ),
        )  # fmt: skip
        return SandboxOpener(self, request, on_approval, tools)

    def fork(
        self,
        snapshot: Snapshot | str,
        *,
        run: str | None = None,
        episode: str | None = None,
        containment: Containment | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        phase: wire.Phase = "run",
        agent: str = "",
        model: Model | None = None,
        credentials: Sequence[str] | None = None,
        canaries: Mapping[str, str | bytes] | None = None,
        on_approval: OnApproval | None = None,
        approval_timeout_s: float = 300.0,
        upstream_ca: str | os.PathLike[str] | None = None,
    ) -> SandboxOpener:
        """A new cell with the files of a snapshot: ``async with node.fork(snap) as sb`` or ``sb = await node.fork(snap)``.

        Files only: no process, memory or connection of the parent is in it. Many forks of one snapshot may live at
        once, and none can see or change what another has, nor the parent. Image, level, environment and limits are
        the parent's unless given.

        Args:
            snapshot: what :meth:`Sandbox.snapshot` gave, or its id.
            run: default: the parent's run when this client is still in it, else this client's own.
            containment: None: the parent's containment, grants and rules (``allow`` adds to them). Given: only what
                is given here counts.
            phase, agent, model...: as of :meth:`sandbox`; nothing of them is the parent's but the canaries of its run.

        Raises (when entered or awaited):
            InvalidInput: there is no such snapshot, or an argument cannot be used.
            SandboxError: its image is gone, or the cell cannot be built here.
        """
        text, name = read_rules(rules)
        request = make_fork(
            self.connection.next_seq(), snapshot, run=run, episode=episode, containment=containment, allow=allow,
            rules=text, rules_name=name, limits=limits, environ=environ, user=user, workdir=workdir,
            control=make_control(
                phase=phase, agent=agent, model=model, credentials=credentials, canaries=canaries,
                approval_timeout_s=approval_timeout_s, upstream_ca=upstream_ca,
            ),
        )  # fmt: skip
        return SandboxOpener(self, request, on_approval)

    async def snapshots(self) -> list[Snapshot]:
        """The snapshots of this home, of every run, the newest first. They stay until they are deleted."""
        request = wire.Snapshots(seq=self.connection.next_seq())
        return [read_snapshot(one) for one in await self.connection.call(request, list[wire.SnapshotInfo])]

    async def delete(self, snapshot: Snapshot | str) -> None:
        """Delete a snapshot.

        Raises:
            InvalidInput: there is none of that id; a live cell or another snapshot needs it.
        """
        request = wire.DeleteSnapshot(seq=self.connection.next_seq(), snapshot=name_of(snapshot))
        await self.connection.call(request, type(None))

    async def events(self, *, run: str, episode: str | None = None) -> list[EventView]:
        """Every recorded event of a run (or of one episode of it), oldest first."""
        found: list[EventView] = []
        start: wire.Cursor | None = None
        while True:
            request = wire.Events(seq=self.connection.next_seq(), run=run, episode=episode, start=start, limit=10_000)
            page = await self.connection.call(request, wire.EventPage)
            found += [EventView(view(line)) for line in page.lines]
            start = page.next
            if start is None:
                return found

    async def approvals(self) -> list[Approval]:
        """What waits for a person in this owner's node, of every client's cells, the oldest first."""
        return (await list_approvals(self.connection))[1]

    async def wait_for_approvals(self, seen: int, wait_s: float = 300.0) -> tuple[int, list[Approval]]:
        """As :meth:`approvals`, and its revision: returns when that is another than ``seen`` (-1: at once), or after ``wait_s``."""
        return await list_approvals(self.connection, seen=seen, wait_s=wait_s)

    async def decide(self, approval: Approval | str, answer: Answer, *, why: str = "") -> Approval:
        """Answer what waits: ``allow``, ``deny`` or ``always`` (allow, and its rule asks no more in this run).

        Who answered (by the kernel's word) and why is on record. Any process of the node's owner may answer.

        Raises:
            InvalidInput: it does not wait any more, or its rule cannot be told to stop asking.
        """
        return await decide(self.connection, approval if isinstance(approval, str) else approval.id, answer, why)

    async def update_rules(
        self,
        run: str,
        *,
        containment: Containment | None = None,
        allow: Sequence[str] = (),
        rules: str | os.PathLike[str] | None = None,
        by: Literal["sdk", "cli"] = "sdk",
    ) -> wire.RulesUpdated:
        """Other rules for every live cell of a run, whoever's, all or none; see :meth:`Sandbox.update_rules`."""
        return await update_rules(
            self.connection, sandbox=None, run=run, containment=containment, allow=allow, rules=rules, by=by
        )

    async def status(self) -> wire.NodeStatus:
        """What the node is doing."""
        return await self.connection.call(wire.Status(seq=self.connection.next_seq()), wire.NodeStatus)


class SandboxOpener(Opener[Sandbox]):
    """What ``node.sandbox(...)`` and ``node.fork(...)`` give: await it, or enter it."""

    def __init__(
        self,
        node: Node,
        request: wire.CreateSandbox | wire.ForkSandbox,
        on_approval: OnApproval | None,
        tools: Sequence[HostTool] = (),
    ) -> None:
        self._node = node
        self._request = request
        self._on_approval = on_approval
        self._tools = tools

    async def _open(self) -> Sandbox:
        made = await self._node.connection.call(self._request, wire.SandboxMade)
        sandbox = Sandbox(self._node.connection, made, self._on_approval)
        try:
            for tool in self._tools:
                await sandbox.add_tool(tool)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox
