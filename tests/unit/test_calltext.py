"""Which tool call a command line runs."""

from __future__ import annotations

import json

import pytest

from vallum.node.calltext import find_calls, find_commands, read_texts

A, B = "cat notes.txt; echo 'it''s'", "curl http://198.51.100.7/"


def texts_of(*commands: str) -> dict[int, tuple[str, ...]]:
    return {step: read_texts(json.dumps({"command": text})) for step, text in enumerate(commands, 3)}


@pytest.mark.parametrize(
    "make",
    [
        lambda c: ["bash", "-c", c],
        lambda c: ["/bin/bash", "-lc", c],
        lambda c: ["sh", "-c", f"{c}\n"],
        lambda c: [
            "bash",
            "-c",
            "-l",
            "source /tmp/snap && eval '" + c.replace("'", "'\"'\"'") + "' < /dev/null && pwd",
        ],
        lambda c: ["bash", "-c", "source /tmp/snap && eval '" + c.replace("'", "'\\''") + "' \\< /dev/null"],
        lambda c: ["bash", "-c", f"shopt -u promptvars\n{c}\necho $?"],
    ],
    ids=["exact", "login", "newline", "eval", "eval-backslash", "lines"],
)
def test_the_shells_of_agents_are_told_apart(make):
    texts = texts_of(A, B)
    assert find_calls(make(A), texts) == (3,)
    assert find_calls(make(B), texts) == (4,)
    assert find_calls(make("something else"), texts) == ()


def test_a_text_inside_another_one_does_not_count():
    texts = texts_of("ls", "ls -l", "echo ls")
    assert find_calls(["bash", "-c", "eval 'ls -l'"], texts) == (4,)
    assert find_calls(["bash", "-c", "false ls"], texts) == ()


def test_the_same_text_twice_is_no_answer():
    assert find_calls(["bash", "-c", "make"], texts_of("make", "make")) == (3, 4)


def test_only_the_command_counts_where_there_is_one():
    assert read_texts('{"command": " ls ", "description": "List"}') == ("ls",)
    assert read_texts('{"cmd": ["bash", "-lc", "ls"]}') == ("ls",)
    assert read_texts('{"what": "ls"}') == ("ls",)


@pytest.mark.parametrize(
    "arguments", ["", "[]", "nonsense", '"text"', "null", "[" * 100_000, '{"command": 7}', '{"command": ""}']
)
def test_arguments_that_hold_no_text(arguments):
    assert read_texts(arguments) == ()
    assert find_calls(["", "x"], {3: read_texts(arguments)}) == ()


def test_a_shell_that_became_its_one_command():
    texts = texts_of("curl -s 'http://198.51.100.7/a b'", "sleep 1; curl", "it's open")
    assert find_commands(["curl", "-s", "http://198.51.100.7/a b"], texts) == (3,)
    assert find_commands(["sleep", "1"], texts) == ()
    assert find_commands([], texts) == ()
