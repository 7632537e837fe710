"""What rules are judged against: a flow, a request inside it, and who asks. Plain facts, stated by gateway and node."""

from __future__ import annotations

import msgspec

from vallum.core.events import Protocol


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A name that the gateway itself resolved to the address, for this cell."""

    name: str
    local: bool = False
    """It came from the host's own hosts file, so whoever runs the host meant it."""


class FlowFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a flow. ``protocol`` None: nothing has been seen of it yet."""

    dst_ip: str
    """Address that would be connected to."""
    dst_port: int
    names: tuple[Pin, ...] = ()
    """Names pinned to the address for this cell."""
    own: bool = False
    """The address is one of the host's own."""
    protocol: Protocol | None = None
    server_name: str | None = None
    """SNI or Host, normalised; None when there is none (or it is no host name)."""
    name_hidden: bool = False
    """The ClientHello carries an encrypted one (ECH, ESNI), so its SNI is not the whole truth."""
    refused: str = ""
    """Why the first bytes cannot be let through whatever they are for (malformed, CONNECT...)."""
    approved: tuple[str, ...] = ()
    """Ids of hold rules that a person has approved for this flow (or for this one request): they grant from then on."""
    now_ns: int | None = None
    """Wall clock for conditions, nanoseconds since the epoch. None: read when a condition names ``now``."""


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, for rules that are for somebody: what the node says, never the guest."""

    run: str = ""
    episode: str = ""
    agent: str = ""
    step: int | None = None
    """None: not known (yet). Then no grant for particular steps applies, and every denial and hold for some does."""
    phase: str = "run"


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one request inside an admitted flow."""

    method: str
    scheme: str
    host: str
    port: int
    path: str
    """Without query, as :func:`vallum.rules.paths.normalise_path` makes it: what is judged is what is sent. A path
    that is not in that form is denied as ``malformed``."""
    query: str = ""
    """As sent, without ``?``."""
    length: int | None = None
    upgrade: str = ""
    content_type: str = ""
