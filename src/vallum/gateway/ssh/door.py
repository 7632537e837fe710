"""SSH ended at the gateway: towards the guest we are the granted server, towards the server we are the client.

Covered: every exec, shell and subsystem is judged and recorded before the server hears of it; direct-tcpip, tcpip-forward,
Unix sockets, X11, agents and tunnels are refused both ways, whatever the client was told to ask for; what the guest
sends is searched for canaries; the server's host key is the credential's, the key stays here. Who the guest is, its
socket says: any login is accepted. Not covered: what a granted shell or command does at the server.

Source: RFC 4251 to 4254; PROTOCOL of OpenSSH for its extensions.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

import asyncssh

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.cell import NodeGoneError
from vallum.gateway.http1 import RefusedError
from vallum.gateway.ssh.hostkey import write_host_key
from vallum.gateway.ssh.session import GuestSession
from vallum.gateway.ssh.upstream import choose_credential, log_in
from vallum.gateway.stream import PIECE, SocketStream
from vallum.rules.grants import Rule

if TYPE_CHECKING:
    from vallum.gateway.flow import GatewayFlow

LOGIN_TIMEOUT_S = 10.0
MAX_SESSIONS = 32
"""Of one connection, at once."""
MAX_FORWARDS = 16
"""Requests to forward that are refused one by one; who asks for more is cut off."""

logging.getLogger("asyncssh").setLevel(logging.ERROR)


async def serve_ssh(flow: GatewayFlow, head: bytes) -> None:
    """Serve an admitted SSH flow; ``head`` are its first bytes, none of which leaves.

    Raises:
        RefusedError: the flow must be cut.
        OSError: the guest broke off.
    """
    authority = flow.cell.kit.authority
    if authority is None:
        reason = (
            "SSH is ended by the gateway, and the cell was not started for it (it has no authority): start a new one"
        )
        raise RefusedError(Decision(verdict="deny", rule="not-inspectable", reason=reason))
    key = asyncssh.import_private_key(write_host_key(authority))
    await SshDoor(flow, key).serve(head)


class _Process(asyncssh.SSHServerProcess[bytes]):
    """A session whose subsystem may be anything, sftp too: the library would else serve that one itself."""

    def __init__(self, serve: Callable[[asyncssh.SSHServerProcess[bytes]], Awaitable[None]]) -> None:
        super().__init__(serve, None, 3, False)

    def subsystem_requested(self, subsystem: str) -> bool:
        """It is judged like a command."""
        return True

    def session_started(self) -> None:
        """As for a command."""
        channel, connection = self.channel, self.channel.get_connection()
        stdin = asyncssh.SSHReader[bytes](self, channel)
        stdout = asyncssh.SSHWriter[bytes](self, channel)
        stderr = asyncssh.SSHWriter[bytes](self, channel, asyncssh.EXTENDED_DATA_STDERR)
        handler = self._start_process(stdin, stdout, stderr)
        if inspect.isawaitable(handler):
            connection.create_task(handler, stdin.logger)


class _Server(asyncssh.SSHServer):
    """What a guest may not ask for."""

    def __init__(self, door: SshDoor) -> None:
        self._door = door

    def session_requested(self) -> asyncssh.SSHServerSession[bytes]:
        """Any; what it asks for is judged when it says so."""
        return _Process(self._door.serve_process)

    def begin_auth(self, username: str) -> bool:
        """No login is needed."""
        self._door.user = username
        return False

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        """``-L``, ``-D``, ``-W``, ``-J``."""
        return self._door.refuse_forward(f"direct-tcpip to {dest_host}:{dest_port}")

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        """``-R``."""
        return self._door.refuse_forward(f"tcpip-forward of {listen_host or '*'}:{listen_port}")

    def unix_connection_requested(self, dest_path: str) -> bool:
        """``-L`` to a Unix socket."""
        return self._door.refuse_forward(f"direct-streamlocal to {dest_path}")

    def unix_server_requested(self, listen_path: str) -> bool:
        """``-R`` of a Unix socket."""
        return self._door.refuse_forward(f"streamlocal-forward of {listen_path}")

    def tun_requested(self, unit: int | None) -> bool:
        """``-w`` with addresses."""
        return self._door.refuse_forward("tun")

    def tap_requested(self, unit: int | None) -> bool:
        """``-w`` with Ethernet."""
        return self._door.refuse_forward("tap")


class SshDoor:
    """One guest's SSH connection."""

    def __init__(self, flow: GatewayFlow, host_key: asyncssh.SSHKey) -> None:
        self.flow = flow
        self.user = ""
        """Whom the guest says it is at the server."""
        self._host_key = host_key
        self._upstreams: dict[tuple[str, str], asyncssh.SSHClientConnection] = {}
        self._logging_in = asyncio.Lock()
        self._sessions: set[asyncio.Task[None]] = set()
        self._notes: set[asyncio.Task[None]] = set()
        self._forwards = 0
        self._cut: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self, head: bytes) -> None:
        """As :func:`serve_ssh`."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        guest, inner = SocketStream(self.flow.conn, head), SocketStream(ours)
        pumps = [asyncio.create_task(_pump(guest, inner)), asyncio.create_task(_pump(inner, guest))]
        speaking = asyncio.create_task(self._speak(theirs))
        try:
            # Whoever ends first ends it: the guest's socket, or the protocol.
            await asyncio.wait([pumps[0], speaking, self._cut], return_when=asyncio.FIRST_COMPLETED)
            if self._cut.done():
                self._cut.result()
            if speaking.done():
                await asyncio.wait([pumps[1]], timeout=1.0)
        finally:
            ending = (*pumps, speaking, *self._sessions)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            for upstream in self._upstreams.values():
                upstream.abort()
            ours.close()
            if self._notes:
                await asyncio.wait(self._notes)

    async def _speak(self, sock: socket.socket) -> None:
        try:
            connection = await asyncssh.run_server(
                sock,
                config=None,
                server_factory=lambda: _Server(self),
                server_host_keys=[self._host_key],
                server_version="Vallum",
                encoding=None,
                line_editor=False,
                agent_forwarding=False,
                x11_forwarding=False,
                allow_scp=False,
                compression_algs=["none"],
                gss_host=None,
                login_timeout=LOGIN_TIMEOUT_S,
            )
        except (asyncssh.Error, OSError):
            sock.close()
            return
        try:
            await connection.wait_closed()
        finally:
            connection.abort()

    def refuse_forward(self, what: str) -> bool:
        """Record it. False, for the library."""
        self._forwards += 1
        reason = f"{show(what, 200)} was asked for inside SSH: forwarding is never granted"
        decision = Decision(verdict="deny", rule="ssh-forwarding", reason=reason)
        if self._forwards >= MAX_FORWARDS:
            if not self._cut.done():
                self._cut.set_exception(RefusedError(decision))
            return False
        self.note(self.flow.record("denied", decision))
        return False

    def note(self, recording: Coroutine[None, None, None]) -> None:
        """Have something recorded whatever ends meanwhile; the flow's end is recorded after it."""

        async def record() -> None:
            with contextlib.suppress(NodeGoneError):
                await recording

        note = asyncio.create_task(record())
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)

    async def serve_process(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Serve a session, in a task of its own: the library's end with the connection, and the record is owed its end."""
        task = asyncio.create_task(GuestSession(self, process, is_full=len(self._sessions) >= MAX_SESSIONS).serve())
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    def host_of(self, rule: Rule) -> str:
        """The granted name, or the address."""
        names = (pin.name for pin in self.flow.facts.names if rule.matches_name(pin.name))
        return next(names, self.flow.facts.dst_ip)

    async def upstream(self, rule: Rule) -> asyncssh.SSHClientConnection:
        """The connection to the server for a grant, logged in; kept for further sessions.

        Raises:
            RefusedError: it cannot be had.
            OSError: the server cannot be reached.
        """
        host = self.host_of(rule)
        credential = choose_credential(rule.credential, self.flow.cell.kit.credentials, host)
        user = credential.user or self.user
        async with self._logging_in:
            kept = self._upstreams.get((credential.name, user))
            if kept is None or kept.is_closed():
                sock = await self.flow.connect()
                kept = await log_in(sock, credential, host=host, port=self.flow.dst[1], user=user)
                self._upstreams[credential.name, user] = kept
            return kept


async def _pump(source: SocketStream, sink: SocketStream) -> None:
    with contextlib.suppress(OSError):
        while data := await source.recv(PIECE):
            await sink.send(data)
        await sink.finish()
