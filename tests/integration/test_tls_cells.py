"""Real clients in real cells: TLS that is ended and TLS that is relayed, servers with right and wrong certificates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: namespaces with addresses of their own", allow_module_level=True)

NAMES = ("read", "relay", "wrong", "expired", "expired-read", "self", "plain")
INSIDE = """
mount --bind "$1/hosts" /etc/hosts && ip link set lo up
for ip in $2; do ip addr add "$ip/32" dev lo; done
exec "$3" "$4" "$1"
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("tls")
    addresses = [f"192.0.2.{20 + number}" for number in range(len(NAMES))]
    hosts = [f"{ip} {name}.test\n" for ip, name in zip(addresses, NAMES, strict=True)]
    (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
    script = Path(__file__).with_name("tls_cells.py")
    done = subprocess.run(
        [
            *("unshare", "-n", "-m", "--propagation", "private", "sh", "-ec", INSIDE, "sh"),
            *(str(directory), " ".join(addresses), sys.executable, str(script)),
        ],
        env={**os.environ, "VALLUM_HOME": str(directory / "home")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def flows(seen: dict, name: str, **wanted: object) -> list[dict]:
    return [
        flow
        for flow in seen["flows"]
        if flow["dst_host"] == f"{name}.test" and all(flow[key] == value for key, value in wanted.items())
    ]


CLIENTS = ("curl", "wget", "openssl", "git", "urllib", "requests", "httpx", "node", "java")


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_accept_the_run_s_authority(seen: dict, client: str) -> None:
    said = seen["said"][client]
    if said["code"] == 127 or "not found" in said["out"]:
        pytest.skip(f"{client} is not installed")
    # The server speaks no git; that git could say so means that it read an answer.
    assert ("not valid: is this a git repository" if client == "git" else "hello read.test") in said["out"]


@pytest.mark.parametrize("client", ["curl", "wget", "openssl", "git", "urllib"])
def test_and_so_do_those_that_see_no_variable(seen: dict, client: str) -> None:
    said = seen["said"][f"{client}-without-variables"]
    if said["code"] == 127:
        pytest.skip(f"{client} is not installed")
    assert ("not valid: is this a git repository" if client == "git" else "hello read.test") in said["out"]


def test_a_request_that_is_not_granted_is_refused_in_words(seen: dict) -> None:
    said = seen["said"]["refused"]["out"]
    assert " 403" in said.splitlines()[0]
    assert "vallum: blocked by rule method-mismatch" in said
    assert "POST" not in seen["heard"]["read.test"]


def test_requests_are_charged_to_the_step_that_made_them(seen: dict) -> None:
    (denied,) = [r for r in seen["requests"] if r["state"] == "denied" and r["method"] == "POST"]
    assert (denied["host"], denied["path"], denied["rule"]) == ("read.test", "/", "method-mismatch")
    opened = [r for r in seen["requests"] if r["state"] == "opened" and r["host"] == "read.test"]
    assert {r["request"] for r in opened} == {
        r["request"] for r in seen["requests"] if r["state"] == "closed" and r["host"] == "read.test"
    }
    assert len({r["scope"]["step"] for r in [*opened, denied]}) > 5
    assert None not in {r["scope"]["step"] for r in [*opened, denied]}
    inspected = {flow["flow"] for flow in flows(seen, "read", state="opened", inspected=True)}
    assert {r["flow"] for r in [*opened, denied]} <= inspected


def test_relayed_tls_to_the_right_server(seen: dict) -> None:
    assert seen["said"]["relay"] == {"code": 0, "out": "hello relay.test\n"}
    (opened,) = flows(seen, "relay", state="opened")
    assert (opened["verdict"], opened["inspected"], opened["alpn"]) == ("allow", False, ["h2", "http/1.1"])
    assert opened["ja4"].startswith("t13d")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("wrong", "certificate-mismatch"),
        ("expired", "upstream-certificate"),
        ("self", "upstream-certificate"),
        ("plain", "upstream-certificate"),
    ],
)
def test_relayed_tls_to_a_server_that_is_another(seen: dict, name: str, rule: str) -> None:
    assert seen["said"][name]["code"] != 0
    (denied,) = flows(seen, name, state="denied")
    assert (denied["rule"], denied["verdict"], denied["bytes_out"]) == (rule, "deny", 0)
    assert denied["scope"]["step"] is not None
    assert f"{name}.test" in denied["reason"]
    if name != "plain":  # which hears our own ClientHello, since to it that is data
        assert seen["heard"][f"{name}.test"] == ""


def test_an_ended_flow_to_a_server_with_a_bad_certificate_is_answered_in_words(seen: dict) -> None:
    assert "vallum: blocked by rule upstream-certificate" in seen["said"]["expired-read"]["out"]
    assert "certificate has expired" in seen["said"]["expired-read"]["out"]
    assert seen["heard"]["expired-read.test"] == ""


def test_the_guest_has_certificates_and_cannot_change_those_of_others(seen: dict) -> None:
    files = seen["said"]["files"]["out"]
    assert "ca.pem" in files
    assert "ca-bundle.pem" in files
    assert "Permission denied" in files
    assert "SSL_CERT_FILE=/etc/vallum/ca-bundle.pem" in seen["said"]["environ"]["out"]


def test_the_authority_s_key_is_nowhere(seen: dict) -> None:
    assert seen["keys"] == []
    assert "BEGIN PRIVATE KEY" not in seen["said"]["environ"]["out"]
    assert "BEGIN PRIVATE KEY" not in seen["said"]["files"]["out"]
    memory = seen["said"]["memory"]["out"].split()
    assert "FOUND" not in memory
    assert int(memory[memory.index("looked") + 1]) > 0


def test_a_cell_whose_rules_read_nothing_is_as_it_was(seen: dict) -> None:
    out = seen["said"]["unequipped"]["out"]
    assert "No such file" in out
    assert "SSL_CERT_FILE" not in out
