"""Requests inside flows: methods, paths, git, tools, holds, phases, selectors, conditions; each denial with its allowed twin."""

from __future__ import annotations

import msgspec
import pytest

from vallum.rules.facts import Asker, FlowFacts, Pin, RequestFacts
from vallum.rules.files import compose, parse_ruleset
from vallum.rules.grants import Ruleset
from vallum.rules.paths import match_path, normalise_path
from vallum.rules.verdicts import (
    admits_server_first,
    judge_answer,
    judge_flow,
    judge_query,
    judge_request,
    judge_tool,
    judges_tools,
    may_connect,
    reads_requests,
)

TLS = FlowFacts(
    dst_ip="203.0.113.1",
    dst_port=443,
    names=(Pin(name="a.example"),),
    protocol="tls",
    server_name="a.example",
    now_ns=0,
)


def rules(text: str) -> Ruleset:
    return parse_ruleset(text, "x")


def ask(method: str = "GET", path: str = "/", host: str = "a.example", **fields: object) -> RequestFacts:
    made = RequestFacts(method=method, scheme="https", host=host, port=443, path=path)
    return msgspec.structs.replace(made, **fields)


def grant(terms: str, host: str = "a.example") -> Ruleset:
    return rules(f'[[allow]]\nid = "it"\nhost = "{host}"\n{terms}')


def test_methods_and_paths_say_what_is_granted() -> None:
    made = grant('methods = ["GET", "HEAD"]\npaths = ["/simple/**", "/x/*"]')
    assert reads_requests(made, TLS)
    assert judge_request(made, TLS, ask("GET", "/simple/requests/")).rule == "it"
    refused = judge_request(made, TLS, ask("POST", "/simple/"))
    assert (refused.rule, "admits GET, HEAD only" in refused.reason) == ("method-mismatch", True)
    refused = judge_request(made, TLS, ask("GET", "/other"))
    assert (refused.rule, "/simple/**" in refused.reason) == ("path-mismatch", True)
    assert judge_request(made, TLS, ask("GET", "/x/y/z")).rule == "path-mismatch"


@pytest.mark.parametrize("path", ["/simple/../secret", "/simple//x", "/a\\b", "relative", "/x%41", "/a?b", ""])
def test_a_path_that_is_not_normal_is_malformed(path: str) -> None:
    assert judge_request(grant(""), TLS, ask("GET", path)).rule == "malformed"


def test_an_encoded_slash_is_judged_in_both_readings() -> None:
    one_segment = grant('paths = ["/*"]')
    assert judge_request(one_segment, TLS, ask("GET", "/@s")).verdict == "allow"
    assert judge_request(one_segment, TLS, ask("GET", "/@s%2Fp")).rule == "path-mismatch"
    assert judge_request(grant('paths = ["/*", "/*/*"]'), TLS, ask("GET", "/@s%2Fp")).verdict == "allow"
    denied = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "a.example"\npaths = ["/evil/**"]')
    assert judge_request(denied, TLS, ask("GET", "/evil%2Fx")).rule == "no"
    assert judge_request(denied, TLS, ask("GET", "/good%2Fx")).verdict == "allow"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("/", "/"),
        ("/a/./b//c/", "/a/b/c/"),
        ("/a/b/..", "/a/"),
        ("/%61%2e%2E/x", "/a../x"),
        ("/a/%2e%2e/b", "/b"),
        ("/@s%2fp", "/@s%2Fp"),
        ("/a%20b", "/a b"),
        ("/lib_1%3a2.deb", "/lib_1:2.deb"),
        ("/..", None),
        ("/a/../../b", None),
        ("/a%2f..%2fb", None),
        ("/a%2f", None),
        ("/%00", None),
        ("/%5c", None),
        ("/%252e", None),
        ("/%ff", None),
        ("/%3f", None),
        ("/%c2%85", None),
        ("/%4", None),
        ("/" + "a" * 9000, None),
        ("", None),
        ("*", None),
    ],
)
def test_normalise_path(text: str, normal: str | None) -> None:
    assert normalise_path(text) == normal


def test_patterns() -> None:
    assert match_path("/a/*", "/a/b")
    assert not match_path("/a/*", "/a/b/c")
    assert match_path("/a/**", "/a")
    assert match_path("/a/**", "/a/")
    assert not match_path("/a/**", "/ab")
    assert match_path("/**/-/raw/**", "/g/r/-/raw/x/y")
    assert match_path("/v*/x.json", "/v1/x.json")
    assert not match_path("/v*/x.json", "/v1/xyjson")


def test_git_is_read_only_unless_granted() -> None:
    fetch = [
        ask("GET", "/o/r.git/info/refs", query="service=git-upload-pack"),
        ask("POST", "/o/r.git/git-upload-pack"),
    ]
    push = [
        ask("GET", "/o/r.git/info/refs", query="service=git-receive-pack"),
        ask("POST", "/o/r.git/git-receive-pack"),
    ]
    for request in fetch:
        assert judge_request(grant('git = "read"'), TLS, request).verdict == "allow"
        assert judge_request(grant('git = "write"'), TLS, request).verdict == "allow"
    for request in push:
        assert judge_request(grant('git = "read"'), TLS, request).rule == "git-read-only"
        assert judge_request(grant('git = "write"'), TLS, request).verdict == "allow"
    for odd in (
        ask("GET", "/o/r.git/info/refs", query="service=git-upload-pack&service=git-receive-pack"),
        ask("GET", "/o/r.git/info/refs"),
        ask("GET", "/login"),
        ask("POST", "/o/r.git/git-upload-pack", query="x"),
        ask("PUT", "/o/r.git/git-upload-pack"),
    ):
        assert judge_request(grant('git = "write"'), TLS, odd).rule == "git-mismatch"
    no_push = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "a.example"\ngit = "write"')
    assert judge_request(no_push, TLS, push[1]).rule == "no"
    assert judge_request(no_push, TLS, fetch[1]).verdict == "allow"


def test_no_domain_fronting() -> None:
    made = rules('[[allow]]\nhost = "a.example"\nmethods = ["GET"]\n[[allow]]\nhost = "b.example"\nmethods = ["GET"]')
    both = msgspec.structs.replace(TLS, names=(Pin(name="a.example"), Pin(name="b.example")))
    assert judge_request(made, both, ask()).verdict == "allow"
    assert judge_request(made, both, ask(host="b.example")).rule == "host-mismatch"
    assert judge_request(made, TLS, ask(host="203.0.113.1")).rule == "host-mismatch"
    plain = msgspec.structs.replace(both, protocol="http", dst_port=80)
    assert judge_request(made, plain, ask(host="b.example")).rule == "allow:b.example"
    assert judge_request(made, plain, ask(host="evil.example")).rule == "host-mismatch"
    clear2 = msgspec.structs.replace(plain, protocol="http2", server_name=None)
    assert reads_requests(rules('[[allow]]\nhost = "a.example"'), clear2)
    assert judge_flow(made, clear2).verdict == "allow"
    assert judge_request(made, clear2, ask(host="evil.example")).rule == "host-mismatch"


def test_websocket_and_other_upgrades() -> None:
    up = ask("GET", "/ws", upgrade="websocket")
    assert judge_request(grant('methods = ["GET"]'), TLS, up).rule == "upgrade-mismatch"
    assert judge_request(grant("websocket = true"), TLS, up).verdict == "allow"
    assert judge_request(grant("websocket = true"), TLS, ask()).verdict == "allow"
    denied = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "*"\nwebsocket = true')
    assert (judge_request(denied, TLS, up).rule, judge_request(denied, TLS, ask()).verdict) == ("no", "allow")


def test_tools_of_a_server() -> None:
    made = grant('tools = ["search_*", "read"]')
    call = ask("POST", "/mcp")
    assert judge_request(made, TLS, call).verdict == "allow"
    assert judge_request(made, TLS, ask("PUT", "/mcp")).rule == "method-mismatch"
    assert judge_tool(made, TLS, call, "search_web").verdict == "allow"
    refused = judge_tool(made, TLS, call, "delete_all")
    assert (refused.rule, "search_*" in refused.reason) == ("tool-mismatch", True)
    denied = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "*"\ntools = ["delete_*"]')
    assert judge_tool(denied, TLS, call, "delete_all").rule == "no"
    assert judge_tool(denied, TLS, call, "search").verdict == "allow"
    assert judge_request(denied, TLS, call).verdict == "allow"


def test_what_needs_to_be_read_is_not_admitted_unread() -> None:
    made = rules('[[allow]]\nhost = "a.example"\nports = [8080]\nmethods = ["GET"]')
    for protocol in ("unknown", "ssh", "stratum"):
        facts = msgspec.structs.replace(TLS, dst_port=8080, protocol=protocol)
        assert judge_flow(made, facts).rule == "protocol-mismatch"
    assert judge_flow(made, msgspec.structs.replace(TLS, dst_port=8080)).verdict == "allow"
    assert not admits_server_first(made, msgspec.structs.replace(TLS, dst_port=8080, protocol=None))


def test_a_wider_grant_beside_a_careful_one_is_not_narrowed() -> None:
    made = rules(
        '[[allow]]\nid = "wide"\nhost = "a.example"\n[[allow]]\nid = "careful"\nhost = "a.example"\n'
        'methods = ["GET"]\ncredential = "token"'
    )
    assert judge_request(made, TLS, ask("GET")).rule == "careful"
    assert judge_request(made, TLS, ask("POST")).rule == "wide"


def test_holds() -> None:
    made = rules('[[hold]]\nid = "ask-me"\nhost = "a.example"\npaths = ["/admin/**"]\n[[allow]]\nhost = "a.example"')
    assert reads_requests(made, TLS)
    assert judge_request(made, TLS, ask("GET", "/admin/x")).verdict == "hold"
    assert judge_request(made, TLS, ask("GET", "/")).verdict == "allow"
    approved = msgspec.structs.replace(TLS, approved=("ask-me",))
    assert judge_request(made, approved, ask("GET", "/admin/x")).rule == "ask-me"
    assert judge_request(made, approved, ask("GET", "/admin/x")).verdict == "allow"
    flow = rules('[[hold]]\nid = "ask-me"\nhost = "a.example"\nports = [22]\nssh = ["exec"]')
    ssh = msgspec.structs.replace(TLS, dst_port=22, protocol="ssh", server_name=None)
    assert (may_connect(flow, ssh).verdict, judge_flow(flow, ssh).verdict) == ("hold", "hold")
    assert not admits_server_first(flow, ssh)
    assert judge_query(flow, "a.example").verdict == "allow"
    assert judge_answer(flow, "a.example", "203.0.113.1").verdict == "allow"
    assert judge_answer(flow, "a.example", "169.254.169.254").rule == "metadata"
    beaten = msgspec.structs.replace(flow, deny=rules('[[deny]]\nid = "no"\nhost = "a.example"').deny)
    assert judge_flow(beaten, msgspec.structs.replace(ssh, approved=("ask-me",))).rule == "no"


def test_a_hold_of_a_name_is_not_passed_by_dialling_a_granted_address() -> None:
    made = rules('[[allow]]\ncidr = "10.1.0.0/16"\n[[hold]]\nid = "ask-me"\nhost = "*.example"')
    dialled = msgspec.structs.replace(TLS, dst_ip="10.1.2.3", names=())
    assert judge_flow(made, dialled).verdict == "hold"
    assert judge_flow(made, msgspec.structs.replace(dialled, approved=("ask-me",))).verdict == "allow"
    assert judge_flow(made, msgspec.structs.replace(dialled, server_name="a.other")).verdict == "allow"
    assert judge_flow(msgspec.structs.replace(made, allow=()), dialled).verdict == "deny"
    careful = rules('[[allow]]\ncidr = "10.1.0.0/16"\n[[hold]]\nid = "ask-me"\nhost = "*.example"\nmethods = ["POST"]')
    plain = msgspec.structs.replace(dialled, dst_port=80, protocol="http", server_name=None)
    assert reads_requests(careful, plain)
    assert judge_request(careful, plain, ask("POST")).verdict == "hold"
    assert judge_request(careful, plain, ask("GET")).verdict == "allow"


def test_phases() -> None:
    made = grant('phase = "setup"')
    assert judge_flow(made, TLS, Asker(phase="setup")).verdict == "allow"
    for asker in (None, Asker()):
        refused = judge_flow(made, TLS, asker)
        assert (refused.rule, "phase setup" in refused.reason) == ("default-deny", True)
        assert judge_query(made, "a.example", asker=asker).verdict == "deny"
        assert judge_answer(made, "a.example", "203.0.113.1", asker=asker).verdict == "deny"
    bundles = rules('[setup]\nbundles = ["pypi"]')
    assert judge_query(bundles, "pypi.org", asker=Asker(phase="setup")).verdict == "allow"
    assert judge_query(bundles, "pypi.org").verdict == "deny"


def test_selectors_widen_for_nobody_who_is_not_known() -> None:
    made = grant('selector = { agent = "helper-*", steps = [3, 5] }')
    assert judge_flow(made, TLS, Asker(agent="helper-1", step=4)).verdict == "allow"
    for asker in (
        None,
        Asker(agent="helper-1"),
        Asker(agent="helper-1", step=6),
        Asker(agent="other", step=4),
        Asker(step=4),
    ):
        assert judge_flow(made, TLS, asker).verdict == "deny"
    denied = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "*"\nselector = { steps = [3] }')
    assert judge_flow(denied, TLS, Asker(step=2)).verdict == "allow"
    for asker in (None, Asker(), Asker(step=3), Asker(step=99)):
        assert judge_flow(denied, TLS, asker).rule == "no"


def test_denials_of_requests_make_the_flow_read() -> None:
    made = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "a.example"\nmethods = ["DELETE"]')
    assert judge_flow(made, TLS).verdict == "allow"
    assert reads_requests(made, TLS)
    assert judge_query(made, "a.example").verdict == "allow"
    assert judge_request(made, TLS, ask("DELETE")).rule == "no"
    assert judge_request(made, TLS, ask("GET")).verdict == "allow"
    anywhere = rules(
        '[[allow]]\ncidr = "203.0.113.0/24"\n[[deny]]\nid = "no"\nhost = "bad.example"\nmethods = ["POST"]'
    )
    keep_alive = msgspec.structs.replace(TLS, names=(), dst_port=80, protocol="http", server_name="ok.example")
    assert reads_requests(anywhere, keep_alive)
    assert judge_request(anywhere, keep_alive, ask("POST", host="bad.example")).rule == "no"
    assert judge_request(anywhere, keep_alive, ask("POST", host="ok.example")).verdict == "allow"
    assert not reads_requests(anywhere, msgspec.structs.replace(keep_alive, dst_port=443, protocol="tls"))
    clear = rules('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "*"\nprotocols = ["http"]')
    plain = msgspec.structs.replace(TLS, dst_port=80, protocol="http2")
    assert judge_flow(clear, plain).rule == "no"


def test_conditions() -> None:
    made = grant("when = 'request.length < 1000 && request.method == \"POST\"'")
    assert judge_flow(made, TLS).verdict == "allow"
    assert judge_request(made, TLS, ask("POST", length=10)).verdict == "allow"
    assert judge_request(made, TLS, ask("POST", length=1000)).rule == "condition"
    by_time = grant("when = 'now < timestamp(\"2026-01-01T00:00:00Z\")'")
    assert judge_flow(by_time, TLS).verdict == "allow"
    late = msgspec.structs.replace(TLS, now_ns=1_800_000_000 * 10**9)
    assert judge_flow(by_time, late).rule == "condition"
    by_scope = grant(
        "when = \"scope.agent.startsWith('h') && phase == 'run' && flow.names.exists(n, n == 'a.example')\""
    )
    assert judge_flow(by_scope, TLS, Asker(agent="h1")).verdict == "allow"
    assert judge_flow(by_scope, TLS, Asker(agent="x")).rule == "condition"


def test_a_condition_without_a_value_denies() -> None:
    broken = "when = 'flow.dst_port / (flow.dst_port - 443) == 1'"
    refused = judge_flow(grant(broken), TLS)
    assert (refused.rule, "condition of it" in refused.reason) == ("internal-error", True)
    assert judge_flow(grant(broken.replace("443", "400")), TLS).rule == "condition"
    beside = rules(f'[[allow]]\nid = "b"\nhost = "a.example"\n{broken}\n[[allow]]\nid = "ok"\nhost = "a.example"')
    assert judge_flow(beside, TLS).rule == "ok"
    denial = rules(f'[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no"\nhost = "*"\n{broken}')
    assert judge_flow(denial, TLS).rule == "no"
    long = msgspec.structs.replace(TLS, names=tuple(Pin(name="a.example") for _ in range(100)))
    assert judge_flow(grant("when = \"flow.names.exists(n, n == 'x')\""), long).rule == "internal-error"


def test_bundles_beside_grants() -> None:
    made = compose(allow=["@pypi", "bundle:npm", "a.example"])
    assert judge_query(made, "pypi.org").verdict == "allow"
    assert judge_query(made, "registry.npmjs.org").verdict == "allow"
    assert judge_query(made, "upload.pypi.org").verdict == "deny"
    with pytest.raises(Exception, match=r"there is no bundle 'pipy': use one of .*pypi"):
        compose(allow=["@pipy"])
    with pytest.raises(Exception, match="containment is locked"):
        compose("locked", allow=["@pypi"])


def test_resources_and_prompts_need_patterns_of_their_own() -> None:
    call = ask("POST", "/mcp")
    everything, some = grant('tools = ["*"]'), grant('tools = ["resource:docs://*", "prompt:*"]')
    assert judge_tool(everything, TLS, call, "search").verdict == "allow"
    assert judge_tool(everything, TLS, call, "resource:docs://a").rule == "tool-mismatch"
    assert judge_tool(some, TLS, call, "resource:docs://a").verdict == "allow"
    assert judge_tool(some, TLS, call, "resource:secret://a").rule == "tool-mismatch"
    assert judge_tool(some, TLS, call, "prompt:review").verdict == "allow"
    assert judge_tool(some, TLS, call, "search").rule == "tool-mismatch"


def test_a_denial_of_tools_looks_at_messages_and_takes_any_case() -> None:
    whole = '[[allow]]\nhost = "a.example"\n'
    denied = rules(whole + '[[deny]]\nid = "no"\nhost = "*"\npaths = ["/mcp"]\ntools = ["delete_*"]')
    call, page = ask("POST", "/mcp"), ask("POST", "/api")
    assert judge_tool(denied, TLS, call, "DELETE_all").rule == "no"
    for request, wanted in ((call, True), (page, False)):
        assert judges_tools(denied, TLS, request, judge_request(denied, TLS, request)) is wanted
    plain = rules(whole)
    assert not judges_tools(plain, TLS, call, judge_request(plain, TLS, call))
    made = grant('tools = ["read"]')
    assert judges_tools(made, TLS, call, judge_request(made, TLS, call))
