"""HTTP/2 towards a guest."""

from __future__ import annotations

from vallum.gateway.http.exchange import Carrier, Desk, MalformedFlowError
from vallum.gateway.http.head import Place
from vallum.gateway.stream import Stream


class Server2:
    """Serves one connection."""

    def __init__(self, stream: Stream, carrier: Carrier, place: Place, desk: Desk) -> None:
        pass

    async def serve(self) -> None:
        """Refuse it.

        Raises:
            MalformedFlowError: HTTP/2 cannot be read yet.
        """
        raise MalformedFlowError("HTTP/2 cannot be read by this gateway; use HTTP/1.1")
