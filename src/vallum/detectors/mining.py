"""Mining: the protocol, the pool's name, the program and its arguments (ATT&CK T1496.001).

Covered: stratum on any port and from any program, also with JSON escapes; pools by name in DNS, SNI or Host; miners by the
kernel's name of their file, by argv[0] and as a script; miners under another name by their arguments.
Not covered: a renamed miner without arguments that speaks stratum inside TLS to a granted relay: what remains is that
nothing but the granted host is reached.
"""

from __future__ import annotations

import re

from vallum.core.events import DnsQuery, Flow, Process, ProcessStarted, Record
from vallum.core.text import show
from vallum.detectors import commandline, hosts
from vallum.detectors.base import FindingDraft, draft, name_process, name_target, outcome
from vallum.detectors.catalog import load

_JSON_ESCAPE = re.compile(r"\\{1,2}u00([0-9a-fA-F]{2})")
_STRATUM = re.compile(r"mining\.(subscribe|authorize|configure|submit|notify|extranonce\.subscribe|set_difficulty)\b")
_METHOD = re.compile(
    r"method\W{1,8}(login|submit|getblocktemplate|submitblock|eth_submitLogin|eth_submitWork|eth_getWork)\b"
)
_MINER_KEYS = re.compile(r"\b(agent|algo|rigid|algo-perf|job_id|nonce|worker)\b")
_POOL_ADDRESS = re.compile(r"(?:[a-z0-9+]+://)?[A-Za-z0-9.-]+\.[A-Za-z0-9-]+:\d{2,5}/?", re.ASCII)
_WALLET = re.compile(
    r"(4[0-9AB][1-9A-HJ-NP-Za-km-z]{93}|8[0-9A-Za-z][1-9A-HJ-NP-Za-km-z]{93}|bc1[ac-hj-np-z02-9]{11,71}|0x[0-9a-fA-F]{40})"
    r"(?:[.+/][\w.+-]*)?"
)
_ARGUMENT_MAX = 512
_ALGORITHM_SWITCHES = ("-a", "--algo", "--coin")


def speaks_stratum(first_bytes: str) -> bool:
    """Whether a guest's first bytes (escaped text) are a miner's: stratum v1, XMRig's login, getblocktemplate.

    A JSON-RPC ``login`` alone is not: it needs a miner's own keys next to it.
    """
    text = _JSON_ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), first_bytes)
    if _STRATUM.search(text):
        return True
    method = _METHOD.search(text)
    if method is None:
        return False
    if method.group(1) == "login":
        return "pass" in text and _MINER_KEYS.search(text) is not None
    if method.group(1) == "submit":
        return "nonce" in text and "job_id" in text
    return True


class MiningDetector:
    """See the module. Keeps no state: every record stands for itself."""

    name = "mining"

    def __init__(self) -> None:
        rules = load("mining")
        self._stratum = rules["mining.stratum"]
        self._pool = rules["mining.pool-name"]
        self._program = rules["mining.program"]
        self._arguments = rules["mining.arguments"]
        self._port = rules["mining.pool-port"]
        self._domains = self._pool.words("domains")
        self._labels = re.compile("|".join(f"(?:{each})" for each in sorted(self._pool.words("labels"))))
        self._first_labels = re.compile("|".join(f"(?:{each})" for each in sorted(self._pool.words("first_labels"))))
        self._coins = re.compile("|".join(sorted(self._pool.words("coins"))))
        self._names = self._program.words("names")
        self._patterns = re.compile("|".join(f"(?:{each})" for each in sorted(self._program.words("patterns"))))
        self._schemes = tuple(self._arguments.words("schemes"))
        self._switches = self._arguments.words("switches")
        self._algorithms = self._arguments.words("algorithms")
        self._ports = self._port.numbers("ports")

    def observe(self, record: Record) -> list[FindingDraft]:
        """Drafts of this record alone."""
        event = record.event
        if isinstance(event, ProcessStarted):
            return self._see_process(record.id, event)
        if isinstance(event, Flow):
            return self._see_flow(record.id, event)
        if isinstance(event, DnsQuery) and self.is_pool(event.qname):
            what = f"{name_process(event.process)} asked for the pool {show(event.qname, 80)}; {event.verdict} by {show(event.rule, 60)}"
            return [draft(self._pool, event, what, [record.id], severity=self._pool.severity_of(event.verdict))]
        return []

    def is_pool(self, host: str) -> bool:
        """Whether a name is a pool's, or built like one. ``pool.ntp.org`` and key servers' pools are none."""
        if hosts.matching_domain(host, self._domains):
            return True
        labels = hosts.normal(host).split(".")
        if len(labels) < 2:
            return False
        if any(self._labels.fullmatch(label) for label in labels[:-1]):
            return True
        return bool(self._first_labels.fullmatch(labels[0])) and any(self._coins.search(each) for each in labels[1:])

    def _see_flow(self, number: int, event: Flow) -> list[FindingDraft]:
        told = f"{name_process(event.process)} to {name_target(event)}; {outcome(event)}"
        found = []
        if event.protocol == "stratum" or speaks_stratum(event.first_bytes):
            severity = self._stratum.severity_of(event.verdict)
            found.append(draft(self._stratum, event, f"stratum spoken by {told}", [number], severity=severity))
        if event.dst_host is not None and self.is_pool(event.dst_host):
            severity = self._pool.severity_of(event.verdict)
            found.append(draft(self._pool, event, f"a pool dialled by {told}", [number], severity=severity))
        if not found and event.verdict != "allow" and event.dst_port in self._ports:
            found.append(draft(self._port, event, f"a pool's port dialled by {told}", [number]))
        return found

    def _see_process(self, number: int, event: ProcessStarted) -> list[FindingDraft]:
        process = event.process
        found = []
        called = [name for name in commandline.names(process) if self._is_miner(name)]
        if called:
            what = f"{name_process(process)} is called {show(called[0], 60)}, like a miner"
            found.append(draft(self._program, event, what, [number]))
        why = self.miner_argument(process)
        if why is not None:
            what = f"{name_process(process)} was given {show(why, 120)}"
            found.append(draft(self._arguments, event, what, [number]))
        return found

    def _is_miner(self, name: str) -> bool:
        return name in self._names or self._patterns.fullmatch(name) is not None

    def miner_argument(self, process: Process) -> str | None:
        """The argument that only a miner has, None when there is none. What readers (grep, git...) are given is text."""
        if commandline.is_reader(process):
            return None
        arguments = process.argv[1:]
        for place, argument in enumerate(arguments):
            low = argument.lower()
            switch, _, value = low.partition("=")
            if low.startswith(self._schemes) or value.startswith(self._schemes) or switch in self._switches:
                return argument
            if switch in _ALGORITHM_SWITCHES:
                chosen = value or (arguments[place + 1].lower() if place + 1 < len(arguments) else "")
                if chosen in self._algorithms:
                    return f"{argument} {chosen}"
        short = [each for each in arguments if len(each) <= _ARGUMENT_MAX]
        pool = next((each for each in short if _POOL_ADDRESS.fullmatch(each.partition("=")[2] or each)), None)
        wallet = any(_WALLET.fullmatch(each.partition("=")[2] or each) for each in short)
        return f"{pool} and a wallet" if pool is not None and wallet else None
