"""What a rule is: a grant or a denial of hosts or addresses, ports and protocols; and a set of them."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Literal, get_args

import msgspec

from vallum.core.errors import RuleError
from vallum.core.events import Protocol
from vallum.core.text import show
from vallum.rules.addresses import Address, Network, forms
from vallum.rules.names import encode_name, is_under

Containment = Literal["locked", "standard", "research"]
CONTAINMENTS: tuple[Containment, ...] = get_args(Containment)
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
DEFAULT_PORTS = (80, 443)
_BY_PORT: dict[int, tuple[Protocol, ...]] = {443: ("tls",), 80: ("http",), 22: ("ssh",), 53: ("dns",)}
_OTHER: tuple[Protocol, ...] = ("http", "tls", "unknown")
_READABLE: frozenset[Protocol] = frozenset({"http", "http2", "tls"})


@lru_cache(maxsize=4096)
def _network(text: str) -> Network:
    return ipaddress.ip_network(text)


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much one grant may be used in one episode; None is no limit. What is over is denied with rule ``budget``."""

    bytes_out: int | None = None
    """Payload bytes guest -> outside over all its flows."""
    bytes_in: int | None = None
    connections: int | None = None
    """Open at once."""
    connections_per_minute: int | None = None
    requests_per_minute: int | None = None
    """Of requests that the gateway reads."""
    request_bytes: int | None = None
    """Body of one request."""

    def describe(self) -> str:
        """The limits that are set."""
        limits = msgspec.structs.asdict(self)
        return ", ".join(f"at most {value} {name}" for name, value in limits.items() if value is not None)


class Selector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For whom a rule is; shell patterns, None is everybody."""

    run: str | None = None
    episode: str | None = None
    agent: str | None = None
    steps: tuple[int, int | None] | None = None
    """First and last step (both included; last None: all after)."""

    def describe(self) -> str:
        """Whom it selects."""
        named = (f"{name} {value}" for name in ("run", "episode", "agent") if (value := getattr(self, name)))
        first, last = self.steps or (None, None)
        steps = "" if first is None else f"steps {first} to {last if last is not None else 'the last'}"
        return "for " + ", ".join([*named, *([steps] if steps else [])])


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[allow]]`` or ``[[deny]]``. Exactly one of ``host`` and ``cidr`` is set."""

    id: str
    host: str | None = None
    """A name, ``*.`` and a name (one or more labels before it, not the name itself), or ``*`` (any name)."""
    cidr: str | None = None
    """Network in its normal notation; one address is ``/32`` or ``/128``."""
    ports: tuple[int, ...] | None = None
    """None stands for every port; an empty tuple for none."""
    protocols: tuple[Protocol, ...] | None = None
    """None: by port for a grant (see :meth:`protocols_for`), every one for a denial."""
    phase: Literal["setup", "run"] | None = None
    """None: both."""
    selector: Selector | None = None
    methods: tuple[str, ...] | None = None
    """HTTP methods, upper case. With this or any field below, the gateway reads every request (and ends TLS)."""
    paths: tuple[str, ...] | None = None
    """Patterns of paths: ``*`` within one segment, ``**`` across segments."""
    when: str = ""
    """CEL condition over ``flow``, ``request``, ``scope``, ``phase``, ``now`` (see docs/rules.md)."""
    credential: str = ""
    """Name of the credential that is put into its requests."""
    service: Literal["forward", "packages"] = "forward"
    git: Literal["", "read", "write"] = ""
    """Only git's smart HTTP protocol (or git over SSH), to fetch or also to push."""
    tools: tuple[str, ...] | None = None
    """Only MCP over HTTP, and only calls of tools that match these patterns."""
    websocket: bool = False
    """Whether a request may become a WebSocket."""
    ssh: tuple[Literal["exec", "shell", "sftp", "git-read", "git-write"], ...] = ()
    """What an SSH session may ask for, on a grant that admits ssh. Forwarding is never granted."""
    budget: Budget | None = None
    source: str = ""
    """File or bundle that it came from, for explanations."""

    @property
    def reads_requests(self) -> bool:
        """Whether it can only be judged by reading requests, so that TLS has to be ended by the gateway."""
        per_request = self.budget is not None and (
            self.budget.requests_per_minute is not None or self.budget.request_bytes is not None
        )
        return bool(self.narrows_requests or self.credential or self.service != "forward" or per_request)

    @property
    def narrows_requests(self) -> bool:
        """Whether it applies to some requests of a flow only."""
        return bool(
            self.methods is not None
            or self.paths is not None
            or self.git
            or self.tools is not None
            or self.websocket
            or "request" in self.when
        )

    @property
    def is_exact(self) -> bool:
        """Whether it names one host."""
        return self.host is not None and not self.host.startswith("*")

    @property
    def network(self) -> Network | None:
        """The network of ``cidr``."""
        return None if self.cidr is None else _network(self.cidr)

    def matches_name(self, name: str) -> bool:
        """Whether its host pattern covers a normalised name."""
        if self.host is None:
            return False
        if self.host.startswith("*."):
            return is_under(name, self.host[2:])
        return self.host in {"*", name}

    def matches_address(self, address: Address) -> bool:
        """Whether its network holds the address as written."""
        network = self.network
        return network is not None and address.version == network.version and address in network

    def matches_any_form(self, address: Address) -> bool:
        """Whether its network holds the address or one that it carries inside. For denials."""
        return any(self.matches_address(form) for form in forms(address))

    def matches_port(self, port: int) -> bool:
        """Whether the port is named."""
        return self.ports is None or port in self.ports

    def protocols_for(self, port: int) -> tuple[Protocol, ...]:
        """What a grant admits on ``port``: as written, else tls on 443, http on 80, ssh on 22, dns on 53,
        and http, tls or unknown elsewhere. Where http is, http2 without TLS is too.

        A rule that needs requests to be read admits nothing but what carries some (and ssh, if it says what for).
        """
        admitted = self.protocols if self.protocols is not None else _BY_PORT.get(port, _OTHER)
        if "http" in admitted and "http2" not in admitted:
            admitted = (*admitted, "http2")
        if self.reads_requests:
            readable = _READABLE | {"ssh"} if self.ssh or self.git else _READABLE
            admitted = tuple(protocol for protocol in admitted if protocol in readable)
        return admitted

    def describe(self) -> str:
        """The rule in one readable piece."""
        ports = "any port" if self.ports is None else "port " + ",".join(map(str, self.ports))
        protocols = "" if self.protocols is None else f" ({', '.join(self.protocols)})"
        return f"{self.host or self.cidr} {ports}{protocols}{self._describe_terms()} [{self.id}]"

    def _describe_terms(self) -> str:
        terms = [
            f"in {self.phase}" if self.phase else "",
            self.selector.describe() if self.selector else "",
            "/".join(self.methods or ()),
            " ".join(self.paths or ()),
            f"git {self.git}" if self.git else "",
            f"tools {' '.join(self.tools)}" if self.tools is not None else "",
            "websocket" if self.websocket else "",
            f"ssh {'/'.join(self.ssh)}" if self.ssh else "",
            f"when {self.when}" if self.when else "",
            f"credential {self.credential}" if self.credential else "",
            f"through {self.service}" if self.service != "forward" else "",
            self.budget.describe() if self.budget else "",
        ]
        said = ", ".join(term for term in terms if term)
        return f", {said}" if said else ""


class Ruleset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rules of a cell. No ``allow`` means nothing, never everything; ``deny`` beats ``allow``."""

    containment: Containment = "standard"
    allow: tuple[Rule, ...] = ()
    hold: tuple[Rule, ...] = ()
    """Grants that a person is asked about each time."""
    deny: tuple[Rule, ...] = ()

    def find(self, rule: str) -> Rule | None:
        """The rule with that id, as decisions name it; None for a built-in one (``default-deny``, ``metadata``...)."""
        return next((r for r in (*self.deny, *self.hold, *self.allow) if r.id == rule), None)

    def describe(self) -> list[str]:
        """Every rule, one readable line each."""
        return [
            *(f"deny {rule.describe()}" for rule in self.deny),
            *(f"hold {rule.describe()}" for rule in self.hold),
            *(f"allow {rule.describe()}" for rule in self.allow),
            "deny private, link-local, loopback and metadata addresses and the host's own, unless named exactly",
            f"deny everything else [{'locked' if self.containment == 'locked' else 'default-deny'}]",
        ]


def parse_host(text: str) -> str | None:
    """A host pattern in its normal form, or None: a name, ``*.name`` or ``*``."""
    if text == "*":
        return text
    if text.startswith("*."):
        parent = encode_name(text[2:])
        return None if parent is None else f"*.{parent}"
    return encode_name(text)


def parse_cidr(text: str) -> str | None:
    """A network in its normal form (IPv4-mapped IPv6 as IPv4), or None when it is none or has host bits set."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        return None
    if isinstance(network, ipaddress.IPv6Network):
        mapped = network.network_address.ipv4_mapped
        if mapped is not None and network.prefixlen >= 96:
            return str(ipaddress.ip_network((mapped, network.prefixlen - 96)))
    return str(network)


def _split_port(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        inner, closed, rest = text[1:].partition("]")
        if closed and (not rest or rest.startswith(":")):
            return inner, rest[1:] if rest else None
        return text, None
    if text.count(":") == 1:
        target, _, port = text.partition(":")
        return target, port
    return text, None


def parse_grant(text: str) -> Rule:
    """A grant from ``HOST[:PORT]``: a name, ``*.name``, an IPv4 address or network, ``[v6]:port`` or a bare IPv6.

    Without a port: 80 and 443.

    Raises:
        RuleError: it is none of these; says what is allowed.
    """
    target, port_text = _split_port(text.strip())
    ports: tuple[int, ...] = DEFAULT_PORTS
    if port_text is not None:
        if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text[:6]) <= 65535):
            raise RuleError(f"the grant {show(text)!r} has no usable port: give HOST:PORT with a port from 1 to 65535")
        ports = (int(port_text),)
    cidr = parse_cidr(target)
    host = None if cidr else parse_host(target)
    if cidr is None and host is None:
        raise RuleError(
            f"the grant {show(text)!r} is not usable: give a host name, *.name, an address, [v6]:port or a network such as "
            "10.1.2.0/24 (without host bits), each with an optional :PORT"
        )
    return Rule(id=name_rule("allow", host, cidr), host=host, cidr=cidr, ports=ports)


def _bare(cidr: str | None) -> str:
    return (cidr or "").removesuffix("/32").removesuffix("/128")


def name_rule(verb: str, host: str | None, cidr: str | None) -> str:
    """The id of a rule that was given none, e.g. ``allow:mirror.example``."""
    return f"{verb}:{host or _bare(cidr)}"
