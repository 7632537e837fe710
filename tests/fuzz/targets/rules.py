"""Rule files, grants and conditions: read or refused by RuleError; evaluated or ConditionError. First byte: which."""

from __future__ import annotations

from vallum.core.errors import RuleError
from vallum.rules.conditions import ConditionError, check_condition, evaluate, stage_of
from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.files import compose, expand_grant, parse_ruleset

FACTS = FlowFacts(dst_ip="192.0.2.1", dst_port=443, names=(Pin(name="a.example"),), now_ns=10**18)
REQUEST = RequestFacts(method="GET", scheme="https", host="a.example", port=443, path="/a")
SEEDS = (
    b'\x00containment = "open"\n[[deny]]\nhost = "*.example"\nports = [80, "443-500"]\n',
    b'\x00[[allow]]\nid = "a"\nhost = "a.example"\nmethods = ["GET"]\npaths = ["/a/**"]\nwhen = "flow.dst_port == 1"\n',
    b'\x00bundles = ["pypi"]\n[setup]\nbundles = ["npm"]\n[[hold]]\ncidr = "192.0.2.0/24"\n',
    b"\x01a.example:80,443",
    b"\x01@pypi",
    b'\x02request.path.startsWith("/a") && flow.names.exists(n, n == "a.example")',
    b"\x02scope.step / 0 > 1 || now > timestamp('2024-01-01T00:00:00Z')",
)


def fuzz(data: bytes) -> None:
    if not data:
        return
    text = data[1:].decode("utf-8", "replace")
    try:
        match data[0] % 3:
            case 0:
                compose(own=parse_ruleset(text, "rules.toml"))
            case 1:
                expand_grant(text)
            case 2:
                stage_of(text)
                check_condition(text)
                evaluate(text, FACTS, Asker(), REQUEST)
    except (RuleError, ConditionError):
        pass
