"""HTTP/1.1 for the fakes, with h11: a subclass only says what a request is answered with."""

from __future__ import annotations

import asyncio
from abc import abstractmethod

import h11

from vallum.testing.fakes.base import CountedReader, Endpoint, Received, TcpFake


class HttpFake(TcpFake):
    """Serves requests of a kept-alive connection one after the other. Unit: ``requests``."""

    @abstractmethod
    def respond(self, method: str, target: str, headers: dict[str, str], count: Received) -> tuple[int, bytes, str]:
        """(status, body, content type) of one request. ``headers`` have lower-case names."""

    async def serve(self, reader: CountedReader, writer: asyncio.StreamWriter, at: Endpoint) -> None:
        """Answer until the client closes or breaks the protocol."""
        machine = h11.Connection(h11.SERVER)
        try:
            while (request := await _next_request(machine, reader)) is not None:
                reader.count.count("requests")
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
                status, body, kind = self.respond(
                    request.method.decode(), request.target.decode("latin-1"), headers, reader.count
                )
                fields = [("content-type", kind), ("content-length", str(len(body)))]
                for event in (
                    h11.Response(status_code=status, headers=fields),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    if request.method == b"HEAD" and isinstance(event, h11.Data):
                        continue
                    writer.write(machine.send(event) or b"")
                await writer.drain()
                if machine.our_state is h11.MUST_CLOSE:
                    return
                machine.start_next_cycle()
        except h11.RemoteProtocolError:
            reader.count.count("not_http")


async def _next_request(machine: h11.Connection, reader: CountedReader) -> h11.Request | None:
    """Read one whole request (its body is counted and dropped); None when the client closed."""
    request: h11.Request | None = None
    while True:
        event = machine.next_event()
        if event is h11.NEED_DATA:
            machine.receive_data(await reader.read())
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed):
            return None
