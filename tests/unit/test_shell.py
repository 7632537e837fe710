"""The language spoken with a persistent shell, against real shells."""

import os
import shutil
import subprocess

import pytest

from vallum.node.shell import SHELLS, make_argv, make_nonce, make_script, parse_status

COMMANDS = [
    ("true", 0),
    ("exit_code() { return 7; }; exit_code", 7),
    ("echo 'quo''tes' \"and\" $((1+1))", 0),
    ("if", 2),
    ("cat <<'X'\nhere\nX", 0),
    ("false; (exit 3)", 3),
    ("no-such-command-at-all", 127),
]


def converse(shell, commands):
    """Run commands in one shell; returns [(status, stdout)]."""
    script_r, script_w = os.pipe()
    status_r, status_w = os.pipe()

    def wire():
        low = [os.dup2(fd, 50 + i) for i, fd in enumerate((script_r, status_w))]
        os.dup2(low[0], 3)
        os.dup2(low[1], 4)

    process = subprocess.Popen(
        make_argv(shell),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=wire,  # noqa: PLW1509 - one thread,
    )
    os.close(script_r)
    os.close(status_w)
    found = []
    for command in commands:
        nonce = make_nonce()
        os.write(script_w, make_script(command, nonce))
        buffer = b""
        while (status := parse_status(buffer, nonce)) is None:
            data = os.read(status_r, 4096)
            assert data, f"the shell ended at {command!r}"
            buffer += data
        found.append(status)
    os.close(script_w)
    out, _ = process.communicate(timeout=10)
    os.close(status_r)
    return found, out


@pytest.mark.parametrize("shell", [s for s in SHELLS if shutil.which(s)])
def test_real_shells_report_every_status(shell):
    statuses, _ = converse(shell, [command for command, _ in COMMANDS])
    expected = [status for _, status in COMMANDS]
    if shell == "/bin/bash":
        expected[3] = 1 if statuses[3] == 1 else 2
    assert statuses == expected


@pytest.mark.parametrize("shell", [s for s in SHELLS if shutil.which(s)])
def test_state_stays_between_commands(shell):
    statuses, out = converse(shell, ["cd /tmp", "word=kept", 'echo "$PWD $word"'])
    assert statuses == [0, 0, 0]
    assert out == b"/tmp kept\n"


def test_a_forged_status_is_not_believed():
    assert parse_status(b"deadbeef 0\n", "00ff") is None
    assert parse_status(b"00ff 0", "00ff") is None, "a line that has not ended is not a status"
    assert parse_status(b"junk\n00ff 3\n", "00ff") == 3
    assert parse_status(b"00ff 3x\n00ff -1\n", "00ff") is None


@pytest.mark.parametrize("shell", [s for s in SHELLS if shutil.which(s)])
def test_the_command_has_neither_descriptor(shell):
    statuses, _ = converse(shell, ["echo forged >&4", "true <&3", "true <&0"])
    assert statuses[0] != 0
    assert statuses[1] != 0
    assert statuses[2] == 0
