"""Real clients through inspected HTTP and HTTPS: they work where granted and fail readably where not."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from vallum.gateway.kit import Kit
from vallum.gateway.tls.leaves import Leaves
from vallum.node.authority import make_authority
from vallum.rules.grants import Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)


def _load(name: str, file: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


world_module = _load("http_clients_world_priv", "gateway_world_priv.py")
Server = _load("http_server", "http_server.py").Server
run_in_world, World = world_module.run_in_world, world_module.World

MIRROR = "192.0.2.20"
GUEST_CA, SERVER_CA = make_authority("r1"), make_authority("upstream")
KIT = Kit(authority=GUEST_CA, upstream_roots=SERVER_CA.certificate_pem)
GETS = Rule(id="gets", host="mirror.test", ports=(80, 443), methods=("GET", "HEAD"))
POSTS = Rule(id="posts", host="mirror.test", ports=(80, 443), methods=("POST",), paths=("/in/**",))
PYTHON = sys.executable


def serve(world: World, *, git_root: Path | None = None, port: int = 443):
    """The server of mirror.test, with a certificate of an authority that only the gateway trusts."""
    sock = world.in_fakes(lambda: world_module.listen(socket.AF_INET, (MIRROR, port)))
    context = Leaves(SERVER_CA).context("mirror.test", ("http/1.1",)) if port == 443 else None
    return Server(sock, context, git_root)


async def run(world: World, tmp: Path, *argv: str, **environ: str) -> tuple[int, str, str]:
    """Run a client in the cell's network; it trusts the run's authority and asks the gateway for names."""
    (tmp / "ca.pem").write_bytes(GUEST_CA.certificate_pem)
    (tmp / "none").write_text("")
    (tmp / "resolv").write_text("nameserver 9.9.9.9\noptions timeout:2 attempts:1\n")
    binds = f"mount --bind {tmp}/none /etc/hosts && mount --bind {tmp}/resolv /etc/resolv.conf"
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "-t", str(world.cell), "-n", "unshare", "-m", "sh", "-c", f'{binds} && exec "$@"', "sh", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            "PATH": os.environ["PATH"], "HOME": str(tmp), "LANG": "C.UTF-8",
            **dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), f"{tmp}/ca.pem"),
            **dict.fromkeys(("NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"), f"{tmp}/ca.pem"),
            **environ,
        },
    )
    out, err = await asyncio.wait_for(process.communicate(), 40)
    return process.returncode or 0, out.decode(), err.decode()


def inspect(tmp_path: Path, scenario, *allow: Rule, kit: Kit = KIT) -> None:
    run_in_world(tmp_path, Ruleset(allow=allow), scenario, kit=kit)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(tmp_path: Path, version: str) -> None:
    async def scenario(world: World) -> None:
        with serve(world) as server:
            code, out, err = await run(
                world, tmp_path, "curl", "-sS", "--path-as-is", version, "https://mirror.test/a/./b?c=1"
            )
            assert code == 0, err
            assert json.loads(out)["path"] == "/a/b?c=1"
            code, out, err = await run(world, tmp_path, "curl", "-sSi", version, "-d", "x", "https://mirror.test/out")
            assert " 403" in out.splitlines()[0] and "vallum: blocked by rule" in out, (out, err)
            data = "y" * 300_000
            (tmp_path / "data").write_text(data)
            at = f"@{tmp_path}/data"
            code, out, _ = await run(world, tmp_path, "curl", "-sS", version, "--data", at, "https://mirror.test/in/a")
            assert len(json.loads(out)["body"]) == 300_000
            assert [r[:2] for r in server.requests] == [("GET", "/a/b?c=1"), ("POST", "/in/a")]
            assert [e.state for e in await world.settled(5, "http.request")] == [
                *("opened", "closed", "denied", "opened", "closed"),
            ]
            flows = await world.settled(6)
            assert all(e.inspected for e in flows)

    inspect(tmp_path, scenario, GETS, POSTS)
