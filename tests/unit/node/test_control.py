"""What holds at a cell's door, as pure functions; and what a typed line means."""

import pytest

from vallum.cli.prompt import Prompt, read_answer
from vallum.client.model import Model
from vallum.core.errors import InvalidInput, RuleError
from vallum.gateway.kit import Credential
from vallum.node.control import digest_rules, make_model_door, pick_credentials, stop_asking
from vallum.rules.grants import Rule, Ruleset

STORED = {
    name: Credential(name=name, hosts=hosts, secret=b"0123456789")
    for name, hosts in (("a", ("a.example",)), ("b", ("*.b.example",)))
}


def ruleset(*allow, hold=()):
    return Ruleset(allow=allow, hold=hold)


def grant(name, host="a.example", **fields):
    return Rule(id=f"allow:{host}", host=host, ports=(443,), credential=name, **fields)


def test_only_what_the_rules_name_is_handed_over():
    assert pick_credentials(ruleset(), None, STORED, None) == ()
    assert [one.name for one in pick_credentials(ruleset(grant("a")), None, STORED, None)] == ["a"]
    assert [one.name for one in pick_credentials(ruleset(hold=(grant("b", "x.b.example"),)), None, STORED, ["b"])] == [
        "b"
    ]
    model = Model(upstream="https://x.b.example/v1", credential="b")
    assert [one.name for one in pick_credentials(ruleset(), model, STORED, None)] == ["b"]


@pytest.mark.parametrize(
    ("rules", "permitted", "error"),
    [
        (ruleset(grant("nosuch")), None, RuleError),
        (ruleset(grant("a", "other.example")), None, RuleError),
        (ruleset(grant("b", "*.example")), None, RuleError),
        (ruleset(grant("a")), ["b"], RuleError),
        (ruleset(), ["nosuch"], InvalidInput),
    ],
)
def test_what_does_not_fit_is_an_error(rules, permitted, error):
    with pytest.raises(error):
        pick_credentials(rules, None, STORED, permitted)


def test_a_model_s_credential_goes_to_its_upstream_only():
    with pytest.raises(InvalidInput, match=r"evil\.example"):
        pick_credentials(ruleset(), Model(upstream="https://evil.example/a.example", credential="a"), STORED, None)
    with pytest.raises(InvalidInput):
        pick_credentials(ruleset(), Model(upstream="scripted", credential="a"), STORED, None)


def test_a_rule_that_asks_no_more_is_a_grant():
    held, other = grant("", "a.example"), grant("", "b.example")
    rules = ruleset(hold=(held, other))
    after = stop_asking(rules, [held])
    assert (after.hold, after.allow) == ((other,), (held,))
    assert stop_asking(after, [held]) == after
    assert stop_asking(rules, [grant("", "a.example", methods=("GET",))]) == rules, "only that very rule"
    assert digest_rules(after) != digest_rules(rules)


def test_no_two_cells_have_one_capability():
    doors = [make_model_door(Model(upstream="scripted")) for _ in range(2)]
    assert doors[0].capability != doors[1].capability
    assert make_model_door(None) is None


@pytest.mark.parametrize(
    ("line", "can_always", "expected"),
    [
        (b"y", False, "allow"), (b" YES ", False, "allow"), (b"n", True, "deny"), (b"a", True, "always"),
        (b"a", False, "again"), (b"", True, "again"), (b"\x1b[0;0Ry", True, "again"), (b"yy", True, "again"),
    ],
)  # fmt: skip
def test_what_a_typed_line_means(line, can_always, expected):
    assert read_answer(line, can_always=can_always) == expected


def test_output_passes_while_nothing_is_asked():
    seen = []
    prompt = Prompt(lambda stream, data: seen.append((stream, data)), is_quiet=True)
    prompt.write("stdout", b"x")
    assert seen == [("stdout", b"x")]
    assert not prompt.is_asking
