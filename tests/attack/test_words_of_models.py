"""What a model, a tool or a server says reaches a terminal or a page only as inert text."""

import json
import os
import subprocess
import sys

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

EVIL = "\x1b]0;owned\x07\x1b[2J\u202etxt\u2066\x9b31m<script>alert(1)</script>[bold]'\"><img src=x onerror=alert(1)>"
ASK = """
import json, os, sys, urllib.request
body = json.dumps({"model": sys.argv[1], "messages": [{"role": "user", "content": sys.argv[1]}],
    "tools": [{"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}]}).encode()
headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)).read()
"""


def vallum_command(home, *arguments):
    environ = {**os.environ, "VALLUM_HOME": str(home), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "vallum", *arguments]
    return subprocess.run(command, capture_output=True, env=environ, timeout=60, stdin=subprocess.DEVNULL)


async def test_words_of_a_model_drive_no_terminal_and_no_page(home):
    script = [{"text": EVIL, "tool_calls": [{"name": EVIL, "arguments": {EVIL: EVIL}}]}]
    model = vallum.Model(upstream="scripted", script=json.dumps(script).encode())
    async with vallum.Node(home=home) as node, node.sandbox(model=model) as sb:
        ran = await sb.exec(["python3", "-c", ASK, EVIL])
        assert ran.exit_code == 0, ran.stderr
    for arguments in (["show"], ["events"], ["events", "--json"], ["runs"], ["incidents"]):
        shown = vallum_command(home, *arguments)
        text = shown.stdout.decode()
        assert shown.returncode == 0, shown.stderr
        assert not [
            c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066"
        ]
    page = home / "report.html"
    made = vallum_command(home, "report", "-o", str(page))
    assert made.returncode == 0, made.stderr
    html = page.read_text("utf-8")
    assert "<script>alert" not in html and "<img src=x" not in html and "\u202e" not in html and "\x1b" not in html
    assert "alert(1)" in html  # it is shown, as text
