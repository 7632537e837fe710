"""What holds of every set of rules, whatever is in it."""

from __future__ import annotations

import posixpath
import re
import time
from urllib.parse import unquote

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.grants import Rule, Ruleset, Selector
from vallum.rules.paths import encode_path, match_path, normalise_path
from vallum.rules.verdicts import judge_flow, judge_query, judge_request, judge_tool, reads_requests

HOSTS = ("a.example", "b.example", "c.a.example")
PATTERNS = (*HOSTS, "*.example", "*.a.example", "*")
PATHS = ("/", "/a", "/a/b", "/a/b/", "/b/x", "/r.git/git-upload-pack", "/r.git/git-receive-pack", "/a%2Fb")
RANK = {"deny": 0, "hold": 1, "allow": 2}

conditions = st.sampled_from(
    [
        "",
        "",
        "flow.dst_port == 443",
        "request.method == 'GET'",
        "phase == 'run'",
        "scope.step > 2",
        "1 / scope.step == 1",
        "request.length / 0 == 1",
        "flow.protocol == 'tls'",
    ]
)
selectors = st.sampled_from([None, None, Selector(agent="x*"), Selector(steps=(2, 4)), Selector(run="r")])


@st.composite
def rules(draw: st.DrawFn, *, granting: bool = True) -> Rule:
    by_name = draw(st.booleans())
    return Rule(
        id=draw(st.uuids()).hex[:8],
        host=draw(st.sampled_from(PATTERNS)) if by_name else None,
        cidr=None if by_name else draw(st.sampled_from(["203.0.113.0/24", "203.0.113.7/32", "0.0.0.0/0"])),
        ports=draw(st.sampled_from([(443,), (80, 443), (8080,)] if granting else [None, (443,), (80,)])),
        protocols=draw(st.sampled_from([None, ("tls",), ("http",), ("tls", "http", "unknown")])),
        phase=draw(st.sampled_from([None, None, "setup", "run"])),
        selector=draw(selectors),
        methods=draw(st.sampled_from([None, ("GET",), ("POST", "PUT")])),
        paths=draw(st.sampled_from([None, ("/a/**",), ("/*",)])),
        when=draw(conditions),
        git=draw(st.sampled_from(["", "", "read", "write"])),
        tools=draw(st.sampled_from([None, None, ("s*",)])),
        websocket=draw(st.booleans()),
    )


flows = st.builds(
    FlowFacts,
    dst_ip=st.sampled_from(["203.0.113.7", "203.0.113.8", "10.0.0.1", "169.254.169.254"]),
    dst_port=st.sampled_from([80, 443, 8080, 22]),
    names=st.sampled_from([(), (Pin(name="a.example"),), (Pin(name="a.example"), Pin(name="b.example"))]),
    protocol=st.sampled_from([None, "http", "http2", "tls", "ssh", "unknown", "stratum"]),
    server_name=st.sampled_from([None, *HOSTS]),
    now_ns=st.just(1),
)
requests = st.builds(
    RequestFacts,
    method=st.sampled_from(["GET", "POST", "DELETE"]),
    scheme=st.just("https"),
    host=st.sampled_from(HOSTS),
    port=st.just(443),
    path=st.sampled_from(PATHS),
    upgrade=st.sampled_from(["", "websocket"]),
    length=st.sampled_from([None, 0, 10**9]),
)
askers = st.builds(
    Asker,
    run=st.sampled_from(["", "r"]),
    agent=st.sampled_from(["", "x1", "y"]),
    step=st.sampled_from([None, 0, 3, 9]),
    phase=st.sampled_from(["setup", "run"]),
)
rulesets = st.builds(
    Ruleset,
    allow=st.lists(rules(), max_size=4).map(tuple),
    hold=st.lists(rules(), max_size=2).map(tuple),
    deny=st.lists(rules(granting=False), max_size=2).map(tuple),
)
maybe_askers = st.one_of(st.none(), askers)


@given(rulesets, flows, requests, maybe_askers)
def test_nothing_is_allowed_without_a_grant(
    made: Ruleset, facts: FlowFacts, request: RequestFacts, asker: Asker
) -> None:
    bare = msgspec.structs.replace(made, allow=(), hold=())
    assert judge_flow(bare, facts, asker).verdict == "deny"
    assert judge_request(bare, facts, request, asker).verdict == "deny"
    assert judge_query(bare, request.host, asker=asker).verdict == "deny"
    decision = judge_request(made, facts, request, asker)
    if decision.verdict != "deny":
        assert made.find(decision.rule) in (*made.allow, *made.hold)


@given(rulesets, rules(granting=False), flows, requests, maybe_askers)
def test_one_more_denial_never_widens(
    made: Ruleset, denial: Rule, facts: FlowFacts, request: RequestFacts, asker: Asker
) -> None:
    more = msgspec.structs.replace(made, deny=(*made.deny, denial))
    for before, after in (
        (judge_flow(made, facts, asker), judge_flow(more, facts, asker)),
        (judge_request(made, facts, request, asker), judge_request(more, facts, request, asker)),
        (judge_tool(made, facts, request, "search", asker), judge_tool(more, facts, request, "search", asker)),
        (judge_query(made, request.host, asker=asker), judge_query(more, request.host, asker=asker)),
    ):
        assert RANK[after.verdict] <= RANK[before.verdict]
    assert reads_requests(more, facts, asker) >= reads_requests(made, facts, asker)


@given(rulesets, rules(), flows, requests, maybe_askers)
def test_one_more_grant_never_narrows(
    made: Ruleset, grant: Rule, facts: FlowFacts, request: RequestFacts, asker: Asker
) -> None:
    more = msgspec.structs.replace(made, allow=(*made.allow, grant))
    for before, after in (
        (judge_flow(made, facts, asker), judge_flow(more, facts, asker)),
        (judge_request(made, facts, request, asker), judge_request(more, facts, request, asker)),
        (judge_query(made, request.host, asker=asker), judge_query(more, request.host, asker=asker)),
    ):
        assert RANK[after.verdict] >= RANK[before.verdict]


@given(rulesets, rules(), flows, requests, maybe_askers)
def test_one_more_hold_never_turns_into_an_allowance(
    made: Ruleset, hold: Rule, facts: FlowFacts, request: RequestFacts, asker: Asker
) -> None:
    more = msgspec.structs.replace(made, hold=(*made.hold, hold))
    before, after = judge_request(made, facts, request, asker), judge_request(more, facts, request, asker)
    assert after.verdict != "allow" or before.verdict == "allow"


@given(rulesets, flows, requests, maybe_askers)
def test_a_denial_of_everything_beats_everything(
    made: Ruleset, facts: FlowFacts, request: RequestFacts, asker: Asker
) -> None:
    shut = msgspec.structs.replace(made, deny=(Rule(id="shut", host="*"), *made.deny))
    assert judge_flow(shut, facts, asker).rule == "shut"
    if (facts.protocol, facts.server_name) != ("tls", facts.server_name) or facts.server_name in {None, request.host}:
        assert judge_request(shut, facts, request, asker).rule == "shut"
    assert judge_query(shut, request.host, asker=asker).rule == "shut"


@given(rulesets, flows, maybe_askers)
def test_what_is_admitted_for_some_requests_only_is_read(made: Ruleset, facts: FlowFacts, asker: Asker) -> None:
    decision = judge_flow(made, facts, asker)
    rule = made.find(decision.rule)
    if decision.verdict != "deny" and rule is not None and rule.reads_requests:
        assert reads_requests(made, facts, asker)
        assert facts.protocol in {None, "http", "http2", "tls"} or (facts.protocol == "ssh" and rule.git)


pieces = st.sampled_from(
    ["/", "a", "b", ".", "..", "%2e", "%2E%2e", "%2f", "%2F", "%5c", "\\", "%00", "%25", "%", "%c3%a9", "é", "%zz", "//", ";x", "?", "*", " ", "%20"]
)  # fmt: skip
texts = st.one_of(st.text(max_size=30), st.lists(pieces, max_size=12).map("".join).map(lambda text: "/" + text))


@given(texts)
def test_normal_paths_stay_as_they_are(text: str) -> None:
    path = normalise_path(text)
    if path is not None:
        assert normalise_path(path) == path
        assert normalise_path(encode_path(path)) == path


@given(texts.map(lambda text: "/pub" + text))
def test_no_path_gets_out_of_its_folder(text: str) -> None:
    """However a server reads what is sent: as it is, decoded once or twice, dot segments resolved before or after."""
    path = normalise_path(text)
    if path is None or not match_path("/pub/**", path):
        return
    sent = encode_path(path)
    for reading in (sent, unquote(sent), unquote(unquote(sent)), unquote(sent).replace("\\", "/")):
        resolved = posixpath.normpath(reading)
        assert resolved == "/pub" or resolved.startswith("/pub/"), (path, reading)


@given(
    st.lists(st.sampled_from(["/", "a", "b", "*", "**"]), max_size=9)
    .map("".join)
    .filter(lambda text: "***" not in text),
    st.text(alphabet="/ab", max_size=9),
)
def test_patterns_mean_what_their_expression_means(pattern: str, path: str) -> None:
    under, rest = (pattern[:-3], "(/.*)?") if pattern.endswith("/**") else (pattern, "")
    expression = re.escape(under).replace(r"\*\*", ".*").replace(r"\*", "[^/]*") + rest
    assert match_path(pattern, path) == bool(re.fullmatch(expression, path))


def test_no_path_makes_a_pattern_slow() -> None:
    began = time.process_time()
    for pattern in ("/**/a/**/a/**/a/**/b", "/*a*a*a*a*b", "/**a**a**a**c/**"):
        assert not match_path(pattern, "/" + "a" * 8000)
        assert not match_path(pattern, "/a" * 4000)
    assert time.process_time() - began < 2
