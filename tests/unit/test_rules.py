"""Rule files, grants and verdicts: pure, so every case is a line."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vallum.cli.rules import rules as rules_command
from vallum.core.errors import RuleError
from vallum.rules.addresses import METADATA, OWN, RANGES, canonical, guards_of
from vallum.rules.explanation import explain
from vallum.rules.files import compose, parse_ruleset, read_builtin, read_ruleset
from vallum.rules.grants import CONTAINMENTS, Rule, Ruleset, parse_grant
from vallum.rules.names import normalise_name
from vallum.rules.verdicts import (
    FlowFacts,
    Pin,
    admits_server_first,
    judge_answer,
    judge_flow,
    judge_query,
    may_connect,
)


def grants(*texts: str) -> Ruleset:
    return Ruleset(allow=tuple(parse_grant(text) for text in texts))


def flow(ip: str, port: int = 443, *names: str, **fields: object) -> FlowFacts:
    pins = tuple(Pin(name=name) for name in names)
    return msgspec.structs.replace(FlowFacts(dst_ip=ip, dst_port=port, names=pins), **fields)


def test_nothing_allowed_means_nothing() -> None:
    for rules in (Ruleset(), Ruleset(allow=()), read_builtin("standard"), read_builtin("locked")):
        assert judge_flow(rules, flow("203.0.113.1")).verdict == "deny"
        assert judge_query(rules, "a.example").verdict == "deny"
    empty_ports = Ruleset(allow=(Rule(id="x", host="*", ports=()), Rule(id="y", cidr="0.0.0.0/0", ports=())))
    assert judge_flow(empty_ports, flow("203.0.113.1", 443, "a.example")).rule == "default-deny"


@pytest.mark.parametrize(
    ("text", "host", "cidr", "ports"),
    [
        ("mirror.example", "mirror.example", None, (80, 443)),
        ("Mirror.Example.:8443", "mirror.example", None, (8443,)),
        ("*.example.org:443", "*.example.org", None, (443,)),
        ("bücher.example", "xn--bcher-kva.example", None, (80, 443)),
        ("203.0.113.9", None, "203.0.113.9/32", (80, 443)),
        ("203.0.113.0/24:22", None, "203.0.113.0/24", (22,)),
        ("2001:db8::1", None, "2001:db8::1/128", (80, 443)),
        ("[2001:db8::1]:22", None, "2001:db8::1/128", (22,)),
        ("[2001:db8::]/32", None, None, None),
        ("::ffff:10.0.0.1", None, "10.0.0.1/32", (80, 443)),
        ("203.0.113.1/24", None, None, None),
        ("a.example:0", None, None, None),
        ("a.example:65536", None, None, None),
        ("a.example:x", None, None, None),
        ("a.example:٤٤٣", None, None, None),
        ("", None, None, None),
        ("-a.example", None, None, None),
        ("a..example", None, None, None),
        ("*.", None, None, None),
        ("a.*.example", None, None, None),
        ("2130706433", None, None, None),
        ("http://a.example", None, None, None),
    ],
)
def test_parse_grant(text: str, host: str | None, cidr: str | None, ports: tuple[int, ...] | None) -> None:
    if ports is None:
        with pytest.raises(RuleError, match="grant"):
            parse_grant(text)
    else:
        rule = parse_grant(text)
        assert (rule.host, rule.cidr, rule.ports) == (host, cidr, ports)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('contaminent = "locked"', r"line 1: the key 'contaminent' is not known: use containment, allow, deny"),
        ('containment = "open"', r"line 1: containment is 'open': use one of locked, standard, research"),
        ('\n[[allow]]\nhost = "a.example"\nport = 1', r"line 4: the key 'port' of \[\[allow\]\] is not known"),
        ('[[allow]]\nhost = "a.example"\n[[allow]]\ncidr = "10.0.0.1/8"', r"line 4: cidr = .*without host bits"),
        ("[[allow]]\nports = [1]", r"line 1: \[\[allow\]\] needs exactly one of host and cidr"),
        ('[[deny]]\nhost = "a.example"\ncidr = "10.0.0.0/8"', r"line 1: .*exactly one"),
        ('[[allow]]\nhost = "a.example"\nports = []', r"line 3: ports = "),
        ('[[allow]]\nhost = "a.example"\nports = [0]', r"line 3: ports = "),
        ('[[allow]]\nhost = "a.example"\nports = [true]', r"line 3: ports = "),
        ('[[allow]]\nhost = "a.example"\nports = "443"', r"line 3: ports = "),
        ("[[allow]]\nhost = 5", r"line 2: host = 5 is not usable"),
        ('[[allow]]\nhost = "a.example"\nprotocols = ["tsl"]', r"line 3: protocols = .*http, http2, tls, ssh"),
        ('[[allow]]\nhost = "a.example"\nid = "x y"', r"line 3: id = "),
        ('allow = "a.example"', r"line 1: 'allow' is not a list of tables: write \[\[allow\]\]"),
        ('containment = "locked"\n[[allow]]\nhost = "a.example"', r"line 2: containment is locked"),
        ("[[allow]\nhost = 1", r"not valid TOML .*line 1"),
    ],
)
def test_bad_files_name_place_key_and_remedy(body: str, message: str) -> None:
    with pytest.raises(RuleError, match=message) as info:
        parse_ruleset(body, "rules.toml")
    assert str(info.value).startswith("rules.toml")
    assert "\n" not in str(info.value) or "TOML" in str(info.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="cannot be read"):
        read_ruleset(tmp_path / "none.toml")
    with pytest.raises(RuleError, match="cannot be read"):
        read_ruleset(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(RuleError, match="not UTF-8"):
        read_ruleset(tmp_path / "latin")
    (tmp_path / "deep").write_text("allow = " + "[" * 100_000)
    with pytest.raises(RuleError, match="TOML"):
        read_ruleset(tmp_path / "deep")


@given(st.text(max_size=200))
def test_no_text_makes_the_parsers_fail_otherwise(text: str) -> None:
    for parse in (parse_grant, lambda t: parse_ruleset(t, "x")):
        with contextlib.suppress(RuleError):
            parse(text)
    normalise_name(text)


def test_builtin_files_and_composition(tmp_path: Path) -> None:
    for level in CONTAINMENTS:
        assert read_builtin(level).containment == level
    research = compose("research")
    assert (
        judge_flow(research, flow("203.0.113.1", 443, "a.example", protocol="tls", server_name="a.example")).verdict
        == "allow"
    )
    assert judge_flow(research, flow("203.0.113.1", 22, "a.example")).verdict == "deny"
    assert judge_flow(research, flow("203.0.113.1")).verdict == "deny"
    assert judge_flow(research, flow("10.0.0.1", 80, "a.example")).rule == "private-range"
    with pytest.raises(RuleError, match="containment is locked"):
        compose("locked", allow=["a.example"])
    assert judge_flow(compose("locked"), flow("203.0.113.1")).rule == "locked"
    with pytest.raises(RuleError, match="containment 'open' is not known"):
        compose("open")
    file = tmp_path / "r.toml"
    file.write_text('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "no-b"\nhost = "b.a.example"\n')
    rules = compose(own=read_ruleset(file), allow=["c.example"])
    assert [rule.id for rule in rules.allow] == ["allow:a.example", "allow:c.example"]
    assert any("no-b" in line for line in rules.describe())


GUARDED = {
    "169.254.169.254": "metadata",
    "100.100.100.200": "metadata",
    "169.254.170.2": "metadata",
    "fd00:ec2::254": "metadata",
    "::ffff:169.254.169.254": "metadata",
    "::ffff:a9fe:a9fe": "metadata",
    "64:ff9b::169.254.169.254": "metadata",
    "2002:a9fe:a9fe::1": "metadata",
    "::169.254.169.254": "metadata",
    "10.1.2.3": "private-range",
    "172.31.255.255": "private-range",
    "192.168.0.1": "private-range",
    "100.64.0.1": "private-range",
    "fc00::1": "private-range",
    "2002:0a00:0001::": "private-range",
    "64:ff9b:1::10.0.0.1": "private-range",
    "2001:db8::5efe:10.0.0.1": "private-range",
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "::1": "loopback",
    "169.254.1.1": "link-local",
    "fe80::1%eth0": "link-local",
    "0.0.0.0": "unspecified",
    "::": "unspecified",
    "224.0.0.1": "multicast",
    "ff02::1": "multicast",
    "255.255.255.255": "reserved",
}


@pytest.mark.parametrize(("ip", "rule"), GUARDED.items())
def test_guarded_addresses_open_only_by_exact_grants(ip: str, rule: str) -> None:
    wide = Ruleset(
        allow=(
            Rule(id="all4", cidr="0.0.0.0/0"),
            Rule(id="all6", cidr="::/0"),
            Rule(id="any", host="*"),
            Rule(id="wild", host="*.example"),
        )
    )
    assert judge_flow(wide, flow(ip, 80, "a.example")).rule == rule
    exact = f"{str(canonical(ip)).partition('%')[0]}"
    assert judge_flow(Ruleset(allow=(Rule(id="it", cidr=exact),)), flow(ip, 80)).rule == "it"
    by_name = judge_answer(grants("a.example"), "a.example", ip)
    assert by_name.verdict == ("allow" if rule == "private-range" else "deny")


def test_public_addresses_are_not_guarded() -> None:
    for ip in (
        "203.0.113.1",
        "8.8.8.8",
        "172.32.0.1",
        "100.128.0.1",
        "2001:db8::1",
        "2606:4700::1",
        "64:ff9b::8.8.8.8",
    ):
        assert guards_of(canonical(ip)) == []


def test_own_addresses() -> None:
    own = flow("203.0.113.1", 80, own=True)
    assert judge_flow(grants("203.0.113.0/24:80"), own).rule == "own-address"
    assert judge_flow(grants("203.0.113.1:80"), own).verdict == "allow"
    inside = flow("10.0.0.5", 80, own=True)
    assert judge_flow(grants("10.0.0.0/8:80"), inside).rule == "own-address"
    assert judge_flow(grants("10.0.0.0/8:80"), flow("10.0.0.6", 80)).verdict == "allow"


def test_a_range_inside_a_private_range_opens_it_but_not_metadata() -> None:
    assert judge_flow(grants("10.1.0.0/16:80"), flow("10.1.2.3", 80)).verdict == "allow"
    assert judge_flow(grants("8.0.0.0/6:80"), flow("10.1.2.3", 80)).rule == "private-range"
    assert judge_flow(grants("169.254.0.0/16:80"), flow("169.254.169.254", 80)).rule == "metadata"
    assert judge_flow(grants("169.254.0.0/16:80"), flow("169.254.1.1", 80)).verdict == "allow"
    assert judge_flow(grants("[fd00:ec2::/32]:80"), flow("fd00:ec2::254", 80)).rule == "metadata"


def test_metadata_by_name() -> None:
    assert judge_query(compose("research"), "metadata.google.internal").rule == "metadata"
    assert judge_query(grants("*.google.internal"), "metadata.google.internal").rule == "metadata"
    rules = grants("metadata.google.internal")
    assert judge_query(rules, "metadata.google.internal").verdict == "allow"
    assert judge_answer(rules, "metadata.google.internal", "169.254.169.254").verdict == "allow"
    assert judge_answer(rules, "metadata.google.internal", "169.254.1.1").verdict == "deny"


def test_names_cannot_be_led_inside() -> None:
    assert judge_answer(grants("*.example"), "a.example", "10.0.0.1").rule == "private-range"
    assert judge_answer(grants("*.example"), "a.example", "203.0.113.1").verdict == "allow"
    assert judge_answer(grants("a.example"), "a.example", "169.254.169.254").rule == "metadata"
    assert judge_answer(grants("a.example"), "a.example", "127.0.0.1").rule == "loopback"
    assert judge_answer(grants("a.example"), "a.example", "127.0.0.1", local=True).verdict == "allow"
    assert judge_answer(grants("*.example"), "a.example", "127.0.0.1", local=True).rule == "loopback"
    denied = parse_ruleset('[[allow]]\nhost = "a.example"\n[[deny]]\nid = "bad"\ncidr = "203.0.113.0/24"', "x")
    assert judge_answer(denied, "a.example", "203.0.113.1").rule == "bad"


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("*.example.org", "a.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "aexample.org", False),
        ("*.example.org", "a.example.org.evil", False),
        ("a.example", "A.Example.", True),
        ("a.example", "b.a.example", False),
        ("*", "anything.example", True),
    ],
)
def test_name_patterns(pattern: str, name: str, covered: bool) -> None:
    rules = Ruleset(allow=(Rule(id="x", host=pattern),))
    assert (judge_query(rules, name).verdict == "allow") is covered


@pytest.mark.parametrize(
    "name", ["127.1", "0x7f000001", "2130706433", "a b", "a\\.example", "", "a" * 300, "x\x00.example"]
)
def test_what_is_no_host_name_is_not_looked_up(name: str) -> None:
    assert judge_query(compose("research"), name).rule == "bad-name"


def test_content_of_a_flow() -> None:
    rules = grants("a.example", "198.51.100.0/24:443", "198.51.100.0/24:22", "b.example:9000")
    ip = "203.0.113.1"

    def rule(facts: FlowFacts) -> str:
        return judge_flow(rules, facts).rule

    named = flow(ip, 443, "a.example", "cdn.example")
    ok = msgspec.structs.replace(named, protocol="tls", server_name="a.example")
    assert rule(ok) == "allow:a.example"
    assert rule(msgspec.structs.replace(ok, server_name="cdn.example")) == "sni-mismatch"
    assert rule(msgspec.structs.replace(ok, server_name=None)) == "sni-mismatch"
    assert rule(msgspec.structs.replace(ok, name_hidden=True)) == "encrypted-sni"
    assert rule(msgspec.structs.replace(ok, refused="broken")) == "malformed"
    for protocol in ("ssh", "http", "stratum", "socks", "unknown", "dns"):
        assert rule(msgspec.structs.replace(named, protocol=protocol)) == "protocol-mismatch"
    http = flow(ip, 80, "a.example", protocol="http", server_name="a.example")
    assert rule(http) == "allow:a.example"
    assert rule(msgspec.structs.replace(http, server_name="evil.example")) == "host-mismatch"
    # A grant of addresses leaves names free, but not protocols.
    assert rule(flow("198.51.100.7", 443, protocol="tls", server_name="x.example")).startswith("allow:198.51.100")
    assert rule(flow("198.51.100.7", 443, protocol="ssh")) == "protocol-mismatch"
    assert rule(flow("198.51.100.7", 22, protocol="ssh")) == "ssh-unread"
    watched = msgspec.structs.replace(rules, containment="research")
    assert judge_flow(watched, flow("198.51.100.7", 22, protocol="ssh")).rule.startswith("allow:198.51.100")
    assert rule(flow(ip, 9000, "b.example", protocol="unknown")) == "allow:b.example"
    assert rule(flow(ip, 9000, "b.example", protocol="stratum")) == "protocol-mismatch"
    # Without a pin the name is only a claim.
    assert rule(flow(ip, 443, protocol="tls", server_name="a.example")) == "default-deny"
    assert "granted on port 80, 443 only" in judge_flow(rules, flow(ip, 22, "a.example")).reason


def test_deny_beats_allow() -> None:
    text = """
    [[allow]]
    host = "*.example"
    [[deny]]
    id = "no-bad"
    host = "bad.example"
    [[deny]]
    id = "no-net"
    cidr = "203.0.113.128/25"
    [[deny]]
    id = "no-ssh"
    host = "*"
    protocols = ["ssh"]
    """
    rules = parse_ruleset(text, "x")
    assert judge_query(rules, "bad.example").rule == "no-bad"
    assert judge_flow(rules, flow("203.0.113.1", 443, "bad.example", "ok.example")).rule == "no-bad"
    tls = flow("203.0.113.1", 443, "ok.example", protocol="tls")
    assert judge_flow(rules, msgspec.structs.replace(tls, server_name="bad.example")).rule == "no-bad"
    assert judge_flow(rules, flow("203.0.113.129", 443, "ok.example")).rule == "no-net"
    assert judge_flow(rules, flow("::ffff:203.0.113.129", 443, "ok.example")).rule == "no-net"
    assert judge_flow(rules, flow("64:ff9b::203.0.113.129", 443, "ok.example")).rule == "no-net"
    assert judge_flow(rules, flow("203.0.113.1", 443, "ok.example", protocol="ssh")).rule == "no-ssh"
    assert may_connect(rules, flow("203.0.113.1", 443, "ok.example")).verdict == "allow"


def test_server_first_needs_a_protocol_in_which_servers_speak() -> None:
    assert admits_server_first(grants("a.example:25"), flow("203.0.113.1", 25, "a.example"))
    unread = grants("a.example:22")
    assert not admits_server_first(unread, flow("203.0.113.1", 22, "a.example"))
    watched = msgspec.structs.replace(unread, containment="research")
    assert admits_server_first(watched, flow("203.0.113.1", 22, "a.example"))
    assert not admits_server_first(grants("a.example"), flow("203.0.113.1", 443, "a.example"))
    assert not admits_server_first(grants("a.example:25"), flow("203.0.113.1", 25))


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(addresses, st.integers(1, 65535))
def test_no_address_passes_an_empty_ruleset(ip: str, port: int) -> None:
    assert judge_flow(Ruleset(), flow(ip, port, "a.example")).verdict == "deny"


@given(addresses)
def test_a_wildcard_never_opens_a_guarded_address(ip: str) -> None:
    decision = judge_flow(compose("research"), flow(ip, 443, "a.example"))
    assert (decision.verdict == "deny") == bool(guards_of(canonical(ip)))


def test_rules_survive_the_wire() -> None:
    rules = parse_ruleset('[[allow]]\nhost = "*.a.example"\n[[deny]]\ncidr = "10.0.0.0/8"', "x")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rules), type=Ruleset) == rules


def test_explain(tmp_path: Path) -> None:
    rules = grants("a.example", "198.51.100.0/24:443")
    assert explain(rules, "a.example:443", protocol="tls").decision.rule == "allow:a.example"
    assert explain(rules, "a.example:443", protocol="tls", server_name="b.example").decision.rule == "sni-mismatch"
    assert explain(rules, "b.example").decision.rule == "default-deny"
    assert explain(rules, "a.example:443", address="169.254.169.254").decision.rule == "metadata"
    assert explain(rules, "198.51.100.9:443").decision.verdict == "allow"
    assert any("guard private-range" in line for line in explain(rules, "10.0.0.1:80").considered)
    for bad in ("*.example", "10.0.0.0/8", ""):
        with pytest.raises(RuleError):
            explain(rules, bad)


def test_commands(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[[allow]]\nhost = "a.example"\n')
    run = CliRunner().invoke
    checked = run(rules_command, ["check", str(file)])
    assert checked.exit_code == 0
    assert "allow a.example port 80,443 [allow:a.example]" in checked.output
    allowed = run(rules_command, ["explain", str(file), "a.example", "--protocol", "tls"])
    assert (allowed.exit_code, "allow by rule allow:a.example" in allowed.output) == (0, True)
    denied = run(rules_command, ["explain", str(file), "10.0.0.1:22", "--json"])
    assert denied.exit_code == 1
    assert msgspec.json.decode(denied.output)["decision"]["rule"] == "private-range"
    file.write_text("x = 1")
    failed = run(rules_command, ["check", str(file)])
    assert isinstance(failed.exception, RuleError)


def test_examples_in_the_documentation_are_usable() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        parse_ruleset(block, "docs/rules.md")
    for guard in (METADATA, OWN, *RANGES):
        assert f"`{guard.rule}`" in text
