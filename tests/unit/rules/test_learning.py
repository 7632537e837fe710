"""What a run teaches: the smallest grants, as a diff that is never applied, whatever the guest wrote into its names."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vallum.cli.main import cli
from vallum.core.errors import RuleError
from vallum.core.events import AnyEvent, HttpRequest, Record
from vallum.record.ledger import Ledger
from vallum.rules.files import compose, parse_ruleset
from vallum.rules.learning import learn
from vallum.rules.proposals import Proposal, generalise, propose, render, render_diff
from vallum.rules.verdicts import judge_query
from vallum.testing.incident import Tale, tell_incident


def told(events: list[AnyEvent], source: Any = "denied", **options: bool) -> Proposal:
    records = [Record(id=number, event=event) for number, event in enumerate(events)]
    return propose(learn(records, source, **options))


def request(
    tale: Tale, step: int, method: str, host: str, path: str, rule: str = "default-deny", **fields: Any
) -> None:
    made = {"state": "denied", "verdict": "deny", "scheme": "https", "port": 443, **fields}
    tale.add(
        HttpRequest(
            **tale.fields(step),
            flow="f",
            request="r",
            rule=rule,
            reason="",
            method=method,
            host=host,
            path=path,
            **made,
        )
    )


@pytest.fixture
def tale() -> Tale:
    return Tale("r-1", "e-0")


def test_a_host_that_was_denied(tale: Tale) -> None:
    process = tale.start(3, ["curl"])
    tale.ask(3, process, "api.example.org", verdict="deny", answers=[], rule="default-deny")
    tale.deny(4, process, "203.0.113.5", 8443, "default-deny", "", host="api.example.org", protocol="tls")
    tale.deny(6, process, "203.0.113.5", 8443, "default-deny", "", host="api.example.org", protocol="tls")
    found = told(tale.events)
    assert [(g.host, g.ports, g.count, g.steps) for g in found.grants] == [
        ("api.example.org", [8443], 2, ["e-0/4", "e-0/6"])
    ]
    text = render(found)
    assert "# asked 2 times by steps e-0/4, e-0/6" in text
    assert judge_query(compose(own=parse_ruleset(text, "x")), "api.example.org").verdict == "allow"
    assert judge_query(compose(own=parse_ruleset(text, "x")), "b.example.org").verdict == "deny"


def test_requests_become_methods_and_paths(tale: Tale) -> None:
    for number in range(5):
        request(tale, 1, "GET", "api.example", f"/v1/items/{number}?token=x", "method-mismatch")
    request(tale, 1, "HEAD", "api.example", "/v1/items/1")
    request(tale, 2, "POST", "api.example", "/v1/search")
    grants = told(tale.events).grants
    assert [(g.methods, g.paths) for g in grants] == [(["GET", "HEAD"], ["/v1/items/**"]), (["POST"], ["/v1/search"])]


def test_paths_are_generalised_only_where_many_share_a_folder() -> None:
    assert generalise(["/a", "/b", "/c", "/d", "/e"]) == ["/a", "/b", "/c", "/d", "/e"]
    assert generalise(["/x/1", "/x/2", "/x/3"]) == ["/x/1", "/x/2", "/x/3"]
    assert generalise(["/x/1", "/x/2", "/x/3", "/x/4", "/y"]) == ["/x/**", "/y"]
    deep = [f"/x/{n}/f" for n in range(4)] + [f"/x/big/{n}" for n in range(4)]
    assert generalise(deep) == ["/x/**"]


def test_bundles_are_named_where_they_are_what_was_meant(tale: Tale) -> None:
    process = tale.start(1, ["pip"])
    tale.ask(1, process, "pypi.org", verdict="deny", answers=[], rule="default-deny")
    tale.ask(1, process, "files.pythonhosted.org", verdict="deny", answers=[], rule="default-deny")
    tale.ask(1, process, "raw.githubusercontent.com", verdict="deny", answers=[], rule="default-deny")
    found = told(tale.events)
    assert [use.name for use in found.bundles] == ["pypi"]
    assert [grant.host for grant in found.grants] == ["raw.githubusercontent.com"]
    request(tale, 2, "POST", "pypi.org", "/legacy/")
    assert "pypi.org" in [grant.host for grant in told(tale.events).grants]


def test_set_up_stays_set_up(tale: Tale) -> None:
    request(tale, 0, "GET", "pypi.org", "/simple/x/", phase="setup")
    request(tale, 0, "GET", "only.example", "/x", phase="setup")
    text = render(told(tale.events))
    data = tomllib.loads(text)
    assert (data["setup"], data["allow"][0]["phase"]) == ({"bundles": ["pypi"]}, "setup")
    assert render(told(tale.events), '[setup]\nbundles = ["npm"]\n').count("[setup]") == 1


def test_git_and_what_was_used(tale: Tale) -> None:
    opened = {"state": "opened", "verdict": "allow"}
    request(tale, 1, "GET", "git.example", "/r.git/info/refs?service=git-upload-pack", "research-web", **opened)
    request(tale, 1, "POST", "git.example", "/r.git/git-upload-pack", "research-web", **opened)
    tale.ask(2, tale.start(2, ["x"]), "plain.example", verdict="allow", answers=["203.0.113.8"], rule="research-web")
    tale.permit(2, tale.start(2, ["x"]), "203.0.113.8", 80, "plain.example", out=1, inward=1, ms=1)
    assert told(tale.events).grants == []
    grants = told(tale.events, "used").grants
    assert [(g.host, g.git, g.ports) for g in grants] == [("git.example", "read", [443]), ("plain.example", "", [80])]


def test_what_is_left_out_says_why(tale: Tale) -> None:
    process = tale.start(1, ["x"])

    def deny(ip: str, port: int, rule: str = "default-deny", **more: Any) -> None:
        tale.deny(1, process, ip, port, rule, "", **more)

    for name in ("git.example", "pool.example", "t.example", "front.example"):
        tale.ask(1, process, name, verdict="allow", answers=["203.0.113.7"], rule="it")
    deny("169.254.169.254", 80, "metadata", protocol="http")
    deny("10.0.0.5", 443, "private-range", protocol="tls")
    deny("203.0.113.7", 22, protocol="ssh", host="git.example")
    deny("203.0.113.7", 3333, protocol="stratum", host="pool.example")
    deny("203.0.113.7", 9999, protocol="unknown", first_bytes="xx")
    deny("203.0.113.7", 443, "no-tracking", protocol="tls", host="t.example")
    deny("203.0.113.7", 443, "sni-mismatch", protocol="tls", host="front.example")
    tale.ask(
        1, process, "6d79207365637265742064617461206973.evil.example", verdict="deny", answers=[], rule="default-deny"
    )
    tale.ask(1, process, "db.corp", verdict="deny", answers=[], rule="default-deny")
    tale.ask(1, process, "metadata.google.internal", verdict="deny", answers=[], rule="metadata")
    request(tale, 1, "POST", "git.example", "/r/git-receive-pack", "git-read-only")
    for number in range(25):
        tale.ask(1, process, f"w{number}.words.example", verdict="deny", answers=[], rule="default-deny")
    found = told(tale.events)
    assert (found.grants, found.bundles) == ([], [])
    why = " | ".join(f"{left.target}: {left.why}" for left in found.left_out)
    for piece in (
        "169.254.169.254:80: it is a metadata service",
        "10.0.0.5:443: it is in a private range",
        "git.example:22: its protocol is ssh",
        "pool.example:3333: its protocol is stratum",
        "203.0.113.7:9999: its protocol is unknown",
        "t.example:443: it was refused by rule no-tracking",
        "front.example:443: it was refused by rule sni-mismatch",
        "6d79207365637265742064617461206973.evil.example: its name looks like data",
        "db.corp: it is a name of the inside network",
        "25 names under words.example",
        "it pushes to a repository",
    ):
        assert piece in why
    guarded = told(tale.events, include_guarded=True)
    targets = {grant.host or grant.cidr for grant in guarded.grants}
    assert {"git.example", "pool.example", "10.0.0.5", "db.corp"} <= targets
    assert not any(
        "169.254" in target or "metadata" in target or "evil" in target or "words" in target for target in targets
    )
    parse_ruleset(render(guarded), "x")


def test_a_name_that_was_never_asked_for_is_only_a_claim(tale: Tale) -> None:
    process = tale.start(1, ["x"])
    tale.deny(1, process, "203.0.113.7", 443, "default-deny", "", host="good.example", protocol="tls")
    tale.deny(1, process, "10.0.0.7", 443, "default-deny", "", host="good.example", protocol="tls")
    found = told(tale.events)
    assert [(grant.host, grant.cidr) for grant in found.grants] == [("", "203.0.113.7")]
    assert "called good.example by the guest" in render(found)
    assert [left.target for left in found.left_out] == ["10.0.0.7:443"]


def test_the_incident_teaches_nothing_dangerous() -> None:
    found = told(tell_incident())
    for grant in found.grants:
        assert grant.ports in ([80], [443])
        assert not grant.protocols
    assert any("metadata" in left.why for left in found.left_out)


HOSTILE = st.text(alphabet=st.sampled_from("ab/.%\"'\\\n\r\t#[]=*{}\x1b\x00\u202e\u00e9 ?-"), max_size=40)


@given(st.lists(st.tuples(HOSTILE, HOSTILE, HOSTILE), min_size=1, max_size=5))
def test_text_of_the_guest_cannot_write_rules(texts: list[tuple[str, str, str]]) -> None:
    tale = Tale("r-1", "e-0")
    process = tale.start(1, ["x"])
    for host, path, rule in texts:
        request(tale, 1, "GET", "a.example", "/" + path)
        request(tale, 1, host[:5], host, path, rule)
        tale.deny(1, process, host, 443, rule, "", host=path, protocol="tls")
        tale.ask(1, process, host, verdict="deny", answers=[], rule="default-deny")
    found = told(tale.events)
    text = render_diff(found, "", "new.toml")
    assert not re.search(r"[^\x20-\x7e\n]", text)
    made = tomllib.loads(render(found))
    assert set(made) <= {"allow", "bundles"}
    assert len(made.get("allow", [])) == len(found.grants)
    for line in text.splitlines():
        assert line.startswith(("# left out: ", "--- ", "+++ ", "@@ ", "+"))


def test_a_diff_goes_into_the_file_that_is_there(tale: Tale) -> None:
    process = tale.start(1, ["pip"])
    for name in ("pypi.org", "files.pythonhosted.org", "api.example"):
        tale.ask(1, process, name, verdict="deny", answers=[], rule="default-deny")
    found = told(tale.events)
    for old in (
        '# mine\ncontainment = "standard"\n\n# a host\n[[allow]]\nhost = "b.example"',
        "bundles = ['npm',]\n",
        '[[deny]]\nhost = "x.example"\n[run]\nbundles = ["go"]\n',
        '[[deny]]\nid = "x" # bundles = []\nhost = "x.example"\n',
    ):
        made = parse_ruleset(render(found, old), "x")
        assert {"pypi:index", "allow:api.example"} <= {rule.id for rule in made.allow}
        before = parse_ruleset(old, "x")
        assert {rule.id for rule in (*before.allow, *before.deny)} <= {rule.id for rule in (*made.allow, *made.deny)}
    assert '-bundles = ["npm"]\n' in render_diff(found, 'bundles = ["npm"]\n', "r.toml")
    with pytest.raises(RuleError, match="add pypi to it by hand"):
        render(found, 'bundles = [\n  "npm",\n]\n')
    with pytest.raises(RuleError, match="containment is locked"):
        render(found, 'containment = "locked"\n')


def test_the_command(tmp_path: Path) -> None:
    tale = Tale("r-1", "e-0")
    tale.ask(1, tale.start(1, ["x"]), "api.example", verdict="deny", answers=[], rule="default-deny")
    with Ledger.create(tmp_path / "runs", "r-1") as ledger:
        ledger.append_many(tale.events)
    mine = tmp_path / "mine.toml"
    mine.write_text('[[allow]]\nhost = "b.example"\n')

    def call(*words: str) -> str:
        result = CliRunner().invoke(cli, ["--home", str(tmp_path), "rules", "learn", *words], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert '+host = "api.example"' in call()
    assert json.loads(call("r-1", "--json"))["grants"][0]["ports"] == [443]
    diff = call("r-1", "--rules", str(mine))
    assert diff.startswith(f"--- {mine}\n")
    assert mine.read_text() == '[[allow]]\nhost = "b.example"\n'
    assert call("--from", "used") == ""
    call("-o", str(tmp_path / "out.diff"))
    assert "api.example" in (tmp_path / "out.diff").read_text()
