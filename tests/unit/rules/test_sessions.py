"""Sessions inside SSH: what counts as git's, and which grant covers what."""

from __future__ import annotations

import msgspec
import pytest

from vallum.rules.facts import FlowFacts, Pin
from vallum.rules.grants import Rule, Ruleset
from vallum.rules.sessions import read_session
from vallum.rules.verdicts import judge_flow, judge_session

FACTS = FlowFacts(
    dst_ip="203.0.113.1", dst_port=22, names=(Pin(name="git.example", local=False),), own=False, protocol="ssh"
)


def grant(**terms) -> Ruleset:
    return Ruleset(allow=(Rule(id="g", host="git.example", ports=(22,), **terms),))


@pytest.mark.parametrize(
    ("command", "kind", "path"),
    [
        ("git-upload-pack 'a/b.git'", "git-read", "a/b.git"),
        ("git upload-pack '/a'", "git-read", "/a"),
        ("git-upload-archive '/a'", "git-read", "/a"),
        ("git-receive-pack 'a'", "git-write", "a"),
        (r"git-upload-pack 'it'\''s'", "git-read", "it's"),
        ("git-upload-pack 'a'; id", "exec", None),
        ("git-upload-pack 'a' 'b'", "exec", None),
        ("git-upload-pack a", "exec", None),
        ("git-upload-pack '--help'", "exec", None),
        ("git-upload-pack '$(id)'", "git-read", "$(id)"),
        ("git-upload-pack 'a\nb'", "exec", None),
        ("/usr/bin/git-upload-pack 'a'", "exec", None),
        (" git-upload-pack 'a'", "exec", None),
        ("git-upload-pack 'a'\n", "exec", None),
        ("git-upload-pack 'a\x00'", "other", None),
        ("x" * 9000, "other", None),
    ],
)
def test_commands(command: str, kind: str, path: str | None) -> None:
    session = read_session(command, None)
    assert (session.kind, session.path) == (kind, path)


def test_grants_cover_what_they_name() -> None:
    read, write = read_session("git-upload-pack 'a/b'", None), read_session("git-receive-pack 'a/b'", None)
    shell, sftp, run = read_session(None, None), read_session(None, "sftp"), read_session("id", None)
    every = (read, write, shell, sftp, run)

    def allowed(rules: Ruleset) -> list[bool]:
        return [judge_session(rules, FACTS, one).verdict == "allow" for one in every]

    assert allowed(grant(ssh=("git-read",))) == [True, False, False, False, False]
    assert allowed(grant(git="read")) == [True, False, False, False, False]
    assert allowed(grant(git="write")) == [True, True, False, False, False]
    assert allowed(grant(ssh=("exec",))) == [True, True, False, False, True]
    assert allowed(grant(ssh=("shell", "sftp"))) == [False, False, True, True, False]
    assert allowed(grant(git="read", methods=("GET",))) == [False] * 5
    assert judge_session(grant(ssh=("git-read",)), FACTS, write).rule == "session-mismatch"
    assert judge_session(grant(ssh=("sftp",)), FACTS, read_session(None, "netconf")).verdict == "deny"


def test_paths_are_of_repositories() -> None:
    rules = grant(git="read", paths=("/acme/**",))
    for path, verdict in (("acme/x", "allow"), ("/acme/x", "allow"), ("other/x", "deny"), ("acme/../other/x", "deny")):
        assert judge_session(rules, FACTS, read_session(f"git-upload-pack '{path}'", None)).verdict == verdict, path
    assert judge_session(rules, FACTS, read_session("git-upload-pack '%61cme/x'", None)).verdict == "deny"


def test_ssh_that_nobody_reads() -> None:
    assert judge_flow(grant(), FACTS).rule == "ssh-unread"
    assert judge_flow(grant(ssh=("exec",)), FACTS).verdict == "allow"
    watched = msgspec.structs.replace(grant(), containment="research")
    assert judge_flow(watched, FACTS).verdict == "allow"


def test_denials_and_holds_come_first() -> None:
    rules = grant(ssh=("exec",))
    run = read_session("id", None)
    shut = msgspec.structs.replace(rules, deny=(Rule(id="no", host="git.example"),))
    assert judge_session(shut, FACTS, run).rule == "no"
    held = msgspec.structs.replace(rules, hold=rules.allow)
    assert judge_session(held, FACTS, run).verdict == "hold"
    assert judge_session(held, msgspec.structs.replace(FACTS, approved=("g",)), run).verdict == "allow"
