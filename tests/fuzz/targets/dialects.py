"""Coverage-guided fuzzing of the model dialects.

The first byte chooses the dialect and what is read; the rest is JSON, or a stream of events.
"""

from vallum.core.messages import chain_digests
from vallum.gateway.model.dialects import DIALECTS
from vallum.gateway.model.dialects.contract import DialectError, Route
from vallum.gateway.model.dialects.fields import parse_object
from vallum.gateway.model.sse import SseError, SseReader

NAMES = list(DIALECTS)


def fuzz(data: bytes) -> None:
    """Whatever comes is read or refused by a DialectError."""
    if not data:
        return
    name = NAMES[data[0] % 4]
    dialect, rest = DIALECTS[name], data[1:]
    try:
        match data[0] // 4 % 3:
            case 0:
                raw, _ = dialect.clean(parse_object(rest, "request"), frozenset())
                request = dialect.parse_request(raw, Route(dialect=name, operation="generate", model="m"))
                chain_digests("", request.messages, with_ids=True)
                for other in DIALECTS.values():
                    other.write_request(request)
            case 1:
                dialect.write_reply(dialect.parse_reply(parse_object(rest, "reply")))
            case 2:
                assembler, reader = dialect.make_assembler(wants_usage=False), SseReader()
                for event in reader.feed(rest):
                    assembler.feed(event)
                reader.end()
                assembler.finish()
    except (DialectError, SseError):
        pass
