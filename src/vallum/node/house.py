"""What the node is made of, wired together: cells, gateway, sensors, detectors, ledgers.

The only module that knows all of them. Everything that can go wrong with a judge ends the cells it judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import secrets
from collections.abc import AsyncIterator, Coroutine
from hashlib import sha256

from vallum.client import wire
from vallum.client.places import Places
from vallum.core import clock
from vallum.core.errors import (
    CellGone,
    Contained,
    ControlMissing,
    GuestFileError,
    InvalidInput,
    RecordError,
    SandboxError,
    VallumError,
)
from vallum.core.events import ContainmentAction, EpisodeEnded, EpisodeStarted, FileWrite, RunStarted
from vallum.core.limits import Limits
from vallum.core.scope import BY_NODE, Scope, check_id, make_run_id
from vallum.core.text import show
from vallum.gateway.kit import HostTool
from vallum.node.agents import AgentKeeper
from vallum.node.answers import Answers
from vallum.node.approvals import Approvals
from vallum.node.commands import CommandRunner, open_shell, run_in_shell
from vallum.node.control import Control
from vallum.node.credentials import CredentialStore
from vallum.node.door import Door
from vallum.node.live import LiveCell
from vallum.node.model_environ import make_environ
from vallum.node.pages import read_page
from vallum.node.recorder import Recorder, RunBook
from vallum.node.redaction import LogFilter, Redactor
from vallum.node.snapshots import Ground, Snapshots, describe, settle_terms
from vallum.node.spares import Spares, make_cell_id
from vallum.node.telemetry import make_feed
from vallum.node.tools import ToolCalls, check_tool
from vallum.node.trust import Trust
from vallum.node.watch import Watch
from vallum.sandbox.base import Backend, CellSpec, Image
from vallum.sandbox.images.resolve import resolve_in_thread, with_mounts
from vallum.sandbox.snapshots.store import Manifest
from vallum.version import __version__

log = logging.getLogger(__name__)

QUOTAS = {"cpus": "cgroup.cpu", "memory_bytes": "cgroup.memory", "pids": "cgroup.pids", "disk_bytes": "disk.quota"}
"""Limit -> the control that enforces it."""

FILE_WITHIN_S = 60.0
"""How long one file of a guest may take. The guest can slow down whoever reads or writes for it, so it has an end."""


@contextlib.asynccontextmanager
async def _in_time(path: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(FILE_WITHIN_S):
            yield
    except TimeoutError:
        raise GuestFileError(
            f"{show(path)!r} was given up after {FILE_WITHIN_S:.0f} s: the guest holds up whoever opens it", "ETIMEDOUT"
        ) from None


class House:
    """The node's state and its parts."""

    def __init__(self, places: Places, backends: dict[str, Backend]) -> None:
        self._places = places
        self._backends = backends
        redactor = Redactor()
        for handler in logging.getLogger().handlers:
            handler.addFilter(LogFilter(redactor.clean_text))
        self._recorder = Recorder(places.runs, self._go_blind, redactor)
        self._cells: dict[str, LiveCell] = {}
        self._sessions: dict[str, LiveCell] = {}
        self._default_runs: dict[int, str] = {}
        self._spares = Spares()
        self._images: dict[str, Image] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._watch = Watch(self._recorder, self._find_any, self.contain)
        self._answers = Answers(self._watch.questions, self._recorder.emit)
        self._answers.steps = AgentKeeper(self._find_any)
        self._door = Door(self._answers, places.packages)
        self._control = Control(CredentialStore(places.credentials), redactor, self._door)
        self.approvals = Approvals(
            self._find_any, lambda: list(self._cells.values()), self._watch.questions, self._control
        )
        self._answers.decide = self.approvals.ask
        self._tools = ToolCalls(self._find_any)
        self._answers.tool = self._tools.ask
        self._snapshots = Snapshots(places.snapshots, backends)
        self._trust = Trust(places.state / "trust")
        self.tiers: dict[str, str] = {}
        self.clients = 0
        self.is_broken = asyncio.Event()
        """Set when a part of the node died that it cannot do without."""

    async def start(self) -> None:
        """Start the parts and find out what this machine can enforce.

        Raises:
            ControlMissing: cells cannot be had here at all.
        """
        self._recorder.close_interrupted()
        self._recorder.feed, told = make_feed(os.environ)
        self.tiers.update(told)
        self._trust.start()
        for backend in self._backends.values():
            await backend.start()
            self.tiers.update(backend.probe())
        await self._snapshots.start()
        self.tiers.update(self._watch.start())
        self.tiers.update(await self._door.start(self._lose_gateway))

    async def stop(self) -> None:
        """End every cell, then every part, then every run."""
        ends = (self._end(live, "node_stopped") for live in list(self._cells.values()))
        await asyncio.gather(*ends, return_exceptions=True)
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        await self._door.stop()
        self._watch.stop()
        self._snapshots.stop()
        await self._spares.stop()
        for backend in self._backends.values():
            await backend.stop()
        self._trust.stop()
        self._recorder.close_all("node_stopped")
        if self._recorder.feed is not None:
            await asyncio.to_thread(self._recorder.feed.stop)

    # ------------------------------------------------------------------ cells

    async def create(self, request: wire.CreateSandbox, client: int) -> wire.SandboxMade:
        """Build a cell for a client; see :meth:`vallum.Node.sandbox`."""
        return await self._create(request, client, None)

    async def fork(self, request: wire.ForkSandbox, client: int) -> wire.SandboxMade:
        """Build a cell on a snapshot; see :meth:`vallum.Node.fork`."""
        origin = self._snapshots.store.get(request.snapshot)
        book = self._recorder.get(origin.run)
        is_here = book is not None and client in book.holders
        return await self._create(settle_terms(request, origin, origin.run if is_here else None), client, origin)

    async def _create(self, request: wire.CreateSandbox, client: int, origin: Manifest | None) -> wire.SandboxMade:
        if request.run is not None:
            check_id(request.run, "the run id")
        if request.episode is not None:
            check_id(request.episode, "the episode id")
        backend = self._backends.get(request.level)
        if backend is None:
            raise InvalidInput(
                f"there is no isolation level {request.level!r}: use one of {', '.join(sorted(self._backends))}"
            )
        run = request.run or self._default_runs.get(client) or make_run_id()
        terms = await self._control.prepare(request, run)
        image = await self._image(request, origin)
        self._control.check_environ(image.environ)
        equipped = image
        if (authority := terms.kit.authority) is not None:
            equipped = await self._trust.equip(run, image, authority, terms.kit.upstream_roots, request.environ)
        limits = self._limits(request.limits)
        book = self._book(request, run, client, terms.rules.containment)
        spec = CellSpec(id=make_cell_id(), image=equipped, limits=limits, root=request.root)
        episode = book.take_episode(request.episode)
        ground = Ground.of(request, image, origin)
        self._snapshots.stand(spec.id, ground)
        try:
            cell = await self._spares.take(backend, spec)
        except BaseException:
            self._snapshots.leave(spec.id)
            book.episodes.discard(episode)
            raise
        cell_id = cell.id
        if cell_id != spec.id:
            self._snapshots.leave(spec.id)
            self._snapshots.stand(cell_id, ground)
        live = LiveCell(cell, book, episode, client, limits, self._watch)
        live.environ = make_environ(terms.kit)
        self._cells[cell_id] = live
        try:
            book.emit(
                EpisodeStarted(
                    t_ns=clock.wall_ns(),
                    mono_ns=clock.mono_ns(),
                    scope=live.scope(),
                    attribution=BY_NODE,
                    sandbox=cell_id,
                    image=image.ref,
                    image_digest=image.digest,
                    level=request.level,
                    root=request.root,
                    containment=terms.rules.containment,
                    rules=terms.rules.describe(),
                    limits={name: getattr(limits, name) for name in limits.__struct_fields__},
                    parent=origin.id if origin is not None else None,
                )
            )
            self._watch.add(live)
            await self._control.open(live, terms, image.environ.get("HOME", image.workdir))
        except BaseException:
            await self._end(live, "not_started")
            raise
        return wire.SandboxMade(sandbox=cell_id, run=book.run, episode=episode, pid=cell.pid, rootless=cell.rootless)

    async def _image(self, request: wire.CreateSandbox, origin: Manifest | None) -> Image:
        if origin is not None:
            image = self._snapshots.make_image(origin, rootless=not self._has_users)
        else:
            image = with_mounts(
                await self._resolve(request.image), request.mounts, user=request.user,
                refuse=[self._places.state, self._places.runtime],
            )  # fmt: skip
        environ = {**image.environ, **request.environ}
        return Image(
            ref=image.ref,
            digest=image.digest,
            layers=image.layers,
            environ=environ,
            user=request.user or image.user,
            workdir=request.workdir or image.workdir,
        )

    async def _resolve(self, ref: str) -> Image:
        """The image of a reference; that of the host is prepared once in the life of a node."""
        image = self._images.get(ref)
        if image is None:
            image = await resolve_in_thread(
                ref,
                images_dir=self._places.images,
                rootless=not self._has_users,
            )
            if ref == "host":
                self._images[ref] = image
        return image

    @property
    def _has_users(self) -> bool:
        return self.tiers.get("cell.users", "").startswith("enforced")

    def _limits(self, wanted: Limits) -> Limits:
        limits = wanted.check()
        can = {name for name, control in QUOTAS.items() if self.tiers.get(control, "missing").startswith("enforced")}
        for name, control in QUOTAS.items():
            if getattr(limits, name) is not None and name not in can:
                raise ControlMissing(
                    f"the limit {name} was asked for but cannot be enforced here: {self.tiers.get(control, 'missing: not built yet')}"
                )
        return limits.with_defaults(can).check()

    def _book(self, request: wire.CreateSandbox, run: str, client: int, containment: str) -> RunBook:
        if request.run is None:
            self._default_runs[client] = run
        book, is_new = self._recorder.open(run)
        book.holders.add(client)
        if is_new:
            book.emit(
                RunStarted(
                    t_ns=clock.wall_ns(),
                    mono_ns=clock.mono_ns(),
                    scope=Scope(run=run),
                    attribution=BY_NODE,
                    command=request.command,
                    containment=containment,
                    version=__version__,
                    host=platform.node(),
                    kernel=platform.release(),
                    tiers=self.tiers,
                )
            )
        return book

    def find(self, sandbox: str, client: int) -> LiveCell | None:
        """A client's live cell."""
        live = self._cells.get(sandbox)
        return live if live is not None and live.client == client else None

    def _find_any(self, sandbox: str) -> LiveCell | None:
        return self._cells.get(sandbox)

    def get(self, sandbox: str, client: int) -> LiveCell:
        """A client's live cell.

        Raises:
            CellGone: it has none of that id, or it has ended.
        """
        live = self.find(sandbox, client)
        if live is None or live.is_closing:
            raise CellGone(f"cell {sandbox} has ended")
        return live

    async def close(self, request: wire.CloseSandbox, client: int) -> wire.SandboxClosed:
        """End a cell and say what it used. A cell that has ended already is no error."""
        live = self.get(request.sandbox, client)
        if request.exit_code is not None:
            live.book.exit_code = request.exit_code
        usage = live.cell.usage()
        survivors = await self._end(live, "closed")
        tally = live.book.tally(live.episode)
        return wire.SandboxClosed(
            survivors=survivors,
            used=wire.Used(
                steps=tally.steps,
                processes=tally.processes,
                denied=tally.denied,
                findings=tally.findings,
                cpu_ns=usage.cpu_ns,
                memory_peak_bytes=usage.memory_peak_bytes,
                bytes_out=tally.bytes_out,
                bytes_in=tally.bytes_in,
            ),
        )

    async def _end(self, live: LiveCell, reason: str) -> int:
        if live.is_closing:
            return 0
        live.is_closing = True
        self.approvals.end_cell(live)
        with contextlib.suppress(VallumError):
            live.agents.close_all()
            live.settle()
        survivors, failure = 0, None
        try:
            survivors, _ = await asyncio.gather(live.cell.kill(), self._close_doors(live))
        except SandboxError as error:
            # A process that waits in the kernel: it has no door any more, and nobody else shall wait for it.
            log.error("cell %s: %s", live.id, error)
            failure = error
        self._snapshots.leave(live.id)
        self._control.leave(live)
        self._tools.forget(live.id)
        self._watch.remove(live)
        self._cells.pop(live.id, None)
        for session, shell in live.shells.items():
            self._sessions.pop(session, None)
            shell.let_go()
        with contextlib.suppress(RecordError):
            live.emit(
                EpisodeEnded(
                    t_ns=clock.wall_ns(),
                    mono_ns=clock.mono_ns(),
                    scope=live.scope(),
                    attribution=BY_NODE,
                    reason=reason,
                    survivors=survivors,
                )
            )
        self._later(self._put_away(live))
        if failure is not None:
            raise failure
        return survivors

    async def _close_doors(self, live: LiveCell) -> None:
        with contextlib.suppress(VallumError):
            await self._door.remove(live)

    async def _put_away(self, live: LiveCell) -> None:
        """What need not keep a client waiting once everything in its cell is dead. Awaited when the node stops."""
        try:
            await live.cell.close()
        except VallumError as error:
            log.error("cell %s has ended, but not all of it could be removed: %s", live.id, error)
        await self._make_durable(live)

    async def _make_durable(self, live: LiveCell) -> None:
        if self._recorder.get(live.book.run) is not live.book:
            return  # closed meanwhile, which is durable
        try:
            await asyncio.to_thread(live.book.ledger.sync)
        except RecordError as error:
            log.error("the record of run %s could not be made durable: %s", live.book.run, error)

    async def forget_client(self, client: int) -> None:
        """End the cells of a client that has gone, and the runs that nobody holds any more."""
        mine = [live for live in self._cells.values() if live.client == client]
        await asyncio.gather(*(self._end(live, "client_gone") for live in mine), return_exceptions=True)
        self._default_runs.pop(client, None)
        for book in self._recorder.books():
            if client in book.holders:
                book.holders.discard(client)
                if not book.holders:
                    self._recorder.close(book.run, "client_gone" if mine else "finished")
                    self._control.forget_run(book.run)
                    self._trust.release(book.run)

    # ------------------------------------------------------------------ what holds at the door

    async def set_phase(self, request: wire.SetPhase, client: int) -> int:
        """From ``setup`` to ``run``; see :meth:`vallum.Sandbox.set_phase`."""
        return await self._control.set_phase(self.get(request.sandbox, client), request.phase)

    async def update_rules(self, request: wire.UpdateRules, client: int) -> wire.RulesUpdated:
        """Other rules for a client's cell, or for every cell of a run, whoever's (every client is of one owner)."""
        if request.sandbox is not None:
            return await self._control.update([self.get(request.sandbox, client)], request)
        cells = [live for live in self._cells.values() if live.book.run == request.run and not live.is_closing]
        if not cells:
            raise InvalidInput(
                f"run {show(request.run or '')!r} has no live cell in this node: its rules cannot change any more"
            )
        return await self._control.update(cells, request)

    async def list_approvals(self, request: wire.ListApprovals, client: int) -> wire.ApprovalPage:
        """What waits for a person, of every client's cells."""
        return await self.approvals.list(request)

    # ------------------------------------------------------------------ commands

    async def run_command(self, runner: CommandRunner | None, request: wire.Exec, client: int) -> wire.Ran:
        """Run a command to its end."""
        live = self.get(request.sandbox, client)
        self._control.check_environ(request.environ)
        assert runner is not None, "made when the request came in, for the same cell"
        try:
            return await runner.run()
        except CellGone:
            self._raise_if_contained(live)
            raise

    def settle(self) -> None:
        """Have the ends of steps in the record that could wait so far."""
        for live in self._cells.values():
            live.close_due()

    async def close_step(self, request: wire.CloseStep, client: int) -> None:
        """Close a step that was opened for several commands."""
        live = self.get(request.sandbox, client)
        step = live.steps.get(request.step)
        if step is not None and not step.is_open and live.agents.was_proposed(step.index):
            return  # the model was asked again, and so the step of its call was over
        if step is None or not step.is_open or not step.is_block:
            raise InvalidInput(f"step {request.step} of cell {request.sandbox} is not open")
        live.close_step(step)

    async def ask_model(self, request: wire.ModelRequest, client: int) -> wire.ModelAnswer:
        """Have a cell's model door answer a request of an agent on the host."""
        live = self.get(request.sandbox, client)
        served = await self._door.serve_request(
            live, method=request.method, target=request.target, headers=request.headers, body=request.body
        )
        return wire.ModelAnswer(status=served.status, headers=list(served.headers), body=served.body)

    async def add_tool(self, request: wire.AddTool, client: int) -> None:
        """Offer a tool of the client to a cell."""
        check_tool(request.tool)
        tool = HostTool(
            name=request.tool.name, description=request.tool.description, input_schema=request.tool.input_schema
        )
        await self._control.add_tool(self.get(request.sandbox, client), tool)

    async def take_tool_call(self, request: wire.TakeToolCall, client: int) -> wire.ToolCallMade:
        """Wait for the next call of a tool of the client."""
        return await self._tools.take(self.get(request.sandbox, client))

    async def answer_tool_call(self, request: wire.AnswerToolCall, client: int) -> None:
        """The client's answer to a call."""
        self._tools.answer(self.get(request.sandbox, client), request)

    async def open_session(self, request: wire.OpenSession, client: int) -> str:
        """Start a persistent shell and give its id."""
        live = self.get(request.sandbox, client)
        self._control.check_environ(request.environ)
        session = f"s{secrets.token_hex(5)}"
        await open_shell(live, request, session)
        self._sessions[session] = live
        return session

    def _session(self, session: str, client: int) -> LiveCell:
        live = self._sessions.get(session)
        if live is None or live.client != client or session not in live.shells:
            raise CellGone(f"session {session} has ended")
        return live

    async def run_session(self, request: wire.SessionRun, client: int) -> wire.Ran:
        """Run a command line in a persistent shell."""
        live = self._session(request.session, client)
        try:
            return await run_in_shell(live, live.shells[request.session], request)
        except CellGone:
            self._raise_if_contained(live)
            raise

    async def close_session(self, request: wire.CloseSession, client: int) -> None:
        """End a shell (and only it). One that has ended already is no error."""
        session = request.session
        found = self._sessions.get(session)
        if found is None or found.client != client or session not in found.shells:
            return
        live, shell = found, found.shells.pop(session)
        self._sessions.pop(session, None)
        shell.let_go()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.cell.wait(shell.child), 1.0)
            return
        await live.cell.signal(shell.child, 9)
        await live.cell.wait(shell.child)

    @staticmethod
    def _raise_if_contained(live: LiveCell) -> None:
        if live.contained:
            raise Contained(live.contained)

    async def read_file(self, request: wire.ReadFile, client: int) -> bytes:
        """Read a file of a cell."""
        live = self.get(request.sandbox, client)
        async with _in_time(request.path):
            return await live.cell.read_file(request.path, user=request.user, limit_bytes=request.limit_bytes)

    async def write_file(self, request: wire.WriteFile, client: int) -> None:
        """Write a file of a cell; it is recorded as the node's own act."""
        live = self.get(request.sandbox, client)
        async with _in_time(request.path):
            await live.cell.write_file(request.path, request.data, user=request.user, mode=request.mode)
        live.emit(
            FileWrite(
                t_ns=clock.wall_ns(),
                mono_ns=clock.mono_ns(),
                scope=live.scope(),
                attribution=BY_NODE,
                path=request.path,
                bytes=len(request.data),
                sha256=sha256(request.data).hexdigest(),
                source="sdk",
            )
        )

    # ------------------------------------------------------------------ snapshots

    async def take_snapshot(self, request: wire.Snapshot, client: int) -> wire.SnapshotInfo:
        """Seal a cell's files; see :meth:`vallum.Sandbox.snapshot`."""
        return describe(await self._snapshots.take(self.get(request.sandbox, client), request.processes))

    async def list_snapshots(self, request: wire.Snapshots, client: int) -> list[wire.SnapshotInfo]:
        """Those of this home."""
        return [describe(manifest) for manifest in self._snapshots.store.all()]

    async def delete_snapshot(self, request: wire.DeleteSnapshot, client: int) -> None:
        """Delete one that nothing needs."""
        await self._snapshots.delete(request.snapshot)

    async def diff_files(self, request: wire.Diff, client: int) -> wire.FilesChanged:
        """What changed in a cell's files; see :meth:`vallum.Sandbox.diff`."""
        return await self._snapshots.compare(self.get(request.sandbox, client), request.since)

    # ------------------------------------------------------------------ reading

    async def events(self, request: wire.Events, client: int) -> wire.EventPage:
        """A page of a run's events. Reads and checks in a thread: a long ledger must not hold up the cells."""
        directory = self._places.runs / check_id(request.run, "the run id")
        return await asyncio.to_thread(
            read_page, directory, request.episode, request.start, min(max(request.limit, 1), 50_000)
        )

    def status(self) -> wire.NodeStatus:
        """What the node is doing."""
        return wire.NodeStatus(
            version=__version__, pid=os.getpid(), cells=len(self._cells), clients=self.clients, tiers=self.tiers
        )

    # ------------------------------------------------------------------ failing closed

    def contain(self, live: LiveCell, reason: str) -> None:
        """Kill a cell because it can no longer be judged or recorded."""
        if live.contained or live.is_closing:
            return
        live.contained = reason
        self._later(self._contain(live, reason, clock.mono_ns()))

    async def _contain(self, live: LiveCell, reason: str, since_ns: int) -> None:
        await self._end(live, "contained")
        with contextlib.suppress(RecordError):
            now = clock.mono_ns()
            live.emit(
                ContainmentAction(
                    t_ns=clock.wall_ns(),
                    mono_ns=now,
                    scope=live.scope(),
                    attribution=BY_NODE,
                    action="kill_cell",
                    target=live.id,
                    reason=reason,
                    latency_ns=now - since_ns,
                )
            )

    def _go_blind(self, run: str, why: str) -> None:
        for live in list(self._cells.values()):
            if live.book.run == run:
                self.contain(live, f"stopped because it can no longer be recorded or judged: {why}")

    def _lose_gateway(self, why: str) -> None:
        for live in list(self._cells.values()):
            self.contain(live, f"stopped because the gateway died ({why}), so nothing could judge its connections")
        self._later(self._restart_gateway())

    async def _restart_gateway(self) -> None:
        try:
            self.tiers.update(await self._door.start(self._lose_gateway))
        except VallumError as error:
            log.error("the gateway cannot be started again: %s", error)
            self.is_broken.set()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
