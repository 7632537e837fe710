"""Schema 2 of rule files: every field, what goes wrong with it, bundles, the tests of rule files and their command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from vallum.cli.rules import rules as command
from vallum.core.errors import RuleError
from vallum.rules.budgets import RULE as BUDGET
from vallum.rules.cases import list_shipped, read_cases, run_case
from vallum.rules.conditions import FIELDS as VARIABLES
from vallum.rules.explanation import explain
from vallum.rules.fields import FIELDS
from vallum.rules.files import compose, list_bundles, parse_ruleset, read_bundle
from vallum.rules.grants import CONTAINMENTS, Budget, Rule, Ruleset, Selector
from vallum.rules.learning import GUARDED, LEARNABLE
from vallum.rules.queries import RULE as QUERIES

EVERYTHING = """
bundles = ["pypi"]
[setup]
bundles = ["debian"]
[[allow]]
id = "all"
host = "a.example"
ports = [443, 22]
protocols = ["tls", "ssh"]
phase = "run"
selector = { run = "r-*", episode = "e0", agent = "x", steps = [2] }
methods = ["GET"]
paths = ["/v1/**"]
when = "request.length < 10"
credential = "token"
service = "packages"
git = "read"
tools = ["a*"]
websocket = true
ssh = ["exec", "git-read"]
budget = { bytes_out = 5, requests_per_minute = 6 }
[[hold]]
host = "b.example"
[[deny]]
cidr = "198.51.100.0/24"
methods = ["DELETE"]
"""


def test_every_field() -> None:
    made = parse_ruleset(EVERYTHING, "f.toml")
    assert made.find("all") == Rule(
        id="all",
        host="a.example",
        ports=(443, 22),
        protocols=("tls", "ssh"),
        phase="run",
        selector=Selector(run="r-*", episode="e0", agent="x", steps=(2, None)),
        methods=("GET",),
        paths=("/v1/**",),
        when="request.length < 10",
        credential="token",
        service="packages",
        git="read",
        tools=("a*",),
        websocket=True,
        ssh=("exec", "git-read"),
        budget=Budget(bytes_out=5, requests_per_minute=6),
        source="f.toml",
    )
    assert [rule.id for rule in made.hold] == ["hold:b.example"]
    setup = made.find("debian:main")
    assert setup is not None
    assert (setup.phase, setup.source) == ("setup", "bundle debian")
    pypi = made.find("pypi:index")
    assert pypi is not None
    assert pypi.phase is None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Ruleset) == made
    told = "\n".join(compose(own=made).describe())
    for word in (
        "credential token",
        "git read",
        "for run r-*",
        "in setup",
        "hold b.example",
        "at most 5 bytes_out",
        "when request",
    ):
        assert word in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('phase = "set-up"', "phase = 'set-up' is not usable: give one of setup, run"),
        ("selector = {}", "selector"),
        ('selector = { who = "x" }', "give a table of run, episode, agent"),
        ("selector = { steps = [5, 3] }", "selector"),
        ('methods = ["get"]', "in capital letters"),
        ("methods = []", "methods"),
        ('paths = ["v1"]', "path patterns in normal form"),
        ('paths = ["/a/../b"]', "path patterns"),
        ('paths = ["/a/***"]', "path patterns"),
        ('when = "flow.port == 1"', r"at 1:5: undeclared reference to 'flow.port' .*the variables are flow.dst_ip"),
        ("when = 'flow.dst_port == \"443\"'", "no matching overload"),
        ('when = "flow.dst_port"', "not a condition"),
        ('when = ""', "give a CEL condition"),
        ('when = "[1].all(a, [1].all(b, [1].all(c, [1].all(d, [1].all(e, true)))))"', "comprehensions"),
        (f'when = "{"1 == 1 || " * 300}true"', "more than 2000 characters"),
        ('credential = ""', "name of a credential"),
        ('service = "model"', "give one of forward, packages"),
        ('git = "push"', "give one of read, write"),
        ("tools = [5]", "patterns of tool names"),
        ('websocket = "yes"', "give true or false"),
        ('ssh = ["forward"]', "exec, shell, sftp, git-read, git-write"),
        ('ssh = ["exec"]', "does not admit ssh on any of its ports"),
        ("budget = { bytes_out = 0 }", "numbers from 1"),
        ("budget = { bytes = 5 }", "bytes_out, bytes_in"),
        ('protocols = ["ssh"]\nmethods = ["GET"]', "none of its protocols and ports carries any"),
    ],
)
def test_a_value_that_is_not_usable_is_named_with_its_line(line: str, message: str) -> None:
    with pytest.raises(RuleError, match=message) as told:
        parse_ruleset(f'[[allow]]\nhost = "a.example"\n\n{line}\n', "f.toml")
    number = 5 if "\n" in line else 4
    assert str(told.value).startswith((f"f.toml, line {number}:", "f.toml, line 4:"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[deny]]\nhost = "a.example"\ncredential = "x"', r"line 3: credential has no meaning in \[\[deny\]\]"),
        ('[[deny]]\nhost = "a.example"\nbudget = { bytes_in = 1 }', "line 3: budget has no meaning"),
        ('[[allow]]\nhost = "*"\ncredential = "x"', "line 3: a credential would go to whoever asks"),
        (
            '[[allow]]\nid = "a"\nhost = "a.example"\n[[hold]]\nid = "a"\nhost = "b.example"',
            "line 5: the id 'a' is used twice",
        ),
        ('bundles = "pypi"', "line 1: bundles = 'pypi' is not usable: give a list of some of"),
        ('bundles = ["pipy"]', "line 1: .*there is no bundle 'pipy'"),
        ("[setup]\nallow = 1", r"line 1: \[setup\] holds something else than bundles"),
        ('\n[run]\nbundles = ["x/../y"]', "line 3: .*there is no bundle"),
        ('containment = "locked"\nbundles = ["pypi"]', "line 2: containment is locked"),
        ('containment = "locked"\n[[hold]]\nhost = "a.example"', "line 2: containment is locked"),
    ],
)
def test_terms_that_do_not_go_together(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        parse_ruleset(text, "f.toml")


def test_ids_that_credentials_are_found_by_are_unique() -> None:
    made = compose(
        own=parse_ruleset('[[allow]]\nhost = "a.example"\n[[allow]]\nhost = "a.example"\ncredential = "x"\n', "f"),
        allow=["a.example", "a.example:8080", "@pypi", "@pypi"],
    )
    ids = [rule.id for rule in made.allow]
    assert ids == ["allow:a.example", "allow:a.example#2", "allow:a.example", "pypi:index", "pypi:files"]
    assert made.find("allow:a.example#2") == made.allow[1]
    assert made.allow[1].credential == "x"


def test_bundles_name_exact_hosts_and_say_what_they_let_out() -> None:
    assert {"pypi", "npm", "debian", "github-read"} <= set(list_bundles())
    for name in list_bundles():
        for rule in read_bundle(name):
            assert rule.is_exact
            assert rule.id.startswith(f"{name}:")
            assert rule.reads_requests
            assert rule.git == "read" or set(rule.methods or ()) == {"GET", "HEAD"}
    folder = list_shipped()[-1].parents[1]
    for name in list_bundles():
        assert "What it lets out:" in (folder / "bundles" / f"{name}.toml").read_text()


def test_every_dial_and_bundle_has_tests_and_they_pass() -> None:
    shipped = list_shipped()
    assert {path.name.removesuffix(".test.toml") for path in shipped} == {*CONTAINMENTS, *list_bundles()}
    for path in shipped:
        made, cases = read_cases(path)
        for case in cases:
            outcome = run_case(made, case)
            assert outcome.passed, "\n".join(outcome.describe())


def test_the_test_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    file = tmp_path / "mine.toml"
    good = '[[allow]]\nid = "it"\nhost = "a.example"\nmethods = ["GET"]\n[[test]]\nrequest = "GET https://a.example/x"\nverdict = "allow"\nrule = "it"\n'
    file.write_text(good)
    passed = run(command, ["test", str(file), "-v"])
    assert (passed.exit_code, "1 tests, 1 passed, 0 failed" in passed.output) == (0, True)
    (tmp_path / "mine.test.toml").write_text(
        '[[test]]\nname = "no posts"\nrequest = "POST https://a.example/x"\nverdict = "allow"\n'
    )
    failed = run(command, ["test", str(file)])
    assert failed.exit_code == 1
    for piece in ("FAIL no posts", "mine.test.toml, line 1", "- expected allow", "+ got      deny by method-mismatch"):
        assert piece in failed.output
    lines = run(command, ["test", str(file), "--json"]).output.splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [True, False]
    alone = run(command, ["test", str(tmp_path / "mine.test.toml")])
    assert alone.exit_code == 1
    assert run(command, ["test"]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[test]]\nflow = "a.example"\n', r"line 1: \[\[test\]\] needs a verdict"),
        ('[[test]]\nverdict = "allow"\n', "needs exactly one of flow, request and query"),
        ('[[test]]\nflow = "a.example"\nverdict = "allow"\nhost = 1', "line 4: the key 'host'"),
        ('[[test]]\nflow = "a.example"\nverdict = "allow"\nstep = "x"', "line 4: step"),
        ('[[test]]\nflow = "a.example"\nverdict = "allow"\nprotocol = "x"', "line 4: protocol"),
        ("test = 5", "not a list of tables"),
        ("", "has no tests"),
    ],
)
def test_tests_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        read_cases(tmp_path / "f.toml")


def test_a_test_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        '[[allow]]\nhost = "a.example"\nphase = "setup"\nselector = { agent = "x", steps = [3] }\n'
        "when = 'now > timestamp(\"2026-06-01T00:00:00Z\")'\n"
        '[[test]]\nflow = "a.example:443"\nphase = "setup"\nagent = "x"\nstep = 4\nnow = 2026-07-01T00:00:00Z\nprotocol = "tls"\nverdict = "allow"\n'
        '[[test]]\nflow = "a.example:443"\nphase = "setup"\nagent = "x"\nstep = 4\nnow = 2026-05-01T00:00:00Z\nprotocol = "tls"\nverdict = "deny"\nrule = "condition"\n'
        '[[test]]\nquery = "a.example"\nverdict = "deny"\n'
        '[[test]]\nflow = "a.example"\naddress = "10.0.0.1"\nphase = "setup"\nagent = "x"\nstep = 1\nverdict = "deny"\n'
    )
    made, cases = read_cases(file)
    assert all(run_case(made, case).passed for case in cases)


def test_explain_command_takes_urls_and_askers(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text('[run]\nbundles = ["github-read"]\n[[hold]]\nhost = "h.example"\n')
    run = CliRunner().invoke

    def verdict(*words: str) -> tuple[int, str]:
        result = run(command, ["explain", str(file), *words, "--json"])
        return result.exit_code, json.loads(result.output)["decision"]["rule"]

    assert verdict("GET", "https://github.com/o/r/info/refs?service=git-upload-pack") == (0, "github-read:git")
    assert verdict("https://github.com/o/r/git-receive-pack", "--method", "POST") == (1, "git-read-only")
    assert verdict("api.github.com", "--path", "/repos/o/r") == (0, "github-read:api")
    assert verdict("api.github.com", "--path", "/repos/o/r", "--phase", "setup") == (1, "default-deny")
    assert verdict("h.example:443", "--protocol", "tls") == (1, "hold:h.example")
    checked = run(command, ["check", str(file), "--json"])
    assert json.loads(checked.output)["hold"][0]["id"] == "hold:h.example"
    bad = run(command, ["explain", str(file), "https://github.com/%2e%2e/%2e%2e"])
    assert isinstance(bad.exception, RuleError)


def test_the_documentation_names_everything_and_its_tests_pass(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    for word in (*FIELDS, *list_bundles(), *Budget.__struct_fields__, *LEARNABLE, *GUARDED, BUDGET, QUERIES):
        assert f"`{word}`" in text, word
    assert all(name in text or name.partition(".")[2] in text for name in VARIABLES)
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[[test]]" in block]
    assert blocks
    for block in blocks:
        (tmp_path / "doc.toml").write_text(block)
        made, cases = read_cases(tmp_path / "doc.toml")
        for case in cases:
            assert run_case(made, case).passed


def test_one_more_grant_never_narrows() -> None:
    wide = parse_ruleset('[[allow]]\nhost = "a.example"', "x")
    both = parse_ruleset('[[allow]]\nhost = "a.example"\n[[allow]]\nhost = "a.example"\nmethods = ["GET"]', "x")
    for made in (wide, both):
        assert explain(made, "POST https://a.example/x").decision.verdict == "allow"
