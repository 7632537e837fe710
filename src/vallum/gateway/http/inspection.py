"""Flows whose requests have to be read: who reads them, and who answers.

Covered: HTTP/1.1 and HTTP/2, in clear and inside TLS that the gateway ends (with a certificate of the run's authority
for the name that was granted). What is inside TLS and is no HTTP is refused: nothing of it leaves.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.http.desk import RequestDesk
from vallum.gateway.http.exchange import MalformedFlowError
from vallum.gateway.http.head import Place
from vallum.gateway.http.server1 import Server1
from vallum.gateway.http.server2 import Server2
from vallum.gateway.http1 import RefusedError
from vallum.gateway.sniff import Sniffed
from vallum.gateway.stream import SocketStream, Stream
from vallum.gateway.tls.termination import HandshakeError, terminate

if TYPE_CHECKING:
    from vallum.gateway.flow import GatewayFlow


async def inspect(flow: GatewayFlow, sniffed: Sniffed, head: bytes) -> None:
    """Serve the rest of an admitted flow request by request; ``head`` are its first bytes, none of which has left.

    Counts what goes outside and comes back in ``flow.counters``. The flow's ``opened`` is recorded before, its ``closed``
    after. Cancelled when the rules change against the flow.

    Raises:
        RefusedError: the flow must be cut; it is recorded as denied.
        OSError: one side broke off.
    """
    if sniffed.protocol == "ssh":
        # Half a second of imports that most gateways never need.
        door = await asyncio.to_thread(importlib.import_module, "vallum.gateway.ssh.door")
        await door.serve_ssh(flow, head)
        return
    stream: Stream = SocketStream(flow.conn, head)
    protocol: str = sniffed.protocol
    scheme = "http"
    if protocol == "tls":
        scheme = "https"
        stream, protocol = await _end_tls(flow, sniffed, stream)
    place = Place(scheme=scheme, port=flow.dst[1])
    desk = RequestDesk(flow, place)
    server = Server2 if protocol == "http2" else Server1
    try:
        await server(stream, flow, place, desk).serve()
        await stream.finish()
    except MalformedFlowError as error:
        raise RefusedError(Decision(verdict="deny", rule="malformed", reason=str(error))) from error
    finally:
        await desk.close()


async def _end_tls(flow: GatewayFlow, sniffed: Sniffed, below: Stream) -> tuple[Stream, str]:
    """The stream inside the guest's TLS, and which HTTP it is."""
    authority = flow.cell.kit.authority
    name = sniffed.server_name or flow.facts.dst_ip
    if authority is None:
        reason = f"a rule needs to see the requests inside the TLS to {show(name)}, and the cell has no certificate authority"
        raise RefusedError(Decision(verdict="deny", rule="not-inspectable", reason=reason))
    try:
        stream = await terminate(below, authority, server_name=name)
    except HandshakeError as error:
        raise RefusedError(error.decision) from error
    return stream, "http2" if stream.alpn == "h2" else "http"
