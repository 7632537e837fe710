"""A model that says again what it said in a recorded run: requests are matched by the digest of what was asked.

Covered: any number of branches at once, in any order. Not covered: an agent that says something else than it did; that
request is refused and says so.
"""

from __future__ import annotations

from collections import deque

import msgspec

from vallum.core.decoding import MALFORMED
from vallum.core.errors import InvalidInput
from vallum.core.events import ModelCall, decode
from vallum.core.messages import ModelRequest, Reply, chain_digests
from vallum.gateway.model.upstreams.told import UpstreamRefusedError


def digest_request(request: ModelRequest) -> str:
    """``sha256:...`` of what a request asks, whoever asks it and however it is written."""
    return f"sha256:{chain_digests('', request.messages, with_ids=False)[-1].hex()}"


class Replay:
    """See :class:`~vallum.gateway.model.upstreams.told.Teller`."""

    origin = "replay"

    def __init__(self, record: bytes) -> None:
        """Read ``model.call`` events, one JSON object a line; events of other kinds are passed over.

        Raises:
            InvalidInput: a line is no event, or a reply cannot be read; says which.
        """
        digests: dict[str, str] = {}
        self._replies: dict[str, deque[Reply]] = {}
        for number, line in enumerate(record.splitlines(), 1):
            if not line.strip():
                continue
            try:
                event = decode(line)
                if not isinstance(event, ModelCall) or event.retry_of:
                    continue
                if event.state == "opened":
                    digests[event.call] = event.digest
                elif event.state == "closed" and event.reply and event.call in digests:
                    reply = msgspec.json.decode(event.reply, type=Reply)
                    self._replies.setdefault(digests[event.call], deque()).append(reply)
            except MALFORMED as error:
                raise InvalidInput(
                    f"line {number} of the record to replay is no event of a model call: {error}"
                ) from error

    async def tell(self, request: ModelRequest, *, agent: str) -> Reply:
        """As :meth:`Teller.tell`. The last reply to a request is given as often as it is asked."""
        del agent
        replies = self._replies.get(digest_request(request))
        if not replies:
            raise UpstreamRefusedError(
                409, "the record has no reply to this request: the agent asks something else now"
            )
        return replies.popleft() if len(replies) > 1 else replies[0]
